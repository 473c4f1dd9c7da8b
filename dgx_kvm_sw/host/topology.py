"""sysfs and procfs below any root -> Topology: what is in this machine, and where."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.model.pci import CpuSet, Link, PciAddress, PciDevice
from dgx_kvm_sw.model.topology import (
    Gpu,
    HugepagePool,
    Nic,
    NumaNode,
    NvmeDrive,
    NvSwitch,
    Topology,
    VirtualFunction,
)

NVIDIA = 0x10DE
MELLANOX = 0x15B3

# PCI class and subclass. An NVSwitch says "bridge, other", so not everything in 0x06xx is a bridge.
GPU_CLASSES = (0x0302, 0x0300)
NVSWITCH_CLASS = 0x0680
NIC_CLASSES = (0x0200, 0x0207)
NVME_CLASS = 0x0108
BRIDGE_BASE_CLASS = 0x06

IFF_UP = 1  # include/uapi/linux/if.h
IORESOURCE_MEM = 0x200  # include/linux/ioport.h
BARS = 6  # the first lines of `resource`; the ROM and bridge windows follow

_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_MEM_TOTAL = re.compile(r"MemTotal:\s+(\d+) kB")
_MODEL_NAME = re.compile(r"^model name\s*:\s*(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class _Function:
    """A PCI function of any kind: enough to decide whether to read on."""

    address: PciAddress
    path: str
    class_code: int
    iommu_group: int | None


def discover(root: Root, physical_ids: Mapping[PciAddress, int] = {}) -> Topology:
    """Read the machine below `root`; `physical_ids` are the fabric's numbers of its GPUs."""
    functions = _functions(root)
    gpus = [pci for pci, _ in _devices(functions, GPU_CLASSES) if pci.vendor == NVIDIA]
    switches = [pci for pci, _ in _devices(functions, (NVSWITCH_CLASS,)) if pci.vendor == NVIDIA]
    nics = [
        (pci, path)
        for pci, path in _devices(functions, NIC_CLASSES)
        if not _leads_to_fabric(pci, path)
    ]
    return Topology(
        product_name=root.read("/sys/class/dmi/id/product_name", ""),
        cpu_model=_cpu_model(root),
        numa_nodes=_numa_nodes(root),
        # Which board carries what is the platform table's to say: platforms.match sets it.
        gpus=tuple(
            Gpu(index, 1, physical_ids.get(pci.address), pci) for index, pci in enumerate(gpus)
        ),
        nvswitches=tuple(NvSwitch(index, 1, pci) for index, pci in enumerate(switches)),
        nics=tuple(Nic(pci, _interfaces(path), is_up(path)) for pci, path in nics),
        drives=tuple(
            NvmeDrive(pci, _namespaces(path)) for pci, path in _devices(functions, (NVME_CLASS,))
        ),
        iommu_groups=_iommu_groups(functions),
        vfs=tuple(vf for pci, path in nics if pci.sriov_vfs for vf in _vfs(pci, path, functions)),
    )


# PCI ------------------------------------------------------------------------------------------


def _functions(root: Root) -> list[_Function]:
    folder = root.path("/sys/bus/pci/devices")
    found = []
    for name in root.names("/sys/bus/pci/devices"):
        path = f"{folder}/{name}"
        group = _link_name(f"{path}/iommu_group")
        class_code = _number(f"{path}/class") >> 8  # without the programming interface
        found.append(
            _Function(PciAddress.parse(name), path, class_code, int(group) if group else None)
        )
    return sorted(found, key=lambda function: function.address)


def _devices(
    functions: Iterable[_Function], classes: tuple[int, ...]
) -> Iterator[tuple[PciDevice, str]]:
    """Yield the physical functions of these classes, each with its folder."""
    for function in functions:
        # A virtual function belongs to whoever holds its physical function.
        if function.class_code in classes and not os.path.lexists(f"{function.path}/physfn"):
            yield _device(function), function.path


