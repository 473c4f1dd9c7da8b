"""Which NICs and NVMe drives VMs may get, on a small machine laid out file by file."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytestmark = pytest.mark.commands

ASSIGNABLE = Path(__file__).parents[1] / "debian/host/assignable"
NIC, OTHER_NIC = "0000:05:00.0", "0000:06:00.0"
DRIVE, OTHER_DRIVE = "0000:81:00.0", "0000:82:00.0"
NIC_LINE = f"{NIC} 0x15b3 0x101b 0x020700"
DRIVE_LINE = f"{DRIVE} 0x144d 0xa824 0x010802"
GPU, BMC, BRIDGE = "0000:07:00.0", "0000:03:00.0", "0000:04:00.0"
HEADER = "Iface\tDestination\tGateway\n"


@dataclass
class Machine:
    """One NIC (ib0), one drive (nvme0n1 with two partitions), the host's disk on SATA."""

    root: Path
    groups: int = field(default=0)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def link(self, name: str, target: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    def device(self, address: str, vendor: str, device: str, code: str) -> str:
        folder = f"sys/bus/pci/devices/{address}"
        for name, value in (("vendor", vendor), ("device", device), ("class", code)):
            self.write(f"{folder}/{name}", f"{value}\n")
        return folder

    def nic(self, address: str, link: str) -> None:
        folder = self.device(address, "0x15b3", "0x101b", "0x020700")
        self.write(f"{folder}/net/{link}/operstate", "up\n")

    def drive(self, address: str, number: int) -> None:
        folder = self.device(address, "0x144d", "0xa824", "0x010802")
        disk = f"{folder}/nvme/nvme{number}/nvme{number}n1"
        self.partitions(disk, number)

    def partitions(self, disk: str, number: int) -> None:
        name = disk.rpartition("/")[2]
        self.write(f"{disk}/dev", f"259:{number}0\n")
        for part in (1, 2):
            self.write(f"{disk}/{name}p{part}/dev", f"259:{number}{part}\n")
            (self.root / f"{disk}/{name}p{part}/holders").mkdir()

    def group(self, *addresses: str) -> None:
        self.groups += 1
        for address in addresses:
            folder = f"sys/kernel/iommu_groups/{self.groups}"
            self.link(f"{folder}/devices/{address}", f"../../../../bus/pci/devices/{address}")
            self.link(f"sys/bus/pci/devices/{address}/iommu_group", f"{self.root}/{folder}")

    def run(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", ASSIGNABLE],
            env={"DPKG_ROOT": str(self.root), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )

    def __call__(self) -> tuple[list[str], str]:
        done = self.run()
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines(), done.stderr


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    machine.nic(NIC, "ib0")
    machine.drive(DRIVE, 0)
    machine.device(GPU, "0x10de", "0x20b0", "0x030200")
    machine.device(BMC, "0x1a03", "0x2000", "0x030000")
    machine.device(BRIDGE, "0x8086", "0x2030", "0x060400")
    machine.write(
        "proc/self/mountinfo",
        "22 1 8:2 / / rw,relatime shared:1 - ext4 /dev/sda2 rw\n"
        "23 22 0:20 / /proc rw - proc proc rw\n",
    )
    machine.write("proc/net/route", f"{HEADER}eno1\t00000000\t0100000A\n")
    machine.write("proc/swaps", "Filename\tType\n/dev/sda3 partition\n")
    machine.write("etc/fstab", "# what\n/dev/sda2 / ext4 defaults 0 1\nproc /proc proc 0 0\n")
    return machine


def test_idle_nics_and_drives_are_listed_with_their_ids(machine: Machine) -> None:
    assert machine() == ([NIC_LINE, DRIVE_LINE], "")


def test_devices_that_vfio_has_already_stay_listed(machine: Machine) -> None:
    """In KVM mode they have no network link and no block device."""
    machine.device(OTHER_NIC, "0x15b3", "0x101b", "0x020000")
    machine.device(OTHER_DRIVE, "0x144d", "0xa824", "0x010802")
    assert [line.split()[0] for line in machine()[0]] == [NIC, OTHER_NIC, DRIVE, OTHER_DRIVE]


def test_virtual_functions_are_not_listed(machine: Machine) -> None:
    machine.device(OTHER_NIC, "0x15b3", "0x101c", "0x020700")
    machine.link(f"sys/bus/pci/devices/{OTHER_NIC}/physfn", f"../{NIC}")
    assert machine() == ([NIC_LINE, DRIVE_LINE], "")


# --- drives in use


def mount(machine: Machine, number: str, place: str, kind: str, source: str) -> None:
    with open(machine.root / "proc/self/mountinfo", "a") as table:
        table.write(f"30 22 {number} / {place} rw shared:2 master:1 - {kind} {source} rw,x=- y\n")


def mounted(machine: Machine) -> None:
    mount(machine, "259:02", "/", "ext4", "/dev/root")


def esp(machine: Machine) -> None:
    mount(machine, "259:01", "/boot/efi", "vfat", "systemd-1")


def whole_disk(machine: Machine) -> None:
    mount(machine, "259:00", "/raid", "xfs", "/dev/nvme0n1")


def btrfs_first(machine: Machine) -> None:
    mount(machine, "0:44", "/data", "btrfs", "/dev/nvme0n1p2")


def btrfs_second(machine: Machine) -> None:
    machine.link("sys/fs/btrfs/1234/devices/nvme0n1p2", "../../../../block/nvme0n1p2")


def swap(machine: Machine) -> None:
    machine.write("proc/swaps", "Filename\tType\n/dev/nvme0n1p2 partition\n")


def raid_member(machine: Machine) -> None:
    disk = f"sys/bus/pci/devices/{DRIVE}/nvme/nvme0/nvme0n1"
    machine.link(f"{disk}/nvme0n1p2/holders/md0", "../../md0")


def lvm_on_the_whole_disk(machine: Machine) -> None:
    machine.link(f"sys/bus/pci/devices/{DRIVE}/nvme/nvme0/nvme0n1/holders/dm-0", "../../dm-0")


def zfs(machine: Machine) -> None:
    machine.write("run/udev/data/b259:02", "S:disk/by-id/x\nE:ID_FS_TYPE=zfs_member\n")


def fstab_path(machine: Machine) -> None:
    machine.write("etc/fstab", "/dev/nvme0n1p1 /srv ext4 noauto 0 0")


def fstab_uuid(machine: Machine) -> None:
    machine.write("etc/fstab", 'UUID="12-34" /srv ext4 defaults 0 0\n')
    machine.link("dev/disk/by-uuid/12-34", "../../nvme0n1p2")


def fstab_label(machine: Machine) -> None:
    machine.write("etc/fstab", "LABEL=raid /raid ext4 defaults 0 0\n")
    machine.link("dev/disk/by-label/raid", "../../nvme0n1")


def multipath(machine: Machine) -> None:
    """The head nvme3n1 hangs on the subsystem; below the controller is a path without `dev`."""
    disk = machine.root / f"sys/bus/pci/devices/{DRIVE}/nvme/nvme0"
    (disk / "nvme0n1").rename(machine.root / "unused")
    (disk / "nvme0c0n1").mkdir()
    subsystem = "sys/class/nvme-subsystem/nvme-subsys3"
    machine.partitions(f"{subsystem}/nvme3n1", 3)
    machine.link(f"{subsystem}/nvme0", f"{disk}")
    mount(machine, "259:32", "/", "ext4", "/dev/nvme3n1p2")


def named_to_stay(machine: Machine) -> None:
    machine.write("etc/default/dgx-kvm", f'DGX_KVM_KEEP="{GPU} {DRIVE}"\nfalse\n')


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (mounted, "nvme0n1p2 is mounted"),
        (esp, "nvme0n1p1 is mounted"),
        (whole_disk, "nvme0n1 is mounted"),
        (btrfs_first, "nvme0n1p2 is mounted"),
        (btrfs_second, "nvme0n1p2 is part of a btrfs"),
        (swap, "nvme0n1p2 is mounted, in fstab or swap"),
        (raid_member, "nvme0n1p2 is part of md0"),
        (lvm_on_the_whole_disk, "nvme0n1 is part of dm-0"),
        (zfs, "nvme0n1p2 is part of a ZFS pool"),
        (fstab_path, "nvme0n1p1 is mounted, in fstab"),
        (fstab_uuid, "nvme0n1p2 is mounted, in fstab"),
        (fstab_label, "nvme0n1 is mounted, in fstab"),
        (multipath, "nvme3n1p2 is mounted"),
        (named_to_stay, "DGX_KVM_KEEP names it"),
    ],
)
def test_drive_in_use_stays(machine: Machine, use: Callable[[Machine], None], reason: str) -> None:
    machine.drive(OTHER_DRIVE, 1)
    use(machine)
    lines, words = machine()
    assert lines == [NIC_LINE, f"{OTHER_DRIVE} 0x144d 0xa824 0x010802"]
    assert len(words.splitlines()) == 1
    assert f"{DRIVE} stays with the host: {reason}" in words


