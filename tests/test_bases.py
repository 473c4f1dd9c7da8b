"""Base files: verified, shared, never written; what overlays lie on is never taken away."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from catalogues import BYTES, add
from hosts import ALL, SimulatedHost

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.cli.progress import Interrupted, Report
from dgx_kvm_sw.execute import Event, Part, Stage, execute
from dgx_kvm_sw.guest import bases, checksums
from dgx_kvm_sw.guest.hypervisor import POOL, Hypervisor
from dgx_kvm_sw.guest.images import BASES, IMPORTED, MANIFESTS, catalogue
from dgx_kvm_sw.guest.simulated import SimulatedHypervisor
from dgx_kvm_sw.model.actions import CreateVolume, UndefineDomain
from dgx_kvm_sw.model.domain import Volume
from dgx_kvm_sw.model.errors import BadFileError, HostError, HypervisorError
from dgx_kvm_sw.reconcile import POOL_PATH, disks_now

pytestmark = pytest.mark.commands  # xorriso makes the seeds of VMs

TWO_FILE_SYSTEMS = pytest.mark.skipif(
    not os.path.ismount("/dev/shm"), reason="needs a second file system at /dev/shm"
)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


@pytest.fixture
def at(host: Callable[..., SimulatedHost]) -> SimulatedHost:
    return host("dgx-b200")


def on_another_file_system(root: Root, path: str) -> None:
    """Move a file to where no link leads; its old place is a link in name only."""
    folder = Path("/dev/shm") / f"dgx-kvm-test-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    file = root.path(path)
    shutil.move(file, folder / file.name)
    file.symlink_to(folder / file.name)


@pytest.fixture(autouse=True)
def _tidy() -> object:
    yield
    shutil.rmtree(f"/dev/shm/dgx-kvm-test-{os.getpid()}", ignore_errors=True)


def test_a_base_that_is_gone_is_told_by_whose_disks_lie_on_it(at: SimulatedHost) -> None:
    image = add(at.root, "debian-12")
    at.declare("name: a, gpus: 0, image: debian-12", "name: b, gpus: 0")
    at.settle()
    assert not any("is gone" in note for note in at.plan().notes)
    at.root.remove(image.base)
    (told,) = (note for note in at.plan().notes if "is gone" in note)
    assert told.startswith(f"the base {image.base} is gone, and disks of a lie on it (put that")


# -- adoption -----------------------------------------------------------------------------------


def test_a_base_is_a_link_that_nobody_may_write(root: Root) -> None:
    image = add(root, "debian-12")
    bases.adopt(root, image)
    base = root.path(image.base)
    assert base.samefile(root.path(image.path))
    found = base.stat()
    assert found.st_mode & 0o7777 == 0o444
    assert (found.st_uid, found.st_gid) in {(0, 0), (os.geteuid(), os.getegid())}
    assert root.names(BASES) == [base.name]
    assert root.path(BASES).stat().st_mode & 0o7777 == 0o755


def test_an_upgrade_of_the_package_leaves_the_base_as_it_is(root: Root) -> None:
    old = add(root, "debian-12", b"old system\n", version="1")
    bases.adopt(root, old)
    new = add(root, "debian-12", b"new system\n", version="2")  # as dpkg: another file
    bases.adopt(root, new)
    assert root.path(old.base).read_bytes() == b"old system\n"
    assert root.path(new.base).read_bytes() == b"new system\n"


@TWO_FILE_SYSTEMS
def test_from_another_file_system_it_is_a_copy(root: Root) -> None:
    content = bytes(8 << 20) + BYTES + bytes(5 << 20)
    image = add(root, "debian-12", content)
    on_another_file_system(root, image.path)
    bases.adopt(root, image)
    base = root.path(image.base)
    assert base.read_bytes() == content
    assert base.stat().st_blocks * 512 < 8 << 20, "its holes were not kept"
    assert base.stat().st_mode & 0o7777 == 0o444


@TWO_FILE_SYSTEMS
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_damaged_file_becomes_no_base_and_is_known_from_then_on(
    root: Root, elsewhere: bool
) -> None:
    image = add(root, "debian-12")
    root.path(image.path).write_bytes(BYTES[::-1])
    if elsewhere:
        on_another_file_system(root, image.path)
    with pytest.raises(HostError, match="of image debian-12 1.0 is damaged: its sha256") as raised:
        bases.adopt(root, image)
    assert raised.value.hint == "apt install --reinstall dgx-kvm-image-debian-12"
    assert root.names(BASES) == []
    assert catalogue(root).faults["debian-12"].state == "hash mismatch"


def test_a_file_is_read_once(root: Root) -> None:
    image = add(root, "debian-12", bytes(9 << 20))
    seen: list[tuple[int, int]] = []
    bases.adopt(root, image, lambda done, total: seen.append((done, total)))
    assert seen[0] == (checksums.CHUNK, 9 << 20)
    root.path(image.base).unlink()
    bases.adopt(root, image, lambda done, total: pytest.fail("read again"))
    os.utime(root.path(image.path), ns=(0, 0))  # somebody was at it
    root.path(image.base).unlink()
    seen.clear()
    bases.adopt(root, image, lambda done, total: seen.append((done, total)))
    assert seen


def test_a_base_that_somebody_has_changed_is_not_used(root: Root) -> None:
    image = add(root, "debian-12")
    bases.adopt(root, image)
    base = root.path(image.base)
    base.unlink()
    base.write_bytes(BYTES + b"more")
    with pytest.raises(HostError, match=f"has {len(BYTES) + 4} bytes instead of {len(BYTES)}"):
        bases.adopt(root, image)


@TWO_FILE_SYSTEMS
def test_a_copy_that_does_not_fit_is_not_begun(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    image = add(root, "debian-12")
    on_another_file_system(root, image.path)
    monkeypatch.setattr(bases, "_SPARE_BYTES", 1 << 60)  # no disk has this much room
    with pytest.raises(HostError, match=r"does not fit in .*bases: it needs \d+ MiB, \d+ MiB"):
        bases.adopt(root, image)
    assert root.names(BASES) == []


@TWO_FILE_SYSTEMS
@pytest.mark.parametrize(
    ("linked", "free", "refused"),
    [(False, 30, ["a", "b"]), (False, 70, []), (True, 30, [])],
)
def test_a_copy_that_does_not_fit_is_found_by_the_plan_and_counted_once(
    at: SimulatedHost, linked: bool, free: int, refused: list[str]
) -> None:
    image = add(at.root, "debian-12")
    if not linked:
        on_another_file_system(at.root, image.path)
    at.root.write("/libvirt/space", f"999999 {free}")
    at.declare(*(f"name: {vm}, gpus: 0, image: debian-12" for vm in "ab"), "name: c, gpus: 0")
    plan = at.plan()
    assert [each.vm for each in plan.unplaceable] == refused
    assert all(
        "of the storage pool, which has 30 MiB free" in each.reasons[0] for each in plan.unplaceable
    )
    assert "c" in {action.vm for action in plan.actions}


def test_what_a_killed_adoption_has_left_is_in_nobodys_way(root: Root) -> None:
    image = add(root, "debian-12")
    left_over = root.path(image.base).with_name(f".adopting-{Path(image.base).name}")
    root.write(f"{BASES}/{left_over.name}", "half")
    bases.adopt(root, image)
    assert root.path(image.base).read_bytes() == BYTES
    assert not left_over.exists()


def test_an_interruption_while_an_image_is_read_leaves_nothing(root: Root) -> None:
    image = add(root, "debian-12", bytes(9 << 20))
    action = CreateVolume("a", Volume("a.os.qcow2", "/a.os.qcow2", 1024, "qcow2", image.base))
    report = Report((action,), 0)
    report.signal = signal.SIGINT
    reading = Event(Stage.UNDER_WAY, action, part=Part("reading", 4, 9))
    with pytest.raises(Interrupted):
        bases.adopt(root, image, lambda done, total: report(reading))
    assert root.names(BASES) == []


# -- removal ------------------------------------------------------------------------------------


def test_only_bases_that_nothing_needs_are_removed(root: Root) -> None:
    old = add(root, "debian-12", b"old", version="1")
    bases.adopt(root, old)
    used = add(root, "debian-12", b"used", version="2")
    bases.adopt(root, used)
    current = add(root, "debian-12", b"current", version="3")
    bases.adopt(root, current)
    mine = add(root, "mine", folder=IMPORTED)
    root.write(f"{BASES}/somebody-elses.qcow2", "x")
    root.write(f"{BASES}/.adopting-x", "x")
    removed = bases.remove_unneeded(root, {used.base})
    assert set(removed) == {old.base, f"{BASES}/.adopting-x"}
    left = {f"{BASES}/{name}" for name in root.names(BASES)}
    assert left == {used.base, current.base, mine.base, f"{BASES}/somebody-elses.qcow2"}


def test_an_older_import_stays_while_its_manifest_does(root: Root) -> None:
    mine = add(root, "debian-12", b"mine", folder=IMPORTED, version="1")
    add(root, "debian-12", b"packaged", version="2")
    assert bases.remove_unneeded(root, ()) == ()
    assert root.exists(mine.path)


def test_with_a_manifest_that_cannot_be_read_nothing_is_removed(root: Root) -> None:
    mine = add(root, "mine", folder=IMPORTED)
    root.write(mine.manifest, "{")
    assert bases.remove_unneeded(root, ()) == ()
    assert root.exists(mine.path)


# -- with VMs -----------------------------------------------------------------------------------


def backings(at: SimulatedHost) -> dict[str, str]:
    return {volume.name: volume.backing for volume in at.state().volumes}


def test_an_os_disk_lies_over_a_base_of_its_image(at: SimulatedHost) -> None:
    image = add(at.root, "debian-12")
    at.declare("name: a, gpus: 0, image: debian-12, disks: [{name: data, size: 1GiB}]")
    assert at.plan().notes == ("a: nobody can log in; give it ssh_keys in the file",)
    assert not at.root.exists(BASES), "a plan makes nothing"
    at.settle()
    assert backings(at) == {"a.os.qcow2": image.base, "a.data.qcow2": ""}
    os_disk, data, seed = at.domain("a").facts.disks
    assert (os_disk.backing, os_disk.backing_format) == (image.base, "qcow2")
    assert (data.backing, seed.backing) == ("", "")
    assert at.root.path(image.base).read_bytes() == BYTES
    assert at.apply().done == 0


def test_with_the_pool_off_no_disk_is_deleted_silently_and_no_base_goes(at: SimulatedHost) -> None:
    image = add(at.root, "debian-12")
    at.declare("name: a, gpus: 0, image: debian-12, state: stopped")
    at.settle()
    add(at.root, "debian-12", b"newer", version="2")
    at.plan()
    facts = at.domain("a").facts
    with at.hypervisor() as hypervisor:
        pool = hypervisor._connection.storagePoolLookupByName(POOL)
        pool.destroy()
        disks = (facts.disks[0].path,)
        gone = (UndefineDomain("a", facts.uuid, disks),)
        ((_, error),) = execute(at.site, hypervisor, at.situation.platform, gone, {}, {}).failures
        assert "the storage pool dgx-kvm is not active" in error.message
        assert hypervisor.domain("a").name == "a"
    assert at.root.exists(image.base)


def test_disks_that_libvirt_does_not_know_keep_their_bases(at: SimulatedHost) -> None:
    """As when its definition of the pool is lost."""
    at.root.write(f"{POOL_PATH}/kept.os.qcow2", "x")
    unknown = pytest.raises(HypervisorError, match="libvirt does not know the disks in")
    with at.hypervisor() as hypervisor, unknown:
        disks_now(at.site, hypervisor)


def test_a_copy_of_an_image_that_cannot_be_measured_refuses_its_vm_only(
    at: SimulatedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the real qemu-img, which says what it thinks of a file that is no qcow2."""
    add(at.root, "debian-12")
    monkeypatch.setattr(SimulatedHypervisor, "copy_mib", Hypervisor.copy_mib)
    copy = "name: a, gpus: 0, image: debian-12, os_disk: {size: 4GiB, from: copy}"
    at.declare(copy, "name: b, gpus: 0")
    (refused,) = at.plan().unplaceable
    assert refused.vm == "a"
    assert "qemu-img measure fails" in refused.reasons[0]
    assert refused.remedies == ("dgx-kvm image verify debian-12",)
    at.settle()
    assert at.domain("b").running


