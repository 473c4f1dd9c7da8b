"""A sample machine as a directory: sysfs and procfs as its kernel would show them in KVM mode."""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from dgx_kvm_sw.access.files import Root, explained
from dgx_kvm_sw.host.topology import IFF_UP
from dgx_kvm_sw.model.errors import HostError, UsageError
from dgx_kvm_sw.model.pci import PciAddress
from dgx_kvm_sw.model.topology import Topology

SAMPLES = Path(__file__).parents[1] / "data" / "simulated.yaml"
UNITS = {"K": 10, "M": 20, "G": 30}
BRIDGE = {"id": "10b5:9797", "class": 0x060400, "driver": "pcieport", "link": [8, 16]}
_FIRST_VF = 2  # of a ConnectX-5 with two ports: VF 0 is two functions after the first port
_IFF_BROADCAST = 0x1002  # and multicast, as every Ethernet interface says
DRIVER_CLASSES = {0x02: "net", 0x01: "nvme"}  # base class -> the folder of what its driver made


def names() -> tuple[str, ...]:
    """The machines that `build` knows."""
    return tuple(_samples())


def build(name: str, directory: Path) -> None:
    """Lay out machine `name` below `directory`, unless it is there already.

    The tree of /sys is renamed into place last, so a directory that has one is complete.
    """
    samples = _samples()
    if name not in samples:
        raise UsageError(f"there is no sample machine {name}", f"choose from {', '.join(samples)}")
    machine = samples[name]
    root = Root(directory)
    if root.exists("/sys"):
        found = root.read("/sys/class/dmi/id/product_name", "another machine")
        if found != machine["product_name"]:
            raise HostError(
                f"{directory} already simulates {found}, not {name}", "choose another directory"
            )
        return
    for path, text in _files_of_state(name, machine).items():
        root.write(path, text, sync=False)
    try:
        with tempfile.TemporaryDirectory(prefix=".building-", dir=directory) as temporary:
            _write_sysfs(_Tree(temporary), machine)
            os.rename(f"{temporary}/sys", root.path("/sys"))
    except OSError as error:
        raise explained(error, "lay out a sample machine below", directory) from error


def libvirt_node_xml(topology: Topology) -> str:
    """Return this machine as a node file for libvirt's test driver (URI test:///FILE).

    libvirt counts sockets and cores per NUMA node, whatever the mainboard has.
    """
    nodes = topology.numa_nodes
    cores = max(len(node.cores) for node in nodes)
    return (
        "<node><cpu><model>x86_64</model>"
        f"<active>{sum(len(node.cpus) for node in nodes)}</active>"
        f"<nodes>{len(nodes)}</nodes><sockets>1</sockets>"
        f"<cores>{cores}</cores><threads>{topology.threads_per_core}</threads></cpu>"
        f"<memory>{sum(node.memory_mib for node in nodes) * 1024}</memory></node>\n"
    )


def _samples() -> dict[str, Any]:
    samples: dict[str, Any] = yaml.load(SAMPLES.read_text(encoding="utf-8"), yaml.CSafeLoader)
    return samples


