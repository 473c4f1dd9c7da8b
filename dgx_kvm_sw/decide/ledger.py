"""Who holds what: devices, CPUs and memory given away so far."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dgx_kvm_sw.decide.capacity import NodeCapacity
from dgx_kvm_sw.model.pci import PciAddress
from dgx_kvm_sw.model.placement import GuestCell, Holding, Placement


@dataclass(frozen=True)
class Ledger:
    """Immutable: taking returns a new ledger, so that a search can go back for free."""

    devices: dict[PciAddress, str]  # -> VM
    cpus: dict[int, str]
    memory: dict[tuple[str, int, int], int]  # (VM, node, page size in KiB) -> MiB

    @classmethod
    def of(cls, holdings: tuple[Holding, ...]) -> Ledger:
        ledger = cls({}, {}, {})
        for held in holdings:
            ledger = ledger._take(held.vm, held.devices, held.cells, held.hugepage_kib)
        return ledger

    def take(self, placement: Placement) -> Ledger:
        return self._take(placement.vm, placement.devices, placement.cells, placement.hugepage_kib)

    def _take(
        self, vm: str, devices: tuple[PciAddress, ...], cells: tuple[GuestCell, ...], page: int
    ) -> Ledger:
        memory = dict(self.memory)
        for cell in cells:
            # A VM that grows while it runs needs the larger of what it has and what it gets.
            key = (vm, cell.host_node, page)
            memory[key] = max(memory.get(key, 0), cell.memory_mib)
        cpus = {cpu: vm for cell in cells for core in cell.cores for cpu in core}
        return replace(
            self,
            devices={**self.devices, **dict.fromkeys(devices, vm)},
            cpus={**self.cpus, **cpus},
            memory=memory,
        )

    def holder(self, address: PciAddress, vm: str) -> str | None:
        """The other VM that holds this device, if any."""
        holder = self.devices.get(address)
        return None if holder == vm else holder

    def free_cores(self, node: NodeCapacity, vm: str) -> list[tuple[int, ...]]:
        """Cores of the node of which no other VM holds a thread."""
        return [core for core in node.cores if all(self.cpus.get(cpu, vm) == vm for cpu in core)]

    def free_memory(self, node: NodeCapacity, page: int, vm: str) -> int:
        """MiB of one page size left on the node for this VM."""
        used = sum(
            mib
            for (holder, where, size), mib in self.memory.items()
            if where == node.id and size == page and holder != vm
        )
        return node.memory.get(page, 0) - used

    def without(self, gone: tuple[str, ...]) -> Ledger:
        """The ledger as it would be if these VMs were not there."""
        return Ledger(
            {address: vm for address, vm in self.devices.items() if vm not in gone},
            {cpu: vm for cpu, vm in self.cpus.items() if vm not in gone},
            {key: mib for key, mib in self.memory.items() if key[0] not in gone},
        )
