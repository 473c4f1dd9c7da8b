"""A signed apt repository of packages that were built: tools.repository FOLDER [PACKAGE...]

Packages without a given name are all below build/deb and build/images. KEY in the environment is
the GnuPG key that signs, of the user's own key ring; without it, one is made for this tree.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

TREE = Path(__file__).parents[1]
BUILT = ("build/deb", "build/images")
KEYRING = "dgx-kvm-archive-keyring.asc"
COMPONENT, ARCHITECTURE = "main", "amd64"
_OWN_KEYS = TREE / ".cache/keys"  # a GnuPG home
_OWN_KEY = "dgx-kvm-sw, packages of this build tree"


class OfflineError(Exception):
    """Something that is needed is not there; the message says what, and what to do."""


def main(arguments: Sequence[str]) -> int:
    """Make the repository; what is in the way is one sentence."""
    folder, *files = arguments or [str(TREE / "build/repo")]
    try:
        packages = [Path(file) for file in files] or built()
        make(Path(folder), packages, "stable")
    except OfflineError as error:
        print(f"repository: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: {len(packages)} packages, suite stable, key {KEYRING}")
    return 0


def built() -> list[Path]:
    """The packages that `make deb` and `make images` left."""
    found = sorted(file for folder in BUILT for file in (TREE / folder).glob("*.deb"))
    if not any(file.name.startswith("dgx-kvm-sw_") for file in found):
        raise OfflineError(f"there is no dgx-kvm-sw in {TREE / BUILT[0]}; run make deb")
    return found


def make(folder: Path, packages: Iterable[Path], suite: str) -> None:
    """Make a repository of these files in a new folder, which replaces the one of this name."""
    check_replaceable(folder, ("dists",), "repository")
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    (new / "pool").mkdir(parents=True)
    for package in packages:
        place(package, new / "pool")
    index(new, suite)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def check_replaceable(folder: Path, marks: Iterable[str], kind: str) -> None:
    """Raise unless the folder is absent, empty, or what we made before: one with these marks."""
    if not os.path.lexists(folder):
        return
    ours = folder.is_dir() and not folder.is_symlink()
    if ours and (not any(folder.iterdir()) or all((folder / mark).exists() for mark in marks)):
        return
    raise OfflineError(f"{folder} is there and is no {kind}; name another folder or remove it")


def place(file: Path, folder: Path) -> None:
    """Have the file in the folder too: as a link, since images are large, or else as a copy."""
    try:
        os.link(file, folder / file.name)
    except OSError:
        shutil.copyfile(file, folder / file.name)
    (folder / file.name).chmod(0o644)


def index(folder: Path, suite: str) -> None:
    """List all in `pool` as this suite, and sign the list."""
    lists = folder / f"dists/{suite}/{COMPONENT}/binary-{ARCHITECTURE}"
    lists.mkdir(parents=True)
    (lists / "Packages").write_text(run("apt-ftparchive", "packages", "pool", where=folder))
    run("gzip", "-9nk", str(lists / "Packages"))
    fields = {
        "Origin": "dgx-kvm-sw", "Label": "dgx-kvm-sw", "Suite": suite, "Codename": suite,
        "Components": COMPONENT, "Architectures": ARCHITECTURE,
    }  # fmt: skip
    options = [f"-oAPT::FTPArchive::Release::{name}={value}" for name, value in fields.items()]
    # No Valid-Until: clocks of machines without a network are wrong.
    text = run("apt-ftparchive", *options, "release", str(lists.parents[1]))
    release = lists.parents[1] / "Release"  # written now, or it would list itself
    release.write_text(text)
    home, key = _signer()
    gpg = ("gpg", "--batch", "--yes", *home, "--local-user", key, "--digest-algo", "SHA512")
    run(*gpg, "--clearsign", "--output", str(release.with_name("InRelease")), str(release))
    run(*gpg, "--armor", "--export", "--output", str(folder / KEYRING), key)


def _signer() -> tuple[tuple[str, ...], str]:
    """The GnuPG home and the key in it that sign."""
    if key := os.environ.get("KEY"):
        return (), key
    _OWN_KEYS.mkdir(mode=0o700, parents=True, exist_ok=True)
    home = ("--homedir", str(_OWN_KEYS))
    if not list((_OWN_KEYS / "private-keys-v1.d").glob("*.key")):
        quick = ("--passphrase", "", "--quick-generate-key", _OWN_KEY, "ed25519", "sign", "never")
        run("gpg", "--batch", "--quiet", *home, *quick)
        print("made a key that signs packages of this build tree; KEY=... takes one of yours")
    return home, f"={_OWN_KEY}"


def run(*command: str, where: Path | None = None) -> str:
    """Run a command that must succeed and return what it printed."""
    done = subprocess.run(
        command, cwd=where, env={**os.environ, "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise OfflineError(f"{command[0]} failed:\n{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
