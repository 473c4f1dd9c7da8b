"""Where the package says no, and what is then on the host: what was there before."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from package import boot, debs, snapshot
from package.debs import NAME
from package.machine import DMAR, INTEL, Machine, Result, dmar

pytestmark = pytest.mark.package

AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu msr svm\n\n"


def attempt(host: Machine, package: Path, **environment: str) -> Result:
    name = host.copy_in(package)
    result = host.run("dpkg", "--install", name, **environment)
    host.path(name).unlink()
    return result


def status(host: Machine) -> str:
    """Dpkg's word for the package, "" when it knows none."""
    return host.run("dpkg-query", "--show", "--showformat=${db:Status-Status}", NAME).output


# --- hardware that cannot give devices to VMs


def without_vmx(host: Machine) -> None:
    host.write("/proc/cpuinfo", INTEL.replace(" vmx", ""))


def without_iommu(host: Machine) -> None:
    host.path(DMAR).unlink()


def without_remapping(host: Machine) -> None:
    host.write(DMAR, dmar(interrupt_remapping=False))


def without_svm(host: Machine) -> None:
    host.write("/proc/cpuinfo", AMD.replace(" svm", ""))


def without_amd_iommu(host: Machine) -> None:
    host.write("/proc/cpuinfo", AMD)
    host.path(DMAR).unlink()  # that table is Intel's


def without_grub(host: Machine) -> None:
    host.path(boot.GRUB_CFG).unlink()


@pytest.mark.parametrize(
    ("lack", "named"),
    [
        (without_vmx, "VT-x"),
        (without_iommu, "VT-d"),
        (without_remapping, "Interrupt Remapping"),
        (without_svm, "SVM"),
        (without_amd_iommu, "AMD-Vi"),
        (without_grub, "GRUB"),
    ],
)
def test_an_unfit_host_gets_nothing(
    host: Machine, deb: Path, lack: Callable[[Machine], None], named: str
) -> None:
    lack(host)
    before = snapshot.take(host)

    result = attempt(host, deb)

    assert result.code != 0
    assert f"{NAME}: " in result.output
    assert named in result.output, "the message says what to switch on"
    assert "DGX_KVM_FORCE=1" in result.output
    assert snapshot.differences(before, snapshot.take(host)) == []
    assert status(host) in ("", "not-installed")


def test_an_unfit_host_can_be_forced(host: Machine, deb: Path) -> None:
    without_iommu(host)
    assert attempt(host, deb, DGX_KVM_FORCE="1").code == 0
    assert status(host) == "installed"
    assert boot.mode(host) == "kvm"


def test_a_host_without_gpus_stays_bare_metal(host: Machine, deb: Path) -> None:
    for vendor in host.path("/sys/bus/pci/devices").glob("*/vendor"):
        if vendor.read_text() == "0x10de\n":
            vendor.write_text("0x1af4\n")
    images = boot.images(host)
    result = attempt(host, deb)
    assert result.code == 0
    assert "no NVIDIA GPU" in result.output
    assert boot.mode(host) == "bare-metal"
    assert boot.images(host) == images
    assert not host.exists("/run/reboot-required")


# --- hosts that are none


def test_a_chroot_is_prepared_for_its_first_boot(image: Machine, deb: Path) -> None:
    """An image of hosts is built there: nothing may be asked of the builder's hardware."""
    result = attempt(image, deb)
    assert result.code == 0, result.output
    assert "first boot" in result.output
    assert image.exists("/var/lib/dgx-kvm/arm-at-boot")
    assert not image.exists("/var/lib/dgx-kvm/cmdline")
    link = "/etc/systemd/system/multi-user.target.wants/dgx-kvm-first-boot.service"
    assert image.exists(link)
    image("dpkg", "--purge", NAME)
    assert not image.exists("/var/lib/dgx-kvm")
    assert not image.exists(link)


def test_a_container_is_prepared_for_its_first_boot(host: Machine, deb: Path) -> None:
    host.write("/run/systemd/container", "lxc\n")
    images = boot.images(host)
    assert attempt(host, deb).code == 0
    assert boot.mode(host) == "bare-metal"
    assert boot.images(host) == images
    assert host.exists("/var/lib/dgx-kvm/arm-at-boot")


def test_the_first_boot_arms(host: Machine, deb: Path) -> None:
    host.write("/run/systemd/container", "lxc\n")
    assert attempt(host, deb).code == 0
    host.path("/run/systemd/container").unlink()

    unit = host.read("/usr/lib/systemd/system/dgx-kvm-first-boot.service")
    command = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
    host("sh", "-c", command.removeprefix("ExecStart="))

    assert boot.mode(host) == "kvm"
    assert not host.exists("/var/lib/dgx-kvm/arm-at-boot")


