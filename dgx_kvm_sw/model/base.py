"""Two helpers for values: string enums (Python 3.10 has no StrEnum) and JSON."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from typing import Any


class StrEnum(str, enum.Enum):
    """An enum whose members are, and print as, their string values."""

    def __str__(self) -> str:
        return str(self.value)


def to_json(value: Any) -> Any:
    """Return `value` (frozen dataclasses, tuples, value types) as plain JSON types.

    A dataclass becomes an object of its fields; a type that defines `__str__` as its written
    form (PCI address, CPU set) becomes that string.
    """
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (str, int, float)) or value is None:
        return value
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and "__str__" not in type(value).__dict__:
        names = (field.name for field in dataclasses.fields(value))
        return {name: to_json(getattr(value, name)) for name in names}
    return str(value)


def digest(*values: Any) -> str:
    """Return a short hexadecimal digest (sha256, first 16 digits) of values of the model."""
    text = json.dumps([to_json(value) for value in values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
