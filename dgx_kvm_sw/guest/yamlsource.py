"""Reads YAML into a document: plain values with positions, and what is no YAML of ours.

A file may use the part of YAML that reads the same to everybody. A word without quotes is true,
false, null, a whole number without leading zeros, or text; so `no`, `22.04`, `010` and
`0000:34:00.0` are text, where YAML 1.1 makes them false, a fraction, 8 and 122400.0. Anchors,
tags and second documents are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from dgx_kvm_sw.guest.document import WHOLE_FILE, Document, Path, Source, Span
from dgx_kvm_sw.guest.problems import HUGE
from dgx_kvm_sw.model.errors import Problem

MAX_BYTES = 1 << 20  # a real file has some 10 KiB
_MAX_DEPTH = 16  # ours has six levels

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_UNREADABLE = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_WHOLE_NUMBER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_WORDS = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True,
    "false": False, "False": False, "FALSE": False,
}  # fmt: skip


def parse(file: str, data: bytes, loader: Any = LOADER) -> Document:
    """Read one file; what is wrong with it is in the document, nothing is raised."""
    source = Source(file, data[:MAX_BYTES].decode("utf-8-sig", "replace"))
    tree = _Tree(source)
    try:
        _check_text(source, data)
        for event in yaml.parse(source.text, Loader=loader):
            tree.add(event)
    except _Refused as refused:
        problem = refused.problem
    except yaml.YAMLError as error:
        problem = _syntax_problem(source, error)
    else:
        return Document(source, tree.value, tree.values, tree.keys, tuple(tree.problems), True)
    return Document(source, None, {}, {}, (*tree.problems, problem), False)


class _Refused(Exception):
    """Ends the reading of a file."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def _check_text(source: Source, data: bytes) -> None:
    if len(data) > MAX_BYTES:
        size = f"{MAX_BYTES >> 20} MiB"
        raise _Refused(
            source.problem(WHOLE_FILE, f"is larger than {size}", "is this the right file?")
        )
    try:
        data.decode()
    except UnicodeDecodeError as error:
        span = source.span_at(len(data[: error.start].decode("utf-8-sig")))
        message = f"byte 0x{data[error.start]:02x} is not UTF-8"
        raise _Refused(source.problem(span, message, "save the file as UTF-8")) from None
    strange = _UNREADABLE.search(source.text)
    if strange:
        message = f"the character U+{ord(strange[0]):04X} cannot stand in a text file"
        raise _Refused(source.problem(source.span_at(strange.start()), message))


@dataclass
class _Open:
    """A list or mapping that the parser has not closed yet."""

    value: Any
    path: Path
    start: Any  # mark of the parser
    flow: bool  # written with brackets
    key: str | None = None  # waits for its value

    @property
    def awaits_key(self) -> bool:
        return self.key is None and isinstance(self.value, dict)

    @property
    def next_path(self) -> Path:
        return (*self.path, len(self.value) if self.key is None else self.key)

    def put(self, value: Any) -> None:
        if isinstance(self.value, list):
            self.value.append(value)
        else:
            self.value[self.key] = value
            self.key = None


