"""What each NUMA node can give, and how much of it a VM's share is."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from dgx_kvm_sw.model.spec import Amount, HostShare, HostSpec, Hugepages, Share, VmSpec
from dgx_kvm_sw.model.topology import NumaNode, Topology

GIB = 1024  # in MiB
PAGE_KIB = {Hugepages.GIB1: 1024 * 1024, Hugepages.MIB2: 2048, Hugepages.NONE: 0}
_EPSILON = 1e-9  # 29% of 100 cores is 29 cores, whatever binary fractions say

Core = tuple[int, ...]


@dataclass(frozen=True)
class NodeCapacity:
    """A NUMA node less the host's reserve."""

    id: int
    cores: tuple[Core, ...]
    reserve: tuple[Core, ...]  # the host's own; emulator and IO threads run here
    pool_cores: int  # of `cores`, kept from the GPUs' shares for VMs without GPUs
    memory: dict[int, int]  # page size in KiB (0 = ordinary) -> MiB
    pool_memory: int  # MiB of the main kind of memory, the same
    serves: int | None  # the GPU node that this node's CPUs and memory are for
    gpus: int  # GPUs on that node, usable or not

    @property
    def gpu_cores(self) -> int:
        return max(0, len(self.cores) - self.pool_cores)

    @property
    def main_page_kib(self) -> int:
        """The page size that most of the node's memory comes in."""
        whole = sum(self.memory.values())
        return next((size for size, mib in self.memory.items() if 2 * mib > whole), 0)

    def gpu_memory(self, page_kib: int) -> int:
        pool = self.pool_memory if page_kib == self.main_page_kib else 0
        return max(0, self.memory.get(page_kib, 0) - pool)


@dataclass(frozen=True)
class CellDemand:
    """What a VM asks of one node."""

    node: int
    cores: int
    memory_mib: int


class CannotResolve(Exception):
    """A demand that fits no machine of this shape; the text is a reason for the user."""


