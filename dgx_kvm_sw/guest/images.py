"""The catalogue of guest images: one manifest for each, of a package or made by an import."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.guest import checksums
from dgx_kvm_sw.guest.problems import did_you_mean, shown
from dgx_kvm_sw.model.errors import HostError

MANIFESTS = "/usr/share/dgx-kvm/images.d"
IMPORTED = "/var/lib/dgx-kvm/images.d"
BASES = "/var/lib/dgx-kvm/bases"
MANIFEST_VERSION = 1

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,62}")  # as in vms.schema.json
VERSION = re.compile(r"(?:[0-9]{1,9}:)?[0-9][A-Za-z0-9.+~-]{0,99}")  # Debian's
SHA256 = re.compile(r"[0-9a-f]{64}")
FORMATS = ("qcow2", "raw")

_MOST_BYTES = 1 << 62  # of a file or a disk; no file system has larger ones
_DIGITS = 12  # of a checksum, in the name of a base; prerm of image packages knows it
_BASE_NAME = re.compile(rf"{BASES}/(.+)-([0-9a-f]{{{_DIGITS}}})\.(?:qcow2|raw)")


@dataclass(frozen=True)
class Image:
    """A guest OS image that VM disks can be made from; the fields are those of a manifest."""

    name: str
    version: str
    path: str
    format: str
    sha256: str
    size_bytes: int  # of the file
    virtual_size_bytes: int  # of the disk in it
    title: str = ""
    os: str = ""
    release: str = ""
    variant: str = ""
    minimum_disk_mib: int = 0
    kernel: str = ""
    driver: str = ""  # NVIDIA's, in the guest
    firmware: tuple[str, ...] = ("uefi", "bios")
    cloud_init: bool = True
    guest_agent: bool = True
    package: str = ""  # "" for an import
    architecture: str = "amd64"
    manifest: str = field(default="", compare=False)  # the file all this is from
    base: str = field(default="", compare=False)  # what new overlays lie on: no package owns it

    @property
    def imported(self) -> bool:
        return self.manifest.startswith(f"{IMPORTED}/")

    @property
    def is_base(self) -> bool:
        """Whether its file is what disks lie on, as that of an import is."""
        return bool(base_owner(self.path))

    @property
    def base_names(self) -> tuple[str, ...]:
        """What its base may be called: a damaged one that disks lie on has to keep its name."""
        return tuple(f"{BASES}/{self.name}-{d}.{self.format}" for d in _digits(self.sha256))

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def source_hint(self) -> str:
        """How to get a good copy of it."""
        if self.imported:
            return f"`dgx-kvm image import` it again, with --name {self.name}"
        return f"apt install --reinstall {self.package}" if self.package else "put it back"


@dataclass(frozen=True)
class Fault:
    """Why an image is not used, in a word and in a sentence, and what to do."""

    state: str  # "truncated"
    reason: str
    remedy: str


@dataclass(frozen=True)
class Catalogue:
    """All images by name, and what is wrong with those that cannot be used."""

    images: dict[str, Image]
    problems: tuple[str, ...] = ()  # sentences about manifests that say nothing usable
    faults: dict[str, Fault] = field(default_factory=dict)  # by image, some without a manifest
    older: tuple[Image, ...] = ()  # of a name that a higher version has too
    damaged: dict[str, str] = field(default_factory=dict)  # bases, by path, and what is wrong

    @property
    def names(self) -> Collection[str]:
        return self.images.keys() | self.faults.keys()

    def cloud_init(self, name: str) -> bool:
        """Whether guests of this image read a seed; one whose manifest is bad may, like most."""
        return name not in self.images or self.images[name].cloud_init

    @property
    def everything(self) -> tuple[Image, ...]:
        return (*self.images.values(), *self.older)


def catalogue(root: Root, read: checksums.Remembered | None = None) -> Catalogue:
    """Read all manifests and look at their files; what is bad is named and hinders no other.

    The files are not read: that is done before the first use, and by `dgx-kvm image verify`,
    which gives what it has `read`, as it cannot always be remembered.
    """
    images: dict[str, Image] = {}
    problems: list[str] = []
    faults: dict[str, Fault] = {}
    older: list[Image] = []
    for where in _manifests(root, problems):
        try:
            image = parse(root.read(where), where)
        except (HostError, ValueError) as error:
            reason = error.message if isinstance(error, HostError) else ""
            reason = reason or f"{root.path(where)} is not an image manifest: {error}"
            problems.append(reason)
            remedy = "put a good manifest there, or remove it"
            faults[_stem(where)] = Fault("bad manifest", reason, remedy)
            continue
        other = images.setdefault(image.name, image)
        if other is not image:
            higher, lower = (image, other) if is_newer(image, other) else (other, image)
            images[image.name] = higher
            older.append(lower)
    for name in faults.keys() & images.keys():  # another manifest has a good one of that name
        del faults[name]
    memory = {**checksums.remembered(root), **(read or {})}
    damaged = _damaged_bases(root, (*images.values(), *older), memory)
    for image in tuple(images.values()):
        good = next((base for base in image.base_names if base not in damaged), "")
        if not image.is_base:
            images[image.name] = replace(image, base=good)
        if fault := fault_of(root, image, memory):
            faults[image.name] = fault
        elif not (good or image.is_base):
            faults[image.name] = _no_base(image)
    return Catalogue(images, tuple(problems), faults, tuple(older), damaged)


def _manifests(root: Root, problems: list[str]) -> Iterator[str]:
    for folder in (MANIFESTS, IMPORTED):
        try:
            names = root.names(folder)
        except HostError as error:
            problems.append(error.message)
            continue
        for name in names:
            if name.endswith(".json") and not name.startswith("."):
                yield f"{folder}/{name}"


def _stem(where: str) -> str:
    return where.rpartition("/")[2].removesuffix(".json")


def is_newer(image: Image, other: Image) -> bool:
    """Whether the version is higher by Debian's rules."""
    return compare_versions(image.version, other.version) > 0


