"""What a purge of the package does with disks and with what they lie on, run by sh on a root."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.commands

POSTRM = Path(__file__).parents[1] / "debian/dgx-kvm-sw.postrm"
IMPORT, ADOPTED = "mine-0123456789ab.qcow2", "debian-12-ba9876543210.qcow2"
UNIT = "etc/systemd/system/var-lib-dgx\\x2dkvm-images.mount"
DOMAIN = "etc/libvirt/qemu/a.xml"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host with an import, a base that was adopted, and an empty folder for disks."""
    for name, text in (
        (f"bases/{IMPORT}", "mine"),
        (f"bases/{ADOPTED}", "debian"),
        ("images.d/mine.json", json.dumps({"path": f"/var/lib/dgx-kvm/bases/{IMPORT}"})),
    ):
        write(tmp_path, f"var/lib/dgx-kvm/{name}", text)
    (tmp_path / "var/lib/dgx-kvm/images").mkdir()
    return tmp_path


def write(root: Path, name: str, text: str = "") -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def link(root: Path) -> None:
    images = root / "var/lib/dgx-kvm/images"
    images.rmdir()
    images.symlink_to("/nonexistent/vms")


def purge(root: Path, *wrapper: str) -> str:
    done = subprocess.run(
        [*wrapper, "sh", POSTRM, "purge"],
        env={"DPKG_ROOT": str(root), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    return done.stderr


def bases(root: Path) -> set[str]:
    return {file.name for file in (root / "var/lib/dgx-kvm/bases").iterdir()}


def test_without_a_disk_only_imports_stay(root: Path) -> None:
    write(root, "etc/fstab", "/dev/sda1 / ext4 defaults 0 1\n")
    write(root, DOMAIN, "<source file='/srv/others.qcow2'/>")
    said = purge(root)
    assert bases(root) == {IMPORT}
    assert not (root / "var/lib/dgx-kvm/images").exists()
    assert "imported images stay in" in said
    assert "disks" not in said


def test_nothing_at_all_stays_of_a_host_without_disks_and_imports(root: Path) -> None:
    (root / "var/lib/dgx-kvm/images.d/mine.json").unlink()
    assert purge(root) == ""
    assert not (root / "var/lib/dgx-kvm").exists()


@pytest.mark.parametrize(
    "disks",
    [
        pytest.param(lambda r: write(r, "var/lib/dgx-kvm/images/a.os.qcow2"), id="a disk"),
        pytest.param(link, id="a link to what is not mounted"),
        pytest.param(
            lambda r: write(r, "etc/fstab", "UUID=1\t/var/lib/dgx-kvm/images\text4 nofail 0 2\n"),
            id="a file system that is not mounted",
        ),
        pytest.param(lambda r: write(r, UNIT), id="a unit that is not mounted"),
        pytest.param(
            lambda r: write(r, DOMAIN, "<source file='/var/lib/dgx-kvm/images/a.os.qcow2'/>"),
            id="a VM that libvirt knows",
        ),
    ],
)
def test_bases_stay_where_disks_may_lie_on_them(root: Path, disks: Callable[[Path], None]) -> None:
    disks(root)
    said = purge(root)
    assert bases(root) == {IMPORT, ADOPTED}
    assert f"and in {root}/var/lib/dgx-kvm/bases what they lie on" in said


def test_bases_stay_where_disks_are_elsewhere_and_the_folder_is_gone(root: Path) -> None:
    (root / "var/lib/dgx-kvm/images").rmdir()
    write(root, DOMAIN, f"<backingStore><source file='/var/lib/dgx-kvm/bases/{ADOPTED}'/>")
    said = purge(root)
    assert bases(root) == {IMPORT, ADOPTED}
    assert f"what these lie on stays in {root}/var/lib/dgx-kvm/bases" in said


def test_bases_stay_below_an_empty_mount(root: Path) -> None:
    """One that is on another disk than its VMs: a mount of the same file system is one, too."""
    (root / "other").mkdir()
    script = 'mount --bind "$DPKG_ROOT/other" "$DPKG_ROOT/var/lib/dgx-kvm/images" && exec "$@"'
    wrapper = ("unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh")
    purge(root, *wrapper)
    assert bases(root) == {IMPORT, ADOPTED}
