"""The package of an image: a real dpkg installs, upgrades and removes it below a root of its own.

The disks of VMs are made by the real qemu-img, under the names that dgx-kvm gives them.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.images import recipes
from tools.images.package import make_package

pytestmark = [
    pytest.mark.commands,
    pytest.mark.skipif(bool(os.geteuid()), reason="dpkg needs root"),
]

IMAGE = "debian-12"
PACKAGE = f"dgx-kvm-image-{IMAGE}"
VERSION = "12.20261122"
BASES = "/var/lib/dgx-kvm/bases"
BASE = f"{BASES}/{IMAGE}-0123456789ab.qcow2"
PACKAGED = f"/usr/share/dgx-kvm/images/{IMAGE}.qcow2"
DELETE = "dgx-kvm delete {vm} --delete-disks"
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
EPOCH = 1795305600  # a day in November 2026


def run(*command: str | Path) -> str:
    return subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ).stdout


def qcow2(path: Path, *options: str) -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, "1M")
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Packages by version, of an image that is as small as one can be."""

    def make(version: str = VERSION, name: str = IMAGE) -> Path:
        folder = tmp_path_factory.mktemp("package")
        disk = qcow2(folder / "image.qcow2")
        return make_package(image(name), facts(disk, version), disk, folder)

    return make


def image(name: str) -> recipes.Image:
    return dataclasses.replace(recipes.find(IMAGE), name=name)


def facts(disk: Path, version: str) -> dict[str, Any]:
    return {
        "version": version,
        "epoch": EPOCH,
        "kernel": "6.1.0-41-amd64",
        "driver": "",
        "packages": "apt 2.6\ndpkg 1.21\n",
        "sha256": hashlib.sha256(disk.read_bytes()).hexdigest(),
        "size_bytes": disk.stat().st_size,
        "virtual_size_bytes": 1 << 20,
    }


