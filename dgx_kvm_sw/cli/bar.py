"""A bar for work that takes long, where a person watches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from dgx_kvm_sw.cli.output import is_terminal, size, view_of
from dgx_kvm_sw.guest.checksums import Progress, unwatched

_CLEAR_LINE = "\r\033[K"
_CELLS = 30


@contextlib.contextmanager
def bar(label: str, *, quiet: bool) -> Iterator[Progress]:
    """A progress that draws itself on the terminal and is gone at the end."""
    if quiet or not is_terminal(sys.stderr):
        yield unwatched
        return
    view = view_of(sys.stderr)

    def draw(done: int, total: int) -> None:
        text = drawn(label, done, total, "█░" if view.unicode else "#-")
        print(f"{_CLEAR_LINE}{text[: view.width - 1]}", end="", file=sys.stderr, flush=True)

    try:
        yield draw
    finally:
        print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)


def drawn(label: str, done: int, total: int, cells: str) -> str:
    """Return "debian-12 ████░░░░ 50 %  1 GiB of 2 GiB"."""
    filled = _CELLS * done // max(total, 1)
    picture = cells[0] * filled + cells[1] * (_CELLS - filled)
    percent = 100 * done // max(total, 1)
    return f"{label} {picture} {percent:3} %  {size(done)} of {size(total)}"
