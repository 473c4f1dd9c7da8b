"""What a file holds and where each value of it was written, so that a problem can point at it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dgx_kvm_sw.guest.problems import dotted
from dgx_kvm_sw.model.errors import WITHHELD, Problem

Path = tuple[str | int, ...]  # ("vms", 2, "gpus")

_LONGEST_SNIPPET = 200
_SECRET = re.compile(  # the name of a key, and that something comes after it, perhaps no colon
    r"(?:passw(?:or)?d|passphrase|secret|token|private[ _-]?key)[\w-]{0,40}[\"']?(?:\s*[:=]|\s+\S)",
    re.IGNORECASE,
)
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # as the YAML parser counts lines


@dataclass(frozen=True)
class Span:
    """A stretch of a file; lines and columns count from 1, the end is exclusive."""

    line: int
    column: int
    end_line: int
    end_column: int

    @classmethod
    def between(cls, start: Any, end: Any) -> Span:
        """From one mark of the parser to another."""
        return cls(start.line + 1, start.column + 1, end.line + 1, end.column + 1)

    @property
    def empty(self) -> bool:
        return (self.line, self.column) == (self.end_line, self.end_column)


WHOLE_FILE = Span(0, 0, 0, 0)


@dataclass(frozen=True)
class Source:
    """A file's name and text."""

    file: str
    text: str

    @cached_property
    def lines(self) -> list[str]:
        return _LINE_BREAK.split(self.text)

    def line(self, number: int) -> str:
        """Return a line by its number from 1; empty beyond the end."""
        return self.lines[number - 1] if 0 < number <= len(self.lines) else ""

    @cached_property
    def secret_lines(self) -> frozenset[int]:
        """The lines in PEM blocks, and those with keys called like a secret and their values."""
        found = set()
        in_block, key_column = False, -1  # -1: in no such value
        for number, line in enumerate(self.lines, 1):
            in_block = in_block or "-----BEGIN" in line
            if line.strip() and len(line) - len(line.lstrip()) <= key_column:
                key_column = -1
            if key_column < 0 and _SECRET.search(line):
                key_column = len(line) - len(line.lstrip(" -"))
            if in_block or key_column >= 0:
                found.add(number)
            in_block = in_block and "-----END" not in line
        return frozenset(found)

    def span_at(self, position: int, length: int = 1) -> Span:
        """Return the span of `length` characters of one line at a character position."""
        before = _LINE_BREAK.split(self.text[:position])
        column = len(before[-1]) + 1
        return Span(len(before), column, len(before), column + length)

    def problem(self, span: Span, message: str, hint: str = "", path: Path = ()) -> Problem:
        line = self.line(span.line)
        # One column stays one column: the caret is placed by counting.
        snippet = "".join(char if char.isprintable() else " " for char in line)
        if span.line in self.secret_lines:
            snippet = WITHHELD
        return Problem(
            self.file,
            span.line,
            span.column,
            span.end_line,
            span.end_column,
            dotted(path),
            message,
            hint,
            snippet if len(line) <= _LONGEST_SNIPPET else "",
        )


@dataclass(frozen=True)
class Document:
    """What a file holds, as far as it could be read."""

    source: Source
    value: Any  # plain lists, dicts and scalars; None when empty or not readable
    values: dict[Path, Span]
    keys: dict[Path, Span]
    problems: tuple[Problem, ...]
    complete: bool  # False: `value` is missing because the file is no YAML of ours

    @property
    def file(self) -> str:
        return self.source.file

    def get(self, *path: str | int) -> Any:
        """Return the value at a path, or None where there is none."""
        value = self.value
        for step in path:
            if isinstance(value, dict) and isinstance(step, str):
                value = value.get(step)
            elif isinstance(value, list) and isinstance(step, int) and step < len(value):
                value = value[step]
            else:
                return None
        return value

    def mapping(self, *path: str | int) -> dict[str, Any]:
        """Return the mapping at a path; empty where something else or nothing is."""
        value = self.get(*path)
        return value if isinstance(value, dict) else {}

    def sequence(self, *path: str | int) -> list[Any]:
        """Return the list at a path; empty where something else or nothing is."""
        value = self.get(*path)
        return value if isinstance(value, list) else []

    def span(self, path: Path) -> Span:
        """Where the value at `path` is written; its key when it is left empty."""
        span = self.values.get(path, WHOLE_FILE)
        return self.keys.get(path, span) if span.empty else span

    def problem(self, path: Path, message: str, hint: str = "") -> Problem:
        """A problem with the value at `path`."""
        return self.source.problem(self.span(path), message, hint, path)

    def key_problem(self, path: Path, message: str, hint: str = "") -> Problem:
        """A problem with the last key of `path` itself."""
        return self.source.problem(self.keys.get(path, WHOLE_FILE), message, hint, path)
