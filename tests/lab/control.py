"""The control socket: tests look into the emulated devices and break them.

One JSON object a line, each answered by one: {"ok": true, ...} or {"ok": false, "error": why}.

    {"do": "devices"}                       what each is, how often it was reset, what is wrong
    {"do": "journal", "since": 0, "device": "gpu0", "what": "reset", "limit": 1000}
                                            what happened; all but "do" may be left out
    {"do": "read", "device": "gpu0", "region": "bar0", "offset": 0, "size": 4}
    {"do": "fault", "device": "gpu0", "fault": "gone"}
    {"do": "clear", "device": "gpu0"}       mend all; "fault" names one

Faults, of which a device may have several: "gone" (off the bus: reads give ones), "config" (only
its configuration space does), "link" with "lanes" and "speed", "errors" with "uncorrectable" and
"correctable" bits of AER's status registers, "registers" with "values": {offset: word} of BAR0.
A fault lasts over resets and reconnections until it is cleared; but error bits that the machine
cleared, as Linux does when it boots, come back only with the next connection or reset. Let no
device be "gone" or without "config" when QEMU starts: the firmware hangs over what QEMU then makes
of it. Leave the device out of QEMU's command line instead, or reboot: what is gone by then is not
found again.
QEMU itself resets every device once before firmware runs: count from `last`, not from 0.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from lab.endpoint import CONFIG, Endpoint, Faults
from lab.journal import Journal
from lab.pci import Link
from lab.serving import HangUp

MOST = 1 << 16  # bytes of a request
MOST_ENTRIES = 1000
MOST_READ = 4096
PATIENCE = 10.0  # seconds that a client waits for an answer

Request = Mapping[str, Any]


class Control:
    """What a client of the control socket may ask."""

    def __init__(self, endpoints: Mapping[str, Endpoint], journal: Journal) -> None:
        self.endpoints = endpoints
        self.journal = journal
        self.verbs: Mapping[str, Callable[[Request], dict[str, Any]]] = {
            "devices": self._devices,
            "journal": self._journal,
            "read": self._read,
            "fault": self._fault,
            "clear": self._clear,
        }

    def answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            return {"ok": True, **self.verbs[request["do"]](request)}
        except KeyError as error:
            return {"ok": False, "error": f"no {error.args[0]!r}"}
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            return {"ok": False, "error": str(error)}

    def _devices(self, _: Request) -> dict[str, Any]:
        return {"devices": [_described(endpoint) for endpoint in self.endpoints.values()]}

    def _journal(self, request: Request) -> dict[str, Any]:
        device, what = request.get("device"), request.get("what")
        if device is not None:
            self._endpoint(request)
        entries = (
            entry.as_json()
            for entry in self.journal.since(int(request.get("since", 0)))
            if device in (None, entry.device) and what in (None, entry.what)
        )
        limit = min(int(request.get("limit", MOST_ENTRIES)), MOST_ENTRIES)
        return {"entries": list(islice(entries, limit)), "last": self.journal.last}

    def _read(self, request: Request) -> dict[str, Any]:
        endpoint = self._endpoint(request)
        region, size, offset = _region(request["region"]), int(request["size"]), request["offset"]
        if not 0 < size <= MOST_READ or not 0 <= offset <= endpoint.region_size(region) - size:
            raise ValueError("not within the region")
        return {"value": int.from_bytes(endpoint.read(region, offset, size), "little")}

    def _fault(self, request: Request) -> dict[str, Any]:
        endpoint = self._endpoint(request)
        fault = FAULTS[request["fault"]](request, endpoint)
        endpoint.set_faults(replace(endpoint.faults, **{request["fault"]: fault}))
        return {}

    def _clear(self, request: Request) -> dict[str, Any]:
        endpoint = self._endpoint(request)
        faults = Faults()
        if "fault" in request:
            sound = getattr(faults, request["fault"])
            faults = replace(endpoint.faults, **{request["fault"]: sound})
        endpoint.set_faults(faults)
        return {}

    def _endpoint(self, request: Request) -> Endpoint:
        return self.endpoints[request["device"]]


def _link(request: Request, endpoint: Endpoint) -> Link:
    full = endpoint.model.link
    return Link(int(request.get("speed", full.speed)), int(request.get("lanes", full.lanes)))


def _errors(request: Request, _: Endpoint) -> tuple[int, int]:
    bits = tuple(int(request.get(name, 0)) for name in ("uncorrectable", "correctable"))
    if not any(bits) or any(not 0 <= word < 1 << 32 for word in bits):
        raise ValueError("errors are bits of 32-bit words")
    return bits[0], bits[1]


def _registers(request: Request, endpoint: Endpoint) -> tuple[tuple[int, int], ...]:
    words = tuple((int(place, 0), int(value)) for place, value in request["values"].items())
    for place, value in words:
        if not 0 <= place <= endpoint.registers.size - 4 or not 0 <= value < 1 << 32:
            raise ValueError(f"no 32-bit word of BAR0: {place:#x}")
    return words


FAULTS: Mapping[str, Callable[[Request, Endpoint], Any]] = {
    "gone": lambda _, __: True,
    "config": lambda _, __: True,
    "link": _link,
    "errors": _errors,
    "registers": _registers,
}


def _region(name: str) -> int:
    return CONFIG if name == "config" else int(name.removeprefix("bar"))


def _described(endpoint: Endpoint) -> dict[str, Any]:
    identity = endpoint.model.identity
    return {
        "name": endpoint.name,
        "id": f"{identity.vendor:04x}:{identity.device:04x}",
        "serial": f"{endpoint.serial:016x}",
        "connected": endpoint.connected,
        "resets": endpoint.resets,
        "closed_links": endpoint.registers.closed_links,
        "faults": endpoint.faults.names,
    }


class Conversation:
    """One client of the control socket."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self._received = bytearray()

    def receive(self, data: bytes) -> bytes:
        self._received += data
        *lines, rest = bytes(self._received).split(b"\n")
        self._received[:] = rest
        if len(rest) > MOST:
            raise HangUp("a request without end")
        answers = (json.dumps(self.control.answer(line)) for line in lines)
        return "".join(f"{answer}\n" for answer in answers).encode()

    def close(self) -> None:
        pass


