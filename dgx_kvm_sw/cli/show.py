"""What operators look at: status, topology, explain and fits, as text and as JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dgx_kvm_sw.cli.board import boards
from dgx_kvm_sw.cli.explain import explain, explain_json
from dgx_kvm_sw.cli.faults import fault_lines, kept_by_host
from dgx_kvm_sw.cli.holders import FREE, Holders, VmRow, VmState, holders, vm_rows
from dgx_kvm_sw.cli.output import View, counted
from dgx_kvm_sw.cli.picture import (
    BLANK,
    Line,
    Span,
    flowed,
    line,
    paint,
    section,
    sentences,
    table,
    wrapped,
)
from dgx_kvm_sw.cli.room import fits, fits_json, room
from dgx_kvm_sw.cli.tree import topology, topology_json
from dgx_kvm_sw.decide.plan import Intent, devices_of
from dgx_kvm_sw.model.actions import Change, Effect, Plan, Verb, VmPlan
from dgx_kvm_sw.model.base import to_json
from dgx_kvm_sw.model.domain import DomainStatus
from dgx_kvm_sw.model.pci import CpuSet, PciAddress, PciDevice
from dgx_kvm_sw.reconcile import Situation

__all__ = [
    "explain",
    "explain_json",
    "fits",
    "fits_json",
    "status",
    "status_json",
    "topology",
    "topology_json",
]

_LONGEST_VALUE = 48  # of a difference; `diff` has all of it


def status(situation: Situation, view: View) -> str:
    """Draw the screen an operator keeps open; sections are there when they have something."""
    held, rows = holders(situation), vm_rows(situation)
    plan = situation.plan(Intent())
    lines = [
        *_header(situation, held, rows, view.width),
        BLANK,
        *boards(situation, held, view.width),
        BLANK,
        *_vm_table(held, rows, view.width),
        *_room(situation, view.width),
        *section("Faults", _faults(situation, held, view.width)),
        *section("Refused", _refused(situation, held, view.width)),
        *section("Not as in the file", _drift(plan, held, view.width)),
        *section("Other domains", _foreign(situation, view.width)),
        *section("Notes", sentences((*situation.platform.notes, *situation.notes), view.width)),
    ]
    return paint(lines, view)


def _header(situation: Situation, held: Holders, rows: list[VmRow], width: int) -> list[Line]:
    gpus = situation.topology.gpus
    usable = [gpu for gpu in gpus if situation.health.usable(gpu.pci.address)]
    free = sum(1 for gpu in usable if gpu.pci.address not in held.devices)
    running = sum(1 for row in rows if row.running)
    others = Counter(str(row.state) for row in rows if not row.running)
    counts = [f"{running} running", *(f"{count} {state}" for state, count in others.items())]
    parts = [f"{counted(len(rows), 'VM')} ({', '.join(counts)})" if rows else "no VMs"]
    whole = max(situation.platform.gpus, len(gpus))
    parts.append(f"{free} of {counted(whole, 'GPU')} free")
    if len(gpus) < whole:
        parts.append(f"{whole - len(gpus)} missing")
    if len(usable) < len(gpus):
        parts.append(f"{len(gpus) - len(usable)} out of use")
    title = line(Span(situation.platform.title, "heading"), ": ")
    return wrapped(", ".join(parts), width, first=title, indent=2)


def _vm_table(held: Holders, rows: list[VmRow], width: int) -> list[Line]:
    if not rows:
        return [line(Span("No VM is declared.", "quiet"))]
    names = list(held.letters)
    cells: list[list[Line | str]] = []
    for row in rows:
        letter = held.letter(row.name)
        number = names.index(row.name) if row.name in names else 0
        style = f"vm{number}" if row.running else f"off{number}"
        sign = Span(letter if row.running else letter.lower(), style)
        cells.append(
            [
                line(sign),
                row.name,
                row.tenant,
                _state(row),
                str(CpuSet.of(row.gpus)) if row.vcpus or not row.asked else f"{row.asked} asked",
                str(row.vcpus or ""),
                f"{row.memory_mib / 1024:g} GiB" if row.memory_mib else "",
                str(CpuSet.of(row.numa_nodes)),
            ]
        )
    head = ("", "VM", "tenant", "state", "GPUs", "CPUs", "memory", "nodes")
    if not any(row.tenant for row in rows):
        head = ("", "VM", "", *head[3:])
    return table(head, cells, width, right=(5, 6), shrink=(1, 2, 4))


def _state(row: VmRow) -> Line:
    if row.state in (VmState.RUNNING, VmState.STOPPED):
        return line(str(row.state))
    words = str(row.state)
    if row.state in (VmState.REFUSED, VmState.NOT_DECLARED) and row.vcpus:
        words = f"{'running' if row.running else 'stopped'}, {words}"
    return line(Span(words, "bad" if row.state is VmState.REFUSED else "warn"))


def _room(situation: Situation, width: int) -> list[Line]:
    """How many more VMs of each size would fit."""
    words = [
        # The first ones say what is counted.
        (f"{count} × {counted(size, 'GPU') if size <= 2 else size}", "" if count else "quiet")
        for size, count in room(situation).items()
    ]
    if words and all(style for _, style in words):
        words = [("no further VM with GPUs", "quiet")]
    return [BLANK, *flowed(words, width, "Room for")] if words else []


# -- sections that are there only when they have something ------------------------------------


def _faults(situation: Situation, held: Holders, width: int) -> list[Line]:
    def victim(address: PciAddress) -> str:
        holder = held.devices.get(address, FREE)
        return f"{holder.vm} {'runs on' if holder.in_use else 'is to have'} it" if holder.vm else ""

    return fault_lines(situation.topology, situation.platform, situation.health, width, victim)


def _refused(situation: Situation, held: Holders, width: int) -> list[Line]:
    lines: list[Line] = []
    for refused in situation.placements.unplaceable:
        text = refused.reasons[0]
        if len(refused.reasons) > 1:
            text += f" (and {len(refused.reasons) - 1} more: `dgx-kvm explain {refused.vm}`)"
        first = line("  ", Span(refused.vm, "bad"), "  ")
        lines += wrapped(text, width, first=first, indent=6)
        for remedy in refused.remedies:
            lines += wrapped(remedy, width, first="      → ")
    return lines


def _drift(plan: Plan, held: Holders, width: int) -> list[Line]:
    groups: dict[tuple[Change, ...] | str, list[VmPlan]] = {}
    for row in plan.vms:
        groups.setdefault(row.changes or row.vm, []).append(row)
    lines: list[Line] = []
    for rows in groups.values():
        first = line("  ", Span(", ".join(row.vm for row in rows), "warn"), "  ")
        if rows[0].verb is Verb.CREATE:
            text = f"to be made: {rows[0].summary}"
        elif rows[0].verb is Verb.DELETE:
            text = f"no longer declared; goes with `apply {' '.join(rows[0].pending)}`"
        else:
            text = _changes(rows[0].changes)
        lines += wrapped(text, width, first=first, indent=6)
    flags = sorted({flag for row in plan.vms for flag in row.pending})
    if lines:
        more = f" (for all of it: {' '.join(flags)})" if flags else ""
        lines += wrapped(f"`dgx-kvm apply` makes it so{more}", width, first="  ", style="quiet")
    return lines


def _changes(changes: tuple[Change, ...]) -> str:
    """Differences, those with the same effect together."""
    effects: dict[Effect, list[str]] = {}
    fields = {change.field for change in changes}
    for change in changes:
        if change.field == "NUMA nodes" and fields & {"vcpus", "memory"}:
            continue  # the same, node by node
        words = f"{change.field} {_short(change.old)} → {_short(change.new)}"
        effects.setdefault(change.effect, []).append(words)
    parts = []
    for effect, words_of_it in effects.items():
        when = "" if effect is Effect.LIVE else f" ({effect})"
        parts.append(", ".join(words_of_it) + when)
    return "; ".join(parts)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def _foreign(situation: Situation, width: int) -> list[Line]:
    lines: list[Line] = []
    for domain in situation.current.domains:
        if not domain.managed:
            devices = [situation.topology.device_name(a) for a in _devices(domain)]
            text = "running" if domain.running else "stopped"
            text += f", holds {', '.join(devices)}" if devices else ", holds no device"
            first = line("  ", Span("*", "foreign"), f" {domain.name}  ")
            lines += wrapped(text, width, first=first, indent=6)
    return lines


def _devices(domain: DomainStatus) -> list[PciAddress]:
    live = devices_of(domain.live) if domain.live else ()
    return sorted({*live, *devices_of(domain.facts)})


# -- for programs ------------------------------------------------------------------------------


def status_json(situation: Situation) -> dict[str, Any]:
    """What status shows, without its drawing."""
    held, plan = holders(situation), situation.plan(Intent())
    drift = {row.vm: row for row in plan.vms}
    refused = {each.vm: each for each in situation.placements.unplaceable}
    return {
        "version": 1,
        "platform": {
            "name": situation.platform.name,
            "title": situation.platform.title,
            "fabric_model": str(situation.platform.fabric_model),
        },
        "vms": [
            {
                **to_json(row),
                "changes": to_json(drift[row.name].changes if row.name in drift else ()),
                "pending": to_json(drift[row.name].pending if row.name in drift else ()),
                "refused": to_json(refused.get(row.name)),
            }
            for row in vm_rows(situation)
        ],
        "devices": _devices_json(situation, held),
        "numa_nodes": [
            {
                "id": use.node.id,
                "threads": len(use.node.cpus),
                "free_threads": use.free_threads,
                "memory_mib": use.node.memory_mib,
                "free_memory_mib": use.free_memory_mib,
            }
            for use in held.nodes
        ],
        "fits": {str(size): count for size, count in room(situation).items()},
        "other_domains": [
            {
                "name": domain.name,
                "running": domain.running,
                "devices": [str(address) for address in _devices(domain)],
            }
            for domain in situation.current.domains
            if not domain.managed
        ],
        "in_sync": not plan.pending,
        "notes": [*situation.platform.notes, *situation.notes],
    }


def _devices_json(situation: Situation, held: Holders) -> list[dict[str, Any]]:
    machine = situation.topology
    own = (machine, situation.platform, situation.health)
    kinds: list[tuple[str, int | None, PciDevice]] = [
        *(("gpu", gpu.index, gpu.pci) for gpu in machine.gpus),
        *(("nvswitch", switch.index, switch.pci) for switch in machine.nvswitches),
        *(("nic", None, nic.pci) for nic in machine.nics),
        *(("drive", None, drive.pci) for drive in machine.drives),
        *(("vf", vf.index, vf.pci) for vf in machine.vfs),
    ]
    result = []
    for kind, index, pci in kinds:
        health = situation.health.of(pci.address)
        holder = held.devices.get(pci.address, FREE)
        result.append(
            {
                "address": str(pci.address),
                "kind": kind,
                "index": index,
                "numa_node": pci.numa_node,
                "state": str(health.state),
                "reason": health.reason,
                "since": health.since,
                "holder": holder.vm or None,
                "in_use": holder.in_use,
                "kept_by_host": kept_by_host(*own, pci),
            }
        )
    return result
