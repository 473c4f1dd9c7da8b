"""What each step of the package's life leaves on a live host, on its disk and for its next boot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from package import boot, debs, snapshot
from package.conftest import Hosts, Start
from package.debs import NAME
from package.machine import KERNELS, Machine
from package.snapshot import Snapshot

pytestmark = pytest.mark.package

REBOOT = ("/run/reboot-required", "/run/reboot-required.pkgs")


@dataclass(frozen=True)
class Beginning:
    """What a host was like before anything was installed."""

    disk: Snapshot
    grub_cfg: str
    images: list[list[str]]


@pytest.fixture
def beginning(ready: Hosts, suite: str, quick: bool, start: Start) -> Beginning:
    with start(ready(suite, quick)) as host:
        return Beginning(snapshot.take(host), host.read(boot.GRUB_CFG), image_listings(host))


real_tools = pytest.mark.parametrize("quick", [False], ids=["real-tools"])


def image_listings(host: Machine) -> list[list[str]]:
    return [boot.image_listing(host, kernel) for kernel in KERNELS]


def install(host: Machine, package: Path) -> str:
    name = host.copy_in(package)
    said = host("dpkg", "--install", name)
    host.path(name).unlink()
    return said


def installed_version(host: Machine) -> str:
    return host("dpkg-query", "--show", "--showformat=${Version}", NAME)


@real_tools
def test_install_arms_kvm_mode_and_touches_nothing_else(
    host: Machine, beginning: Beginning, deb: Path
) -> None:
    said = install(host, deb)

    assert boot.mode(host) == "kvm"
    for kernel in KERNELS:
        listing = boot.image_listing(host, kernel)
        assert "scripts/init-top/dgx-kvm" in listing
        order = boot.image_file(host, kernel, "scripts/init-top/ORDER").split()
        ours, udev = (order.index(f"/scripts/init-top/{name}") for name in ("dgx-kvm", "udev"))
        assert ours < udev, "udev would load the devices' own drivers"
        devices = boot.image_file(host, kernel, "etc/dgx-kvm/devices")
        assert devices == host.read("/var/lib/dgx-kvm/devices")
    assert "0000:18:00.0 0x144d 0xa824 0x010802\n" in devices, "a data drive goes to VMs"
    assert "0000:01:00.0" not in devices, "a disk of the mirror below / stays"
    assert "0000:06:00.0" not in devices, "the NIC with the default route stays"
    assert [host.exists(name) for name in REBOOT] == [True, True]
    assert host.read(REBOOT[1]) == f"{NAME}\n"
    assert "reboot" in said
    own = set(debs.contents(deb))
    made = snapshot.differences(beginning.disk, snapshot.take(host))
    assert [line for line in made if not _is_ours(line, own)] == ["~ /boot/grub/grub.cfg"]


def _is_ours(line: str, shipped: set[str]) -> bool:
    """A new file of the package, a folder for some, or one that it makes by its name."""
    sign, name = line[0], line[2:]
    return sign == "+" and (
        name in shipped
        or any(file.startswith(f"{name}/") for file in shipped)
        or name.startswith("/var/lib/dgx-kvm")
        or name == "/etc/dgx-kvm/vms.yaml"
        or (name.startswith("/etc/systemd/system/") and "/dgx-kvm" in name)
    )


def test_reinstall_upgrade_and_downgrade_change_nothing(
    armed: Machine, deb: Path, newer: Path
) -> None:
    """Neither the mode nor a boot image, whatever the administrator has changed."""
    armed.write("/etc/dgx-kvm/vms.yaml", "version: 1\nvms: [{name: mine, gpus: 2}]\n")
    edited = debs.conffiles(newer)[0]
    armed.write(edited, armed.read(edited) + "# mine\n", 0o600)
    before, images = snapshot.take(armed), boot.images(armed)
    for package in (deb, newer, deb):
        install(armed, package)
        assert installed_version(armed) == debs.field(package, "Version")
        assert snapshot.differences(before, snapshot.take(armed)) == []
        assert boot.images(armed) == images
    assert armed.read(REBOOT[1]) == f"{NAME}\n"


def test_upgrade_leaves_a_disarmed_host_disarmed(armed: Machine, newer: Path) -> None:
    armed("/usr/lib/dgx-kvm/host-mode", "disarm")
    assert boot.mode(armed) == "bare-metal"
    assert not armed.exists(REBOOT[0]), "it has never booted the other mode"
    before = snapshot.take(armed)

    install(armed, newer)
    assert boot.mode(armed) == "bare-metal"
    assert snapshot.differences(before, snapshot.take(armed)) == []

    armed("/usr/lib/dgx-kvm/host-mode", "arm")
    assert boot.mode(armed) == "kvm"
    assert armed.exists(REBOOT[0])


@real_tools
def test_removal_gives_back_the_boot_and_leaves_conffiles(
    armed: Machine, beginning: Beginning, deb: Path
) -> None:
    said = armed("dpkg", "--remove", NAME)

    assert armed.read(boot.GRUB_CFG) == beginning.grub_cfg
    assert image_listings(armed) == beginning.images
    assert not armed.exists(REBOOT[0]), "the host has never booted in KVM mode"
    assert "/var/lib/dgx-kvm/images" in said, "it says what is kept"
    kept = {"/etc/dgx-kvm/vms.yaml", *debs.conffiles(deb)}
    for line in snapshot.differences(beginning.disk, snapshot.take(armed)):
        sign, name = line[0], line[2:]
        folder = armed.path(name).is_dir() and any(file.startswith(f"{name}/") for file in kept)
        link = name.startswith("/etc/systemd/system/") and "/dgx-kvm" in name
        assert sign == "+" and (name in kept or folder or link), line


def test_removal_of_a_host_in_kvm_mode_asks_for_a_reboot(armed: Machine) -> None:
    options = armed.read("/var/lib/dgx-kvm/cmdline").strip()
    armed.write("/proc/cmdline", f"BOOT_IMAGE=/boot/vmlinuz ro {options}\n")
    armed("rm", *REBOOT)

    said = armed("dpkg", "--remove", NAME)

    assert "reboot" in said
    assert armed.read(REBOOT[1]) == f"{NAME}\n"


@real_tools
def test_purge_leaves_nothing(armed: Machine, beginning: Beginning, deb: Path, suite: str) -> None:
    """Also after a removal and another installation, which arms again."""
    armed("dpkg", "--remove", NAME)
    install(armed, deb)
    assert boot.mode(armed) == "kvm"
    armed("dpkg", "--remove", NAME)
    armed("dpkg", "--purge", NAME)
    _is_as_at_the_beginning(armed, beginning)


def test_purge_at_once_leaves_nothing(armed: Machine, beginning: Beginning) -> None:
    armed("dpkg", "--purge", NAME)
    _is_as_at_the_beginning(armed, beginning)


def test_purge_without_python_leaves_nothing(armed: Machine, beginning: Beginning) -> None:
    """As when dependencies are forced away first, or broken by an upgrade."""
    for name in armed.path("/usr/bin").glob("py*3*"):
        name.unlink()
    armed("dpkg", "--purge", NAME)
    left = snapshot.differences(beginning.disk, snapshot.take(armed))
    assert [line for line in left if not line.startswith("- /usr/bin/py")] == []
    assert armed.read(boot.GRUB_CFG) == beginning.grub_cfg


def _is_as_at_the_beginning(host: Machine, beginning: Beginning) -> None:
    assert snapshot.differences(beginning.disk, snapshot.take(host)) == []
    assert host.read(boot.GRUB_CFG) == beginning.grub_cfg
    assert image_listings(host) == beginning.images
    assert not host.exists("/run/dgx-kvm")


def test_purge_keeps_the_disks_of_vms(armed: Machine, beginning: Beginning) -> None:
    disk = "/var/lib/dgx-kvm/images/hr-train.qcow2"
    armed.write(disk, "data", 0o600)

    said = armed("dpkg", "--purge", NAME)

    assert "/var/lib/dgx-kvm/images" in said
    assert snapshot.differences(beginning.disk, snapshot.take(armed)) == [
        "+ /var/lib/dgx-kvm",
        "+ /var/lib/dgx-kvm/images",
        f"+ {disk}",
    ]


def test_what_the_administrator_wrote_survives_removal(armed: Machine, deb: Path) -> None:
    edited = ["/etc/dgx-kvm/vms.yaml", *debs.conffiles(deb)]
    for name in edited:
        armed.write(name, armed.read(name) + "# mine\n")
    armed("dpkg", "--remove", NAME)
    install(armed, deb)
    assert all(armed.read(name).endswith("# mine\n") for name in edited)
    assert boot.mode(armed) == "kvm"
