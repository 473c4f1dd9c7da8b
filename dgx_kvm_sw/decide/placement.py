"""Choose hardware for every VM of the file, deterministically, and say why when impossible."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dgx_kvm_sw.decide.capacity import NodeCapacity, capacities
from dgx_kvm_sw.decide.fit import DoesNotFit, Inputs, fit
from dgx_kvm_sw.decide.ledger import Ledger
from dgx_kvm_sw.decide.partitions import rank
from dgx_kvm_sw.model.pci import PciAddress
from dgx_kvm_sw.model.placement import Candidate, Placement, Placements, Unplaceable
from dgx_kvm_sw.model.platform import Partition
from dgx_kvm_sw.model.spec import VmSpec
from dgx_kvm_sw.model.topology import Topology

# A full file of 16 VMs needs 16 tries; the bound only ends searches that cannot succeed.
_MAX_TRIES = 500


def place(inputs: Inputs) -> Placements:
    """Place all VMs: what runs stays; what is defined stays, unless the file pins its GPUs for
    another VM; then pins; then larger before smaller.

    If the plain order leaves a VM out, other choices are searched; what still does not fit
    is refused with reasons and does not hinder the rest.
    """
    search = Search(inputs)
    placed = search.run(search.order())
    by_vm = {placement.vm: placement for placement in placed}
    left_out = [vm for vm in inputs.spec.vms if vm.name not in by_vm]
    ledger = search.ledger(placed)
    return Placements(
        tuple(by_vm[vm.name] for vm in inputs.spec.vms if vm.name in by_vm),
        tuple(search.unplaceable(vm, ledger) for vm in left_out),
    )


def candidates(inputs: Inputs, vm: VmSpec) -> tuple[Candidate, ...]:
    """Return every legal partition of the VM's size with a verdict, the best first.

    The other VMs stand where `place` puts them.
    """
    search = Search(inputs)
    placed = [p for p in search.run(search.order()) if p.vm != vm.name]
    return tuple(search.verdicts(vm, search.ledger(placed)))


def fits(inputs: Inputs, one_more: dict[int, VmSpec]) -> dict[int, int]:
    """Return how many more VMs of each size would fit; `one_more` is a sample VM by size."""
    search = Search(inputs)
    start = search.ledger(search.run(search.order()))
    result = {}
    for size, vm in one_more.items():
        ledger, count = start, 0
        while placement := search.best(_numbered(vm, count), ledger):
            ledger, count = ledger.take(placement), count + 1
        result[size] = count
    return result


def _numbered(vm: VmSpec, number: int) -> VmSpec:
    return replace(vm, name=f"{vm.name} {number}")  # a space: no VM of the file has this name


@dataclass
class Search:
    """One run over a file; it owns the inputs and the count of tries."""

    inputs: Inputs
    tries: int = 0

    def __post_init__(self) -> None:
        self.caps: dict[int, NodeCapacity] = capacities(self.inputs.topology, self.inputs.spec)
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
        if self.inputs.restart:
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
        return next((p for p in self.inputs.platform.partitions if p.gpus == gpus), None)

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
        gpus = [topology.gpus[index] for index in partition.gpus]
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

    # -- explaining -------------------------------------------------------------------------

    def verdicts(self, vm: VmSpec, ledger: Ledger) -> list[Candidate]:
        options = [option for option in self.options(vm, ledger) if option]
        others = [p for p in self.inputs.platform.of_size(vm.gpus) if p not in options]
        result, fitting = [], 0
        for partition in (*options, *others):
            try:
                fit(self.inputs, self.caps, ledger, vm, partition)
            except DoesNotFit as error:
                result.append(Candidate(partition, str(error)))
                continue
            if partition in others:
                verdict = "would fit, but the file pins other GPUs"
            else:
                fitting += 1
                verdict = "chosen" if fitting == 1 else f"fits, ranked {fitting}"
            result.append(Candidate(partition, verdict))
        return result

    def unplaceable(self, vm: VmSpec, ledger: Ledger) -> Unplaceable:
        if not vm.gpus:
            return self._unplaceable_without_gpus(vm, ledger)
        sizes = self.inputs.platform.sizes
        if vm.gpus not in sizes:
            offered = ", ".join(map(str, sizes)) or "none"
            title = self.inputs.platform.title
            reason = f"{title} has no legal set of {vm.gpus} GPUs (sizes: {offered})"
            return Unplaceable(vm.name, (reason,), ())
        if vm.pin and not self.options(vm, ledger):
            legal = ", ".join(_indexes(p) for p in self.inputs.platform.of_size(vm.gpus))
            reason = f"its pin {', '.join(vm.pin)} is not a legal set of GPUs (legal: {legal})"
            return Unplaceable(
                vm.name, (reason,), ("pin one of the legal sets, or remove the pin",)
            )
        verdicts = self.verdicts(vm, ledger)
        if vm.pin:
            wanted = pinned(self.inputs.topology, vm)
            verdicts = [v for v in verdicts if v.partition.gpus == wanted]
        return Unplaceable(vm.name, _grouped(verdicts), self._remedies(vm, ledger, verdicts))

    def _unplaceable_without_gpus(self, vm: VmSpec, ledger: Ledger) -> Unplaceable:
        try:
            fit(self.inputs, self.caps, ledger, vm, None)
        except DoesNotFit as error:
            hint = "ask for less, or raise host.cpu_pool in the file"
            return Unplaceable(vm.name, (str(error),), (hint,))
        raise AssertionError(f"{vm.name} fits after all")

    def _remedies(self, vm: VmSpec, ledger: Ledger, verdicts: list[Candidate]) -> tuple[str, ...]:
        """Name the fewest VMs whose leaving would make room."""
        best: tuple[str, ...] | None = None
        for verdict in verdicts:
            gpus = [self.inputs.topology.gpus[i].pci.address for i in verdict.partition.gpus]
            if not all(self.inputs.health.usable(gpu) for gpu in gpus):
                continue
            holders = {ledger.holder(gpu, vm.name) for gpu in gpus} - {None}
            names = tuple(sorted(str(holder) for holder in holders))
            if (
                names
                and (best is None or len(names) < len(best))
                and self._helps(vm, ledger, verdict.partition, names)
            ):
                best = names
        if best is None:
            return ()
        return (f"it would fit without {' and '.join(best)}",)

    def _helps(
        self, vm: VmSpec, ledger: Ledger, partition: Partition, gone: tuple[str, ...]
    ) -> bool:
        try:
            fit(self.inputs, self.caps, ledger.without(gone), vm, partition)
        except DoesNotFit:
            return False
        return True


def gpu_indexes(topology: Topology, devices: tuple[PciAddress, ...]) -> tuple[int, ...]:
    """Return the indexes of the GPUs among these devices, ascending."""
    return tuple(gpu.index for gpu in topology.gpus if gpu.pci.address in devices)


def pinned(topology: Topology, vm: VmSpec) -> tuple[int, ...]:
    """Return the indexes that a pin names; one that no GPU has is left out."""
    by_address = {gpu.pci.address: gpu.index for gpu in topology.gpus}
    named = (
        int(name) if name.isdecimal() else by_address.get(PciAddress.parse(name)) for name in vm.pin
    )
    return tuple(sorted(index for index in named if index in by_address.values()))


def _indexes(partition: Partition) -> str:
    return "-".join(map(str, partition.gpus))


def _grouped(verdicts: list[Candidate]) -> tuple[str, ...]:
    """One sentence for each distinct reason, naming the sets it stands for."""
    sets: dict[str, list[Partition]] = {}
    for verdict in verdicts:
        sets.setdefault(verdict.verdict, []).append(verdict.partition)
    return tuple(
        reason if len(found) == found[0].size == 1 else f"{_sets(found)}: {reason}"
        for reason, found in sets.items()
    )


def _sets(partitions: list[Partition]) -> str:
    return ", ".join(_gpus(partition) for partition in partitions)


def _gpus(partition: Partition) -> str:
    gpus = partition.gpus
    if len(gpus) > 2 and gpus == tuple(range(gpus[0], gpus[-1] + 1)):
        return f"GPUs {gpus[0]}-{gpus[-1]}"
    return f"GPU{'s' if len(gpus) > 1 else ''} {', '.join(map(str, gpus))}"
