"""The package under test, and others made from it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

TREE = Path(__file__).parents[2]
NAME = "dgx-kvm-sw"
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def built() -> Path:
    """The package that `make deb` has left; DGX_KVM_DEB names another."""
    if named := os.environ.get("DGX_KVM_DEB"):
        return Path(named)
    packages = sorted((TREE / "build/deb").glob(f"{NAME}_*_all.deb"), key=_age)
    assert packages, "there is no package in build/deb: run make deb"
    return packages[-1]


def field(package: Path, name: str) -> str:
    return run("dpkg-deb", "--field", str(package), name).strip()


def conffiles(package: Path) -> list[str]:
    """The conffiles by name; dpkg knows a mark in front of one that is to be removed."""
    lines = run("dpkg-deb", "--info", str(package), "conffiles").split("\n")
    return [line.split()[-1] for line in lines if line and not line.startswith("remove-on")]


def contents(package: Path) -> list[str]:
    """The files in the package by name, without folders."""
    listing = run("sh", "-c", f"dpkg-deb --fsys-tarfile '{package}' | tar --list")
    return [name.removeprefix(".") for name in listing.splitlines() if not name.endswith("/")]


def with_version(package: Path, version: str, folder: Path) -> Path:
    """The same package under another version."""
    tree = folder / version
    run("dpkg-deb", "--raw-extract", str(package), str(tree))
    control = tree / "DEBIAN/control"
    lines = control.read_text().splitlines()
    changed = [f"Version: {version}" if line.startswith("Version:") else line for line in lines]
    control.write_text("\n".join(changed) + "\n")
    target = folder / f"{NAME}_{version}_all.deb"
    run("dpkg-deb", "--root-owner-group", "-z1", "--build", str(tree), str(target))
    return target


def build(folder: Path, *, umask: int = 0o022, **environment: str) -> Path:
    """Build the package by `make deb`, elsewhere than that does; return the .changes."""
    where = (f"DEB_WORK={folder}/work", f"DEB_OUT={folder}")
    run(
        "make",
        "--no-print-directory",
        "deb",
        *where,
        cwd=TREE,
        umask=umask,
        environment=environment,
    )
    return next(folder.glob("*.changes"))


def run(
    *command: str,
    cwd: Path | None = None,
    umask: int = 0o022,
    environment: dict[str, str] | None = None,
) -> str:
    """Run a command that must succeed and return what it printed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        umask=umask,
        env={**os.environ, "PATH": _PATH, "LC_ALL": "C.UTF-8", **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-8000:]}"
    return done.stdout


def _age(package: Path) -> float:
    return package.stat().st_mtime
