"""What every existing domain holds, in the terms of placement."""

from __future__ import annotations

from dgx_kvm_sw.decide.changes import same
from dgx_kvm_sw.decide.plan import Intent, devices_of
from dgx_kvm_sw.decide.search import gpu_indexes, pinned
from dgx_kvm_sw.model.domain import CurrentState, DomainFacts
from dgx_kvm_sw.model.pci import CpuSet
from dgx_kvm_sw.model.placement import GuestCell, Holding
from dgx_kvm_sw.model.spec import HostSpec, PowerState, VmSpec
from dgx_kvm_sw.model.topology import Topology


def holdings_of(
    current: CurrentState, topology: Topology, spec: HostSpec, intent: Intent
) -> tuple[Holding, ...]:
    """What every domain holds, but for VMs that this plan will delete."""
    declared = {vm.name: vm for vm in spec.vms}
    holdings = []
    for domain in current.domains:
        vm = declared.get(domain.name)
        doomed = intent.prune and (intent.restart or not domain.running)
        if domain.managed and vm is None and doomed:
            continue
        stays = vm is None or domain.running
        if vm and domain.live and intent.restart:
            stays = _has_what_it_asks(vm, domain.live, topology)
        versions = [domain.facts]
        if domain.live and not same(domain.live, domain.facts):
            versions.insert(0, domain.live)
        holdings += [
            _holding(facts, domain.managed, stays, topology, domain.running) for facts in versions
        ]
    return tuple(holdings)


def _has_what_it_asks(vm: VmSpec, live: DomainFacts, topology: Topology) -> bool:
    """Whether a running VM is to run, with its number of GPUs, and those that it is pinned to. One
    that has not is stopped by --restart, so what it holds is free for others in the same plan.
    """
    gpus = gpu_indexes(topology, devices_of(live))
    if vm.state is PowerState.STOPPED:
        return False
    return len(gpus) == vm.gpus and (not vm.pin or gpus == pinned(topology, vm))


def _holding(
    facts: DomainFacts, ours: bool, stays: bool, topology: Topology, running: bool
) -> Holding:
    if ours:
        cells = tuple(
            GuestCell(cell.host_node or 0, _cores(facts, cell.vcpus), cell.memory_mib)
            for cell in facts.cells
        )
    else:
        cells = _foreign_cells(facts, topology) if running else ()
    vfs = tuple(each.vf.source if each.vf else None for each in facts.interfaces)
    return Holding(facts.name, ours, stays, devices_of(facts), cells, facts.hugepage_kib, vfs)


def _cores(facts: DomainFacts, vcpus: CpuSet) -> tuple[tuple[int, ...], ...]:
    """The host cores behind these guest CPUs, which come as whole cores, thread by thread."""
    cpus = [min(facts.vcpu_pins[v], default=-1) for v in vcpus if v < facts.vcpus]
    step = facts.threads_per_core
    return tuple(tuple(cpus[i : i + step]) for i in range(0, len(cpus), step))


def _foreign_cells(facts: DomainFacts, topology: Topology) -> tuple[GuestCell, ...]:
    """Guess what a running domain that is not ours uses: its pins, and memory on all nodes.

    Pins to most of the machine are as good as none.
    """
    pinned = CpuSet.of(cpu for pin in facts.vcpu_pins for cpu in pin)
    narrow = len(pinned) <= 2 * facts.vcpus
    nodes = [node for node in topology.numa_nodes if node.cores]
    cells = []
    for node in nodes:
        bound = [cell.memory_mib for cell in facts.cells if cell.host_node == node.id]
        spread = not any(cell.host_node is not None for cell in facts.cells)
        memory = facts.memory_mib // len(nodes) if spread else sum(bound)
        cpus = sorted(node.cpus.cpus & pinned.cpus) if narrow else []
        cells.append(GuestCell(node.id, tuple((cpu,) for cpu in cpus), memory))
    return tuple(cells)
