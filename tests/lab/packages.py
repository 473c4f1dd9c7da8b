"""Debian packages of another release, from wherever this machine gets its own."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools import archive


class LabError(Exception):
    """The lab cannot go on; the message says why and what to do."""


def bootstrap(
    target: Path,
    suite: str,
    packages: Sequence[str],
    options: Sequence[str],
    backports: bool = False,
) -> None:
    """Fill `target`, a new directory or tar file, with packages and what they depend on."""
    with tempfile.TemporaryDirectory() as folder:
        settings, sources = Path(folder, "apt.conf"), Path(folder, "apt.sources")
        settings.write_text(
            archive.download_settings()
            + 'Acquire::Languages "none";\n'
            + (f'APT::Default-Release "{suite}-backports";\n' if backports else "")
        )
        sources.write_text(archive.sources(suite, backports=backports))
        os.chmod(folder, 0o755)  # apt reads them as a user of its own
        done = subprocess.run(
            ["mmdebstrap", "--quiet", f"--aptopt={settings}",
             f"--include={','.join(packages)}", *options,
             # How this machine reaches the archives is nobody else's business.
             "--customize-hook=rm -f \"$1\"/etc/apt/apt.conf.d/99mmdebstrap"
             " \"$1\"/etc/apt/sources.list \"$1\"/etc/apt/sources.list.d/*",
             suite, str(target), str(sources)],
        )  # fmt: skip
    if done.returncode:
        raise LabError(f"mmdebstrap made no {suite}: what it said stands above")
