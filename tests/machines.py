"""Sample machines to break: every change is one that a real machine can show."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.host import simulate
from dgx_kvm_sw.host.platforms import PHYSICAL_IDS

MACHINES = simulate.names()
SAMPLE_VF = "0000:86:00.2"  # the first of the DGX-2's NIC enp134s0f0


def own(name: str, directory: Path) -> Root:
    """Build a machine that the test may change."""
    simulate.build(name, directory)
    return Root(directory)


def device_path(root: Root, address: object) -> Path:
    """The folder of a PCI device, not the link to it."""
    return root.path(f"/sys/bus/pci/devices/{address}").resolve()


def change(root: Root, address: object, attribute: str, text: str) -> None:
    (device_path(root, address) / attribute).write_text(f"{text}\n")


def unplug(root: Root, *addresses: object) -> None:
    """Take devices off the bus, as the kernel does after surprise removal."""
    for address in addresses:
        shutil.rmtree(device_path(root, address))
        root.path(f"/sys/bus/pci/devices/{address}").unlink()


def plug(root: Root, address: str, like: object) -> None:
    """Add a device beside another and of the same kind."""
    model = device_path(root, like)
    shutil.copytree(model, model.with_name(address), symlinks=True)
    link = root.path(f"/sys/bus/pci/devices/{address}")
    link.symlink_to(os.path.relpath(model.with_name(address), link.parent.resolve()))


def silence(root: Root, address: object) -> None:
    """Let a device fall off the bus while the kernel still lists it."""
    (device_path(root, address) / "config").write_bytes(b"\xff" * 64)


def bind(root: Root, address: object, driver: str | None) -> None:
    link = device_path(root, address) / "driver"
    link.unlink(missing_ok=True)
    if driver:
        target = root.path(f"/sys/bus/pci/drivers/{driver}")
        target.mkdir(exist_ok=True)
        link.symlink_to(os.path.relpath(target, link.parent))


def without_numa(root: Root) -> None:
    """A kernel built without NUMA: no nodes, and no device knows one."""
    shutil.rmtree(root.path("/sys/devices/system/node"))
    for name in root.names("/sys/bus/pci/devices"):
        change(root, name, "numa_node", "-1")


def write_physical_ids(root: Root, ids: Mapping[str, int]) -> None:
    root.write(PHYSICAL_IDS, json.dumps({"version": 1, "ids": ids}), sync=False)


def make_vfs(root: Root, nic: str, count: int, interface: str) -> list[str]:
    """Let a NIC's driver make virtual functions, after those of the sample; return addresses."""
    physical, model = device_path(root, nic), device_path(root, SAMPLE_VF)
    bus = nic.rpartition(":")[0]
    addresses = [f"{bus}:{0x10 + index // 8:02x}.{index % 8}" for index in range(count)]
    for index, address in enumerate(addresses):
        folder = physical.with_name(address)
        shutil.copytree(model, folder, symlinks=True)
        (child,) = (folder / "net").iterdir()
        child.rename(child.with_name(f"{interface}v{index}"))
        (folder / "numa_node").write_text((physical / "numa_node").read_text())
        _link(folder / "physfn", physical)
        _link(physical / f"virtfn{index}", folder)
        _link(root.path(f"/sys/bus/pci/devices/{address}"), folder)
        groups = root.path("/sys/kernel/iommu_groups")
        _link(folder / "iommu_group", groups / str(len(os.listdir(groups))))
        (groups / str(len(os.listdir(groups)))).mkdir()
    (physical / "sriov_numvfs").write_text(f"{count}\n")
    return addresses


def keep_with_host(root: Root, nic: str, interface: str) -> None:
    """Take a NIC from the VMs: it is Ethernet, at its driver, and up."""
    change(root, nic, "class", "0x020000")
    bind(root, nic, "mlx5_core")
    (device_path(root, nic) / "net" / interface).mkdir(parents=True)
    set_flags(root, nic, 0x1003)


def set_flags(root: Root, address: object, flags: int) -> None:
    """Let the network interface of a device be up (0x1003), down (0x1002)."""
    (interface,) = (device_path(root, address) / "net").iterdir()
    (interface / "flags").write_text(f"{flags:#x}\n")


def _link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent.resolve()))
