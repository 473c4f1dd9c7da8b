"""PCI addresses, CPU sets and PCI devices as values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_ADDRESS = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class PciAddress:
    """A PCI address, ordered as the bus is; the only place that reads or writes its text form."""

    domain: int
    bus: int
    slot: int
    function: int

    @classmethod
    def parse(cls, text: str) -> PciAddress:
        """Read "0000:34:00.0" or "34:00.0"; raises ValueError for anything else."""
        match = _ADDRESS.fullmatch(text.strip())
        if not match:
            raise ValueError(f"{text!r} is not a PCI address like 0000:34:00.0")
        domain, bus, slot, function = match.groups()
        return cls(int(domain or "0", 16), int(bus, 16), int(slot, 16), int(function))

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.slot:02x}.{self.function:x}"


@dataclass(frozen=True)
class CpuSet:
    """A set of CPU numbers in the kernel's cpulist syntax ("0-23,48-71"), both ways."""

    cpus: frozenset[int]

    @classmethod
    def of(cls, cpus: Iterable[int]) -> CpuSet:
        return cls(frozenset(cpus))

    @classmethod
    def parse(cls, text: str) -> CpuSet:
        """Read a cpulist; raises ValueError when it is not one."""
        cpus: set[int] = set()
        for part in filter(None, text.strip().split(",")):
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
        return cls(frozenset(cpus))

    def __str__(self) -> str:
        ranges: list[list[int]] = []
        for cpu in self:
            if ranges and cpu == ranges[-1][1] + 1:
                ranges[-1][1] = cpu
            else:
                ranges.append([cpu, cpu])
        return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self.cpus))

    def __len__(self) -> int:
        return len(self.cpus)


@dataclass(frozen=True)
class Link:
    """A PCIe link: speed in GT/s and width in lanes, now and at most."""

    speed: float
    width: int
    max_speed: float
    max_width: int

    @property
    def degraded(self) -> bool:
        return self.width < self.max_width or self.speed < self.max_speed


@dataclass(frozen=True)
class PciDevice:
    """One PCI function as sysfs shows it."""

    address: PciAddress
    vendor: int
    device: int
    class_code: int  # 16 bits, base class and subclass: 0x0302 is a 3D controller
    numa_node: int | None  # None where the kernel says -1
    iommu_group: int | None
    driver: str | None
    root: str  # the root complex, as sysfs names it: "pci0000:16"
    upstream: tuple[PciAddress, ...]  # bridges from the root port down to the device's own port
    link: Link | None
    bar_bytes: tuple[int, ...]  # sizes of its memory BARs, in bytes
    sriov_vfs: int  # virtual functions it can make; 0 = no SR-IOV

    @property
    def id(self) -> str:
        """The id pair as lspci prints it: "10de:1db8"."""
        return f"{self.vendor:04x}:{self.device:04x}"

    @property
    def parent(self) -> PciAddress | None:
        """The bridge directly above, or None on the root bus."""
        return self.upstream[-1] if self.upstream else None
