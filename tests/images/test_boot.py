"""Each image of `make images` boots by BIOS and by UEFI and becomes a machine of its own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from images.guest import CPUS, DISK_GIB, Guest, booted

pytestmark = pytest.mark.images

TREE = Path(__file__).parents[2]
# Of NVIDIA's driver: the VMs here have no GPU for it.
WANT_A_GPU = ("nvidia-persistenced.service", "systemd-modules-load.service")
IMAGES = os.environ.get("IMAGES", "debian-12").split()


@dataclass(frozen=True)
class Installed:
    """An image as its package leaves it."""

    root: Path
    manifest: dict[str, Any]

    @property
    def file(self) -> Path:
        return self.root / str(self.manifest["path"]).lstrip("/")


Install = Callable[[str], Installed]
Boot = Callable[[str, str], Guest]


@pytest.fixture(scope="session")
def install(tmp_path_factory: pytest.TempPathFactory) -> Install:
    """Unpack the package of an image."""

    @functools.cache
    def of(name: str) -> Installed:
        found = sorted((TREE / "build/images").glob(f"dgx-kvm-image-{name}_*.deb"))
        if not found and not os.environ.get("CI"):
            pytest.skip(f"there is no package of {name}: run make images IMAGES={name}")
        root = tmp_path_factory.mktemp(name)
        subprocess.run(("dpkg-deb", "--extract", found[-1], root), check=True)
        manifest = root / f"usr/share/dgx-kvm/images.d/{name}.json"
        return Installed(root, json.loads(manifest.read_text()))

    return of


@pytest.fixture(scope="session")
def boot(install: Install, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boot]:
    """Guests by image and firmware; each is booted once and waited for."""
    with ExitStack() as stack:

        @functools.cache
        def of(name: str, firmware: str) -> Guest:
            folder = tmp_path_factory.mktemp(f"{name}-{firmware}")
            begin = time.monotonic()
            guest = stack.enter_context(booted(install(name).file, firmware, folder))
            guest.wait_for_first_boot()
            print(f"\n{name} by {firmware}: {time.monotonic() - begin:.0f} s to the first login")
            return guest

        yield of


@pytest.fixture(scope="module", params=IMAGES)
def name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=["bios", "uefi"])
def guest(request: pytest.FixtureRequest, name: str, boot: Boot) -> Guest:
    return boot(name, request.param)


@pytest.fixture
def firmware(request: pytest.FixtureRequest) -> str:
    firmware: str = request.node.callspec.params["guest"]
    return firmware


def test_it_is_what_its_manifest_says(name: str, install: Install) -> None:
    manifest = install(name).manifest
    about = json.loads(
        subprocess.run(
            ("qemu-img", "info", "--output=json", install(name).file),
            check=True,
            stdout=subprocess.PIPE,
        ).stdout
    )
    assert manifest["name"] == name
    assert manifest["size_bytes"] == install(name).file.stat().st_size
    assert (manifest["format"], manifest["virtual_size_bytes"]) == (
        about["format"],
        about["virtual-size"],
    )
    assert "backing-filename" not in about


def test_it_boots_by_this_firmware(guest: Guest, firmware: str) -> None:
    found = guest.ssh("[ -d /sys/firmware/efi ] && echo uefi || echo bios").strip()
    assert found == firmware


def test_cloud_init_has_done_all(guest: Guest) -> None:
    assert "status: done" in guest.ssh("cloud-init status --long")
    assert json.loads(guest.ssh("cat /run/cloud-init/result.json"))["v1"]["errors"] == []
    assert guest.ssh("hostname").strip() == "lab"
    assert "NoCloud" in guest.ssh("cat /run/cloud-init/result.json")


def test_no_unit_has_failed(guest: Guest, name: str, install: Install) -> None:
    failed = guest.ssh("systemctl --failed --no-legend --plain").splitlines()
    allowed = WANT_A_GPU if install(name).manifest["driver"] else ()
    assert [line for line in failed if not line.startswith(allowed)] == []


def test_root_fills_the_disk(guest: Guest) -> None:
    size = int(guest.ssh("df --output=size --block-size=1 / | tail -n 1"))
    assert size > (DISK_GIB - 1) << 30


def test_nothing_but_root_can_keep_it_from_booting(guest: Guest) -> None:
    mounts = [line.split() for line in guest.ssh("cat /etc/fstab").splitlines()]
    assert [place for _, place, _, options, *_ in mounts if "nofail" not in options] == ["/"]
    assert "vfat" in guest.ssh("findmnt /boot/efi")


def test_the_network_is_that_of_the_seed(guest: Guest) -> None:
    assert "10.0.2.15/24" in guest.ssh("ip -brief address show dev lan0")
    assert "default via 10.0.2.2" in guest.ssh("ip route")
    assert "10.0.2.3" in guest.ssh("resolvectl dns lan0")


def test_the_agent_answers(guest: Guest) -> None:
    assert guest.agent("guest-ping") == {}
    assert guest.agent("guest-get-host-name") == {"host-name": "lab"}


def test_the_console_shows_loader_kernel_and_login(guest: Guest) -> None:
    assert guest.ssh("systemctl is-active serial-getty@ttyS0.service").strip() == "active"
    assert "Linux version" in guest.console()
    assert "lab login:" in guest.console()


def test_the_console_has_its_login_however_slow_the_host(guest: Guest) -> None:
    shown = guest.ssh("systemctl show -p JobRunningTimeoutUSec dev-ttyS0.device")
    assert shown.strip() == "JobRunningTimeoutUSec=10min"


def test_nobody_has_a_password(guest: Guest) -> None:
    hashes = [line.split(":")[1] for line in guest.ssh("cat /etc/shadow").splitlines()]
    assert all(each.startswith(("!", "*")) for each in hashes)
    assert "passwordauthentication no" in guest.ssh("sshd -T")


def test_the_kernel_is_the_one_of_the_manifest(guest: Guest, name: str, install: Install) -> None:
    assert guest.ssh("uname -r").strip() == install(name).manifest["kernel"]
    driver = install(name).manifest["driver"]
    if driver:
        # Debian gives the modules of each branch another name.
        modules = guest.ssh("ls /lib/modules/$(uname -r)/updates/dkms/nvidia*").split()
        versions = {guest.ssh(f"modinfo -F version {module}").strip() for module in modules}
        assert versions - {""} == {driver}  # nvidia-peermem has none


def test_its_packages_are_those_of_its_list(guest: Guest, name: str, install: Install) -> None:
    listed = install(name).root / f"usr/share/doc/dgx-kvm-image-{name}/packages"
    found = guest.ssh('dpkg-query -W -f "\\${Package} \\${Version}\\n"')
    assert sorted(found.splitlines()) == listed.read_text().splitlines()
    assert "irqbalance" not in {line.split()[0] for line in found.splitlines()}


def test_each_cpu_has_a_queue_of_the_disk(guest: Guest) -> None:
    assert guest.ssh("cat /sys/block/vda/mq/*/cpu_list").split() == [str(n) for n in range(CPUS)]


def test_what_is_deleted_is_given_back_to_the_host(guest: Guest) -> None:
    assert "discard" in guest.ssh("findmnt -no OPTIONS /").strip().split(",")


def test_it_keeps_no_apt_settings_of_the_builder(guest: Guest) -> None:
    """What sources there are, cloud-init has written: the distribution's own."""
    assert "99mmdebstrap" not in guest.ssh("ls /etc/apt/apt.conf.d")
    assert "0000apt.sources" not in guest.ssh("ls /etc/apt/sources.list.d")


def test_two_guests_of_an_image_are_two_machines(name: str, boot: Boot) -> None:
    one, two = boot(name, "bios"), boot(name, "uefi")
    for file in ("/etc/machine-id", "/etc/ssh/ssh_host_ed25519_key.pub"):
        assert one.ssh(f"cat {file}").strip() not in ("", two.ssh(f"cat {file}").strip())


def test_it_can_update_its_own_boot_loader(guest: Guest) -> None:
    """What the first kernel update and a GRUB update in the guest run."""
    guest.ssh("update-grub", seconds=300)
    assert "root=UUID=" in guest.ssh("cat /boot/grub/grub.cfg")
    assert "console=ttyS0" in guest.ssh("cat /boot/grub/grub.cfg")
    guest.ssh("grub-install --target=i386-pc /dev/vda", seconds=300)
    guest.ssh(
        "grub-install --target=x86_64-efi --no-nvram --uefi-secure-boot --force-extra-removable",
        seconds=300,
    )
