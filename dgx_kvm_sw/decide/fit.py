"""Try one VM on one partition: all its hardware, or the first reason why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from dgx_kvm_sw.decide import capacity
from dgx_kvm_sw.decide.capacity import CannotResolve, CellDemand, Core, NodeCapacity
from dgx_kvm_sw.decide.devices import Assignable, nearest
from dgx_kvm_sw.decide.ledger import Ledger
from dgx_kvm_sw.decide.vfs import NoVf, VfChoice
from dgx_kvm_sw.model.health import DeviceState, HealthReport
from dgx_kvm_sw.model.pci import CpuSet, PciAddress, PciDevice
from dgx_kvm_sw.model.placement import GuestCell, Holding, Placement
from dgx_kvm_sw.model.platform import FabricModel, Partition, Platform
from dgx_kvm_sw.model.spec import Amount, HostSpec, NetworkKind, Share, VmSpec
from dgx_kvm_sw.model.topology import Topology


@dataclass(frozen=True)
class Inputs:
    """Everything a placement is made from."""

    spec: HostSpec
    topology: Topology
    platform: Platform
    health: HealthReport
    holdings: tuple[Holding, ...] = ()
    restart: bool = False  # running VMs may be stopped: what they no longer need is free
    staying: frozenset[str] = frozenset()  # VMs that are not stopped all the same

    def holding(self, vm: VmSpec) -> Holding | None:
        """What the VM holds already. One that runs with an older definition holds twice: then
        the running one counts if it is what the file asks, so that undoing an edit moves nothing.
        """
        mine = [held for held in self.holdings if held.vm == vm.name and held.ours]
        gpus = {gpu.pci.address for gpu in self.topology.gpus}
        fitting = (held for held in mine if len(gpus & set(held.devices)) == vm.gpus)
        return next(fitting, mine[0] if mine else None)


class DoesNotFit(Exception):
    """The reason, as a sentence part, why a VM cannot have a partition."""


def fit(
    inputs: Inputs,
    caps: dict[int, NodeCapacity],
    ledger: Ledger,
    vm: VmSpec,
    partition: Partition | None,
) -> Placement:
    """Return the placement of `vm` on `partition`; raises DoesNotFit with the first reason.

    What the VM holds already is kept wherever it still serves.
    """
    assignable = Assignable(inputs.topology, inputs.health, ledger)
    gpus = [inputs.topology.gpu(index).pci for index in (partition.gpus if partition else ())]
    for gpu in gpus:
        if reason := assignable.refusal(gpu.address, vm.name):
            raise DoesNotFit(reason)
    try:
        if gpus:
            on_node = Counter(inputs.topology.node(gpu.numa_node).id for gpu in gpus)
            demands = [capacity.gpu_demand(vm, on_node, caps)]
        else:
            demands = _demands_without_gpus(inputs, caps, ledger, vm)
    except CannotResolve as error:
        raise DoesNotFit(str(error)) from error
    refusal = DoesNotFit()
    for demand, page in demands:
        try:
            return _with_demand(inputs, caps, ledger, vm, partition, assignable, demand, page)
        except DoesNotFit as error:
            refusal = error
    raise refusal


def choose_vfs(
    inputs: Inputs, ledger: Ledger, vm: VmSpec, gpus: list[PciDevice], nodes: list[int]
) -> tuple[PciAddress, ...]:
    """Return the virtual functions of a VM's networks; raises NoVf. Whether there are enough does
    not depend on GPUs and nodes, which only say what is near.
    """
    if not any(network.kind is NetworkKind.VF for network in vm.networks):
        return ()
    assignable = Assignable(inputs.topology, inputs.health, ledger)
    others = tuple(other for other in inputs.spec.vms if other.name != vm.name)
    first = inputs.holding(vm)
    own = [held for held in inputs.holdings if held.vm == vm.name and held.ours]
    own.sort(key=lambda held: held != first)  # one that runs with an older definition has two
    vfs = tuple(held.vfs for held in own)
    choice = VfChoice(inputs.topology, assignable, ledger, inputs.holdings, others, vfs)
    return choice.choose(vm, gpus, nodes)


def _with_demand(
    inputs: Inputs,
    caps: dict[int, NodeCapacity],
    ledger: Ledger,
    vm: VmSpec,
    partition: Partition | None,
    assignable: Assignable,
    demand: tuple[CellDemand, ...],
    page: int,
) -> Placement:
    """Return the placement with this much of each node; the GPUs are known to be assignable."""
    held = inputs.holding(vm)
    gpus = [inputs.topology.gpu(index).pci for index in (partition.gpus if partition else ())]
    _check_memory(ledger, vm, caps, demand, page)
    cells = _cells(inputs, caps, ledger, vm.name, demand, held)
    nodes = [cell.host_node for cell in cells]
    nics = ("NICs", vm.resources.nics, [nic.pci for nic in inputs.topology.nics])
    drives = ("NVMe drives", vm.resources.drives, [d.pci for d in inputs.topology.drives])
    try:
        vfs = choose_vfs(inputs, ledger, vm, gpus, nodes)
    except NoVf as error:
        raise DoesNotFit(error.reason) from error
    placement = Placement(
        vm=vm.name,
        partition=partition,
        gpus=tuple(gpu.address for gpu in gpus),
        nvswitches=_nvswitches(inputs, assignable, vm, partition, held),
        nics=_beside_gpus(inputs, assignable, vm, nics, gpus, nodes),
        drives=_beside_gpus(inputs, assignable, vm, drives, gpus, nodes),
        vfs=vfs,
        cells=cells,
        helper_cpus=CpuSet.of(cpu for node in nodes for core in caps[node].reserve for cpu in core),
        hugepage_kib=page,
        kept=False,
    )
    if not (held and _within(cells, held.cells)):
        # What it leaves is free again: counted as taken, it would hide a GPU that waits.
        after = ledger.without((vm.name,)).take(placement)
        _guard_shares(inputs, caps, after, vm, placement)
    same = held and set(held.devices) == set(placement.devices) and held.cells == cells
    return replace(placement, kept=bool(same))


# -- CPUs and memory ------------------------------------------------------------------------


def _check_memory(
    ledger: Ledger,
    vm: VmSpec,
    caps: dict[int, NodeCapacity],
    demand: tuple[CellDemand, ...],
    page: int,
) -> None:
    for cell in demand:
        free = ledger.free_memory(caps[cell.node], page, vm.name)
        if cell.memory_mib > free:
            kind = {0: "", 2048: " in 2 MiB pages"}.get(page, " in 1 GiB pages")
            raise DoesNotFit(
                f"NUMA node {cell.node} has {max(0, free) / 1024:g} GiB{kind} free,"
                f" {cell.memory_mib / 1024:g} GiB are needed there"
            )


def _cells(
    inputs: Inputs,
    caps: dict[int, NodeCapacity],
    ledger: Ledger,
    vm: str,
    demand: tuple[CellDemand, ...],
    held: Holding | None,
) -> tuple[GuestCell, ...]:
    had = {cell.host_node: cell.cores for cell in held.cells} if held else {}
    placed = {holder for holder, _, _ in ledger.memory}
    defined = {
        core
        for other in inputs.holdings
        if other.vm != vm and other.vm not in placed
        for cell in other.cells
        for core in cell.cores
    }
    cells = []
    for cell in demand:
        free = ledger.free_cores(caps[cell.node], vm)
        if len(free) < cell.cores:
            raise DoesNotFit(
                f"NUMA node {cell.node} has {len(free)} cores free, {cell.cores} are needed there"
            )
        own = had.get(cell.node, ())
        unclaimed = [core for core in free if core in own or core not in defined]
        free = unclaimed if len(unclaimed) >= cell.cores else free  # moves no stopped VM
        cores = _choose_cores(free, cell.cores, own)
        cells.append(GuestCell(cell.node, cores, cell.memory_mib))
    return tuple(cells)


def _choose_cores(free: list[Core], count: int, had: tuple[Core, ...]) -> tuple[Core, ...]:
    """Keep what the VM had; else take the tightest run of neighbouring cores (shared caches)."""
    kept = [core for core in had if core in free]
    if len(kept) >= count:
        return tuple(kept[:count])
    if kept:
        rest = [core for core in free if core not in kept]
        return tuple(sorted((*kept, *rest[: count - len(kept)])))
    runs: list[list[Core]] = []
    for core in free:
        if runs and core[0] == runs[-1][-1][0] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    fitting = [run for run in runs if len(run) >= count]
    return tuple(min(fitting, key=len)[:count] if fitting else free[:count])


def _demands_without_gpus(
    inputs: Inputs, caps: dict[int, NodeCapacity], ledger: Ledger, vm: VmSpec
) -> list[tuple[tuple[CellDemand, ...], int]]:
    """Find nodes for a VM without GPUs: those it has, else the tightest one, else several.

    What no free GPU waits for is tried first; the rest only to be refused in words.
    """
    page = capacity.page_kib(vm, list(caps.values()))
    wanted = capacity.whole_cores(vm, caps)
    free = {node: len(ledger.free_cores(cap, vm.name)) for node, cap in caps.items()}
    if sum(free.values()) < wanted:
        raise DoesNotFit(f"{sum(free.values())} cores are free, {wanted} are needed")
    waiting = _waiting_cores(inputs, caps, ledger)
    spare = {node: max(0, count - waiting[node]) for node, count in free.items()}
    options: list[dict[int, int]] = []
    held = inputs.holding(vm)
    if held and sum(len(cell.cores) for cell in held.cells) == wanted:
        options.append({cell.host_node: len(cell.cores) for cell in held.cells})
    for room in (spare, free):
        tight = sorted(room, key=lambda node: (caps[node].gpus > 0, room[node], node))
        options += [{node: wanted} for node in tight if room[node] >= wanted]
        options.append(_spread_over(room, wanted))
    possible = [o for o in options if set(o) <= set(caps) and sum(o.values()) == wanted]
    return [(capacity.cpu_demand(vm, cores_on, page), page) for cores_on in possible]


def _waiting_cores(inputs: Inputs, caps: dict[int, NodeCapacity], ledger: Ledger) -> dict[int, int]:
    """Cores of each node that are the share of GPUs no VM has yet."""
    free = _free_gpus(inputs, ledger)
    return {
        node.id: node.gpu_cores * free[node.serves] // node.gpus if node.serves is not None else 0
        for node in caps.values()
    }


def _free_gpus(inputs: Inputs, ledger: Ledger) -> Counter[int | None]:
    """Usable GPUs that no VM has, by NUMA node."""
    return Counter(
        inputs.topology.node(gpu.pci.numa_node).id
        for gpu in inputs.topology.gpus
        if gpu.pci.address not in ledger.devices and inputs.health.usable(gpu.pci.address)
    )


def _spread_over(free: dict[int, int], wanted: int) -> dict[int, int]:
    """Take cores from the emptiest nodes first until there are enough."""
    cores_on: dict[int, int] = {}
    for node in sorted(free, key=lambda node: (-free[node], node)):
        if take := min(free[node], wanted - sum(cores_on.values())):
            cores_on[node] = take
    return cores_on


def _within(cells: tuple[GuestCell, ...], held: tuple[GuestCell, ...]) -> bool:
    """Whether a VM asks for no more on any node than it holds there."""
    had = {cell.host_node: cell for cell in held}
    return all(
        (old := had.get(cell.host_node)) is not None
        and len(cell.cores) <= len(old.cores)
        and cell.memory_mib <= old.memory_mib
        for cell in cells
    )


def _guard_shares(
    inputs: Inputs,
    caps: dict[int, NodeCapacity],
    after: Ledger,
    vm: VmSpec,
    placement: Placement,
) -> None:
    """Refuse a VM whose plain numbers would eat the share of a GPU that is still free."""
    if isinstance(vm.resources.cpus, Share) and isinstance(vm.resources.memory, Share):
        return  # shares never add up to more than the machine
    free_gpus = _free_gpus(inputs, after)
    for cell in placement.cells:
        node = caps[cell.host_node]
        waiting = free_gpus[node.serves]
        if not waiting:
            continue
        cores = node.gpu_cores * waiting // node.gpus
        memory = node.gpu_memory(placement.hugepage_kib) * waiting // node.gpus
        have = len(after.free_cores(node, ""))
        left = after.free_memory(node, placement.hugepage_kib, "")
        what = f"the share of the {waiting} free GPUs that NUMA node {node.id} serves"
        if have < cores:
            raise DoesNotFit(f"its CPUs would eat into {what}: {have} cores left of {cores}")
        if placement.hugepage_kib == node.main_page_kib and left < memory:
            raise DoesNotFit(
                f"its memory would eat into {what}:"
                f" {left / 1024:g} GiB left of {memory / 1024:g} GiB"
            )


# -- devices beside the GPUs ----------------------------------------------------------------


def _nvswitches(
    inputs: Inputs,
    assignable: Assignable,
    vm: VmSpec,
    partition: Partition | None,
    held: Holding | None,
) -> tuple[PciAddress, ...]:
    passed = inputs.platform.fabric_model is FabricModel.PASSTHROUGH and vm.resources.nvswitches
    if not partition or not passed or not partition.nvswitches:
        return ()
    boards = {inputs.topology.gpu(index).board for index in partition.gpus}
    candidates = [s.pci for s in inputs.topology.nvswitches if s.board in boards]
    return _pick("NVSwitches", candidates, partition.nvswitches, assignable, vm.name, held)


def _beside_gpus(
    inputs: Inputs,
    assignable: Assignable,
    vm: VmSpec,
    wanted: tuple[str, Amount, list[PciDevice]],
    gpus: list[PciDevice],
    nodes: list[int],
) -> tuple[PciAddress, ...]:
    """Choose NICs or drives: (what to call them, how many, all of the machine)."""
    kind, amount, devices = wanted
    # A share counts broken devices too: one that fails must not change what every VM gets.
    states = {device.address: inputs.health.of(device.address).state for device in devices}
    ours = [d for d in devices if states[d.address] is not DeviceState.UNBOUND]
    count = capacity.device_count(amount, len(ours), len(gpus), inputs.platform.gpus)
    ordered = nearest(inputs.topology, gpus, ours, nodes)
    if isinstance(amount, Share):
        broken = sum(not inputs.health.usable(device.address) for device in ours)
        free = len(assignable.free(ordered, vm.name))
        count = max(min(count, free), count - broken)
    return _pick(kind, ordered, count, assignable, vm.name, inputs.holding(vm))


def _pick(
    kind: str,
    ordered: list[PciDevice],
    count: int,
    assignable: Assignable,
    vm: str,
    held: Holding | None,
) -> tuple[PciAddress, ...]:
    """Take `count` devices, those the VM holds first, then in the given order."""
    free = assignable.free(ordered, vm)
    if len(free) < count:
        raise DoesNotFit(f"{count} {kind} are needed and {len(free)} are free")
    had: Iterable[PciAddress] = held.devices if held else ()
    first = [device for device in free if device.address in set(had)]
    rest = [device for device in free if device not in first]
    return tuple(sorted(device.address for device in (first + rest)[:count]))
