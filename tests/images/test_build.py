"""The builder: what it makes, and that each thing that can go wrong is one sentence."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest

from tools.images import __main__ as command
from tools.images import build, recipes
from tools.images.build import _version
from tools.images.disk import MIB, SECTOR, embed_bios_grub
from tools.images.programs import BuildError, call
from tools.images.sources import sources
from tools.images.tree import Identity, contents, environment, make_tree, remove

DAY = 1795305600  # 2026-11-22
DEBIAN = recipes.find("debian-12")
UBUNTU = recipes.find("ubuntu-24.04-cuda-535")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UBUNTU_MIRROR", "UBUNTU_KEYRING", "IMAGE_SOURCES", "SOURCE_DATE_EPOCH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(build, "CACHE", tmp_path)
    return tmp_path


# -- What is asked for --------------------------------------------------------------------------


def test_images_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"debian-11", "debian-12-cuda-535", "ubuntu-22.04"} <= set(names)


def test_an_unknown_name_ends_it_before_anything_is_built(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["build", "debian-12", "debain-13"]) == 64
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: there is no recipe for an image debain-13; there are: deb")
    assert said.err.count("\n") == 1
    assert list(cache.iterdir()) == []


# -- Where it comes from ------------------------------------------------------------------------


def test_ubuntu_needs_a_mirror_that_is_named() -> None:
    with pytest.raises(BuildError, match="needs an archive of Ubuntu") as caught:
        sources(UBUNTU)
    assert f"IMAGES={UBUNTU.name} UBUNTU_MIRROR=ADDRESS" in caught.value.hint


def test_ubuntu_needs_the_keys_of_its_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UBUNTU_MIRROR", "file:/mirror")
    monkeypatch.setenv("UBUNTU_KEYRING", "/nonexistent.gpg")
    with pytest.raises(BuildError, match=r"are not in /nonexistent\.gpg"):
        sources(UBUNTU)


def test_ubuntu_comes_from_the_mirror_with_what_the_driver_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keyring = tmp_path / "keys.gpg"
    keyring.touch()
    monkeypatch.setenv("UBUNTU_MIRROR", "file:/mirror")
    monkeypatch.setenv("UBUNTU_KEYRING", str(keyring))
    assert sources(UBUNTU) == (
        "Types: deb\nURIs: file:/mirror\nSuites: noble noble-updates noble-security\n"
        f"Components: main universe restricted multiverse\nSigned-By: {keyring}\n"
    )


def test_more_archives_are_added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    more = tmp_path / "nvidia.sources"
    more.write_text("Types: deb\nURIs: file:/nvidia\nSuites: ./\n")
    plain = sources(DEBIAN)
    monkeypatch.setenv("IMAGE_SOURCES", str(more))
    assert sources(DEBIAN) == f"{plain}\n{more.read_text()}"
    monkeypatch.setenv("IMAGE_SOURCES", "/nonexistent")
    with pytest.raises(BuildError, match="/nonexistent cannot be read: No such file"):
        sources(DEBIAN)


# -- What it is called --------------------------------------------------------------------------


def built(cache: Path, key: str, version: str) -> None:
    (cache / f"debian-12-{key * 12}").mkdir()
    (cache / f"debian-12-{key * 12}/facts.json").write_text(json.dumps({"version": version}))


def test_a_version_is_the_release_and_the_day(cache: Path) -> None:
    assert _version(DEBIAN, DAY) == "12.20261122"
    built(cache, "a", "12.20261121")
    assert _version(DEBIAN, DAY) == "12.20261122"


def test_other_contents_of_the_same_day_have_a_higher_version(cache: Path) -> None:
    built(cache, "a", "12.20261122")
    assert _version(DEBIAN, DAY) == "12.20261122.1"
    built(cache, "b", "12.20261122.1")
    assert _version(DEBIAN, DAY) == "12.20261122.2"


def test_what_one_build_calls_its_file_systems_another_does_too() -> None:
    one, two = (Identity.of(DEBIAN, "12.20261122", epoch) for epoch in (DAY, DAY + 60))
    assert (one.root_uuid, one.esp_id) == (two.root_uuid, two.esp_id)
    assert Identity.of(DEBIAN, "12.20261123", DAY).root_uuid != one.root_uuid


def found(root: Path) -> dict[str, str]:
    """Every file of a tree with what is in it, a link with where it leads."""
    paths = [path for path in root.rglob("*") if path.is_symlink() or path.is_file()]
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


@pytest.mark.images
def test_a_second_build_has_the_same_packages_and_the_same_files(tmp_path: Path) -> None:
    """The trees alone: what becomes of one is decided by its files and the names in Identity."""
    identity, log = Identity.of(DEBIAN, "12.20261122", DAY), tmp_path / "log"
    trees = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        trees.append(make_tree(DEBIAN, identity, tmp_path / name, log))
    one, two = trees
    assert contents(one, log) == contents(two, log)
    files, again = found(one), found(two)
    assert {path for path in files | again if files.get(path) != again.get(path)} == set()
    for tree in trees:
        remove(tree)


def test_hooks_are_told_what_the_readme_says() -> None:
    told = environment(DEBIAN, Identity.of(DEBIAN, "12.20261122", DAY))
    readme = (recipes.RECIPES / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in told)
    assert told["IMAGE_VERSION"] == "12.20261122"


# -- What goes wrong ----------------------------------------------------------------------------


@pytest.mark.skipif(bool(os.geteuid()), reason="needs root")
def test_too_little_room_is_told_before_it_begins(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "NEEDED_GIB", 1 << 30)
    with pytest.raises(BuildError, match=r"takes \d+ GiB and .* has .* GiB free"):
        build.build(DEBIAN, cache / "out")
    assert not (cache / "debian-12.new").exists()


def test_a_time_that_is_none_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(BuildError, match="it is seconds since 1970|'yesterday'"):
        build._epoch()


@pytest.mark.images
def test_a_mirror_that_is_not_there_is_one_sentence_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache / "keys.gpg").touch()
    monkeypatch.setenv("UBUNTU_MIRROR", "file:/nonexistent/ubuntu")
    monkeypatch.setenv("UBUNTU_KEYRING", str(cache / "keys.gpg"))
    assert command.main(["build", UBUNTU.name, "--output", str(cache / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: mmdebstrap failed: ")
    assert said.endswith(f"its whole output is in {cache}/{UBUNTU.name}.log\n")
    assert said.count("\n") == 1
    assert not (cache / f"{UBUNTU.name}.new").exists()
    assert not (cache / "out").exists()


@pytest.mark.commands
def test_a_failed_program_is_one_sentence_and_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(BuildError) as caught:
        call(log, "sh", "-c", "echo much; echo 'E: no such mirror' >&2; echo more >&2; exit 3")
    assert caught.value.message == "sh failed: E: no such mirror"
    assert str(log) in caught.value.hint
    assert "much\n" in log.read_text()


@pytest.mark.commands
@pytest.mark.skipif(bool(os.geteuid()), reason="needs root")
def test_what_a_program_mounts_is_gone_with_it(tmp_path: Path) -> None:
    with pytest.raises(BuildError):
        call(
            tmp_path / "log",
            "sh",
            "-c",
            'mount -t tmpfs tmpfs "$1" && touch "$1/inside" && kill -9 $$',
            "sh",
            tmp_path,
            mounts=True,
        )
    assert not tmp_path.is_mount()
    assert (tmp_path / "log").exists()
    assert not (tmp_path / "inside").exists()


@pytest.mark.commands
def test_a_disk_that_fills_up_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=f"the disk of {tmp_path} is full"):
        call(tmp_path / "log", "cp", __file__, "/dev/full")


def test_a_core_of_grub_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(3 * MIB))
    (tmp_path / "boot.img").write_bytes(bytes(SECTOR))
    with pytest.raises(BuildError, match="more than its partition"):
        embed_bios_grub(tmp_path / "disk", tmp_path / "boot.img", bytes(MIB + 1), 1)


def test_grub_is_where_a_bios_and_its_first_sector_look(tmp_path: Path) -> None:
    disk, boot = tmp_path / "disk", tmp_path / "boot.img"
    table = b"partition table and signature".ljust(SECTOR - 0x1B8, b"!")
    disk.write_bytes(bytes(0x1B8) + table + bytes(2 * MIB))
    boot.write_bytes(b"\xeb" * SECTOR)
    embed_bios_grub(disk, boot, b"\xaa" * (3 * SECTOR - 7), 1)
    data = disk.read_bytes()
    assert data[0x1B8:SECTOR] == table
    assert struct.unpack_from("<Q", data, 0x5C) == (2048,)
    core = data[MIB : MIB + 3 * SECTOR]
    assert core[: SECTOR - 12] == b"\xaa" * (SECTOR - 12)
    # The rest of the core: from its second sector, two sectors, behind the first in memory.
    assert struct.unpack_from("<QHH", core, SECTOR - 12) == (2049, 2, 0x820)


# -- Hooks --------------------------------------------------------------------------------------


@pytest.mark.commands
@pytest.mark.skipif(bool(os.geteuid()), reason="needs root")
@pytest.mark.parametrize(("driver", "code"), [("535", 1), ("", 0)])
def test_a_driver_that_was_not_built_ends_the_build_and_no_key_of_it_stays(
    tmp_path: Path, driver: str, code: int
) -> None:
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot/vmlinuz-6.1.0-1-amd64").touch()
    key = tmp_path / "var/lib/dkms/mok.key"
    key.parent.mkdir(parents=True)
    key.touch()
    done = subprocess.run(
        (recipes.RECIPES / "hooks/30-driver", tmp_path),
        env={**os.environ, "IMAGE_DRIVER": driver},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert ("the NVIDIA module for 6.1.0-1-amd64 has version" in done.stderr) == bool(code)
    assert key.exists() != bool(driver)


CHROOT = """\
#!/bin/sh
shift
case "$*" in
    "apt-cache policy nvidia-fabricmanager-535") echo "  Candidate: $MANAGER" ;;
    "apt-cache policy nvidia-container-toolkit") echo "  Candidate: $TOOLKIT" ;;
    dpkg-query*) printf '\\n535.309.01-0+deb12u1\\n' ;;
    *" install "*) for package; do :; done; echo "$package" >>"$TOLD" ;;
