"""What lintian, piuparts, autopkgtest and apt say of the package, and a second build of it."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from package import bases, debs, machine
from package.bases import MOUNT, OVERLAY, Base
from package.debs import NAME, TREE
from package.machine import Machine

pytestmark = pytest.mark.package

# Errors, warnings, infos, pedantic tags. Not experimental ones, nor what is overridden. Lintian's
# own exit code is of no use: in Debian 12 it also counts tags that it does not show.
TAG = re.compile(r"^[EWIP]: .*", re.MULTILINE)
# Debian 12's lintian wants init scripts. Later ones do not, and refuse an override for that tag.
RETIRED = "package-supports-alternative-init-but-no-init.d-script"
LINTIAN = ("lintian", "--allow-root", "--pedantic", "-EvI", "--tag-display-limit", "0")

PIUPARTS = Path("/etc/piuparts/scripts")
# Diverts /bin/sync, which debsums of Debian 13 then misses.
PIUPARTS_WITHOUT = "post_setup_force-unsafe-io"


def test_lintian_finds_nothing(suite: str, deb: Path, sysfs: Path, tmp_path: Path) -> None:
    base = bases.with_packages(bases.bare(suite), "lintian", "lintian")
    changes = next(deb.parent.glob("*.changes"))
    with machine.chroot(base, tmp_path, sysfs) as root:
        for file in (deb, changes, next(deb.parent.glob("*.buildinfo"))):
            root.copy_in(file)
        said = root.run(*LINTIAN, f"/tmp/{changes.name}").output
    assert "E: cannot" not in said
    assert [tag for tag in TAG.findall(said) if RETIRED not in tag or "alien-tag" in tag] == []


def test_apt_resolves_all_on_a_bare_release(suite: str, deb: Path, tmp_path: Path) -> None:
    """The only one that downloads: a root with nothing but apt."""
    with machine.online(bases.bare(suite), tmp_path) as root:
        name = root.copy_in(deb)
        root.write("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", 0o755)
        root("apt-get", "-qq", "update")
        root("apt-get", "-qq", "install", "--yes", "--no-install-recommends", name)
        assert "DGX-2" in root("dgx-kvm", "--simulate", "dgx2", "status")
        root("dpkg", "--audit")


def test_piuparts_finds_nothing(
    closure: Callable[[str], Base], suite: str, deb: Path, tmp_path: Path
) -> None:
    scripts = shutil.copytree(PIUPARTS, tmp_path / "scripts")
    (scripts / PIUPARTS_WITHOUT).unlink()
    (tmp_path / "copies").mkdir()
    command = (
        "piuparts",
        "--distribution",
        suite,
        "--existing-chroot",
        str(tmp_path / "root"),
        "--keep-sources-list",
        "--no-eatmydata",
        "--tmpdir",
        str(tmp_path / "copies"),
        "--install-remove-install",
        "--warn-on-others",
        "--scriptsdir",
        str(scripts),
        str(deb),
    )
    _on_an_overlay(closure(suite), OVERLAY, tmp_path, *command)


def test_autopkgtest_passes(
    closure: Callable[[str], Base], suite: str, deb: Path, tmp_path: Path
) -> None:
    """All but mode-switch, which needs a machine to reboot."""
    shutil.copytree(TREE / "debian", tmp_path / "tree/debian")
    command = (
        "autopkgtest",
        "--ignore-restrictions=breaks-testbed,isolation-container",
        "--test-name=cli",
        "--test-name=install-remove",
        "--output-dir",
        str(tmp_path / "output"),
        str(deb),
        f"{tmp_path}/tree/",
        "--",
        "chroot",
        str(tmp_path / "root"),
    )
    base = bases.with_packages(closure(suite), "autopkgtest", "apt-utils, dpkg-dev, make")
    _on_an_overlay(base, MOUNT, tmp_path, *command)
    summary = (tmp_path / "output/summary").read_text().splitlines()
    verdicts = dict(line.split()[:2] for line in summary)
    assert verdicts == {"cli": "PASS", "install-remove": "PASS", "mode-switch": "SKIP"}, summary


def test_mode_switch_is_skipped_where_there_is_no_iommu(armed: Machine) -> None:
    """The rest of this autopkgtest is for people with a machine."""
    armed.path(machine.DMAR).unlink()
    armed.write("/tmp/mode-switch", (TREE / "debian/tests/mode-switch").read_text(), 0o755)
    assert armed.run("/tmp/mode-switch").code == 77


def _on_an_overlay(base: Base, mount: str, folder: Path, *command: str) -> None:
    """Run a command that finds a root of the base in `folder`/root, without any apt source."""
    for name in ("root", "upper", "work"):
        (folder / name).mkdir()
    script = f"""
set -eu
{mount}
rm -f "$root"/etc/apt/sources.list "$root"/etc/apt/sources.list.d/*
rm -f "$root/usr/sbin/policy-rc.d"
exec "$@"
"""
    environment = {
        "lower": base.lower(),
        "upper": str(folder / "upper"),
        "work": str(folder / "work"),
        "root": str(folder / "root"),
    }
    debs.run("unshare", "--mount", "sh", "-c", script, "sh", *command, environment=environment)


def test_a_second_build_is_the_same(tmp_path: Path) -> None:
    """In another folder, time zone and home, with another umask."""
    (tmp_path / "one").mkdir()
    (tmp_path / "another/folder").mkdir(parents=True)
    first = debs.build(tmp_path / "one", TZ="UTC", HOME="/root")
    second = debs.build(tmp_path / "another/folder", umask=0o077, TZ="Asia/Tokyo", HOME="/")
    digests = [
        hashlib.sha256(next(changes.parent.glob(f"{NAME}_*.deb")).read_bytes()).hexdigest()
        for changes in (first, second)
    ]
    assert digests[0] == digests[1]
