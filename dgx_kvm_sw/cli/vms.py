"""The verbs that take one VM at its word: start, stop, restart, console."""

from __future__ import annotations

import difflib
from argparse import Namespace
from collections.abc import Callable

from dgx_kvm_sw.access import run
from dgx_kvm_sw.cli.output import listed, say
from dgx_kvm_sw.cli.progress import Report, carry_out, exit_code, result
from dgx_kvm_sw.cli.session import Session, hold, site_of
from dgx_kvm_sw.decide.plan import Intent
from dgx_kvm_sw.execute import Power, leave_off
from dgx_kvm_sw.model.actions import Action
from dgx_kvm_sw.model.errors import DgxKvmError, ExitCode, UsageError
from dgx_kvm_sw.model.spec import PowerState
from dgx_kvm_sw.reconcile import Situation

_Actions = Callable[[str], tuple[Action, ...]]


def start(args: Namespace) -> int:
    with hold(site_of(args), args, Intent()) as session:
        return start_in(session, args)


def start_in(session: Session, args: Namespace) -> int:
    return _each(session, args, session.situation.start_actions, Power(), PowerState.RUNNING)


def stop(args: Namespace) -> int:
    if args.all and args.names:
        raise UsageError("--all means every VM", "leave out the names, or --all")
    if not (args.all or args.names):
        raise UsageError("NAME is missing", "name VMs, or say --all for every VM that runs")
    power = Power(args.timeout, args.force)
    with hold(site_of(args), args, Intent(), needs_file=False) as session:
        if args.all:
            domains = [each for each in session.situation.current.domains if each.managed]
            args.names = [each.name for each in domains if each.running]
            say("" if args.names else "no VM runs", quiet=args.quiet)
        else:
            domains = [session.situation.domain(name) for name in args.names]
        for domain in domains:
            if not domain.running:  # one whose guest reboots is off for a moment
                leave_off(session.site, domain.facts.uuid)
        return _each(session, args, session.situation.stop_actions, power, PowerState.STOPPED)


def restart(args: Namespace) -> int:
    power = Power(args.timeout, args.force)
    with hold(site_of(args), args, Intent()) as session:
        return _each(session, args, session.situation.restart_actions, power, PowerState.RUNNING)


def _each(
    session: Session, args: Namespace, actions_of: _Actions, power: Power, wanted: PowerState
) -> int:
    names = list(dict.fromkeys(args.names))
    chains = {name: actions_of(name) for name in names}  # a wrong name stops all before it begins
    already = [name for name, actions in chains.items() if not actions]
    if already:
        verb = "is" if len(already) == 1 else "are"
        say(f"{listed(already)} {verb} {wanted} already", quiet=args.quiet)
    actions = sorted((a for chain in chains.values() for a in chain), key=lambda a: a.phase)
    if not actions:
        return ExitCode.OK
    report = carry_out(session, tuple(actions), power, quiet=args.quiet)
    code = exit_code(report)
    for line in _contradictions(session.situation, report, names, wanted):
        say(line, quiet=args.quiet)
    say(f"{result(report, set())}.", quiet=args.quiet and not code)
    return code


def _contradictions(
    situation: Situation, report: Report, names: list[str], wanted: PowerState
) -> list[str]:
    """The file wins at the next apply: say so where it says otherwise."""
    against = [vm.name for vm in situation.spec.vms if vm.name in names and vm.state is not wanted]
    if not against or report.failures:
        return []
    if wanted is PowerState.STOPPED:
        them = "it" if len(against) == 1 else "them"
        text = f"the file says running, so the next apply starts {them} again"
    else:
        text = "the file says stopped, so the next apply --restart stops what runs"
    return [f"{listed(against)}: {text}"]


def console(args: Namespace) -> ExitCode:
    site = site_of(args)
    if site.simulated:
        raise DgxKvmError("a simulated VM has no console", "nothing runs in it")
    with site.hypervisor(read_only=True) as hypervisor:
        domains = {domain.name: domain for domain in hypervisor.domains()}
    if args.name not in domains:
        close = difflib.get_close_matches(args.name, domains, 1)
        hint = f"did you mean {close[0]}?" if close else "`dgx-kvm status` lists the VMs"
        raise UsageError(f"there is no VM {args.name}", hint)
    if domains[args.name].live is None:
        raise DgxKvmError(f"{args.name} is not running", f"run `dgx-kvm start {args.name}`")
    run.become(["virsh", "--connect", site.uri, "console", args.name], "libvirt-clients")
