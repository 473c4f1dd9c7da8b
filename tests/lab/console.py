"""The ways into a machine: its root shell on the second serial port, and QEMU's own QMP."""

from __future__ import annotations

import base64
import itertools
import json
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.packages import LabError

LONGEST = 1500  # of a command, in bytes: what a serial port takes without flow control


class Silence(LabError):
    """The other side did not answer in time."""


@dataclass(frozen=True)
class Result:
    """What a command in the machine did; its output is stdout and stderr, as they came."""

    code: int
    output: str


class Lines:
    """A unix socket read line by line, each read bounded in time."""

    def __init__(self, path: Path, timeout: float = 10) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.rest = b""
        deadline = time.monotonic() + timeout
        while True:
            try:
                self.socket.connect(str(path))
                return
            except (FileNotFoundError, ConnectionRefusedError) as error:
                if time.monotonic() > deadline:
                    self.socket.close()
                    raise Silence(f"nobody listens at {path}") from error
                time.sleep(0.1)

    def send(self, line: str) -> None:
        self.socket.sendall(line.encode() + b"\n")

    def line(self, deadline: float) -> str:
        """The next line; `Silence` after the deadline or when the other side has gone."""
        while b"\n" not in self.rest:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Silence("no answer in time")
            self.socket.settimeout(left)
            try:
                data = self.socket.recv(65536)
            except TimeoutError:
                continue
            if not data:
                raise Silence("the machine is off")
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        return line.decode(errors="replace").strip("\r")

    def close(self) -> None:
        self.socket.close()


class Shell:
    """The service `lab-shell` of the machine, at the other end of a serial port."""

    def __init__(self, path: Path, timeout: float = 10) -> None:
        self.lines = Lines(path, timeout)
        self.numbers = itertools.count(int(time.time() * 1000))

    def hello(self, timeout: float, other_than: str = "") -> str:
        """Wait until a boot's shell says that it is there; the id of that boot.

        Nothing is sent: until the kernel runs, this port is a keyboard of the firmware and GRUB.
        """
        deadline = time.monotonic() + timeout
        while True:
            # A line may have been cut by the reboot; what comes last is whole.
            found = re.search(r"ready (\S{36})$", self.lines.line(deadline))
            if found and found[1] != other_than:
                return found[1]

    def attach(self, timeout: float = 10) -> str:
        """Greet the shell of a machine that is known to run; the id of its boot."""
        self.lines.send("hello")
        return self.hello(timeout)

    def send(self, command: str) -> str:
        """Start a command; its number is what `answer` needs."""
        number = str(next(self.numbers))
        text = base64.b64encode(command.encode()).decode()
        if len(text) > LONGEST * 4 // 3 + 4:
            raise ValueError("the command is too long for the serial port; put a script there")
        self.lines.send(f"run {number} {text}")
        return number

    def answer(self, number: str, timeout: float) -> Result:
        """Wait for the end of a command."""
        deadline = time.monotonic() + timeout
        while not self.lines.line(deadline).endswith(f"begin {number}"):
            pass
        text = []
        while not (line := self.lines.line(deadline)).startswith("end "):
            text.append(line)
        output = base64.b64decode("".join(text)).decode(errors="replace")
        return Result(int(line.split()[2]), output)

    def close(self) -> None:
        self.lines.close()


class Qmp:
    """QEMU's monitor."""

    def __init__(self, path: Path) -> None:
        self.lines = Lines(path)
        self.lines.line(time.monotonic() + 10)
        self.execute("qmp_capabilities")

    def execute(self, command: str, timeout: float = 30, **arguments: Any) -> Any:
        """Run a command of QEMU's; its return value, or `RuntimeError` with its reason."""
        self.lines.send(json.dumps({"execute": command, "arguments": arguments}))
        deadline = time.monotonic() + timeout
        while True:
            answer = json.loads(self.lines.line(deadline))
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")

    def close(self) -> None:
        self.lines.close()