class ControlError(Exception):
    """What the control socket answered when it would not."""


class Client:
    """The other end, for tests: `with Client(path) as control: control.journal(what="reset")`."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(str(path))
        self._answers = self._socket.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._answers.close()
        self._socket.close()

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        """Ask anything; a refusal is an error."""
        self._socket.sendall(json.dumps({"do": do, **details}).encode() + b"\n")
        line = self._answers.readline()
        if not line:
            raise ControlError("the server went away")
        answer: dict[str, Any] = json.loads(line)
        if not answer.pop("ok"):
            raise ControlError(answer["error"])
        return answer

    def devices(self) -> dict[str, dict[str, Any]]:
        """Return what each device is and how it fares, by name."""
        return {device["name"]: device for device in self.ask("devices")["devices"]}

    def journal(self, since: int = 0, **only: str) -> list[dict[str, Any]]:
        """Return what happened after that entry, all of it; `only` by device and what."""
        entries: list[dict[str, Any]] = []
        while True:
            more = self.ask("journal", since=since, **only)["entries"]
            entries += more
            if len(more) < MOST_ENTRIES:
                return entries
            since = more[-1]["sequence"]

    def last(self) -> int:
        """Return the number of the newest entry, to ask later for what came after."""
        number: int = self.ask("journal", limit=0)["last"]
        return number

    def read(self, device: str, region: str, offset: int, size: int = 4) -> int:
        """Read a register behind the machine's back."""
        answer = self.ask("read", device=device, region=region, offset=offset, size=size)
        value: int = answer["value"]
        return value

    def fault(self, device: str, fault: str, **details: Any) -> None:
        self.ask("fault", device=device, fault=fault, **details)

    def clear(self, device: str) -> None:
        self.ask("clear", device=device)
