"""A guest that does what it is told by a key: 512 bytes that SeaBIOS boots from a disk.

It says "ready" on the serial console, then waits: R resets the machine, T ends in a triple
fault, P powers off by ACPI.
"""

from __future__ import annotations

# In hexadecimal, as no assembler comes with the tests.
_BEGIN = "31c0 8ed8 8ed0 bc007c baf803"  # ds, ss = 0; stack below us; dx = 0x3f8, the UART
_SAY = "b0{:02x} ee"  # mov al, ...; out dx, al
_WAIT = "31c0 cd16"  # int 0x16 with ah = 0: al = the key
_UNLESS = "3c{:02x} 75{:02x}"  # cmp al, ...; jne over the rest
_STAY = "f4 ebfd"  # hlt, again and again
_DEEDS = {
    "r": f"baf90c b006 ee {_STAY}",  # the chipset's reset register: outb(0xcf9, 6)
    "p": f"ba0406 b80020 ef {_STAY}",  # ACPI's PM1 control, as SeaBIOS places it: S5
    "t": "0f011e007e cc",  # lidt with no entry, int3
}


def boot_disk() -> bytes:
    """A raw disk of 1 MiB."""
    code = _hex(_BEGIN) + b"".join(_hex(_SAY.format(letter)) for letter in b"ready\n")
    loop = len(code)
    code += _hex(_WAIT)
    for key, deed in _DEEDS.items():
        code += _hex(_UNLESS.format(ord(key), len(_hex(deed)))) + _hex(deed)
    code += bytes((0xEB, (loop - len(code) - 2) % 256))  # jmp to the wait
    assert len(code) <= 510
    return (code.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0")


def _hex(text: str) -> bytes:
    return bytes.fromhex(text)