def test_disk_of_another_subsystem_is_not_ours(machine: Machine) -> None:
    machine.partitions("sys/class/nvme-subsystem/nvme-subsys3/nvme3n1", 3)
    mount(machine, "259:32", "/", "ext4", "/dev/nvme3n1p2")
    assert machine() == ([NIC_LINE, DRIVE_LINE], "")


# --- NICs in use


def default_route(machine: Machine) -> None:
    machine.write("proc/net/route", f"{HEADER}ib0\t00000000\t0100000A\n")


def address(machine: Machine) -> None:
    """Such as the one an ssh session came in by: a route to its own network, no default one."""
    machine.write("proc/net/route", f"{HEADER}ib0\t0000A8C0\t00000000\n")


def ipv6_route(machine: Machine) -> None:
    zero = "0" * 32
    fields = f"{zero} 00 {'fe80' + zero[4:]} 00000400 00000001 00000000 00000003"
    machine.write("proc/net/ipv6_route", f"{zero} 00 {fields}      ib0\n")


def bond(machine: Machine) -> None:
    machine.link(f"sys/bus/pci/devices/{NIC}/net/ib0/master", "../../bond0")


def vlan(machine: Machine) -> None:
    machine.link(f"sys/bus/pci/devices/{NIC}/net/ib0/upper_ib0.8001", "../../ib0.8001")


