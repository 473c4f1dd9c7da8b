"""Two faults of QEMU 11.1 that VMs in the machine meet; both lie in its emulation of AMD's SVM.

helper_write_crN calls cpu_interrupt without QEMU's big lock when a VM writes CR8 while a virtual
interrupt waits, and cpu_interrupt insists on the lock ("assertion failed: (bql_locked())"): QEMU
ends. OVMF writes CR8 at the end of every interrupt. helper_vmrun sets the same flag for the same
CPU without the lock; so the jump is led to cpu_set_interrupt, which does just that.

helper_vmrun notes an interrupt that the hypervisor injects as an exception of the CPU, delivers it
itself, and leaves the note. Whatever makes that CPU look up before the VM's next exit, like a TLB
flush for another CPU, then delivers it once more: as an exception, which no interrupt flag holds
back, so a VM's kernel waits for ever for a lock that it holds itself. The note is not written.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

LOAD, DYNSYM = 1, 11
CALL, JUMP = 0xE8, 0xE9
# mov %esi into a field before that of a register; no operation of the same length.
NOTE, NOTHING = re.compile(rb"\x89[\xb0-\xb7]..\xff\xff", re.DOTALL), b"\x66\x0f\x1f\x44\x00\x00"
BEFORE_CALL = 64  # bytes in which the note is written


def fix(program: Path) -> bool:
    """Correct what there is of them; whether that was both."""
    image = bytearray(program.read_bytes())
    corrected = [_correct_jump(image), _leave_out_note(image)]
    program.write_bytes(image)
    return all(corrected)


def _correct_jump(image: bytearray) -> bool:
    symbols = _symbols(image)
    found = _transfers(image, JUMP, "helper_write_crN", "cpu_interrupt")
    if len(found) != 1 or "cpu_set_interrupt" not in symbols:
        return False
    distance = symbols["cpu_set_interrupt"] - symbols["cpu_interrupt"]
    before = struct.unpack_from("<i", image, found[0] + 1)[0]
    struct.pack_into("<i", image, found[0] + 1, before + distance)
    return True


def _leave_out_note(image: bytearray) -> bool:
    calls = _transfers(image, CALL, "helper_vmrun", "do_interrupt_x86_hardirq")
    if len(calls) != 1:
        return False
    found = list(NOTE.finditer(image, calls[0] - BEFORE_CALL, calls[0]))
    if len(found) != 1:
        return False
    image[found[0].start() : found[0].end()] = NOTHING
    return True


def _transfers(image: bytearray, code: int, function: str, target: str) -> list[int]:
    """Where in the file a function jumps to another, or calls it."""
    symbols = _symbols(image)
    if not {function, target} <= symbols.keys():
        return []
    start = symbols[function]
    end = min(address for address in symbols.values() if address > start)
    offset = _file_offset(image, start)
    return [
        place
        for place in range(offset, offset + end - start)
        if image[place] == code
        and struct.unpack_from("<i", image, place + 1)[0]
        == symbols[target] - (start + place - offset + 5)
    ]


def _symbols(image: bytearray) -> dict[str, int]:
    """Addresses of the exported functions."""
    start, size, count = (
        struct.unpack_from("<Q", image, 0x28)[0],
        *struct.unpack_from("<HH", image, 0x3A),
    )
    sections = [struct.unpack_from("<IIQQQQIIQQ", image, start + n * size) for n in range(count)]
    table = next(section for section in sections if section[1] == DYNSYM)
    names = sections[table[6]][4]
    symbols = {}
    for place in range(table[4], table[4] + table[5], 24):
        name, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", image, place)
        end = image.index(b"\0", names + name)
        symbols[image[names + name : end].decode()] = value
    return symbols


def _file_offset(image: bytearray, address: int) -> int:
    start = struct.unpack_from("<Q", image, 0x20)[0]
    size, count = struct.unpack_from("<HH", image, 0x36)
    for number in range(count):
        kind, _, offset, at, _, length = struct.unpack_from("<IIQQQQ", image, start + number * size)
        if kind == LOAD and at <= address < at + length:
            return int(offset + address - at)
    raise ValueError(f"{address:#x} is not in the file")
