"""The configuration space of an emulated PCI Express endpoint, its capabilities and its BARs."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

SIZE = 4096  # with the extended part
COMMAND = 0x04
CAPABILITIES = 0x34

# Where each capability sits; the chain goes in this order.
POWER = 0x60
MSI = 0x68
EXPRESS = 0x78
ERRORS = 0x100
SERIAL = 0x150

DEVICE_CONTROL = EXPRESS + 0x08
DEVICE_STATUS = EXPRESS + 0x0A
LINK_STATUS = EXPRESS + 0x12
UNCORRECTABLE = ERRORS + 0x04
CORRECTABLE = ERRORS + 0x10

FUNCTION_RESET = 1 << 15  # in Device Control; reads as 0
MOST_LANES = 16
FASTEST = 5  # 32 GT/s


@dataclass(frozen=True)
class Identity:
    """What the header says the function is."""

    vendor: int
    device: int
    subsystem: int
    class_code: int
    revision: int = 0xA1


@dataclass(frozen=True)
class Bar:
    """A memory BAR; a 64-bit one takes its successor's place too."""

    index: int
    size: int
    wide: bool
    prefetchable: bool


@dataclass(frozen=True)
class Link:
    """Speed (1 is 2.5 GT/s, 5 is 32) and lanes of a PCI Express link."""

    speed: int
    lanes: int

    def __post_init__(self) -> None:
        if not 1 <= self.speed <= FASTEST:
            raise ValueError(f"no link has speed {self.speed}: 1 to {FASTEST}")
        if not 0 <= self.lanes <= MOST_LANES:
            raise ValueError(f"no link has {self.lanes} lanes: 0 to {MOST_LANES}")

    @property
    def word(self) -> int:
        """As the Link Status register has it."""
        return self.lanes << 4 | self.speed


