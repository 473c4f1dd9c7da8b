"""Which devices may be used, and why not."""

from __future__ import annotations

from dataclasses import dataclass

from dgx_kvm_sw.model.base import StrEnum
from dgx_kvm_sw.model.pci import PciAddress


class DeviceState(StrEnum):
    OK = "ok"
    DEGRADED = "degraded"  # works below its best (a narrow PCIe link); still used
    UNBOUND = "unbound"  # not on vfio-pci: the host uses it
    FAILED = "failed"
    ABSENT = "absent"


@dataclass(frozen=True)
class DeviceHealth:
    """The state of one device; `reason` is a sentence part: "is bound to nvidia, ..."."""

    address: PciAddress
    state: DeviceState
    reason: str = ""
    since: str = ""  # ISO 8601, where known


@dataclass(frozen=True)
class HealthReport:
    """Devices that are not plainly ok; a device not listed is ok."""

    devices: tuple[DeviceHealth, ...]

    def of(self, address: PciAddress) -> DeviceHealth:
        found = (device for device in self.devices if device.address == address)
        return next(found, DeviceHealth(address, DeviceState.OK))

    def usable(self, address: PciAddress) -> bool:
        return self.of(address).state in (DeviceState.OK, DeviceState.DEGRADED)
