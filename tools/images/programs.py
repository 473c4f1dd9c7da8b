"""Runs the programs that a build is made of; one that fails is one sentence and a log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dgx_kvm_sw.access.run import run
from dgx_kvm_sw.model.errors import DgxKvmError

_MINUTES = 120  # a slow machine compiles the driver in one


class BuildError(DgxKvmError):
    """A step of a build failed."""


def call(
    log: Path, *argv: str | Path, env: Mapping[str, str] | None = None, mounts: bool = False
) -> str:
    """Run a program that must succeed and return its output; what it says is added to the log.

    One that `mounts` does it where nobody else sees it, so that nothing stays mounted if it is
    killed.
    """
    command = [str(word) for word in argv]
    alone = ["unshare", "--mount"] if mounts else []
    done = run([*alone, *command], timeout=60 * _MINUTES, env=env)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n{done.out}{done.err}")
    if done.code:
        said = f"{done.out}\n{done.err}"
        if "No space left on device" in said:
            raise BuildError(f"the disk of {log.parent} is full", "make room, then build again")
        raise BuildError(
            f"{Path(command[0]).name} failed: {_reason(said)}", f"its whole output is in {log}"
        )
    return done.out


def _reason(said: str) -> str:
    """The line that says why: the first error of apt or of mmdebstrap, else the last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E: ", "error:"))]
    return (errors or lines[-1:] or ["it said nothing"])[0]