def test_an_image_that_is_gone_hinders_only_vms_that_have_no_disk_yet(at: SimulatedHost) -> None:
    image = add(at.root, "debian-12")
    add(at.root, "debian-13")
    at.declare("name: a, gpus: 0, image: debian-12")
    at.settle()
    at.root.remove(image.manifest)
    at.by_hand("a", lambda domain: domain.destroy())
    at.declare("name: a, gpus: 0, image: debian-12", "name: b, gpus: 0, image: debian-12")
    (refused,) = at.plan().unplaceable
    assert (refused.vm, refused.reasons) == ("b", ("there is no image 'debian-12'",))
    assert refused.remedies == ("did you mean `debian-13`?",)
    assert not any("made from" in note for note in at.plan().notes)
    at.settle()
    assert at.domain("a").running
    with pytest.raises(BadFileError, match="there is no image 'debian-12'"):
        at.site.load_spec(catalogue(at.root))


def test_libvirt_is_told_to_leave_the_owner_of_a_base_alone(at: SimulatedHost) -> None:
    image = add(at.root, "debian-12")
    at.declare("name: a, gpus: 0, image: debian-12")
    at.settle()
    with at.hypervisor() as hypervisor:
        xml = hypervisor.domain("a").inactive
    _, _, rest = xml.partition(f"<source file='{image.base}'>")
    assert rest.lstrip().startswith("<seclabel model='dac' relabel='no'/>")


