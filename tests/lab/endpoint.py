"""One emulated device as it runs: its registers, its resets, its faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lab.journal import WRITE, Journal
from lab.models import LinkClosing, Model
from lab.pci import SIZE, ConfigSpace, Link

# Regions and interrupts are numbered as in VFIO.
CONFIG = 7
REGIONS = 9
INTX, MSI = 0, 1
INTERRUPTS = 5

PAGE = 4096


class Memory:
    """Memory of a BAR: what was never written reads as 0 and takes no space."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pages: dict[int, bytearray] = {}

    def clear(self) -> None:
        self._pages.clear()

    def read(self, offset: int, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            page, within = divmod(offset + len(data), PAGE)
            length = min(PAGE - within, size - len(data))
            data += self._pages.get(page, bytes(PAGE))[within : within + length]
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            page, within = divmod(offset + done, PAGE)
            part = data[done : done + PAGE - within]
            if any(part) or page in self._pages:
                self._pages.setdefault(page, bytearray(PAGE))[within : within + len(part)] = part
            done += len(part)

    def word(self, offset: int) -> int:
        return int.from_bytes(self.read(offset, 4), "little")

    def set_word(self, offset: int, value: int) -> None:
        self.write(offset, value.to_bytes(4, "little"))


class Registers(Memory):
    """BAR0: plain words, but for the register whose bits close NVLinks and stay."""

    def __init__(self, size: int, initial: Mapping[int, int], closing: LinkClosing | None) -> None:
        super().__init__(size)
        self.initial = initial
        self.closing = closing
        self.clear()

    def clear(self) -> None:
        super().clear()
        for offset, value in self.initial.items():
            self.set_word(offset, value)

    def write(self, offset: int, data: bytes) -> None:
        closing = self.closing
        if not closing or offset >= closing.register + 4 or offset + len(data) <= closing.register:
            super().write(offset, data)
            return
        before = self.word(closing.register)
        super().write(offset, data)
        written = self.word(closing.register) | before & closing.mask
        kept = written if self._prepared(closing) else before
        super().write(closing.register, kept.to_bytes(4, "little"))

    @property
    def closed_links(self) -> tuple[int, ...]:
        if not self.closing:
            return ()
        word = self.word(self.closing.register) >> self.closing.first_bit
        return tuple(link for link in range(self.closing.links) if word >> link & 1)

    def _prepared(self, closing: LinkClosing) -> bool:
        return all(self.word(offset) == value for offset, value in closing.prepare.items()) and all(
            self.word(offset) & bits == bits for offset, bits in closing.prepare_bits.items()
        )


@dataclass(frozen=True)
class Faults:
    """What is wrong with a device; no reset mends it, clearing the fault does."""

    gone: bool = False  # off the bus: everything reads as ones, writes are lost
    config: bool = False  # the same, of the configuration space alone
    link: Link | None = None  # what the link trained to
    errors: tuple[int, int] | None = None  # AER: uncorrectable and correctable status bits
    registers: tuple[tuple[int, int], ...] = ()  # words of BAR0 that read so, whatever was written

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, value in vars(self).items() if value)


class Endpoint:
    """A device between its bus and its journal."""

    regions = REGIONS
    interrupt_kinds = INTERRUPTS

    def __init__(self, name: str, model: Model, serial: int, journal: Journal) -> None:
        self.name = name
        self.model = model
        self.serial = serial
        self.journal = journal
        self.connected = False
        self.resets = 0  # since it got power
        self.faults = Faults()
        self.config = ConfigSpace(model.identity, model.bars, model.link, serial, model.flr)
        self.registers = Registers(model.bars[0].size, model.registers, model.closing)
        self.memory: dict[int, Memory] = {bar.index: Memory(bar.size) for bar in model.bars}
        self.memory[0] = self.registers

    # What a client of vfio-user sees --------------------------------------------------------------

    def connect(self) -> None:
        """A machine was switched on: nothing is left of what another one did to the device."""
        self.connected = True
        self.resets = 0
        self._clear()
        self.config.power_on()
        self._break()
        self.journal.add(self.name, "connect")

    def disconnect(self) -> None:
        self.connected = False
        self.journal.add(self.name, "disconnect")

    def reset(self, how: str = "bus") -> None:
        """A reset of the bus, of the whole machine, or ("flr") of the function."""
        self.resets += 1
        self.journal.add(self.name, "reset", how=how, opened=self.registers.closed_links)
        self._clear()
        self.config.reset()
        self._break()

    def region_size(self, region: int) -> int:
        if region == CONFIG:
            return SIZE
        return self.memory[region].size if region in self.memory else 0

    def interrupts(self, index: int) -> int:
        return 1 if index in (INTX, MSI) else 0

    def read(self, region: int, offset: int, size: int) -> bytes:
        if self._deaf(region):
            return b"\xff" * size
        if region == CONFIG:
            return self.config.read(offset, size)
        data = bytearray(self.memory[region].read(offset, size))
        if region == 0:
            for place, value in self.faults.registers:
                for index, byte in enumerate(value.to_bytes(4, "little"), place - offset):
                    if 0 <= index < size:
                        data[index] = byte
        return bytes(data)

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write a region; what goes to registers is in the journal, what goes to memory is not."""
        lost = self._deaf(region)
        if region in (0, CONFIG):
            name = "config" if region == CONFIG else "bar0"
            value = int.from_bytes(data, "little")
            details = {"offset": offset, "size": len(data), "value": value, "lost": lost}
            self.journal.add(self.name, WRITE, region=name, **details)
        if lost:
            return
        if region != CONFIG:
            self.memory[region].write(offset, data)
        elif self.config.write(offset, data):
            self.reset("flr")

    # What the tests do to it ----------------------------------------------------------------------

    def set_faults(self, faults: Faults) -> None:
        """Replace what is wrong with the device, at once."""
        if self.faults.errors and not faults.errors:
            self.config.forget_errors()
        self.faults = faults
        self._break()
        self.journal.add(self.name, "faults", faults=faults.names)

    def _deaf(self, region: int) -> bool:
        return self.faults.gone or (self.faults.config and region == CONFIG)

    def _clear(self) -> None:
        for memory in self.memory.values():
            memory.clear()

    def _break(self) -> None:
        self.config.set_link(self.faults.link or self.model.link)
        if self.faults.errors:
            self.config.log_errors(*self.faults.errors)
