"""The image of the VMs: one file system in memory that reports what it sees, then obeys.

On its serial console it prints, each line after "lab-guest:", its CPUs, NUMA nodes and PCI devices,
then "ready". A power button (`virsh shutdown`) ends it. Lines typed there: report, reboot,
poweroff. Made from the host image's own kernel and busybox; boots by UEFI and by BIOS, from any
disk.
"""

from __future__ import annotations

import lzma
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from lab.tools import Tools
from tools.images.disk import embed_bios_grub

KERNEL = "boot/vmlinuz-"
BUSYBOX = ("usr/bin/busybox", "bin/busybox")
MODULES = ("evdev", "button")  # what turns the power button into something to read
DISK_MIB, ESP_MIB = 64, 60
CORE_START_MIB, ESP_START_MIB = 1, 2

# GRUB's core has a partition of its own.
CORE_TYPE = "21686148-6449-6E6F-744E-656564454649"
CORE_MODULES = ("biosdisk", "part_gpt", "fat", "search", "search_fs_file", "linux", "boot")

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
    boot_image, core = tools.path("lib/grub/i386-pc/boot.img"), _grub_core(tools, directory)
    embed_bios_grub(raw, boot_image, core, CORE_START_MIB)
    esp = tools.make_esp(directory, raw, ESP_START_MIB, ESP_MIB, GRUB_CFG)
    tools.run("bin/mmd", "-i", esp, "::/lab-guest")
    tools.run("bin/mcopy", "-i", esp, str(pieces / "vmlinuz"), str(initrd), "::/lab-guest")
    qcow2 = directory / "guest.qcow2"
    tools.run("bin/qemu-img", "convert", "-O", "qcow2", str(raw), str(qcow2))
    raw.unlink()
    initrd.unlink()
    shutil.rmtree(root)


def _grub_core(tools: Tools, scratch: Path) -> bytes:
    """GRUB for BIOS with all that it needs to run GRUB_CFG."""
    core, config = scratch / "core.img", scratch / "core.cfg"
    config.write_text(GRUB_CFG)
    tools.run(
        "bin/grub-mkimage", "-O", "i386-pc", "-o", str(core), "-c", str(config), "-p", "/",
        "-d", str(tools.path("lib/grub/i386-pc")), *CORE_MODULES,
    )  # fmt: skip
    data = core.read_bytes()
    core.unlink()
    config.unlink()
    return data
