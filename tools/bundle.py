"""All that a site without a network needs, as one folder: tools.bundle RELEASE [PACKAGE...]

The packages with everything they depend on down to libc, so that no machine of that release lacks
any of it, in a signed repository with its key, checksums, an apt source and an install.sh. Without
names, PACKAGEs are all that were built. `.cache/closure` keeps what was downloaded.
"""

from __future__ import annotations

import fcntl
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from debian.deb822 import Packages

from tools import archive
from tools.repository import (
    KEYRING,
    TREE,
    OfflineError,
    built,
    check_replaceable,
    index,
    place,
    run,
)

INSTALL = Path(__file__).with_name("install.sh")
SOURCE = "dgx-kvm.sources"
_LISTED = re.compile(r"^'\S+' (\S+\.deb) ", re.MULTILINE)
LASTING = "/srv/dgx-kvm"  # where the apt source of a bundle expects it to lie

STANZA = f"""\
# For a bundle that stays on the machine: put it in {LASTING} and this file into
# /etc/apt/sources.list.d. install.sh needs neither.
Types: deb
URIs: file:{LASTING}
Suites: {{release}}
Components: main
Signed-By: {LASTING}/{KEYRING}
"""


def main(arguments: Sequence[str]) -> int:
    """Make the bundle; what is in the way is one sentence."""
    try:
        release, *names = arguments
        folder = make(release, names)
        size = Path(f"{folder}.tar").stat().st_size >> 20
        print(f"{folder} and {folder.name}.tar, {size} MiB")
    except (OfflineError, archive.NoArchiveError) as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 1
    return 0


def make(release: str, names: Sequence[str] = (), out: Path = TREE / "build/bundle") -> Path:
    """Make the bundle's folder and return it."""
    own = _chosen(built(), names)
    version = next(file.name.split("_")[1] for file in own if _name(file) == "dgx-kvm-sw")
    folder = out / f"dgx-kvm-{version}-{release}"
    check_replaceable(folder, (INSTALL.name, "dists"), "bundle")
    if folder.exists():
        run("rm", "-r", str(folder))
    (folder / "pool").mkdir(parents=True)
    for file in (*own, *closure(release, own)):
        place(file, folder / "pool")
    index(folder, release)
    (folder / SOURCE).write_text(STANZA.format(release=release))
    script = folder / INSTALL.name
    script.write_text(INSTALL.read_text().replace("@RELEASE@", release))
    script.chmod(0o755)
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    (folder / "SHA256SUMS").write_text(run("sha256sum", *files, where=folder))
    run("tar", "-cf", f"{folder}.tar", "--owner=0", "--group=0", "-C", str(out), folder.name)
    return folder


def closure(release: str, packages: Sequence[Path]) -> list[Path]:
    """Download what these packages need on a machine that has nothing, not even libc.

    The poorest machine there can be: what this one, or any other, happens to have does not count.
    """
    kept = TREE / ".cache/closure" / release
    (kept / "partial").mkdir(parents=True, exist_ok=True)
    with (kept / "lock").open("w") as lock, tempfile.TemporaryDirectory() as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = Path(scratch)
        for part in ("lists/partial", "sources", "own"):
            (state / part).mkdir(parents=True)
        (state / "status").touch()
        for package in packages:
            place(package, state / "own")
        (state / "Packages").write_text(run("apt-ftparchive", "packages", "own", where=state))
        (state / "sources/own.list").write_text(f"deb [trusted=yes] file:{state} ./\n")
        (state / "sources/archive.sources").write_text(archive.sources(release))
        wanted = [_name(package) for package in packages]
        wanted += [name for package in packages for name in _useful(package)]
        # What libvirt and QEMU merely recommend is a desktop.
        install = ("--no-install-recommends", "--yes", "install", *wanted)
        run("apt-get", "-qq", *apt_options(state, kept), "update")
        # Asked of an empty cache: it lists only what it still lacks.
        listed = run("apt-get", "-qq", *apt_options(state, state), "--print-uris", *install)
        run("apt-get", "-qq", *apt_options(state, kept), "--download-only", *install)
    own = {package.name for package in packages}
    return [kept / name for name in _LISTED.findall(listed) if name not in own]


def apt_options(state: Path, kept: Path) -> list[str]:
    """For apt to know what is in `state` and nothing of this machine; packages go to `kept`."""
    values = {
        "Dir::State": state, "Dir::State::status": state / "status",
        "Dir::State::extended_states": state / "extended",
        "Dir::Etc::sourcelist": "/dev/null", "Dir::Etc::sourceparts": state / "sources",
        "Dir::Etc::preferences": "/dev/null", "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::Cache": state, "Dir::Cache::archives": kept,
        "Acquire::Languages": "none", "APT::Sandbox::User": "root",
        "Debug::NoLocking": "true",
    }  # fmt: skip
    return [f"-o{name}={value}" for name, value in values.items()]


def _chosen(packages: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """The packages of these names; all without names."""
    known = {_name(package): package for package in packages}
    if unknown := sorted(set(names) - set(known)):
        raise OfflineError(f"{', '.join(unknown)}: not built; there are {', '.join(sorted(known))}")
    return [known[name] for name in sorted(set(names) | {"dgx-kvm-sw"})] if names else [*packages]


def _useful(package: Path) -> list[str]:
    """What it recommends or suggests: the site cannot get LVM later. Of alternatives, the first."""
    of = Packages(run("dpkg-deb", "-f", str(package))).relations
    wanted = [*(of["recommends"] or ()), *(of["suggests"] or ())]
    return [first["name"] for first, *_ in wanted]


def _name(package: Path) -> str:
    return package.name.split("_")[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
