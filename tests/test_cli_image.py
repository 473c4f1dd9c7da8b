"""`dgx-kvm image`: what is there, what is wrong with it, who needs it, and who is told."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from catalogues import BYTES, add
from commandline import Host, Result

from dgx_kvm_sw.access.hooks import HOOKS
from dgx_kvm_sw.cli.bar import drawn
from dgx_kvm_sw.cli.output import size
from dgx_kvm_sw.execute import JOURNAL
from dgx_kvm_sw.guest import bases
from dgx_kvm_sw.guest.checksums import REMEMBERED
from dgx_kvm_sw.guest.images import BASES, IMPORTED, MANIFESTS, Image
from dgx_kvm_sw.model.errors import ExitCode
from dgx_kvm_sw.reconcile import POOL_PATH

BOOT_SECTOR = bytes(510) + b"\x55\xaa"
VM = "  - {{name: {}, gpus: 0, vcpus: 2, memory: 2GiB, image: {}}}\n"


pytestmark = pytest.mark.commands  # qemu-img and gpgv; xorriso makes the seeds of VMs


@pytest.fixture
def bare(run: Host) -> Host:
    """A host with no image and no VM."""
    for name in run.root.names(MANIFESTS):
        run.root.remove(f"{MANIFESTS}/{name}")
    declare(run)
    return run


def declare(run: Host, *vms: tuple[str, str], head: str = "") -> None:
    run.declare(f"version: 1\n{head}vms:\n" + "".join(VM.format(*vm) for vm in vms) or "[]")


def row(done: Result, name: str) -> str:
    """The line of an image in the list, with single spaces."""
    line = next(line for line in done.out.splitlines() if line.startswith(f"{name} "))
    return re.sub(r"  +", " | ", line)


# -- list and show ------------------------------------------------------------------------------


def test_no_images_is_said_with_how_to_get_some(bare: Host) -> None:
    done = bare("image list")
    assert "No guest images: `apt search dgx-kvm-image`" in done.out
    found = bare("image list --json").json
    assert found == {"version": 1, "images": [], "damaged_bases": [], "problems": []}


def test_the_list_says_where_from_and_how_good(bare: Host) -> None:
    add(bare.root, "debian-12", version="12.1", driver="535.261.03")
    add(bare.root, "mine", folder=IMPORTED)
    done = bare("image list")
    assert done.code == 0
    line = "debian-12 | 12.1 | 2 KiB | 535.261.03 | package | ok, not verified yet"
    assert row(done, "debian-12") == line
    assert row(done, "mine") == "mine | 1.0 | 2 KiB | - | import | ok, not verified yet"


@pytest.mark.parametrize(
    ("spoil", "state", "reason"),
    [
        (lambda root, i: root.remove(i.path), "file missing", "cannot be used: no such file"),
        (lambda root, i: root.write(i.path, "x"), "truncated", "1 bytes instead of 2000"),
        (lambda root, i: root.write(i.manifest, "{"), "bad manifest", "it is not JSON"),
    ],
)
def test_what_cannot_be_used_is_named_with_the_next_step(
    bare: Host, spoil: Callable[..., None], state: str, reason: str
) -> None:
    add(bare.root, "debian-12")
    spoil(bare.root, add(bare.root, "debian-13"))
    done = bare("image list")
    assert done.code == 0
    assert row(done, "debian-12").endswith("ok, not verified yet")
    assert row(done, "debian-13").endswith(f"| {state}")
    assert "debian-13 is not used: " in done.out
    assert reason in done.out
    (found,) = (i for i in bare("image list --json").json["images"] if i["name"] == "debian-13")
    assert found["state"] == state
    assert reason in found["problem"]
    assert found["remedy"]


def test_an_older_one_of_the_name_is_listed_too(bare: Host) -> None:
    add(bare.root, "debian-12", version="12.2")
    add(bare.root, "debian-12", version="12.1", folder=IMPORTED)
    assert "| import | not used: there is 12.2" in re.sub(r"  +", " | ", bare("image list").out)


def test_vms_that_use_an_image_are_counted(bare: Host) -> None:
    add(bare.root, "debian-12")
    declare(bare, ("a", "debian-12"), ("b", "debian-12"))
    assert bare("apply").code == 0
    assert row(bare("image list"), "debian-12").endswith("| ok, in use by 2 VMs")
    assert "VMs:         a, b\n" in bare("image show debian-12").out


def test_vms_on_an_older_version_are_told_apart(bare: Host) -> None:
    add(bare.root, "debian-12", b"old", version="1")
    declare(bare, ("a", "debian-12"))
    bare("apply")
    add(bare.root, "debian-12", b"new", version="2")
    declare(bare, ("a", "debian-12"), ("b", "debian-12"))
    bare("apply")
    said = bare("image show debian-12").out
    assert "VMs:         b\nothers on:   another version: a\n" in said
    (found,) = bare("image list --json").json["images"]
    assert (found["vms"], found["vms_on_other_versions"]) == (["b"], ["a"])


def test_show_tells_all(bare: Host) -> None:
    image = add(bare.root, "debian-12", os="debian", release="12", kernel="6.1.0-41-amd64")
    said = bare("image show debian-12").out
    assert f"sha256:      {image.sha256}\n" in said
    assert "system:      debian 12\n" in said
    assert "kernel:      6.1.0-41-amd64\n" in said
    assert "from:        package dgx-kvm-image-debian-12\n" in said
    (found,) = bare("image show debian-12 --json").json["images"]
    assert (found["sha256"], found["vms"], found["verified"]) == (image.sha256, [], False)


@pytest.mark.parametrize("action", ["show", "verify", "remove"])
def test_an_image_that_is_not_there_is_a_mistake_with_a_guess(bare: Host, action: str) -> None:
    add(bare.root, "debian-12")
    done = bare(f"image {action} debian12")
    assert done.code == ExitCode.USAGE
    assert "there is no image 'debian12'" in done.err
    assert "did you mean debian-12?" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("image", "ACTION is missing"),
        ("image lst", "there is no action 'lst'\n  did you mean list?"),
        ("image list --jsn", "`dgx-kvm image list` has no option '--jsn'\n  did you mean --json?"),
        ("image import x.img --name x", "--sha256 is missing"),
        ("image verify --json", "`dgx-kvm image verify` has no option '--json'"),
        ("--json image verify", "`image verify` has no --json"),
    ],
)
def test_a_wrong_command_line_is_explained(bare: Host, words: str, said: str) -> None:
    done = bare(words)
    assert done.code == ExitCode.USAGE
    assert said in done.err


# -- verify -------------------------------------------------------------------------------------


def test_verify_reads_all_and_is_remembered(bare: Host) -> None:
    add(bare.root, "debian-12")
    add(bare.root, "mine", folder=IMPORTED)
    done = bare("image verify")
    assert (done.code, done.out) == (0, "debian-12: ok\nmine: ok\n")
    assert row(bare("image list"), "debian-12").endswith("| ok")


def test_verify_names_what_is_damaged_and_then_it_is_not_used(bare: Host) -> None:
    add(bare.root, "debian-12")
    image = add(bare.root, "debian-13")
    bare.root.path(image.path).write_bytes(BYTES[::-1])
    assert bare("image verify debian-12").code == 0
    done = bare("image verify")
    assert done.code == ExitCode.FAILED
    assert "debian-13: hash mismatch" in done.out
    assert f"{image.path} of image debian-13 1.0 is damaged" in done.err
    assert "apt install --reinstall dgx-kvm-image-debian-13" in done.err
    assert row(bare("image list"), "debian-13").endswith("| hash mismatch")
    declare(bare, ("a", "debian-13"))
    assert "is damaged" in bare("plan").out
    bare.root.path(image.path).write_bytes(BYTES)
    assert bare("image verify").code == 0


def test_verify_reads_a_base_that_is_another_file(bare: Host) -> None:
    image = add(bare.root, "debian-12")
    bare.root.path(image.base).parent.mkdir()
    bare.root.path(image.base).write_bytes(BYTES[::-1])
    done = bare("image verify")
    assert done.code == ExitCode.FAILED
    assert done.out == "debian-12: base damaged\n"
    assert f"the base {image.base} is damaged: its sha256 is" in done.err
    assert row(bare("image list"), "debian-12").endswith("| ok")


def test_verify_names_a_base_that_is_gone_under_a_disk(bare: Host) -> None:
    image = add(bare.root, "debian-12")
    declare(bare, ("a", "debian-12"))
    assert bare("apply").code == 0
    bare.root.remove(image.base)
    done = bare("image verify")
    assert (done.code, done.out) == (ExitCode.FAILED, "debian-12: base gone\n")
    assert f"the base {image.base} is gone, and disks of a lie on it" in done.err
    bare.root.remove(image.manifest)
    assert bare("image verify").out == "debian-12: base gone\n"


def test_verify_tells_the_truth_where_nothing_can_be_remembered(bare: Host) -> None:
    """As when an ordinary user runs it."""
    image = add(bare.root, "debian-12")
    bare.root.path(image.path).write_bytes(BYTES[::-1])
    bare.root.path(REMEMBERED).unlink(missing_ok=True)
    bare.root.path(REMEMBERED).mkdir(parents=True)
    done = bare("image verify")
    assert (done.code, done.out) == (ExitCode.FAILED, "debian-12: hash mismatch\n")


def test_verify_reads_the_bases_of_older_images_and_of_none(bare: Host) -> None:
    """Disks may lie on them, long after the package has another file or has gone."""
    old = add(bare.root, "debian-12", b"old")
    bases.adopt(bare.root, old)
    spoil(bare, old.base)
    add(bare.root, "debian-12", b"new", version="2")
    assert bare("image verify debian-12").code == ExitCode.FAILED
    bare.root.remove(old.manifest)
    done = bare("image verify")
    assert (done.code, done.out) == (ExitCode.FAILED, "debian-12: base damaged\n")
    assert old.base in done.err


def spoil(run: Host, path: str) -> None:
    """Let a drive give back other bytes: the same file, of the same length."""
    file = run.root.path(path)
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[::-1])


def backings(run: Host) -> dict[str, str]:
    """What the OS disk of each VM lies on."""
    saved = run.root.names("/libvirt/volumes")
    disks = [json.loads(run.root.read(f"/libvirt/volumes/{name}")) for name in saved]
    return {disk["name"].partition(".")[0]: disk["backing"] for disk in disks}


def test_a_damaged_base_gets_no_new_disk_until_the_package_is_reinstalled(bare: Host) -> None:
    image = add(bare.root, "debian-12")
    bad, good, *_ = image.base_names
    declare(bare, ("a", "debian-12"))
    bare("apply")
    spoil(bare, image.path)  # and the base, which is a link
    done = bare("image verify")
    assert done.code == ExitCode.FAILED
    named = f"the base {bad} is damaged: its sha256 is "
    assert named in done.err
    assert "no new disk will lie on it, but those of a do\n  save what their guests" in done.err
    declare(bare, ("a", "debian-12"), ("b", "debian-12"))
    done = bare("apply")
    assert done.last.endswith("1 does not fit: b.")
    assert f"Note: {named}" in done.out, "it is told before every change"
    assert "apt install --reinstall dgx-kvm-image-debian-12" in done.out
    add(bare.root, "debian-12")  # reinstalled
    assert bare("apply").last == "Done: 1 created, 1 started."
    assert backings(bare) == {"a": bad, "b": good}
    assert bare.root.path(bad).read_bytes() == BYTES[::-1], "a lies on it"
    assert bare.root.path(good).read_bytes() == BYTES
    done = bare("image list")
    assert row(done, "debian-12").endswith("| ok, in use by 1 VM")
    assert f"\n{named}" in done.out
    (found,) = bare("image list --json").json["damaged_bases"]
    assert (found["path"], found["vms"]) == (bad, ["a"])
    assert named in bare("image show debian-12").out
    declare(bare, ("b", "debian-12"))
    bare("apply --prune --restart --delete-disks")
    assert bare("image verify").out == "debian-12: ok\n"
    assert bare.root.names(BASES) == [Path(good).name]


def test_a_damaged_import_is_imported_again_beside_what_disks_lie_on(
    bare: Host, tmp_path: Path
) -> None:
    do_import(bare, tmp_path, "--version", "1.0")
    declare(bare, ("a", "mine"))
    bare("apply")
    bad = backings(bare)["a"]
    spoil(bare, bad)
    assert bare("image verify").code == ExitCode.FAILED
    declare(bare, ("a", "mine"), ("b", "mine"))
    assert "`dgx-kvm image import` it again, with --name mine" in bare("plan").out
    assert do_import(bare, tmp_path, "--version", "1.0").code == 0
    assert bare("apply").last == "Done: 1 created, 1 started."
    good = backings(bare)["b"]
    assert good != bad == backings(bare)["a"]
    assert bare.root.path(bad).read_bytes() == BOOT_SECTOR[::-1]
    assert bare.root.path(good).read_bytes() == BOOT_SECTOR


def test_verify_says_what_is_wrong_without_reading(bare: Host) -> None:
    bare.root.remove(add(bare.root, "debian-12").path)
    done = bare("image verify --quiet")
    assert done.code == ExitCode.FAILED
    assert done.out == "debian-12: file missing\n"


# -- import and remove --------------------------------------------------------------------------


def do_import(run: Host, folder: Path, *more: str, content: bytes = BOOT_SECTOR) -> Result:
    file = folder / "disk.raw"
    file.write_bytes(content)
    checksum = hashlib.sha256(content).hexdigest().upper()  # some print it so
    return run(f"image import {file} --name mine --sha256 {checksum}", *more)


def test_an_imported_image_makes_vms(bare: Host, tmp_path: Path) -> None:
    done = do_import(bare, tmp_path, "--version", "1.0")
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(r"Imported mine 1\.0, 512 B, as /.*/bases/mine-\w{12}\.raw\.\n", done.out)
    assert row(bare("image list"), "mine") == "mine | 1.0 | 512 B | - | import | ok"
    declare(bare, ("a", "mine"))
    assert bare("apply").code == 0
    assert row(bare("image list"), "mine").endswith("| ok, in use by 1 VM")
    assert "Nothing to do" in bare("plan").last


def test_what_cannot_be_imported_leaves_nothing(bare: Host, tmp_path: Path) -> None:
    done = do_import(bare, tmp_path, content=b"no disk" * 100)
    assert done.code == ExitCode.FAILED
    assert "is no disk image" in done.err
    assert bare.root.names(BASES) == bare.root.names(IMPORTED) == []


def test_an_import_is_removed(bare: Host) -> None:
    add(bare.root, "mine", folder=IMPORTED)
    done = bare("image remove mine")
    assert (done.code, done.out) == (0, "Removed mine, 2 KiB.\n")
    assert bare.root.names(BASES) == bare.root.names(IMPORTED) == []


def test_an_import_with_a_bad_manifest_can_be_removed(bare: Host) -> None:
    bare.root.write(f"{IMPORTED}/mine.json", "{")
    assert bare("image remove mine").code == 0
    assert bare.root.names(IMPORTED) == []


def test_what_a_package_brought_is_for_apt_to_remove(bare: Host) -> None:
    add(bare.root, "debian-12")
    done = bare("image remove debian-12")
    assert done.code == ExitCode.USAGE
    assert "apt remove dgx-kvm-image-debian-12" in done.err


def refused(run: Host, image: Image, reason: str) -> None:
    done = run("image remove mine")
    assert done.code == ExitCode.USAGE
    assert reason in done.err
    assert run.root.exists(image.path)
    assert run.root.exists(image.manifest)


def test_an_image_that_disks_lie_on_is_not_removed(bare: Host) -> None:
    image = add(bare.root, "mine", folder=IMPORTED)
    declare(bare, ("a", "mine"))
    bare("apply")
    declare(bare)
    refused(bare, image, "disks of a lie on it\n  delete a with --delete-disks first\n")
    bare("apply --prune --restart")  # without --delete-disks
    refused(bare, image, "image mine is needed: disks of a lie on it")
    way = f"disk {POOL_PATH}/a.os.qcow2 is kept of a deleted VM: virsh vol-delete --pool dgx-kvm"
    refused(bare, image, f"{way} a.os.qcow2\n")


@pytest.mark.parametrize(("vm", "head"), [("mine", ""), ("debian-12", "defaults: {image: mine}\n")])
def test_an_image_that_the_file_names_is_not_removed(bare: Host, vm: str, head: str) -> None:
    image = add(bare.root, "mine", folder=IMPORTED)
    add(bare.root, "debian-12")
    declare(bare, ("a", vm), head=head)
    refused(bare, image, "image mine is needed: /etc/dgx-kvm/vms.yaml names it")


# -- hooks --------------------------------------------------------------------------------------


def hook(run: Host, stage: str, last: str = "") -> None:
    path = run.root.path(f"{HOOKS}/{stage}/10-tell")
    path.parent.mkdir(parents=True)
    words = '"$DGX_KVM_STAGE $DGX_KVM_IMAGE $DGX_KVM_IMAGE_VERSION $DGX_KVM_IMAGE_PATH"'
    path.write_text(f"#!/bin/sh\necho {words} >>{run.directory}/told\n{last}\n")
    path.chmod(0o755)


def told(run: Host) -> list[str]:
    """What hooks were told since the last time."""
    lines = run.root.read("/told", "").splitlines()
    run.root.remove("/told")
    return lines


def test_hooks_are_told_of_packages_that_come_and_go(bare: Host) -> None:
    hook(bare, "image-added")
    hook(bare, "image-removed")
    old = add(bare.root, "debian-12", b"old", version="1")
    file = bare.root.path(old.path)
    assert bare("image rescan").code == 0
    assert told(bare) == [f"image-added debian-12 1 {file}"]
    bare("image rescan")
    assert told(bare) == []
    add(bare.root, "debian-12", b"new", version="2")
    bare("image rescan")
    assert told(bare) == [f"image-added debian-12 2 {file}"]
    bare.root.remove(old.path)  # damaged, not gone
    bare("image rescan")
    assert told(bare) == []
    bare.root.remove(old.manifest)
    bare("image rescan")
    assert told(bare) == [f"image-removed debian-12 2 {file}"]


def test_an_image_that_cannot_be_used_has_not_come(bare: Host) -> None:
    hook(bare, "image-added")
    image = add(bare.root, "debian-12")
    bare.root.path(image.path).write_bytes(b"x")
    done = bare("image rescan")
    assert done.code == 0, "dpkg does not fail for it"
    assert "is truncated" in done.err
    assert told(bare) == []
    add(bare.root, "debian-12")
    bare("image rescan")
    assert len(told(bare)) == 1


def test_imports_and_removals_are_told_too(bare: Host, tmp_path: Path) -> None:
    hook(bare, "image-added")
    hook(bare, "image-removed")
    do_import(bare, tmp_path, "--version", "1.0")
    (line,) = told(bare)
    assert line.startswith("image-added mine 1.0 /")
    bare("image remove mine")
    (line,) = told(bare)
    assert line.startswith("image-removed mine 1.0 /")


def test_a_hook_that_fails_is_reported_and_changes_nothing(bare: Host, tmp_path: Path) -> None:
    hook(bare, "image-added", "echo out of order >&2; exit 3")
    done = do_import(bare, tmp_path)
    assert done.code == 0
    assert "image-added/10-tell failed with code 3: out of order" in done.err
    assert bare("image show mine").code == 0
    told(bare)
    bare("image rescan")
    assert told(bare) == [], "it is not told again and again"
    entries = [json.loads(line) for line in bare.root.read(JOURNAL).splitlines()]
    assert any(e["event"] == "hook" and e["output"] == "out of order" for e in entries)


# -- small words --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (412 << 20, "412 MiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_sizes_are_short(number: int, text: str) -> None:
    assert size(number) == text


def test_a_bar_fills() -> None:
    assert drawn("x", 0, 0, "#-", 79) == f"x {'-' * 30}   0 %  0 B of 0 B"
    half = drawn("x", 1 << 30, 2 << 30, "#-", 79)
    assert half == f"x {'#' * 15}{'-' * 15}  50 %  1 GiB of 2 GiB"
    assert drawn("x", 1 << 30, 2 << 30, "#-", 32) == "x ####----  50 %  1 GiB of 2 GiB"
    assert drawn("x", 1, 2, "#-", 9) == "x   50 % "


def test_an_apply_draws_the_bar_too(bare: Host) -> None:
    add(bare.root, "big", bytes(40 << 20))
    declare(bare, ("a", "big"))
    master, slave = os.openpty()
    done = bare.outside("apply", capture_output=False, stdout=subprocess.DEVNULL, stderr=slave)
    os.close(slave)
    assert done.returncode == 0
    text = os.read(master, 65536).decode()
    assert re.search(r"1/\d reading big 1.0 \S+ +\d+ %  \d+ MiB of 40 MiB", text)


def test_a_bar_is_drawn_for_a_person_only(bare: Host, tmp_path: Path) -> None:
    assert "█" not in do_import(bare, tmp_path).err
    add(bare.root, "big", bytes(40 << 20))
    master, slave = os.openpty()
    done = bare.outside("image verify big", capture_output=False, stdout=None, stderr=slave)
    os.close(slave)
    drawn_text = os.read(master, 65536).decode()
    assert done.returncode == 0
    assert "big " in drawn_text
    assert "MiB of 40 MiB" in drawn_text
    assert drawn_text.endswith("\r\x1b[K")


def test_an_import_draws_the_bar_too(bare: Host, tmp_path: Path) -> None:
    file = tmp_path / "disk.raw"
    file.write_bytes(BOOT_SECTOR + bytes((40 << 20) - len(BOOT_SECTOR)))
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    words = f"image import {file} --name mine --sha256 {checksum}"
    master, slave = os.openpty()
    done = bare.outside(words, capture_output=False, stdout=subprocess.DEVNULL, stderr=slave)
    os.close(slave)
    assert done.returncode == 0
    assert re.search(r"mine \S+ +\d+ %  \d+ MiB of 40 MiB", os.read(master, 65536).decode())
