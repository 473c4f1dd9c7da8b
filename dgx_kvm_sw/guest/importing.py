"""Import of disk images that no package brings: nothing is believed of a file but its bytes."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dgx_kvm_sw.access.files import Root, explained
from dgx_kvm_sw.access.run import run
from dgx_kvm_sw.guest import bases, checksums, images
from dgx_kvm_sw.guest.checksums import Progress, unwatched
from dgx_kvm_sw.guest.images import BASES, IMPORTED, Image
from dgx_kvm_sw.model.errors import HostError, UsageError

_INFO_SECONDS = 60.0
_CHECK_SECONDS = 600.0  # it reads all tables
_LEAKS = 3  # qemu-img check: space is lost, and nothing else is wrong
_SIGNATURE_SECONDS = 1800.0
_RAW_SUFFIXES = ("", ".img", ".raw")
_BOOT_SECTOR = 512
_BOOT_MARK = b"\x55\xaa"  # its last two bytes, with GPT too


@dataclass(frozen=True)
class Wanted:
    """What the user says of an image: what of it is not in the file itself."""

    file: Path
    name: str
    sha256: str
    version: str
    title: str = ""
    os: str = ""
    release: str = ""
    driver: str = ""
    signature: Path | None = None
    keyring: Path | None = None


@dataclass(frozen=True)
class _Content:
    format: str
    virtual_size: int


def import_image(root: Root, wanted: Wanted, progress: Progress = unwatched) -> Image:
    """Copy an image in, verified, and make its manifest last: there is all of it or nothing.

    Raises HostError or UsageError when the file is not what it is said to be, when there is one
    of this name already that is not older, or no room.
    """
    _check_words(root, wanted)
    try:
        bases.make_folder(root)
        bases.check_room(root.path(BASES), wanted.file)
        with bases.partial_file(root) as (target, temporary):
            with wanted.file.open("rb", buffering=0) as source:
                checksum = bases.copy_stream(source, target, progress)
            _check_sum(wanted, checksum)
            _check_signature(wanted, temporary)
            content = _content_of(wanted.file, temporary)
            image = _image(wanted, content, temporary.stat().st_size)
            with bases.images_locked(root):
                _check_newer(root, wanted)  # there may be another one by now
                image = _named(root, image)
                bases.put_in_place(target, temporary, root.path(image.path))
                root.write(image.manifest, images.manifest_text(image))
    except OSError as error:
        raise explained(error, "import", wanted.file) from error
    checksums.remember(root, image.path, root.path(image.path).stat(), checksum)
    return image


def remove_import(root: Root, name: str) -> tuple[Image, ...]:
    """Remove what was imported under a name: its manifests first, then their files."""
    with bases.images_locked(root):
        found = [i for i in images.catalogue(root).everything if i.imported and i.name == name]
        for manifest in {f"{IMPORTED}/{name}.json", *(image.manifest for image in found)}:
            root.remove(manifest)
        kept = {image.base for image in images.catalogue(root).everything}
        for image in found:
            if images.base_owner(image.path) and image.path not in kept:
                root.remove(image.path)
    return tuple(found)


def _check_words(root: Root, wanted: Wanted) -> None:
    for what, value, good in (
        ("--name", wanted.name, images.NAME),
        ("--version", wanted.version, images.VERSION),
        ("--sha256", wanted.sha256, images.SHA256),
    ):
        if not good.fullmatch(value):
            hints = {"--sha256": "it has 64 hexadecimal digits", "--version": "like 12.20261122"}
            hint = hints.get(what, "letters, digits and .+_- , at most 63")
            raise UsageError(f"{what} cannot be {value[:80]!r}", hint)
    for what in ("title", "os", "release", "driver"):
        if not getattr(wanted, what).isprintable():  # else no manifest could hold it
            raise UsageError(f"--{what} holds what cannot be printed", "give it in plain text")
    if bool(wanted.signature) != bool(wanted.keyring):
        raise UsageError(
            "--signature and --keyring belong together",
            "the keyring holds the keys that may have signed it",
        )
    for path in (wanted.file, wanted.signature, wanted.keyring):
        if path and not path.is_file():
            raise UsageError(f"there is no file {path}")
    _check_newer(root, wanted)


def _check_newer(root: Root, wanted: Wanted) -> None:
    found = images.catalogue(root)
    for there in found.everything:
        if there.name != wanted.name:
            continue
        # A damaged import may be brought again; the lower of two versions would never be used.
        anew = there.imported and there.name in found.faults
        if images.compare_versions(wanted.version, there.version) < (0 if anew else 1):
            raise UsageError(
                f"there is an image {there.label} already",
                f"give it another --name, or a --version higher than {there.version}",
            )


def _check_sum(wanted: Wanted, checksum: str) -> None:
    if checksum != wanted.sha256:
        raise HostError(
            f"{wanted.file} is not the file that is meant: its sha256 is {checksum}",
            "fetch it again, and take the sha256 from a source you trust",
        )


def _check_signature(wanted: Wanted, copied: Path) -> None:
    """Check a detached signature over the very bytes that were copied."""
    if not (wanted.signature and wanted.keyring):
        return
    signature, keyring = (str(path.absolute()) for path in (wanted.signature, wanted.keyring))
    verifier = shutil.which("gpgv") or shutil.which("sqv")
    if not verifier:
        raise HostError(
            "there is no program to check the signature with", "install one: apt install gpgv"
        )
    words = [verifier, "--keyring", keyring, signature, str(copied)]
    done = run(words, timeout=_SIGNATURE_SECONDS)
    if done.code:
        said = " ".join(done.err.split())[-300:] or f"code {done.code}"
        raise HostError(
            f"the signature {signature} of {wanted.file} is not good: {said}",
            f"see that {keyring} holds the signer's key, and fetch both files again",
        )


def _content_of(file: Path, copied: Path) -> _Content:
    """Find out by its content what a file is; raises HostError for what no VM should get."""
    done = run(["qemu-img", "info", "--output=json", str(copied)], timeout=_INFO_SECONDS)
    if done.code:
        said = re.sub(rf"\s*'?{re.escape(str(copied))}'?", "", done.err.strip())
        raise HostError(f"{file} is no disk image that QEMU can read: {said}")
    info = json.loads(done.out)
    kind = str(info["format"])
    reason = _objection(kind, info) or _wrong_name(kind, file, copied) or _damage(kind, copied)
    if reason:
        raise HostError(
            f"{file} {reason}", "what VMs start from is one file, qcow2 or raw, and whole"
        )
    return _Content(kind, int(info["virtual-size"]))


def _objection(kind: str, info: dict[str, Any]) -> str:
    details = info.get("format-specific", {}).get("data", {})
    if kind not in images.FORMATS:
        return f"is of the format {kind}"
    if info.get("backing-filename"):
        return f"is only a part: it lies over {info['backing-filename']}"
    if details.get("data-file"):
        return f"is only a part: its data is in {details['data-file']}"
    if info.get("encrypted") or details.get("encrypt"):
        return "is encrypted"
    if details.get("corrupt") or info.get("dirty-flag"):
        return "was not closed cleanly; `qemu-img check` tells more"
    if not info["virtual-size"]:
        return "holds a disk of no size"
    return ""


def _damage(kind: str, copied: Path) -> str:
    """A truncated qcow2 opens like a whole one; only its own tables tell."""
    if kind != "qcow2":
        return ""
    done = run(["qemu-img", "check", "-q", "-f", kind, str(copied)], timeout=_CHECK_SECONDS)
    whole = done.code in (0, _LEAKS)
    return "" if whole else "is truncated or damaged; `qemu-img check` tells more"


def _wrong_name(kind: str, file: Path, copied: Path) -> str:
    """A raw image has no mark of its own, so what is raw may be anything: a download page, too."""
    suffix = file.suffix.lower()
    if suffix in (".qcow2", ".raw") and suffix != f".{kind}":
        return f"is called {suffix}, but its content is {kind}"
    if kind == "raw":
        if suffix not in _RAW_SUFFIXES and re.fullmatch(r"\.[a-z]+\d?", suffix):
            return f"is called {suffix}, but its content is no disk image of that kind"
        with copied.open("rb") as stream:
            if stream.read(_BOOT_SECTOR)[-2:] != _BOOT_MARK:
                return "is no disk image: it is not qcow2 and has no partition table"
    return ""


def _named(root: Root, image: Image) -> Image:
    """Give the image a base of its own: disks may lie on what is there, whatever it holds now."""
    base = next((base for base in image.base_names if not root.exists(base)), None)
    if base is None:
        raise HostError(
            f"there are {len(image.base_names)} bases of this very image already",
            "delete VMs whose disks lie on them, or give it another --name",
        )
    return replace(image, path=base, base=base)


def _image(wanted: Wanted, content: _Content, size: int) -> Image:
    return Image(
        name=wanted.name,
        version=wanted.version,
        path="",
        format=content.format,
        sha256=wanted.sha256,
        size_bytes=size,
        virtual_size_bytes=content.virtual_size,
        title=wanted.title,
        os=wanted.os,
        release=wanted.release,
        driver=wanted.driver,
        manifest=f"{IMPORTED}/{wanted.name}.json",
    )


def default_version() -> str:
    """The version of an image whose version nobody says: the day of its import."""
    return time.strftime("%Y%m%d", time.gmtime())
