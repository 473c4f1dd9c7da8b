"""Image packages and imports as tests lay them down: a manifest and a file of a few bytes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.guest.images import BASES, IMPORTED, MANIFESTS, Image, parse

BYTES = b"the disk of a guest\n" * 100


def manifest(name: str, content: bytes = BYTES, **fields: Any) -> dict[str, Any]:
    """Return the manifest of an image package."""
    checksum = hashlib.sha256(content).hexdigest()
    return {
        "manifest": 1,
        "name": name,
        "version": "1.0",
        "path": f"/usr/share/dgx-kvm/images/{name}.qcow2",
        "format": "qcow2",
        "sha256": checksum,
        "size_bytes": len(content),
        "virtual_size_bytes": 1 << 30,
        "package": f"dgx-kvm-image-{name}",
        **fields,
    }


def describe(root: Root, name: str, path: str, **fields: Any) -> Image:
    """Put the manifest of a file that is there into the catalogue."""
    data = manifest(name, root.path(path).read_bytes(), path=path, **fields)
    image = parse(json.dumps(data), f"{MANIFESTS}/{name}.json")
    root.write(image.manifest, json.dumps(data), sync=False)
    return image


def add(
    root: Root, name: str, content: bytes = BYTES, folder: str = MANIFESTS, **fields: Any
) -> Image:
    """Put an image and its manifest into a root, as a package does, or an import."""
    data = manifest(name, content, **fields)
    if folder == IMPORTED:
        data |= {"path": f"{BASES}/{name}-{data['sha256'][:12]}.qcow2", "package": ""}
    image = parse(json.dumps(data), f"{folder}/{name}.json")
    path = root.path(image.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    root.write(image.manifest, json.dumps(data), sync=False)
    return image
