"""Text pictures: styled lines that know their width, and the ways to put them together.

Everything is drawn in Unicode; `paint` has an ASCII sign of the same width for each sign used.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from dgx_kvm_sw.cli.output import View

GAP = 2  # columns between the columns of a table

_ASCII = str.maketrans(
    {
        "─": "-",
        "│": "|",
        "┌": "+",
        "┬": "+",
        "┐": "+",
        "└": "+",
        "┘": "+",
        "├": "+",
        "·": ".",
        "▒": "#",
        "…": "~",
        "×": "x",
        "→": ">",
    }
)
_CODES = {
    "heading": "1",
    "quiet": "2",
    "bad": "1;31",
    "warn": "33",
    "good": "32",
    "foreign": "7",
}
# Black on these, so that a VM is one block of colour; its letter stays for those who see none.
VM_COLOURS = (6, 3, 2, 5, 7, 4)  # blue last: black on it is hard to read


@dataclass(frozen=True)
class Span:
    """Text in one style: a key of the table of codes, "vmN" or "offN" (VM in use, or not)."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Line:
    spans: tuple[Span, ...] = ()

    @property
    def width(self) -> int:
        return sum(len(span.text) for span in self.spans)

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)

    def __add__(self, other: str | Span | Line) -> Line:
        return Line((*self.spans, *line(other).spans))

    def padded(self, width: int, *, right: bool = False) -> Line:
        blanks = Span(" " * max(0, width - self.width))
        return Line((blanks, *self.spans) if right else (*self.spans, blanks))

    def cut(self, width: int) -> Line:
        """This line in at most `width` columns; an ellipsis stands for what is missing."""
        if self.width <= width:
            return self
        left, spans = max(0, width - 1), []
        for span in self.spans:
            spans.append(replace(span, text=span.text[:left]))
            left -= len(spans[-1].text)
        return Line((*spans, Span("…")))


BLANK = Line()


def line(*parts: str | Span | Line) -> Line:
    """Return the parts as one line."""
    spans: list[Span] = []
    for part in parts:
        if isinstance(part, Line):
            spans += part.spans
        else:
            spans.append(Span(part) if isinstance(part, str) else part)
    return Line(tuple(spans))


def paint(lines: Iterable[Line], view: View) -> str:
    """Return the lines as a terminal of this kind shows them."""
    return "\n".join(_painted(each.cut(view.width), view) for each in lines)


def _painted(each: Line, view: View) -> str:
    plain = each.text.rstrip()
    if not view.color:
        return _plain(plain, view)
    left, parts = len(plain), []
    for span in each.spans:
        text = _plain(span.text[:left], view)
        left -= len(text)
        parts.append(f"\033[{_code(span.style)}m{text}\033[0m" if span.style and text else text)
    return "".join(parts)


def _plain(text: str, view: View) -> str:
    if view.unicode:
        return text
    return text.translate(_ASCII).encode("ascii", "replace").decode("ascii")


def _code(style: str) -> str:
    for prefix, codes in (("vm", "30;4"), ("off", "3")):
        if style.startswith(prefix):
            return f"{codes}{VM_COLOURS[int(style.removeprefix(prefix)) % len(VM_COLOURS)]}"
    return _CODES[style]


# -- putting lines together -------------------------------------------------------------------


def heading(text: str) -> Line:
    return line(Span(text, "heading"))


def wrapped(
    text: str, width: int, *, first: Line | str = "", indent: int = 0, style: str = ""
) -> list[Line]:
    """Break a text into lines behind `first`; the following ones are indented."""
    start = line(first)
    room = max(20, width - max(start.width, indent))
    parts = textwrap.wrap(text, room, break_on_hyphens=False) or [""]
    blanks = " " * (indent or start.width)
    return [
        line(blanks if number else start, Span(part, style)) for number, part in enumerate(parts)
    ]


def flowed(words: Sequence[tuple[str, str]], width: int, first: str = "") -> list[Line]:
    """Lay out words (text, style) in lines, none of them broken, behind `first`."""
    lines = [line(first)]
    for text, style in words:
        if lines[-1].width + GAP + len(text) > width and lines[-1].width > len(first):
            lines.append(line(" " * len(first)))
        gap = " " * GAP if lines[-1].width else ""
        lines[-1] = lines[-1] + gap + Span(text, style)
    return lines


def sentences(texts: Iterable[str], width: int) -> list[Line]:
    """Each text on lines of its own, set in from the heading above."""
    lines: list[Line] = []
    for text in texts:
        lines += wrapped(text, width, first="  ", indent=4)
    return lines


def section(title: str, body: list[Line]) -> list[Line]:
    """A part of a page with its heading and a blank line before; nothing without a body."""
    return [BLANK, heading(title), *body] if body else []


def beside(blocks: Sequence[list[Line]], widths: int, gap: int = GAP) -> list[Line]:
    """Put blocks of lines, each `widths` columns wide, next to one another."""
    height = max(len(block) for block in blocks)
    rows = []
    for number in range(height):
        row = BLANK
        for position, block in enumerate(blocks):
            part = block[number] if number < len(block) else BLANK
            row = row + (" " * gap if position else "") + part.cut(widths).padded(widths)
        rows.append(row)
    return rows


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[Line | str]],
    width: int,
    *,
    right: Collection[int] = (),
    shrink: Sequence[int] = (),
) -> list[Line]:
    """Align rows in columns below a quiet head (none where all its words are empty).

    Columns in `right` are aligned right; those in `shrink` give way, the widest first, when
    the table is wider than `width`. An empty column takes no room.
    """
    cells = [[line(cell) for cell in row] for row in rows]
    if any(head):
        cells.insert(0, [line(Span(word, "quiet")) for word in head])
    widths = _column_widths(cells, width, shrink)
    result = []
    for row in cells:
        text = BLANK
        for column, cell in enumerate(row):
            if widths[column]:
                fitted = cell.cut(widths[column]).padded(widths[column], right=column in right)
                text = text + (" " * GAP if text.spans else "") + fitted
        result.append(text)
    return result


def _column_widths(cells: list[list[Line]], width: int, shrink: Sequence[int]) -> list[int]:
    columns: Iterable[tuple[Line, ...]] = zip(*cells, strict=True)
    widths = [max(cell.width for cell in column) for column in columns]
    gaps = GAP * (sum(1 for column in widths if column) - 1)
    while shrink and sum(widths) + gaps > width:
        widest = max(shrink, key=lambda column: widths[column])
        if widths[widest] <= 6:
            break
        widths[widest] -= 1
    return widths


def bar(parts: Sequence[tuple[str, str, int]], width: int) -> Line:
    """Return a bar of `width` signs of parts (sign, style, amount); what is there is seen.

    Of more parts than there are columns the smallest are left out.
    """
    filled = [number for number, part in enumerate(parts) if part[2] > 0]
    largest = sorted(filled, key=lambda number: -parts[number][2])[:width]
    shown = [parts[number] for number in sorted(largest)]
    whole = sum(amount for _, _, amount in shown)
    if not whole:
        return line(" " * width)
    exact = [amount * width / whole for _, _, amount in shown]
    cells = [max(1, int(share)) for share in exact]
    while sum(cells) != width:
        step = 1 if sum(cells) < width else -1
        rooms = [i for i, count in enumerate(cells) if step > 0 or count > 1]
        chosen = max(rooms, key=lambda i: step * (exact[i] - cells[i]))
        cells[chosen] += step
    signs = zip(shown, cells, strict=True)
    return Line(tuple(Span(sign * count, style) for (sign, style, _), count in signs))
