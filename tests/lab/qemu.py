"""The command line of QEMU: a shape, two system devices of the lab's own, and the ways in.

Beside what the shape says, the chipset's bus has the drive that the host boots from (one more with
the id of the data drives), the NIC of its management network, and a folder shared with the lab.
"""

from __future__ import annotations

import enum
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.shape import SERVED, Bridge, Device, Shape
from lab.tools import Tools

OS_DRIVE, MANAGEMENT_NIC, SHARE = "0x10", "0x11", "0x12"  # their places on bus 0
MANAGEMENT_MAC = "52:54:00:6b:76:01"
# TCG emulates SVM, so there is a /dev/kvm inside. It does not know topoext, by which AMD's CPUs
# name the threads of a core, but answers it when forced; what else it does not know must go then.
CPU = (
    "EPYC-Rome,+svm,+topoext,x-force-features=on,-xsavec,-xsaves,-clzero,-perfctr-core,-osvw,"
    "-misalignsse,-fxsr-opt,-ibpb,-amd-stibp,-nrip-save"
)
DATA_DRIVE_BYTES = 1 << 30  # sparse
SERIAL_NVME, SERIAL_OS = "LABDATA{:04d}", "LABOS0001"


class Iommu(enum.Enum):
    """What stands between the devices and memory."""

    FULL = "full"
    NO_REMAPPING = "no-remapping"  # vfio refuses: interrupts could be forged
    NONE = "none"  # VT-d is off in the firmware's setup


@dataclass(frozen=True)
class Hardware:
    """What is switched on: a machine before its power button is pressed."""

    shape: Shape
    disk: Path  # qcow2, written to
    iommu: Iommu = Iommu.FULL
    served: bool = True  # with the devices of devices.py; else QEMU's own only


def command(tools: Tools, hardware: Hardware, directory: Path) -> list[str]:
    """The command line; `directory` gets the files and sockets of this machine."""
    _prepare(tools, hardware, directory)
    arguments = [
        *_board(hardware),
        *_firmware(tools, directory),
        *_system_devices(hardware, directory),
        *_tree(hardware, directory),
        *_ways_in(directory),
    ]
    return tools.command("bin/qemu-system-x86_64", *arguments)


def _prepare(tools: Tools, hardware: Hardware, directory: Path) -> None:
    (directory / "share").mkdir(exist_ok=True)
    variables = directory / "vars.fd"
    if not variables.exists():
        shutil.copy(tools.path("share/OVMF/OVMF_VARS_4M.fd"), variables)
    for device in hardware.shape.devices:
        drive = directory / f"{device.name}.raw"
        if device.driver == "nvme" and not drive.exists():
            with drive.open("wb") as file:
                file.truncate(DATA_DRIVE_BYTES)


def _board(hardware: Hardware) -> Iterator[str]:
    shape = hardware.shape
    cores = shape.cpus // shape.sockets // 2
    mib = shape.memory_gib * 1024
    yield from ("-nodefaults", "-no-user-config", "-display", "none", "-name", "dgx-lab")
    yield from ("-accel", "tcg,thread=multi", "-machine", "q35,kernel-irqchip=off")
    yield from ("-cpu", CPU)
    yield from ("-smp", f"{shape.cpus},sockets={shape.sockets},cores={cores},threads=2")
    yield from ("-m", f"{mib * shape.nodes}M")
    for node in range(shape.nodes):
        cpus = shape.node_cpus(node)
        # vfio-user devices reach the memory through its file.
        yield from ("-object", f"memory-backend-memfd,id=mem{node},size={mib}M,share=on")
        yield from ("-numa", f"node,nodeid={node},cpus={cpus[0]}-{cpus[-1]},memdev=mem{node}")
    yield from ("-smbios", f"type=1,manufacturer=NVIDIA,product={shape.product_name}")
    if hardware.iommu != Iommu.NONE:
        remapping = "on" if hardware.iommu == Iommu.FULL else "off"
        yield from ("-device", f"intel-iommu,intremap={remapping},caching-mode=on")