def test_a_newer_image_is_for_new_disks_and_no_news(at: SimulatedHost) -> None:
    old = add(at.root, "debian-12", b"old", version="1")
    at.declare("name: a, gpus: 0, image: debian-12")
    at.settle()
    new = add(at.root, "debian-12", b"new", version="2")
    assert not at.plan().pending
    assert at.plan().notes == ()
    at.declare("name: a, gpus: 0, image: debian-12", "name: b, gpus: 0, image: debian-12")
    at.settle()
    assert backings(at) == {"a.os.qcow2": old.base, "b.os.qcow2": new.base}
    assert not at.plan().pending


def test_a_disk_over_another_base_than_its_definition_says_is_not_started(
    at: SimulatedHost,
) -> None:
    """As when the disk of an earlier VM of this name is put back."""
    old = add(at.root, "debian-12", b"old", version="1")
    at.declare("name: a, gpus: 0, image: debian-12, state: stopped")
    at.settle()
    earlier = f"{BASES}/debian-12-0123456789ab.qcow2"
    saved = at.root.read("/libvirt/volumes/a.os.qcow2")
    at.root.write("/libvirt/volumes/a.os.qcow2", saved.replace(old.base, earlier))
    at.plan()
    with at.hypervisor() as hypervisor:
        starting, platform = at.situation.start_actions("a"), at.situation.platform
        ((_, error),) = execute(at.site, hypervisor, platform, starting, {}, {}).failures
    assert f"a.os.qcow2 lies over {earlier}, its definition says {old.base}" in error.message
    assert not at.domain("a").running
    at.declare("name: a, gpus: 0, image: debian-12")
    at.settle()
    assert at.domain("a").running
    assert at.domain("a").facts.disks[0].backing == earlier


