"""Disks: kinds, room for them, and LVM by its real tools, as far as this machine has it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hosts import ALL, SimulatedHost

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.decide import storage
from dgx_kvm_sw.guest import copies, lvm
from dgx_kvm_sw.host import diskio
from dgx_kvm_sw.model.domain import CurrentState, Space, Volume
from dgx_kvm_sw.model.errors import HostError

Host = Callable[..., SimulatedHost]
LV = "name: a, gpus: 0, disks: [{name: d, size: 1TiB, lvm: data}]"


@pytest.fixture
def at(host: Host) -> SimulatedHost:
    return host("dgx-h100")


def test_a_logical_volume_is_a_block_device_and_stays_with_its_data(at: SimulatedHost) -> None:
    at.declare(LV)
    at.settle()
    disk = at.domain("a").facts.disks[1]
    assert (disk.path, disk.block, disk.discard) == ("/dev/data/dgx-kvm.a.d", True, "unmap")
    at.declare()
    (row,) = at.plan(ALL).vms
    assert "/dev/data/dgx-kvm.a.d" in row.changes[1].old
    at.settle(ALL)
    assert at.state().volumes == ()


def test_a_disk_that_is_there_stays_what_it_is(at: SimulatedHost) -> None:
    vm = "name: a, gpus: 0, state: stopped, disks: [{name: d, size: 1GiB%s}]"
    at.declare(vm % "")
    at.settle()
    at.declare(vm % ", format: raw")
    plan = at.plan()
    assert plan.actions == ()
    assert "a.d.qcow2 stays what it is; the file says raw on the pool" in plan.notes[0]


@pytest.mark.parametrize(
    ("disk", "reason"),
    [
        ("format: raw", "need 2 GiB of the storage pool, which has 1 GiB free"),
        ("lvm: data, size: 9TiB", "need 9216 GiB of volume group data, which has 4096 GiB free"),
        ("lvm: other", "there is no LVM volume group other on this host"),
    ],
)
def test_what_has_no_room_is_refused_before_anything(
    at: SimulatedHost, disk: str, reason: str
) -> None:
    at.root.write("/libvirt/space", "999999 1025")
    size = "" if "size" in disk else "size: 2GiB, "
    at.declare(f"name: a, gpus: 0, disks: [{{name: d, {size}{disk}}}]", "name: b, gpus: 0")
    plan = at.plan()
    assert [(r.vm, reason in r.reasons[0]) for r in plan.unplaceable] == [("a", True)]
    assert {action.vm for action in plan.actions} == {"b"}


@pytest.mark.parametrize(("free", "refused"), [(450, ["a", "c"]), (500, ["b"]), (901, [])])
def test_bases_on_a_file_system_of_their_own_need_room_there(free: int, refused: list[str]) -> None:
    """A base that two VMs lie on is made once, and not for one that is refused."""
    bases = {"a": "/bases/x", "b": "/bases/y", "c": "/bases/x"}
    wanted = {
        vm: (Volume(f"{vm}.qcow2", f"/pool/{vm}.qcow2", 1024, "qcow2", base),)
        for vm, base in bases.items()
    }
    copying = storage.Copying({"/bases/x": 500, "/bases/y": 401}, free)
    found = [*storage.refusals(wanted, CurrentState((), ()), Space(9, 9), {}, copying)]
    assert [each.vm for each in found] == refused
    assert all("MiB of the file system of the bases, which has" in r.reasons[0] for r in found)


def test_a_simulated_pool_has_the_room_that_it_says(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 0, disks: [{name: db, size: 200GiB, format: raw}]")
    at.settle()
    assert not at.plan().pending


def test_more_promises_than_room_are_a_note(at: SimulatedHost) -> None:
    at.root.write("/libvirt/space", f"{60 * 1024} {60 * 1024}")
    at.declare("name: a, gpus: 0, os_disk: 40GiB", "name: b, gpus: 0, os_disk: 40GiB")
    plan = at.plan()
    assert not plan.unplaceable
    assert "may grow to 80 GiB together" in plan.notes[0]


def test_io_uring_only_where_the_kernel_lets_qemu(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.write("/proc/sys/kernel/io_uring_disabled", "1\n")
    assert diskio.disk_io(root) == "native"


@pytest.mark.commands
def test_a_qemu_without_io_uring_is_found_by_asking_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in is qemu-img as built without liburing, which does not know the word."""
    program = tmp_path / "bin/qemu-img"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *io_uring*) exit 1;; esac\nexec {shutil.which("qemu-img")} "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    root = Root(tmp_path)
    assert diskio.disk_io(root) == "native"
    assert root.read("/run/dgx-kvm/disk-io").endswith(" native")


@pytest.mark.commands
def test_a_copy_says_what_it_needs_and_replaces_nothing(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "64M"], check=True)
    path = tmp_path / "a.os.qcow2"
    volume = Volume(path.name, str(path), 128, "qcow2", source=str(image), source_format="qcow2")
    assert copies.needed_mib(volume) >= 1
    path.write_text("somebody's data")
    copies.make(volume)
    assert path.read_text() == "somebody's data"


