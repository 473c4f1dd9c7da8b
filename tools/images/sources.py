"""Where the packages of an image come from: this machine's own archive, or one that is named.

Environment: UBUNTU_MIRROR, the address of an archive of Ubuntu; UBUNTU_KEYRING, its keys;
IMAGE_SOURCES, a .sources file with more archives for every image.
"""

from __future__ import annotations

import os
from pathlib import Path

from tools import archive
from tools.images.programs import BuildError
from tools.images.recipes import Image

_UBUNTU_KEYRING = "/usr/share/keyrings/ubuntu-archive-keyring.gpg"


def sources(image: Image) -> str:
    """The deb822 sources of an image, for the build alone: none stays in it."""
    try:
        text = _ubuntu(image) if image.os == "ubuntu" else _debian(image)
        more = os.environ.get("IMAGE_SOURCES", "")
        return f"{text}\n{Path(more).read_text(encoding='utf-8')}" if more else text
    except OSError as error:
        raise BuildError(
            f"{error.filename} cannot be read: {error.strerror}",
            "IMAGE_SOURCES names a file in the form of /etc/apt/sources.list.d/*.sources",
        ) from error


def _debian(image: Image) -> str:
    try:
        return archive.sources(image.suite, components=image.components)
    except archive.NoArchiveError as error:
        raise BuildError(f"{image.name} has no archive to come from: {error}") from error


def _ubuntu(image: Image) -> str:
    mirror = os.environ.get("UBUNTU_MIRROR", "")
    keyring = os.environ.get("UBUNTU_KEYRING", _UBUNTU_KEYRING)
    if not mirror:
        raise BuildError(
            f"{image.name} needs an archive of Ubuntu, which this machine's apt does not have",
            f"name one: make images IMAGES={image.name} UBUNTU_MIRROR=ADDRESS",
        )
    if not Path(keyring).exists():
        raise BuildError(
            f"the keys of Ubuntu's archive are not in {keyring}",
            "name the file that has them: UBUNTU_KEYRING=FILE",
        )
    components = " ".join(("main", "universe", *image.components))
    suites = " ".join((image.suite, f"{image.suite}-updates", f"{image.suite}-security"))
    return (
        f"Types: deb\nURIs: {mirror}\nSuites: {suites}\n"
        f"Components: {components}\nSigned-By: {keyring}\n"
    )
