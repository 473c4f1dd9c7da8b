"""The image of the VMs: one file system in memory that reports what it sees, then obeys.

On its serial console it prints, each line after "lab-guest:", its CPUs, NUMA nodes and PCI devices,
then "ready". A power button (`virsh shutdown`) ends it. Lines typed there: report, reboot,
poweroff. Made from the host image's own kernel and busybox; boots by UEFI and by BIOS, from any
disk.
"""

from __future__ import annotations

import lzma
import shutil
import struct
import tarfile
from pathlib import Path, PurePosixPath

from lab.tools import Tools

KERNEL = "boot/vmlinuz-"
BUSYBOX = ("usr/bin/busybox", "bin/busybox")
MODULES = ("evdev", "button")  # what turns the power button into something to read
DISK_MIB, ESP_MIB = 64, 60
CORE_START_MIB, ESP_START_MIB = 1, 2

# A BIOS runs the first sector, which reads GRUB's core from a partition of its own.
CORE_TYPE = "21686148-6449-6E6F-744E-656564454649"
CORE_MODULES = ("biosdisk", "part_gpt", "fat", "search", "search_fs_file", "linux", "boot")
SECTOR = 512

GRUB_CFG = """\
search --no-floppy --file /lab-guest/vmlinuz --set root
linux /lab-guest/vmlinuz console=ttyS0 no_timer_check panic=5 quiet mitigations=off init_on_alloc=0
initrd /lab-guest/initrd
boot
"""

INIT = Path(__file__).with_name("guest-init")


def save_pieces(tree: Path, directory: Path) -> None:
    """Take from a host's root file system what the guest is made of."""
    directory.mkdir()
    with tarfile.open(tree) as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if member.isfile() and name.startswith(KERNEL):
                _save(archive, member, directory / "vmlinuz")
            elif member.isfile() and name in BUSYBOX:
                _save(archive, member, directory / "busybox")
            module = PurePosixPath(name).name.partition(".")
            if module[0] in MODULES and module[2] in ("ko", "ko.xz"):
                _save(archive, member, directory / f"{module[0]}.ko")


def _save(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    file = archive.extractfile(member)
    assert file
    data = file.read()
    target.write_bytes(lzma.decompress(data) if member.name.endswith(".xz") else data)


def make_guest(tools: Tools, directory: Path, pieces: Path) -> None:
    """Leave `guest.qcow2` in the directory."""
    root = directory / "root"
    for folder in ("bin", "lib"):
        (root / folder).mkdir(parents=True)
    shutil.copy(pieces / "busybox", root / "bin/busybox")
    (root / "bin/busybox").chmod(0o755)
    for module in pieces.glob("*.ko"):
        shutil.copy(module, root / "lib")
    shutil.copy(INIT, root / "init")
    (root / "init").chmod(0o755)
    names = [str(path.relative_to(root)) for path in sorted(root.rglob("*"))]
    initrd, raw = directory / "initrd", directory / "guest.raw"
    tools.run(
        "bin/cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0", "-F", str(initrd),
        text="\n".join(names), where=root,
    )  # fmt: skip
    with raw.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    table = (
        "label: gpt\n"
        f"start={CORE_START_MIB}MiB, size=1MiB, type={CORE_TYPE}\n"
        f"start={ESP_START_MIB}MiB, size={ESP_MIB}MiB, type=uefi\n"
    )
    tools.run("sbin/sfdisk", "--quiet", str(raw), text=table)
    _embed_grub(raw, tools.path("lib/grub/i386-pc/boot.img"), _grub_core(tools, directory))
    esp = tools.make_esp(directory, raw, ESP_START_MIB, ESP_MIB, GRUB_CFG)
    tools.run("bin/mmd", "-i", esp, "::/lab-guest")
    tools.run("bin/mcopy", "-i", esp, str(pieces / "vmlinuz"), str(initrd), "::/lab-guest")
    qcow2 = directory / "guest.qcow2"
    tools.run("bin/qemu-img", "convert", "-O", "qcow2", str(raw), str(qcow2))
    raw.unlink()
    initrd.unlink()
    shutil.rmtree(root)


def _grub_core(tools: Tools, scratch: Path) -> bytes:
    """GRUB for BIOS with all that it needs to run GRUB_CFG, in whole sectors."""
    core, config = scratch / "core.img", scratch / "core.cfg"
    config.write_text(GRUB_CFG)
    tools.run(
        "bin/grub-mkimage", "-O", "i386-pc", "-o", str(core), "-c", str(config), "-p", "/",
        "-d", str(tools.path("lib/grub/i386-pc")), *CORE_MODULES,
    )  # fmt: skip
    data = core.read_bytes()
    core.unlink()
    config.unlink()
    return data + bytes(-len(data) % SECTOR)


def _embed_grub(disk: Path, boot_image: Path, core: bytes) -> None:
    """Do what grub-bios-setup does, for which an image file is no disk."""
    start = CORE_START_MIB * 2048
    first, rest = bytearray(boot_image.read_bytes()), bytearray(core)
    struct.pack_into("<QB", first, 0x5C, start, 0xFF)  # 0xff: from the drive that BIOS booted
    first[0x66:0x68] = b"\x90\x90"  # do not believe a BIOS that calls that drive a floppy
    # The core's first sector has to find the others, and puts them behind itself in memory.
    struct.pack_into("<QHH", rest, SECTOR - 12, start + 1, len(core) // SECTOR - 1, 0x820)
    with disk.open("r+b") as file:
        file.seek(0x1B8)
        first[0x1B8:] = file.read(SECTOR - 0x1B8)  # the protective MBR that sfdisk wrote
        file.seek(0)
        file.write(first)
        file.seek(start * SECTOR)
        file.write(rest)
