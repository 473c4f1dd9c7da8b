"""The administrator's own programs, run at certain moments: /etc/dgx-kvm/hooks.d/STAGE/."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from dgx_kvm_sw.access.files import Root, explained
from dgx_kvm_sw.access.run import run
from dgx_kvm_sw.model.errors import HostError

HOOKS = "/etc/dgx-kvm/hooks.d"
SECONDS = 60.0

_NAME = re.compile(r"[A-Za-z0-9_-]+")  # as run-parts: so no hook.dpkg-old or hook~
_LOGGED_CHARACTERS = 4000


def run_hooks(
    root: Root,
    stage: str,
    environment: Mapping[str, str],
    log: Callable[[Mapping[str, object]], None],
    timeout: float = SECONDS,
    failed: Callable[[HostError], None] | None = None,
) -> None:
    """Run the hooks of a stage in the order of their names, each for `timeout` seconds at most.

    `log` gets an entry for the journal after each. Raises HostError at the first that fails, so
    that those after it do not run; with `failed`, that is told instead and they do.
    """
    for name in root.names(f"{HOOKS}/{stage}"):
        hook = root.path(f"{HOOKS}/{stage}") / name
        try:
            if _NAME.fullmatch(name) and _is_program(hook):
                _check_owner(hook)
                _run_hook(hook, {**environment, "DGX_KVM_STAGE": stage}, log, timeout)
        except HostError as error:
            if failed is None:
                raise
            failed(error)


def _is_program(hook: Path) -> bool:
    """A README may lie beside the hooks, and one that may not be executed is switched off."""
    return hook.is_file() and bool(hook.stat().st_mode & 0o111)


def _check_owner(hook: Path) -> None:
    """Raise HostError where anybody but root, and who runs us, could change what is run."""
    for path in (hook.parent.parent, hook.parent, hook.resolve().parent, hook):
        try:
            found = path.stat()
        except OSError as error:
            raise explained(error, "look at", path) from error
        if found.st_uid not in (0, os.geteuid()) or stat.S_IMODE(found.st_mode) & 0o022:
            raise HostError(
                f"the hook {hook} is not run: others than root can change {path}",
                f"chown root:root {path}; chmod go-w {path}",
            )


def _run_hook(
    hook: Path,
    environment: Mapping[str, str],
    log: Callable[[Mapping[str, object]], None],
    timeout: float,
) -> None:
    begin = time.monotonic()
    entry: dict[str, object] = {"event": "hook", "hook": str(hook)}
    hint = "mend the hook, or take its right to be executed; the journal has what it said"
    try:
        done = run([str(hook)], timeout=timeout, env=environment)
    except HostError as error:
        log({**entry, "error": error.message})
        raise HostError(error.message, hint) from error
    said = f"{done.out}{done.err}".strip()
    seconds = round(time.monotonic() - begin, 1)
    log({**entry, "code": done.code, "seconds": seconds, "output": said[-_LOGGED_CHARACTERS:]})
    if done.code:
        reason = f": {said.splitlines()[-1]}" if said else ""
        raise HostError(f"the hook {hook} failed with code {done.code}{reason}", hint)
