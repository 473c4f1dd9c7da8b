"""Who holds what at the moment, under the letter that each VM has in every picture."""

from __future__ import annotations

import string
from dataclasses import dataclass, replace

from dgx_kvm_sw.decide.capacity import NodeCapacity, capacities
from dgx_kvm_sw.decide.plan import Intent, devices_of
from dgx_kvm_sw.decide.search import gpu_indexes
from dgx_kvm_sw.model.actions import Effect, VmPlan
from dgx_kvm_sw.model.base import StrEnum
from dgx_kvm_sw.model.domain import DomainFacts, DomainStatus
from dgx_kvm_sw.model.pci import CpuSet, PciAddress
from dgx_kvm_sw.model.placement import Placement, Unplaceable
from dgx_kvm_sw.model.topology import NumaNode
from dgx_kvm_sw.reconcile import Situation

FOREIGN = "*"
NAMELESS = "+"  # the VMs that are too many for a letter of their own


@dataclass(frozen=True)
class Held:
    """A holder. Not `in_use`: a definition reserves it for the next start."""

    vm: str
    in_use: bool


@dataclass(frozen=True)
class NodeUse:
    """CPUs and memory of one NUMA node; a holder of None is the host, "" nobody."""

    node: NumaNode
    serves: int | None  # the node whose GPUs it works for
    threads: tuple[tuple[Held | None, int], ...]  # in the order of the cores
    memory_mib: tuple[tuple[Held | None, int], ...]

    @property
    def free_threads(self) -> int:
        return sum(amount for held, amount in self.threads if held == FREE)

    @property
    def free_memory_mib(self) -> int:
        return sum(amount for held, amount in self.memory_mib if held == FREE)


FREE = Held("", False)


class VmState(StrEnum):
    RUNNING = "running"
    STOPPED = "stopped"
    RESTART_NEEDED = "restart needed"
    NOT_DECLARED = "not in the file"
    NOT_MADE = "not made yet"
    REFUSED = "refused"


@dataclass(frozen=True)
class VmRow:
    """One of our VMs; what it has is what libvirt holds, or what it will get when it is made."""

    name: str
    tenant: str
    state: VmState
    running: bool
    gpus: tuple[int, ...]
    devices: tuple[PciAddress, ...]
    vcpus: int
    memory_mib: int
    numa_nodes: tuple[int, ...]
    asked: int  # GPUs that the file asks for


@dataclass(frozen=True)
class Holders:
    """The machine's devices, CPUs and memory by holder."""

    letters: dict[str, str]  # of our VMs; any other domain is FOREIGN
    devices: dict[PciAddress, Held]
    nodes: tuple[NodeUse, ...]

    def letter(self, vm: str) -> str:
        return self.letters.get(vm, FOREIGN)


def holders(situation: Situation) -> Holders:
    running = {domain.name for domain in situation.current.domains if domain.running}
    devices: dict[PciAddress, Held] = {}
    cpus: dict[int, Held] = {}
    memory: dict[tuple[Held, int], int] = {}
    seen: set[str] = set()
    for holding in situation.inputs.holdings:
        # Of a running VM's two holdings the first is what it runs on.
        held = Held(holding.vm, holding.vm in running and holding.vm not in seen)
        seen.add(holding.vm)
        for address in holding.devices:
            if held.in_use or address not in devices:
                devices[address] = held
        for cell in holding.cells:
            for cpu in (cpu for core in cell.cores for cpu in core):
                if held.in_use or cpu not in cpus:
                    cpus[cpu] = held
            key = held, cell.host_node
            in_use = memory.get((Held(holding.vm, True), cell.host_node), 0)
            memory[key] = max(memory.get(key, 0), cell.memory_mib - (0 if held.in_use else in_use))
    caps = capacities(situation.topology, situation.spec, situation.platform.gpus)
    nodes = tuple(
        _node_use(node, caps[node.id], cpus, memory)
        for node in situation.topology.numa_nodes
        if node.id in caps
    )
    return Holders(_letters(situation), devices, nodes)


