"""Where this machine's own packages come from, for making roots of other Debian releases."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

_APT = Path("/etc/apt")
# The others, such as Acquire::IndexTargets, are about this machine's own packages.
_DOWNLOAD = re.compile(r"Acquire::(http|https|Proxy|Check-|Retries|ForceIPv|Max-ValidTime)", re.I)


class NoArchiveError(Exception):
    """This machine has no source that another release could be had from."""


def sources(suite: str, *, backports: bool = False, components: Sequence[str] = ()) -> str:
    """This machine's apt sources of its own release, for another release.

    `components` are wanted beside those that this machine takes itself.
    """
    own = _own_release()
    stanzas = [
        _for_another(stanza, own, suite, backports, components)
        for stanza in _source_stanzas()
        if _suites(stanza) and set(_suites(stanza)) <= _archives(own)
    ]
    if not stanzas:
        raise NoArchiveError(
            f"apt on this machine has no source of Debian {own} to find {suite} beside; this needs"
            " Debian with its archive in /etc/apt/sources.list*"
        )
    return "\n\n".join(stanzas) + "\n"


def download_settings() -> str:
    """This machine's settings of apt that say how to download: proxies, certificates, checks."""
    dump = subprocess.run(["apt-config", "dump"], check=True, capture_output=True, text=True)
    return "".join(f"{line}\n" for line in dump.stdout.splitlines() if _DOWNLOAD.match(line))


def _own_release() -> str:
    fields = (line.partition("=") for line in Path("/etc/os-release").read_text().splitlines())
    return next(value.strip('"') for key, _, value in fields if key == "VERSION_CODENAME")


def _archives(suite: str) -> set[str]:
    return {suite, f"{suite}-updates", f"{suite}-security"}


def _source_stanzas() -> list[str]:
    """Every source as deb822: a line of the old form becomes a stanza."""
    stanzas: list[str] = []
    for file in sorted((_APT / "sources.list.d").glob("*.sources")):
        stanzas += file.read_text().strip().split("\n\n")
    for file in (_APT / "sources.list", *sorted((_APT / "sources.list.d").glob("*.list"))):
        lines = file.read_text().splitlines() if file.exists() else []
        stanzas += [_stanza_of_line(line) for line in lines if line.startswith("deb ")]
    return stanzas


def _stanza_of_line(line: str) -> str:
    _, _, rest = line.partition(" ")
    options = ""
    if rest.startswith("["):
        options, _, rest = rest[1:].partition("]")
    uri, suite, *components = rest.split()
    stanza = f"Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: {' '.join(components)}"
    for option in options.split():
        name, _, value = option.partition("=")
        if name == "signed-by":
            stanza += f"\nSigned-By: {value}"
    return stanza


def _suites(stanza: str) -> list[str]:
    return next(
        (line.split()[1:] for line in stanza.splitlines() if line.startswith("Suites:")), []
    )


def _for_another(
    stanza: str, own: str, suite: str, backports: bool, components: Sequence[str]
) -> str:
    return "\n".join(
        _field_for_another(line, own, suite, backports, components)
        for line in stanza.splitlines()
        if not line.startswith("#")
    )


def _field_for_another(
    line: str, own: str, suite: str, backports: bool, components: Sequence[str]
) -> str:
    if line.startswith("Suites:"):
        more = f" {suite}-backports" if backports and own in line.split() else ""
        return line.replace(own, suite) + more
    if line.startswith("Components:"):
        return " ".join((line, *(name for name in components if name not in line.split())))
    return line
