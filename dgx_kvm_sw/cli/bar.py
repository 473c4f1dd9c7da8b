"""A bar for work that takes long, where a person watches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from dgx_kvm_sw.cli.output import View, is_terminal, size, view_of
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
        text = drawn(label, done, total, cells_of(view), view.width - 1)
        print(f"{_CLEAR_LINE}{text}", end="", file=sys.stderr, flush=True)

    try:
        yield draw
    finally:
        print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)


def cells_of(view: View) -> str:
    return "█░" if view.unicode else "#-"


def drawn(label: str, done: int, total: int, cells: str, width: int) -> str:
    """Return "debian-12 ████░░░░ 50 %  1 GiB of 2 GiB"; where that is too wide, less of it."""
    figures = f"{100 * done // max(total, 1):3} %  {size(done)} of {size(total)}"
    count = max(0, min(_CELLS, width - len(label) - len(figures) - 2))
    filled = count * done // max(total, 1)
    return f"{label} {cells[0] * filled}{cells[1] * (count - filled)} {figures}"[:width]
