"""Serve the emulated devices of a machine: `PYTHONPATH=tests python3 -m lab.devices --help`.

One process for all: a socket DIR/<device>.sock for QEMU's vfio-user-pci each, and DIR/control.sock
(see control.py). "ready" on standard output says that all of them listen.
"""

from __future__ import annotations

import argparse
import hashlib
import signal
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import FrameType

from lab import shape
from lab.control import Control, Conversation
from lab.endpoint import Endpoint
from lab.journal import Journal
from lab.models import MODELS
from lab.serving import Server
from lab.shape import Shape
from lab.vfio_user import Session

CONTROL = "control.sock"
CONTROL_CLIENTS = 16
LONGEST_PATH = 107  # of a Unix socket
OUI = 0x00044B  # NVIDIA's


def main() -> None:
    parser = argparse.ArgumentParser(prog="lab.devices", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", required=True, metavar="FILE", type=Path)
    parser.add_argument("--directory", required=True, metavar="DIR", type=Path)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    server = Server()
    try:
        serve(server, shape.load(arguments.shape), arguments.directory)
        print("ready", flush=True)
        server.run()
    except KeyboardInterrupt:
        pass
    finally:
        server.close()


def serve(server: Server, machine: Shape, directory: Path) -> Mapping[str, Endpoint]:
    """Let `server` listen for all devices of `machine`, and for control."""
    directory.mkdir(parents=True, exist_ok=True)
    journal = Journal()
    endpoints = {
        device.name: Endpoint(
            device.name, MODELS[device.model], serial(machine.name, device.name), journal
        )
        for device in machine.served
    }
    for name, endpoint in endpoints.items():
        server.listen(_socket(directory, f"{name}.sock"), partial(Session, endpoint), most=1)
    control = Control(endpoints, journal)
    server.listen(_socket(directory, CONTROL), partial(Conversation, control), most=CONTROL_CLIENTS)
    return endpoints


def serial(machine: str, device: str) -> int:
    """Return a serial number that is the same at each start: an EUI-64, as PCIe has them."""
    digest = hashlib.sha256(f"{machine}/{device}".encode()).digest()
    return OUI << 40 | int.from_bytes(digest[:5], "big")


def _socket(directory: Path, name: str) -> Path:
    path = directory / name
    if len(str(path).encode()) > LONGEST_PATH:
        raise ValueError(f"{path}: longer than the path of a socket may be")
    return path


def _stop(_: int, __: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    main()