def capacities(topology: Topology, spec: HostSpec, gpus_when_whole: int) -> dict[int, NodeCapacity]:
    """Return the capacity of every NUMA node that has CPUs, by node id."""
    nodes = [node for node in topology.numa_nodes if node.cores]
    gpus = Counter(topology.node(gpu.pci.numa_node).id for gpu in topology.gpus)
    if len(topology.gpus) < gpus_when_whole:
        # A GPU that is gone must not change what every other VM gets. Boards are symmetric, and
        # every machine of the table has its GPUs on two nodes at least.
        whole = max((*gpus.values(), gpus_when_whole // max(2, len(gpus))))
        gpus = Counter(dict.fromkeys(gpus, whole))
    serves = _serves(nodes, gpus)
    return {node.id: _capacity(node, spec, len(nodes), serves.get(node.id), gpus) for node in nodes}


def _capacity(
    node: NumaNode, spec: HostSpec, nodes: int, serves: int | None, gpus: Counter[int]
) -> NodeCapacity:
    threads = max(len(core) for core in node.cores)
    reserve = _cores(spec.reserve, len(node.cores), threads, nodes)
    pages = {pool.size_kib: pool.total * pool.size_kib // 1024 for pool in node.hugepages}
    ordinary = node.memory_mib - sum(pages.values())
    kept = _memory(spec.reserve, node.memory_mib, nodes)
    return NodeCapacity(
        id=node.id,
        cores=node.cores[reserve:],
        reserve=node.cores[:reserve],
        pool_cores=_cores(spec.cpu_pool, len(node.cores), threads, nodes),
        memory={0: max(0, ordinary - kept), **{size: mib for size, mib in pages.items() if mib}},
        pool_memory=_memory(spec.cpu_pool, node.memory_mib, nodes),
        serves=serves,
        gpus=gpus[serves] if serves is not None else 0,
    )


def _cores(share: HostShare, cores: int, threads: int, nodes: int) -> int:
    """Cores of one node that a host share takes, rounded up, never all of them."""
    if isinstance(share.cpus, Share):
        wanted = math.ceil(share.cpus.fraction * cores - _EPSILON)
    else:
        wanted = math.ceil(share.cpus / (threads * nodes))
    return min(wanted, cores - 1)


def _memory(share: HostShare, memory_mib: int, nodes: int) -> int:
    """MiB of one node that a host share takes, rounded up to GiB."""
    if isinstance(share.memory, Share):
        wanted = share.memory.fraction * memory_mib
    else:
        wanted = share.memory / nodes
    return math.ceil(wanted / GIB - _EPSILON) * GIB


def _serves(nodes: list[NumaNode], gpus: Counter[int]) -> dict[int, int]:
    """Map every node to the GPU node it works for: itself, or the nearest one.

    A DGX A100 has GPUs on four of eight nodes; the other four would idle if a VM could only
    use its GPUs' own. Among equally near nodes the one with the fewest helpers wins.
    """
    if not gpus:
        return {}
    serves = {node.id: node.id for node in nodes if gpus[node.id]}
    targets = sorted(gpus)
    helpers: Counter[int] = Counter()
    for node in nodes:
        if node.id not in serves:
            owner = min(targets, key=lambda gpu: (node.distance(gpu), helpers[gpu], gpu))
            helpers[owner] += 1
            serves[node.id] = owner
    return serves


def page_kib(vm: VmSpec, nodes: list[NodeCapacity]) -> int:
    """Return the page size, in KiB, that this VM's memory uses on these nodes.

    `auto` takes huge pages only where they are most of every node's memory: a small pool is
    there for something else, and a share of it would be a very small VM.
    """
    if vm.resources.hugepages is not Hugepages.AUTO:
        return PAGE_KIB[vm.resources.hugepages]
    pages = {node.main_page_kib for node in nodes}
    return pages.pop() if len(pages) == 1 else 0


def gpu_demand(
    vm: VmSpec, gpus_on: Counter[int], caps: dict[int, NodeCapacity]
) -> tuple[tuple[CellDemand, ...], int]:
    """Return what a VM with these GPUs (node id -> count) asks of each node, and its page size.

    Raises CannotResolve when the amounts do not come out in whole cores and pages.
    """
    nodes = [cap for cap in caps.values() if cap.serves in gpus_on]
    page = page_kib(vm, nodes)
    _check_pages(nodes, page)
    parts = {cap.id: gpus_on[cap.serves or 0] / cap.gpus for cap in nodes}
    threads = _threads(nodes)
    cpus, memory = vm.resources.cpus, vm.resources.memory
    if isinstance(cpus, Share):
        cores = {
            cap.id: int(cap.gpu_cores * cpus.fraction * parts[cap.id] + _EPSILON) for cap in nodes
        }
    else:
        weights = {cap.id: cap.gpu_cores * parts[cap.id] for cap in nodes}
        cores = _spread(_whole_cores(cpus, threads), weights)
    cores = {node: count for node, count in cores.items() if count}
    if not cores:
        raise CannotResolve(f"its share of the CPUs ({cpus}) is less than one core")
    if isinstance(memory, Share):
        mib = {
            cap.id: int(cap.gpu_memory(page) * memory.fraction * parts[cap.id] / GIB + _EPSILON)
            * GIB
            for cap in nodes
            if cap.id in cores
        }
    else:
        mib = _split_memory(memory, cores, page)
    if not all(mib.values()):
        raise CannotResolve(f"its share of the memory ({memory}) is less than 1 GiB")
    return tuple(CellDemand(node, cores[node], mib[node]) for node in sorted(cores)), page


def cpu_demand(vm: VmSpec, cores_on: dict[int, int], page: int) -> tuple[CellDemand, ...]:
    """Return what a VM without GPUs asks of the nodes it was given cores on."""
    memory = vm.resources.memory
    assert not isinstance(memory, Share)  # the spec refuses shares where there are no GPUs
    mib = _split_memory(memory, cores_on, page)
    return tuple(CellDemand(node, cores_on[node], mib[node]) for node in sorted(cores_on))


def whole_cores(vm: VmSpec, caps: dict[int, NodeCapacity]) -> int:
    """Return the cores of a VM whose CPUs are a plain number."""
    assert not isinstance(vm.resources.cpus, Share)
    return _whole_cores(vm.resources.cpus, _threads(list(caps.values())))


def device_count(amount: Amount, available: int, gpus: int, all_gpus: int) -> int:
    """Resolve a number of NICs or drives; a share is rounded down."""
    if isinstance(amount, Share):
        return int(amount.fraction * available * gpus / all_gpus + _EPSILON) if all_gpus else 0
    return amount


def _check_pages(nodes: list[NodeCapacity], page: int) -> None:
    for node in nodes:
        if page and not node.memory.get(page):
            size = "1 GiB" if page >= 1024 * 1024 else "2 MiB"
            raise CannotResolve(f"NUMA node {node.id} has no pages of {size} (`hugepages`)")


def _threads(nodes: list[NodeCapacity]) -> int:
    return max((len(core) for node in nodes for core in node.cores), default=1)


def _whole_cores(cpus: int, threads: int) -> int:
    if cpus % threads:
        below = cpus // threads * threads
        either = f"{below} or {below + threads}" if below else f"{threads}"
        raise CannotResolve(
            f"{cpus} CPU threads are not whole cores ({threads} threads each): write {either}"
        )
    return cpus // threads


def _spread(total: int, weights: dict[int, float]) -> dict[int, int]:
    """Split `total` in proportion to weights; what is left over goes to the largest remainders."""
    whole = sum(weights.values()) or 1
    exact = {node: total * weight / whole for node, weight in weights.items()}
    result = {node: int(part) for node, part in exact.items()}
    by_remainder = sorted(exact, key=lambda node: (result[node] - exact[node], node))
    for node in by_remainder[: total - sum(result.values())]:
        result[node] += 1
    return result


def _split_memory(memory_mib: int, cores: dict[int, int], page: int) -> dict[int, int]:
    """Split memory like the cores, in whole GiB where it can be, in whole pages always."""
    unit = GIB if memory_mib % GIB == 0 else max(1, page // 1024)
    if memory_mib % unit:
        size = f"{page // 1024 // 1024} GiB" if page >= 1024 * 1024 else f"{page // 1024} MiB"
        raise CannotResolve(f"{memory_mib} MiB of memory are not whole pages of {size}")
    units = _spread(memory_mib // unit, {node: float(count) for node, count in cores.items()})
    if not all(units.values()):
        raise CannotResolve(
            f"{memory_mib} MiB of memory cannot be split over {len(cores)} NUMA nodes"
        )
    return {node: count * unit for node, count in units.items()}