esac
"""


@pytest.mark.commands
@pytest.mark.parametrize(
    ("manager", "toolkit", "installed"),
    [
        ("(none)", "(none)", []),
        ("(none)", "1.17.0-1", ["nvidia-container-toolkit"]),
        ("535.309.01-1", "(none)", ["nvidia-fabricmanager-535"]),
        ("535.309.02-1", "1.17.0-1", ["nvidia-container-toolkit"]),
    ],
)
def test_optional_packages_are_those_there_are_and_a_fabric_manager_that_fits(
    tmp_path: Path, manager: str, toolkit: str, installed: list[str]
) -> None:
    """An archive that has them is a stand-in: Debian's has neither."""
    program = tmp_path / "chroot"
    program.write_text(CHROOT)
    program.chmod(0o755)
    told = tmp_path / "told"
    told.touch()
    optional = recipes.find("debian-12-cuda-535").optional
    given = {"MANAGER": manager, "TOOLKIT": toolkit, "TOLD": str(told)}
    subprocess.run(
        (recipes.RECIPES / "hooks/20-optional", tmp_path),
        env={**given, "PATH": f"{tmp_path}:/usr/bin:/bin", "IMAGE_OPTIONAL": " ".join(optional)},
        check=True,
    )
    assert told.read_text().split() == installed
