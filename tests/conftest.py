"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.host import simulate


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Root]:
    """Sample machines by name, to look at; tests that change one build their own."""
    folder: Path = tmp_path_factory.mktemp("machines")

    def of(name: str) -> Root:
        simulate.build(name, folder / name)
        return Root(folder / name)

    return of
