"""The host's mode: how it was booted, what it boots next, who holds its devices, what is wrong."""

from __future__ import annotations

from dataclasses import dataclass

from dgx_kvm_sw.model.base import StrEnum
from dgx_kvm_sw.model.pci import PciAddress

WORD = "dgx_kvm.mode=kvm"  # on the kernel command line: this boot is in KVM mode
NVSWITCH_STAYS = "dgx_kvm.nvswitch=host"  # likewise: the host runs the fabric itself
VFIO = "vfio-pci"


class Mode(StrEnum):
    KVM = "kvm"
    BARE_METAL = "bare-metal"

    @property
    def words(self) -> str:
        return "KVM mode" if self is Mode.KVM else "bare metal"


@dataclass(frozen=True)
class ModeStatus:
    """The mode of this boot and of the next one."""

    booted: Mode
    configured: Mode
    reboot_needed: bool
    unfinished: str = ""  # what is left of a switch that was cut off, and who finishes it


@dataclass(frozen=True)
class Process:
    pid: int
    name: str
    vm: str = ""  # the libvirt domain whose QEMU this is


@dataclass(frozen=True)
class Held:
    """A GPU or NVSwitch, its driver, and the processes that have it open."""

    kind: str  # "GPU" or "NVSwitch"
    index: int
    address: PciAddress
    driver: str | None
    processes: tuple[Process, ...]


@dataclass(frozen=True)
class Function:
    """One PCI function by the texts of sysfs, which the list of VMs' devices repeats."""

    address: str
    vendor: str
    device: str
    class_code: str  # 24 bits: "0x030200"
    driver: str | None = None
    iommu_group: str | None = None

    @property
    def line(self) -> str:
        """What the list of devices says of it."""
        return f"{self.address} {self.ids}"

    @property
    def ids(self) -> str:
        return f"{self.vendor} {self.device} {self.class_code}"

    @property
    def kind(self) -> str:
        """What an operator calls such a device."""
        if self.is_gpu:
            return "GPU"
        if self.is_nvswitch:
            return "NVSwitch"
        kinds = {"0x0108": "NVMe drive", "0x0200": "NIC", "0x0207": "InfiniBand NIC"}
        return kinds.get(self.class_code[:6], "PCI device")

    @property
    def is_gpu(self) -> bool:
        return self.vendor == "0x10de" and self.class_code.startswith(("0x0302", "0x0300"))

    @property
    def is_nvswitch(self) -> bool:
        return self.vendor == "0x10de" and self.class_code.startswith("0x0680")

    @property
    def is_assignable(self) -> bool:
        """Whether it is of a kind that the list of devices may hold."""
        return self.class_code.startswith(("0x0108", "0x0200", "0x0207"))

    @property
    def is_bridge(self) -> bool:
        """VFIO accepts a PCI bridge beside a VM's device; other "bridges" are devices to it."""
        return self.class_code.startswith("0x0604")


@dataclass(frozen=True)
class Stays:
    """A NIC or drive that no VM may get."""

    address: str
    reason: str

    @property
    def for_its_group(self) -> bool:
        return "IOMMU group" in self.reason


@dataclass(frozen=True)
class Assignable:
    """The NICs and NVMe drives of this host: which VMs may get, and which stay."""

    given: tuple[Function, ...]
    kept: tuple[Stays, ...]
    refusal: tuple[str, str] | None = None  # why no list can be made, and what to do; none given


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One condition of KVM mode: a sentence, and the next step where it is not met."""

    name: str
    verdict: Verdict
    message: str
    hint: str = ""


@dataclass(frozen=True)
class Trouble:
    """Something that is not as KVM mode needs it after the boot."""

    message: str
    hint: str

    def __str__(self) -> str:
        return f"{self.message}: {self.hint}"
