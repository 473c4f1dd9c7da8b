"""The image catalogue: one manifest each, a bad one hinders no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import SimulatedHost

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.guest.images import MANIFESTS, Image, catalogue
from dgx_kvm_sw.model.errors import BadFileError

GOOD = {"name": "debian-12", "path": "/images/debian-12.qcow2", "format": "qcow2", "kind": "os"}


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_without_manifests_there_are_no_images(root: Root) -> None:
    assert catalogue(root).images == {}
    assert catalogue(root).problems == ()


def test_every_manifest_is_an_image(root: Root) -> None:
    root.write(f"{MANIFESTS}/a.json", json.dumps(GOOD))
    root.write(f"{MANIFESTS}/README", "not a manifest")
    expected = Image("debian-12", "/images/debian-12.qcow2", "qcow2")
    assert catalogue(root).images == {"debian-12": expected}
    assert catalogue(root).problems == ()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"x"', "null", '{"name": "x"}'])
def test_a_bad_manifest_is_named_and_hinders_no_other(root: Root, text: str) -> None:
    root.write(f"{MANIFESTS}/a.json", json.dumps(GOOD))
    root.write(f"{MANIFESTS}/bad.json", text)
    found = catalogue(root)
    assert list(found.images) == ["debian-12"]
    (problem,) = found.problems
    assert str(root.path(f"{MANIFESTS}/bad.json")) in problem


def test_a_manifest_that_cannot_be_read_hinders_no_other(root: Root) -> None:
    root.write(f"{MANIFESTS}/a.json", json.dumps(GOOD))
    root.path(f"{MANIFESTS}/gone.json").symlink_to("nowhere")
    found = catalogue(root)
    assert list(found.images) == ["debian-12"]
    assert len(found.problems) == 1


def test_an_os_disk_lies_over_its_image(host: Callable[..., SimulatedHost]) -> None:
    at = host("dgx-b200")
    at.root.write(f"{MANIFESTS}/a.json", json.dumps(GOOD))
    at.declare("name: a, gpus: 0, image: debian-12, disks: [{name: data, size: 1GiB}]")
    at.settle()
    backing = {volume.name: volume.backing for volume in at.state().volumes}
    assert backing == {"a.os.qcow2": "/images/debian-12.qcow2", "a.data.qcow2": ""}
    at.declare("name: a, gpus: 0, disks: [{name: data, size: 1GiB}]")
    (note,) = at.plan().notes
    assert "was made from /images/debian-12.qcow2, the file says nothing" in note


def test_an_image_that_is_not_there_is_refused(host: Callable[..., SimulatedHost]) -> None:
    at = host("dgx-b200")
    at.declare("name: a, gpus: 0, image: debian-12")
    with pytest.raises(BadFileError, match="there is no image 'debian-12'"):
        at.plan()


def test_bad_manifests_are_news_in_the_plan(host: Callable[..., SimulatedHost]) -> None:
    at = host("dgx-b200")
    at.root.write(f"{MANIFESTS}/bad.json", "{")
    assert "bad.json is not an image manifest" in at.plan().notes[0]
