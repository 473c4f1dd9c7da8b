"""From a recipe to a package; an image is made once and kept until something that goes in changes.

The day's state of the archive does not count as such: FRESH=1 makes an image anew, with updates.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.images.disk import make_disk, make_qcow2
from tools.images.package import make_package
from tools.images.programs import BuildError
from tools.images.recipes import Image
from tools.images.sources import sources
from tools.images.tree import Identity, contents, environment, make_tree, remove

TREE = Path(__file__).parents[2]
CACHE = TREE / ".cache/images"
STARTED = time.monotonic()
# What a build takes on disk at its peak: the tree, the raw disk and the qcow2.
NEEDED_GIB, NEEDED_GIB_WITH_DRIVER = 5, 12


def build(image: Image, target: Path, fresh: bool = False) -> Path:
    """Leave the image's package in a folder, and return it."""
    if os.geteuid():
        raise BuildError(f"building {image.name} needs root", "run make images as root")
    with _alone(image):
        made = _made(image, fresh)
        facts = json.loads((made / "facts.json").read_text(encoding="utf-8"))
        with step(f"{image.name}: package"):
            deb = make_package(image, facts, made / "image.qcow2", made)
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob(f"{image.package}_*.deb"):
        old.unlink()
    return Path(shutil.move(deb, target / deb.name))


def _made(image: Image, fresh: bool) -> Path:
    """The folder with image.qcow2 and facts.json."""
    folder = CACHE / f"{image.name}-{_key(image)}"
    if (folder / "facts.json").exists() and not fresh:
        say(f"{image.name}: as it was built before; FRESH=1 builds it anew")
        return folder
    _check_room(image)
    new, epoch = CACHE / f"{image.name}.new", _epoch()
    remove(new)
    new.mkdir(mode=0o755)
    identity = Identity.of(image, _version(image, epoch), epoch)
    try:
        facts = _make(image, identity, new)
    except BaseException:  # Ctrl-C among them
        remove(new)
        raise
    (new / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    for old in _earlier(image):
        remove(old)
    new.rename(folder)
    return folder


def _make(image: Image, identity: Identity, folder: Path) -> dict[str, Any]:
    log = CACHE / f"{image.name}.log"
    log.write_text("")
    with step(f"{image.name}: packages of {image.suite}"):
        root = make_tree(image, identity, folder, log)
        inside = contents(root, log)
    with step(f"{image.name}: disk"):
        disk = make_disk(root, identity, folder, log)
        remove(root)
    with step(f"{image.name}: compression"):
        qcow2 = folder / "image.qcow2"
        virtual_size = make_qcow2(disk, qcow2, log)
        disk.unlink()
    return {
        "version": identity.version,
        "epoch": identity.epoch,
        "kernel": inside.kernel,
        "driver": inside.driver,
        "packages": inside.packages,
        "sha256": _sha256(qcow2),
        "size_bytes": qcow2.stat().st_size,
        "virtual_size_bytes": virtual_size,
    }


def _key(image: Image) -> str:
    """A digest of all that decides how an image comes out, but for the state of the archive."""
    parts = [repr(environment(image, Identity("", 0, "", ""))), repr(image.packages)]
    parts.append(sources(image))
    files = [path for path in sorted(image.overlay.rglob("*")) if path.is_file()]
    files += [*image.hooks, *(Path(__file__).with_name(f"{name}.py") for name in ("tree", "disk"))]
    for path in files:
        parts += [path.name, path.read_text(encoding="utf-8")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _epoch() -> int:
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    if given and not given.isdecimal():
        raise BuildError(f"SOURCE_DATE_EPOCH is {given!r}", "it is seconds since 1970")
    return int(given or time.time())


def _version(image: Image, epoch: int) -> str:
    """Release and date; a second build of one day with other contents is .1 of that day."""
    version = f"{image.release}.{time.strftime('%Y%m%d', time.gmtime(epoch))}"
    taken = {json.loads((old / "facts.json").read_text())["version"] for old in _earlier(image)}
    names = [version, *(f"{version}.{number}" for number in range(1, 1000))]
    latest = max((names.index(name) for name in taken if name in names), default=-1)
    return names[latest + 1]


def _earlier(image: Image) -> list[Path]:
    found = CACHE.glob(f"{image.name}-????????????")
    return sorted(path for path in found if (path / "facts.json").exists())


def _check_room(image: Image) -> None:
    needed = NEEDED_GIB_WITH_DRIVER if image.driver else NEEDED_GIB
    free = shutil.disk_usage(CACHE).free / (1 << 30)
    if free < needed:
        raise BuildError(
            f"building {image.name} takes {needed} GiB and {CACHE} has {free:.1f} GiB free",
            "make room, then build again",
        )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _alone(image: Image) -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{image.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(f"{image.name} is being built already", "wait for that") from None
        yield


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Say what is being done, and when it is done how long it took."""
    begin = time.monotonic()
    yield
    say(f"{text}: {time.monotonic() - begin:.0f} s")


def say(text: str) -> None:
    """A line of progress, with the seconds since the program started."""
    print(f"[{time.monotonic() - STARTED:6.1f}] {text}", flush=True)