def _letters(situation: Situation) -> dict[str, str]:
    names = [vm.name for vm in situation.spec.vms]
    with_gpus = [vm.name for vm in situation.spec.vms if vm.gpus]
    names += [domain.name for domain in _undeclared(situation)]
    letters = string.ascii_uppercase
    if len(names) > len(letters):  # those that the board shows come first
        names = with_gpus + [name for name in names if name not in with_gpus]
    return {
        name: letters[number] if number < len(letters) else NAMELESS
        for number, name in enumerate(names)
    }


def _undeclared(situation: Situation) -> list[DomainStatus]:
    declared = {vm.name for vm in situation.spec.vms}
    return [d for d in situation.current.domains if d.managed and d.name not in declared]


def _node_use(
    node: NumaNode,
    cap: NodeCapacity,
    cpus: dict[int, Held],
    memory: dict[tuple[Held, int], int],
) -> NodeUse:
    threads: list[tuple[Held | None, int]] = []
    for core in node.cores:
        taken = next((cpus[cpu] for cpu in core if cpu in cpus), FREE)
        held = None if core in cap.reserve else taken
        if threads and threads[-1][0] == held:
            threads[-1] = (held, threads[-1][1] + len(core))
        else:
            threads.append((held, len(core)))
    whole = sum(cap.memory.values())
    order = [held for held, _ in threads]
    used = [(held, mib) for (held, where), mib in memory.items() if where == node.id and mib > 0]
    used.sort(key=lambda part: order.index(part[0]) if part[0] in order else len(order))
    free = max(0, whole - sum(mib for _, mib in used))
    parts = ((None, node.memory_mib - whole), *used, (FREE, free))
    return NodeUse(node, cap.serves, tuple(threads), parts)


# -- VMs ---------------------------------------------------------------------------------------


def vm_rows(situation: Situation) -> list[VmRow]:
    """Our VMs in file order, then those that are no longer in the file."""
    plans = {row.vm: row for row in situation.plan(Intent()).vms}
    refused = {each.vm: each for each in situation.placements.unplaceable}
    rows = []
    for vm in situation.spec.vms:
        held = situation.current.domain(vm.name)
        placement = situation.placements.of(vm.name)
        state = _state(held, plans.get(vm.name), refused.get(vm.name))
        row = _row(situation, vm.name, vm.tenant, state, held, placement)
        rows.append(replace(row, asked=vm.gpus))
    known = {vm.name for vm in situation.spec.vms}
    for name in refused.keys() - known:  # a domain of that name is not ours
        rows.append(_row(situation, name, "", VmState.REFUSED, None, None))
    for domain in _undeclared(situation):
        tenant = domain.facts.owner.tenant if domain.facts.owner else ""
        rows.append(_row(situation, domain.name, tenant, VmState.NOT_DECLARED, domain, None))
    return rows


def _state(held: DomainStatus | None, plan: VmPlan | None, refused: Unplaceable | None) -> VmState:
    if refused:
        return VmState.REFUSED
    if held is None:
        return VmState.NOT_MADE
    if not held.running:
        return VmState.STOPPED
    waiting = plan and any(change.effect is Effect.NEXT_RESTART for change in plan.changes)
    return VmState.RESTART_NEEDED if waiting else VmState.RUNNING


def _row(
    situation: Situation,
    name: str,
    tenant: str,
    state: VmState,
    held: DomainStatus | None,
    placement: Placement | None,
) -> VmRow:
    devices: tuple[PciAddress, ...] = ()
    vcpus, memory, nodes = 0, 0, CpuSet.of(())
    if held:
        facts: DomainFacts = held.live or held.facts
        devices, vcpus, memory = devices_of(facts), facts.vcpus, facts.memory_mib
        nodes = CpuSet.of(cell.host_node for cell in facts.cells if cell.host_node is not None)
    elif placement:
        devices, vcpus, memory = placement.devices, placement.vcpus, placement.memory_mib
        nodes = CpuSet.of(cell.host_node for cell in placement.cells)
    gpus = gpu_indexes(situation.topology, devices)
    running = bool(held and held.running)
    return VmRow(name, tenant, state, running, gpus, devices, vcpus, memory, tuple(nodes), 0)
