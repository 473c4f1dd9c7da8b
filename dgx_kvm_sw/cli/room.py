"""How many more VMs of each size would fit, and what stands in the way of the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dgx_kvm_sw.cli.output import View, counted
from dgx_kvm_sw.cli.picture import Span, line, paint, wrapped
from dgx_kvm_sw.decide import placement
from dgx_kvm_sw.model.base import to_json
from dgx_kvm_sw.model.errors import DgxKvmError
from dgx_kvm_sw.model.placement import Room
from dgx_kvm_sw.model.spec import VmSpec
from dgx_kvm_sw.reconcile import Situation


@dataclass(frozen=True)
class _Fit:
    """How it stands with one size."""

    gpus: int
    more: int
    next: str  # what the first of them would get
    reason: str  # why no other fits
    remedy: str


def room(situation: Situation) -> dict[int, int]:
    """Count how many more VMs of each size that has GPUs would fit, each size on its own."""
    samples, _ = _samples(situation, situation.platform.sizes)
    found = placement.fits(situation.inputs, samples)
    return {size: room.count for size, room in found.items()}


def fits(situation: Situation, view: View) -> str:
    found = _fits(situation)
    lines = wrapped(
        "What would fit besides the VMs of the file; each line counts for itself.", view.width
    )
    for each in found:
        size = counted(each.gpus, "GPU") if each.gpus else "no GPU"
        style = "good" if each.more else "bad"
        first = line(f"  {size:7}  ", Span(f"{each.more:3}", style), "  ")
        lines += wrapped(
            f"next: {each.next}" if each.more else each.reason, view.width, first=first
        )
        if each.remedy and not each.more:
            arrow = line(" " * first.width, Span("→ ", "good"))
            lines += wrapped(each.remedy, view.width, first=arrow)
    return paint(lines, view)


def fits_json(situation: Situation) -> dict[str, Any]:
    return {"version": 1, "sizes": [to_json(each) for each in _fits(situation)]}


def _fits(situation: Situation) -> list[_Fit]:
    sizes = (*situation.platform.sizes, 0)
    samples, wrong = _samples(situation, sizes)
    found = placement.fits(situation.inputs, samples)
    return [
        _fit(size, found[size], situation) if size in found else _Fit(size, 0, "", wrong[size], "")
        for size in sizes
    ]


def _fit(size: int, room: Room, situation: Situation) -> _Fit:
    if room.next:
        return _Fit(size, room.count, placement.summary(room.next, situation.topology), "", "")
    assert room.refused is not None  # a room has the one or the other
    reasons = room.refused.reasons
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return _Fit(size, 0, "", f"{reasons[0]}{more}", next(iter(room.refused.remedies), ""))


def _samples(
    situation: Situation, sizes: Iterable[int]
) -> tuple[dict[int, VmSpec], dict[int, str]]:
    """A VM of each size, and by size what is wrong with the files that would make one."""
    samples, wrong = {}, {}
    for size in sizes:
        try:
            samples[size] = situation.sample_vm(size)
        except DgxKvmError as error:
            wrong[size] = error.message.splitlines()[0]
    return samples, wrong
