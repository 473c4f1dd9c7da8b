"""What the admin asked for, complete: defaults and size templates are already merged in."""

from __future__ import annotations

from dataclasses import dataclass, field

from dgx_kvm_sw.model.base import StrEnum

SIZES = (0, 1, 2, 4, 8, 16)  # GPUs of a VM


@dataclass(frozen=True)
class Share:
    """A fraction of this VM's part of the machine; 1.0 prints as "100%"."""

    fraction: float

    def __str__(self) -> str:
        return f"{self.fraction * 100:g}%"


Amount = Share | int


class Hugepages(StrEnum):
    AUTO = "auto"  # the size that most memory of its NUMA nodes comes in, if they agree
    GIB1 = "1GiB"
    MIB2 = "2MiB"
    NONE = "none"


class Firmware(StrEnum):
    UEFI = "uefi"
    BIOS = "bios"


class PowerState(StrEnum):
    RUNNING = "running"
    STOPPED = "stopped"


class NetworkKind(StrEnum):
    BRIDGE = "bridge"  # a bridge of the host
    NETWORK = "network"  # a libvirt network
    MACVTAP = "macvtap"  # directly on a network interface of the host
    NAT = "nat"  # a libvirt network of ours for one tenant, with addresses and a way out
    ISOLATED = "isolated"  # a libvirt network of ours for one tenant, and nothing else on it
    VF = "vf"  # an SR-IOV virtual function of a NIC that stays with the host


AUTO = "auto"  # as the source of a VF: of the NIC that is nearest to the VM's GPUs


class DiskFormat(StrEnum):
    QCOW2 = "qcow2"
    RAW = "raw"


@dataclass(frozen=True)
class SourceLine:
    """Where something was declared, for messages."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Disk:
    """A data disk: a file on the storage pool, or a logical volume."""

    name: str
    size_mib: int
    format: DiskFormat = DiskFormat.QCOW2
    volume_group: str = ""  # of LVM; "" = on the pool
    mount: str = ""  # where the guest mounts it; "" = it is left as it is


@dataclass(frozen=True)
class OsDisk:
    """The disk a VM boots from."""

    size_mib: int
    copy: bool = False  # of the whole image, and independent of it; else an overlay on it
    format: DiskFormat = DiskFormat.QCOW2


@dataclass(frozen=True)
class Network:
    """A network interface: virtio's, or a virtual function of a NIC."""

    kind: NetworkKind
    source: str  # the bridge, libvirt network, host interface or NIC; of NAT, perhaps a name
    vlan: int = 0  # its tag; 0 = none


@dataclass(frozen=True)
class Addressing:
    """How the guest configures one of its networks; without addresses by DHCP."""

    addresses: tuple[str, ...] = ()  # with the length of their prefix: "10.1.0.5/24"
    gateways: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()


@dataclass(frozen=True)
class FirstBoot:
    """What cloud-init is to do in the guest at its first boot, beside names and mounts."""

    user: str
    ssh_keys: tuple[str, ...]  # public keys, as lines of authorized_keys
    addressing: tuple[Addressing, ...]  # one for each network of the VM
    user_data: str = field(repr=False, default="")  # text of the operator's own; may be secret
    complete: bool = True  # False: who runs us may not read all the files that it names


@dataclass(frozen=True)
class Resources:
    """How much a VM gets. Shares are resolved against the machine by placement.

    For GPU VMs a share of 100% is gpus / (GPUs of the machine) of what is left after the host's
    reserve and the pool of CPU-only VMs; it is rounded down to whole cores, GiB and devices.
    """

    cpus: Amount  # CPU threads; always whole cores in the end
    memory: Amount  # MiB
    nics: Amount  # passed-through NICs
    nvswitches: bool  # take the partition's NVSwitches (passthrough fabric only)
    drives: Amount  # passed-through NVMe drives
    hugepages: Hugepages
    max_queues: int  # cap of virtio queues; queues = min(vCPUs, cap)
    iothreads: int
    os_disk: OsDisk


@dataclass(frozen=True)
class VmSpec:
    name: str
    tenant: str  # "" = none
    gpus: int
    pin: tuple[str, ...]  # GPU indexes or PCI addresses as written; () = choose for me
    state: PowerState
    image: str  # "" = an empty OS disk
    firmware: Firmware
    disks: tuple[Disk, ...]
    networks: tuple[Network, ...]
    template: str  # file name below the template folders
    resources: Resources
    first_boot: FirstBoot
    source: SourceLine


@dataclass(frozen=True)
class Tenant:
    name: str
    max_gpus: int | None
    max_vms: int | None
    source: SourceLine


@dataclass(frozen=True)
class HostShare:
    """Part of every NUMA node: CPU threads and memory kept for one purpose.

    A share is of each node, rounded up to whole cores and GiB; a number is for the whole
    machine and is spread evenly over the nodes, rounded up.
    """

    cpus: Amount
    memory: Amount  # MiB


@dataclass(frozen=True)
class HostSpec:
    """vms.yaml and vms.d, merged and complete."""

    vms: tuple[VmSpec, ...]  # in file order
    tenants: tuple[Tenant, ...]
    reserve: HostShare  # kept for the host; emulator and IO threads run on its CPUs
    cpu_pool: HostShare  # what VMs without GPUs may use besides leftovers
    files: tuple[str, ...]  # read, in order
    digest: str  # of all that was read: the files and the size templates


NO_SPEC = HostSpec((), (), HostShare(0, 0), HostShare(0, 0), (), "")