def _device(function: _Function) -> PciDevice:
    path = function.path
    node = int(_text(f"{path}/numa_node") or -1)
    root_complex, upstream = _ancestry(path)
    return PciDevice(
        address=function.address,
        vendor=_number(f"{path}/vendor"),
        device=_number(f"{path}/device"),
        class_code=function.class_code,
        numa_node=None if node < 0 else node,
        iommu_group=function.iommu_group,
        driver=_link_name(f"{path}/driver"),
        root=root_complex,
        upstream=upstream,
        link=_link(path),
        bar_bytes=_bar_bytes(_text(f"{path}/resource")),
        sriov_vfs=int(_text(f"{path}/sriov_totalvfs") or 0),
    )


def _ancestry(path: str) -> tuple[str, tuple[PciAddress, ...]]:
    """Return the root complex and the bridges below it that lead to the device at `path`."""
    try:
        *parents, _ = os.readlink(path).split("/")
    except OSError:  # not a link: a tree that was not laid out by a kernel
        return "", ()
    bridges = tuple(PciAddress.parse(part) for part in parents if _ADDRESS.fullmatch(part))
    return next((part for part in parents if part.startswith("pci")), ""), bridges


def _link(path: str) -> Link | None:
    """Return the PCIe link; None where the kernel knows none ("Unknown" speed, no such file)."""
    speeds = (_text(f"{path}/current_link_speed"), _text(f"{path}/max_link_speed"))
    widths = (_text(f"{path}/current_link_width"), _text(f"{path}/max_link_width"))
    try:
        speed, max_speed = (float(text.split()[0]) for text in speeds)
        width, max_width = (int(text) for text in widths)
    except (ValueError, IndexError):
        return None
    return Link(speed, width, max_speed, max_width)


def _bar_bytes(resource: str) -> tuple[int, ...]:
    """Return the sizes of memory BARs from lines of "start end flags" (hexadecimal)."""
    sizes = []
    for line in resource.splitlines()[:BARS]:
        start, end, flags = (int(word, 16) for word in line.split())
        if flags & IORESOURCE_MEM:
            sizes.append(end - start + 1)
    return tuple(sizes)


def _leads_to_fabric(pci: PciDevice, path: str) -> bool:
    """Whether this ConnectX-7 function is the way to NVSwitches that are not PCI devices (B200).

    Whoever holds it commands the fabric, so it must never pass for a free NIC. Its vital
    product data say SW_MNG (Fabric Manager User Guide). They are slow to read, and are read
    only where a card has the four functions that such a bridge has.
    """
    fourth = re.sub(r"\.[0-7]$", ".3", path)
    virtual = os.path.lexists(f"{fourth}/physfn")  # a card with two ports numbers its VFs from .2
    if pci.vendor != MELLANOX or virtual or not os.path.lexists(fourth):
        return False
    try:
        with open(f"{path}/vpd", "rb", buffering=0) as vpd:
            return b"SW_MNG" in vpd.read(4096)
    except OSError:
        return True  # not readable, so not known to be harmless


def _vfs(nic: PciDevice, path: str, functions: Iterable[_Function]) -> Iterator[VirtualFunction]:
    """Yield the virtual functions that a NIC has now."""
    links = {int(name[6:]): name for name in _names(path) if re.fullmatch(r"virtfn\d+", name)}
    by_name = {str(function.address): function for function in functions if links}
    for index, link in sorted(links.items()):
        # One that is made at this moment has a link before it is on the bus.
        if function := by_name.get(_link_name(f"{path}/{link}") or ""):
            # Its registers of the link are empty: it has that of its NIC.
            yield VirtualFunction(replace(_device(function), link=None), nic.address, index)


def is_up(path: str) -> bool:
    """Whether a network interface of the device in this folder is up."""
    names = _names(f"{path}/net")
    return any(_number(f"{path}/net/{name}/flags") & IFF_UP for name in names)


def _interfaces(path: str) -> tuple[str, ...]:
    """Return a NIC's network interfaces, or its RDMA device where it has none."""
    return _names(f"{path}/net") or _names(f"{path}/infiniband")


def _namespaces(path: str) -> tuple[str, ...]:
    """Return the block devices of an NVMe controller.

    With native multipath the controller holds the path device nvme0c0n1; the disk is nvme0n1.
    """
    names = [
        re.sub(r"c\d+", "", name)
        for controller in _names(f"{path}/nvme")
        for name in _names(f"{path}/nvme/{controller}")
        if re.fullmatch(r"nvme\d+(c\d+)?n\d+", name)
    ]
    return tuple(names)