class _Tree:
    """Files and links below a directory, by absolute path; plain calls, as they are thousands."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.folders: set[str] = set()

    def write(self, folder: str, files: Mapping[str, str | bytes | int]) -> None:
        """Write a folder of attributes; text gets the newline that the kernel adds."""
        self._make(folder)
        for name, content in files.items():
            data = content if isinstance(content, bytes) else f"{content}\n".encode()
            with open(f"{self.directory}{folder}/{name}", "wb", buffering=0) as stream:
                stream.write(data)

    def link(self, path: str, target: str) -> None:
        """Make `path` a relative link to `target`, as sysfs does."""
        folder = os.path.dirname(path)
        self._make(folder)
        os.symlink(os.path.relpath(target, folder), f"{self.directory}{path}")

    def _make(self, folder: str) -> None:
        if folder not in self.folders:
            os.makedirs(f"{self.directory}{folder}", exist_ok=True)
            self.folders.add(folder)


def _files_of_state(name: str, machine: Mapping[str, Any]) -> dict[str, str]:
    """Return what is not in /sys: procfs, the machine's id, the fabric's numbers of its GPUs."""
    gpus = sorted(path[-1] for _, kind, path, _, _ in _functions(machine) if kind == "gpu")
    ids = dict(zip(gpus, machine["physical_ids"], strict=True))
    numa = machine["numa"]
    cpus = range(2 * numa["nodes"] * numa["cores"])
    model = machine["cpu_model"]
    memory = numa["nodes"] * numa["memory_gib"] << 20
    return {
        "/proc/cmdline": "BOOT_IMAGE=/boot/vmlinuz ro iommu=pt dgx_kvm.mode=kvm\n",
        "/proc/cpuinfo": "".join(f"processor\t: {n}\nmodel name\t: {model}\n\n" for n in cpus),
        "/proc/meminfo": f"MemTotal:       {memory} kB\n",
        "/etc/machine-id": f"{uuid.uuid5(uuid.NAMESPACE_DNS, name).hex}\n",
        "/var/lib/dgx-kvm/fabric-ids.json": json.dumps({"version": 1, "ids": ids}, indent=1),
    }


def _write_sysfs(tree: _Tree, machine: Mapping[str, Any]) -> None:
    tree.write("/sys/class/dmi/id", {"product_name": machine["product_name"]})
    _write_numa(tree, machine["numa"])
    groups: dict[str, int] = {}
    bridges: set[str] = set()
    with_vfs: list[tuple[str, str, int, int, str]] = []
    for node, kind, path, child, vfs in _functions(machine):
        folder = f"/sys/devices/pci{path[0].rpartition(':')[0]}"
        for address in path[:-1]:
            folder = f"{folder}/{address}"
            if address not in bridges:
                bridges.add(address)
                group = groups.setdefault(address, len(groups))
                _write_function(tree, folder, BRIDGE, node, group)
        together = kind == machine.get("iommu_together")
        group = groups.setdefault(kind if together else path[-1], len(groups))
        folder = f"{folder}/{path[-1]}"
        _write_function(tree, folder, machine["kinds"][kind], node, group)
        if child:
            _write_child(tree, folder, machine["kinds"][kind]["class"] >> 16, child)
        if vfs:
            with_vfs.append((folder, machine["kinds"][kind]["vf"], node, vfs, child))
    for nic, kind, node, vfs, child in with_vfs:  # last: they shift no other group's number
        for index in range(vfs):
            group = groups.setdefault(f"{nic} {index}", len(groups))
            _write_vf(tree, nic, index, machine["kinds"][kind], node, group, f"{child}v{index}")
        tree.write(nic, {"sriov_numvfs": vfs})


def _functions(machine: Mapping[str, Any]) -> list[tuple[int, str, list[str], str, int]]:
    """Return NUMA node, kind, addresses from the root port down, name on the host, VFs it has."""
    return [
        (part["node"], kind, [f"0000:{each}" for each in path.split("/")], child, int(vfs or 0))
        for part in machine["pci"]
        for kind, path, child, vfs in ((*line.split(), "", "")[:4] for line in part["devices"])
    ]


# NUMA -----------------------------------------------------------------------------------------


def _write_numa(tree: _Tree, numa: Mapping[str, Any]) -> None:
    cores = numa["nodes"] * numa["cores"]
    tree.write("/sys/devices/system/cpu", {"online": f"0-{2 * cores - 1}"})
    for cpu in range(2 * cores):
        siblings = {"thread_siblings_list": f"{cpu % cores},{cpu % cores + cores}"}
        tree.write(f"/sys/devices/system/cpu/cpu{cpu}/topology", siblings)
    for node, distances in enumerate(numa["distances"]):
        first, last = node * numa["cores"], (node + 1) * numa["cores"] - 1
        folder = f"/sys/devices/system/node/node{node}"
        attributes = {
            "cpulist": f"{first}-{last},{first + cores}-{last + cores}",
            "distance": " ".join(map(str, distances)),
            "meminfo": f"Node {node} MemTotal:       {numa['memory_gib'] << 20} kB",
        }
        tree.write(folder, attributes)
        for size, pages in numa["hugepages"].items():
            counts = {"nr_hugepages": pages, "free_hugepages": pages}
            tree.write(f"{folder}/hugepages/hugepages-{size}kB", counts)


# PCI ------------------------------------------------------------------------------------------


def _write_function(
    tree: _Tree, folder: str, kind: Mapping[str, Any], node: int, group: int
) -> None:
    address = os.path.basename(folder)
    vendor, device = (int(half, 16) for half in kind["id"].split(":"))
    speed, width = f"{kind['link'][0]:.1f} GT/s PCIe", kind["link"][1]
    files: dict[str, str | bytes | int] = {
        "class": f"{kind['class']:#08x}",
        "vendor": f"{vendor:#06x}",
        "device": f"{device:#06x}",
        "numa_node": node,
        "current_link_speed": speed,
        "max_link_speed": speed,
        "current_link_width": width,
        "max_link_width": width,
        "resource": _resource(address, kind.get("bars", {})),
        "config": vendor.to_bytes(2, "little") + device.to_bytes(2, "little") + bytes(60),
    }
    if "vfs" in kind:
        files |= {"sriov_totalvfs": kind["vfs"], "sriov_numvfs": 0}
    if "vpd" in kind:
        files["vpd"] = kind["vpd"].encode()
    tree.write(folder, files)
    tree.link(f"/sys/bus/pci/devices/{address}", folder)
    tree.link(f"/sys/bus/pci/drivers/{kind['driver']}/{address}", folder)
    tree.link(f"{folder}/driver", f"/sys/bus/pci/drivers/{kind['driver']}")
    tree.link(f"/sys/kernel/iommu_groups/{group}/devices/{address}", folder)
    tree.link(f"{folder}/iommu_group", f"/sys/kernel/iommu_groups/{group}")


def _write_vf(
    tree: _Tree, nic: str, index: int, kind: Mapping[str, Any], node: int, group: int, child: str
) -> None:
    """Write a virtual function as the NIC's driver makes it: beside the NIC, with a link to it."""
    physical = PciAddress.parse(os.path.basename(nic))
    number = physical.slot * 8 + physical.function + _FIRST_VF + index
    address = replace(physical, slot=number // 8, function=number % 8)
    folder = f"{os.path.dirname(nic)}/{address}"
    _write_function(tree, folder, kind, node, group)
    # On its bus it has neither vendor nor device (SR-IOV specification, 3.4.1.1).
    tree.write(folder, {"config": b"\xff" * 4 + bytes(60)})
    _write_child(tree, folder, kind["class"] >> 16, child, flags=_IFF_BROADCAST)
    tree.link(f"{folder}/physfn", nic)
    tree.link(f"{nic}/virtfn{index}", folder)


def _resource(address: str, bars: Mapping[int, str]) -> str:
    """Return the BARs as sysfs lists them: one line each, at addresses that do not overlap."""
    bus, function = int(address[5:7], 16), int(address[-1])
    lines = [f"{0:#018x} {0:#018x} {0:#018x}"] * 6
    for bar, size in bars.items():
        start = bus << 42 | bar << 39 | function << 38
        end = start + (int(size[:-1]) << UNITS[size[-1]]) - 1
        lines[bar] = f"{start:#018x} {end:#018x} {0x14220C:#018x}"  # 64-bit, prefetchable memory
    return "\n".join(lines)


def _write_child(
    tree: _Tree, folder: str, base_class: int, child: str, flags: int = _IFF_BROADCAST | IFF_UP
) -> None:
    """Make what the host's driver made of a device: a network interface, a drive's namespace."""
    kind = DRIVER_CLASSES[base_class]
    tree.write(f"{folder}/{kind}/{child}", {"flags": f"{flags:#x}"} if kind == "net" else {})
    tree.link(f"/sys/class/{kind}/{child}", f"{folder}/{kind}/{child}")
    if kind == "nvme":
        tree.write(f"{folder}/nvme/{child}/{child}n1", {})
