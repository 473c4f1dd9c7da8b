"""A DGX-2 to install packages on: a Debian root on an overlay, which takes itself for live.

Dpkg, its maintainer scripts, initramfs-tools and grub-mkconfig are the real ones. Not real are
the hardware (a simulated /sys, a /proc/cpuinfo), the network (a link with a route), the kernels
(files of their names) and two programs: grub-probe, which cannot see an overlay, and
systemd-detect-virt, which from version 257 on takes every PID namespace for a container. The
machine has PID, mount, UTS and network namespaces of its own and a pivoted root, so the rest
cannot tell it from a machine that has started by itself. What it writes is in memory and gone
with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.host import simulate
from package.bases import MOUNT, NETWORK, Base
from package.standins import PY3COMPILE, UPDATE_GRUB, UPDATE_INITRAMFS

KERNELS = ("6.1.0-1-dgx", "6.1.0-2-dgx")
INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu msr vmx ept\n\n" * 2
BARE_METAL = "BOOT_IMAGE=/boot/vmlinuz-6.1.0-2-dgx root=/dev/nvme0n1p2 ro quiet\n"
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
DMAR = "/sys/firmware/acpi/tables/DMAR"

# The first process of a PID namespace takes all others with it when it ends, and this one ends
# when its standard input does. `$machine` is a folder, `$sys` the laid out /sys.
_ROOT = f"""
set -eu
exec 3<&0
mount -t tmpfs tmpfs "$machine"
upper=$machine/upper work=$machine/work root=$machine/root
mkdir "$upper" "$work" "$root" "$machine/sys" "$machine/sys.work"
{MOUNT}
"""
_HARDWARE = """
mount -t overlay overlay -o "lowerdir=$sys,upperdir=$machine/sys,workdir=$machine/sys.work" \
    "$root/sys"
for name in cpuinfo cmdline; do
    touch "$machine/$name"
    mount --bind "$machine/$name" "$root/proc/$name"
done
mkdir "$root/dev/upper"
mount --bind "$upper" "$root/dev/upper"
hostname dgx
ip link add enp6s0 type bridge
ip address add 192.0.2.10/24 dev enp6s0
ip link set enp6s0 up
ip link set lo up
ip route add default via 192.0.2.1
"""
_PIVOT = """
cd "$root"
pivot_root . .
umount --lazy .
cd /
"""
_WAIT = "echo ready\ncat <&3 >&2 &\nwait $!\n"

_GRUB_PROBE = """\
#!/bin/sh
# A stand-in for tests: what GRUB's own says of a disk with one ext4.
for word; do
    case $word in
        --target=device) echo /dev/nvme0n1p2 ;;
        --target=fs) echo ext2 ;;
        --target=fs_uuid) echo 2f4a1b52-7c0e-4f0a-9d8e-0123456789ab ;;
        --target=partmap) echo gpt ;;
        --target=drive) echo "(hd0,gpt2)" ;;
    esac
done
"""

_DETECT_VIRT = """\
#!/bin/sh
# A stand-in for tests: a container is what says so.
if read -r name 2>/dev/null </run/systemd/container; then
    case " $* " in *" --quiet "* | *" -q "*) ;; *) echo "$name" ;; esac
    exit 0