@dataclass
class _Tree:
    """Grows values and their spans from parser events, without recursion."""

    source: Source
    value: Any = None
    values: dict[Path, Span] = field(default_factory=dict)
    keys: dict[Path, Span] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    _open: list[_Open] = field(default_factory=list)
    _started: bool = False

    def add(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.NodeEvent):
            self._check_node(event)
        if isinstance(event, yaml.ScalarEvent):
            if self._awaits_key:
                self._add_key(event)
            else:
                self._add_scalar(event)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._enter(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = self._open.pop()
            if closed.flow:
                self.values[closed.path] = Span.between(closed.start, event.end_mark)
        elif isinstance(event, yaml.DocumentStartEvent):
            if self._started:
                hint = "write all in one document, or more files in vms.d"
                self._refuse(event, "a second document starts here", hint)
            self._started = True

    @property
    def _awaits_key(self) -> bool:
        return bool(self._open) and self._open[-1].awaits_key

    @property
    def _path(self) -> Path:
        return self._open[-1].next_path if self._open else ()

    def _check_node(self, event: Any) -> None:
        if event.anchor is not None:
            # Aliases can make a small file huge; seen here, before anything is built from them.
            hint = "write the value out; what all VMs share can stand in `defaults`"
            self._refuse(event, "YAML anchors (&) and aliases (*) are not used here", hint)
        if getattr(event, "tag", None) is not None:
            hint = "remove it, or put text that starts with ! in quotes"
            self._refuse(event, "YAML tags (!) are not used here", hint)

    def _add_key(self, event: Any) -> None:
        key = event.value
        self._open[-1].key = key
        path = self._path
        span = Span.between(event.start_mark, event.end_mark)
        if key in self._open[-1].value:
            first = self.keys[path].line
            message = f"is given twice; the first is in line {first}"
            self.problems.append(self.source.problem(span, message, "remove one", path))
        self.keys[path] = span
        self._check_printable(key, path, span)

    def _add_scalar(self, event: Any) -> None:
        path = self._path
        span = self.values[path] = Span.between(event.start_mark, event.end_mark)
        self._check_printable(event.value, path, span)
        self._put(resolved(event.value) if event.implicit[0] else event.value)

    def _put(self, value: Any) -> None:
        if self._open:
            self._open[-1].put(value)
        else:
            self.value = value

    def _enter(self, event: Any) -> None:
        if self._awaits_key:
            self._refuse(event, "a key must be a word, not a list or a mapping")
        if len(self._open) >= _MAX_DEPTH:
            self._refuse(event, f"this is nested more than {_MAX_DEPTH} levels deep")
        value: Any = [] if isinstance(event, yaml.SequenceStartEvent) else {}
        opened = _Open(value, self._path, event.start_mark, bool(event.flow_style))
        # A block ends where the next thing begins; its first line is what a reader looks at.
        start = event.start_mark
        end = len(self.source.line(start.line + 1).rstrip()) + 1
        self.values[opened.path] = Span(start.line + 1, start.column + 1, start.line + 1, end)
        self._put(value)
        self._open.append(opened)

    def _check_printable(self, text: str, path: Path, span: Span) -> None:
        if text.isprintable():
            return
        strange = next(char for char in text if not char.isprintable())
        name = {"\n": "a line break", "\t": "a tab"}.get(
            strange, f"the character U+{ord(strange):04X}"
        )
        message = f"holds {name}, which cannot be seen"
        self.problems.append(self.source.problem(span, message, "", path))

    def _refuse(self, event: yaml.Event, message: str, hint: str = "") -> None:
        span = Span.between(event.start_mark, event.end_mark)
        raise _Refused(self.source.problem(span, message, hint))


def resolved(word: str) -> Any:
    """Return what a word without quotes stands for."""
    if word in _WORDS:
        return _WORDS[word]
    if not _WHOLE_NUMBER.fullmatch(word):
        return word
    if len(word) > 18:
        return -HUGE if word.startswith("-") else HUGE
    return int(word)


# What libyaml (or PyYAML) says, what a person needs to hear, and whether the mistake is where
# the parser began the thing ("context") or where it gave up.
_REASONS = (
    ("mapping values are not", False, "a `key: value` cannot stand here",
     "look at the indentation; text with a colon in it needs quotes"),
    ("',' or ']'", True, "this list is not closed with ], or lacks a comma", ""),
    ("',' or '}'", True, "this mapping is not closed with }, or lacks a comma", ""),
    ("unexpected end of stream", True, "this quote is never closed", ""),
    ("find expected ':'", True, "this is no `key: value`; the colon is missing", ""),
    ("node content", False, "a value is missing here", "is a bracket or a brace left open?"),
    ("expected key", False, "the indentation does not fit the lines above",
     "all keys of one mapping start in the same column"),
    ("'-' indicator", False, "the indentation does not fit the list above",
     "all items of one list start with `- ` in the same column"),
    ("<block end>", False, "the indentation does not fit the lines above",
     "keys of one mapping, and items of one list, start in the same column"),
    ("escape", False, "unknown escape after \\ in double quotes", "use single quotes"),
    ("cannot start any token", False, "a value cannot start with this character",
     "put the value in quotes"),
)  # fmt: skip


def _syntax_problem(source: Source, error: yaml.YAMLError) -> Problem:
    said = str(getattr(error, "problem", None) or error)
    mark = getattr(error, "problem_mark", None)
    began = getattr(error, "context_mark", None)
    if mark and _tab_at(source.line(mark.line + 1), mark.column):
        line = source.line(mark.line + 1)
        column = line.index("\t") + 1
        span = Span(mark.line + 1, column, mark.line + 1, column + 1)
        return source.problem(span, "this is a tab", "YAML is indented with spaces only")
    for words, at_beginning, message, hint in _REASONS:
        if words in said:
            mark = began if at_beginning and began else mark
            return source.problem(_span_of(mark), message, hint)
    return source.problem(_span_of(mark), f"this is not YAML: {said}")


def _tab_at(line: str, column: int) -> bool:
    indentation = line[: len(line) - len(line.lstrip())]
    return "\t" in indentation or line[column : column + 1] == "\t"


def _span_of(mark: Any) -> Span:
    if mark is None:
        return WHOLE_FILE
    return Span(mark.line + 1, mark.column + 1, mark.line + 1, mark.column + 2)
