"""The machine as a tree: NUMA nodes, root complexes, PCIe switches, devices."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from dgx_kvm_sw.cli.faults import fault_lines, faults
from dgx_kvm_sw.cli.output import View, counted
from dgx_kvm_sw.cli.picture import (
    BLANK,
    Line,
    Span,
    heading,
    line,
    paint,
    section,
    sentences,
    table,
    wrapped,
)
from dgx_kvm_sw.model.base import to_json
from dgx_kvm_sw.model.health import DeviceState, HealthReport
from dgx_kvm_sw.model.pci import CpuSet, PciAddress, PciDevice
from dgx_kvm_sw.model.platform import FabricModel, Partition, Platform
from dgx_kvm_sw.model.topology import Nic, NumaNode, Topology

_INFINIBAND = 0x0207
_FABRIC = {
    FabricModel.NONE: "without NVSwitches",
    FabricModel.PASSTHROUGH: "NVSwitches go to the VMs; Fabric Manager runs in the guests",
    FabricModel.SHARED: "NVSwitches stay with the host, where Fabric Manager runs",
}
_PAGES = {2048: "2 MiB", 1024 * 1024: "1 GiB"}
_BAD = Span(" !", "bad")
_HEAD = ("", "address", "id", "driver", "group", "link", "")


_Marks = dict[PciAddress, Span]  # of devices that have a fault


@dataclass(frozen=True)
class _Leaf:
    """A device as the tree names it."""

    pci: PciDevice
    name: str
    remarks: tuple[str, ...]

    @property
    def path(self) -> tuple[PciAddress, ...]:
        return (*self.pci.upstream, self.pci.address)


def topology(topology: Topology, platform: Platform, health: HealthReport, view: View) -> str:
    """Draw the machine, then say which sets of GPUs are legal on it."""
    marks = {
        device.address: Span(" ~", "warn") if device.state is DeviceState.DEGRADED else _BAD
        for device in faults(topology, platform, health)
    }
    lines = [
        *_header(topology, platform, view.width),
        *_nodes(topology, marks, view.width),
        *section("Legal sets of GPUs", _legal(platform, view.width)),
        *section("Faults", fault_lines(topology, platform, health, view.width)),
        *section("Notes", sentences(platform.notes, view.width)),
    ]
    return paint(lines, view)


def topology_json(topology: Topology, platform: Platform, health: HealthReport) -> dict[str, Any]:
    return {
        "version": 1,
        "platform": to_json(platform),
        "topology": to_json(topology),
        "health": to_json(health),
    }


def _header(topology: Topology, platform: Platform, width: int) -> list[Line]:
    counts = (
        (len(topology.gpus), "GPU", ""),
        (len(topology.nvswitches), "NVSwitch", "NVSwitches"),
        (len(topology.nics), "NIC", ""),
        (len(topology.drives), "NVMe drive", ""),
    )
    words = ", ".join(counted(*count) for count in counts if count[0])
    cores = sum(len(node.cores) for node in topology.numa_nodes)
    threads = sum(len(node.cpus) for node in topology.numa_nodes)
    memory = sum(node.memory_mib for node in topology.numa_nodes) // 1024
    host = (
        f"{counted(len(topology.numa_nodes), 'NUMA node')}, {cores} cores ({threads} threads),"
        f" {memory} GiB"
    )
    cpu = topology.cpu_model.replace("(R)", "").replace("(TM)", "")
    return [
        *wrapped(words, width, first=line(Span(platform.title, "heading"), ": "), indent=2),
        *([line(cpu)] if cpu else []),
        line(host),
        *wrapped(f"fabric {platform.fabric_model}: {_FABRIC[platform.fabric_model]}", width),
    ]


# -- the tree ----------------------------------------------------------------------------------


def _nodes(topology: Topology, marks: _Marks, width: int) -> list[Line]:
    leaves = _leaves(topology)
    short = all(leaf.pci.address.domain == 0 for leaf in leaves)
    rows: list[list[Line | str]] = []
    counts = []
    for node in topology.numa_nodes:
        here = [leaf for leaf in leaves if topology.node(leaf.pci.numa_node).id == node.id]
        before = len(rows)
        for root, found in groupby(here, key=lambda leaf: leaf.pci.root):
            rows.append(_bridge_row(line("root complex"), root.removeprefix("pci")))
            rows += _subtree(list(found), 0, "", marks, short)
        counts.append((node, len(rows) - before))
    drawn = table(_HEAD, rows, width, right=(4,), shrink=(6,))
    head, position = drawn[0], 1
    lines: list[Line] = []
    for node, count in counts:
        lines += [BLANK, *_node_heading(node, width)]
        if count:
            lines += [head, *drawn[position : position + count]]
        position += count
    return lines


def _node_heading(node: NumaNode, width: int) -> list[Line]:
    words = [f"CPUs {node.cpus}"] if node.cores else ["no CPUs"]
    words.append(f"{node.memory_mib // 1024} GiB")
    for pool in node.hugepages:
        size = _PAGES.get(pool.size_kib, f"{pool.size_kib} KiB")
        if pool.total:
            words.append(f"{pool.free} of {pool.total} pages of {size} free")
    return wrapped(", ".join(words), width, first=heading(f"NUMA node {node.id}  "), indent=2)


def _leaves(topology: Topology) -> list[_Leaf]:
    """All devices, in the order of the tree."""
    leaves = []
    for gpu in topology.gpus:
        known = "?" if gpu.physical_id is None else gpu.physical_id
        able = (f"{gpu.pci.sriov_vfs} VFs",) if gpu.pci.sriov_vfs else ()
        leaves.append(_Leaf(gpu.pci, f"GPU {gpu.index}", (f"physical {known}", *able)))
    leaves += [_Leaf(switch.pci, f"NVSwitch {switch.index}", ()) for switch in topology.nvswitches]
    made = Counter(vf.nic for vf in topology.vfs)
    for nic in topology.nics:
        some = (f"{made[nic.pci.address]}/{nic.pci.sriov_vfs} VFs",) if nic.pci.sriov_vfs else ()
        leaves.append(_Leaf(nic.pci, _nic_name(nic), (*nic.interfaces, *some)))
    leaves += [_Leaf(drive.pci, "NVMe drive", drive.block_devices) for drive in topology.drives]
    return sorted(leaves, key=lambda leaf: (leaf.pci.root, leaf.path))


def _nic_name(nic: Nic) -> str:
    return "IB NIC" if nic.pci.class_code == _INFINIBAND else "NIC"


def _subtree(
    leaves: list[_Leaf], depth: int, prefix: str, marks: _Marks, short: bool
) -> list[list[Line | str]]:
    """Rows of what is below one bridge; a bridge with a single child is not worth a row."""
    rows: list[list[Line | str]] = []
    groups = [list(found) for _, found in groupby(leaves, key=lambda leaf: leaf.path[depth])]
    for number, group in enumerate(groups):
        last = number == len(groups) - 1
        branch, below = ("└─", "  ") if last else ("├─", "│ ")
        start = Span(f"{prefix}{branch}", "quiet")
        if len(group) == 1:
            rows.append(_device_row(group[0], start, marks, short))
            continue
        inner = depth + 1
        while len({leaf.path[inner] for leaf in group}) == 1:
            inner += 1
        # Functions of one device sit directly below a port; a switch has ports of its own.
        switch = any(len(leaf.path) > inner + 1 for leaf in group)
        name = "PCIe switch" if switch else "PCIe port"
        rows.append(_bridge_row(line(start, name), _address(group[0].path[inner - 1], short)))
        rows += _subtree(group, inner, f"{prefix}{below}", marks, short)
    return rows


def _bridge_row(name: Line, address: str) -> list[Line | str]:
    return [name, line(Span(address, "quiet")), *[""] * (len(_HEAD) - 2)]


def _device_row(leaf: _Leaf, start: Span, marks: _Marks, short: bool) -> list[Line | str]:
    pci, link = leaf.pci, BLANK
    if pci.link and pci.link.width:
        narrow = pci.link.width < pci.link.max_width
        width = f"x{pci.link.width}" + (f"/{pci.link.max_width}" if narrow else "")
        link = line(Span(width, "warn" if narrow else ""), f" {pci.link.speed:g}GT/s")
    return [
        line(start, leaf.name, marks.get(pci.address, "")),
        _address(pci.address, short),
        pci.id,
        pci.driver or "-",
        "-" if pci.iommu_group is None else str(pci.iommu_group),
        link,
        ", ".join(leaf.remarks),
    ]


def _address(address: PciAddress, short: bool) -> str:
    """Without its domain where the machine has only one."""
    return str(address).partition(":")[2] if short else str(address)


# -- partitions --------------------------------------------------------------------------------


def _legal(platform: Platform, width: int) -> list[Line]:
    rows = []
    for size in platform.sizes:
        sets = sorted(platform.of_size(size), key=lambda partition: partition.gpus)
        names = "each" if size == 1 else " ".join(str(CpuSet.of(each.gpus)) for each in sets)
        rows.append([f"  {counted(size, 'GPU')}", names, _comes_with(sets)])
    return table(("", "", ""), rows, width, shrink=(1, 2)) if rows else []


def _comes_with(sets: list[Partition]) -> str:
    """What a VM gets with a set, where all sets of the size are alike."""
    links, switches = {each.links for each in sets}, {each.nvswitches for each in sets}
    words = []
    if len(links) == 1 and (link := links.pop()):
        words.append(f"{counted(link, 'NVLink')} each")
    if len(switches) == 1 and (switch := switches.pop()):
        words.append(counted(switch, "NVSwitch", "NVSwitches"))
    return ", ".join(words)
