"""What happened to the emulated devices: resets, writes, faults; numbered, and bounded."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import merge
from typing import Any

WRITE = "write"
MOST_WRITES = 50_000  # a driver that probes writes thousands
MOST_EVENTS = 10_000


@dataclass(frozen=True)
class Entry:
    """One line: when, which device, what, and the details of that."""

    sequence: int
    time: float
    device: str
    what: str
    details: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {
            "sequence": self.sequence,
            "time": self.time,
            "device": self.device,
            "what": self.what,
            **self.details,
        }


class Journal:
    """The newest entries; writes are kept apart, so that they push no reset out."""

    def __init__(self) -> None:
        self.last = 0
        self._writes: deque[Entry] = deque(maxlen=MOST_WRITES)
        self._events: deque[Entry] = deque(maxlen=MOST_EVENTS)

    def add(self, device: str, what: str, **details: Any) -> None:
        self.last += 1
        kept = self._writes if what == WRITE else self._events
        kept.append(Entry(self.last, round(time.time(), 6), device, what, details))

    def since(self, sequence: int) -> Iterator[Entry]:
        """Return what came after this number, oldest first."""
        entries = merge(self._events, self._writes, key=lambda entry: entry.sequence)
        return (entry for entry in entries if entry.sequence > sequence)
