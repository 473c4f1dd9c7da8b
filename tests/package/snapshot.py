"""What is on a machine's disk, to compare before and after."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from package.machine import Machine

FOLDERS = ("boot", "etc", "opt", "root", "srv", "usr", "var")

# What programs of the system write about any package, or remember to be quick.
_OF_THE_SYSTEM = re.compile(
    r"""var/lib/(dpkg|apt)/
    |var/(log|cache|tmp)/
    |var/lib/systemd/deb-systemd-helper-
    |etc/ld\.so\.cache$
    |etc/\.pwd\.lock$
    |(usr|var)/lib/initramfs-tools/  # checksums of the images
    |boot/initrd\.img-  # holds times; its listing is compared instead
    |.*/__pycache__(/|$)
    """,
    re.VERBOSE,
)

# Of files already read. An overlay has its own device numbers, but the times of a file below it.
_hashes: dict[tuple[str, int, int, int, int], str] = {}


@dataclass(frozen=True)
class Entry:
    """One file, folder or link; `content` is a hash or where a link points."""

    kind: int
    mode: str
    owner: tuple[int, int]
    content: str


Snapshot = dict[str, Entry]


def take(machine: Machine, folders: tuple[str, ...] = FOLDERS) -> Snapshot:
    """Read all of a machine's disk but what the system keeps about any package."""
    return {name: entry for folder in folders for name, entry in _walk(machine.root, folder)}


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """Say what was added, removed and changed, one file a line."""
    found = [f"+ /{name}" for name in after.keys() - before.keys()]
    found += [f"- /{name}" for name in before.keys() - after.keys()]
    for name in before.keys() & after.keys():
        if before[name] != after[name]:
            found.append(f"~ /{name}")
    return sorted(found, key=lambda line: line[2:])


def _walk(root: Path, name: str) -> Iterator[tuple[str, Entry]]:
    if not (root / name).is_dir():
        return
    for item in os.scandir(root / name):
        inner = f"{name}/{item.name}"
        if _OF_THE_SYSTEM.match(inner):
            continue
        status = item.stat(follow_symlinks=False)
        owner = (status.st_uid, status.st_gid)
        kind = stat.S_IFMT(status.st_mode)
        content = _content(item, inner, status)
        yield inner, Entry(kind, oct(stat.S_IMODE(status.st_mode)), owner, content)
        if item.is_dir(follow_symlinks=False):
            yield from _walk(root, inner)


def _content(item: os.DirEntry[str], name: str, status: os.stat_result) -> str:
    if item.is_symlink():
        return os.readlink(item.path)
    if not item.is_file():
        return ""
    times = (status.st_mtime_ns, status.st_ctime_ns)
    key = (name, status.st_ino, status.st_size, *times)
    if key not in _hashes:
        _hashes[key] = hashlib.sha256(Path(item.path).read_bytes()).hexdigest()
    return _hashes[key]
