"""A libvirtd for each test module, or the reason why there can be none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from integration.claimed_host import ClaimedHost, claim
from integration.private_libvirtd import Libvirtd, missing, private_libvirtd


@pytest.fixture(scope="module")
def libvirtd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libvirtd]:
    directory = tmp_path_factory.mktemp("host")
    if reason := missing(directory):
        if os.environ.get("CI"):
            pytest.fail(f"{reason}; in CI this test must run")
        pytest.skip(reason)
    with private_libvirtd(directory) as running:
        yield running


@pytest.fixture(scope="module")
def claimed(libvirtd: Libvirtd) -> ClaimedHost:
    """The host of this module; every test declares what it needs on it."""
    claim(libvirtd.root)
    return ClaimedHost(libvirtd)
