"""The guest's PCIe tree: the host's tree, cut down to what the VM gets.

NCCL and friends choose paths by what they see on PCIe. So every root complex that carries
devices of the VM becomes an expander bus on the guest's NUMA cell, every branching switch
becomes a switch, and every chain of bridges without a branch becomes one port.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dgx_kvm_sw.model.domain import Hostdev, PciController
from dgx_kvm_sw.model.pci import PciDevice

_LAST_BUS = 255


def guest_tree(
    devices: list[PciDevice], cell_of: Callable[[PciDevice], int]
) -> tuple[tuple[PciController, ...], tuple[Hostdev, ...]]:
    """Return the controllers below expander buses, and where each device sits.

    Controllers are numbered from 1 (0 is the guest's own root). Bus numbers are handed out
    from the top, so that the guest's root bus keeps the low ones for its paravirtual devices.
    """
    tree = _Tree()
    by_root: dict[tuple[int, str], list[PciDevice]] = {}
    for device in sorted(devices, key=lambda device: device.address):
        by_root.setdefault((cell_of(device), device.root), []).append(device)
    expanders = []
    for (cell, _), below in sorted(by_root.items()):
        expander = tree.add("pcie-expander-bus", cell=cell)
        expanders.append(expander)
        for slot, group in enumerate(_branches(below, 0)):
            port = tree.add("pcie-root-port", bus=expander, slot=slot)
            tree.hang(group, port)
    return tree.numbered(expanders), tuple(tree.hostdevs)


def mmio64_mib(devices: list[PciDevice]) -> int:
    """Return the size of the guest's 64-bit PCI window, a power of two, in MiB; 0 = no need.

    Twice the sum of the BARs: a port's window is aligned to its largest BAR, so a GPU's small
    BARs may cost as much address space as its large one. The firmware's own default is too
    small for four GPUs already (canonical/lxd#14381).
    """
    total = 2 * sum(size for device in devices for size in device.bar_bytes) >> 20
    if not devices:
        return 0
    window = 64 * 1024
    while window < total:
        window *= 2
    return window


def _branches(devices: list[PciDevice], depth: int) -> list[list[PciDevice]]:
    """Group devices by the bridge at `depth` of their path; one without it is a group alone."""
    groups: dict[object, list[PciDevice]] = {}
    for device in devices:
        bridge = device.upstream[depth] if depth < len(device.upstream) else device.address
        groups.setdefault(bridge, []).append(device)
    return list(groups.values())


@dataclass
class _Tree:
    controllers: list[PciController] = field(default_factory=list)
    hostdevs: list[Hostdev] = field(default_factory=list)

    def add(
        self, model: str, bus: int | None = None, slot: int | None = None, cell: int | None = None
    ) -> int:
        index = len(self.controllers) + 1
        self.controllers.append(PciController(index, model, bus, slot, None, cell))
        return index

    def hang(self, devices: list[PciDevice], port: int, depth: int = 1) -> None:
        """Put one device on the port, or several behind a switch where the host branches."""
        if len(devices) == 1:
            self.hostdevs.append(Hostdev(devices[0].address, port))
            return
        branches = _branches(devices, depth)
        while len(branches) == 1:
            depth += 1
            branches = _branches(devices, depth)
        switch = self.add("pcie-switch-upstream-port", bus=port, slot=0)
        for slot, branch in enumerate(branches):
            self.hang(branch, self.add("pcie-switch-downstream-port", switch, slot), depth + 1)

    def numbered(self, expanders: list[int]) -> tuple[PciController, ...]:
        """Give each expander bus room for itself and every bus below it."""
        ends = [*expanders, len(self.controllers) + 1][1:]
        bus_nr = _LAST_BUS + 1 - len(self.controllers)
        numbers = {}
        for first, end in zip(expanders, ends, strict=True):
            numbers[first] = bus_nr
            bus_nr += end - first
        return tuple(
            PciController(c.index, c.model, c.bus, c.slot, numbers.get(c.index), c.cell)
            for c in self.controllers
        )