def compare_versions(one: str, other: str) -> int:
    """Compare by Debian's rules: below 0, 0, or above 0."""
    from debian.debian_support import version_compare  # 40 ms that most commands need not pay

    return int(version_compare(one, other))


def base_owner(path: str) -> str:
    """Return the name of the image that a base of ours was made of, or "" for any other file."""
    found = _BASE_NAME.fullmatch(path)
    return found[1] if found else ""


def base_files(root: Root) -> list[str]:
    """The paths of all bases that there are."""
    paths = (f"{BASES}/{name}" for name in root.names(BASES))
    return [path for path in paths if base_owner(path)]


def _digits(sha256: str) -> tuple[str, ...]:
    """The digits of a checksum that a base may be called by."""
    return tuple(sha256[n : n + _DIGITS] for n in range(0, len(sha256) - _DIGITS, _DIGITS))


# -- the files of images ------------------------------------------------------------------------


def fault_of(root: Root, image: Image, memory: checksums.Remembered) -> Fault | None:
    """Look whether the file is there and as long as it has to be, and remember what was read."""
    path = root.path(image.path)
    try:
        found = path.stat()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        text = f"the file {path} of image {image.label} cannot be used: {reason}"
        return Fault("file missing", text, image.source_hint)
    if not stat.S_ISREG(found.st_mode):
        text = f"{path} of image {image.label} is not a file"
        return Fault("not a file", text, image.source_hint)
    if found.st_size != image.size_bytes:
        state = "truncated" if found.st_size < image.size_bytes else "too long"
        text = (
            f"the file {path} of image {image.label} is {state}:"
            f" {found.st_size} bytes instead of {image.size_bytes}"
        )
        return Fault(state, text, image.source_hint)
    return mismatch(root, image, checksums.known(memory, image.path, found) or image.sha256)


def base_damage(root: Root, base: str, memory: checksums.Remembered, size_bytes: int = 0) -> str:
    """Say what is known to be wrong with a base, by its length or since somebody has read it; ""
    for one that is good, or not there.
    """
    name = _BASE_NAME.fullmatch(base)
    if not (name and root.exists(base)):
        return ""
    found = root.path(base).stat()
    if size_bytes and found.st_size != size_bytes:
        return f"it has {found.st_size} bytes instead of {size_bytes}"
    checksum = checksums.known(memory, base, found)
    return f"its sha256 is {checksum}" if checksum and name[2] not in _digits(checksum) else ""


def _damaged_bases(
    root: Root, images: Collection[Image], memory: checksums.Remembered
) -> dict[str, str]:
    """Look at all bases, those of older images too: disks may lie on each."""
    sizes = {base: image.size_bytes for image in images for base in image.base_names}
    found = {}
    with contextlib.suppress(HostError):  # who may not look there makes no disk either
        for path in base_files(root):
            if damage := base_damage(root, path, memory, sizes.get(path, 0)):
                found[path] = damage
    return found


