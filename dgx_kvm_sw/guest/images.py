"""The catalogue of guest images: one manifest for each, put there by the image packages."""

from __future__ import annotations

import json
from dataclasses import dataclass

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.model.errors import HostError

MANIFESTS = "/usr/share/dgx-kvm/images.d"


@dataclass(frozen=True)
class Image:
    """A guest OS image that VM disks can be made from."""

    name: str
    path: str
    format: str


@dataclass(frozen=True)
class Catalogue:
    """All images by name, and sentences about manifests that are not usable."""

    images: dict[str, Image]
    problems: tuple[str, ...]


def catalogue(root: Root) -> Catalogue:
    """Read all manifests; a bad one is named in `problems` and hinders no other."""
    images: dict[str, Image] = {}
    problems = []
    for file in root.names(MANIFESTS):
        if not file.endswith(".json"):
            continue
        where = f"{MANIFESTS}/{file}"
        try:
            data = json.loads(root.read(where))
            image = Image(str(data["name"]), str(data["path"]), str(data["format"]))
        except HostError as error:
            problems.append(error.message)
            continue
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{root.path(where)} is not an image manifest: {error!r}")
            continue
        images[image.name] = image
    return Catalogue(images, tuple(problems))
