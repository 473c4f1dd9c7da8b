"""The host's mode in words: this boot, the next one, who holds what, what a switch changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dgx_kvm_sw.cli.output import View, counted
from dgx_kvm_sw.cli.picture import Line, Span, line, paint, section, sentences, table, wrapped
from dgx_kvm_sw.model.base import to_json
from dgx_kvm_sw.model.mode import (
    Assignable,
    Check,
    Function,
    Held,
    Mode,
    ModeStatus,
    Process,
    Verdict,
)
from dgx_kvm_sw.model.pci import CpuSet, PciAddress
from dgx_kvm_sw.model.topology import Topology

_PLURALS = {"NVSwitch": "NVSwitches"}
_STYLES = {Verdict.OK: "good", Verdict.WARN: "warn", Verdict.FAIL: "bad"}


@dataclass(frozen=True)
class ModeView:
    """All that `dgx-kvm mode` shows."""

    status: ModeStatus
    held: tuple[Held, ...]
    topology: Topology
    armed: tuple[Function, ...] | None  # None: KVM mode is not configured
    now: Assignable
    options: str
    units: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


# -- dgx-kvm mode ---------------------------------------------------------------------------------


def mode_text(found: ModeView, view: View) -> str:
    width = view.width
    title = "In KVM mode" if found.armed is not None else "KVM mode would change"
    lines = [
        *_status(found.status, width),
        *section("Problems after this boot", sentences(found.problems, width)),
        *section("Held now", sentences(held_texts(found.held), width)),
        *section("To VMs in KVM mode, beside the GPUs", _to_vms(found, width)),
        *section("Stay with the host", _staying(found, width)),
        *section(title, _changes(found, width)),
        *section("Notes", sentences(found.notes, width)),
    ]
    return paint(lines, view)


def _status(status: ModeStatus, width: int) -> Iterator[Line]:
    yield line("This boot: ", Span(status.booted.words, "heading"))
    due = Span("; reboot to get there" if status.reboot_needed else "", "warn")
    yield line("Next boot: ", Span(status.configured.words, "heading"), due)
    if status.unfinished:
        yield from wrapped(status.unfinished, width, first=line(Span("Unfinished: ", "bad")))


def held_texts(held: Iterable[Held]) -> list[str]:
    """One text for all devices that are held alike."""
    devices = tuple(held)
    groups: dict[tuple[str, tuple[Process, ...]], list[Held]] = {}
    for device in devices:
        groups.setdefault((device.driver or "", device.processes), []).append(device)
    texts = []
    for (driver, processes), group in groups.items():
        name = f"{driver} driver" if driver else "no driver"
        who = ", ".join(_process(process) for process in processes)
        suffix = f"; held by {who}" if who else ""
        texts.append(f"{_names(group, devices)}: {name}{suffix}")
    return texts


def _process(process: Process) -> str:
    if process.vm:
        return f"VM {process.vm} ({process.name}, {process.pid})"
    return f"{process.name} ({process.pid})"


def _names(group: list[Held], every: Sequence[Held]) -> str:
    """Return "16 GPUs" for all of them, "GPUs 0-3" for some."""
    words = []
    for kind in dict.fromkeys(each.kind for each in group):
        indexes = [each.index for each in group if each.kind == kind]
        plural = _PLURALS.get(kind, f"{kind}s")
        if len(indexes) == sum(each.kind == kind for each in every):
            words.append(counted(len(indexes), kind, plural))
        else:
            words.append(f"{kind if len(indexes) == 1 else plural} {CpuSet.of(indexes)}")
    return ", ".join(words)


def _to_vms(found: ModeView, width: int) -> list[Line]:
    """The list as armed, or what would be armed now, and where these differ."""
    now = found.now.given
    listed = now if found.armed is None else found.armed
    lines = _device_rows(found, ((each.address, "") for each in listed), width)
    if not lines and (found.armed is not None or not found.now.refusal):
        lines = [line("  no NIC and no drive")]
    if found.armed is not None and not found.now.refusal and now != found.armed:
        texts = [f"{_kind(found, each)} could go to VMs too" for each in now if each not in listed]
        texts += [f"{_kind(found, each)} is in use now" for each in listed if each not in now]
        lines += sentences([*texts, "`dgx-kvm mode kvm` makes this list anew"], width)
    return lines


def _kind(found: ModeView, each: Function) -> str:
    return f"{each.kind} {each.address}"


def _staying(found: ModeView, width: int) -> list[Line]:
    kept = found.now.kept
    return _device_rows(found, ((each.address, each.reason) for each in kept), width)


def _device_rows(found: ModeView, rows: Iterable[tuple[str, str]], width: int) -> list[Line]:
    """An address, what the device is and its name on the host, and a reason."""
    drawn: list[list[Line | str]] = [
        [f"  {address}", _device_name(found.topology, address), reason] for address, reason in rows
    ]
    return table(("", "", ""), drawn, width, shrink=(2,)) if drawn else []


def _device_name(topology: Topology, text: str) -> str:
    address = PciAddress.parse(text)
    for nic in topology.nics:
        if nic.pci.address == address:
            return " ".join(("NIC", *nic.interfaces))
    for drive in topology.drives:
        if drive.pci.address == address:
            return " ".join(("NVMe drive", *drive.block_devices))
    return "PCI device"


def _changes(found: ModeView, width: int) -> list[Line]:
    lines: list[Line] = []
    if found.options:
        lines += wrapped(found.options, width, first="  kernel words  ", indent=16)
    if found.units:
        units = ", ".join(unit.removesuffix(".service") for unit in found.units)
        lines += wrapped(units, width, first="  do not start  ", indent=16)
    other = Mode.KVM if found.status.configured is Mode.BARE_METAL else Mode.BARE_METAL
    text = f"dgx-kvm mode {other}, then reboot"
    if other is Mode.KVM:
        text += "; `dgx-kvm mode --check` says whether this host can"
    first = "  to switch     " if other is Mode.KVM else "  to go back    "
    return lines + wrapped(text, width, first=first, indent=16)


def mode_json(found: ModeView) -> dict[str, Any]:
    status = found.status
    return {
        "booted": status.booted.value,
        "configured": status.configured.value,
        "reboot_needed": status.reboot_needed,
        "unfinished": status.unfinished,
        "held": to_json(found.held),
        "armed": None if found.armed is None else [each.address for each in found.armed],
        "assignable": [each.address for each in found.now.given],
        "stay": to_json(found.now.kept),
        "kernel_words": found.options,
        "gated_units": list(found.units),
        "problems": list(found.problems),
        "notes": list(found.notes),
    }


# -- dgx-kvm mode --check -------------------------------------------------------------------------


def checks_text(checks: Iterable[Check], view: View) -> str:
    """One line for each check, and one for the next step where it is not met."""
    every = tuple(checks)
    left = max(len(check.name) for check in every)
    lines: list[Line] = []
    for check in every:
        first = line(
            Span(f"{check.verdict:<4}", _STYLES[check.verdict]), f"  {check.name:<{left}}  "
        )
        lines += wrapped(check.message, view.width, first=first)
        if check.verdict is not Verdict.OK and check.hint:
            lines += wrapped(check.hint, view.width, first=" " * first.width)
    return paint(lines, view)


# -- after a switch -------------------------------------------------------------------------------


def what_next(
    before: ModeStatus,
    after: ModeStatus,
    functions: Iterable[Function],
    armed: Iterable[Function],
    *,
    rebooting: bool,
) -> list[str]:
    """Say in three lines at most what happens now."""
    target = after.configured
    already = "already " if before.configured is target else ""
    if not after.reboot_needed:
        return [
            f"This host is {already}in the mode asked for: {target.words}. No reboot is needed."
        ]
    if target is Mode.KVM:
        every = [*(each for each in functions if each.is_gpu or each.is_nvswitch), *armed]
        what = f"gives {_count(every)} to VMs"
    else:
        what = "keeps all devices with the host"
    return [
        f"The next boot is {already}set to {target.words}: it {what}.",
        "Rebooting now." if rebooting else "Until then nothing changes. When it suits: reboot",
        f"To go back: dgx-kvm mode {Mode.BARE_METAL if target is Mode.KVM else Mode.KVM}",
    ]


def _count(functions: Iterable[Function]) -> str:
    kinds = Counter(each.kind.removeprefix("InfiniBand ") for each in functions)
    words = [counted(number, kind, _PLURALS.get(kind, "")) for kind, number in kinds.items()]
    return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else "".join(words)