fi
case " $* " in *" --quiet "* | *" -q "*) ;; *) echo none ;; esac
exit 1
"""


@dataclass(frozen=True)
class Result:
    """What a command inside printed, both streams together as one would read them."""

    code: int
    output: str


@dataclass(frozen=True)
class Machine:
    """A running one; `root` is where its files are seen from outside."""

    suite: str
    root: Path
    enter: tuple[str, ...]

    def run(self, *command: str, **environment: str) -> Result:
        """Run a command inside, with no terminal and nothing of this machine's environment."""
        done = subprocess.run(
            (*self.enter, *self.environment(environment), *command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        return Result(done.returncode, done.stdout)

    def environment(self, more: dict[str, str] | None = None) -> tuple[str, ...]:
        """The words that give a command inside its environment."""
        names = {"PATH": PATH, "LANG": "C.UTF-8", "HOME": "/root", "TERM": "dumb"}
        names |= {"DEBIAN_FRONTEND": "noninteractive", **(more or {})}
        return ("env", "-i", *(f"{name}={value}" for name, value in names.items()))

    def __call__(self, *command: str, **environment: str) -> str:
        """Run a command that must succeed and return what it printed."""
        done = self.run(*command, **environment)
        assert done.code == 0, f"{' '.join(command)}: exit code {done.code}\n{done.output}"
        return done.output

    def path(self, name: str) -> Path:
        """A file inside as a path outside; of its links only those with relative targets work."""
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str:
        return self.path(name).read_text(errors="replace")

    def exists(self, name: str) -> bool:
        return os.path.lexists(self.path(name))

    def write(self, name: str, text: str | bytes, mode: int = 0o644) -> None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(mode)

    def copy_in(self, file: Path) -> str:
        """Put a file into the machine's /tmp and return its name there."""
        shutil.copyfile(file, self.path(f"/tmp/{file.name}"))
        return f"/tmp/{file.name}"

    def files(self, folder: str) -> list[str]:
        """The names of all files below a folder."""
        return sorted(
            f"/{path.relative_to(self.root)}"
            for path in self.path(folder).rglob("*")
            if path.is_symlink() or not path.is_dir()
        )


@contextlib.contextmanager
def live(base: Base, folder: Path, sysfs: Path) -> Iterator[Machine]:
    """Start a machine that takes itself for a live host; `folder` is an empty one to mount on."""
    namespaces = ("--mount", "--pid", "--uts", "--net", "--fork", "--kill-child")
    with _started(base, folder, sysfs, namespaces, _HARDWARE + _PIVOT) as pid:
        joined = ("--mount", "--pid", "--uts", "--net", "--root", "--wd")
        enter = ("nsenter", f"--target={pid}", *joined, "--")
        machine = Machine(base.suite, Path(f"/proc/{pid}/root"), enter)
        machine.path("/run/systemd/system").mkdir(parents=True, exist_ok=True)
        machine.write("/proc/cpuinfo", INTEL)
        machine.write("/proc/cmdline", BARE_METAL)
        yield machine


@contextlib.contextmanager
def chroot(base: Base, folder: Path, sysfs: Path) -> Iterator[Machine]:
    """The same root as an image builder uses one: in a plain chroot on a machine that runs."""
    namespaces = ("--mount", "--net", "--uts", "--fork", "--kill-child")
    with _started(base, folder, sysfs, namespaces, _HARDWARE) as pid:
        yield _in_chroot(base, folder, pid)


@contextlib.contextmanager
def online(base: Base, folder: Path) -> Iterator[Machine]:
    """A plain chroot with this machine's network, to download packages."""
    namespaces = ("--mount", "--fork", "--kill-child")
    with _started(base, folder, Path("/sys"), namespaces, NETWORK) as pid:
        yield _in_chroot(base, folder, pid)


def _in_chroot(base: Base, folder: Path, pid: int) -> Machine:
    root = folder / "root"
    enter = ("nsenter", f"--target={pid}", "--mount", "--net", "--", "chroot", str(root))
    return Machine(base.suite, Path(f"/proc/{pid}/root{root}"), enter)


@contextlib.contextmanager
def _started(
    base: Base, folder: Path, sysfs: Path, namespaces: Sequence[str], rest: str
) -> Iterator[int]:
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        ("unshare", *namespaces, "sh", "-c", _ROOT + rest + _WAIT),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": PATH, "lower": base.lower(), "machine": str(folder), "sys": str(sysfs)},
    )
    assert process.stdin and process.stdout
    try:
        assert process.stdout.readline() == "ready\n", "the machine did not start; see stderr"
        pid = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
        yield pid
    finally:
        process.stdin.close()
        process.wait(timeout=30)


def checkpoint(machine: Machine, base: Base, layer: Path) -> Base:
    """Make what a machine has written a layer that further machines start from."""
    command = ("cp", "--archive", f"{machine.root}/dev/upper", str(layer))
    subprocess.run(command, check=True)
    return Base(base.suite, (layer, *base.layers))


def lay_out_sysfs(folder: Path) -> Path:
    """Write the /sys of a DGX-2 whose disks and firmware tables are as Linux shows them."""
    simulate.build("dgx2", folder)
    root = Root(folder)
    _write_partitions(folder)
    root.write(DMAR, "", sync=False)
    root.path(DMAR).write_bytes(dmar(interrupt_remapping=True))
    return folder / "sys"


def _write_partitions(folder: Path) -> None:
    """The two disks of the system have two partitions each, the second part of a mirror."""
    for number, disk in enumerate(sorted((folder / "sys/devices").glob("*/**/nvme/nvme*/nvme*"))):
        (disk / "dev").write_text(f"259:{number * 10}\n")
        for part in (1, 2):
            (disk / f"{disk.name}p{part}/holders").mkdir(parents=True)
            (disk / f"{disk.name}p{part}/dev").write_text(f"259:{number * 10 + part}\n")
        (disk / f"{disk.name}p2/holders/md0").symlink_to("/sys/devices/virtual/block/md0")


def dmar(*, interrupt_remapping: bool) -> bytes:
    """The head of an ACPI table DMAR (Intel VT-d specification, 8.1); byte 37 has the flags."""
    header = b"DMAR" + (48).to_bytes(4, "little") + bytes(28)
    return header + bytes((45, 1 if interrupt_remapping else 0)) + bytes(10)


def prepare(machine: Machine, *, quick: bool = False) -> None:
    """Make a root with GRUB and initramfs-tools a machine that has just been installed.

    A quick one has stand-ins for update-grub, update-initramfs and py3compile.
    """
    if quick:
        machine.write("/usr/sbin/update-grub", UPDATE_GRUB, 0o755)
        machine.write("/usr/sbin/update-initramfs", UPDATE_INITRAMFS, 0o755)
        machine.path("/usr/bin/py3compile").unlink()  # a link
        machine.write("/usr/bin/py3compile", PY3COMPILE, 0o755)
    machine.write("/usr/sbin/grub-probe", _GRUB_PROBE, 0o755)
    machine.write("/usr/bin/systemd-detect-virt", _DETECT_VIRT, 0o755)
    machine.write("/etc/fstab", "/dev/md0 / ext4 defaults 0 1\n")
    machine.write("/etc/default/grub", 'GRUB_TIMEOUT=5\nGRUB_CMDLINE_LINUX_DEFAULT="quiet"\n')
    machine.write("/etc/default/grub.d/iommu.cfg", "GRUB_CMDLINE_LINUX_DEFAULT=nosplash\n")
    settings = "MODULES=list\nBUSYBOX=n\nCOMPRESS=gzip\nCOMPRESSLEVEL=1\nFSTYPE=ext4\n"
    machine.write("/etc/initramfs-tools/conf.d/quick.conf", settings)
    for kernel in KERNELS:
        machine.write(f"/boot/vmlinuz-{kernel}", "kernel")
        machine.write(f"/boot/config-{kernel}", "CONFIG_RD_GZIP=y\nCONFIG_RD_ZSTD=y\n")
        machine.write(f"/lib/modules/{kernel}/modules.order", "")
        machine.write(f"/lib/modules/{kernel}/modules.builtin", "")
        machine("depmod", kernel)
    machine.path("/boot/grub").mkdir(exist_ok=True)
    machine("update-initramfs", "-c", "-k", "all")
    machine("update-grub")
