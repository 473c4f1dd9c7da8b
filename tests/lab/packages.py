"""Debian packages of another release, from wherever this machine gets its own."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# Settings that say how to reach an archive; the others are about this machine's own packages.
REACH = re.compile(r"Acquire::(http|https|Proxy|Check-|Retries|ForceIPv|Max-ValidTime)", re.I)


class LabError(Exception):
    """The lab cannot go on; the message says why and what to do."""


def sources(suite: str, backports: bool = False) -> list[str]:
    """The lines of a sources.list: this machine's own Debian archives with `suite` in them."""
    own = _own_suite()
    lines = []
    for uri, release, component in sorted(_index_targets()):
        found = re.fullmatch(rf"(?:{own}|stable|oldstable)(|-updates|-security|/updates)", release)
        if not found or component != "main":
            continue
        ending = found[1].replace("/updates", "-security")
        lines.append(_source(uri, suite + ending))
        if backports and not ending:
            lines.append(_source(uri, f"{suite}-backports"))
    if not lines:
        raise LabError(
            f"apt on this machine has no archive of Debian {own} to find {suite} beside; "
            "the lab is built on Debian, with the archive in /etc/apt/sources.list*"
        )
    return lines


def _own_suite() -> str:
    release = dict(
        line.split("=", 1)
        for line in Path("/etc/os-release").read_text().splitlines()
        if "=" in line
    )
    return release.get("VERSION_CODENAME", "stable").strip('"')


def _index_targets() -> set[tuple[str, str, str]]:
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)",
         "Created-By: Packages"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    found = set()
    for line in listed.splitlines():
        words = line.split()
        if len(words) == 3:
            found.add((words[0], words[1], words[2]))
    return found


def _source(uri: str, suite: str) -> str:
    signed = f"[signed-by={KEYRING}] " if os.path.exists(KEYRING) else ""
    return f"deb {signed}{uri} {suite} main"


def bootstrap(
    target: Path,
    suite: str,
    packages: Sequence[str],
    options: Sequence[str],
    backports: bool = False,
) -> None:
    """Fill `target`, a new directory or tar file, with packages and what they depend on."""
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as settings:
        settings.write("".join(f"{line}\n" for line in _reach()))
        settings.write('Acquire::Languages "none";\n')
        if backports:
            settings.write(f'APT::Default-Release "{suite}-backports";\n')
        settings.flush()
        os.chmod(settings.name, 0o644)  # apt reads it as a user of its own
        subprocess.run(
            ["mmdebstrap", "--quiet", f"--aptopt={settings.name}",
             f"--include={','.join(packages)}", *options,
             # How this machine reaches the archives is nobody else's business.
             "--customize-hook=rm -f \"$1\"/etc/apt/apt.conf.d/99mmdebstrap"
             " \"$1\"/etc/apt/sources.list",
             suite, str(target), *sources(suite, backports)],
            check=True,
        )  # fmt: skip


def _reach() -> list[str]:
    dump = subprocess.run(["apt-config", "dump"], check=True, capture_output=True, text=True).stdout
    return [line for line in dump.splitlines() if REACH.match(line)]