def _iommu_groups(
    functions: Iterable[_Function],
) -> tuple[tuple[int, tuple[PciAddress, ...]], ...]:
    groups: dict[int, list[PciAddress]] = {}
    for function in functions:
        bridge = function.class_code >> 8 == BRIDGE_BASE_CLASS
        if function.iommu_group is None or (bridge and function.class_code != NVSWITCH_CLASS):
            continue
        groups.setdefault(function.iommu_group, []).append(function.address)
    return tuple((group, tuple(members)) for group, members in sorted(groups.items()))


# NUMA -----------------------------------------------------------------------------------------


def _numa_nodes(root: Root) -> tuple[NumaNode, ...]:
    """Return the NUMA nodes; a kernel without NUMA has one, of all that there is."""
    ids = sorted(
        int(name[4:])
        for name in root.names("/sys/devices/system/node")
        if re.fullmatch(r"node\d+", name)
    )
    if not ids:
        cpus = root.read("/sys/devices/system/cpu/online", "")
        memory = root.read("/proc/meminfo", "")
        pools = _hugepages(str(root.path("/sys/kernel/mm/hugepages")))
        return (NumaNode(0, _cores(root, cpus), _memory_mib(memory), pools, ((0, 10),)),)
    nodes = []
    for node in ids:
        path = str(root.path(f"/sys/devices/system/node/node{node}"))
        distances = [int(word) for word in _text(f"{path}/distance").split()]
        nodes.append(
            NumaNode(
                id=node,
                cores=_cores(root, _text(f"{path}/cpulist")),
                memory_mib=_memory_mib(_text(f"{path}/meminfo")),
                hugepages=_hugepages(f"{path}/hugepages"),
                distances=tuple(zip(ids, distances, strict=False)),
            )
        )
    return tuple(nodes)


def _cores(root: Root, cpulist: str) -> tuple[tuple[int, ...], ...]:
    """Group the CPUs of a list, which holds online ones only, into cores."""
    folder = root.path("/sys/devices/system/cpu")
    cpus = CpuSet.parse(cpulist)
    seen: set[int] = set()
    cores = []
    for cpu in cpus:
        if cpu in seen:
            continue
        siblings = CpuSet.parse(_text(f"{folder}/cpu{cpu}/topology/thread_siblings_list"))
        core = tuple(sorted((siblings.cpus & cpus.cpus) | {cpu}))
        seen.update(core)
        cores.append(core)
    return tuple(cores)


def _memory_mib(meminfo: str) -> int:
    total = _MEM_TOTAL.search(meminfo)
    return int(total.group(1)) // 1024 if total else 0


def _hugepages(folder: str) -> tuple[HugepagePool, ...]:
    pools = []
    for name in _names(folder):
        if size := re.fullmatch(r"hugepages-(\d+)kB", name):
            total, free = (
                int(_text(f"{folder}/{name}/{count}_hugepages") or 0) for count in ("nr", "free")
            )
            pools.append(HugepagePool(int(size.group(1)), total, free))
    return tuple(sorted(pools, key=lambda pool: pool.size_kib))


def _cpu_model(root: Root) -> str:
    # One page holds the first CPU; the whole file costs the kernel milliseconds on 256 CPUs.
    model = _MODEL_NAME.search(_text(str(root.path("/proc/cpuinfo"))))
    return model.group(1).strip() if model else ""


# Files ----------------------------------------------------------------------------------------
# A machine is about a thousand small files and links. Bare system calls read one in a sixth of
# the time that Path.read_text takes (measured), which is why Root.read is not used for them.


def _text(path: str) -> str:
    """Return the first page of a file, stripped; "" for one that is not there or not readable."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return ""
    try:
        return os.read(descriptor, 4096).decode(errors="replace").strip()
    except OSError:  # sysfs opens anything, and may refuse the read
        return ""
    finally:
        os.close(descriptor)


def _number(path: str) -> int:
    return int(_text(path) or "0", 16)


def _names(folder: str) -> tuple[str, ...]:
    try:
        return tuple(sorted(os.listdir(folder)))
    except OSError:
        return ()


def _link_name(path: str) -> str | None:
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return None