def _firmware(tools: Tools, directory: Path) -> Iterator[str]:
    for name in ("qemu", "seabios"):
        yield from ("-L", str(tools.path(f"share/{name}")))
    code, variables = tools.path("share/OVMF/OVMF_CODE_4M.fd"), directory / "vars.fd"
    yield from ("-drive", f"if=pflash,format=raw,readonly=on,file={code}")
    yield from ("-drive", f"if=pflash,format=raw,file={variables}")
    # Room above 4 GiB for the BARs of 16 GPUs: OVMF would not start without.
    yield from ("-fw_cfg", "name=opt/ovmf/X-PciMmio64Mb,string=65536")


def _system_devices(hardware: Hardware, directory: Path) -> Iterator[str]:
    yield from (
        "-drive",
        f"file={hardware.disk},if=none,id=os,format=qcow2,cache=writeback,discard=unmap",
    )
    yield from ("-device", f"nvme,drive=os,serial={SERIAL_OS},addr={OS_DRIVE},bootindex=1")
    yield from ("-netdev", "user,id=management,restrict=on")
    yield from (
        "-device",
        f"e1000e,netdev=management,mac={MANAGEMENT_MAC},addr={MANAGEMENT_NIC},rombar=0",
    )
    yield from ("-fsdev", f"local,id=share,path={directory / 'share'},security_model=none")
    yield from ("-device", f"virtio-9p-pci,fsdev=share,mount_tag=lab,addr={SHARE}")


def _tree(hardware: Hardware, directory: Path) -> Iterator[str]:
    shape = hardware.shape
    for root in shape.roots:
        if root.bus:
            yield "-device"
            yield f"pxb-pcie,id={root.name},bus=pcie.0,bus_nr={root.bus},numa_node={root.node}"
    buses = {root.name: root.name if root.bus else "pcie.0" for root in shape.roots}
    for number, bridge in enumerate(shape.bridges, start=1):
        yield from ("-device", _bridge(bridge, number, buses.get(bridge.parent, bridge.parent)))
    for number, device in enumerate(shape.devices, start=1):
        bus = buses.get(device.parent, device.parent)
        if device.driver != SERVED:
            yield from _own_device(device, number, bus, directory)
        elif hardware.served:
            yield from ("-device", _served_device(device, bus, directory))


def _bridge(bridge: Bridge, number: int, bus: str) -> str:
    addr = f"{bridge.slot.device:#x}.{bridge.slot.function:#x}"
    text = f"{bridge.driver},id={bridge.name},bus={bus},addr={addr}"
    if bridge.driver == "x3130-upstream":
        return text
    # Firmware leaves room behind a port that things can be plugged into, and moves the rest.
    return f"{text},chassis={number},slot={number % 32},hotplug=off"


def _place(device: Device, bus: str) -> dict[str, object]:
    addr = f"{device.slot.device:#x}.{device.slot.function:#x}"
    return {"driver": device.driver, "id": device.name, "bus": bus, "addr": addr}


def _served_device(device: Device, bus: str, directory: Path) -> str:
    socket = {"type": "unix", "path": str(directory / f"{device.name}.sock")}
    return json.dumps({**_place(device, bus), "rombar": 0, "socket": socket, **device.properties})


def _own_device(device: Device, number: int, bus: str, directory: Path) -> Iterator[str]:
    options = {**_place(device, bus), **device.properties}
    if device.driver == "nvme":
        file = directory / f"{device.name}.raw"
        yield from ("-drive", f"file={file},if=none,id={device.name}-disk,format=raw")
        options |= {"drive": f"{device.name}-disk", "serial": SERIAL_NVME.format(number)}
    else:
        options |= {"mac": f"52:54:00:6b:77:{number:02x}", "rombar": 0}
    yield from ("-device", json.dumps(options))


def _ways_in(directory: Path) -> Iterator[str]:
    for name in ("console", "shell"):
        path, log = directory / f"{name}.sock", directory / f"{name}.log"
        chardev = f"socket,id={name},path={path},server=on,wait=off,logfile={log},logappend=on"
        yield from ("-chardev", chardev, "-serial", f"chardev:{name}")
    yield from ("-qmp", f"unix:{directory / 'qmp.sock'},server=on,wait=off")
