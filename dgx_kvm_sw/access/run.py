"""Other programs: the only module that starts any."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from dgx_kvm_sw.model.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing it costs milliseconds that most verbs need not pay
    from subprocess import Popen

_FOLDERS = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")  # the PATH of `su` and of cron lacks some
_GRACE_SECONDS = 5.0
_WATCH_SECONDS = 0.2


@dataclass(frozen=True)
class Completed:
    """What became of a program; one that a signal ended has the code -SIGNAL."""

    code: int
    out: str
    err: str


def run(
    argv: Sequence[str],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    show_errors: bool = False,
    watch: Callable[[str], object] | None = None,
) -> Completed:
    """Run a program to its end; raises HostError when it is missing or takes too long.

    `env` is added to the environment. With `show_errors` what it writes to stderr goes to ours
    while it runs, and `err` stays empty. `watch` gets what it has written so far, a few times a
    second; where that raises, the program is ended.
    """
    import subprocess

    if show_errors:
        sys.stderr.flush()
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if show_errors else subprocess.PIPE,
            env={**os.environ, "PATH": search_path(), "LC_ALL": "C.UTF-8", **(env or {})},
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # so that all it starts can be ended with it
        )
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise HostError(
            f"cannot run {argv[0]}: {reason}", "install the package that it belongs to"
        ) from error
    with process:
        try:
            out, err = _communicate(process, timeout, watch)
        except subprocess.TimeoutExpired:
            _end(process)
            raise HostError(
                f"{argv[0]} was ended: it took more than {timeout:g} s",
                "see what it waits for, then repeat this command",
            ) from None
        except BaseException:  # Ctrl-C among them
            _end(process)
            raise
    return Completed(process.returncode, out, err or "")


def _communicate(
    process: Popen[str], timeout: float, watch: Callable[[str], object] | None
) -> tuple[str, str]:
    import subprocess

    end = time.monotonic() + timeout
    while watch and (left := end - time.monotonic()) > _WATCH_SECONDS:
        try:
            return process.communicate(timeout=min(left, _WATCH_SECONDS))
        except subprocess.TimeoutExpired as unfinished:  # which loses nothing of what was said
            said = unfinished.output or b""
            watch(said if isinstance(said, str) else said.decode(errors="replace"))
    return process.communicate(timeout=max(0.0, end - time.monotonic()))


def search_path() -> str:
    """Return where programs are looked for, as PATH says it."""
    known = os.environ.get("PATH", "").split(":")
    return ":".join([*filter(None, known), *(each for each in _FOLDERS if each not in known)])


def _end(process: Popen[str]) -> None:
    """End a program and all that it started, which may hold its output open."""
    import subprocess

    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_GRACE_SECONDS)
            return


def become(argv: Sequence[str], package: str) -> NoReturn:
    """Replace this process by another program, which has the terminal then."""
    program = shutil.which(argv[0])
    if not program:
        raise HostError(f"there is no program {argv[0]}", f"install it: apt install {package}")
    sys.stdout.flush()  # what is buffered would be lost
    sys.stderr.flush()
    try:
        os.execv(program, list(argv))
    except OSError as error:
        raise HostError(f"cannot run {program}: {(error.strerror or '').lower()}") from error