@pytest.mark.parametrize("use", [default_route, address, ipv6_route, bond, vlan])
def test_nic_in_use_stays(machine: Machine, use: Callable[[Machine], None]) -> None:
    use(machine)
    lines, words = machine()
    assert lines == [DRIVE_LINE]
    assert words.startswith(f"{NIC} stays with the host: ib0 ")


def test_link_local_routes_do_not_count(machine: Machine) -> None:
    rest = f"{'0' * 32} 00 {'0' * 32} 00000100 00000001 00000000 00000001      ib0\n"
    multicast, link_local = "ff" + "0" * 30, "fe80" + "0" * 28
    machine.write("proc/net/ipv6_route", f"{link_local} 40 {rest}{multicast} 08 {rest}")
    assert machine() == ([NIC_LINE, DRIVE_LINE], "")


def test_nic_that_manages_nvswitches_stays(machine: Machine) -> None:
    machine.write(f"sys/bus/pci/devices/{NIC}/vpd", "\x82PRODUCT SW_MNG\x78")
    lines, words = machine()
    assert lines == [DRIVE_LINE]
    assert f"{NIC} stays with the host: it manages NVSwitches" in words


def test_nic_with_virtual_functions_stays(machine: Machine) -> None:
    machine.write(f"sys/bus/pci/devices/{NIC}/sriov_numvfs", "0\n")
    assert machine() == ([NIC_LINE, DRIVE_LINE], "")
    machine.write(f"sys/bus/pci/devices/{NIC}/sriov_numvfs", "8\n")
    lines, words = machine()
    assert (lines, words) == (
        [DRIVE_LINE],
        f"{NIC} stays with the host: it has 8 virtual functions\n",
    )


