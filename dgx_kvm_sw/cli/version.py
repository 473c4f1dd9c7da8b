"""The version of this program; only debian/changelog says it."""

from __future__ import annotations

import re
from pathlib import Path

from dgx_kvm_sw.model.errors import HostError

_CHANGELOG = Path(__file__).parents[2] / "debian/changelog"
_FIRST_LINE = re.compile(r"dgx-kvm-sw \(([^)\s]+)\)")


def version(changelog: Path = _CHANGELOG) -> str:
    """Read it from the source tree this runs in, else from the installed package's metadata."""
    try:
        with changelog.open(encoding="utf-8") as file:
            first = _FIRST_LINE.match(file.readline())
    except OSError:
        first = None
    if first:
        return first.group(1)
    from importlib import metadata

    try:
        return metadata.version("dgx-kvm-sw")
    except metadata.PackageNotFoundError as error:
        raise HostError(
            "the version is not known: there is no debian/changelog and no installed package",
            "reinstall the package dgx-kvm-sw",
        ) from error
