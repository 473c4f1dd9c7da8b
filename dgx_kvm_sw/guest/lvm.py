"""Logical volumes as disks: ours have a tag, and no other is ever touched."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from typing import Any

from dgx_kvm_sw.access.run import run, search_path
from dgx_kvm_sw.guest.checksums import Progress, unwatched
from dgx_kvm_sw.model.domain import Volume, VolumeGroup
from dgx_kvm_sw.model.errors import HostError

TAG = "dgx-kvm"
UNFINISHED = ".part"  # disk names hold no dot

_SECONDS = 120.0
_ZERO_SECONDS = 6 * 3600.0  # a drive that cannot write zeros by itself is sent every one of them
_PIECE_BYTES = 1 << 30
_UNITS = ("--reportformat", "json", "--units", "b", "--nosuffix")


def read() -> tuple[tuple[VolumeGroup, ...], tuple[Volume, ...]]:
    """Return all volume groups, and the logical volumes in them that are ours and finished.

    A host without LVM has none.
    """
    if not shutil.which("vgs", path=search_path()):
        return (), ()
    volumes = list(_volumes())
    groups = tuple(
        VolumeGroup(
            name=row["vg_name"],
            extent_mib=max(1, int(row["vg_extent_size"]) >> 20),
            free_mib=int(row["vg_free"]) >> 20,
            foreign=tuple(v.name for v, ours in volumes if v.group == row["vg_name"] and not ours),
        )
        for row in _report("vg", ("vgs", *_UNITS, "-o", "vg_name,vg_extent_size,vg_free"))
    )
    finished = (v for v, ours in volumes if ours and not v.name.endswith(UNFINISHED))
    return groups, tuple(sorted(finished, key=lambda volume: volume.name))


def create(volume: Volume, progress: Progress = unwatched) -> None:
    """Make a logical volume that reads as zeros: its blocks may have been another tenant's.

    It gets its name when it is ready, so one that was cut off is never taken for finished. The
    caller holds the lock: every unfinished one is a leftover.
    """
    for other, ours in _volumes():
        if ours and other.group == volume.group and other.name.endswith(UNFINISHED):
            _remove(other)
        if ours and other.path == volume.path:
            return
    part = f"{volume.name}{UNFINISHED}"
    tagged = ("lvcreate", "--yes", "--addtag", TAG, "--wipesignatures", "n", "--zero", "n")
    _run((*tagged, "--name", part, "--size", f"{volume.capacity_mib}m", volume.group))
    _zero(f"/dev/{volume.group}/{part}", volume.capacity_mib << 20, progress)
    _run(("lvrename", volume.group, part, volume.name))


def _zero(path: str, size: int, progress: Progress) -> None:
    """Zero a device piece by piece; the last one goes to its end, which LVM has rounded up."""
    zero = ("blkdiscard", "--force", "--zeroout")
    end = time.monotonic() + _ZERO_SECONDS
    for offset in range(0, size, _PIECE_BYTES):
        progress(offset, size)
        last = offset + _PIECE_BYTES >= size
        length = () if last else ("--length", str(_PIECE_BYTES))
        _run((*zero, "--offset", str(offset), *length, path), max(1.0, end - time.monotonic()))


def remove(path: str) -> None:
    """Remove a logical volume of ours; raises HostError for any other."""
    for volume, ours in _volumes():
        if volume.path == path and ours:
            _remove(volume)
            return
    raise HostError(f"{path} is not a logical volume that dgx-kvm made", "look at `lvs -o +tags`")


def _remove(volume: Volume) -> None:
    _run(("lvremove", "--yes", f"{volume.group}/{volume.name}"))


def _volumes() -> Iterator[tuple[Volume, bool]]:
    """All logical volumes, and whether each is ours."""
    for row in _report("lv", ("lvs", *_UNITS, "-o", "vg_name,lv_name,lv_size,lv_tags")):
        group, name = row["vg_name"], row["lv_name"]
        size = int(row["lv_size"]) >> 20
        volume = Volume(name, f"/dev/{group}/{name}", size, "raw", group=group)
        yield volume, TAG in row["lv_tags"].split(",")


def _report(kind: str, argv: tuple[str, ...]) -> list[dict[str, str]]:
    found: Any = json.loads(_run(argv))
    return [row for report in found["report"] for row in report[kind]]


def _run(argv: tuple[str, ...], seconds: float = _SECONDS) -> str:
    try:
        done = run(argv, timeout=seconds)
    except HostError as error:
        raise HostError(error.message, f"{error.hint} (lvm2, util-linux)") from error
    if done.code:
        said = [line.strip() for line in done.err.splitlines() if "WARNING" not in line]
        raise HostError(f"{argv[0]} refuses: {'; '.join(filter(None, said))}", f"try it: {argv}")
    return done.out
