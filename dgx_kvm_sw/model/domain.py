"""Domains as facts: what we want libvirt to hold, and what it holds, in comparable form."""

from __future__ import annotations

from dataclasses import dataclass

from dgx_kvm_sw.model.pci import CpuSet, PciAddress
from dgx_kvm_sw.model.spec import Firmware, Network, NetworkKind


@dataclass(frozen=True)
class Cell:
    """A NUMA cell of the guest. Its memory is bound strictly to one host node."""

    vcpus: CpuSet  # guest CPU numbers
    memory_mib: int
    host_node: int | None  # None: not bound (a domain that is not ours)
    distances: tuple[int, ...] = ()  # to every cell in order, as the host's SLIT; () if alone


@dataclass(frozen=True)
class PciController:
    """A PCI controller of the guest, in libvirt's words; `index` is also the bus it opens."""

    index: int
    model: str  # pcie-root, pcie-expander-bus, pcie-root-port, pcie-switch-{up,down}stream-port
    bus: int | None = None  # the controller it sits on
    slot: int | None = None
    bus_nr: int | None = None  # expander bus: first PCI bus number
    cell: int | None = None  # expander bus: guest NUMA cell


@dataclass(frozen=True)
class Hostdev:
    """A host PCI device in the guest: where it comes from, where it sits."""

    source: PciAddress
    bus: int  # index of the guest's PCI controller
    rom_bar: bool = False
    managed: bool = False


@dataclass(frozen=True)
class DomainDisk:
    target: str  # "vda"
    path: str
    block: bool  # a block device, not a file
    format: str  # "qcow2", "raw"
    io: str  # "io_uring", "native", "threads"; "" = QEMU's own choice
    discard: str  # "unmap", "ignore"; "" = QEMU's own choice
    serial: str  # the guest finds it as /dev/disk/by-id/virtio-SERIAL
    queues: int
    iothread: int | None
    backing: str = ""  # the file it lies over, which tenants share
    backing_format: str = ""
    cdrom: bool = False  # read-only, on SATA: the seed


@dataclass(frozen=True)
class Interface:
    mac: str
    network: Network
    queues: int
    vf: Hostdev | None = None  # the virtual function that it is


@dataclass(frozen=True)
class Ownership:
    """What we write into a domain's metadata; a domain without it is not ours."""

    tenant: str
    template: str  # name of the domain template
    template_digest: str  # of the template's text and everything it pulls in


@dataclass(frozen=True)
class DomainFacts:
    """The comparable part of a domain. The template gets exactly this."""

    name: str
    uuid: str
    owner: Ownership | None
    memory_mib: int
    threads_per_core: int
    cells: tuple[Cell, ...]
    vcpu_pins: tuple[CpuSet, ...]  # by guest CPU number; an empty set = not pinned
    emulator_pin: CpuSet
    iothread_pins: tuple[CpuSet, ...]
    hugepage_kib: int
    firmware: Firmware
    mmio64_mib: int  # 64-bit PCI window of the guest; 0 = the firmware's own choice
    controllers: tuple[PciController, ...]
    hostdevs: tuple[Hostdev, ...]
    disks: tuple[DomainDisk, ...]
    interfaces: tuple[Interface, ...]
    on_reboot: str
    extra_devices: tuple[str, ...] = ()  # devices we never render: "graphics vnc", "hostdev usb"

    @property
    def devices(self) -> tuple[PciAddress, ...]:
        """Host PCI devices that it has, virtual functions last."""
        vfs = (interface.vf for interface in self.interfaces)
        return tuple(each.source for each in (*self.hostdevs, *vfs) if each)

    @property
    def networks(self) -> set[str]:
        """Names of the libvirt networks that it is on."""
        networks = (interface.network for interface in self.interfaces)
        return {each.source for each in networks if each.kind is NetworkKind.NETWORK}

    @property
    def vcpus(self) -> int:
        return len(self.vcpu_pins)


@dataclass(frozen=True)
class DomainDef:
    """A domain to define: its facts and the XML made from them."""

    facts: DomainFacts
    xml: str


@dataclass(frozen=True)
class DomainStatus:
    """A domain as libvirt holds it."""

    facts: DomainFacts  # of the inactive definition: what the next start will use
    running: bool
    live: DomainFacts | None  # of the running domain; None when it is not running
    persistent: bool = True  # False: undefined while it runs, so gone when it stops

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def managed(self) -> bool:
        return self.facts.owner is not None

    @property
    def networks(self) -> set[str]:
        """Names of the libvirt networks that it is on, or will be at its next start."""
        return self.facts.networks | (self.live.networks if self.live else set())


@dataclass(frozen=True)
class Volume:
    """A disk: an image file on the storage pool, or a logical volume."""

    name: str  # "hr-train.os.qcow2" on the pool, "dgx-kvm.hr-train.data" of LVM
    path: str
    capacity_mib: int  # 0: it could not be looked at
    format: str
    backing: str = ""  # path of the image it overlays
    backing_format: str = ""
    source: str = ""  # path of the image it is to be a copy of; what is there does not say
    source_format: str = ""
    group: str = ""  # LVM volume group


@dataclass(frozen=True)
class VolumeGroup:
    """An LVM volume group."""

    name: str
    extent_mib: int
    free_mib: int
    foreign: tuple[str, ...]  # logical volumes that are not ours


@dataclass(frozen=True)
class Space:
    """The file system that the pool is on."""

    total_mib: int
    free_mib: int


@dataclass(frozen=True)
class HostNetwork:
    """A virtual network of libvirt on this host."""

    name: str
    bridge: str
    address: str = ""  # of the host on it, "192.168.150.1/24"; "" = it has none
    ours: bool = True
    active: bool = True


@dataclass(frozen=True)
class Unread:
    """Why the disks of one kind could not be looked at; those that VMs have are taken as there."""

    logical: bool  # those of LVM, not those on the pool
    reason: str
    remedy: str


@dataclass(frozen=True)
class CurrentState:
    """All that libvirt holds."""

    domains: tuple[DomainStatus, ...]  # by name
    volumes: tuple[Volume, ...]  # on our pool and of LVM, by name
    networks: tuple[HostNetwork, ...] = ()  # by name
    groups: tuple[VolumeGroup, ...] = ()  # those with disks of ours or to have some
    unread: tuple[Unread, ...] = ()

    def domain(self, name: str) -> DomainStatus | None:
        return next((domain for domain in self.domains if domain.name == name), None)
