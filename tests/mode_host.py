"""A small DGX as files: two GPUs, an NVSwitch, NICs and drives, GRUB, the shipped scripts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from commandline import PROJECT, Result

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.cli import main

SHIPPED = PROJECT / "debian/host"
GPU, GPU_2, NVSWITCH = "0000:07:00.0", "0000:08:00.0", "0000:c1:00.0"
NIC, HOST_NIC = "0000:05:00.0", "0000:06:00.0"
DRIVE, BOOT_DRIVE = "0000:81:00.0", "0000:80:00.0"
BMC, BRIDGE = "0000:03:00.0", "0000:04:00.0"
IDS = {
    BMC: "0x1a03 0x2000 0x030000",
    BRIDGE: "0x10b5 0x9797 0x060400",
    NIC: "0x15b3 0x101b 0x020700",
    HOST_NIC: "0x8086 0x1563 0x020000",
    GPU: "0x10de 0x20b0 0x030200",
    GPU_2: "0x10de 0x20b0 0x030200",
    NVSWITCH: "0x10de 0x1af1 0x068000",
    DRIVE: "0x144d 0xa824 0x010802",
    BOOT_DRIVE: "0x144d 0xa824 0x010802",
}
BARE = "root=UUID=1 ro quiet"
WORDS = "dgx_kvm.mode=kvm intel_iommu=on iommu=pt"
KVM = f"{BARE} {WORDS}"
INTEL = "vendor_id\t: GenuineIntel\nmodel name\t: Xeon\nflags\t\t: fpu vmx sse\n"
AMD = "vendor_id\t: AuthenticAMD\nmodel name\t: EPYC\nflags\t\t: fpu svm sse\n"
RELEASE = "6.1.0-2-amd64"
FOR_VMS = (GPU, GPU_2, NVSWITCH, NIC, DRIVE)

_UPDATE_GRUB = """#!/bin/sh
set -e
echo "update-grub at work" >&2
GRUB_CMDLINE_LINUX_DEFAULT=quiet
for file in "$DPKG_ROOT"/etc/default/grub.d/*.cfg; do . "$file"; done
{
    echo "menuentry 'Debian' \\$menuentry_id_option 'gnulinux-simple-1' {"
    printf '\\tlinux\\t/boot/vmlinuz root=UUID=1 ro %s\\n}\\n' "$GRUB_CMDLINE_LINUX_DEFAULT"
} >"$2"
"""
_UPDATE_INITRAMFS = '#!/bin/sh\necho image >"$DPKG_ROOT/boot/initrd.img"\n'

VFIO_IOMMU = "/sys/module/vfio_iommu_type1"


@dataclass
class ModeHost:
    root: Root
    capture: pytest.CaptureFixture[str]

    def __call__(self, command: str) -> Result:
        """Run dgx-kvm on this host."""
        self.capture.readouterr()
        code = main(["--root", str(self.root.directory), *command.split()])
        out, err = self.capture.readouterr()
        assert "Traceback" not in err
        return Result(code, out, err)

    def write(self, path: str, text: str) -> None:
        self.root.write(path, text, sync=False)

    def program(self, name: str, text: str) -> None:
        self.root.write(f"/usr/sbin/{name}", text, 0o755, sync=False)

    def link(self, path: str, target: str) -> None:
        place = self.root.path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(target)

    # -- devices ------------------------------------------------------------------------------

    def device(self, address: str, ids: str) -> None:
        for name, value in zip(("vendor", "device", "class"), ids.split(), strict=True):
            self.write(f"/sys/bus/pci/devices/{address}/{name}", f"{value}\n")
        self.write(f"/sys/bus/pci/devices/{address}/driver_override", "(null)\n")

    def bind(self, address: str, driver: str | None) -> None:
        link = f"/sys/bus/pci/devices/{address}/driver"
        self.root.remove(link)
        if driver:
            self.root.path(f"/sys/bus/pci/drivers/{driver}").mkdir(parents=True, exist_ok=True)
            self.link(link, f"../../drivers/{driver}")

    def group(self, number: int, *addresses: str) -> None:
        for address in addresses:
            group = f"/sys/kernel/iommu_groups/{number}"
            old = self.root.link_name(f"/sys/bus/pci/devices/{address}/iommu_group")
            self.root.remove(f"/sys/kernel/iommu_groups/{old}/devices/{address}")
            device = self.root.path(f"/sys/bus/pci/devices/{address}")
            self.link(f"{group}/devices/{address}", str(device))
            self.link(f"/sys/bus/pci/devices/{address}/iommu_group", str(self.root.path(group)))

    def process(self, pid: int, name: str, *nodes: str, cmdline: str = "") -> None:
        self.write(f"/proc/{pid}/comm", f"{name}\n")
        self.write(f"/proc/{pid}/cmdline", cmdline or f"/usr/bin/{name}\0")
        self.root.path(f"/proc/{pid}/fd").mkdir()
        for number, node in enumerate(("/dev/null", "socket:[7]", *nodes)):
            self.link(f"/proc/{pid}/fd/{number}", node)

    # -- boots --------------------------------------------------------------------------------

    def boot_kvm(self, *, words: str = KVM) -> None:
        """Show what a boot in KVM mode shows when all went well."""
        self.write("/proc/cmdline", f"{words}\n")
        self.write("/var/lib/dgx-kvm/devices", f"{NIC} {IDS[NIC]}\n{DRIVE} {IDS[DRIVE]}\n")
        for number, address in enumerate(IDS):
            self.group(number, address)
        for address in FOR_VMS:
            self.bind(address, "vfio-pci")
        self.write("/dev/kvm", "")
        self.root.path(VFIO_IOMMU).mkdir(parents=True, exist_ok=True)
        self.write("/sys/kernel/irq/24/chip_name", "IR-PCI-MSI\n")
        self.write("/proc/modules", "vfio_pci 16384 0 - Live 0x0\nkvm_intel 1 0 - Live 0x0\n")


def build(folder: Path, capture: pytest.CaptureFixture[str]) -> ModeHost:
    host = ModeHost(Root(folder), capture)
    for address, ids in IDS.items():
        host.device(address, ids)
    for address, driver in (
        (GPU, "nvidia"),
        (GPU_2, "nvidia"),
        (NVSWITCH, "nvidia-nvswitch"),
        (NIC, "mlx5_core"),
        (HOST_NIC, "ixgbe"),
        (DRIVE, "nvme"),
        (BOOT_DRIVE, "nvme"),
    ):
        host.bind(address, driver)
    for address, link in ((NIC, "ib0"), (HOST_NIC, "eno1")):
        host.write(f"/sys/bus/pci/devices/{address}/net/{link}/operstate", "up\n")
    for address, number in ((BOOT_DRIVE, 0), (DRIVE, 1)):
        disk = f"/sys/bus/pci/devices/{address}/nvme/nvme{number}/nvme{number}n1"
        host.write(f"{disk}/dev", f"259:{number}0\n")
    host.write("/sys/bus/pci/drivers_probe", "")
    files = {
        "/proc/cmdline": BARE,
        "/proc/cpuinfo": INTEL,
        "/proc/modules": "",
        "/proc/self/mountinfo": "1 0 259:00 / / rw - ext4 /dev/nvme0n1 rw",
        "/proc/net/route": "Iface\tDestination\neno1\t00000000",
        "/proc/sys/kernel/osrelease": RELEASE,
        f"/lib/modules/{RELEASE}/modules.dep": "kernel/drivers/vfio/pci/vfio-pci.ko: x.ko",
        "/boot/grub/grub.cfg": "menuentry 'Debian' $menuentry_id_option 'gnulinux-simple-1' {\n"
        f"\tlinux\t/boot/vmlinuz {BARE}\n}}",
        "/usr/lib/systemd/system/nvidia-persistenced.service": "",
        "/etc/systemd/system/nvsm-core.service": "",
        "/etc/default/grub.d/zz-dgx-kvm.cfg": (SHIPPED / "grub-guard.cfg").read_text(),
    }
    for path, text in files.items():
        host.write(path, f"{text}\n")
    shutil.copytree(SHIPPED, host.root.path("/usr/lib/dgx-kvm"))
    host.program("update-grub", _UPDATE_GRUB)
    host.program("update-initramfs", _UPDATE_INITRAMFS)
    firmware(host, "DMAR", 0x01)
    return host


def firmware(host: ModeHost, table: str, flags: int) -> None:
    """Give the host an ACPI table: 36 bytes of header, the width of addresses, flags."""
    folder = host.root.path("/sys/firmware/acpi/tables")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / table).write_bytes(table.encode() + bytes(32) + bytes((45, flags)) + bytes(10))


def program_for_everybody(folder: Path) -> Path:
    """Copy the program to where other users may read it; this tree may be root's alone."""
    tree = folder / "tree"
    for name in ("bin", "dgx_kvm_sw", "debian/host", "etc"):
        shutil.copytree(PROJECT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "debian/changelog"):
        shutil.copy(PROJECT / name, tree / name)
    folder.chmod(0o755)
    return tree
