"""Packages of guest images come, change and go beside ours, by real dpkg and its triggers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from catalogues import BYTES, manifest

from package import debs
from package.debs import NAME
from package.machine import Machine

pytestmark = pytest.mark.package

HOOKS = "/etc/dgx-kvm/hooks.d"
IMPORT = "/var/lib/dgx-kvm/bases/mine-0123456789ab.qcow2"
ADOPTED = "/var/lib/dgx-kvm/bases/debian-12-ba9876543210.qcow2"
TELL = """\
#!/bin/sh
echo $DGX_KVM_STAGE $DGX_KVM_IMAGE $DGX_KVM_IMAGE_VERSION >>/root/told
"""
CONTROL = """\
Package: dgx-kvm-image-test
Version: {version}
Architecture: all
Maintainer: test <test@example.invalid>
Description: a guest image
"""

Build = Callable[..., Path]


@pytest.fixture
def image(tmp_path: Path) -> Build:
    def build(version: str, text: str | None = None) -> Path:
        """An image package with this version; `text` stands for its manifest."""
        tree = tmp_path / version
        data = manifest("test", version=version, package="dgx-kvm-image-test")
        for name, content in (
            ("DEBIAN/control", CONTROL.format(version=version).encode()),
            (data["path"], BYTES),
            ("usr/share/dgx-kvm/images.d/test.json", (text or json.dumps(data)).encode()),
        ):
            file = tree / name.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        target = tmp_path / f"dgx-kvm-image-test_{version}_all.deb"
        debs.run("dpkg-deb", "--root-owner-group", "-z1", "--build", str(tree), str(target))
        return target

    return build


@pytest.fixture
def listening(armed: Machine) -> Machine:
    for stage in ("image-added", "image-removed"):
        armed.write(f"{HOOKS}/{stage}/10-tell", TELL, 0o755)
    return armed


def told(host: Machine) -> list[str]:
    lines = host.read("/root/told").splitlines() if host.exists("/root/told") else []
    host.path("/root/told").unlink(missing_ok=True)
    return lines


def install(host: Machine, package: Path) -> str:
    return host("dpkg", "--install", host.copy_in(package))


def test_hooks_hear_of_image_packages(listening: Machine, image: Build, newer: Path) -> None:
    install(listening, image("1.0"))
    assert told(listening) == ["image-added test 1.0"]
    assert "ok, not verified yet" in listening("dgx-kvm", "image", "list")
    listening("dgx-kvm", "image", "verify", "test")
    install(listening, newer)
    assert told(listening) == []
    install(listening, image("1.1"))
    assert told(listening) == ["image-added test 1.1"]
    listening("dpkg", "--remove", "dgx-kvm-image-test")
    assert told(listening) == ["image-removed test 1.1"]


def test_images_that_were_there_before_are_announced(
    host: Machine, deb: Path, image: Build
) -> None:
    host.write(f"{HOOKS}/image-added/10-tell", TELL, 0o755)
    install(host, image("1.0"))
    assert told(host) == []
    install(host, deb)
    assert told(host) == ["image-added test 1.0"]


@pytest.mark.parametrize("hook", ["exit 1", "kill -9 $PPID"])
def test_neither_a_bad_image_nor_a_bad_hook_is_a_failure_of_dpkg(
    listening: Machine, image: Build, hook: str
) -> None:
    said = install(listening, image("1.0", "{"))
    assert "test.json is not an image manifest" in said
    assert told(listening) == []
    listening.write(f"{HOOKS}/image-added/05-bad", f"#!/bin/sh\n{hook}\n", 0o755)
    install(listening, image("1.1"))
    assert listening("dpkg", "--audit") == ""
    assert "test " in listening("dgx-kvm", "image", "list")


def test_a_purge_keeps_imports_and_no_other_base(armed: Machine) -> None:
    armed.write(IMPORT, "mine", 0o444)
    armed.write("/var/lib/dgx-kvm/images.d/mine.json", json.dumps({"path": IMPORT}))
    armed.write(ADOPTED, "left over", 0o444)
    armed.write("/var/lib/dgx-kvm/bases/.adopting-x", "left over")
    said = armed("dpkg", "--purge", NAME)
    assert "imported images stay in /var/lib/dgx-kvm/bases" in said
    assert armed.files("/var/lib/dgx-kvm") == [IMPORT, "/var/lib/dgx-kvm/images.d/mine.json"]


def test_a_purge_keeps_what_disks_lie_on(armed: Machine) -> None:
    disk = "/var/lib/dgx-kvm/images/a.os.qcow2"
    armed.write(disk, "data", 0o600)
    armed.write(ADOPTED, "what it lies on", 0o444)
    said = armed("dpkg", "--purge", NAME)
    assert "in /var/lib/dgx-kvm/bases what they lie on" in said
    assert armed.files("/var/lib/dgx-kvm") == [ADOPTED, disk]
