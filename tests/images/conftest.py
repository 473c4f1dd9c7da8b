"""Images to test: what `make images` has left, or none."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_commands() -> None:
    """Here tests run the programs that images are made and used with."""
