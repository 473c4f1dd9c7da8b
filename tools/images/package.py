"""The Debian package of an image: the qcow2, its manifest, its papers, and a prerm."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

from tools.images.programs import call
from tools.images.recipes import RECIPES, Image

IMAGES, MANIFESTS = "usr/share/dgx-kvm/images", "usr/share/dgx-kvm/images.d"
_MAINTAINER = "The dgx-kvm-sw authors <maintainers@dgx-kvm-sw.invalid>"
_DEBIAN = RECIPES / "debian"

_UNCOMPRESSED = "uses-no-compression-for-data-tarball"

_CONTROL = """\
Package: {package}
Version: {version}
Architecture: all
Maintainer: {maintainer}
Installed-Size: {size}
Enhances: dgx-kvm-sw
Section: admin
Priority: optional
Description: {title} as a guest image for dgx-kvm-sw
 VMs of dgx-kvm-sw boot from it; in /etc/dgx-kvm/vms.yaml its name is
 {name}.
 .
 It has cloud-init and the QEMU guest agent, boots by UEFI and by BIOS, and
 grows to the size of its disk.
{driver} .
 The packages in it are listed in /usr/share/doc/{package}.
"""


def make_package(image: Image, facts: dict[str, Any], qcow2: Path, folder: Path) -> Path:
    """Build the .deb in a folder; the qcow2 goes in as it is, since it is compressed already."""
    stage, log = folder / "stage", folder / "package.log"
    shutil.rmtree(stage, ignore_errors=True)
    (stage / IMAGES).mkdir(parents=True)
    os.link(qcow2, stage / IMAGES / f"{image.name}.qcow2")
    _write(stage / MANIFESTS / f"{image.name}.json", manifest(image, facts))
    _papers(image, facts, stage / "usr/share/doc" / image.package)
    _control(image, facts, stage)
    deb = folder / f"{image.package}_{facts['version']}_all.deb"
    environment = {"SOURCE_DATE_EPOCH": str(facts["epoch"])}
    call(log, "find", stage, "-type", "d", "-exec", "chmod", "755", "{}", "+")
    call(
        log, "dpkg-deb", "--root-owner-group", "-Znone", "--no-uniform-compression", "--build",
        stage, deb, env=environment,
    )  # fmt: skip
    shutil.rmtree(stage)
    return deb


def manifest(image: Image, facts: dict[str, Any]) -> str:
    """What the catalogue knows of the image."""
    text = {
        "manifest": 1,
        "name": image.name,
        "version": facts["version"],
        "title": image.title,
        "os": image.os,
        "release": image.release,
        "variant": image.variant,
        "path": f"/{IMAGES}/{image.name}.qcow2",
        "format": "qcow2",
        "sha256": facts["sha256"],
        "size_bytes": facts["size_bytes"],
        "virtual_size_bytes": facts["virtual_size_bytes"],
        "minimum_disk_mib": -(-facts["virtual_size_bytes"] // (1 << 20)),
        "kernel": facts["kernel"],
        "driver": facts["driver"],
        "firmware": ["uefi", "bios"],
        "cloud_init": True,
        "guest_agent": True,
        "package": image.package,
        "architecture": "amd64",
    }
    return json.dumps(text, indent=2) + "\n"


def _control(image: Image, facts: dict[str, Any], stage: Path) -> None:
    files = [path for path in sorted(stage.rglob("*")) if path.is_file()]
    driver = f" .\n NVIDIA driver {facts['driver']}, for its kernel {facts['kernel']}.\n"
    control = _CONTROL.format(
        package=image.package,
        version=facts["version"],
        maintainer=_MAINTAINER,
        size=sum(-(-path.stat().st_size // 1024) for path in files),
        title=image.title,
        name=image.name,
        driver=driver if facts["driver"] else "",
    )
    _write(stage / "DEBIAN/control", control)
    prerm = (_DEBIAN / "prerm").read_text(encoding="utf-8").replace("@IMAGE@", image.name)
    _write(stage / "DEBIAN/prerm", prerm, 0o755)
    sums = call(
        stage.parent / "package.log", "sh", "-c",
        'cd "$1" && find usr -type f -print0 | sort -z | xargs -0 md5sum', "sh", stage,
    )  # fmt: skip
    _write(stage / "DEBIAN/md5sums", sums)


def _papers(image: Image, facts: dict[str, Any], folder: Path) -> None:
    date = formatdate(facts["epoch"])
    changelog = (
        f"{image.package} ({facts['version']}) unstable; urgency=medium\n\n"
        f"  * {image.title} with all updates of"
        f" {time.strftime('%Y-%m-%d', time.gmtime(facts['epoch']))}.\n\n"
        f" -- {_MAINTAINER}  {date}\n"
    )
    copying = (_DEBIAN / "copyright").read_text(encoding="utf-8")
    _write(folder / "copyright", copying.replace("@TITLE@", image.title))
    _write(folder / "packages", facts["packages"])
    overrides = f"# It is an image that is compressed already.\n{image.package}: {_UNCOMPRESSED}\n"
    _write(folder.parents[1] / "lintian/overrides" / image.package, overrides)
    folder.joinpath("changelog.gz").write_bytes(gzip.compress(changelog.encode(), 9, mtime=0))
    folder.joinpath("changelog.gz").chmod(0o644)


def _write(file: Path, text: str, mode: int = 0o644) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    file.chmod(mode)
