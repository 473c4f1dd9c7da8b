"""Words about mistakes in a file: how a value is shown, what was meant, and JSON for machines."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from dgx_kvm_sw.model.errors import Problem

_LONGEST = 40  # characters of a value that a message repeats
HUGE = 10**18  # stands for every whole number of more digits


def shown(value: Any) -> str:
    """Return a value as a message names it: on one line, short, safe on any terminal."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return "a number this large" if abs(value) >= HUGE else str(value)
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "a mapping"
    text = str(value)
    return repr(text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "...")


def did_you_mean(word: Any, options: Iterable[str]) -> str:
    """Return a hint naming the option nearest to `word`; empty when none is near."""
    import difflib  # not needed unless something is wrong

    nearest = difflib.get_close_matches(str(word)[:_LONGEST], list(options), 1)
    return f"did you mean `{nearest[0]}`?" if nearest else ""


def unknown(kind: str, word: Any, known: Collection[str]) -> tuple[str, str]:
    """Say that there is no tenant or image of this name, and which there are."""
    some = ", ".join(sorted(known)[:8])
    other = f"known {kind}s: {some}" if some else f"no {kind} is known"
    return f"there is no {kind} {shown(word)}", did_you_mean(word, known) or other


def dotted(path: Iterable[str | int]) -> str:
    """Return a path into a document as messages write it: "vms[2].gpus"."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            plain = step.isprintable() and 0 < len(step) <= _LONGEST
            text += ("." if text else "") + (step if plain else shown(step))
    return text


def problems_json(problems: Iterable[Problem]) -> list[dict[str, Any]]:
    """Return problems in the shape of Terraform's diagnostics, which editors and CI know.

    `range` is null where the problem is with the whole file.
    """
    return [
        {
            "severity": "error",
            "summary": problem.message,
            "detail": problem.hint,
            "file": problem.file,
            "path": problem.path,
            "range": {
                "start": {"line": problem.line, "column": problem.column},
                "end": {"line": problem.end_line, "column": problem.end_column},
            }
            if problem.line
            else None,
            "snippet": problem.snippet,
        }
        for problem in problems
    ]
