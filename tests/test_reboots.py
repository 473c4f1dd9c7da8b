"""Which of the VMs that go off are to run again: sequences of events and what follows."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from dgx_kvm_sw.decide.reboots import MOST_REBOOTS, WITHIN_SECONDS, Seen, Verdict, judge
from dgx_kvm_sw.model.events import DomainEvent, EventKind


def event(word: str, vm: str = "a") -> DomainEvent:
    """ "off:shutdown", "ending:guest-reset", "started"."""
    kind, _, reason = word.partition(":")
    return DomainEvent(EventKind(kind), vm, f"uuid-of-{vm}", reason)


def verdicts(
    events: Iterable[DomainEvent], seconds: float = 0.0, seen: Seen | None = None
) -> list[Verdict]:
    """What is said of events that come so many seconds apart."""
    seen, found = seen or Seen(), []
    for number, each in enumerate(events):
        seen, verdict = judge(seen, each, number * seconds)
        found += [verdict] if verdict else []
    return found


# As libvirt 9.0 and QEMU 7.2 tell it. The second ending is libvirt's own doing.
REBOOT = ("ending:guest-reset", "ending:host-signal", "off:shutdown")
RESET_BY_HAND = ("ending:host-qmp-system-reset", "ending:host-signal", "off:shutdown")
POWER_OFF = ("ending:guest-shutdown", "ending:host-signal", "off:shutdown")
DESTROYED = ("ending:host-signal", "off:")


@pytest.mark.parametrize("words", [REBOOT, RESET_BY_HAND, ("started", *REBOOT)])
def test_a_reboot_is_started_once_it_is_off(words: tuple[str, ...]) -> None:
    assert verdicts(map(event, words[:-1])) == []
    assert verdicts(map(event, words)) == [Verdict.START]


@pytest.mark.parametrize(
    "words",
    [
        POWER_OFF,
        DESTROYED,
        ("ending:guest-panic", "ending:host-signal", "off:shutdown"),
        ("ending:", "off:shutdown"),
        ("off:shutdown",),  # its reason was missed
        ("ending:guest-reset", "off:"),  # destroyed while it rebooted
        ("ending:guest-reset", "started", "off:shutdown"),  # how that life ended was missed
        ("ending:host-signal", "ending:guest-reset", "off:shutdown"),
        (*REBOOT[:1], *DESTROYED, "off:shutdown"),
    ],
)
def test_what_is_no_reboot_stays_off(words: tuple[str, ...]) -> None:
    assert verdicts(map(event, words)) == []


def test_vms_are_told_apart() -> None:
    pairs = zip(REBOOT, POWER_OFF, strict=True)
    mixed = [each for one, other in pairs for each in (event(one, "a"), event(other, "b"))]
    assert verdicts(mixed) == [Verdict.START]
    assert verdicts([event("ending:guest-reset", "a"), event("off:shutdown", "b")]) == []


def reboots(number: int, vm: str = "a") -> list[DomainEvent]:
    return [event(word, vm) for _ in range(number) for word in ("started", *REBOOT)]


def test_a_loop_of_reboots_ends_and_begins_anew_when_somebody_starts_it() -> None:
    loop = [Verdict.START] * MOST_REBOOTS + [Verdict.LEAVE]
    assert verdicts(reboots(MOST_REBOOTS + 1)) == loop
    assert verdicts(reboots(2 * MOST_REBOOTS + 2)) == loop * 2


def test_a_loop_of_one_is_not_another_ones() -> None:
    mixed = reboots(MOST_REBOOTS, "a") + reboots(MOST_REBOOTS, "b")
    assert verdicts(mixed) == [Verdict.START] * (2 * MOST_REBOOTS)


def test_reboots_now_and_then_are_no_loop() -> None:
    apart = WITHIN_SECONDS / MOST_REBOOTS / 4  # four events make a reboot
    assert set(verdicts(reboots(50), apart)) == {Verdict.START}
    assert Verdict.LEAVE in verdicts(reboots(50), apart * 0.8)


def test_nothing_is_kept_of_vms_that_are_gone() -> None:
    seen = Seen()
    for number in range(100):
        for each in reboots(1, f"vm-{number}"):
            seen, _ = judge(seen, each, number * WITHIN_SECONDS)
    assert (len(seen.endings), len(seen.reboots)) == (0, 1)