def test_another_image_in_the_file_changes_no_disk(at: SimulatedHost) -> None:
    image = add(at.root, "debian-12")
    add(at.root, "debian-13", b"newer")
    at.declare("name: a, gpus: 0, image: debian-12")
    at.settle()
    for said, other in (("image: debian-13, ", "debian-13"), ("", "independent")):
        at.declare(f"name: a, {said}gpus: 0")
        plan = at.plan()
        (note,) = (note for note in plan.notes if "first boot settings" not in note)
        assert "disk a.os.qcow2 was made from debian-12, the file says " + other in note
        assert not plan.pending
    assert backings(at) == {"a.os.qcow2": image.base}


def test_a_copy_stays_independent_of_its_image(at: SimulatedHost) -> None:
    add(at.root, "debian-12")
    vm = "name: a, state: stopped, gpus: 0, image: debian-12"
    at.declare(f"{vm}, os_disk: {{from: copy}}")
    at.settle()
    assert at.plan().notes == ()
    at.declare(vm)
    (note,) = at.plan().notes
    assert "is independent of any image, the file says an overlay on debian-12" in note
    assert at.plan().actions == ()


def test_a_base_goes_with_the_last_disk_on_it(at: SimulatedHost) -> None:
    old = add(at.root, "debian-12", b"old", version="1")
    at.declare("name: a, gpus: 0, image: debian-12", "name: b, gpus: 0, image: debian-12")
    at.settle()
    new = add(at.root, "debian-12", b"new", version="2")
    at.declare("name: b, gpus: 0, image: debian-12")
    at.settle(ALL)
    assert at.root.exists(old.base), "b lies on it"
    at.declare("name: c, gpus: 0, image: debian-12")
    at.settle(ALL)
    assert not at.root.exists(old.base)
    assert at.root.exists(new.base)


