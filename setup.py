"""Gives the distribution its version: debian/changelog is the one place that says it."""

import re
from pathlib import Path

from setuptools import setup

_CHANGELOG = Path(__file__).parent / "debian/changelog"
_FIRST = re.match(r"\S+ \(([^)]+)\)", _CHANGELOG.read_text(encoding="utf-8"))
assert _FIRST, f"{_CHANGELOG} names no version"
setup(version=_FIRST[1])
