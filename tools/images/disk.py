"""A disk of a tree: GPT with a BIOS boot partition, an ESP and an ext4 root; then qcow2.

Nothing is mounted and no loop device is used: all programs write at an offset of one file.
"""

from __future__ import annotations

import struct
from pathlib import Path

from tools.images.programs import BuildError, call
from tools.images.tree import Identity

MIB = 1 << 20
SECTOR = 512
CORE_START_MIB, ESP_START_MIB, ROOT_START_MIB = 1, 2, 128
ESP_MIB = ROOT_START_MIB - ESP_START_MIB
_END_MIB = 1  # GPT keeps a copy of itself there

_BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
# Bookworm's tools, bullseye's GRUB and e2fsck do not know these.
_FEATURES = "^metadata_csum_seed,^orphan_file"


def make_disk(root: Path, identity: Identity, folder: Path, log: Path) -> Path:
    """Leave `folder`/disk.raw; the files of the ESP leave the tree."""
    disk = folder / "disk.raw"
    root_mib = _size_mib(root, log)
    with disk.open("wb") as file:
        file.truncate((ROOT_START_MIB + root_mib + _END_MIB) * MIB)
    _partition(disk, root_mib, identity, folder, log)
    core = root / "boot/grub/i386-pc/core.img"
    embed_bios_grub(disk, root / "boot/grub/i386-pc/boot.img", core.read_bytes(), CORE_START_MIB)
    _make_esp(disk, root / "boot/efi", identity, log)
    environment = {"E2FSPROGS_FAKE_TIME": str(identity.epoch)}
    call(
        log, "mke2fs", "-q", "-t", "ext4", "-F", "-L", "root", "-U", identity.root_uuid,
        "-O", _FEATURES, "-M", "/",
        # Nothing is left to be written at the first boot, into the overlay of every VM.
        "-E", f"offset={ROOT_START_MIB * MIB},hash_seed={identity.root_uuid},"
        "lazy_itable_init=0,lazy_journal_init=0,nodiscard",
        "-d", root, disk, f"{root_mib}M", env=environment,
    )  # fmt: skip
    return disk


def make_qcow2(disk: Path, target: Path, log: Path) -> int:
    """Compress a disk; return its virtual size in bytes."""
    call(
        log, "qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd",
        disk, target,
    )  # fmt: skip
    return disk.stat().st_size


def _size_mib(root: Path, log: Path) -> int:
    """Room for the tree, a third more, and half a GiB; in whole quarters of a GiB."""
    used = int(call(log, "du", "-sm", root).split()[0])
    return -(-(used * 4 // 3 + 512) // 256) * 256


def _partition(disk: Path, root_mib: int, identity: Identity, folder: Path, log: Path) -> None:
    """Root is /dev/vda1 and lies last, so that it can grow; as in the distributions' images."""
    table = folder / "partitions"
    table.write_text(
        f"label: gpt\nlabel-id: {identity.root_uuid}\n"
        f"1: start={ROOT_START_MIB}MiB, size={root_mib}MiB, type=linux\n"
        f"14: start={CORE_START_MIB}MiB, size=1MiB, type={_BIOS_BOOT}\n"
        f"15: start={ESP_START_MIB}MiB, size={ESP_MIB}MiB, type=uefi\n"
    )
    call(log, "sh", "-c", 'sfdisk --quiet "$1" < "$2"', "sh", disk, table)


def _make_esp(disk: Path, files: Path, identity: Identity, log: Path) -> None:
    # Not mformat: GRUB takes what that writes for one more partition table.
    call(
        log, "mkfs.fat", "-F", "32", "-s", "1", "-n", "ESP", "-i", identity.esp_id.replace("-", ""),
        f"--offset={ESP_START_MIB * MIB // SECTOR}", disk, str(ESP_MIB * 1024),
    )  # fmt: skip
    call(log, "mcopy", "-s", "-i", f"{disk}@@{ESP_START_MIB}M", files / "EFI", "::/")
    call(log, "rm", "-r", files / "EFI")


def embed_bios_grub(disk: Path, boot_image: Path, core: bytes, start_mib: int) -> None:
    """Do what grub-bios-setup does, for which an image file is no disk.

    A BIOS runs the first sector, which reads GRUB's core from a partition of its own.
    """
    start = start_mib * MIB // SECTOR
    sectors = -(-len(core) // SECTOR)
    if sectors * SECTOR > MIB:
        raise BuildError(f"GRUB's core has {len(core)} bytes, more than its partition")
    first, rest = bytearray(boot_image.read_bytes()), bytearray(core.ljust(sectors * SECTOR, b"\0"))
    struct.pack_into("<QB", first, 0x5C, start, 0xFF)  # 0xff: from the drive that BIOS booted
    first[0x66:0x68] = b"\x90\x90"  # do not believe a BIOS that calls that drive a floppy
    # The core's first sector has to find the others, and puts them behind itself in memory.
    struct.pack_into("<QHH", rest, SECTOR - 12, start + 1, sectors - 1, 0x820)
    with disk.open("r+b") as file:
        file.seek(0x1B8)
        first[0x1B8:] = file.read(SECTOR - 0x1B8)  # the protective MBR that sfdisk wrote
        file.seek(0)
        file.write(first)
        file.seek(start * SECTOR)
        file.write(rest)
