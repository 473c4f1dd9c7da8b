"""The verbs that write vms.d: create and delete, each for a VM with a file of its own."""

from __future__ import annotations

import contextlib
import json
import os.path
import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.cli import plans
from dgx_kvm_sw.cli.output import counted, listed, say, view_of
from dgx_kvm_sw.cli.progress import Report, carry_out, exit_code, result
from dgx_kvm_sw.cli.session import Session, gathered, hold, site_of
from dgx_kvm_sw.decide.domain import detached_disks, own_disks
from dgx_kvm_sw.decide.networks import needed, unused
from dgx_kvm_sw.decide.plan import Intent
from dgx_kvm_sw.execute import Power
from dgx_kvm_sw.guest import images
from dgx_kvm_sw.guest.problems import unknown
from dgx_kvm_sw.model.actions import RemoveNetwork, UndefineDomain, Verb
from dgx_kvm_sw.model.domain import DomainStatus
from dgx_kvm_sw.model.errors import BadFileError, DgxKvmError, UsageError
from dgx_kvm_sw.reconcile import Site, Situation

_NUMBER = re.compile(r"[0-9]{1,9}")
_HEAD = "# Made by `dgx-kvm create`. Edit it as you like; `dgx-kvm delete {name}` takes it away.\n"
_OPTIONS = {"name": "NAME", "disks": "--disk", "networks": "--network"}


def create(args: Namespace) -> int:
    site = site_of(args)
    _check_image(site, args.image)
    with hold(site, args, Intent()) as session:
        _check_is_new(session.situation, args.name)
        file = _file_of(site, args.name)
        with _written(site, file, _text(args)):
            made = Session(site, session.hypervisor, _gathered_with(session, file))
            _check_fits(made.situation, args.name)
        return _make(made, args, file)


def _check_image(site: Site, name: str | None) -> None:
    """Raise for a name that no image has; one that cannot be used is no mistake of the user's."""
    known = images.catalogue(site.root).names
    if name is not None and name not in known:
        message, hint = unknown("image", name, known)
        raise UsageError(f"--image: {message}", hint)


def _file_of(site: Site, name: str) -> str:
    """The file of one VM in vms.d, below the root of the spec."""
    return os.path.join(os.path.dirname(site.spec_file), "vms.d", f"{name}.yaml")


def _spec_root(site: Site) -> Root:
    return site.spec_root or site.root


def _check_is_new(situation: Situation, name: str) -> None:
    for vm in situation.spec.vms:
        if vm.name == name:
            raise UsageError(
                f"{name} is declared already, at {vm.source}", "choose another name, or edit it"
            )
    held = situation.current.domain(name)
    if held and held.managed:
        raise UsageError(
            f"{name} exists and is no longer declared",
            "declare it in a file again to keep it, or delete it with `dgx-kvm apply --prune`;"
            " or choose another name",
        )


@contextlib.contextmanager
def _written(site: Site, file: str, text: str) -> Iterator[None]:
    """Have `file` there; it goes again when what is done inside fails."""
    root = _spec_root(site)
    if root.exists(file):  # it does not declare the VM, but it is not ours to overwrite
        raise UsageError(f"{root.path(file)} is there already", "move it away first")
    root.write(file, text)
    try:
        yield
    except BaseException:
        root.remove(file)
        raise


def _gathered_with(session: Session, file: str) -> Situation:
    """Gather again, with mistakes of the new file told in words of the command line."""
    try:
        return gathered(session.site, session.hypervisor, Intent())
    except BadFileError as error:
        own = [each for each in error.problems if each.file.endswith(file)]
        if not own:
            raise
        first = own[0]
        key = re.sub(r"^vms\[0\]\.?|\[.*", "", first.path)
        option = _OPTIONS.get(key, f"--{key}" if key else "this VM")
        raise UsageError(f"{option}: {first.message}", first.hint) from error


def _check_fits(situation: Situation, name: str) -> None:
    for refused in situation.placements.unplaceable:
        if refused.vm == name:
            reasons = "\n  ".join(refused.reasons)
            raise DgxKvmError(
                f"{name} does not fit, so nothing was changed:\n  {reasons}",
                "\n  ".join(refused.remedies),
            )


def _make(session: Session, args: Namespace, file: str) -> int:
    plan = session.situation.plan(Intent())
    actions = tuple(action for action in plan.actions if action.vm == args.name)
    others = [row.vm for row in plan.vms if row.vm != args.name]
    row = next(row for row in plan.vms if row.vm == args.name)
    notes = [*_taken_disks(session.situation, args.name), *plan.notes]
    lines = [*plans.vm_lines(row, view_of(None)), *(f"Note: {note}" for note in notes)]
    say("\n".join(lines), quiet=args.quiet)
    report = carry_out(session, actions, quiet=args.quiet)
    code = exit_code(report)
    if others:
        text = f"{counted(len(others), 'other VM waits', 'other VMs wait')} for `dgx-kvm apply`"
        say(f"{text}: {listed(others)}", quiet=args.quiet)
    say(f"Declared in {_spec_root(session.site).path(file)}", quiet=args.quiet and not code)
    created = {args.name} if row.verb is Verb.CREATE else set()
    say(f"{result(report, created)}.", quiet=args.quiet and not code)
    return code


