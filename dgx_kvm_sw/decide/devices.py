"""Which NVSwitches, NICs and drives go with which GPUs: near ones, in whole IOMMU groups."""

from __future__ import annotations

from collections.abc import Iterable

from dgx_kvm_sw.decide.ledger import Ledger
from dgx_kvm_sw.model.health import HealthReport
from dgx_kvm_sw.model.pci import PciAddress, PciDevice
from dgx_kvm_sw.model.topology import Topology

# Steps up from what a PCIe hop costs, in the order NCCL ranks paths: PIX, PXB, NODE, SYS.
_SAME_ROOT = 100
_SAME_NODE = 200
_OTHER_NODE = 300


def distance(topology: Topology, one: PciDevice, other: PciDevice) -> int:
    """Return how far apart two devices are: PCIe hops below a shared bridge, else far more."""
    shared = 0
    for left, right in zip(one.upstream, other.upstream, strict=False):
        if left != right:
            break
        shared += 1
    if shared:
        return len(one.upstream) + len(other.upstream) - 2 * shared
    if one.root == other.root:
        return _SAME_ROOT
    node, far = topology.node(one.numa_node), topology.node(other.numa_node)
    return _SAME_NODE if node.id == far.id else _OTHER_NODE + node.distance(far.id)


def nearest(
    topology: Topology, gpus: list[PciDevice], devices: Iterable[PciDevice], nodes: list[int]
) -> list[PciDevice]:
    """Sort devices by their distance to the nearest of the GPUs, or to the nodes without GPUs."""

    def far(device: PciDevice) -> int:
        if gpus:
            return min(distance(topology, gpu, device) for gpu in gpus)
        node = topology.node(device.numa_node)
        return min((node.distance(other) for other in nodes), default=0)

    return sorted(devices, key=lambda device: (far(device), device.address))


class Assignable:
    """Says for any device whether a VM may have it, and if not, why."""

    def __init__(self, topology: Topology, health: HealthReport, ledger: Ledger) -> None:
        self._topology = topology
        self._health = health
        self._ledger = ledger
        self._mates: dict[PciAddress, tuple[PciAddress, ...]] = {
            address: members
            for _, members in topology.iommu_groups
            if len(members) > 1
            for address in members
        }
        self._known = {device.address for device in topology.devices()}
        self._vfs = {vf.pci.address for vf in topology.vfs}

    def refusal(self, address: PciAddress, vm: str) -> str | None:
        """Return the reason why `vm` may not have this device, or None."""
        name = self._topology.device_name(address)
        if self._ledger.devices.get(address) == vm:
            return None  # it holds the device already; health is the health report's to tell
        if not self._health.usable(address):
            return f"{name} {self._health.of(address).reason}"
        if holder := self._ledger.holder(address, vm):
            return f"{name} is held by {holder}"
        return self._group_refusal(address, name, vm)

    def _group_refusal(self, address: PciAddress, name: str, vm: str) -> str | None:
        for mate in self._mates.get(address, ()):
            if mate == address:
                continue
            other = self._topology.device_name(mate)
            if holder := self._ledger.holder(mate, vm):
                return f"{name} shares an IOMMU group with {other}, which {holder} holds"
            if self._vfs & {address, mate}:  # libvirt moves a VF by itself, not its whole group
                return f"{name} shares an IOMMU group with {other}, so no VM can have either"
            if mate not in self._known or not self._health.usable(mate):
                return f"{name} shares an IOMMU group with {other}, which the host uses"
        return None

    def free(self, devices: Iterable[PciDevice], vm: str) -> list[PciDevice]:
        return [device for device in devices if self.refusal(device.address, vm) is None]
