"""Why a VM is where it is, or why it has no place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dgx_kvm_sw.cli.output import View, counted
from dgx_kvm_sw.cli.picture import Line, Span, heading, line, paint, section, sentences, wrapped
from dgx_kvm_sw.decide import placement as decide
from dgx_kvm_sw.decide.capacity import capacities
from dgx_kvm_sw.decide.devices import distance
from dgx_kvm_sw.decide.plan import devices_of
from dgx_kvm_sw.decide.search import gpu_indexes
from dgx_kvm_sw.guest.problems import did_you_mean
from dgx_kvm_sw.model.base import to_json
from dgx_kvm_sw.model.domain import DomainStatus
from dgx_kvm_sw.model.errors import UsageError
from dgx_kvm_sw.model.pci import CpuSet, PciAddress, PciDevice
from dgx_kvm_sw.model.placement import Candidate, Placement, Unplaceable
from dgx_kvm_sw.model.platform import Partition
from dgx_kvm_sw.model.spec import VmSpec
from dgx_kvm_sw.model.topology import Topology
from dgx_kvm_sw.reconcile import Situation

_PAGES = {0: "ordinary pages", 2048: "2 MiB pages", 1024 * 1024: "1 GiB pages"}
# Distances as decide.devices counts them: PCIe hops, then steps of 100.
_SAME_SWITCH, _SAME_PORT, _SAME_ROOT, _SAME_NODE = 2, 99, 100, 200


def explain(situation: Situation, name: str, view: View) -> str:
    """Say what a VM got and why; raises UsageError for one that is not declared."""
    vm, refused = _found(situation, name)
    held = situation.current.domain(name)
    placement = situation.placements.of(name)
    title = _title(vm, refused)
    lines = wrapped(title, view.width, first=heading(f"{name}: "), indent=2)
    lines += wrapped(_standing(situation, vm, held, placement), view.width, first="  ")
    if refused:
        lines += section("Refused", _refused(refused, view.width))
    if vm and placement:
        lines += section("What it gets", _got(situation, placement, view.width))
        lines += section("Why", sentences(_reasons(situation, vm, placement), view.width))
    found = _candidates(situation, vm) if vm and vm.gpus else ()
    said = refused.reasons if refused else ()  # a reason alone hinders all sets alike
    if vm and found and len(said) < 2 and not any(each.verdict in said for each in found):
        lines += section(f"Sets of {vm.gpus} GPUs" if vm.gpus > 1 else "GPUs", _table(found, view))
    return paint(lines, view)


def explain_json(situation: Situation, name: str) -> dict[str, Any]:
    vm, refused = _found(situation, name)
    placement = situation.placements.of(name)
    candidates = _candidates(situation, vm) if vm and vm.gpus else ()
    held = situation.current.domain(name)
    return {
        "version": 1,
        "vm": name,
        "declared": to_json(vm),
        "running": bool(held and held.managed and held.running),
        "placement": to_json(placement),
        "near": _near_json(situation, placement) if placement else [],
        "why": _reasons(situation, vm, placement) if vm and placement else [],
        "refused": to_json(refused),
        "candidates": [
            {"gpus": list(c.partition.gpus), "links": c.partition.links, "verdict": c.verdict}
            for c in candidates
        ],
    }


def _found(situation: Situation, name: str) -> tuple[VmSpec | None, Unplaceable | None]:
    """The declared VM and its refusal; a VM with the name of a foreign domain has only this."""
    vm = next((vm for vm in situation.spec.vms if vm.name == name), None)
    refused = next((r for r in situation.placements.unplaceable if r.vm == name), None)
    if vm or refused:
        return vm, refused
    held = situation.current.domain(name)
    if held and held.managed:
        hint = "`dgx-kvm apply --prune` deletes it"
        raise UsageError(f"{name} is no longer in the file, so nothing decides where it is", hint)
    if held:
        raise UsageError(f"{name} is a domain that dgx-kvm did not make", "use virsh for it")
    near = did_you_mean(name, [vm.name for vm in situation.spec.vms])
    raise UsageError(f"there is no VM {name} in the file", near or "`dgx-kvm status` lists the VMs")


def _title(vm: VmSpec | None, refused: Unplaceable | None) -> str:
    if vm is None:
        return "declared, but there is another domain of this name"
    size = counted(vm.gpus, "GPU") if vm.gpus else "no GPU"
    tenant = f", tenant {vm.tenant}" if vm.tenant else ""
    pin = f", pinned to {', '.join(vm.pin)}" if vm.pin else ""
    return f"{size}{tenant}{pin}, declared at {vm.source}"


def _standing(
    situation: Situation,
    vm: VmSpec | None,
    held: DomainStatus | None,
    placement: Placement | None,
) -> str:
    """How it stands with libvirt, in a sentence."""
    if held is None or not held.managed or vm is None:
        return "It is not made yet." if placement else "It is not made."
    if not held.running:
        kept = placement and _keeps(placement, held)
        return "It is stopped and keeps what it holds." if kept else "It is stopped."
    if placement is None:
        return "It runs on with what it holds; what the file asks now does not fit."
    if _keeps(placement, held):
        waits = "" if placement.kept else " What the file changed comes with a restart."
        return f"It runs, and a VM that runs stays where it is.{waits}"
    gpus = CpuSet.of(gpu_indexes(situation.topology, devices_of(held.live or held.facts)))
    has = f"GPU{'s' if len(gpus) > 1 else ''} {gpus}" if gpus else "no GPU"
    return f"It runs with {has}; a restart gives it what follows."


def _keeps(placement: Placement, held: DomainStatus) -> bool:
    """Whether a domain has the devices and nodes that it is to have."""
    facts = held.live or held.facts
    nodes = {cell.host_node for cell in facts.cells}
    return (
        set(devices_of(facts)) == set(placement.devices)
        and {cell.host_node for cell in placement.cells} == nodes
    )


# -- what a VM gets ----------------------------------------------------------------------------


def _got(situation: Situation, placement: Placement, width: int) -> list[Line]:
    topology = situation.topology
    rows: list[tuple[str, str]] = []
    if partition := placement.partition:
        named = _named([(gpu.index, gpu.pci) for gpu in topology.gpus], placement.gpus)
        links = f", {counted(partition.links, 'NVLink')} each" if partition.links else ""
        rows.append((_kind("GPU", placement.gpus), f"{named}{links} (partition {partition.id})"))
    if placement.nvswitches:
        switches = [(switch.index, switch.pci) for switch in topology.nvswitches]
        label = "NVSwitches" if len(placement.nvswitches) > 1 else "NVSwitch"
        rows.append((label, _named(switches, placement.nvswitches)))
    kind = ""
    for near in _near(situation, placement):
        label, kind = "" if near.kind == kind else near.kind, near.kind
        rows.append((label, f"{', '.join(map(str, near.devices))}: {near.words}"))
    for cell in placement.cells:
        cpus = CpuSet.of(cpu for core in cell.cores for cpu in core)
        pages = _PAGES.get(placement.hugepage_kib, f"pages of {placement.hugepage_kib} KiB")
        text = f"{len(cpus)} CPUs ({cpus}), {cell.memory_mib / 1024:g} GiB in {pages}"
        rows.append((f"node {cell.host_node}", text))
    rows.append(("host side", f"QEMU and disk threads on CPUs {placement.helper_cpus}"))
    lines: list[Line] = []
    for label, text in rows:
        lines += wrapped(text, width, first=f"  {label:10}  ")
    return lines


def _kind(word: str, devices: tuple[PciAddress, ...]) -> str:
    return word if len(devices) == 1 else f"{word}s"


def _named(known: list[tuple[int, PciDevice]], chosen: tuple[PciAddress, ...]) -> str:
    """Numbers and addresses of a few devices, only numbers of many."""
    found = [(index, pci.address) for index, pci in known if pci.address in chosen]
    if len(found) > 2:
        return str(CpuSet.of(index for index, _ in found))
    return ", ".join(f"{index} ({address})" for index, address in found)


@dataclass(frozen=True)
class _Near:
    """Devices of one kind that are equally far from the GPUs."""

    kind: str
    devices: tuple[PciAddress, ...]
    words: str


def _near(situation: Situation, placement: Placement) -> list[_Near]:
    topology = situation.topology
    gpus = {gpu.index: gpu.pci for gpu in topology.gpus if gpu.pci.address in placement.gpus}
    kinds = (
        (_kind("NIC", placement.nics), placement.nics, [nic.pci for nic in topology.nics]),
        (
            _kind("drive", placement.drives),
            placement.drives,
            [drive.pci for drive in topology.drives],
        ),
        (_kind("VF", placement.vfs), placement.vfs, [vf.pci for vf in topology.vfs]),
    )
    result = []
    for kind, chosen, devices in kinds:
        by_words: dict[str, list[PciAddress]] = {}
        for pci in devices:
            if pci.address in chosen:
                words = _distance(situation, pci, gpus)
                if nic := _its_nic(topology, pci):  # which the file may have named
                    words = f"of NIC {nic}, {words.partition(';')[0]}"
                by_words.setdefault(words, []).append(pci.address)
        result += [_Near(kind, tuple(found), words) for words, found in by_words.items()]
    return result


def _its_nic(topology: Topology, pci: PciDevice) -> str:
    """The name of the NIC whose virtual function it is, if it is one."""
    return next((topology.nic(vf.nic).name for vf in topology.vfs if vf.pci == pci), "")


def _distance(situation: Situation, pci: PciDevice, gpus: dict[int, PciDevice]) -> str:
    """How far a device is from the nearest of the GPUs, in words."""
    topology = situation.topology
    node = topology.node(pci.numa_node).id
    if not gpus:
        return f"on NUMA node {node}"
    far = {index: distance(topology, gpu, pci) for index, gpu in gpus.items()}
    least = min(far.values())
    nearest = CpuSet.of(index for index, steps in far.items() if steps == least)
    who = f"GPU{'s' if len(nearest) > 1 else ''} {nearest}"
    if least <= _SAME_SWITCH:
        return f"same PCIe switch as {who}"
    if least <= _SAME_PORT:
        return f"same PCIe root port as {who}"
    if least <= _SAME_ROOT:
        return f"same root complex as {who}"
    if least <= _SAME_NODE:
        return f"same NUMA node as {who}"
    return f"NUMA node {node}, far from {who}; nothing nearer is free"


def _near_json(situation: Situation, placement: Placement) -> list[dict[str, Any]]:
    return [to_json(near) for near in _near(situation, placement)]


# -- why ---------------------------------------------------------------------------------------


def _reasons(situation: Situation, vm: VmSpec, placement: Placement) -> list[str]:
    """Why it was put there; nothing for one that merely stays where it was."""
    held = situation.current.domain(vm.name)
    if held and _keeps(placement, held):
        return []
    if placement.partition is None:
        return [_why_nodes(situation, vm, placement)]
    if vm.pin:
        return [f"The file pins it to {', '.join(vm.pin)}."]
    ranked = [c.partition for c in decide.candidates(situation.inputs, vm) if _fits(c)]
    if len(ranked) < 2:
        return ["No other set that it could have is free."]
    return [_comparison(situation, placement, *ranked[:2])]


def _comparison(
    situation: Situation, placement: Placement, chosen: Partition, second: Partition
) -> str:
    """The first step of the ranking in which the chosen set is better than the next one."""
    if placement.partition != chosen:
        return (
            "It was the best set free when its turn came: VMs with a pin come first, then larger"
            " ones, then file order. Where that leaves a VM out, another choice is looked for."
        )
    if chosen.links > second.links:
        return f"It has {chosen.links} NVLinks per GPU, {_set(second)} would have {second.links}."
    left, other = _left(situation, placement.vm, chosen), _left(situation, placement.vm, second)
    for size in sorted(left, reverse=True):
        if left[size] != other[size]:
            kind = f"set{'' if left[size] == 1 else 's'} of {counted(size, 'GPU')}"
            return (
                f"It leaves {left[size]} free {kind} for later VMs;"
                f" {_set(second)} would leave {other[size] or 'none'}."
            )
    return (
        f"{_set(second)} would leave as much for later VMs; where both are alike, sets that have"
        " other VMs around them come first, then near devices, then low numbers."
    )


def _left(situation: Situation, vm: str, partition: Partition) -> dict[int, int]:
    """Free sets by size if this VM had this one."""
    topology, health = situation.topology, situation.health
    taken = {d for held in situation.inputs.holdings if held.vm != vm for d in held.devices}
    taken |= {d for other in situation.placements.placed if other.vm != vm for d in other.devices}
    busy = {
        gpu.index
        for gpu in topology.gpus
        if gpu.pci.address in taken or not health.usable(gpu.pci.address)
    } | set(partition.gpus)
    left = dict.fromkeys(situation.platform.sizes, 0)
    for other in situation.platform.partitions:
        left[other.size] += not busy & set(other.gpus)
    return left


def _why_nodes(situation: Situation, vm: VmSpec, placement: Placement) -> str:
    nodes = CpuSet.of(cell.host_node for cell in placement.cells)
    if len(nodes) > 1:
        return f"No NUMA node alone has room for it, so it spans nodes {nodes}."
    caps = capacities(situation.topology, situation.spec, situation.platform.gpus)
    if any(not cap.gpus for cap in caps.values()) and not caps[next(iter(nodes))].gpus:
        return f"NUMA node {nodes} serves no GPU and has the least room that is enough."
    return f"NUMA node {nodes} has the least room that is enough; others stay free for larger VMs."


def _set(partition: Partition) -> str:
    return f"GPU{'s' if partition.size > 1 else ''} {CpuSet.of(partition.gpus)}"


def _refused(refused: Unplaceable, width: int) -> list[Line]:
    lines: list[Line] = []
    for reason in refused.reasons:
        lines += wrapped(reason, width, first="  ", indent=4)
    for remedy in refused.remedies:
        lines += wrapped(remedy, width, first=line("  ", Span("→ ", "good")))
    return lines


def _candidates(situation: Situation, vm: VmSpec) -> tuple[Candidate, ...]:
    """Every legal set with a verdict: the chosen one, those that would fit as well, the rest.

    decide.placement ranks with all other VMs in place, but this one may have come before them:
    what it really got is the chosen one.
    """
    placement = situation.placements.of(vm.name)
    found = decide.candidates(situation.inputs, vm)
    chosen = [c for c in found if placement and c.partition == placement.partition]
    fitting = [c for c in found if _fits(c) and c not in chosen]
    others = [c for c in found if c not in chosen and c not in fitting]
    return (
        *(replace(candidate, verdict="chosen") for candidate in chosen),
        *(replace(candidate, verdict="would fit as well") for candidate in fitting),
        *sorted(others, key=lambda candidate: candidate.partition.gpus),
    )


def _fits(candidate: Candidate) -> bool:
    return candidate.verdict == "chosen" or candidate.verdict.startswith("fits")


def _table(candidates: tuple[Candidate, ...], view: View) -> list[Line]:
    """Each legal set with its verdict."""
    sets = [str(CpuSet.of(candidate.partition.gpus)) for candidate in candidates]
    label = max(map(len, sets), default=0)
    lines: list[Line] = []
    for name, candidate in zip(sets, candidates, strict=True):
        style = {"chosen": "good"}.get(candidate.verdict, "")
        first = line("  ", Span(f"{name:{label}}", style), "  ")
        lines += wrapped(candidate.verdict, view.width, first=first, style=style)
    return lines