LINK = "etc/systemd/network/10-vf.link"


@pytest.mark.parametrize(
    "text",
    [
        f"[Match]\nPath=pci-{NIC}\n[Link]\nSR-IOVVirtualFunctions=8\n",
        f"[Match]\nPath = pci-0000:81:00.0 pci-{NIC}\n[Link]\nSR-IOVVirtualFunctions = 16",
        "[Match]\nPath=pci-0000:05:*\n[SR-IOV]\nVirtualFunction=0\n",
    ],
)
def test_nic_that_is_to_get_virtual_functions_stays(machine: Machine, text: str) -> None:
    """In KVM mode it is on vfio-pci and has none; only the administrator's file speaks of them."""
    machine.nic(OTHER_NIC, "ib1")
    machine.write(LINK, text)
    lines, words = machine()
    assert lines == [f"{OTHER_NIC} 0x15b3 0x101b 0x020700", DRIVE_LINE]
    assert words == f"{NIC} stays with the host: systemd is to make it virtual functions\n"


@pytest.mark.parametrize(
    "text",
    [
        f"[Match]\nPath=pci-{NIC}\n[Link]\nName=ib0\n",
        f"[Match]\nPath=pci-{NIC}\n[Link]\nSR-IOVVirtualFunctions=0\n",
        f"[Match]\nPath=pci-{NIC}\n[Link]\n#SR-IOVVirtualFunctions=8\n",
        "[Match]\nPath=pci-0000:06:00.0\n[Link]\nSR-IOVVirtualFunctions=8\n",
        "",
    ],
)
def test_other_files_of_links_keep_no_nic(machine: Machine, text: str) -> None:
    machine.write(LINK, text)
    assert machine() == ([NIC_LINE, DRIVE_LINE], "")


def test_a_file_that_does_not_say_which_nic_is_named(machine: Machine) -> None:
    machine.write(LINK, "[Match]\nOriginalName=ib0\n[Link]\nSR-IOVVirtualFunctions=8\n")
    lines, words = machine()
    assert lines == [NIC_LINE, DRIVE_LINE]
    assert f"/{LINK} does not say by Path=pci-ADDRESS which NIC" in words
    assert "DGX_KVM_KEEP" in words


# --- IOMMU groups


def test_group_with_a_device_that_stays_is_refused_naming_both(machine: Machine) -> None:
    machine.nic(OTHER_NIC, "eno1")
    machine.group(OTHER_NIC, NIC)
    lines, words = machine()
    assert lines == [DRIVE_LINE]
    assert f"{NIC} stays with the host: it shares an IOMMU group with {OTHER_NIC}" in words


def test_group_with_the_bmc_is_refused(machine: Machine) -> None:
    machine.group(BMC, DRIVE)
    assert machine()[0] == [NIC_LINE]


def test_group_of_devices_that_all_go_is_listed(machine: Machine) -> None:
    machine.group(BRIDGE, NIC, DRIVE, GPU)
    assert machine() == ([NIC_LINE, DRIVE_LINE], "")


@pytest.mark.parametrize("code", ["0x030200", "0x068000"])
def test_gpu_in_a_group_with_a_device_that_stays_is_refused_naming_both(
    machine: Machine, code: str
) -> None:
    machine.device(GPU, "0x10de", "0x1db8", code)
    machine.nic(OTHER_NIC, "eno1")
    machine.group(BRIDGE, GPU, OTHER_NIC)
    done = machine.run()
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{GPU}, which VMs need, shares an IOMMU group with {OTHER_NIC}" in done.stderr


# --- not knowing is not "unused"


@pytest.mark.parametrize("missing", ["proc/self/mountinfo", "proc/net/route"])
def test_without_proc_nothing_is_listed(machine: Machine, missing: str) -> None:
    (machine.root / missing).unlink()
    done = machine.run()
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{missing} cannot be read" in done.stderr
