"""Sources of other releases, from those that apt has here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import archive

OS_RELEASE = dict(
    line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
)
OWN = OS_RELEASE.get("VERSION_CODENAME", "").strip('"')


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "apt.conf.d").mkdir()
    monkeypatch.setattr(archive, "_APT", tmp_path)
    return tmp_path


def test_own_suites_become_those_of_the_other_release(apt: Path) -> None:
    (apt / "sources.list.d/debian.sources").write_text(
        f"Types: deb\n# a mirror\nURIs: file:/mirror\nSuites: {OWN} {OWN}-updates\n"
        "Components: main\n\n"
        "Types: deb\nURIs: file:/vendor\nSuites: stable\nComponents: main\n"
    )
    wanted = "Types: deb\nURIs: file:/mirror\nSuites: forky forky-updates{}\nComponents: main\n"
    assert archive.sources("forky") == wanted.format("")
    assert archive.sources("forky", backports=True) == wanted.format(" forky-backports")


def test_components_that_are_missing_are_added(apt: Path) -> None:
    (apt / "sources.list").write_text(f"deb file:/mirror {OWN} main contrib\n")
    assert archive.sources("forky", components=("contrib", "non-free")) == (
        "Types: deb\nURIs: file:/mirror\nSuites: forky\nComponents: main contrib non-free\n"
    )


def test_lines_of_the_old_form_are_understood(apt: Path) -> None:
    (apt / "sources.list").write_text(
        f"# main\ndeb [signed-by=/k.gpg] file:/mirror {OWN} main contrib\ndeb-src x y z\n"
    )
    assert archive.sources("forky") == (
        "Types: deb\nURIs: file:/mirror\nSuites: forky\nComponents: main contrib\n"
        "Signed-By: /k.gpg\n"
    )


def test_a_machine_without_an_archive_is_told_so(apt: Path) -> None:
    with pytest.raises(archive.NoArchiveError, match="needs Debian with its archive"):
        archive.sources("forky")


@pytest.mark.commands
def test_settings_of_downloads_alone_are_taken(apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (apt / "apt.conf").write_text(
        'Dir::Etc::main "/nonexistent";\nDir::Etc::parts "/nonexistent";\n'
        'Acquire::Retries "3";\nDPkg::Options "x";\n'
        'Acquire::IndexTargets {\n  deb::x { MetaKey "y"; };\n};\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(apt / "apt.conf"))
    assert archive.download_settings() == 'Acquire::Retries "3";\n'
