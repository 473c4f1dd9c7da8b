"""What takes minutes to make is made once: directories named by a digest of all that goes in."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / ".cache" / "lab"
STARTED = time.monotonic()
CLEAR = "\r\x1b[K"  # the line of the terminal


def say(text: str) -> None:
    """A line of progress, with the seconds since the program started."""
    over = CLEAR if sys.stdout.isatty() else ""
    print(f"{over}[{time.monotonic() - STARTED:6.1f}] {text}", flush=True)


def hint(text: str) -> None:
    """What is being done: on a terminal, until the next line."""
    if sys.stdout.isatty():
        print(f"{CLEAR}... {text}", end="", flush=True)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Say what is being done, then how long it took."""
    say(f"{text} ...")
    begin = time.monotonic()
    yield
    say(f"{text}: {time.monotonic() - begin:.1f} s")


def made(name: str, recipe: object, make: Callable[[Path], None]) -> Path:
    """The directory that `make` fills; made only if there is none of this recipe yet.

    Others of the same name are older recipes and are removed, unless a process still uses them.
    """
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    directory = ROOT / f"{name}-{key}"
    ROOT.mkdir(parents=True, exist_ok=True)
    with open(ROOT / f"{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is making {name}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if directory.exists():
            _hold(directory)
            return directory
        for old in ROOT.glob(f"{name}-????????????"):
            _remove_unused(old)
        new = ROOT / f"{name}.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        with step(f"making {name}"):
            make(new)
        os.rename(new, directory)
        _hold(directory)
    return directory


def _hold(directory: Path) -> None:
    """Mark a directory as used until this process ends: so the descriptor is never closed."""
    fcntl.flock(os.open(directory, os.O_RDONLY), fcntl.LOCK_SH)


def _remove_unused(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory)
    except BlockingIOError:
        say(f"{directory.name} is in use and stays")
    finally:
        os.close(descriptor)
