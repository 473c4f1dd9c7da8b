"""Make a partition's devices ready for a VM, check them once it runs, take them back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.host.health import host_use, trouble_on_bus
from dgx_kvm_sw.host.topology import is_up
from dgx_kvm_sw.model.errors import HostError
from dgx_kvm_sw.model.pci import PciAddress
from dgx_kvm_sw.model.platform import Partition, Platform


class Fabric(Protocol):
    """What surrounds the life of a VM with devices; each method raises HostError to stop it."""

    def prepare(self, partition: Partition | None, devices: tuple[PciAddress, ...]) -> None:
        """Directly before the domain starts."""

    def verify(self, partition: Partition | None, devices: tuple[PciAddress, ...]) -> None:
        """Directly after the domain has started."""

    def release(self, devices: tuple[PciAddress, ...]) -> None:
        """After the domain has stopped."""


def fabric_for(platform: Platform, root: Root) -> Fabric:
    """Return the fabric of this platform."""
    return VfioFabric(root)


@dataclass(frozen=True)
class VfioFabric:
    """What every fabric model needs: all devices alive and out of the host's hands."""

    root: Root

    def prepare(self, partition: Partition | None, devices: tuple[PciAddress, ...]) -> None:
        self._require(devices)

    def verify(self, partition: Partition | None, devices: tuple[PciAddress, ...]) -> None:
        self._require(devices)

    def release(self, devices: tuple[PciAddress, ...]) -> None:
        """Nothing was changed, so nothing is undone."""

    def _require(self, devices: Iterable[PciAddress]) -> None:
        problems = [
            f"{address} {problem}" for address in devices if (problem := self._problem(address))
        ]
        if problems:
            raise HostError(
                f"PCI device {'; '.join(problems)}",
                "`dgx-kvm status` shows what is wrong with it",
            )

    def _problem(self, address: PciAddress) -> str:
        if trouble := trouble_on_bus(address, self.root):
            return trouble.reason
        # Read now and not from the topology: somebody may have rebound it since.
        nic = self.root.link_name(f"/sys/bus/pci/devices/{address}/physfn")
        if nic:  # a virtual function: libvirt binds it, and sets it up through its NIC
            if not is_up(str(self.root.path(f"/sys/bus/pci/devices/{nic}"))):
                return f"is a virtual function of NIC {nic}, which is down"
            return host_use(address, self.root)
        driver = self.root.link_name(f"/sys/bus/pci/devices/{address}/driver")
        if driver != "vfio-pci":
            return f"is bound to {driver or 'no driver'}, not to vfio-pci"
        return ""
