"""Hosts that cannot do it, or not all of it: the product says so in words and does no harm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lab import build
from lab.cache import ROOT
from lab.hostfacts import functions
from lab.machine import Machine, overlay
from lab.qemu import Hardware, Iommu
from lab.shape import Shape, named
from lab.story import APT, INSTALL, WORD, Story, expect, told
from lab.tools import tools

SHAPE = "dgx2-small"
SHARED_GROUP = "dgx2-shared-group"  # a NIC below the same port without ACS as a GPU
INSTALL_IT = f"{APT} update && {APT} install dgx-kvm-sw"


def negative_hosts(package: Path, release: str) -> None:
    """Each on a new disk."""
    for iommu, words in (
        (Iommu.NONE, "the IOMMU is off"),
        (Iommu.NO_REMAPPING, "the IOMMU cannot remap interrupts"),
    ):
        hardware = Hardware(named(SHAPE), Path(), iommu=iommu)
        with (
            told(f"an IOMMU that is {iommu.value}: the installation is refused, nothing is left"),
            _host(package, release, hardware) as host,
        ):
            _refused(host, words, "in the firmware setup")
            state = host.run("dpkg-query -W -f '${Status}' dgx-kvm-sw").output
            expect("installed" not in state.replace("not-installed", ""), state)
            expect(host.run("test -e /usr/lib/dgx-kvm").code, "files were unpacked")
    with (
        told("a NIC of the host in a GPU's IOMMU group: KVM mode is refused, naming both"),
        _host(package, release, Hardware(named(SHARED_GROUP), Path())) as host,
    ):
        _shared_group(host)
    with (
        told("a GPU that is missing: named, and the VM that would need it is not made"),
        _host(package, release, Hardware(_without_last_gpu(), Path())) as host,
    ):
        _missing_gpu(host)


@contextmanager
def _host(package: Path, release: str, hardware: Hardware) -> Iterator[Machine]:
    kit = tools()
    disk = overlay(kit, build.disk(release), ROOT / "disks" / f"negative-{release}.qcow2")
    with Machine(kit, replace(hardware, disk=disk), f"negative-{release}") as host:
        host.boot()
        Story(host, hardware.shape, ()).make_repository(package)
        yield host


def _refused(host: Machine, *words: str) -> None:
    before = host.check("sha256sum /boot/grub/grub.cfg")
    result = host.run(INSTALL_IT, INSTALL)
    expect(result.code, f"the installation was not refused:\n{result.output}")
    for word in words:
        expect(word in result.output, f"{word!r} is not in:\n{result.output}")
    expect(host.check("sha256sum /boot/grub/grub.cfg") == before, "grub.cfg was touched")
    expect(WORD not in host.check("cat /boot/grub/grub.cfg"), "KVM mode was armed")


def _shared_group(host: Machine) -> None:
    found = functions(host)
    gpu = next(one.address for one in found if one.is_gpu)
    group = host.check(f"ls /sys/bus/pci/devices/{gpu}/iommu_group/devices").split()
    nic = next(
        one.address for one in found if one.address in group and one.class_code.startswith("0x0200")
    )
    link = host.check(f"ls /sys/bus/pci/devices/{nic}/net").strip()
    host.check(f"ip address add 192.0.2.1/24 dev {link} && ip link set {link} up")
    _refused(host, f"{gpu}, which VMs need, shares an IOMMU group with {nic}")
    check = host.run("dgx-kvm mode --check")
    expect(check.code == 1 and nic in check.output and gpu in check.output, check.output)


def _without_last_gpu() -> Shape:
    shape = named(SHAPE)
    last = [device for device in shape.devices if device.kind == "gpu"][-1]
    return replace(shape, devices=tuple(one for one in shape.devices if one != last))


def _missing_gpu(host: Machine) -> None:
    host.check(INSTALL_IT, INSTALL)
    host.reboot()
    gpus = len([one for one in functions(host) if one.is_gpu])
    host.check(
        "printf 'version: 1\\nhost: {cpu_pool: {cpus: 0, memory: 0%%}}\\n"
        "defaults: {vcpus: 2, memory: 512MiB, state: stopped}\\n"
        "vms: [{name: one, gpus: 1}, {name: all, gpus: 4}]\\n' >/etc/dgx-kvm/vms.yaml"
    )
    applied = host.run("dgx-kvm apply", INSTALL)
    expect(applied.code == 1 and "does not fit: all" in applied.output, applied.output)
    expect(host.check("virsh list --all --name").split() == ["one"], applied.output)
    expect(f"{gpus} GPUs" in host.check("dgx-kvm mode --check"), "the number of GPUs is not said")
    expect(f"{gpus} of 16 GPUs are found" in host.check("dgx-kvm status"), "no GPU is missed")