def _no_base(image: Image) -> Fault:
    text = f"every base of image {image.label} is damaged, the last one {image.base_names[-1]}"
    return Fault("bases damaged", text, "look at the drive, and delete the VMs on one of them")


def mismatch(root: Root, image: Image, checksum: str) -> Fault | None:
    """The fault of an image whose file has another checksum than its manifest says."""
    if checksum == image.sha256:
        return None
    text = (
        f"the file {root.path(image.path)} of image {image.label} is damaged: its sha256 is"
        f" {checksum}, its manifest says {image.sha256}"
    )
    return Fault("hash mismatch", text, image.source_hint)


def refusal(
    found: Catalogue, name: str, disk_mib: int, disk: str, firmware: str
) -> tuple[str, str] | None:
    """Say why no disk of this size can be made of an image for a VM, and what to do."""
    if fault := found.faults.get(name):
        return fault.reason, fault.remedy
    if name not in found.images:
        hint = did_you_mean(name, found.names) or "`dgx-kvm image list` lists the images"
        return f"there is no image {shown(name)}", hint
    image = found.images[name]
    needed = max(image.minimum_disk_mib, -(-image.virtual_size_bytes // (1 << 20)))
    if disk_mib < needed:
        return (
            f"disk {disk} has {disk_mib / 1024:g} GiB, image {image.label} needs {needed} MiB",
            f"give the VM an os_disk of {-(-needed // 1024)}GiB or more",
        )
    if firmware not in image.firmware:
        known = " or ".join(image.firmware)
        return f"image {image.label} does not boot by {firmware}", f"say firmware: {known}"
    return None


# -- manifests ----------------------------------------------------------------------------------


def parse(text: str, where: str = "") -> Image:
    """Read a manifest; raises ValueError with what is wrong with it."""
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError("it holds no JSON object")
    if data.get("manifest") != MANIFEST_VERSION:
        known = f"this dgx-kvm knows version {MANIFEST_VERSION} only"
        raise ValueError(f"it is of manifest version {data.get('manifest', 'none')}, and {known}")
    values = {f.name: _value(f, data) for f in _fields() if f.name in data or _is_required(f)}
    image = Image(**values, manifest=where)
    _check(image)
    return replace(image, base=image.path if image.is_base else image.base_names[0])


def manifest_text(image: Image) -> str:
    """Return the manifest of an image."""
    values = {f.name: getattr(image, f.name) for f in _fields()}
    return json.dumps({"manifest": MANIFEST_VERSION, **values}, indent=1) + "\n"


def _fields() -> tuple[dataclasses.Field[Any], ...]:
    return tuple(f for f in dataclasses.fields(Image) if f.name not in ("manifest", "base"))


def _is_required(each: dataclasses.Field[Any]) -> bool:
    return each.default is dataclasses.MISSING


_KINDS = {"str": (str, "a text"), "int": (int, "a number"), "bool": (bool, "true or false")}


def _value(each: dataclasses.Field[Any], data: dict[str, Any]) -> Any:
    if each.name not in data:
        raise ValueError(f"{each.name!r} is missing")
    value = data[each.name]
    if each.name == "firmware":
        if not (isinstance(value, list) and value and {*map(str, value)} <= {"uefi", "bios"}):
            raise ValueError("'firmware' is not a list of uefi, bios or both")
        return tuple(value)
    kind, words = _KINDS[str(each.type)]
    if type(value) is not kind:
        raise ValueError(f"{each.name!r} is not {words}: {value!r}")
    if isinstance(value, str) and not value.isprintable():
        raise ValueError(f"{each.name!r} holds what cannot be printed: {value!r}")
    if isinstance(value, int) and not 0 <= value <= _MOST_BYTES:
        raise ValueError(f"{each.name!r} cannot be {str(value)[:40]}")
    return value


def _is_plain(path: str) -> bool:
    return os.path.normpath(path) == path


def _check(image: Image) -> None:
    for key, value, good in (
        ("name", image.name, NAME.fullmatch(image.name)),
        ("version", image.version, VERSION.fullmatch(image.version)),
        ("sha256", image.sha256, SHA256.fullmatch(image.sha256)),
        ("format", image.format, image.format in FORMATS),
        ("path", image.path, re.match("/[^/]", image.path) and _is_plain(image.path)),
        ("size_bytes", image.size_bytes, image.size_bytes > 0),
        ("virtual_size_bytes", image.virtual_size_bytes, image.virtual_size_bytes > 0),
    ):
        if not good:
            raise ValueError(f"{key!r} cannot be {value!r}")
