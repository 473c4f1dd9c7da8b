"""Checks a document against its JSON Schema and says what is wrong in words of its own.

The `title` of a schema completes the sentence "X is not ...", so a new key needs no new code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dgx_kvm_sw.guest.document import Document
from dgx_kvm_sw.guest.problems import did_you_mean, shown
from dgx_kvm_sw.guest.yamlsource import resolved
from dgx_kvm_sw.model.errors import Problem

DATA = Path(__file__).parents[1] / "data"

_TYPE_NAMES = {
    "object": "a mapping",
    "array": "a list",
    "string": "text",
    "integer": "a whole number",
    "boolean": "true or false",
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt])?i?b?", re.IGNORECASE)
_YAML_1_1_BOOLEANS = {"yes": True, "on": True, "no": False, "off": False}


def schema_text(name: str) -> str:
    """Return a schema, "vms" or "size", as it is stored."""
    return (DATA / f"{name}.schema.json").read_text(encoding="utf-8")


def violations(document: Document, schema: str, optional: bool = False) -> Iterator[Problem]:
    """Yield everything in a document that its schema does not allow, some of it twice.

    `optional` lets the document leave out keys that the schema requires at the top.
    """
    from jsonschema import Draft7Validator  # takes 80 ms, and most files passed it before

    rules = json.loads(schema)
    if optional:
        del rules["required"]
    for error in Draft7Validator(rules).iter_errors(document.value):
        yield from _problems(document, error)


def _problems(document: Document, error: Any) -> Iterator[Problem]:
    path = tuple(error.absolute_path)
    value = error.instance
    if error.validator == "additionalProperties":
        known = error.schema["properties"]
        for key in value.keys() - known.keys():
            hint = did_you_mean(key, known) or f"known keys: {', '.join(known)}"
            yield document.key_problem((*path, key), "is not a known key", hint)
    elif error.validator == "required":
        # Only the library's sentence says which key this error is about, so name all missing.
        for key in error.validator_value:
            if key not in value:
                yield document.problem(path, f"`{key}` is missing")
    elif "propertyNames" in error.absolute_schema_path:
        message = f"{shown(value)} is not {_wanted(error)}"
        yield document.key_problem((*path, value), message)
    elif value is None:
        yield document.problem(path, "has no value", "give it one, or remove it")
    else:
        message = f"{shown(value)} is not {_wanted(error)}"
        yield document.problem(path, message, _hint(value, error.schema))


def _wanted(error: Any) -> str:
    if "title" in error.schema:
        return str(error.schema["title"])
    if error.validator == "enum":
        return "one of " + ", ".join(str(option) for option in error.validator_value)
    return _TYPE_NAMES[_first_type(error.schema)]


def _first_type(schema: dict[str, Any]) -> str:
    types = schema.get("type", "object")
    return str(types if isinstance(types, str) else types[0])


def _hint(value: Any, schema: dict[str, Any]) -> str:
    """Say what was probably meant: the first likely correction that the schema accepts."""
    from jsonschema import Draft7Validator

    if isinstance(value, (list, dict)):
        return ""
    if _first_type(schema) == "array":
        return "put it in brackets to make it a list"
    accepts = Draft7Validator(schema).is_valid
    corrections = _corrections(value, "iB" in schema.get("pattern", ""))
    hint = next((words for corrected, words in corrections if accepts(corrected)), "")
    options = [option for option in schema.get("enum", ()) if isinstance(option, str)]
    return hint or did_you_mean(value, options)


def _corrections(value: Any, is_size: bool) -> Iterator[tuple[Any, str]]:
    """Yield what people mean when they write `value`, with the words that tell them."""
    text = str(value)
    size = _SIZE.fullmatch(text)
    if is_size and size:
        with_unit = f"{size[1]}{(size[2] or 'G').upper()}iB"
        yield with_unit, f"did you mean `{with_unit}`?"
    if isinstance(value, str):
        yield resolved(text), f"write {text} without quotes"
        truth = _YAML_1_1_BOOLEANS.get(text.lower())
        yield truth, f"write {shown(truth)}"
        plain = re.sub(r"[\s_]+", "-", text.strip().lower())
        yield plain, f"did you mean `{plain}`?"
    else:
        yield shown(value), f'to make it text, put it in quotes: "{shown(value)}"'
