"""What a machine would do at its next boot, from grub.cfg and the initramfs images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from package.machine import KERNELS, Machine

WORD = "dgx_kvm.mode=kvm"
GRUB_CFG = "/boot/grub/grub.cfg"


@dataclass(frozen=True)
class Entry:
    """A kernel of the boot menu."""

    identity: str
    words: tuple[str, ...]

    @property
    def recovery(self) -> bool:
        return "-recovery-" in self.identity

    @property
    def kvm(self) -> bool:
        return WORD in self.words


def entries(machine: Machine) -> list[Entry]:
    found, identity = [], ""
    for line in machine.read(GRUB_CFG).splitlines():
        words = line.split()
        if words[:1] == ["menuentry"]:
            identity = words[words.index("$menuentry_id_option") + 1].strip("'")
        elif words[:1] in (["linux"], ["linuxefi"]):
            found.append(Entry(identity, tuple(words[1:])))
    return found


def mode(machine: Machine) -> str:
    """ "kvm" or "bare-metal" when the menu is wholly that; else what is wrong with it."""
    listed = entries(machine)
    normal = [entry for entry in listed if not entry.recovery]
    rescue = [entry for entry in listed if entry.recovery]
    if len(normal) != len(KERNELS) + 1 or len(rescue) != len(KERNELS):
        return f"{len(normal)} normal and {len(rescue)} recovery entries"
    if any(entry.kvm for entry in rescue):
        return "a recovery entry in KVM mode"
    if len({entry.kvm for entry in normal}) != 1:
        return "some entries in KVM mode, some not"
    return "kvm" if normal[0].kvm else "bare-metal"


def image_listing(machine: Machine, kernel: str) -> list[str]:
    """The names of the files in an image."""
    return sorted(machine("lsinitramfs", f"/boot/initrd.img-{kernel}").splitlines())


def image_file(machine: Machine, kernel: str, name: str) -> str:
    """The content of a file in an image."""
    machine("rm", "-rf", "/tmp/image")
    machine("unmkinitramfs", f"/boot/initrd.img-{kernel}", "/tmp/image")
    folder = "/tmp/image/main" if machine.exists("/tmp/image/main") else "/tmp/image"
    return machine.read(f"{folder}/{name}")


def images(machine: Machine) -> dict[str, str]:
    """A hash of each image, to see whether one was built again."""
    return {
        kernel: hashlib.sha256(machine.path(f"/boot/initrd.img-{kernel}").read_bytes()).hexdigest()
        for kernel in KERNELS
    }