def _taken_disks(situation: Situation, name: str) -> Iterator[str]:
    """Name the disks that an earlier VM of this name left; they are taken with what they hold."""
    have = {volume.path for volume in situation.current.volumes}
    for want in situation.desired:
        if want.facts.name == name:
            taken = [volume.path for volume in want.volumes if volume.path in have]
            yield from (f"{name} takes the disk {path} as it is" for path in taken)


# -- the text of a file -------------------------------------------------------------------------


def _text(args: Namespace) -> str:
    """Return a file that declares the VM as the options say."""
    lines = [_HEAD.format(name=args.name), "vms:", f"  - name: {json.dumps(args.name)}"]
    lines.append(f"    gpus: {args.gpus}")
    if args.vcpus is not None:
        lines.append(f"    vcpus: {_number(args.vcpus)}")
    for key in ("memory", "image", "tenant"):
        value = getattr(args, key)
        if value is not None:
            lines.append(f"    {key}: {json.dumps(value)}")
    if args.pin is not None:  # "" is refused as it was typed, not forgotten
        pins = ", ".join(_number(pin.strip()) for pin in args.pin.split(","))
        lines.append(f"    pin: [{pins}]")
    disks = [(json.dumps(name), json.dumps(size)) for name, size in args.disks]
    lines += _list("disks", [f"name: {name}, size: {size}" for name, size in disks])
    networks = [(json.dumps(kind), _source(kind, name)) for kind, name in args.networks]
    lines += _list("networks", [f"{kind}: {name}" for kind, name in networks])
    if args.stopped:
        lines.append("    state: stopped")
    return "\n".join(lines) + "\n"


def _list(key: str, items: list[str]) -> list[str]:
    return [f"    {key}:", *(f"      - {{{item}}}" for item in items)] if items else []


def _source(kind: str, name: str) -> str:
    """The value of a network; only NAT knows one that is no name."""
    return name if (kind, name) == ("nat", "true") else json.dumps(name)


def _number(text: str) -> str:
    """Words as YAML where a number is wanted; what is none is quoted, and refused as it was typed.

    Everything else is a string and always quoted: a VM may be called 123 or true.
    """
    return text if _NUMBER.fullmatch(text) else json.dumps(text)


# -- delete -------------------------------------------------------------------------------------


def delete(args: Namespace) -> int:
    site = site_of(args)
    with hold(site, args, Intent()) as session:
        file = _file_of(site, args.name)
        _check_is_from_create(session.situation, args.name, file)
        held = session.situation.current.domain(args.name)
        last, code = "Done: it was declared, but not made yet", 0
        if held and held.managed:
            report = _take_down(session, held, args)
            last, code = result(report, set()), exit_code(report)
        if not code:  # until the VM is gone, it stays declared
            _spec_root(site).remove(file)
    say(f"{last}.", quiet=args.quiet and not code)
    return code


def _check_is_from_create(situation: Situation, name: str, file: str) -> None:
    """Raise unless `file` declares this VM and nothing else."""
    spec = situation.spec
    source = next((vm.source for vm in spec.vms if vm.name == name), None)
    if source is None:
        held = situation.domain(name)  # raises for a name that nobody knows
        raise UsageError(
            f"{held.name} is in no file any more", "`dgx-kvm apply --prune` deletes such VMs"
        )
    company = [vm.name for vm in spec.vms if vm.source.file == file and vm.name != name]
    company += [tenant.name for tenant in spec.tenants if tenant.source.file == file]
    if source.file != file or company:
        besides = f", together with {listed(company)}" if source.file == file else ""
        raise UsageError(
            f"{name} is declared at {source}{besides}, not by `dgx-kvm create` alone",
            "remove it there, then run `dgx-kvm apply --prune`",
        )


def _removals(situation: Situation, name: str) -> Iterator[RemoveNetwork]:
    """Remove the networks that nobody has without this VM."""
    others = [vm for vm in situation.spec.vms if vm.name != name]
    current = situation.current
    domains = tuple(domain for domain in current.domains if domain.name != name)
    names = needed(others, current.networks, ())
    for network in unused(replace(current, domains=domains), names):
        yield RemoveNetwork.of(network, current)


def _take_down(session: Session, held: DomainStatus, args: Namespace) -> Report:
    if held.running and not args.stop:
        raise DgxKvmError(f"{held.name} is running", "--stop shuts it down first")
    disks = own_disks(held, session.situation.current.volumes)
    doomed = disks if args.delete_disks else ()
    actions = (
        *session.situation.stop_actions(held.name),
        UndefineDomain(held.name, held.facts.uuid, doomed),
        *_removals(session.situation, held.name),
    )
    power = Power(args.timeout, args.force)
    report = carry_out(session, actions, power, quiet=args.quiet)
    apart = detached_disks(held, session.situation.current.volumes)
    if not exit_code(report):
        title = "Its disks are deleted:" if doomed else "Its disks stay:"
        for head, paths in ((title, disks), ("Disks that were its own once stay:", apart)):
            if paths:
                say("\n  ".join((head, *paths)), quiet=args.quiet)
    return report
