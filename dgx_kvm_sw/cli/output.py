"""What all verbs print with: the terminal's abilities, colours, JSON, small words."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from dgx_kvm_sw.guest.problems import problems_json
from dgx_kvm_sw.model.errors import BadFileError, DgxKvmError

_WIDTH_ELSEWHERE = 100  # columns of a pipe or a file
_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


@dataclass(frozen=True)
class View:
    """What the reader's terminal can show."""

    width: int  # columns
    color: bool
    unicode: bool

    def paint(self, text: str, color: str) -> str:
        """Return `text` in a colour ("red", "dim"), or as it is where there are none."""
        return f"\033[{_CODES[color]}m{text}\033[0m" if self.color and text else text


def view_of(stream: TextIO | None, no_color: bool = False) -> View:
    """Look at where output goes. https://no-color.org: any value but an empty one counts."""
    terminal = is_terminal(stream)
    plain = no_color or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    encoding = (getattr(stream, "encoding", None) or "").lower().replace("-", "")
    return View(_width(stream, terminal), terminal and not plain, encoding == "utf8")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person reads this; a closed stream is nobody."""
    return stream is not None and not stream.closed and stream.isatty()


def _width(stream: TextIO | None, terminal: bool) -> int:
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    if stream is not None and terminal:
        try:
            return os.get_terminal_size(stream.fileno()).columns or _WIDTH_ELSEWHERE
        except OSError:
            pass
    return _WIDTH_ELSEWHERE


def say(text: str, *, quiet: bool = False) -> None:
    """Print a result."""
    if not quiet and text:
        print(text)


def say_json(document: Mapping[str, Any]) -> None:
    """Print a document for machines; its shape has a version."""
    json.dump({"version": 1, **document}, sys.stdout, indent=2)
    print()


def complain(message: str, hint: str = "") -> None:
    """Say on stderr what is wrong and what to do about it."""
    lines = [f"dgx-kvm: {message}", *([f"  {hint}"] if hint else [])]
    print("\n".join(lines), file=sys.stderr)


def size(number: int) -> str:
    """Return bytes as "412 MiB", with one digit more where that says something: "1.5 GiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(number.bit_length() - 1, 0) // 10, len(units) - 1)
    value = number / 1024**power
    digits = f"{value:.1f}".removesuffix(".0") if value < 10 else f"{value:.0f}"
    return f"{digits} {units[power]}"


def counted(number: int, one: str, many: str = "") -> str:
    """Return "1 VM", "2 VMs", "0 VMs"."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def listed(words: Iterable[str], most: int = 8) -> str:
    """Return "a, b, c", cut short where there are many."""
    found = list(words)
    rest = len(found) - most
    return ", ".join(found if rest <= 0 else [*found[:most], f"and {rest} more"])


def say_error_json(error: DgxKvmError) -> None:
    """Print an error for a program that asked for JSON; people read it on stderr."""
    problems = problems_json(error.problems) if isinstance(error, BadFileError) else []
    say_json(
        {
            "error": {
                "message": error.message,
                "hint": error.hint,
                "exit_code": int(error.exit_code),
                "problems": problems,
            }
        }
    )
