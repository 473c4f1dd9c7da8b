"""Where a VM goes: chosen by decide.placement, complete enough that nothing decides after it."""

from __future__ import annotations

from dataclasses import dataclass

from dgx_kvm_sw.model.pci import CpuSet, PciAddress
from dgx_kvm_sw.model.platform import Partition


@dataclass(frozen=True)
class GuestCell:
    """One NUMA cell of the guest and the host node it mirrors."""

    host_node: int
    cores: tuple[tuple[int, ...], ...]  # host cores; sibling threads stay together
    memory_mib: int


@dataclass(frozen=True)
class Placement:
    """All hardware of one VM."""

    vm: str
    partition: Partition | None  # None without GPUs
    gpus: tuple[PciAddress, ...]
    nvswitches: tuple[PciAddress, ...]
    nics: tuple[PciAddress, ...]
    drives: tuple[PciAddress, ...]
    vfs: tuple[PciAddress, ...]  # of its networks of this kind, in their order
    cells: tuple[GuestCell, ...]  # ordered by host node
    helper_cpus: CpuSet  # emulator and IO threads: the host's reserve on the VM's nodes
    hugepage_kib: int  # 0 = ordinary pages
    kept: bool  # it already held this hardware; nothing was chosen

    @property
    def devices(self) -> tuple[PciAddress, ...]:
        return (*self.gpus, *self.nvswitches, *self.nics, *self.drives, *self.vfs)

    @property
    def memory_mib(self) -> int:
        return sum(cell.memory_mib for cell in self.cells)

    @property
    def vcpus(self) -> int:
        return sum(len(core) for cell in self.cells for core in cell.cores)


@dataclass(frozen=True)
class Holding:
    """Hardware that an existing domain holds, running or not, ours or not.

    A running domain whose definition has changed has two: what it runs on (first) and what its
    next start will take.
    """

    vm: str
    ours: bool
    stays: bool  # it runs, or nothing says it may be moved
    devices: tuple[PciAddress, ...]
    cells: tuple[GuestCell, ...]  # a foreign domain without pins has cells without cores
    hugepage_kib: int
    vfs: tuple[PciAddress | None, ...] = ()  # by network interface; None for one that is no VF


@dataclass(frozen=True)
class Candidate:
    """One legal partition that was looked at for a VM, and the verdict in words."""

    partition: Partition
    verdict: str  # "chosen", "fits, ranked 2", "GPU 5 (0000:59:00.0) is held by rapids"
    holders: tuple[str, ...] = ()  # the other VMs that have GPUs of it


@dataclass(frozen=True)
class Unplaceable:
    """A VM that does not fit: sentences saying why, and what would make room."""

    vm: str
    reasons: tuple[str, ...]
    remedies: tuple[str, ...]


@dataclass(frozen=True)
class Room:
    """How many more VMs of a kind would fit: what the first would get, or why there is none."""

    count: int
    next: Placement | None
    refused: Unplaceable | None


@dataclass(frozen=True)
class Placements:
    """The answer for the whole file."""

    placed: tuple[Placement, ...]  # in file order
    unplaceable: tuple[Unplaceable, ...]

    def of(self, vm: str) -> Placement | None:
        return next((placement for placement in self.placed if placement.vm == vm), None)