# --- removal while VMs run


@pytest.fixture
def vm(armed: Machine) -> Iterator[str]:
    """A VM that libvirt's notes call running, and its process."""
    sleeping = subprocess.Popen((*armed.enter, "sleep", "1000"))
    pid = armed("sh", "-c", "until pidof sleep; do sleep 0.1; done").split()[-1]
    xml = "<domstatus><dgx-kvm:vm xmlns:dgx-kvm='urn:dgx-kvm:vm:1'/></domstatus>\n"
    armed.write("/run/libvirt/qemu/hr-train.xml", xml)
    armed.write("/run/libvirt/qemu/hr-train.pid", pid)
    armed.write("/run/libvirt/qemu/other.xml", "<domstatus/>\n")
    armed.write("/run/libvirt/qemu/other.pid", pid)
    yield pid
    armed.run("sh", "-c", f"kill {pid}")
    sleeping.wait(timeout=10)


@pytest.mark.parametrize("way", ["--remove", "--purge"])
def test_nothing_is_removed_while_a_vm_runs(armed: Machine, vm: str, way: str) -> None:
    before, images = snapshot.take(armed), boot.images(armed)

    result = armed.run("dpkg", way, NAME)

    assert result.code != 0
    assert "hr-train" in result.output
    assert "other" not in result.output, "that one is not ours"
    assert "dgx-kvm stop" in result.output
    assert status(armed) == "installed"
    assert snapshot.differences(before, snapshot.take(armed)) == []
    assert boot.images(armed) == images
    assert boot.mode(armed) == "kvm"

    armed("sh", "-c", f"kill {vm}")
    armed("sh", "-c", f"while [ -d /proc/{vm} ]; do sleep 0.1; done")
    armed("dpkg", "--remove", NAME)
    assert boot.mode(armed) == "bare-metal"


def test_an_upgrade_minds_no_running_vm(armed: Machine, vm: str, newer: Path) -> None:
    assert attempt(armed, newer).code == 0
    assert armed.exists(f"/proc/{vm}")
    version = armed("dpkg-query", "--show", "--showformat=${Version}", NAME)
    assert version == debs.field(newer, "Version")


# --- tools that fail


@pytest.mark.parametrize("tool", ["update-initramfs", "update-grub"])
def test_a_failing_tool_leaves_bare_metal(host: Machine, deb: Path, tool: str) -> None:
    """And once it works, dpkg takes up where it had stopped."""
    grub_cfg = host.read(boot.GRUB_CFG)
    whole = host.read(f"/usr/sbin/{tool}")
    host.write(f"/usr/sbin/{tool}", "#!/bin/sh\necho no space left >&2\nexit 1\n", 0o755)

    result = attempt(host, deb)

    assert result.code != 0
    assert tool in result.output
    assert host.read(boot.GRUB_CFG) == grub_cfg
    assert not host.exists("/var/lib/dgx-kvm/cmdline"), "or the next update-grub would switch"
    host.write(f"/usr/sbin/{tool}", whole, 0o755)
    host("dpkg", "--configure", "--pending")
    assert boot.mode(host) == "kvm"


@pytest.mark.parametrize("tool", ["update-initramfs", "update-grub"])
def test_a_failing_tool_does_not_hold_up_the_removal_for_good(armed: Machine, tool: str) -> None:
    whole = armed.read(f"/usr/sbin/{tool}")
    armed.write(f"/usr/sbin/{tool}", "#!/bin/sh\necho no space left >&2\nexit 1\n", 0o755)

    result = armed.run("dpkg", "--remove", NAME)

    assert tool in result.output
    assert boot.mode(armed) in ("kvm", "bare-metal")
    armed.write(f"/usr/sbin/{tool}", whole, 0o755)
    armed("dpkg", "--remove", NAME)
    assert boot.mode(armed) == "bare-metal"
    assert not any("dgx-kvm" in name for name in boot.image_listing(armed, "6.1.0-1-dgx"))


def test_removal_without_the_boot_tools_ends(armed: Machine) -> None:
    """Whoever has removed GRUB is not started by it."""
    for tool in ("update-grub", "update-initramfs"):
        armed.path(f"/usr/sbin/{tool}").unlink()
    armed("dpkg", "--remove", NAME)
    assert not armed.exists("/var/lib/dgx-kvm/cmdline")
