"""Tell the administrator's hooks which guest images have come and gone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dgx_kvm_sw.access.files import Root, locked
from dgx_kvm_sw.access.hooks import run_hooks
from dgx_kvm_sw.guest import images
from dgx_kvm_sw.model.errors import HostError

ADDED, REMOVED = "image-added", "image-removed"
ANNOUNCED = "/var/lib/dgx-kvm/catalogue.json"

_LOCK = "/run/dgx-kvm/catalogue.lock"
_LOCK_SECONDS = 600.0  # another one's hooks


@dataclass(frozen=True)
class Entry:
    """What hooks get to know of an image."""

    name: str
    version: str
    path: str


@dataclass(frozen=True)
class News:
    added: tuple[Entry, ...]
    removed: tuple[Entry, ...]


_NONE = News((), ())


def announce(
    root: Root,
    log: Callable[[Mapping[str, object]], None],
    failed: Callable[[HostError], None],
) -> News:
    """Run the hooks for what has changed since the last time, and remember what there is now.

    An image that cannot be used has not come; one that was there and cannot be used now has not
    gone. `failed` is told of hooks that fail; the others run all the same.
    """
    if _news(root)[0] == _NONE:  # nothing is written and nobody waited for
        return _NONE
    holder = f"another `dgx-kvm image` (process {os.getpid()})"
    with locked(root.path(_LOCK), holder, _LOCK_SECONDS):
        news, known = _news(root)
        for stage, entries in ((ADDED, news.added), (REMOVED, news.removed)):
            for entry in entries:
                run_hooks(root, stage, _environment(root, entry), log, failed=failed)
        _remember(root, known)
    return news


def _news(root: Root) -> tuple[News, dict[str, Entry]]:
    """Compare what hooks know of with what is there; the second is what they know of then."""
    before, now = _announced(root), images.catalogue(root)
    usable = {
        name: Entry(name, image.version, image.path)
        for name, image in now.images.items()
        if name not in now.faults
    }
    added = tuple(new for name, new in usable.items() if _is_new(before.get(name), new))
    removed = tuple(old for name, old in before.items() if name not in now.names)
    kept = {name: old for name, old in before.items() if name in now.names}
    return News(added, removed), {**kept, **usable}


def _is_new(old: Entry | None, new: Entry) -> bool:
    return old is None or old.version != new.version


def _environment(root: Root, entry: Entry) -> dict[str, str]:
    return {
        "DGX_KVM_IMAGE": entry.name,
        "DGX_KVM_IMAGE_VERSION": entry.version,
        "DGX_KVM_IMAGE_PATH": str(root.path(entry.path)),
    }


def _announced(root: Root) -> dict[str, Entry]:
    """What hooks know of; after a damage they are told of all images anew."""
    try:
        entries = json.loads(root.read(ANNOUNCED, "{}")).get("images", {})
        return {n: Entry(n, str(e["version"]), str(e["path"])) for n, e in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _remember(root: Root, entries: Mapping[str, Entry]) -> None:
    known = {name: {"version": e.version, "path": e.path} for name, e in sorted(entries.items())}
    root.write(ANNOUNCED, json.dumps({"version": 1, "images": known}, indent=1) + "\n")
