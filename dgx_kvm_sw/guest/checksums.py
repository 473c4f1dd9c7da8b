"""SHA-256 of image files: read once for each state of a file, then remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from dgx_kvm_sw.access.files import Root, explained
from dgx_kvm_sw.model.errors import HostError

REMEMBERED = "/var/lib/dgx-kvm/checksums.json"

CHUNK = 4 << 20
_TELL_SECONDS = 0.2

Progress = Callable[[int, int], None]  # bytes done, of how many


def unwatched(done: int, total: int) -> None:
    """The progress that nobody looks at."""


@dataclass(frozen=True)
class State:
    """What tells that a file is still the one that was read."""

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> State:
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


Remembered = Mapping[str, tuple[State, str]]  # by path: the state, and the checksum it has


class Ticker:
    """Tells progress a few times a second, not for every piece."""

    def __init__(self, total: int, tell: Progress) -> None:
        self._total, self._tell = total, tell
        self._done, self._next = 0, 0.0

    def add(self, number: int) -> None:
        self._done += number
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _TELL_SECONDS
            self._tell(self._done, max(self._total, self._done))


def sha256_of(path: Path, progress: Progress = unwatched) -> str:
    """Read a whole file and return its SHA-256 in hexadecimal digits."""
    try:
        with path.open("rb", buffering=0) as stream:
            ticker = Ticker(os.fstat(stream.fileno()).st_size, progress)
            return digest_of(stream, ticker)
    except OSError as error:
        raise explained(error, "read", path) from error


def digest_of(
    stream: BinaryIO, ticker: Ticker, use: Callable[[bytes], object] = lambda piece: None
) -> str:
    """Return the SHA-256 of what is left of a stream, each piece of which `use` gets too."""
    checksum = hashlib.sha256()
    while piece := stream.read(CHUNK):
        checksum.update(piece)
        use(piece)
        ticker.add(len(piece))
    return checksum.hexdigest()


def remembered(root: Root) -> Remembered:
    """Return what has been read so far; a memory that is damaged is none."""
    try:
        files = json.loads(root.read(REMEMBERED, "{}")).get("files", {})
        return {
            path: (State(int(f["inode"]), int(f["size"]), int(f["mtime_ns"])), str(f["sha256"]))
            for path, f in files.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def known(memory: Remembered, path: str, found: os.stat_result) -> str:
    """Return the checksum of a file that has not changed since it was read, or ""."""
    state, checksum = memory.get(path, (None, ""))
    return checksum if state == State.of(found) else ""


def remember(root: Root, path: str, found: os.stat_result, checksum: str) -> None:
    """Keep a checksum of the file as it was found; what cannot be kept is read again."""
    files = {
        name: {**asdict(state), "sha256": value}
        for name, (state, value) in remembered(root).items()
        if root.exists(name)
    }
    files[path] = {**asdict(State.of(found)), "sha256": checksum}
    with contextlib.suppress(HostError):
        root.write(REMEMBERED, json.dumps({"version": 1, "files": files}, indent=1), sync=False)
