"""What a cached part of the lab is known by: all that goes into it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lab import cache, image, qemufix, tools


@pytest.mark.parametrize(("name", "value"), [
    ("MODULES", ("button",)),  # for VMs, taken from the host's packages while its disk is made
    ("_options", lambda: []),
    ("make_disk", lambda *_: Path()),
    ("INSIDE", ()),
    ("BASE", ()),
    ("SIZE_MIB", 1),
])  # fmt: skip
def test_another_way_to_make_a_disk_is_another_recipe(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = image.recipe("bookworm", True)
    assert image.recipe("bookworm", True) == before
    monkeypatch.setattr(image, name, value)
    assert image.recipe("bookworm", True) != before


def test_other_corrections_of_qemu_are_another_qemu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tools.recipe()
    code = tmp_path / "qemufix.py"
    code.write_text(f"{Path(qemufix.__file__).read_text()}MORE = 1\n")
    monkeypatch.setattr(qemufix, "__file__", str(code))
    assert tools.recipe() != before


def test_what_is_made_is_made_once_for_each_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "ROOT", tmp_path)
    runs: list[str] = []

    def making(text: str) -> Callable[[Path], None]:
        def make(directory: Path) -> None:
            runs.append(text)
            (directory / "file").write_text(text)

        return make

    first = cache.made("part", ["a"], making("a"))
    assert cache.made("part", ["a"], making("a")) == first
    second = cache.made("part", ["b"], making("b"))
    assert [(first / "file").read_text(), (second / "file").read_text()] == ["a", "b"]  # in use
    assert runs == ["a", "b"]


def test_what_was_cut_off_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "ROOT", tmp_path)

    def fail(directory: Path) -> None:
        (directory / "half").touch()
        raise OSError("no space")

    with pytest.raises(OSError):
        cache.made("part", [], fail)
    whole = cache.made("part", [], lambda directory: (directory / "whole").touch())
    assert [file.name for file in whole.iterdir()] == ["whole"]
