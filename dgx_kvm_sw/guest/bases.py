"""Base files: verified copies of images that overlays lie on, and that no upgrade replaces.

A base is never written once it has its name; it is removed when no disk lies on it and no
manifest speaks of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from dgx_kvm_sw.access.files import Root, explained, locked, sync_path
from dgx_kvm_sw.guest import checksums, images
from dgx_kvm_sw.guest.checksums import Progress, unwatched
from dgx_kvm_sw.guest.images import BASES, Catalogue, Image
from dgx_kvm_sw.model.domain import CurrentState, Volume
from dgx_kvm_sw.model.errors import HostError

MODE = 0o444  # tenants share it

_LOCK = "/run/dgx-kvm/images.lock"
_LOCK_SECONDS = 60.0  # it is only ever held for moments
_ADOPTING = ".adopting-"  # of `adopt`, which the lock of the VMs allows once at a time
_PARTIAL = ".partial-"  # of an import; whoever writes it holds a lock on it
_SPARE_BYTES = 64 << 20  # what is left free on a file system
_ANEW = "save what their guests need, then make these VMs and their disks anew"
_RESTORE = "put that very file back, or mount what it is on, before they are started"
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)


def adopt(root: Root, image: Image, progress: Progress = unwatched) -> None:
    """Verify an image's file and make its base of it: a link where that is possible, else a copy.

    A package's file is replaced by an upgrade, never written to, so a link keeps what it has.
    Raises HostError when the file is not what the manifest says, or there is no room.
    """
    base = root.path(image.base)
    if base.exists():
        _check_is_good(root, image)
        return
    temporary = base.with_name(f"{_ADOPTING}{base.name}")
    try:
        make_folder(root)
        temporary.unlink(missing_ok=True)
        checksum = _link(root, image, temporary, progress)
        if checksum is None:
            checksum = _copy(root, image, temporary, progress)
        if fault := images.mismatch(root, image, checksum):
            raise HostError(fault.reason, fault.remedy)
        with temporary.open("rb") as stream:
            put_in_place(stream, temporary, base)
    except OSError as error:
        raise explained(error, "make", base) from error
    finally:
        with contextlib.suppress(OSError):  # what has gone wrong before is told
            temporary.unlink(missing_ok=True)


def _check_is_good(root: Root, image: Image) -> None:
    memory = checksums.remembered(root)
    if damage := images.base_damage(root, image.base, memory, image.size_bytes):
        raise HostError(
            f"the base {root.path(image.base)} of image {image.label} is damaged ({damage}), so no"
            " disk is made of it",
            "repeat this command: it makes another base",
        )


def _link(root: Root, image: Image, temporary: Path, progress: Progress) -> str | None:
    """Link the file and return its checksum; None where the file system has no links for it."""
    source = root.path(image.path).resolve()
    try:
        os.link(source, temporary)
    except OSError as error:
        if error.errno in _NO_LINK:
            return None
        raise
    found = temporary.stat()  # of the link: nobody can exchange it any more
    memory = checksums.remembered(root)
    checksum = checksums.known(memory, image.path, found)
    if not checksum:
        checksum = checksums.sha256_of(temporary, progress)
        checksums.remember(root, image.path, found, checksum)
    return checksum


def _copy(root: Root, image: Image, temporary: Path, progress: Progress) -> str:
    source = root.path(image.path)
    check_room(temporary.parent, source)
    with source.open("rb", buffering=0) as stream, temporary.open("wb", buffering=0) as target:
        checksum = copy_stream(stream, target, progress)
        checksums.remember(root, image.path, os.fstat(stream.fileno()), checksum)
    return checksum


def copy_stream(source: BinaryIO, target: BinaryIO, progress: Progress = unwatched) -> str:
    """Copy a file, holes as holes, and return the checksum of what was read."""

    def write(piece: bytes) -> None:
        if piece.count(0) == len(piece):
            target.seek(len(piece), os.SEEK_CUR)
            return
        rest = memoryview(piece)
        while rest:
            rest = rest[target.write(rest) :]

    ticker = checksums.Ticker(os.fstat(source.fileno()).st_size, progress)
    checksum = checksums.digest_of(source, ticker, write)
    target.truncate(target.tell())
    return checksum


def check_room(folder: Path, source: Path) -> None:
    """Raise HostError unless a copy of `source` fits there, with some room to spare."""
    there = os.statvfs(folder)
    free = there.f_bavail * there.f_frsize
    needed = _copy_bytes(source)
    if free < needed:
        raise HostError(
            f"a copy of {source} does not fit in {folder}: it needs {needed >> 20} MiB,"
            f" {free >> 20} MiB are free",
            "free some space on that file system, then repeat this command",
        )


def _copy_bytes(source: Path) -> int:
    return source.stat().st_blocks * 512 + _SPARE_BYTES


def copy_mib(root: Root, image: Image) -> int:
    """How much room a base that is still to be made takes: none where it can be a link."""
    source, folder = root.path(image.path), root.path(BASES)
    try:
        if root.exists(image.base) or source.stat().st_dev == device(folder):
            return 0
        return -(-_copy_bytes(source) >> 20)
    except OSError:
        return 0  # whoever makes it says why it cannot


def device(folder: Path) -> int:
    """The file system that a folder is on, or will be."""
    while not folder.exists():
        folder = folder.parent
    return folder.stat().st_dev


def make_folder(root: Root) -> None:
    """Make the folder of the bases; QEMU runs as a user that has to come to them."""
    folder = root.path(BASES)
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)


def put_in_place(stream: BinaryIO, temporary: Path, base: Path) -> None:
    """Give a finished file its name, so that after a power cut it is whole or not there."""
    if os.geteuid() == 0:
        os.fchown(stream.fileno(), 0, 0)
    os.fchmod(stream.fileno(), MODE)
    os.fsync(stream.fileno())
    os.replace(temporary, base)
    sync_path(base.parent)


@contextlib.contextmanager
def partial_file(root: Root) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file beside the bases, gone at the end unless it got a name of its own; what a
    killed command has left is removed first.
    """
    make_folder(root)
    path = ""
    try:
        with images_locked(root):
            _remove_left_overs(root)
            descriptor, path = tempfile.mkstemp(prefix=_PARTIAL, dir=root.path(BASES))
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with os.fdopen(descriptor, "wb", buffering=0) as stream:
            yield stream, Path(path)
    finally:  # Ctrl-C comes at any moment
        if path:
            Path(path).unlink(missing_ok=True)


