"""QEMU with vfio-user, and what makes disk images, whatever release this machine runs.

The packages are unpacked, not installed. Their programs are started by their own dynamic loader,
so neither root nor a chroot is needed.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import qemufix
from lab.cache import made, say
from lab.packages import LabError, bootstrap

SUITE = "trixie"  # its backports have QEMU >= 10.1, the first with vfio-user-pci
PACKAGES = (
    "qemu-system-x86", "qemu-utils", "ovmf", "seabios", "grub-efi-amd64-bin", "grub-pc-bin",
    "grub-common", "mtools", "dosfstools", "e2fsprogs", "libarchive13t64", "fdisk", "cpio",
)  # fmt: skip
ESP_ID = "4C4142AA"  # of an EFI system partition; overlay/etc/fstab names it
OPTIONS = ("--variant=extract", "--format=directory")


@dataclass(frozen=True)
class Tools:
    """The directory with the unpacked packages."""

    directory: Path

    def path(self, name: str) -> Path:
        """A file of the packages, by its path below /usr."""
        return self.directory / "usr" / name

    def command(self, program: str, *arguments: str) -> list[str]:
        """The command line of a program such as bin/qemu-img or sbin/mke2fs."""
        libraries = self.path("lib/x86_64-linux-gnu")
        return [
            str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries),
            str(self.path(program)), *arguments,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """The environment in which QEMU finds its modules and mke2fs its mke2fs.conf."""
        return {
            **os.environ,
            "LC_ALL": "C.UTF-8",
            "MKE2FS_CONFIG": str(self.directory / "etc/mke2fs.conf"),
            "QEMU_MODULE_DIR": str(self.path("lib/x86_64-linux-gnu/qemu")),
        }

    def run(self, program: str, *arguments: str, text: str = "", where: Path | None = None) -> None:
        """Run a program to its end; `text` is its standard input."""
        result = subprocess.run(
            self.command(program, *arguments), env=self.environment(), cwd=where, input=text,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if result.returncode:
            raise LabError(f"{program} {' '.join(arguments)}: {result.stdout}")

    def make_esp(
        self, scratch: Path, disk: Path, start_mib: int, size_mib: int, grub_cfg: str
    ) -> str:
        """Format an EFI system partition, with a GRUB that runs `grub_cfg`; its name for mtools."""
        loader, config = scratch / "bootx64.efi", scratch / "first.cfg"
        config.write_text(grub_cfg)
        self.run(
            "bin/grub-mkstandalone", "-O", "x86_64-efi", "-o", str(loader),
            "-d", str(self.path("lib/grub/x86_64-efi")), "--locales=", "--themes=", "--fonts=",
            "--modules=part_gpt ext2 fat",  # else GRUB sees no partitions
            "--install-modules=normal part_gpt ext2 fat search search_label search_fs_file linux"
            " echo serial terminal boot",
            f"boot/grub/grub.cfg={config}",
        )  # fmt: skip
        # Not mformat: GRUB takes what that writes for one more partition table.
        self.run(
            "sbin/mkfs.fat", "-F", "32", "-s", "1", "-i", ESP_ID,
            f"--offset={start_mib * 2048}", str(disk), str(size_mib * 1024),
        )  # fmt: skip
        esp = f"{disk}@@{start_mib}M"
        self.run("bin/mmd", "-i", esp, "::/EFI", "::/EFI/BOOT")
        self.run("bin/mcopy", "-i", esp, str(loader), "::/EFI/BOOT/BOOTX64.EFI")
        loader.unlink()
        config.unlink()
        return esp


def tools() -> Tools:
    """The tools, fetched if this is the first time."""
    return Tools(made("qemu", recipe(), _fetch) / "root")


def recipe() -> Sequence[object]:
    """All that decides what the tools are, but for the day's state of the archive."""
    return SUITE, PACKAGES, OPTIONS, Path(qemufix.__file__).read_text()


def _fetch(directory: Path) -> None:
    bootstrap(directory / "root", SUITE, PACKAGES, OPTIONS, backports=True)
    kit = Tools(directory / "root")
    # Not the list of all devices: QEMU would try modules of this machine's own QEMU for that.
    asked = subprocess.run(
        kit.command("bin/qemu-system-x86_64", "-device", "vfio-user-pci,help"),
        env=kit.environment(), capture_output=True, text=True,
    )  # fmt: skip
    if asked.returncode:
        raise LabError(
            f"{SUITE}-backports has no QEMU with vfio-user-pci (10.1 or later): {asked.stderr}"
        )
    if not qemufix.fix(directory / "root/usr/bin/qemu-system-x86_64"):
        say("QEMU has not both faults that lab/qemufix.py corrects: look whether it may go")
