"""One immutable snapshot of the machine: NUMA nodes, GPUs, NVSwitches, NICs, NVMe drives."""

from __future__ import annotations

from dataclasses import dataclass

from dgx_kvm_sw.model.pci import CpuSet, PciAddress, PciDevice


@dataclass(frozen=True)
class Gpu:
    """A GPU. `index` is its place in the whole machine's PCI order; `physical_id` is the fabric's
    number for it (board strap or Module ID) and None until something that knows it has said so.
    They differ: facts on the DGX-2 (NCCL topology against Fabric Manager's table) show it.
    """

    index: int
    board: int  # baseboard, from 1
    physical_id: int | None
    pci: PciDevice


@dataclass(frozen=True)
class NvSwitch:
    """An NVSwitch that shows on PCI (class 0x0680)."""

    index: int  # place in PCI order
    board: int
    pci: PciDevice


@dataclass(frozen=True)
class Nic:
    """A network or InfiniBand function."""

    pci: PciDevice
    interfaces: tuple[str, ...]  # network interfaces it has on the host now
    up: bool = False  # one of them is

    @property
    def name(self) -> str:
        """What a person calls it: its interface, or its address where it has none."""
        return self.interfaces[0] if self.interfaces else str(self.pci.address)


@dataclass(frozen=True)
class VirtualFunction:
    """An SR-IOV virtual function (VF) that a NIC has now."""

    pci: PciDevice
    nic: PciAddress  # its physical function
    index: int  # place among the VFs of the NIC


@dataclass(frozen=True)
class NvmeDrive:
    """An NVMe controller."""

    pci: PciDevice
    block_devices: tuple[str, ...]  # namespaces it has on the host now


@dataclass(frozen=True)
class HugepagePool:
    """Huge pages of one size on one NUMA node."""

    size_kib: int
    total: int
    free: int


@dataclass(frozen=True)
class NumaNode:
    """A NUMA node: whole cores (each a tuple of sibling threads), memory, huge pages."""

    id: int
    cores: tuple[tuple[int, ...], ...]  # in order of their first thread
    memory_mib: int  # all of it, huge pages included
    hugepages: tuple[HugepagePool, ...]
    distances: tuple[tuple[int, int], ...]  # (other node, SLIT distance); 10 = itself

    @property
    def cpus(self) -> CpuSet:
        return CpuSet.of(cpu for core in self.cores for cpu in core)

    def distance(self, other: int) -> int:
        return dict(self.distances).get(other, 255)


@dataclass(frozen=True)
class Topology:
    """The machine as found below one root; the JSON of this is a bug report's best part."""

    product_name: str  # DMI, "" where there is none
    cpu_model: str
    numa_nodes: tuple[NumaNode, ...]
    gpus: tuple[Gpu, ...]
    nvswitches: tuple[NvSwitch, ...]
    nics: tuple[Nic, ...]
    drives: tuple[NvmeDrive, ...]
    iommu_groups: tuple[tuple[int, tuple[PciAddress, ...]], ...]  # bridges left out
    vfs: tuple[VirtualFunction, ...] = ()  # by NIC and index

    def node(self, node_id: int | None) -> NumaNode:
        """The NUMA node with this id; a device without one belongs to the first node."""
        return next((n for n in self.numa_nodes if n.id == node_id), self.numa_nodes[0])

    def gpu(self, index: int) -> Gpu:
        """The GPU with this index; a GPU that is gone leaves its index unused."""
        return next(gpu for gpu in self.gpus if gpu.index == index)

    def nic(self, address: PciAddress) -> Nic:
        """The NIC with this address."""
        return next(nic for nic in self.nics if nic.pci.address == address)

    @property
    def threads_per_core(self) -> int:
        return max((len(core) for node in self.numa_nodes for core in node.cores), default=1)

    def devices(self) -> tuple[PciDevice, ...]:
        """Every device a VM could get, in PCI order."""
        owned = [gpu.pci for gpu in self.gpus] + [switch.pci for switch in self.nvswitches]
        owned += [nic.pci for nic in self.nics] + [drive.pci for drive in self.drives]
        owned += [vf.pci for vf in self.vfs]
        return tuple(sorted(owned, key=lambda pci: pci.address))

    def device_name(self, address: PciAddress) -> str:
        """What a person calls this device: "GPU 3 (0000:3b:00.0)"."""
        for gpu in self.gpus:
            if gpu.pci.address == address:
                return f"GPU {gpu.index} ({address})"
        for switch in self.nvswitches:
            if switch.pci.address == address:
                return f"NVSwitch {switch.index} ({address})"
        if any(nic.pci.address == address for nic in self.nics):
            return f"NIC {address}"
        if any(drive.pci.address == address for drive in self.drives):
            return f"NVMe drive {address}"
        for vf in self.vfs:
            if vf.pci.address == address:
                return f"VF {vf.index} of NIC {self.nic(vf.nic).name} ({address})"
        return f"PCI device {address}"
