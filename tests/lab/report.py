"""What a VM of the lab's image has said of its hardware; `guest-init` says it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

GPU, NVSWITCH, NIC, DRIVE = "0302", "0680", "0200", "0108"
DEVICE = re.compile(r"pci (\S+) (\S{4}:\S{4}) class (\S{4})\S* node \S+ below (\S+)")


@dataclass(frozen=True)
class Seen:
    """A function as the VM sees it; `below` leads from its root bus to the port it sits on."""

    address: str
    id: str
    kind: str
    below: str

    @property
    def switch(self) -> str:
        """The way to the PCIe switch that its port belongs to."""
        return self.below.rpartition("/")[0]


def devices(said: str) -> tuple[Seen, ...]:
    return tuple(Seen(*found) for found in DEVICE.findall(said))


def far_nics(seen: Collection[Seen]) -> list[str]:
    """The NICs that sit on no GPU's PCIe switch; theirs is not the root bus."""
    switches = {one.switch for one in seen if one.kind == GPU and "/" in one.switch}
    return [one.address for one in seen if one.kind == NIC and one.switch not in switches]


def hardware(said: str) -> list[str]:
    """Its CPUs and PCI devices, as it says them at each boot."""
    return re.findall(r"lab-guest: ((?:cpus|pci) .*\S)", said)


def memory_kib(said: str) -> int:
    """The memory of all its NUMA nodes, less what its kernel keeps for itself."""
    return sum(map(int, re.findall(r"lab-guest: node \d+: .*, (\d+) kB,", said)))
