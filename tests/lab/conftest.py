"""A small emulated machine's devices, served by a thread of the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import control, shape, vfio_client
from lab.devices import CONTROL, serve
from lab.serving import Server

POLL = 0.02  # seconds until the server sees that the test is over


class Lab:
    """Clients of the served devices."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.control = control.Client(directory / CONTROL)
        self._clients: list[vfio_client.Client] = []

    def client(self, device: str, greet: bool = True) -> vfio_client.Client:
        client = vfio_client.Client(self.directory / f"{device}.sock", greet)
        self._clients.append(client)
        return client

    def what(self, device: str) -> list[str]:
        """What happened to a device, without the writes."""
        entries = self.control.journal(device=device)
        return [entry["what"] for entry in entries if entry["what"] != "write"]

    def close(self) -> None:
        for client in self._clients:
            client.close()
        with self.control:
            pass


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    server, over = Server(), threading.Event()
    serve(server, shape.named("dgx2-small"), tmp_path)

    def run() -> None:
        while not over.is_set():
            server.step(POLL)

    thread = threading.Thread(target=run)
    thread.start()
    clients = Lab(tmp_path)
    yield clients
    clients.close()
    over.set()
    thread.join()
    server.close()
    assert not list(tmp_path.iterdir())
