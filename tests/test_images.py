"""The image catalogue: one manifest each, a bad one hinders no other, a bad file is not used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from catalogues import BYTES, add, manifest

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.guest import checksums
from dgx_kvm_sw.guest.images import (
    BASES,
    IMPORTED,
    MANIFESTS,
    base_owner,
    catalogue,
    manifest_text,
    parse,
    refusal,
)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_without_manifests_there_are_no_images(root: Root) -> None:
    found = catalogue(root)
    assert (found.images, found.problems, found.faults) == ({}, (), {})


def test_every_manifest_is_an_image(root: Root) -> None:
    add(root, "debian-12", version="12.1", driver="535.261.03", firmware=["bios"])
    add(root, "mine", folder=IMPORTED)
    root.write(f"{MANIFESTS}/README", "not a manifest")
    found = catalogue(root)
    assert (list(found.images), found.problems, found.faults) == (["debian-12", "mine"], (), {})
    image = found.images["debian-12"]
    assert (image.driver, image.firmware, image.cloud_init) == ("535.261.03", ("bios",), True)
    assert (image.imported, found.images["mine"].imported) == (False, True)


def test_a_manifest_is_read_as_it_was_written(root: Root) -> None:
    image = add(root, "debian-12", title="Debian 12 (bookworm)", minimum_disk_mib=3072)
    assert parse(manifest_text(image)) == image


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"manifest": 2}, "it is of manifest version 2, and this dgx-kvm knows version 1 only"),
        ({"manifest": None}, "it is of manifest version None"),
        *(
            ({key: ...}, f"'{key}' is missing")
            for key in ("name", "version", "path", "format", "sha256", "size_bytes")
        ),
        ({"virtual_size_bytes": ...}, "'virtual_size_bytes' is missing"),
        ({"size_bytes": "12"}, "'size_bytes' is not a number: '12'"),
        ({"size_bytes": True}, "'size_bytes' is not a number: True"),
        ({"size_bytes": 0}, "'size_bytes' cannot be 0"),
        ({"name": 12}, "'name' is not a text: 12"),
        ({"name": "../x"}, "'name' cannot be '../x'"),
        ({"version": "v1"}, "'version' cannot be 'v1'"),
        ({"version": "1 2"}, "'version' cannot be '1 2'"),
        ({"version": "1:"}, "'version' cannot be '1:'"),
        ({"version": "1" * 200}, "'version' cannot be '1111"),
        ({"title": "a\nb"}, "'title' holds what cannot be printed: 'a"),
        ({"path": "/a\0b"}, "'path' holds what cannot be printed: '/a"),
        ({"path": "/a\ud800"}, "'path' holds what cannot be printed: '/a"),
        ({"virtual_size_bytes": 10**400}, "'virtual_size_bytes' cannot be 1000"),
        ({"minimum_disk_mib": -1}, "'minimum_disk_mib' cannot be -1"),
        ({"path": "x.qcow2"}, "'path' cannot be 'x.qcow2'"),
        ({"path": "/a/../b"}, "'path' cannot be '/a/../b'"),
        ({"format": "vmdk"}, "'format' cannot be 'vmdk'"),
        ({"sha256": "ab"}, "'sha256' cannot be 'ab'"),
        ({"firmware": []}, "'firmware' is not a list of uefi, bios or both"),
        ({"firmware": "uefi"}, "'firmware' is not a list of uefi, bios or both"),
        ({"cloud_init": 1}, "'cloud_init' is not true or false: 1"),
    ],
)
def test_a_wrong_manifest_says_what_is_wrong(
    root: Root, change: dict[str, object], reason: str
) -> None:
    add(root, "other")
    data = {**manifest("debian-12"), **change}
    text = json.dumps({key: value for key, value in data.items() if value is not ...})
    root.write(f"{MANIFESTS}/debian-12.json", text)
    found = catalogue(root)
    assert list(found.images) == ["other"]
    (problem,) = found.problems
    where = root.path(f"{MANIFESTS}/debian-12.json")
    assert problem.startswith(f"{where} is not an image manifest: {reason}")
    assert found.faults["debian-12"].reason == problem
    assert set(found.names) == {"other", "debian-12"}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '"x"', "null", "\xff", pytest.param("[" * 100_000, id="deep")],
)
def test_what_is_no_manifest_is_named_and_hinders_no_other(root: Root, text: str) -> None:
    add(root, "debian-12")
    root.write(f"{MANIFESTS}/bad.json", text)
    found = catalogue(root)
    assert list(found.images) == ["debian-12"]
    (problem,) = found.problems
    assert str(root.path(f"{MANIFESTS}/bad.json")) in problem


def test_a_manifest_that_cannot_be_read_hinders_no_other(root: Root) -> None:
    add(root, "debian-12")
    root.path(f"{MANIFESTS}/gone.json").symlink_to("nowhere")
    found = catalogue(root)
    assert list(found.images) == ["debian-12"]
    assert len(found.problems) == 1


@pytest.mark.parametrize(
    ("packaged", "imported", "wins"),
    [("12.9", "12.10", "12.10"), ("12.1", "12.1~rc1", "12.1"), ("1:1", "2", "1:1")],
)
def test_of_two_of_one_name_the_higher_version_by_debians_rules_wins(
    root: Root, packaged: str, imported: str, wins: str
) -> None:
    add(root, "debian-12", version=packaged)
    add(root, "debian-12", version=imported, folder=IMPORTED)
    found = catalogue(root)
    assert found.images["debian-12"].version == wins
    assert {image.version for image in found.older} == {packaged, imported} - {wins}
    assert found.problems == ()


# -- the files ----------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_named(root: Root) -> None:
    path = root.path(add(root, "debian-12", version="12.1").path)
    path.unlink()
    fault = catalogue(root).faults["debian-12"]
    assert fault.state == "file missing"
    assert f"{path} of image debian-12 12.1 cannot be used: no such file" in fault.reason
    assert fault.remedy == "apt install --reinstall dgx-kvm-image-debian-12"


@pytest.mark.parametrize(
    ("content", "state"), [(BYTES[:-1], "truncated"), (BYTES + b"x", "too long")]
)
def test_a_file_of_another_length_is_named(root: Root, content: bytes, state: str) -> None:
    root.path(add(root, "debian-12").path).write_bytes(content)
    fault = catalogue(root).faults["debian-12"]
    assert fault.state == state
    assert f"is {state}: {len(content)} bytes instead of {len(BYTES)}" in fault.reason


def test_a_folder_is_no_image(root: Root) -> None:
    path = root.path(add(root, "debian-12").path)
    path.unlink()
    path.mkdir()
    assert catalogue(root).faults["debian-12"].state == "not a file"


def test_a_known_mismatch_is_remembered_until_the_file_changes(root: Root) -> None:
    image = add(root, "debian-12")
    path = root.path(image.path)
    path.write_bytes(BYTES[::-1])
    assert catalogue(root).faults == {}  # nobody has read it
    checksums.remember(root, image.path, path.stat(), checksums.sha256_of(path))
    fault = catalogue(root).faults["debian-12"]
    assert fault.state == "hash mismatch"
    assert f"its manifest says {image.sha256}" in fault.reason
    path.unlink()
    path.write_bytes(BYTES)
    assert catalogue(root).faults == {}


def test_a_damaged_base_leaves_its_name_to_the_disks_on_it(root: Root) -> None:
    """The last digits of a checksum are no name: there would be fewer than twelve."""
    image = add(root, "debian-12")
    assert len(image.base_names) == 5
    for number, base in enumerate(image.base_names):
        assert catalogue(root).images["debian-12"].base == base
        root.write(base, "x" * len(BYTES))
        checksums.remember(root, base, root.path(base).stat(), checksums.sha256_of(root.path(base)))
        assert len(catalogue(root).damaged) == number + 1
    assert catalogue(root).faults["debian-12"].state == "bases damaged"
    root.write(base, BYTES.decode())
    assert catalogue(root).faults == {}
    checksums.remember(root, base, root.path(base).stat(), image.sha256)
    assert catalogue(root).images["debian-12"].base == base


def test_a_base_of_another_length_is_damaged(root: Root) -> None:
    image = add(root, "debian-12")
    root.write(image.base, "x")
    assert catalogue(root).damaged == {image.base: f"it has 1 bytes instead of {len(BYTES)}"}


# -- what a VM may be made of -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("disk_mib", "firmware", "reason"),
    [
        (4096, "uefi", ""),
        (2048, "uefi", ""),
        (2047, "uefi", "needs 2048 MiB"),
        (4096, "bios", "does not boot by bios"),
    ],
)
def test_a_disk_has_room_for_its_image_and_the_firmware_boots_it(
    root: Root, disk_mib: int, firmware: str, reason: str
) -> None:
    add(root, "debian-12", firmware=["uefi"], virtual_size_bytes=2 << 30)
    found = refusal(catalogue(root), "debian-12", disk_mib, "a.os.qcow2", firmware)
    assert (found is None) == (not reason)
    assert found is None or reason in found[0]


def test_the_least_disk_of_the_manifest_counts_too(root: Root) -> None:
    add(root, "debian-12", virtual_size_bytes=2 << 30, minimum_disk_mib=10240)
    found = refusal(catalogue(root), "debian-12", 4096, "a.os.qcow2", "uefi")
    assert found is not None
    assert "10GiB" in found[1]


def test_a_base_says_which_image_it_is_of(root: Root) -> None:
    base = add(root, "debian-12-cuda").base
    assert base.startswith(f"{BASES}/debian-12-cuda-")
    assert base_owner(base) == "debian-12-cuda"
    assert base_owner("/usr/share/dgx-kvm/images/debian-12.qcow2") == ""
    assert base_owner(f"{BASES}/.adopting-debian-12-0123456789ab.qcow2.x") == ""
