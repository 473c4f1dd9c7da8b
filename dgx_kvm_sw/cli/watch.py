"""The verb watch: a VM whose guest has rebooted is started again, made ready like at any start.

All it needs is imported at its beginning: it runs for months, across upgrades of the package.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Iterable

from dgx_kvm_sw.cli import vms
from dgx_kvm_sw.cli.output import complain, listed, say
from dgx_kvm_sw.cli.session import hold, site_of
from dgx_kvm_sw.decide.plan import Intent
from dgx_kvm_sw.decide.reboots import MOST_REBOOTS, WITHIN_SECONDS, Seen, Verdict, judge
from dgx_kvm_sw.execute import is_left_off, write_journal
from dgx_kvm_sw.guest.listener import Listener
from dgx_kvm_sw.model.errors import BadFileError, DgxKvmError, ExitCode
from dgx_kvm_sw.model.events import DomainEvent
from dgx_kvm_sw.reconcile import Site, read_current

_Names = dict[str, str]  # of VMs, by UUID


def watch(args: Namespace) -> int:
    """Go on until a signal, or until libvirt ends: systemd then starts this anew, which is
    simpler than to find out here when libvirt is back, and misses no more.
    """
    site = site_of(args)
    if site.simulated:
        raise DgxKvmError("a simulated VM never reboots", "nothing runs in it")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # the journal is to have each line at once
            stream.reconfigure(line_buffering=True)
    listener = Listener(site.uri)
    say(f"Waiting for reboots of VMs at {site.uri}.", quiet=args.quiet)
    seen = Seen()
    while True:
        seen, rebooted, too_often = _judged(seen, listener.wait())
        try:
            code = _handle(site, args, rebooted, too_often)
        except DgxKvmError as error:  # of one VM; the next is none the worse for it
            _complain(error, rebooted | too_often)
        else:
            if code > 128:  # a signal came while a VM was being started
                return code


def _judged(seen: Seen, events: Iterable[DomainEvent]) -> tuple[Seen, _Names, _Names]:
    """Return what is known now, whom to start, and whom not any more."""
    found: dict[Verdict, _Names] = {Verdict.START: {}, Verdict.LEAVE: {}}
    for event in events:
        seen, verdict = judge(seen, event, time.monotonic())
        if verdict:
            found[verdict][event.uuid] = event.name
    return seen, found[Verdict.START], found[Verdict.LEAVE]


def _handle(site: Site, args: Namespace, rebooted: _Names, too_often: _Names) -> int:
    if not (rebooted or too_often):
        return ExitCode.OK
    ours = _ours(site)  # before the lock: what others do with their domains is not our business
    for name in (name for uuid, name in too_often.items() if uuid in ours):
        often = f"more than {MOST_REBOOTS} times within {WITHIN_SECONDS / 60:g} minutes"
        complain(
            f"{name} has rebooted {often}: it is left off",
            f"look at its console log, then run `dgx-kvm start {name}`",
        )
        write_journal(site, {"event": "left off", "vm": name, "error": often}, sync=True)
    names = {uuid: name for uuid, name in rebooted.items() if uuid in ours}
    return _start(site, args, names) if names else ExitCode.OK


def _ours(site: Site) -> set[str]:
    with site.hypervisor() as hypervisor:
        return {each.facts.uuid for each in read_current(hypervisor).domains if each.managed}


def _start(site: Site, args: Namespace, rebooted: _Names) -> int:
    """What `dgx-kvm start` does, for those that nobody has stopped or deleted meanwhile."""
    say(f"Rebooted: {listed(rebooted.values())}.", quiet=args.quiet)
    with hold(site, args, Intent()) as session:
        ours = {each.facts.uuid for each in session.situation.current.domains if each.managed}
        args.names = []
        for uuid, name in rebooted.items():
            if uuid not in ours or is_left_off(site, uuid):
                say(f"{name} was stopped meanwhile: it stays off.", quiet=args.quiet)
            else:
                write_journal(site, {"event": "rebooted", "vm": name}, sync=False)
                args.names.append(name)
        return vms.start_in(session, args) if args.names else ExitCode.OK


def _complain(error: DgxKvmError, names: _Names) -> None:
    """Say why VMs stay off; libvirt's own end is said by the next wait."""
    who = f"{listed(names.values())} {'stays' if len(names) == 1 else 'stay'} off"
    if isinstance(error, BadFileError):
        complain(f"{who}: a file has mistakes", "`dgx-kvm validate` shows them")
    else:
        again = f"`dgx-kvm start {' '.join(names.values())}` tries again"
        complain(f"{who}: {error.message}", error.hint or again)
