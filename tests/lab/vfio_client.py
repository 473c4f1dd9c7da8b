"""A client of the vfio-user protocol, to test the server without QEMU."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

from lab import vfio_user
from lab.vfio_user import ACCESS, HEADER, NO_REPLY, Command

PATIENCE = 10.0


class Failed(Exception):
    """The server answered with an error; `args[0]` is its number."""


class Client:
    """A connection to one device; versions are agreed on at once, unless `greet` is false."""

    def __init__(self, path: Path, greet: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))
        self._number = 0
        if greet:
            self.version = self.ask(Command.VERSION, struct.pack("<HH", 0, 0) + b"{}\0")

    def close(self) -> None:
        self.socket.close()

    def ask(self, command: int, body: bytes = b"", files: tuple[int, ...] = ()) -> bytes:
        """Send a request and return the body of its answer."""
        self.send(command, body, files=files)
        number, _, size, flags, code = HEADER.unpack(self._take(HEADER.size))
        answer = self._take(size - HEADER.size)
        assert (number, flags & vfio_user.TYPE) == (self._number, vfio_user.REPLY)
        if flags & vfio_user.ERROR:
            raise Failed(code)
        return answer

    def send(
        self, command: int, body: bytes = b"", flags: int = 0, files: tuple[int, ...] = ()
    ) -> None:
        self._number += 1
        size = HEADER.size + len(body)
        message = HEADER.pack(self._number, command, size, flags, 0) + body
        socket.send_fds(self.socket, [message], files)

    def read(self, region: int, offset: int, size: int = 4) -> int:
        answer = self.ask(Command.REGION_READ, ACCESS.pack(offset, region, size))
        return int.from_bytes(answer[ACCESS.size :], "little")

    def write(self, region: int, offset: int, value: int, size: int = 4) -> None:
        self.ask(Command.REGION_WRITE, self._written(region, offset, value, size))

    def post(self, region: int, offset: int, value: int, size: int = 4) -> None:
        """Write and want no answer."""
        self.send(Command.REGION_WRITE, self._written(region, offset, value, size), NO_REPLY)

    def reset(self) -> None:
        self.ask(Command.RESET)

    @property
    def hung_up(self) -> bool:
        """Whether the server closed the connection; waits for what it says."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def _written(self, region: int, offset: int, value: int, size: int) -> bytes:
        return ACCESS.pack(offset, region, size) + value.to_bytes(size, "little")

    def _take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                raise ConnectionError(os.strerror(104))
            data += part
        return data
