"""Roots of Debian releases for machines to stand on, made once and kept in .cache/bases.

They come from where this machine's own packages come from: its apt sources with another release's
name, its keys, its settings of downloads. A base is a stack of folders, as overlayfs takes them,
so a base that only adds packages to another is the difference.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools import archive

SUITES = ("bookworm", "trixie")

# Beside what the package depends on: what makes a root start by itself.
BOOTABLE = "grub2-common, grub-pc-bin, initramfs-tools, kmod, systemd-sysv, udev"

_CACHE = Path(__file__).parents[2] / ".cache/bases"
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_FORM = "1"  # change it when bases are made in another way

# apt-get install of the packages of $1, services not started: nothing runs in a root like this.
_GROW = """
set -eu
printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
apt-get -qq update
apt-get -qq satisfy --yes --no-install-recommends "$1"
apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log
"""

# Everything is undone with the namespace. `/dev` has the five that no program can do without.
OVERLAY = """
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$upper,workdir=$work" "$root"
"""
MOUNT = f"""
{OVERLAY}
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for name in null zero full random urandom; do
    touch "$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
done
"""


@dataclass(frozen=True)
class Base:
    """A root to put an overlay on; `layers` are from the top to the bottom."""

    suite: str
    layers: tuple[Path, ...]

    def lower(self) -> str:
        return ":".join(map(str, self.layers))


def bare(suite: str) -> Base:
    """Make a minimal root: essential packages and apt."""
    with _made_once(
        f"{suite}-bare", suite, archive.sources(suite), archive.download_settings()
    ) as (folder, new):
        if new:
            (folder / "apt.sources").write_text(archive.sources(suite))
            (folder / "apt.conf").write_text(archive.download_settings())
            command = ("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase")
            settings = f"--aptopt={folder / 'apt.conf'}"
            _run(*command, settings, suite, folder / "root", folder / "apt.sources")
    return Base(suite, (folder / "root",))


def with_packages(base: Base, name: str, relations: str) -> Base:
    """Add packages, given as the relations of a control file."""
    lower = base.lower()
    with _made_once(f"{base.suite}-{name}", lower, relations, _GROW) as (folder, new):
        if new:
            for part in ("root", "work", "merged"):
                (folder / part).mkdir()
            environment = {
                **os.environ,
                "DEBIAN_FRONTEND": "noninteractive",
                "PATH": _PATH,
                "lower": lower,
                "upper": str(folder / "root"),
                "work": str(folder / "work"),
                "root": str(folder / "merged"),
            }
            script = f'set -eu\n{MOUNT}{NETWORK}exec chroot "$root" sh -c "$1" sh "$2"\n'
            namespaces = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
            _run(*namespaces, "sh", "-c", script, "sh", _GROW, relations, environment=environment)
            shutil.rmtree(folder / "work")
            (folder / "merged").rmdir()
    return Base(base.suite, (folder / "root", *base.layers))


# What a root needs of this machine to download packages. Copies, since a package may write there
# (ca-certificates does); mounted, so that none of it stays.
NETWORK = """
copies=$root/mnt
mount -t tmpfs tmpfs "$copies"
for file in /etc/resolv.conf /etc/hosts /etc/ssl/certs; do
    [ -e "$file" ] || continue
    if [ -d "$file" ]; then
        mkdir -p "$root$file"
        cp -a "$file" "$copies/"
    else
        touch "$root$file"
        cp -L "$file" "$copies/"
    fi
    mount --bind "$copies/${file##*/}" "$root$file"
done
umount --lazy "$copies"
"""


@contextlib.contextmanager
def _made_once(name: str, *made_from: str) -> Iterator[tuple[Path, bool]]:
    """Give the folder of what is made from these texts, and whether it is still to be filled.

    Two processes may ask at once; one that is cut off leaves nothing that counts as made.
    """
    digest = hashlib.sha256("\0".join((_FORM, *made_from)).encode()).hexdigest()[:12]
    folder = _CACHE / f"{name}-{digest}"
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "done"
        new = not done.exists()
        if new:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        yield folder, new
        done.touch()


def _run(*command: str | Path, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command,
        env=environment or {**os.environ, "PATH": _PATH},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout}"