@pytest.mark.commands
def test_the_progress_of_a_copy_is_told_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By qemu-img, slowed down at the end of what it says."""
    image = tmp_path / "image.raw"
    image.write_bytes(os.urandom(1 << 20) * 8)
    program = tmp_path / "bin/qemu-img"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\n{shutil.which("qemu-img")} "$@" || exit\n'
        'case "$1" in convert) sleep 0.7;; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    path = tmp_path / "a.os.qcow2"
    volume = Volume(path.name, str(path), 16, "qcow2", source=str(image), source_format="raw")
    told: list[tuple[int, int]] = []
    copies.make(volume, lambda done, total: told.append((done, total)))
    total = copies.needed_mib(volume) << 20
    assert told[-1] == (total, total)
    assert 8 << 20 <= total <= 10 << 20


# -- LVM ------------------------------------------------------------------------------------------
# The real tools on a loop device, their metadata only: `activation = 0`, as a machine without a
# device mapper has no other. What would write to the device is a stand-in that tells of its call.

LVM_CONF = """\
activation { monitoring = 0 }
devices { dir = "/dev" use_devicesfile = 0 filter = [ "a|^%s$|", "r|.*|" ] scan = [ "/dev" ] }
backup { backup = 0 archive = 0 }
global { activation = 0 use_lvmpolld = 0 locking_dir = "%s" }
"""


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if os.geteuid() or not shutil.which("lvcreate", path="/usr/sbin"):
        pytest.skip("needs root and lvm2")
    image = tmp_path / "drive"
    image.write_bytes(b"")
    os.truncate(image, 100 << 20)
    made = subprocess.run(
        ["losetup", "--find", "--show", image], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"needs loop devices: {made.stderr}")
    device = made.stdout.strip()
    (tmp_path / "lvm.conf").write_text(LVM_CONF % (device, tmp_path))
    wiper = tmp_path / "bin/blkdiscard"
    wiper.parent.mkdir()
    wiper.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/wiped\n[ ! -e {tmp_path}/fail ]\n')
    wiper.chmod(0o755)
    monkeypatch.setenv("LVM_SYSTEM_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", f"{wiper.parent}:/usr/sbin:/usr/bin:/sbin:/bin")
    name = f"test{os.getpid()}"
    try:
        subprocess.run(["vgcreate", "-q", name, device], check=True, capture_output=True)
        yield name
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def logical(group: str, size: int = 10) -> Volume:
    name = "dgx-kvm.a.data"
    return Volume(name, f"/dev/{group}/{name}", size, "raw", group=group)


@pytest.mark.commands
def test_a_logical_volume_is_made_zeroed_and_removed(group: str, tmp_path: Path) -> None:
    volume = logical(group)
    lvm.create(volume)
    wiped = (tmp_path / "wiped").read_text()
    assert wiped == f"--force --zeroout --offset 0 {volume.path}.part\n"  # before it has its name
    groups, volumes = lvm.read()
    assert [(v.path, v.capacity_mib) for v in volumes] == [(volume.path, 12)]  # whole extents
    assert [(g.name, g.extent_mib, g.free_mib, g.foreign) for g in groups] == [(group, 4, 84, ())]
    lvm.create(volume)  # done already
    lvm.remove(volume.path)
    assert lvm.read()[1] == ()


@pytest.mark.commands
def test_a_logical_volume_is_zeroed_piece_by_piece_to_its_end(
    group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lvm, "_PIECE_BYTES", 4 << 20)
    told: list[tuple[int, int]] = []
    volume = logical(group)
    lvm.create(volume, lambda done, total: told.append((done >> 20, total >> 20)))
    assert told == [(0, 10), (4, 10), (8, 10)]
    assert (tmp_path / "wiped").read_text().splitlines() == [
        f"--force --zeroout --offset {0} --length {4 << 20} {volume.path}.part",
        f"--force --zeroout --offset {4 << 20} --length {4 << 20} {volume.path}.part",
        f"--force --zeroout --offset {8 << 20} {volume.path}.part",  # LVM has made it 12 MiB
    ]


@pytest.mark.commands
def test_one_that_was_cut_off_is_not_taken_for_finished(group: str, tmp_path: Path) -> None:
    (tmp_path / "fail").touch()
    with pytest.raises(HostError, match="blkdiscard refuses"):
        lvm.create(logical(group))
    assert lvm.read()[1] == ()
    (tmp_path / "fail").unlink()
    lvm.create(logical(group))
    groups, volumes = lvm.read()
    assert (len(volumes), groups[0].free_mib) == (1, 84)  # the leftover is gone


@pytest.mark.commands
def test_a_foreign_logical_volume_is_never_touched(group: str) -> None:
    volume = logical(group)
    subprocess.run(
        ["lvcreate", "-qq", "-an", "-Zn", "-Wn", "-L8m", "-n", volume.name, group], check=True
    )
    groups, volumes = lvm.read()
    assert (groups[0].foreign, volumes) == ((volume.name,), ())
    with pytest.raises(HostError, match="not a logical volume that dgx-kvm made"):
        lvm.remove(volume.path)
    with pytest.raises(HostError, match="lvrename refuses"):
        lvm.create(volume)
    assert lvm.read()[0][0].foreign == (volume.name,)
