"""Many Unix sockets served by one thread; what is said on them is somebody else's matter."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

CHUNK = 1 << 16
MOST_FDS = 32  # taken with one chunk, and closed; the kernel closes what are more


class Talk(Protocol):
    """A conversation with one client."""

    def receive(self, data: bytes) -> bytes: ...
    def close(self) -> None: ...


class HangUp(Exception):
    """Raised by a talk that has to end."""


class Channel:
    """A client's socket; while it does not take its answers, no more is read from it."""

    def __init__(self, sock: socket.socket, talk: Talk, listener: Listener) -> None:
        self.sock = sock
        self.talk = talk
        self.listener = listener
        self.unsent = bytearray()

    def ready(self) -> bool:
        """Go on where the socket allows; say whether the client is still there."""
        try:
            if not self.unsent and not self._receive():
                return False
            self._send()
        except BlockingIOError:
            return True
        except OSError:
            return False
        except HangUp as reason:
            print(f"{self.listener.path.name}: {reason}", file=sys.stderr, flush=True)
            return False
        return True

    def _receive(self) -> bool:
        data, files, _, _ = socket.recv_fds(self.sock, CHUNK, MOST_FDS)
        for file in files:
            os.close(file)
        if data:
            self.unsent += self.talk.receive(data)
        return bool(data)

    def _send(self) -> None:
        while self.unsent:
            del self.unsent[: self.sock.send(self.unsent)]


class Listener:
    """A socket that waits for clients, at most so many at a time."""

    def __init__(self, path: Path, begin: Callable[[], Talk], most: int) -> None:
        self.path = path
        self.begin = begin
        self.most = most
        self.clients = 0
        path.unlink(missing_ok=True)
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.bind(str(path))
        self.sock.listen()
        self.sock.setblocking(False)

    def close(self) -> None:
        self.sock.close()
        self.path.unlink(missing_ok=True)


class Server:
    """The loop around all sockets; `close` it when `run` ended."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()

    def listen(self, path: Path, begin: Callable[[], Talk], most: int) -> None:
        """Let `begin` start a talk with each client; clients beyond `most` are turned away."""
        listener = Listener(path, begin, most)
        self.selector.register(listener.sock, selectors.EVENT_READ, listener)

    def run(self) -> None:
        while True:
            self.step()

    def step(self, timeout: float | None = None) -> None:
        """Wait until something can be done, and do it."""
        ready = [key.data for key, _ in self.selector.select(timeout)]
        # First who left, then who comes: a machine may be switched on right after another.
        for channel in (data for data in ready if isinstance(data, Channel)):
            self._go_on(channel)
        for listener in (data for data in ready if isinstance(data, Listener)):
            self._accept(listener)

    def close(self) -> None:
        for key in list(self.selector.get_map().values()):
            if isinstance(key.data, Channel):
                self._end(key.data)
            else:
                key.data.close()
        self.selector.close()

    def _accept(self, listener: Listener) -> None:
        with contextlib.suppress(OSError):  # a client that left again
            sock, _ = listener.sock.accept()
            if listener.clients == listener.most:
                self._see_who_left(listener)
            if listener.clients == listener.most:
                sock.close()
                return
            sock.setblocking(False)
            listener.clients += 1
            channel = Channel(sock, listener.begin(), listener)
            self.selector.register(sock, selectors.EVENT_READ, channel)

    def _see_who_left(self, listener: Listener) -> None:
        for _ in range(2):  # first what a client left behind, then that it left
            for key in list(self.selector.get_map().values()):
                if isinstance(key.data, Channel) and key.data.listener is listener:
                    self._go_on(key.data)

    def _go_on(self, channel: Channel) -> None:
        if channel.ready():
            wanted = selectors.EVENT_WRITE if channel.unsent else selectors.EVENT_READ
            self.selector.modify(channel.sock, wanted, channel)
        else:
            self._end(channel)

    def _end(self, channel: Channel) -> None:
        self.selector.unregister(channel.sock)
        channel.sock.close()
        channel.listener.clients -= 1
        channel.talk.close()
