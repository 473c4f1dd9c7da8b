"""Which of the VMs that go off have rebooted, and are to run again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dgx_kvm_sw.model.base import StrEnum
from dgx_kvm_sw.model.events import DomainEvent, EventKind

MOST_REBOOTS = 5
WITHIN_SECONDS = 600.0

# QEMU's words (qapi/run-state.json, ShutdownCause) for a reset that it was told to end with: one
# that the guest, its watchdog or a triple fault made, and `virsh reset`.
_RESETS = ("guest-reset", "host-qmp-system-reset")


class Verdict(StrEnum):
    START = "start"  # it rebooted
    LEAVE = "leave"  # it rebooted too often


@dataclass(frozen=True)
class Seen:
    """What matters of the events so far, by the UUIDs of domains."""

    endings: Mapping[str, str] = field(default_factory=dict)  # why each is about to go off
    reboots: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # when, of late


def judge(seen: Seen, event: DomainEvent, now: float) -> tuple[Seen, Verdict | None]:
    """Take in one event. A domain whose guest asked for a reset has rebooted once it is off,
    unless somebody destroyed it meanwhile.

    After LEAVE its reboots count from none again: whoever starts it then has seen to it.
    """
    if event.kind is EventKind.ENDING:
        # The first reason counts: libvirt then ends QEMU by a signal, which is a second one.
        return replace(seen, endings={event.uuid: event.reason, **seen.endings}), None
    rebooted = (
        event.kind is EventKind.OFF
        and event.reason == "shutdown"
        and seen.endings.get(event.uuid) in _RESETS
    )
    seen = replace(seen, endings={u: why for u, why in seen.endings.items() if u != event.uuid})
    if not rebooted:
        return seen, None
    since = now - WITHIN_SECONDS
    recent = {uuid: tuple(t for t in times if t > since) for uuid, times in seen.reboots.items()}
    times = (*recent.pop(event.uuid, ()), now)
    recent = {uuid: each for uuid, each in recent.items() if each}
    if len(times) > MOST_REBOOTS:
        return replace(seen, reboots=recent), Verdict.LEAVE
    return replace(seen, reboots={**recent, event.uuid: times}), Verdict.START
