"""The declarative verbs: validate, plan, diff, apply."""

from __future__ import annotations

import difflib
import sys
from argparse import Namespace
from collections.abc import Iterator

from dgx_kvm_sw.cli import plans
from dgx_kvm_sw.cli.output import View, counted, say, say_json, view_of
from dgx_kvm_sw.cli.session import Session, gathered, hold, look, pointing_below, site_of
from dgx_kvm_sw.decide.plan import Intent
from dgx_kvm_sw.guest import images
from dgx_kvm_sw.guest import spec as spec_file
from dgx_kvm_sw.guest.problems import problems_json
from dgx_kvm_sw.model.actions import Plan, Verb, VmPlan
from dgx_kvm_sw.model.base import to_json
from dgx_kvm_sw.model.errors import BadFileError, ExitCode, UsageError
from dgx_kvm_sw.model.spec import HostSpec
from dgx_kvm_sw.reconcile import Site, Situation


def validate(args: Namespace) -> ExitCode:
    site = site_of(args, args.spec)
    try:
        with pointing_below(site):
            spec = _load(site)
    except BadFileError as error:
        if args.json:
            say_json({"valid": False, "problems": problems_json(error.problems)})
            return ExitCode.BAD_FILE
        raise
    if args.json:
        vms = [vm.name for vm in spec.vms]
        say_json({"valid": True, "problems": [], "files": list(spec.files), "vms": vms})
    else:
        say(f"{counted(len(spec.vms), 'VM')}, no mistakes", quiet=args.quiet)
    return ExitCode.OK


def _load(site: Site) -> HostSpec:
    """Load the file; where no image was ever installed (a laptop, CI) any image name will do."""
    if any(map(site.root.exists, (images.MANIFESTS, images.IMPORTED))):
        return site.load_spec(images.catalogue(site.root))
    return spec_file.load(site.spec_root or site.root, site.spec_file)


def plan(args: Namespace) -> ExitCode:
    intent = plans.intent_of(args.restart, args.prune, args.delete_disks)
    situation = look(args, intent)
    found = situation.plan(intent)
    if args.output:
        plans.save(args.output, found, situation, intent, args.file)
    if args.json:
        say_json(plans.plan_json(found, situation, intent))
    elif not args.quiet:
        say(plans.plan_text(found, view_of(sys.stdout, args.no_color)))
        say(f"To do exactly this: dgx-kvm apply {args.output}" if args.output else "")
        say(plans.summary(found, situation))
    return ExitCode.CHANGES if found.pending else ExitCode.OK


def apply(args: Namespace) -> int:
    saved = plans.load(args.plan) if args.plan else None
    intent = plans.intent_of(args.restart, args.prune, args.delete_disks)
    if saved and intent not in (Intent(), saved.intent):
        raise UsageError(
            f"{args.plan} was made with other options",
            "a saved plan is applied as it is: leave out --restart, --prune and --delete-disks",
        )
    intent = saved.intent if saved else intent
    site = site_of(args, None if args.file or not saved else saved.spec_file)
    with hold(site, args, intent) as session:
        found = session.situation.plan(intent)
        if saved:
            saved.check(found, session.situation)
        return _apply(session, found, args)


def _apply(session: Session, found: Plan, args: Namespace) -> int:
    say(plans.plan_text(found, view_of(sys.stdout, args.no_color)), quiet=args.quiet)
    refused = ExitCode.FAILED if found.unplaceable else ExitCode.OK
    if not found.actions:
        say(plans.summary(found, session.situation), quiet=args.quiet and not refused)
        return refused
    from dgx_kvm_sw.cli.progress import carry_out, exit_code, result
    from dgx_kvm_sw.execute import Power

    report = carry_out(session, found.actions, Power(args.timeout, args.force), quiet=args.quiet)
    created = {row.vm for row in found.vms if row.verb is Verb.CREATE}
    code = exit_code(report) or refused
    say(f"{result(report, created)}{plans.unfinished(found)}.", quiet=args.quiet and not code)
    return code


# -- diff ---------------------------------------------------------------------------------------


def diff(args: Namespace) -> ExitCode:
    site = site_of(args)
    view = view_of(sys.stdout, args.no_color)
    with site.hypervisor(read_only=True) as hypervisor:
        situation = gathered(site, hypervisor, Intent())
        held = {domain.name: domain.inactive for domain in hypervisor.domains()}
    found = situation.plan(Intent())
    texts = list(_xml_diffs(situation, found, held) if args.xml else _word_diffs(found))
    if args.json:
        rows = [
            {"vm": row.vm, "verb": row.verb.value, "changes": to_json(row.changes)}
            for row in found.vms
        ]
        say_json({"differs": found.pending, "vms": rows, "unplaceable": to_json(found.unplaceable)})
    elif not args.quiet:
        say("\n".join(_painted(text, view) for text in texts))
    return ExitCode.CHANGES if found.pending else ExitCode.OK


def _word_diffs(found: Plan) -> Iterator[str]:
    for row in found.vms:
        yield f"@@ {row.vm} @@"
        yield from _row_diff(row)
    for refused in found.unplaceable:
        yield f"@@ {refused.vm} @@"
        yield f"+ declared, but it does not fit: {'; '.join(refused.reasons)}"


def _row_diff(row: VmPlan) -> Iterator[str]:
    if row.verb is Verb.CREATE:
        yield f"+ {row.summary}"
    elif row.verb is Verb.DELETE:
        yield "- a VM that the file no longer declares"
    else:
        for change in row.changes:
            yield f"- {change.field}: {change.old}"
            yield f"+ {change.field}: {change.new}"


def _xml_diffs(situation: Situation, found: Plan, held: dict[str, str]) -> Iterator[str]:
    """Yield unified diffs; libvirt prints its own defaults, so the held text says more."""
    for row in found.vms:
        definition = situation.definitions.get(row.vm)
        old = held.get(row.vm, "").splitlines()
        new = definition.xml.splitlines() if definition else []
        if row.verb is Verb.DELETE or definition:
            yield from difflib.unified_diff(
                old, new, f"libvirt/{row.vm}", f"declared/{row.vm}", lineterm=""
            )


def _painted(line: str, view: View) -> str:
    colors = {"-": "red", "+": "green", "@": "cyan"}
    return view.paint(line, colors[line[0]]) if line[:1] in colors else line
