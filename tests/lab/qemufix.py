"""A fault of QEMU 11.1 that ends it as soon as a VM in the machine boots by UEFI.

TCG's helper_write_crN calls cpu_interrupt without QEMU's big lock when a VM writes CR8 while a
virtual interrupt waits, and cpu_interrupt insists on the lock ("assertion failed: (bql_locked())").
OVMF writes CR8 at the end of every interrupt. helper_vmrun sets the same flag for the same CPU
without the lock; so the jump is led to cpu_set_interrupt, which does just that.
"""

from __future__ import annotations

import struct
from pathlib import Path

WHERE, WRONG, RIGHT = "helper_write_crN", "cpu_interrupt", "cpu_set_interrupt"
LOAD, DYNSYM = 1, 11
JUMP = 0xE9
NEAR = 0x400  # bytes: the length of the function, about


def fix(program: Path) -> bool:
    """Correct the one jump, if this QEMU has it."""
    image = bytearray(program.read_bytes())
    symbols = _symbols(image)
    if not {WHERE, WRONG, RIGHT} <= symbols.keys():
        return False
    offset = _file_offset(image, symbols[WHERE])
    found = []
    for place in range(offset, offset + NEAR):
        distance = symbols[WRONG] - (symbols[WHERE] + place - offset + 5)
        if image[place] == JUMP and struct.unpack_from("<i", image, place + 1)[0] == distance:
            found.append(place)
    if len(found) != 1:
        return False
    here = symbols[WHERE] + found[0] - offset
    struct.pack_into("<i", image, found[0] + 1, symbols[RIGHT] - (here + 5))
    program.write_bytes(image)
    return True


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