class Machine:
    """A root of its own for dpkg, which runs no chroot there, with disks of VMs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.disks = root / "var/lib/dgx-kvm/images"
        self.disks.mkdir(parents=True)
        (root / "var/lib/dpkg/updates").mkdir(parents=True)
        (root / "var/lib/dpkg/info").mkdir()
        (root / "var/lib/dpkg/status").touch()

    def dpkg(self, *arguments: str | Path, path: str = PATH) -> tuple[int, str]:
        done = subprocess.run(
            ("/usr/bin/dpkg", f"--root={self.root}", "--force-script-chrootless", *arguments),
            text=True,
            env={"PATH": path, "LC_ALL": "C"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        return done.returncode, done.stdout

    def disk(self, name: str, backing: str) -> None:
        qcow2(self.disks / name, "-u", "-b", backing, "-F", "qcow2")

    @property
    def has_image(self) -> bool:
        return (self.root / PACKAGED.lstrip("/")).exists()


@pytest.fixture
def machine(tmp_path: Path, package: Callable[..., Path]) -> Machine:
    """The image is installed, and no VM uses it."""
    machine = Machine(tmp_path / "root")
    code, said = machine.dpkg("--install", package())
    assert code == 0, said
    return machine


# -- What is in it ------------------------------------------------------------------------------


def test_manifest_describes_the_installed_file(machine: Machine) -> None:
    text = (machine.root / f"usr/share/dgx-kvm/images.d/{IMAGE}.json").read_text()
    manifest = json.loads(text)
    data = (machine.root / manifest["path"].lstrip("/")).read_bytes()
    assert manifest["sha256"] == hashlib.sha256(data).hexdigest()
    assert manifest["size_bytes"] == len(data)
    assert {
        "manifest": 1,
        "name": IMAGE,
        "version": VERSION,
        "path": PACKAGED,
        "format": "qcow2",
        "virtual_size_bytes": 1 << 20,
        "minimum_disk_mib": 1,
        "kernel": "6.1.0-41-amd64",
        "driver": "",
        "package": PACKAGE,
    }.items() <= manifest.items()


def test_the_documents_list_what_is_in_the_image(machine: Machine) -> None:
    folder = machine.root / "usr/share/doc" / PACKAGE
    assert (folder / "packages").read_text() == "apt 2.6\ndpkg 1.21\n"
    assert "Debian 12" in (folder / "copyright").read_text()
    changelog = gzip.decompress((folder / "changelog.gz").read_bytes()).decode()
    assert changelog.startswith(f"{PACKAGE} ({VERSION}) unstable")


def test_the_image_is_in_the_package_as_it_is(package: Callable[..., Path]) -> None:
    assert run("ar", "t", package()).split()[-1] == "data.tar"


def test_the_same_facts_make_the_same_package(tmp_path: Path) -> None:
    disk = qcow2(tmp_path / "image.qcow2")
    digests = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        deb = make_package(image(IMAGE), facts(disk, VERSION), disk, tmp_path / name)
        digests.add(hashlib.sha256(deb.read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.images
def test_lintian_finds_nothing(package: Callable[..., Path]) -> None:
    said = run("lintian", "--allow-root", "--pedantic", "-EvI", "--fail-on=none", package())
    assert [line for line in said.splitlines() if line[:3] in ("E: ", "W: ", "I: ", "P: ")] == []


# -- Removal ------------------------------------------------------------------------------------


def test_an_image_that_no_vm_uses_goes(machine: Machine) -> None:
    assert machine.dpkg("--remove", PACKAGE)[0] == 0
    assert not machine.has_image


@pytest.mark.parametrize("backing", [BASE, PACKAGED])
@pytest.mark.parametrize("action", ["--remove", "--purge"])
def test_an_image_that_a_vm_needs_stays(machine: Machine, backing: str, action: str) -> None:
    machine.disk("lab.os.qcow2", backing)
    machine.disk("hr.train.os.qcow2", backing)
    code, said = machine.dpkg(action, PACKAGE)
    assert code == 1
    assert f"{PACKAGE}: VMs have disks that need this image; nothing was removed" in said
    for vm in ("lab", "hr.train"):
        assert f"{vm}: {DELETE.format(vm=vm)}" in said
        assert f"{machine.disks}/{vm}.os.qcow2; where the VM is gone: " in said
        assert f"virsh vol-delete --pool dgx-kvm {vm}.os.qcow2\n" in said
    assert machine.has_image
    assert run("dpkg-query", f"--admindir={machine.root}/var/lib/dpkg", "-W", PACKAGE)


def test_it_goes_when_its_last_vm_has_gone(machine: Machine) -> None:
    machine.disk("lab.os.qcow2", BASE)
    assert machine.dpkg("--remove", PACKAGE)[0] == 1
    (machine.disks / "lab.os.qcow2").unlink()
    assert machine.dpkg("--remove", PACKAGE)[0] == 0


@pytest.mark.parametrize(
    "backing",
    [
        f"{BASES}/{IMAGE}-cuda-535-0123456789ab.qcow2",
        f"{BASES}/{IMAGE}-0123456789ab.qcow2.old",
        f"{BASES}/{IMAGE}-0123456789abcd.qcow2",
        f"{BASES}/other-0123456789ab.qcow2",
        "/usr/share/dgx-kvm/images/debian-13.qcow2",
    ],
)
def test_disks_of_other_images_do_not_hold_it(machine: Machine, backing: str) -> None:
    machine.disk("lab.os.qcow2", backing)
    assert machine.dpkg("--remove", PACKAGE)[0] == 0


def test_what_is_no_overlay_does_not_hold_it(machine: Machine) -> None:
    qcow2(machine.disks / "copy.os.qcow2")
    (machine.disks / "raw.os.qcow2").write_bytes(BASE.encode() * 10)
    (machine.disks / "empty.os.qcow2").touch()
    (machine.disks / "short.os.qcow2").write_bytes(b"QFI\xfb\0\0\0\3\0")
    (machine.disks / "mad.os.qcow2").write_bytes(b"QFI\xfb\0\0\0\3" + b"\xff" * 100)
    (machine.disks / "gone.os.qcow2").symlink_to("/nonexistent")
    code, said = machine.dpkg("--remove", PACKAGE)
    assert (code, said.count("\n")) == (0, 2), said  # two lines of dpkg's own


def test_a_machine_without_dgx_kvm_can_remove_it(machine: Machine) -> None:
    shutil.rmtree(machine.disks.parent)
    assert machine.dpkg("--remove", PACKAGE)[0] == 0


def test_no_more_than_essential_programs_are_needed(machine: Machine, tmp_path: Path) -> None:
    machine.disk("lab.os.qcow2", BASE)
    essential = tmp_path / "bin"
    essential.mkdir()
    for name in ("sh", "od", "tail", "head", "sort", "rm", "tar", "dpkg-deb", "dpkg-split"):
        (essential / name).symlink_to(str(shutil.which(name)))
    for name in ("start-stop-daemon", "ldconfig", "dpkg-query"):  # dpkg asks for them
        (essential / name).symlink_to("/bin/true")
    code, said = machine.dpkg("--force-bad-path", "--remove", PACKAGE, path=str(essential))
    assert code == 1
    assert DELETE.format(vm="lab") in said


# -- Upgrade ------------------------------------------------------------------------------------


def test_an_upgrade_is_never_refused(machine: Machine, package: Callable[..., Path]) -> None:
    machine.disk("lab.os.qcow2", BASE)
    code, said = machine.dpkg("--install", package("12.20261123"))
    assert code == 0, said
    assert machine.has_image


def test_an_upgrade_leaves_a_hard_linked_base_as_it_is(
    machine: Machine, package: Callable[..., Path]
) -> None:
    """So dgx-kvm adopts the file that the first overlay of an image is made on."""
    packaged = machine.root / PACKAGED.lstrip("/")
    base = machine.root / BASE.lstrip("/")
    base.parent.mkdir()
    base.hardlink_to(packaged)
    before = base.read_bytes()
    run("qemu-img", "resize", "-q", package("12.20261124").parent / "image.qcow2", "2M")
    newer = package("12.20261123")
    assert machine.dpkg("--install", newer)[0] == 0
    assert base.read_bytes() == before
    assert not packaged.samefile(base)
