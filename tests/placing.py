"""VMs as the shipped size templates make them, placed on sample machines, and what must hold."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.decide.capacity import capacities
from dgx_kvm_sw.decide.fit import Inputs
from dgx_kvm_sw.decide.placement import place
from dgx_kvm_sw.guest import spec
from dgx_kvm_sw.host.health import assess
from dgx_kvm_sw.host.platforms import survey
from dgx_kvm_sw.model.health import DeviceHealth, DeviceState, HealthReport
from dgx_kvm_sw.model.pci import PciAddress
from dgx_kvm_sw.model.placement import Holding, Placement, Placements, Unplaceable
from dgx_kvm_sw.model.spec import SIZES, Amount, HostShare, HostSpec, VmSpec
from dgx_kvm_sw.model.topology import HugepagePool

KEYS = frozenset({"cpus", "memory", "nics", "drives", "nvswitches", "hugepages"})


@cache
def shipped() -> HostSpec:
    """One VM of each size, as vms.yaml with nothing but names and sizes means it."""
    with tempfile.TemporaryDirectory() as folder:
        vms = "".join(f"- {{name: vm-{size}, gpus: {size}}}\n" for size in SIZES)
        Root(folder).write("/vms.yaml", f"version: 1\nvms:\n{vms}", sync=False)
        return spec.load(Root(folder), "/vms.yaml")


def vm(name: str, gpus: int, **settings: Any) -> VmSpec:
    """A VM of this size; CPUs, memory and devices may differ from what its size gets."""
    made = next(each for each in shipped().vms if each.gpus == gpus)
    resources = {key: value for key, value in settings.items() if key in KEYS}
    rest = {key: value for key, value in settings.items() if key not in KEYS}
    return replace(made, name=name, resources=replace(made.resources, **resources), **rest)


def vms(*sizes: int, prefix: str = "vm") -> tuple[VmSpec, ...]:
    return tuple(vm(f"{prefix}{number}", size) for number, size in enumerate(sizes))


def inputs_of(root: Root) -> Inputs:
    """The machine below `root` with no VM on it."""
    platform, topology = survey(root)
    health = assess(topology, root, platform.fabric_model)
    return Inputs(replace(shipped(), vms=()), topology, platform, health)


# -- changing the inputs ----------------------------------------------------------------------


def declare(inputs: Inputs, *declared: VmSpec) -> Inputs:
    return replace(inputs, spec=replace(inputs.spec, vms=declared))


def with_pool(inputs: Inputs, cpus: Amount, memory: Amount) -> Inputs:
    return replace(inputs, spec=replace(inputs.spec, cpu_pool=HostShare(cpus, memory)))


def with_pages(inputs: Inputs, *pools: HugepagePool) -> Inputs:
    """The same machine with these pools of huge pages on every node."""
    nodes = tuple(replace(node, hugepages=pools) for node in inputs.topology.numa_nodes)
    return replace(inputs, topology=replace(inputs.topology, numa_nodes=nodes))


def failed(inputs: Inputs, *addresses: PciAddress, state: str = "failed") -> Inputs:
    broken = tuple(DeviceHealth(each, DeviceState(state), "XID 79") for each in addresses)
    return replace(inputs, health=HealthReport((*inputs.health.devices, *broken)))


def holding(placement: Placement, *, running: bool) -> Holding:
    return Holding(
        placement.vm, True, running, placement.devices, placement.cells, placement.hugepage_kib
    )


def after(inputs: Inputs, placements: Placements, *, running: bool = True) -> Inputs:
    """The inputs once these placements are domains."""
    return replace(inputs, holdings=tuple(holding(p, running=running) for p in placements.placed))


def gpu(inputs: Inputs, index: int) -> PciAddress:
    return inputs.topology.gpus[index].pci.address


def indexes(inputs: Inputs, placement: Placement | None) -> tuple[int, ...]:
    assert placement is not None
    return tuple(g.index for g in inputs.topology.gpus if g.pci.address in placement.gpus)


def chosen(inputs: Inputs) -> dict[str, tuple[int, ...]]:
    """GPU indexes by VM."""
    return {each.vm: indexes(inputs, each) for each in place(inputs).placed}


def refused(inputs: Inputs, name: str) -> Unplaceable:
    return next(each for each in place(inputs).unplaceable if each.vm == name)


# -- what must hold ---------------------------------------------------------------------------


def assert_sound(inputs: Inputs, placements: Placements) -> None:
    """Whatever was asked for, nothing is given twice and everything is where it belongs."""
    _assert_given_once(inputs, placements.placed)
    _assert_memory(inputs, placements.placed)
    for placement in placements.placed:
        _assert_cores(inputs, placement)
        _assert_near(inputs, placement)
        assert all(inputs.health.usable(address) for address in placement.devices)
        _assert_legal(inputs, placement)


def _assert_given_once(inputs: Inputs, placed: Iterable[Placement]) -> None:
    placed = list(placed)
    cpus = [cpu for each in placed for cell in each.cells for core in cell.cores for cpu in core]
    devices = [address for each in placed for address in each.devices]
    assert len(cpus) == len(set(cpus))
    assert len(devices) == len(set(devices))
    caps = capacities(inputs.topology, inputs.spec, inputs.platform.gpus)
    reserve = {cpu for cap in caps.values() for core in cap.reserve for cpu in core}
    assert not set(cpus) & reserve
    for each in placed:
        assert each.helper_cpus.cpus and each.helper_cpus.cpus <= reserve
        own = {cpu for cell in each.cells for core in caps[cell.host_node].reserve for cpu in core}
        assert each.helper_cpus.cpus == own


def _assert_memory(inputs: Inputs, placed: Iterable[Placement]) -> None:
    used: Counter[tuple[int, int]] = Counter()
    for each in placed:
        for cell in each.cells:
            used[cell.host_node, each.hugepage_kib] += cell.memory_mib
            page = each.hugepage_kib or 1024
            assert cell.memory_mib * 1024 % page == 0 and cell.memory_mib > 0
    for (node_id, page), mib in used.items():
        node = inputs.topology.node(node_id)
        pools = {pool.size_kib: pool.total * pool.size_kib // 1024 for pool in node.hugepages}
        ordinary = node.memory_mib - sum(pools.values())
        share = inputs.spec.reserve.memory
        kept = share if isinstance(share, int) else int(share.fraction * node.memory_mib)
        assert mib <= (pools[page] if page else ordinary - kept)


def _assert_cores(inputs: Inputs, placement: Placement) -> None:
    for cell in placement.cells:
        cores = inputs.topology.node(cell.host_node).cores
        assert cell.cores and set(cell.cores) <= set(cores)  # whole ones, siblings side by side
    assert list(placement.cells) == sorted(placement.cells, key=lambda cell: cell.host_node)


def _assert_near(inputs: Inputs, placement: Placement) -> None:
    """CPUs and memory of a GPU VM are on nodes that serve its GPUs, and on no other."""
    if not placement.gpus:
        return
    caps = capacities(inputs.topology, inputs.spec, inputs.platform.gpus)
    own = {g.pci.numa_node for g in inputs.topology.gpus if g.pci.address in placement.gpus}
    assert {caps[cell.host_node].serves for cell in placement.cells} == own


def _assert_legal(inputs: Inputs, placement: Placement) -> None:
    if placement.partition is None:
        assert not placement.gpus
        return
    assert placement.partition in inputs.platform.partitions
    assert indexes(inputs, placement) == placement.partition.gpus
    boards = {inputs.topology.gpus[index].board for index in placement.partition.gpus}
    switches = {s.pci.address: s.board for s in inputs.topology.nvswitches}
    assert {switches[address] for address in placement.nvswitches} <= boards
