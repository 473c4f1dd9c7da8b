"""Who holds each GPU and NVSwitch: its driver, and the processes that have it open."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.model.mode import VFIO, Held, Process
from dgx_kvm_sw.model.pci import PciAddress, PciDevice
from dgx_kvm_sw.model.topology import Topology

_NODE = re.compile(r"/dev/(nvidia\d+|nvidia-nvswitch\d+|vfio/\d+|vfio/devices/vfio\d+)$")
_GUEST = re.compile(r"(?:^|,)guest=([^,]*)")
_MINOR = re.compile(r"^Device Minor:\s*(\d+)", re.MULTILINE)
_NVIDIA_GPUS = "/proc/driver/nvidia/gpus"


@dataclass(frozen=True)
class Holders:
    devices: tuple[Held, ...]
    complete: bool  # False: processes of other users could not be looked at


def holders(root: Root, topology: Topology) -> Holders:
    """Look at every GPU and NVSwitch, and at the open files of every process."""
    found: dict[str, set[int]] = {}
    complete = True
    for pid in filter(str.isdecimal, root.names("/proc")):
        try:
            for node in _open_nodes(root, pid):
                found.setdefault(node, set()).add(int(pid))
        except PermissionError:
            complete = False
        except OSError:  # it has ended
            continue
    processes = {pid: _process(root, pid) for pids in found.values() for pid in pids}
    devices = [("GPU", gpu.index, gpu.pci) for gpu in topology.gpus]
    devices += [("NVSwitch", switch.index, switch.pci) for switch in topology.nvswitches]
    nodes = _nodes(root, topology)
    held = []
    for kind, index, pci in devices:
        pids = {pid for node in nodes.get(pci.address, ()) for pid in found.get(node, ())}
        who = tuple(processes[pid] for pid in sorted(pids))
        held.append(Held(kind, index, pci.address, pci.driver, who))
    return Holders(tuple(held), complete)


def _open_nodes(root: Root, pid: str) -> Iterator[str]:
    """Yield the device nodes of ours that a process has open."""
    folder = root.path(f"/proc/{pid}/fd")
    for name in os.listdir(folder):
        try:
            target = os.readlink(folder / name)
        except FileNotFoundError:  # closed meanwhile
            continue
        if target.startswith("/dev/") and _NODE.match(target):
            yield target


def _process(root: Root, pid: int) -> Process:
    name = root.read(f"/proc/{pid}/comm", "a process that has ended")
    words = root.read(f"/proc/{pid}/cmdline", "").split("\0")
    vm = ""
    if name.startswith("qemu") and "-name" in words[:-1]:
        guest = _GUEST.search(words[words.index("-name") + 1])
        vm = guest.group(1) if guest else ""
    return Process(pid, name, vm)


def _nodes(root: Root, topology: Topology) -> Mapping[PciAddress, tuple[str, ...]]:
    """Return the device nodes that lead to each device."""
    nodes: dict[PciAddress, tuple[str, ...]] = {}
    for pci in topology.devices():
        if pci.driver == VFIO:
            nodes[pci.address] = _vfio_nodes(root, pci)
    for name in root.names(_NVIDIA_GPUS):
        minor = _MINOR.search(root.read(f"{_NVIDIA_GPUS}/{name}/information", ""))
        if minor:
            nodes[PciAddress.parse(name)] = (f"/dev/nvidia{minor.group(1)}",)
    # The driver says no minors of NVSwitches; it counts them as it finds them, in PCI order.
    switches = root.names("/proc/driver/nvidia-nvswitch/devices")
    for number, address in enumerate(sorted(map(PciAddress.parse, switches))):
        nodes[address] = (f"/dev/nvidia-nvswitch{number}",)
    return nodes


def _vfio_nodes(root: Root, pci: PciDevice) -> tuple[str, ...]:
    """The group's node, and the device's own where QEMU uses iommufd."""
    group = () if pci.iommu_group is None else (f"/dev/vfio/{pci.iommu_group}",)
    own = root.names(f"/sys/bus/pci/devices/{pci.address}/vfio-dev")
    return (*group, *(f"/dev/vfio/devices/{name}" for name in own))
