"""What can be seen of a host, so that two moments can be compared."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lab.machine import Machine

# A line a file: kind, mode, owner, name, and what it leads to or how long it is; then what is in
# it, but for those of /usr and the boot images. Not what every boot and every run of apt or
# Python writes anew.
TREE = r"""
find_all() {
    find $places -xdev \( -name __pycache__ -o -path /etc/mtab -o -path /etc/.pwd.lock \
        -o -path /etc/ld.so.cache -o -path /etc/resolv.conf -o -path /boot/grub/grubenv \) \
        -prune -o ! -path /etc/libvirt/storage ! -path /etc/libvirt/storage/autostart "$@" \
        2>/dev/null
}
places='/usr'
find_all -type f -printf '%y %m %u:%g %p %s\n'
find_all ! -type f -printf '%y %m %u:%g %p %l\n'
places='/etc /boot /var/lib/dgx-kvm /var/lib/systemd/deb-systemd-helper-enabled'
find_all -printf '%y %m %u:%g %p %l\n'
find_all -type f ! -name 'initrd.img-*' -print0 | xargs -0 sha256sum
"""
DRIVERS = r"""
for d in /sys/bus/pci/devices/*; do
    driver=$(readlink "$d/driver") || driver=none
    echo "${d##*/} $(cat "$d/vendor") $(cat "$d/device") $(cat "$d/class") ${driver##*/}"
done
"""
IMAGES = r'for i in /boot/initrd.img-*; do echo "$i"; lsinitramfs "$i" | sort; done'


@dataclass(frozen=True)
class Function:
    """A PCI function and who drives it; `driver` is "none" without one."""

    address: str
    vendor: str
    device: str
    class_code: str
    driver: str

    @property
    def is_gpu(self) -> bool:
        return self.vendor == "0x10de" and self.class_code.startswith("0x0302")

    @property
    def is_nvswitch(self) -> bool:
        return self.vendor == "0x10de" and self.class_code.startswith("0x0680")


@dataclass(frozen=True)
class Facts:
    """Each a list of lines, so that a difference can be read."""

    functions: tuple[Function, ...]
    units: tuple[str, ...]
    tree: tuple[str, ...]
    images: tuple[str, ...]
    grub_cfg: str


def functions(machine: Machine) -> tuple[Function, ...]:
    rows = machine.check(DRIVERS).splitlines()
    return tuple(Function(*row.split()) for row in rows)


def facts(machine: Machine) -> Facts:
    """Look at all of it; half a minute in an emulated machine."""
    return Facts(
        functions=functions(machine),
        units=tuple(
            machine.check("systemctl list-unit-files --no-legend --no-pager | sort").splitlines()
        ),
        tree=tuple(machine.check(TREE, 600).splitlines()),
        images=tuple(machine.check(IMAGES, 600).splitlines()),
        grub_cfg=machine.check("sha256sum </boot/grub/grub.cfg").split()[0],
    )


def modules(machine: Machine) -> set[str]:
    """Names of the kernel modules that are loaded."""
    return set(re.findall(r"^(\S+)", machine.check("cat /proc/modules"), re.MULTILINE))


def differences(before: Facts, after: Facts) -> list[str]:
    """What has come (+) and gone (-), over all facts."""
    found: list[str] = []
    for name in ("functions", "units", "tree", "images"):
        old, new = set(getattr(before, name)), set(getattr(after, name))
        found += [f"- {name}: {line}" for line in sorted(old - new, key=str)]
        found += [f"+ {name}: {line}" for line in sorted(new - old, key=str)]
    if before.grub_cfg != after.grub_cfg:
        found.append("grub.cfg differs")
    return found
