"""The search for a placement of all VMs: who comes first, which partitions are worth trying."""

from __future__ import annotations

from dataclasses import dataclass

from dgx_kvm_sw.decide.capacity import NodeCapacity, capacities
from dgx_kvm_sw.decide.fit import DoesNotFit, Inputs, fit
from dgx_kvm_sw.decide.ledger import Ledger
from dgx_kvm_sw.decide.partitions import rank
from dgx_kvm_sw.model.pci import PciAddress
from dgx_kvm_sw.model.placement import Placement
from dgx_kvm_sw.model.platform import Partition
from dgx_kvm_sw.model.spec import VmSpec
from dgx_kvm_sw.model.topology import Topology

# A full file of 16 VMs needs 16 tries; the bound only ends searches that cannot succeed.
_MAX_TRIES = 500


@dataclass
class Search:
    """One run over a file; it owns the inputs and the count of tries."""

    inputs: Inputs
    tries: int = 0

    def __post_init__(self) -> None:
        self.caps: dict[int, NodeCapacity] = capacities(
            self.inputs.topology, self.inputs.spec, self.inputs.platform.gpus
        )
        self.start = Ledger.of(
            tuple(held for held in self.inputs.holdings if held.stays or not held.ours)
        )

    def ledger(self, placed: list[Placement]) -> Ledger:
        ledger = self.start
        for placement in placed:
            ledger = self._with(placement, ledger)
        return ledger

    def _with(self, placement: Placement, ledger: Ledger) -> Ledger:
        """The ledger once a VM is placed; one that runs on also keeps what it leaves later."""
        if self.inputs.restart and placement.vm not in self.inputs.staying:
            ledger = ledger.without((placement.vm,))
        return ledger.take(placement)

    # -- order ------------------------------------------------------------------------------

    def order(self) -> list[VmSpec]:
        indexed = enumerate(self.inputs.spec.vms)
        return [vm for _, vm in sorted(indexed, key=lambda item: (*self._tier(item[1]), item[0]))]

    def _tier(self, vm: VmSpec) -> tuple[int, int]:
        held, kept = self.inputs.holding(vm), self.kept_partition(vm)
        if held and held.stays and kept is not None:
            return 0, 0
        if isinstance(kept, Partition) and (vm.pin or not self._pinned_by_others(vm, kept)):
            return 1, -vm.gpus
        if kept == ():
            return 1, 0
        if vm.pin:
            return 2, -vm.gpus
        # VMs without GPUs come last: what they may use is only known then.
        return (3 if vm.gpus else 4), -vm.gpus

    def _pinned_by_others(self, vm: VmSpec, partition: Partition) -> bool:
        others = (pinned(self.inputs.topology, v) for v in self.inputs.spec.vms if v != vm)
        return any(set(gpus) & set(partition.gpus) for gpus in others)

    def kept_partition(self, vm: VmSpec) -> Partition | tuple[()] | None:
        """The partition the VM holds if it still is what the file asks; () without GPUs."""
        held = self.inputs.holding(vm)
        if held is None:
            return None
        gpus = gpu_indexes(self.inputs.topology, held.devices)
        if len(gpus) != vm.gpus or (vm.pin and gpus != pinned(self.inputs.topology, vm)):
            return None
        if not gpus:
            return ()
        return self.inputs.platform.with_gpus(gpus)

    # -- choosing ---------------------------------------------------------------------------

    def run(self, order: list[VmSpec]) -> list[Placement]:
        """Place in order; when that leaves someone out, look for a choice that does not."""
        greedy = self._greedy(order)
        names = {placement.vm for placement in greedy}
        # A VM that would not fit even alone says nothing about the others.
        able = [vm for vm in order if vm.name in names or self.best(vm, self.start)]
        asked = sum(vm.gpus for vm in able)
        addresses = [gpu.pci.address for gpu in self.inputs.topology.gpus]
        usable = sum(a in self.start.devices or self.inputs.health.usable(a) for a in addresses)
        if len(greedy) == len(able) or asked > usable:
            return greedy
        return self._exact(able, self.start) or greedy

    def _greedy(self, order: list[VmSpec]) -> list[Placement]:
        ledger, placed, waiting = self.start, [], order
        while waiting:
            left_out = []
            for vm in waiting:
                if placement := self.best(vm, ledger):
                    placed.append(placement)
                    ledger = self._with(placement, ledger)
                else:
                    left_out.append(vm)
            if len(left_out) == len(waiting):
                break
            waiting = left_out  # a GPU's share that was kept free for others may be left over now
        return placed

    def _exact(self, order: list[VmSpec], ledger: Ledger) -> list[Placement] | None:
        """Depth-first search for a placement of all; None when there is none within the bound."""
        if not order:
            return []
        for partition in self.options(order[0], ledger):
            self.tries += 1
            if self.tries > _MAX_TRIES:
                return None
            try:
                placement = fit(self.inputs, self.caps, ledger, order[0], partition)
            except DoesNotFit:
                continue
            rest = self._exact(order[1:], self._with(placement, ledger))
            if rest is not None:
                return [placement, *rest]
        return None

    def best(self, vm: VmSpec, ledger: Ledger) -> Placement | None:
        for partition in self.options(vm, ledger):
            try:
                return fit(self.inputs, self.caps, ledger, vm, partition)
            except DoesNotFit:
                continue
        return None

    def options(self, vm: VmSpec, ledger: Ledger) -> list[Partition | None]:
        """The partitions worth trying, best first; [None] for a VM without GPUs."""
        kept = self.kept_partition(vm)
        if not vm.gpus:
            return [None]
        if vm.pin:
            wanted = pinned(self.inputs.topology, vm)
            return [p for p in self.inputs.platform.of_size(vm.gpus) if p.gpus == wanted]
        ranked = rank(
            self.inputs.platform.partitions,
            self._taken(vm, ledger),
            vm.gpus,
            lambda partition: self._preference(vm, partition, ledger),
        )
        held = self.inputs.holding(vm)
        if isinstance(kept, Partition) and held and held.stays:
            return [kept]  # a VM that runs is never offered another place
        if isinstance(kept, Partition):
            return [kept, *(partition for partition in ranked if partition != kept)]
        return list(ranked)

    def _taken(self, vm: VmSpec, ledger: Ledger) -> list[list[int]]:
        """GPU indexes by VM; GPUs that cannot be used stand alone, as VMs that never leave."""
        held: dict[str, list[int]] = {}
        for gpu in self.inputs.topology.gpus:
            if holder := ledger.holder(gpu.pci.address, vm.name):
                held.setdefault(holder, []).append(gpu.index)
            elif not self.inputs.health.usable(gpu.pci.address):
                held[f"GPU {gpu.index}"] = [gpu.index]
        return list(held.values())

    def _preference(self, vm: VmSpec, partition: Partition, ledger: Ledger) -> tuple[int, ...]:
        """Fewest NUMA nodes and PCIe roots, then boards of the same tenant."""
        topology = self.inputs.topology
        gpus = [topology.gpu(index) for index in partition.gpus]
        nodes = len({gpu.pci.numa_node for gpu in gpus})
        roots = len({gpu.pci.root for gpu in gpus})
        return (nodes, roots, self._strangers(vm, {gpu.board for gpu in gpus}, ledger))

    def _strangers(self, vm: VmSpec, boards: set[int], ledger: Ledger) -> int:
        """GPUs of other tenants less those of its own on these boards; 0 without a tenant."""
        if not vm.tenant:
            return 0
        tenants = {spec.name: spec.tenant for spec in self.inputs.spec.vms}
        count = 0
        for gpu in self.inputs.topology.gpus:
            holder = ledger.holder(gpu.pci.address, vm.name)
            if holder and gpu.board in boards:
                count += -1 if tenants.get(holder) == vm.tenant else 1
        return count


def gpu_indexes(topology: Topology, devices: tuple[PciAddress, ...]) -> tuple[int, ...]:
    """Return the indexes of the GPUs among these devices, ascending."""
    return tuple(gpu.index for gpu in topology.gpus if gpu.pci.address in devices)


def pinned(topology: Topology, vm: VmSpec) -> tuple[int, ...]:
    """Return the indexes that a pin names; one that no GPU has is left out."""
    indexes = {gpu.pci.address: gpu.index for gpu in topology.gpus}
    named = [
        int(name) if name.isdecimal() else indexes.get(PciAddress.parse(name), -1)
        for name in vm.pin
    ]
    return tuple(sorted(index for index in named if index in indexes.values()))
