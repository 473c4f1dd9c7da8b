"""VMs over the base of an image, on a real libvirt: shared, untouched, and never taken away."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from catalogues import describe

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.guest.images import BASES, Image
from dgx_kvm_sw.reconcile import POOL_PATH
from integration.claimed_host import ClaimedHost

pytestmark = pytest.mark.integration

PATH = "/usr/share/dgx-kvm/images/debian-12.qcow2"
VM = "name: {}, firmware: bios, image: debian-12"
OWNER = 4711  # of nobody that libvirt knows


def put_image(root: Root, version: str) -> Image:
    """Install or upgrade the image package: dpkg puts another file in place of the old one."""
    path = root.path(PATH)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".dpkg-new")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", new, "256M"], check=True)
    with new.open("ab") as stream:
        stream.write(version.encode())
    new.replace(path)
    return describe(root, "debian-12", PATH, version=version, virtual_size_bytes=256 << 20)


def look(file: Path) -> tuple[int, int, int, int, bytes]:
    found = file.stat()
    return (found.st_uid, found.st_gid, found.st_mode, found.st_mtime_ns, file.read_bytes())


def backing(claimed: ClaimedHost, name: str) -> str:
    with claimed.site.hypervisor() as hypervisor:
        (disk,) = (v for v in hypervisor.volumes(fresh=True) if v.name == f"{name}.os.qcow2")
        return disk.backing


def test_two_vms_share_a_base_that_libvirt_leaves_alone(claimed: ClaimedHost) -> None:
    claimed.reach()
    root = claimed.site.root
    image = put_image(root, "1")
    claimed.reach(VM.format("a") + ", state: stopped", VM.format("b") + ", state: stopped")
    base = root.path(image.base)
    os.chown(base, OWNER, OWNER)  # libvirt gives disks to QEMU's user, here root
    before = look(base)
    claimed.reach(VM.format("a"), VM.format("b"))
    assert set(claimed.libvirtd.virsh("list", "--name").split()) == {"a", "b"}
    assert look(base) == before
    assert root.path(f"{POOL_PATH}/a.os.qcow2").stat().st_uid == 0
    assert claimed.apply().done == 0
    assert f"<source file='{image.base}'" in claimed.libvirtd.virsh("dumpxml", "a")
    claimed.reach()
    assert look(base) == before


def test_a_base_without_that_word_would_change_hands(claimed: ClaimedHost) -> None:
    """Why the template says it: the same domain without the seclabel."""
    claimed.reach()
    root = claimed.site.root
    image = put_image(root, "1")
    claimed.reach(VM.format("a") + ", state: stopped")
    xml = claimed.libvirtd.virsh("dumpxml", "--inactive", "a")
    other = "".join(line for line in xml.splitlines(True) if "seclabel model='dac'" not in line)
    assert other != xml
    root.write("/run/other.xml", other)
    os.chown(root.path(image.base), OWNER, OWNER)
    claimed.libvirtd.inside("virsh", "define", "/run/other.xml")
    with claimed.site.hypervisor() as hypervisor:
        uuid = hypervisor.domain("a").uuid
        root.write(f"/run/dgx-kvm/prepared/{uuid}", "")
        hypervisor.start("a", uuid)
    assert root.path(image.base).stat().st_uid != OWNER
    claimed.reach()


def test_an_upgrade_of_the_image_is_for_new_vms(claimed: ClaimedHost) -> None:
    claimed.reach()
    root = claimed.site.root
    old = put_image(root, "1")
    claimed.reach(VM.format("a"))
    content = look(root.path(old.base))
    new = put_image(root, "2")
    assert not claimed.plan().pending
    assert claimed.plan().notes == ()
    claimed.reach(VM.format("a"), VM.format("b"))
    assert (backing(claimed, "a"), backing(claimed, "b")) == (old.base, new.base)
    assert look(root.path(old.base)) == content
    claimed.reach(VM.format("b"))
    assert not root.exists(old.base)
    assert root.exists(new.base)


def test_a_disk_that_somebody_made_by_hand_keeps_its_base(claimed: ClaimedHost) -> None:
    claimed.reach()
    root = claimed.site.root
    old = put_image(root, "1")
    claimed.reach(VM.format("a"))
    by_hand = f"{POOL_PATH}/mine.qcow2"
    lies_on = ("-F", "qcow2", "-b", old.base)
    claimed.libvirtd.inside("qemu-img", "create", "-q", "-f", "qcow2", *lies_on, by_hand)
    put_image(root, "2")
    claimed.reach()
    assert root.exists(old.base)
    root.remove(by_hand)
    claimed.reach(VM.format("a"))
    claimed.reach()
    assert not root.exists(old.base)
    assert [name for name in root.names(BASES) if name.startswith(".")] == []