def _remove_left_overs(root: Root) -> None:
    """Remove what killed imports have left; nobody holds a lock on it any more."""
    for path in root.path(BASES).glob(f"{_PARTIAL}*"):
        with path.open("rb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            path.unlink(missing_ok=True)


def images_locked(root: Root) -> AbstractContextManager[None]:
    """A context in which no other command gives a base its name or removes one."""
    holder = f"another `dgx-kvm` (process {os.getpid()})"
    return locked(root.path(_LOCK), holder, _LOCK_SECONDS)


def users(current: CurrentState, volumes: Iterable[Volume] | None = None) -> dict[str, set[str]]:
    """Return, by file, the VMs whose disks are that file or lie on it; a kept disk of a VM that
    is gone counts. `volumes` are those of the pool where it was looked at anew.
    """
    found: dict[str, set[str]] = {}
    for volume in current.volumes if volumes is None else volumes:
        found.setdefault(volume.backing, set()).add(volume.name.partition(".")[0])
    for domain in current.domains:
        for facts in filter(None, (domain.facts, domain.live)):
            for disk in facts.disks:
                found.setdefault(disk.backing, set()).add(domain.name)
                found.setdefault(disk.path, set()).add(domain.name)
    found.pop("", None)
    return found


def damages(
    root: Root, found: Catalogue, users: Mapping[str, Collection[str]]
) -> Iterator[tuple[str, str, str]]:
    """Yield each base that is damaged or gone, that with whose disks lie on it, and what to do.

    A disk stays on its base, whatever that holds now: nothing else fits to what is in the disk.
    """
    for base, damage in found.damaged.items():
        text = f"the base {base} is damaged: {damage}; no new disk will lie on it"
        if vms := ", ".join(sorted(users.get(base, ()))):
            yield base, f"{text}, but those of {vms} do", _ANEW
        else:
            yield base, text, ""
    for base in sorted(users):
        if images.base_owner(base) and _is_gone(root.path(base)):
            vms = ", ".join(sorted(users[base]))
            yield base, f"the base {base} is gone, and disks of {vms} lie on it", _RESTORE


def _is_gone(path: Path) -> bool:
    """Whether it is not there for sure, as far as who runs us may look."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def remove_unneeded(root: Root, needed: Collection[str]) -> tuple[str, ...]:
    """Remove the bases that no disk lies on and no manifest speaks of; return their paths.

    `needed` are the files that disks lie on. With a manifest that cannot be read nothing is
    removed: it may speak of the only copy of an image.
    """
    removed = []
    with images_locked(root):
        _remove_left_overs(root)
        found = images.catalogue(root)
        if found.problems:
            return ()
        kept = {*needed, *(path for i in found.everything for path in (i.base, i.path))}
        for name in root.names(BASES):
            path = f"{BASES}/{name}"
            if name.startswith(_ADOPTING) or (images.base_owner(path) and path not in kept):
                root.remove(path)
                removed.append(path)
    return tuple(removed)
