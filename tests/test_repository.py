"""What a repository or a bundle may replace: only what was made as one before."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import bundle, repository
from tools.repository import OfflineError


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    page = tmp_path / "www/index.html"
    page.write_text("hello")
    with pytest.raises(OfflineError, match=r"/www is there and is no repository"):
        repository.make(tmp_path / "www", [], "stable")
    assert page.read_text() == "hello"
    assert [path.name for path in tmp_path.iterdir()] == ["www"]


def test_a_bundle_replaces_a_bundle_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "built", lambda: [Path("dgx-kvm-sw_1_all.deb")])
    folder = tmp_path / "dgx-kvm-1-bookworm"
    (folder / "dists").mkdir(parents=True)  # a repository, but without install.sh
    with pytest.raises(OfflineError, match=r"-bookworm is there and is no bundle"):
        bundle.make("bookworm", [], tmp_path)
    assert (folder / "dists").is_dir()


@pytest.mark.parametrize("there", [[], ["dists"], ["dists", "pool"]])
def test_what_was_made_before_or_is_empty_is_replaced(tmp_path: Path, there: list[str]) -> None:
    for name in there:
        (tmp_path / name).mkdir()
    repository.check_replaceable(tmp_path, ("dists",), "repository")
    repository.check_replaceable(tmp_path / "absent", ("dists",), "repository")


def test_neither_a_file_nor_a_link_is_a_folder_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(OfflineError, match="is no repository"):
            repository.check_replaceable(tmp_path / name, ("dists",), "repository")


def test_packages_that_were_not_built_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bundle, "built", lambda: [Path("dgx-kvm-sw_1_all.deb")])
    assert bundle.main(["bookworm", "nonsense"]) == 1
    assert capsys.readouterr() == ("", "bundle: nonsense: not built; there are dgx-kvm-sw\n")


def test_a_site_can_read_install_sh_before_it_runs_it() -> None:
    assert len(bundle.INSTALL.read_text().splitlines()) <= 20
