"""How many more VMs of each size would fit, and what stands in the way of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dgx_kvm_sw.cli.output import View, counted
from dgx_kvm_sw.cli.picture import Span, line, paint, wrapped
from dgx_kvm_sw.decide import placement
from dgx_kvm_sw.model.base import to_json
from dgx_kvm_sw.model.errors import DgxKvmError
from dgx_kvm_sw.model.spec import VmSpec
from dgx_kvm_sw.reconcile import Situation, summary


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
    samples = {}
    for size in situation.platform.sizes:
        sample = _sample(situation, size)
        if isinstance(sample, VmSpec):
            samples[size] = sample
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
    result = []
    for size in (*situation.platform.sizes, 0):
        sample = _sample(situation, size)
        if isinstance(sample, str):
            result.append(_Fit(size, 0, "", sample, ""))
            continue
        found = placement.fits(situation.inputs, {size: sample})[size]
        if found.next:
            get = summary(found.next, situation.topology)
            result.append(_Fit(size, found.count, get, "", ""))
        elif found.refused:
            reasons = found.refused.reasons
            more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            remedy = next(iter(found.refused.remedies), "")
            result.append(_Fit(size, 0, "", f"{reasons[0]}{more}", remedy))
    return result


def _sample(situation: Situation, size: int) -> VmSpec | str:
    """A VM of this size, or what is wrong with the files that would make it."""
    try:
        return situation.sample_vm(size)
    except DgxKvmError as error:
        return error.message.splitlines()[0]