class ConfigSpace:
    """4 KiB of registers: some bits are fixed, some writable, some cleared by writing a 1."""

    def __init__(
        self, identity: Identity, bars: Iterable[Bar], link: Link, serial: int, flr: bool
    ) -> None:
        self._bytes = bytearray(SIZE)
        self._writable = bytearray(SIZE)
        self._clearing = bytearray(SIZE)
        self._header(identity)
        for bar in bars:
            self._bar(bar)
        self._power()
        self._msi()
        self._express(link, flr)
        self._errors()
        self._put(SERIAL, "I", 0x0003 | 1 << 16)
        self._put(SERIAL + 4, "Q", serial)
        self._power_on = bytes(self._bytes)

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self._bytes[offset : offset + size])

    def write(self, offset: int, data: bytes) -> bool:
        """Write what may be written; say whether a function level reset was asked for."""
        for place, new in enumerate(data, offset):
            old, mask = self._bytes[place], self._writable[place]
            self._bytes[place] = (old & ~mask | new & mask) & ~(new & self._clearing[place])
        control = self._word(DEVICE_CONTROL)
        self._set_word(DEVICE_CONTROL, control & ~FUNCTION_RESET)
        return bool(control & FUNCTION_RESET)

    def power_on(self) -> None:
        self._bytes[:] = self._power_on

    def reset(self) -> None:
        """As at power-on, but what was logged of errors stays: those bits are sticky."""
        kept = {place: self.read(place, 4) for place in (UNCORRECTABLE, CORRECTABLE)}
        self.power_on()
        for place, data in kept.items():
            self._bytes[place : place + 4] = data

    def set_link(self, link: Link) -> None:
        """Let the link have trained to this; the slot's clock is common."""
        self._set_word(LINK_STATUS, link.word | 1 << 12)

    def log_errors(self, uncorrectable: int, correctable: int) -> None:
        """Set bits of Advanced Error Reporting, and what Device Status says of them."""
        for place, bits in ((UNCORRECTABLE, uncorrectable), (CORRECTABLE, correctable)):
            logged = struct.unpack_from("<I", self._bytes, place)[0] | bits
            struct.pack_into("<I", self._bytes, place, logged)
        seen = bool(correctable) | bool(uncorrectable) << 2  # all uncorrectable ones are fatal
        self._set_word(DEVICE_STATUS, self._word(DEVICE_STATUS) | seen)

    def forget_errors(self) -> None:
        for place in (UNCORRECTABLE, CORRECTABLE):
            struct.pack_into("<I", self._bytes, place, 0)
        self._set_word(DEVICE_STATUS, 0)

    def _word(self, offset: int) -> int:
        return int.from_bytes(self._bytes[offset : offset + 2], "little")

    def _set_word(self, offset: int, value: int) -> None:
        self._bytes[offset : offset + 2] = value.to_bytes(2, "little")

    # Layout --------------------------------------------------------------------------------------

    def _put(
        self, offset: int, form: str, value: int, writable: int = 0, clearing: int = 0
    ) -> None:
        struct.pack_into(f"<{form}", self._bytes, offset, value)
        struct.pack_into(f"<{form}", self._writable, offset, writable)
        struct.pack_into(f"<{form}", self._clearing, offset, clearing)

    def _header(self, identity: Identity) -> None:
        self._put(0x00, "H", identity.vendor)
        self._put(0x02, "H", identity.device)
        # I/O and memory decoding, bus master, parity, SERR, INTx off
        self._put(COMMAND, "H", 0, writable=0x0547)
        self._put(0x06, "H", 0x0010, clearing=0xF900)
        self._put(0x08, "I", identity.class_code << 8 | identity.revision)
        self._put(0x0C, "B", 0, writable=0xFF)  # cache line size: kept, of no effect
        self._put(0x2C, "H", identity.vendor)
        self._put(0x2E, "H", identity.subsystem)
        self._put(CAPABILITIES, "B", POWER)
        self._put(0x3C, "B", 0, writable=0xFF)
        self._put(0x3D, "B", 1)  # INTA

    def _bar(self, bar: Bar) -> None:
        kind = 0x4 * bar.wide | 0x8 * bar.prefetchable
        addresses = -bar.size
        place = 0x10 + 4 * bar.index
        if bar.wide:
            self._put(place, "Q", kind, writable=addresses & (1 << 64) - 1)
        else:
            self._put(place, "I", kind, writable=addresses & (1 << 32) - 1)

    def _power(self) -> None:
        self._put(POWER, "H", 0x01 | MSI << 8)
        self._put(POWER + 2, "H", 0x0003)
        # No_Soft_Reset: else the kernel would offer a reset by way of D3hot, which a V100 lacks.
        self._put(POWER + 4, "H", 0x0008, writable=0x0003)

    def _msi(self) -> None:
        self._put(MSI, "H", 0x05 | EXPRESS << 8)
        self._put(MSI + 0x02, "H", 0x0080, writable=0x0071)  # one message, 64-bit addresses
        self._put(MSI + 0x04, "I", 0, writable=0xFFFFFFFC)
        self._put(MSI + 0x08, "I", 0, writable=0xFFFFFFFF)
        self._put(MSI + 0x0C, "H", 0, writable=0xFFFF)

    def _express(self, link: Link, flr: bool) -> None:
        self._put(EXPRESS, "H", 0x10)  # the last one of the chain
        self._put(EXPRESS + 0x02, "H", 0x0002)  # an endpoint, version 2
        self._put(EXPRESS + 0x04, "I", flr << 28 | 0x8001)  # role based errors, payload 256
        control = 0x7FFF | (FUNCTION_RESET if flr else 0)
        self._put(DEVICE_CONTROL, "H", 0x2910, writable=control)
        self._put(DEVICE_STATUS, "H", 0, clearing=0x000F)
        self._put(EXPRESS + 0x0C, "I", link.word)
        self._put(EXPRESS + 0x10, "H", 0, writable=0x01CB)
        self.set_link(link)
        self._put(EXPRESS + 0x28, "H", 0, writable=0x001F)
        self._put(EXPRESS + 0x2C, "I", (1 << link.speed) - 1 << 1)
        self._put(EXPRESS + 0x30, "H", link.speed, writable=0x000F)

    def _errors(self) -> None:
        self._put(ERRORS, "I", 0x0001 | 2 << 16 | SERIAL << 20)
        self._put(UNCORRECTABLE, "I", 0, clearing=0xFFFFFFFF)
        self._put(ERRORS + 0x08, "I", 0, writable=0xFFFFFFFF)
        self._put(ERRORS + 0x0C, "I", 0x00462030, writable=0xFFFFFFFF)  # PCIe's default severities
        self._put(CORRECTABLE, "I", 0, clearing=0xFFFFFFFF)
        self._put(ERRORS + 0x14, "I", 0x00002000, writable=0xFFFFFFFF)
        self._put(ERRORS + 0x18, "I", 0, writable=0x0140)
