"""The server's side of the vfio-user protocol, as bytes in and bytes out.

Protocol: docs/interop/vfio-user.rst of QEMU. Offered is what a register model needs: no memory of
the server's is mapped by the client, no DMA, no interrupts are raised.
"""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

from lab.serving import HangUp

HEADER = struct.Struct("<HHIII")  # id, command, size, flags, error
VERSION = struct.Struct("<HH")
DEVICE_INFO = struct.Struct("<IIII")
REGION_INFO = struct.Struct("<IIIIQQ")
IRQ_INFO = struct.Struct("<IIII")
ACCESS = struct.Struct("<QII")
UNMAP = struct.Struct("<IIQQ")

TYPE = 0x0F
REQUEST, REPLY = 0, 1
NO_REPLY, ERROR = 0x10, 0x20

RESETTABLE, PCI = 1, 2
READABLE, WRITABLE = 1, 2
EVENTFD, MASKABLE, AUTOMASKED = 1, 2, 4
INTX = 0

MAJOR, MINOR = 0, 0
MOST_DATA = 1 << 16  # of a read or write
MOST = HEADER.size + MOST_DATA + 1024
MOST_FDS = 8  # of a message; they are closed unused
PAGE = 4096


class Command(IntEnum):
    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    GET_INFO = 4
    GET_REGION_INFO = 5
    GET_REGION_IO_FDS = 6
    GET_IRQ_INFO = 7
    SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    RESET = 13
    DIRTY_PAGES = 14


class Target(Protocol):
    """The device behind a session; regions and interrupts are numbered as in VFIO."""

    regions: int
    interrupt_kinds: int

    def connect(self) -> None: ...
    def disconnect(self) -> None: ...
    def reset(self) -> None: ...
    def region_size(self, region: int) -> int: ...
    def interrupts(self, index: int) -> int: ...
    def read(self, region: int, offset: int, size: int) -> bytes: ...
    def write(self, region: int, offset: int, data: bytes) -> None: ...


class ProtocolError(HangUp):
    """The other side does not speak the protocol; nothing it sends can be trusted any more."""


class Refused(Exception):
    """A request that gets an error for its answer."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Session:
    """One client of one device, from its first byte to its last."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.greeted = False
        self._received = bytearray()
        self._answers: dict[int, Callable[[bytes], bytes]] = {
            Command.DMA_MAP: lambda _: b"",
            Command.DMA_UNMAP: self._unmap,
            Command.GET_INFO: self._info,
            Command.GET_REGION_INFO: self._region_info,
            Command.GET_IRQ_INFO: self._irq_info,
            Command.SET_IRQS: lambda _: b"",
            Command.REGION_READ: self._read,
            Command.REGION_WRITE: self._write,
            Command.RESET: self._reset,
        }
        target.connect()

    def receive(self, data: bytes) -> bytes:
        """Take what arrived; return what to send back."""
        self._received += data
        replies = bytearray()
        while len(self._received) >= HEADER.size:
            size = HEADER.unpack_from(self._received)[2]
            if not HEADER.size <= size <= MOST:
                raise ProtocolError(f"a message of {size} bytes")
            if len(self._received) < size:
                break
            message = bytes(self._received[:size])
            del self._received[:size]
            replies += self._answer(message)
        return bytes(replies)

    def close(self) -> None:
        self.target.disconnect()

    def _answer(self, message: bytes) -> bytes:
        number, command, _, flags, _ = HEADER.unpack_from(message)
        if flags & TYPE != REQUEST:
            raise ProtocolError("a reply to nothing")
        if (command == Command.VERSION) == self.greeted:
            raise ProtocolError("versions are agreed on first, and once")
        body, code = b"", 0
        try:
            body = self._handle(command, message[HEADER.size :])
        except Refused as refused:
            code = refused.code
        except struct.error:
            code = errno.EINVAL  # the body is too short
        if flags & NO_REPLY:
            return b""
        kind = REPLY | (ERROR if code else 0)
        return HEADER.pack(number, command, HEADER.size + len(body), kind, code) + body

    def _handle(self, command: int, body: bytes) -> bytes:
        if command == Command.VERSION:
            return self._version(body)
        if command not in self._answers:
            raise Refused(errno.ENOTSUP)
        return self._answers[command](body)

    def _version(self, body: bytes) -> bytes:
        major, _ = VERSION.unpack_from(body)
        if major != MAJOR:
            raise Refused(errno.EINVAL)
        self.greeted = True
        offers = {
            "max_msg_fds": MOST_FDS,
            "max_data_xfer_size": MOST_DATA,
            "pgsizes": PAGE,
        }
        text = json.dumps({"capabilities": offers}).encode()
        return VERSION.pack(MAJOR, MINOR) + text + b"\0"

    def _unmap(self, body: bytes) -> bytes:
        return UNMAP.pack(*UNMAP.unpack_from(body))

    def _info(self, body: bytes) -> bytes:
        flags = RESETTABLE | PCI
        target = self.target
        return DEVICE_INFO.pack(DEVICE_INFO.size, flags, target.regions, target.interrupt_kinds)

    def _region_info(self, body: bytes) -> bytes:
        region = REGION_INFO.unpack_from(body)[2]
        if region >= self.target.regions:
            raise Refused(errno.EINVAL)
        size = self.target.region_size(region)
        flags = READABLE | WRITABLE if size else 0
        return REGION_INFO.pack(REGION_INFO.size, flags, region, 0, size, 0)

    def _irq_info(self, body: bytes) -> bytes:
        index = IRQ_INFO.unpack_from(body)[2]
        if index >= self.target.interrupt_kinds:
            raise Refused(errno.EINVAL)
        flags = EVENTFD | (MASKABLE | AUTOMASKED if index == INTX else 0)
        return IRQ_INFO.pack(IRQ_INFO.size, flags, index, self.target.interrupts(index))

    def _read(self, body: bytes) -> bytes:
        offset, region, size = self._access(body)
        return ACCESS.pack(offset, region, size) + self.target.read(region, offset, size)

    def _write(self, body: bytes) -> bytes:
        offset, region, size = self._access(body)
        data = body[ACCESS.size :]
        if len(data) != size:
            raise Refused(errno.EINVAL)
        self.target.write(region, offset, data)
        return ACCESS.pack(offset, region, size)

    def _access(self, body: bytes) -> tuple[int, int, int]:
        offset, region, size = ACCESS.unpack_from(body)
        if size > MOST_DATA or offset + size > self.target.region_size(region):
            raise Refused(errno.EINVAL)
        return offset, region, size

    def _reset(self, body: bytes) -> bytes:
        self.target.reset()
        return b""
