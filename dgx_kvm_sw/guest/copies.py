"""Full copies of images, made by qemu-img: under another name until they are whole."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from dgx_kvm_sw.access.files import explained, sync_path
from dgx_kvm_sw.access.run import run
from dgx_kvm_sw.guest.checksums import Progress, unwatched
from dgx_kvm_sw.model.domain import Volume
from dgx_kvm_sw.model.errors import HostError

UNFINISHED = ".part"

_SECONDS = 60.0
_COPY_SECONDS = 6 * 3600.0
_PERCENT = re.compile(r"\(([0-9.]+)/100%\)")  # as `qemu-img -p` says it


def needed_mib(volume: Volume) -> int:
    """How much of the pool a copy will take at first: an image may be compressed, a copy is not."""
    formats = ("-f", volume.source_format, "-O", volume.format)
    said = _qemu_img(
        ("measure", "--output=json", *formats, volume.source), _SECONDS, "dgx-kvm image verify"
    )
    return -(-int(json.loads(said)["required"]) >> 20)


def make(volume: Volume, progress: Progress = unwatched) -> None:
    """Copy the image; raises HostError and leaves nothing when that fails.

    The caller holds the lock: every unfinished copy is a leftover of one that was killed.
    """
    if os.path.lexists(volume.path):
        return  # an apply that was killed had finished it, or somebody's data are there
    folder = os.path.dirname(volume.path)
    part = f"{volume.path}{UNFINISHED}"
    reserve = ("-o", "preallocation=falloc") if volume.format == "raw" else ()
    grow = ("--preallocation=falloc",) if volume.format == "raw" else ()
    formats = ("-f", volume.source_format, "-O", volume.format)
    size = f"{volume.capacity_mib}M"
    try:
        for name in os.listdir(folder):
            if name.endswith(UNFINISHED):
                os.unlink(f"{folder}/{name}")
        os.close(os.open(part, os.O_CREAT | os.O_EXCL, 0o600))  # qemu-img keeps the mode
        total = needed_mib(volume) << 20

        def watch(said: str) -> None:
            if percents := _PERCENT.findall(said):
                progress(int(total * float(percents[-1]) / 100), total)

        convert = ("convert", "-p", *formats, *reserve, volume.source, part)
        _qemu_img(convert, _COPY_SECONDS, watch=watch)
        _qemu_img(("resize", "-q", "-f", volume.format, *grow, part, size), _COPY_SECONDS)
        sync_path(part)
        os.rename(part, volume.path)
        sync_path(folder)
    except OSError as error:
        raise explained(error, "make", Path(volume.path)) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


def _qemu_img(
    arguments: tuple[str, ...],
    seconds: float,
    hint: str = "see whether the disk is full",
    watch: Callable[[str], object] | None = None,
) -> str:
    done = run(("qemu-img", *arguments), timeout=seconds, watch=watch)
    if done.code:
        reason = " ".join(done.err.split()).removeprefix("qemu-img: ")
        raise HostError(f"qemu-img {arguments[0]} fails: {reason}", hint)
    return done.out
