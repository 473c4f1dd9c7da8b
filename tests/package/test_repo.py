"""The repository of `make repo`, as apt on another machine sees it: signed, or refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from package import debs
from tools import repository
from tools.bundle import apt_options

pytestmark = pytest.mark.package

NAME = "dgx-kvm-test"
CONTROL = f"""\
Package: {NAME}
Version: 1.0
Architecture: all
Maintainer: test <test@example.invalid>
Description: a package
"""


class Apt:
    """apt with a state of its own, which knows one repository and its key."""

    def __init__(self, folder: Path, repo: Path) -> None:
        self.folder = folder
        for name in ("lists/partial", "sources", "partial"):
            (folder / name).mkdir(parents=True)
        (folder / "status").touch()
        (folder / "sources/ours.sources").write_text(
            f"Types: deb\nURIs: file:{repo}\nSuites: stable\nComponents: main\n"
            f"Signed-By: {repo / repository.KEYRING}\n"
        )

    def __call__(self, program: str, *words: str) -> tuple[bool, str]:
        """Whether it succeeds, and what it says."""
        done = subprocess.run(
            (program, *apt_options(self.folder, self.folder), *words),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode == 0, done.stdout


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    (tmp_path / "tree/DEBIAN").mkdir(parents=True)
    (tmp_path / "tree/DEBIAN/control").write_text(CONTROL)
    made = tmp_path / f"{NAME}_1.0_all.deb"
    debs.run("dpkg-deb", "--root-owner-group", "--build", str(tmp_path / "tree"), str(made))
    repository.make(tmp_path / "repo", [made], "stable")
    return tmp_path / "repo"


@pytest.fixture
def apt(repo: Path, tmp_path: Path) -> Apt:
    return Apt(tmp_path / "apt", repo)


def updated(apt: Apt) -> tuple[bool, str]:
    return apt("apt-get", "-o", "APT::Update::Error-Mode=any", "update")


def test_it_has_the_packages_for_who_has_the_key(apt: Apt) -> None:
    good, said = updated(apt)
    assert good, said
    good, said = apt("apt-get", "download", NAME)
    assert good, said
    assert debs.field(apt.folder / f"{NAME}_1.0_all.deb", "Package") == NAME


def test_a_changed_list_is_refused(apt: Apt, repo: Path) -> None:
    release = repo / "dists/stable/InRelease"
    release.write_text(release.read_text().replace("Label: dgx-kvm-sw", "Label: something"))
    good, said = updated(apt)
    assert not good
    assert "is not signed" in said


def test_a_changed_byte_of_a_package_is_refused(apt: Apt, repo: Path) -> None:
    updated(apt)
    package = repo / f"pool/{NAME}_1.0_all.deb"
    data = bytearray(package.read_bytes())
    data[-10] ^= 1
    package.unlink()  # it is a link
    package.write_bytes(data)
    good, said = apt("apt-get", "download", NAME)
    assert not good
    assert "Hash Sum mismatch" in said


def test_without_the_key_it_is_refused(apt: Apt, repo: Path) -> None:
    (repo / repository.KEYRING).unlink()
    good, said = updated(apt)
    assert not good
    assert "is not signed" in said


def test_a_key_of_ones_own_signs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    home = tmp_path / "keys"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("GNUPGHOME", str(home))
    monkeypatch.setenv("KEY", "site@example.invalid")
    gpg = ("gpg", "--batch", "--quiet", "--passphrase", "")
    repository.run(*gpg, "--quick-generate-key", "site@example.invalid", "ed25519", "sign")
    repo: Path = request.getfixturevalue("repo")
    shown = repository.run("gpg", "--show-keys", str(repo / repository.KEYRING))
    good, said = updated(Apt(tmp_path / "apt", repo))
    repository.run("gpgconf", "--kill", "all")
    assert "site@example.invalid" in shown
    assert good, said