def test_the_pool_goes_with_the_last_disk(at: SimulatedHost) -> None:
    """Or libvirt would keep its definition when the package has gone."""
    at.declare("name: a, gpus: 0", "name: b, gpus: 0")
    at.settle()
    at.declare("name: b, gpus: 0")
    at.settle(ALL)
    assert at.root.exists("/libvirt/pool")
    at.declare()
    at.settle(ALL)
    assert not at.root.exists("/libvirt/pool")
    at.declare("name: a, gpus: 0")
    at.settle()
    assert at.root.exists("/libvirt/pool")


def test_a_disk_that_is_kept_keeps_its_base(at: SimulatedHost) -> None:
    old = add(at.root, "debian-12", b"old", version="1")
    at.declare("name: a, gpus: 0, image: debian-12", "name: b, gpus: 0")
    at.settle()
    add(at.root, "debian-12", b"new", version="2")
    at.declare("name: b, gpus: 0")
    at.settle(type(ALL)(restart=True, prune=True))
    at.declare()
    at.settle(ALL)
    assert backings(at) == {"a.os.qcow2": old.base}
    assert at.root.exists(old.base)


@pytest.mark.parametrize("damage", ["missing", "truncated", "bad manifest"])
def test_a_vm_whose_image_cannot_be_used_is_refused_alone(at: SimulatedHost, damage: str) -> None:
    good = add(at.root, "debian-12")
    bad = add(at.root, "debian-13", b"newer")
    path = at.root.path(bad.path)
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(b"new")
    else:
        at.root.write(f"{MANIFESTS}/debian-13.json", "{")
    at.declare("name: a, gpus: 0, image: debian-12", "name: b, gpus: 0, image: debian-13")
    plan = at.plan()
    (refused,) = plan.unplaceable
    assert refused.vm == "b"
    assert "debian-13" in refused.reasons[0]
    assert refused.remedies[0]
    at.settle()
    assert backings(at) == {"a.os.qcow2": good.base}


def test_a_disk_that_is_there_needs_its_image_no_more(at: SimulatedHost) -> None:
    image = add(at.root, "debian-12")
    at.declare("name: a, gpus: 0, image: debian-12")
    at.settle()
    at.root.path(image.path).unlink()
    assert not at.plan().pending
    at.root.write(image.manifest, "{")
    assert not at.plan().pending
    at.by_hand("a", lambda domain: domain.destroy())
    at.settle()
    assert at.domain("a").running


def test_a_vm_too_small_for_its_image_is_refused(at: SimulatedHost) -> None:
    add(at.root, "debian-12", virtual_size_bytes=20 << 30)
    at.declare("name: a, gpus: 0, image: debian-12, os_disk: 10GiB")
    (refused,) = at.plan().unplaceable
    assert "disk a.os.qcow2 has 10 GiB, image debian-12 1.0 needs 20480 MiB" in refused.reasons[0]
    assert refused.remedies == ("give the VM an os_disk of 20GiB or more",)


def test_a_damaged_image_fails_its_vm_before_any_disk_is_made(at: SimulatedHost) -> None:
    image = add(at.root, "debian-12")
    at.root.path(image.path).write_bytes(BYTES[::-1])  # as long as it has to be
    at.declare("name: a, gpus: 0, image: debian-12", "name: b, gpus: 0")
    ((action, error),) = at.apply().failures
    assert action.vm == "a"
    assert "is damaged" in error.message
    assert list(backings(at)) == ["b.os.qcow2"]
    assert at.state().domain("a") is None
    (refused,) = at.plan().unplaceable  # from now on it is known before
    assert refused.vm == "a"


def test_the_reading_of_an_image_is_told(at: SimulatedHost) -> None:
    add(at.root, "debian-12", bytes(9 << 20))
    at.declare("name: a, gpus: 0, image: debian-12")
    events: list[Event] = []
    at.apply(report=events.append)
    (told,) = [event.part for event in events if event.stage is Stage.UNDER_WAY]
    assert told == Part("reading debian-12 1.0", checksums.CHUNK, 9 << 20)


def test_an_image_that_cannot_be_in_the_catalogue_is_a_mistake_in_the_file(
    at: SimulatedHost,
) -> None:
    at.declare("name: a, gpus: 0, image: debian-12")
    with pytest.raises(BadFileError, match="there is no image 'debian-12'"):
        at.site.load_spec(catalogue(at.root))


def test_bad_manifests_are_news_in_the_plan(at: SimulatedHost) -> None:
    at.root.write(f"{MANIFESTS}/bad.json", "{")
    assert "bad.json is not an image manifest" in at.plan().notes[0]
