"""Importing images: real files, real qemu-img, and nothing left behind when anything is wrong."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from catalogues import add
from commandline import DGX_KVM

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.guest import bases
from dgx_kvm_sw.guest.images import BASES, IMPORTED, catalogue
from dgx_kvm_sw.guest.importing import Wanted, default_version, import_image, remove_import
from dgx_kvm_sw.model.errors import DgxKvmError, HostError, UsageError

pytestmark = pytest.mark.commands

BOOT_SECTOR = bytes(510) + b"\x55\xaa"


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "root")


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, capture_output=True)


def qcow2(path: Path, *options: str | Path) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", *options, path, "1G")
    return path


def raw(path: Path, content: bytes = BOOT_SECTOR + bytes(1 << 20)) -> Path:
    path.write_bytes(content)
    return path


def wanted(path: Path, **fields: Any) -> Wanted:
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    return replace(Wanted(path, "mine", checksum, "1.0"), **fields)


def left(root: Root) -> list[str]:
    """What an import has left on the host."""
    return [*root.names(BASES), *root.names(IMPORTED)]


def test_a_qcow2_is_imported_with_what_is_in_it(root: Root, tmp_path: Path) -> None:
    file = qcow2(tmp_path / "cloud.img")  # as some distributions call theirs
    made = import_image(root, wanted(file, title="Mine", os="debian", driver="535.1"))
    found = catalogue(root)
    assert (found.problems, found.faults) == ((), {})
    image = found.images["mine"]
    assert image == made
    assert (image.format, image.virtual_size_bytes) == ("qcow2", 1 << 30)
    assert (image.title, image.os, image.driver, image.package) == ("Mine", "debian", "535.1", "")
    assert image.path == image.base
    copied = root.path(image.base)
    assert copied.read_bytes() == file.read_bytes()
    assert copied.stat().st_mode & 0o7777 == 0o444
    assert left(root) == [copied.name, "mine.json"]
    bases.adopt(root, image, lambda done, total: pytest.fail("read again"))


def test_a_raw_image_keeps_its_holes(root: Root, tmp_path: Path) -> None:
    file = raw(tmp_path / "disk.raw")
    os.truncate(file, 64 << 20)
    image = import_image(root, wanted(file))
    assert (image.format, image.virtual_size_bytes) == ("raw", 64 << 20)
    found = root.path(image.base).stat()
    assert found.st_size == 64 << 20
    assert found.st_blocks * 512 < 16 << 20


def _with_backing(folder: Path) -> Path:
    qcow2(folder / "below.qcow2")
    return qcow2(folder / "x.qcow2", "-b", folder / "below.qcow2", "-F", "qcow2")


def _with_data_file(folder: Path) -> Path:
    return qcow2(folder / "x.qcow2", "-o", f"data_file={folder}/data,data_file_raw=on")


def _encrypted(folder: Path) -> Path:
    """Not by LUKS: that measures the CPU first, and cannot on a busy one."""
    secret, options = "secret,id=s,data=x", "encrypt.format=aes,encrypt.key-secret=s"
    return qcow2(folder / "x.qcow2", "--object", secret, "-o", options)


def _vmdk(folder: Path) -> Path:
    qemu_img("create", "-q", "-f", "vmdk", folder / "x.vmdk", "1M")
    return folder / "x.vmdk"


def _broken(folder: Path) -> Path:
    file = qcow2(folder / "x.qcow2")
    return raw(file, file.read_bytes()[:80])


def _cut(folder: Path) -> Path:
    """All that qemu-img needs to open it, and no more."""
    file = qcow2(folder / "x.qcow2")
    return raw(file, file.read_bytes()[:1000])


def _without_size(folder: Path) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", folder / "x.qcow2", "0")
    return folder / "x.qcow2"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_with_backing, r"is only a part: it lies over /.*/below\.qcow2"),
        (_with_data_file, "is only a part: its data is in /.*/data"),
        (_encrypted, "is encrypted"),
        (_vmdk, "is of the format vmdk"),
        (_broken, "is no disk image that QEMU can read"),
        (_cut, "is truncated or damaged"),
        (_without_size, "holds a disk of no size"),
        (lambda folder: raw(folder / "x.qcow2"), r"is called \.qcow2, but its content is raw"),
        (lambda folder: qcow2(folder / "x.raw"), r"is called \.raw, but its content is qcow2"),
        (lambda folder: raw(folder / "x.xz"), r"is called \.xz, but its content is no disk image"),
        (
            lambda folder: raw(folder / "x.img", b"<html>404 not found</html>" * 40),
            "is no disk image: it is not qcow2 and has no partition table",
        ),
    ],
)
def test_what_no_vm_should_get_is_refused(
    root: Root, tmp_path: Path, make: Callable[[Path], Path], reason: str
) -> None:
    with pytest.raises(HostError, match=reason):
        import_image(root, wanted(make(tmp_path)))
    assert left(root) == []


def test_another_file_than_the_one_that_is_meant_is_refused(root: Root, tmp_path: Path) -> None:
    file = qcow2(tmp_path / "x.qcow2")
    asked = wanted(file)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(HostError, match="is not the file that is meant: its sha256 is"):
        import_image(root, asked)
    assert left(root) == []


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"name": "../x"}, "--name cannot be '../x'"),
        ({"version": "v 1"}, "--version cannot be 'v 1'"),
        ({"sha256": "abc"}, "--sha256 cannot be 'abc'"),
        ({"title": "a\nb"}, "--title holds what cannot be printed"),
        ({"file": Path("/nowhere")}, "there is no file /nowhere"),
        ({"signature": Path("/dev/null")}, "--signature and --keyring belong together"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_read(
    root: Root, tmp_path: Path, fields: dict[str, object], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        import_image(root, wanted(raw(tmp_path / "x.raw"), **fields))
    assert not root.exists("/")


@pytest.mark.parametrize(("version", "taken"), [("1.9", False), ("1.10", False), ("1.11", True)])
def test_only_a_higher_version_replaces_one_of_the_name(
    root: Root, tmp_path: Path, version: str, taken: bool
) -> None:
    first = import_image(root, wanted(raw(tmp_path / "x.raw"), version="1.10"))
    again = wanted(raw(tmp_path / "y.raw", BOOT_SECTOR + bytes(2 << 20)), version=version)
    if taken:
        import_image(root, again)
        assert catalogue(root).images["mine"].version == version
    else:
        with pytest.raises(UsageError, match=r"there is an image mine 1\.10 already"):
            import_image(root, again)
        assert catalogue(root).images["mine"] == first
    assert root.path(first.base).exists(), "disks may lie on it"


def test_a_lost_import_is_back_where_its_disks_look_for_it(root: Root, tmp_path: Path) -> None:
    file = raw(tmp_path / "x.raw")
    first = import_image(root, wanted(file, version="1"))
    root.path(first.base).unlink()
    assert "`dgx-kvm image import` it again" in catalogue(root).faults["mine"].remedy
    assert import_image(root, wanted(file, version="1")).base == first.base
    assert catalogue(root).faults == {}


def test_the_same_content_in_a_higher_version_replaces_no_file(root: Root, tmp_path: Path) -> None:
    file = raw(tmp_path / "x.raw")
    first = import_image(root, wanted(file, version="1"))
    before = root.path(first.base).stat()
    second = import_image(root, wanted(file, version="2"))
    assert second.base != first.base
    assert root.path(first.base).stat() == before, "disks may lie on it"
    remove_import(root, "mine")
    assert bases.remove_unneeded(root, {first.base}) == ()


def test_a_package_of_the_name_counts_too(root: Root, tmp_path: Path) -> None:
    add(root, "mine", version="3")
    with pytest.raises(UsageError, match="there is an image mine 3 already"):
        import_image(root, wanted(raw(tmp_path / "x.raw")))


def test_what_does_not_fit_is_not_begun(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases, "_SPARE_BYTES", 1 << 60)  # no disk has this much room
    with pytest.raises(HostError, match=r"x\.raw does not fit in .*: it needs \d+ MiB"):
        import_image(root, wanted(raw(tmp_path / "x.raw")))
    assert left(root) == []


def test_its_version_is_the_day_when_nobody_says_one() -> None:
    assert default_version().isdecimal()
    assert len(default_version()) == 8


# -- signatures ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Path]]:
    home = tmp_path_factory.mktemp("gnupg")
    gpg = ("gpg", "--homedir", str(home), "--batch", "--quiet", "--passphrase", "")

    def run(*words: str | Path) -> None:
        subprocess.run([*gpg, *words], check=True, capture_output=True)

    run("--quick-generate-key", "signer@example.invalid", "ed25519", "sign", "never")
    run("--output", home / "keys.gpg", "--export")

    def sign(file: Path) -> Path:
        run("--yes", "--output", home / "signature", "--detach-sign", file)
        return home / "signature"

    yield sign
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=False)


def test_a_good_signature_is_taken(
    root: Root, tmp_path: Path, signer: Callable[[Path], Path]
) -> None:
    file = raw(tmp_path / "x.raw")
    signature = signer(file)
    keyring = signature.with_name("keys.gpg")
    assert import_image(root, wanted(file, signature=signature, keyring=keyring))


@pytest.mark.parametrize("wrong", ["content", "keys"])
def test_a_bad_signature_is_refused(
    root: Root, tmp_path: Path, signer: Callable[[Path], Path], wrong: str
) -> None:
    file = raw(tmp_path / "x.raw")
    signature = signer(file)
    keyring = signature.with_name("keys.gpg")
    if wrong == "content":
        raw(file, BOOT_SECTOR + bytes(512))
    else:
        keyring = raw(tmp_path / "empty.gpg", b"")
    with pytest.raises(HostError, match=r"the signature .* of .*x\.raw is not good"):
        import_image(root, wanted(file, signature=signature, keyring=keyring))
    assert left(root) == []


# -- interruptions ------------------------------------------------------------------------------


def test_what_a_killed_import_has_left_goes_with_the_next(root: Root, tmp_path: Path) -> None:
    root.write(f"{BASES}/.partial-x", "half an image")
    file = raw(tmp_path / "x.raw")
    with bases.partial_file(root) as (_, under_way):  # of another command, which lives
        image = import_image(root, wanted(file))
        assert under_way.exists()
    assert left(root) == [Path(image.base).name, "mine.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_import_that_is_cut_off_leaves_no_image(tmp_path: Path, number: signal.Signals) -> None:
    machine = Root(tmp_path / "machine")
    file = raw(tmp_path / "x.raw")
    os.truncate(file, 40 << 30)  # reading it takes long, and no room
    words = [DGX_KVM, "--simulate", "dgx2", "--state", str(machine.directory)]
    words += ["image", "import", str(file), "--name", "mine", "--sha256", "0" * 64]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not machine.names(BASES):
        assert time.monotonic() < deadline, "the import does not begin"
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGKILL), said
    assert "Traceback" not in said
    assert machine.names(IMPORTED) == []
    if number is signal.SIGINT:
        assert machine.names(BASES) == []


# -- removal ------------------------------------------------------------------------------------


def test_a_removed_import_leaves_nothing(root: Root, tmp_path: Path) -> None:
    image = import_image(root, wanted(raw(tmp_path / "x.raw")))
    assert remove_import(root, "mine") == (image,)
    assert left(root) == []


def test_a_package_of_the_same_content_keeps_its_base(root: Root, tmp_path: Path) -> None:
    file = raw(tmp_path / "x.raw")
    import_image(root, wanted(file, version="1.0"))
    packaged = add(root, "mine", file.read_bytes(), version="2", format="raw")
    remove_import(root, "mine")
    assert root.exists(packaged.base)
    with pytest.raises(DgxKvmError):
        import_image(root, wanted(file, version="1.0"))
