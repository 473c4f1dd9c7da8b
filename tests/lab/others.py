"""The other machines that the lab can be: every part is found, bound and known by the product.
What breaks, Linux sees broken.

The disk is that of a host which has the package and is in KVM mode already; it was made on another
shape, so that only GPUs and NVSwitches, which need no list, are looked at.
"""

from __future__ import annotations

import json
from pathlib import Path

from lab import build
from lab.cache import ROOT
from lab.hostfacts import functions
from lab.machine import Machine, overlay
from lab.qemu import Hardware
from lab.shape import Device, named
from lab.story import expect, told
from lab.tools import tools

SHAPES = ("dgx2", "dgx-a100", "dgx-h100")


def other_machines(package: Path, release: str) -> None:
    """Boot each, and compare what Linux and the product see with its description."""
    for name in SHAPES:
        with told(f"{name}: all GPUs and NVSwitches are on vfio-pci, and the machine is known"):
            _look(package, release, name)


def _look(package: Path, release: str, name: str) -> None:
    kit, shape = tools(), named(name)
    disk = overlay(kit, build.installed_disk(release, package), ROOT / f"disks/other-{name}.qcow2")
    with Machine(kit, Hardware(shape, disk), f"other-{name}") as host:
        host.boot()
        served = {device.address for device in shape.served}
        found = {one.address: one for one in functions(host) if one.is_gpu or one.is_nvswitch}
        expect(set(found) == served, f"Linux sees {sorted(found)}, described are {sorted(served)}")
        drivers = {one.driver for one in found.values()}
        expect(drivers == {"vfio-pci"}, f"GPUs and NVSwitches are on {drivers}")
        seen = json.loads(host.check("dgx-kvm topology --json"))
        title = seen["platform"]["name"]
        expect(title == name, f"it is taken for {title}")
        counts = tuple(len(seen["topology"][kind]) for kind in ("gpus", "nvswitches"))
        expect(counts == (len(shape.gpus), len(shape.nvswitches)), f"the product counts {counts}")
        _break(host, shape.gpus[0])


def _break(host: Machine, gpu: Device) -> None:
    """Each fault is there for Linux, and when it is cleared, gone."""
    lanes = f"cat /sys/bus/pci/devices/{gpu.address}/current_link_width"
    errors = f"setpci -s {gpu.address} ECAP_AER+4.l"
    vendor = f"setpci -s {gpu.address} VENDOR_ID"
    faults: tuple[tuple[str, dict[str, int], str, str], ...] = (
        ("link", {"lanes": 8}, lanes, "8"),
        ("errors", {"uncorrectable": 0x4000}, errors, "00004000"),
        ("config", {}, vendor, "ffff"),
        ("gone", {}, vendor, "ffff"),
    )
    with host.devices() as devices:
        for fault, details, question, answer in faults:
            whole = host.check(question).strip()
            devices.fault(gpu.name, fault, **details)
            seen = host.check(question).strip()
            expect(seen == answer != whole, f"with the fault {fault}, `{question}` says {seen}")
            devices.clear(gpu.name)
            seen = host.check(question).strip()
            expect(seen == whole, f"after the fault {fault}, `{question}` says {seen}")
