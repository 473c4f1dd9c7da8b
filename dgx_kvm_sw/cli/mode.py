"""The verb mode: show the host's mode, check what KVM mode needs, switch, verify after a boot."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from dgx_kvm_sw.cli import modeview
from dgx_kvm_sw.cli.output import complain, listed, say, say_json, view_of
from dgx_kvm_sw.cli.session import site_of
from dgx_kvm_sw.host import mode as host_mode
from dgx_kvm_sw.host import preflight, verify
from dgx_kvm_sw.host.holders import holders
from dgx_kvm_sw.host.platforms import survey
from dgx_kvm_sw.model.base import to_json
from dgx_kvm_sw.model.errors import DgxKvmError, ExitCode, HostError, UsageError
from dgx_kvm_sw.model.mode import Check, Mode, Verdict
from dgx_kvm_sw.reconcile import Site, read_current


def mode(args: Namespace) -> ExitCode:
    site = site_of(args)
    _check_usage(args)
    if site.simulated:
        raise DgxKvmError(
            "a simulated machine has no mode to show or switch",
            "it is laid out as if it had booted in KVM mode; run this on a DGX",
        )
    if args.check:
        return _check(site, args)
    if args.verify:
        return _verify(site, args)
    if args.mode:
        return _switch(site, Mode(args.mode), args)
    found = _look(site)
    if args.json:
        say_json(modeview.mode_json(found))
    else:
        say(modeview.mode_text(found, view_of(sys.stdout, args.no_color)), quiet=args.quiet)
    return ExitCode.OK


def _check_usage(args: Namespace) -> None:
    given = [name for name in ("check", "verify") if getattr(args, name)]
    if args.reboot and not args.mode:
        raise UsageError("--reboot follows a switch", "say which: dgx-kvm mode kvm --reboot")
    if len(given) + bool(args.mode) > 1:
        words = [*([args.mode] if args.mode else []), *(f"--{name}" for name in given)]
        raise UsageError(f"{' and '.join(words)} are two commands", "run one, then the other")
    if args.json and (args.mode or args.verify):
        what = args.mode or "--verify"
        raise UsageError(
            f"`mode {what}` has no --json", "`dgx-kvm mode --json` shows what came of it"
        )


# -- looking --------------------------------------------------------------------------------------


def _look(site: Site) -> modeview.ModeView:
    """Gather what `dgx-kvm mode` shows; what a script refuses to say is noted, not fatal."""
    root = site.root
    notes: list[str] = []
    status = host_mode.status(root)
    _, topology = survey(root)
    held = holders(root, topology)
    if not held.complete and held.devices:
        hint = ": run this command as root" if os.geteuid() else ""
        notes.append(f"some processes could not be looked at{hint}")
    now = host_mode.assignable(root)
    if now.refusal:
        notes.append(": ".join(filter(None, now.refusal)))
    options, units = "", tuple[str, ...]()
    try:
        options = host_mode.options(root)
        units = host_mode.gated_units(root)
    except HostError as error:
        notes.append(f"{error.message}: {error.hint}" if error.hint else error.message)
    armed = host_mode.armed_devices(root) if status.configured is Mode.KVM else None
    problems = verify.recorded(root)
    return modeview.ModeView(
        status, held.devices, topology, armed, now, options, units, problems, tuple(notes)
    )


def _check(site: Site, args: Namespace) -> ExitCode:
    checks = preflight.preflight(site.root)
    failed = preflight.failures(checks)
    if args.json:
        say_json({"possible": not failed, "checks": to_json(checks)})
    else:
        say(modeview.checks_text(checks, view_of(sys.stdout, args.no_color)), quiet=args.quiet)
        for check in failed if args.quiet else ():
            _complain(check)
    return ExitCode.FAILED if failed else ExitCode.OK


def _verify(site: Site, args: Namespace) -> ExitCode:
    if host_mode.booted(site.root) is not Mode.KVM:
        verify.record(site.root, ())
        say("this boot is bare metal: there is nothing to verify", quiet=args.quiet)
        return ExitCode.OK
    found = verify.verify(site.root)
    verify.record(site.root, found)
    for trouble in found:
        print(f"dgx-kvm: {trouble}", file=sys.stderr)
    if found:
        return ExitCode.FAILED
    say("every device is where KVM mode needs it", quiet=args.quiet)
    return ExitCode.OK


# -- switching ------------------------------------------------------------------------------------


def _switch(site: Site, target: Mode, args: Namespace) -> ExitCode:
    root = site.root
    if root.directory == Path("/") and os.geteuid() != 0:
        raise HostError(
            f"only root may switch this host to {target.words}",
            f"run `sudo dgx-kvm mode {target}`",
        )
    if args.reboot:
        _refuse_while_vms_run(site, "nothing was changed")
    before, listed_before = host_mode.status(root), host_mode.armed_devices(root)
    if target is Mode.BARE_METAL:
        host_mode.switch(root, "disarm", quiet=args.quiet)
    elif before.configured is Mode.KVM and listed_before == host_mode.assignable(root).given:
        host_mode.switch(root, "refresh", quiet=args.quiet)
    else:
        _insist_on_preflight(site)
        host_mode.switch(root, "arm", quiet=args.quiet)
    after, armed = host_mode.status(root), host_mode.armed_devices(root)
    if target is Mode.KVM and armed != listed_before:  # the boot images hold the list
        after = replace(after, reboot_needed=True)
    devices = host_mode.functions(root)
    for line in modeview.what_next(before, after, devices, armed, rebooting=args.reboot):
        say(line, quiet=args.quiet)
    if args.reboot and after.reboot_needed:
        _refuse_while_vms_run(site, "the mode is switched, but the host was not rebooted")
        host_mode.reboot(root)
    return ExitCode.OK


def _insist_on_preflight(site: Site) -> None:
    checks = preflight.preflight(site.root)
    for check in checks:
        if check.verdict is not Verdict.OK:
            _complain(check)
    if failed := preflight.failures(checks):
        names = listed(dict.fromkeys(check.name for check in failed))
        raise HostError(f"KVM mode is not possible yet: {names}", "nothing was changed")


def _complain(check: Check) -> None:
    prefix = "" if check.verdict is Verdict.FAIL else "warning: "
    complain(f"{prefix}{check.name}: {check.message}", check.hint)


def _refuse_while_vms_run(site: Site, state: str) -> None:
    with site.hypervisor(read_only=True) as hypervisor:
        domains = read_current(hypervisor).domains
    names = [domain.name for domain in domains if domain.managed and domain.running]
    if names:
        verb = "runs" if len(names) == 1 else "run"
        raise HostError(
            f"{listed(names)} still {verb}, and a reboot would take them down; {state}",
            "run `dgx-kvm stop --all` first, or leave out --reboot",
        )
