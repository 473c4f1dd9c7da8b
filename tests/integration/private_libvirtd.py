"""A libvirtd of our own with real QEMU, which sees none of this machine's domains and networks.

It runs in its own mount, network and PID namespaces: /var, /run and /etc/libvirt are folders of
a test's root, so that what the tool writes below that root is where libvirtd looks for it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dgx_kvm_sw.access.files import Root

BRIDGE = "br-test"
PROGRAMS = ("libvirtd", "virtlogd", "virsh", "qemu-system-x86_64", "qemu-img", "unshare", "ip")

HOOK = Path(__file__).parents[2] / "debian/host/qemu-hook"

_SBIN = "/usr/sbin:/usr/bin:/sbin:/bin"
_FOLDERS = (
    "/var/lib/libvirt/qemu",
    "/var/log/libvirt/qemu",
    "/var/cache/libvirt",
    "/var/lib/dgx-kvm/images",
    "/run/dgx-kvm",
    "/run/libvirt",
    "/etc/libvirt/hooks/qemu.d",
    "/usr/bin",
)
# Without systemd nobody hands out cgroups, and the machine's own are not ours to write to.
_QEMU_CONF = """\
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
stdio_handler = "logd"
"""
_LIBVIRTD_CONF = 'auth_unix_rw = "none"\nlog_outputs = "3:file:/var/log/libvirt/libvirtd.log"\n'

# The first process of a PID namespace takes all others with it when it ends. This one ends when
# its standard input does, so nothing outlives the test, however that ends. `wait` meanwhile
# reaps QEMUs that have died: libvirt takes one that nobody reaps for a living one.
_INIT = f"""
set -eu
exec 3<&0
mount --bind "$1/var" /var
mount --bind "$1/run" /run
mount --bind "$1/etc/libvirt" /etc/libvirt
mount -t overlay -o "lowerdir=$1/usr/bin:/usr/bin" overlay /usr/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
ip link add {BRIDGE} type bridge
ip link set {BRIDGE} up
virtlogd --daemon
libvirtd --daemon
echo ready
cat <&3 >&2 &
wait $!
"""


@dataclass(frozen=True)
class Libvirtd:
    """A running libvirtd; `pid` is the first process of its namespaces."""

    root: Root
    pid: int

    @property
    def uri(self) -> str:
        return f"qemu+unix:///system?socket={self.root.path('/run/libvirt/libvirt-sock')}"

    def inside(self, *command: str) -> str:
        """Run a command in the namespaces and return what it prints."""
        enter = ("nsenter", f"--target={self.pid}", "--mount", "--net", "--pid", "--")
        return _run(*enter, *command)

    def virsh(self, *command: str) -> str:
        return _run("virsh", "--connect", self.uri, *command)

    def stop(self) -> None:
        """End libvirtd alone, as an upgrade does; QEMUs run on."""
        pid = self.root.read("/run/libvirtd.pid")
        self.inside("kill", pid)
        self.inside("tail", "--pid", pid, "--sleep-interval", "0.1", "-f", "/dev/null")

    def start(self) -> None:
        self.inside("libvirtd", "--daemon")

    def qemu_pid(self, name: str) -> int:
        """The process of a running domain, as numbered outside."""
        inner = self.root.read(f"/run/libvirt/qemu/{name}.pid")
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):  # it has ended
                fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
                numbers = fields["NSpid"].split()
                if len(numbers) > 1 and numbers[-1] == inner and self._is_ours(status.parent):
                    return int(numbers[0])
        raise AssertionError(f"{name} has no process")

    def _is_ours(self, process: Path) -> bool:
        return (process / "ns/pid").readlink() == Path(f"/proc/{self.pid}/ns/pid").readlink()


def missing(directory: Path) -> str:
    """Say what this machine lacks to run one below `directory`; "" when it has all."""
    if os.geteuid() != 0:
        return "needs root"
    lacking = [program for program in PROGRAMS if not shutil.which(program, path=_SBIN)]
    if lacking:
        return f"needs {', '.join(lacking)}"
    probe = ("unshare", "--mount", "--net", "--pid", "--fork", "mount", "-t", "proc", "no", "/proc")
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"needs to make namespaces: {done.stderr.strip()}"
    try:  # disks have cache=none
        os.close(os.open(directory / "probe", os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except OSError:
        return f"needs O_DIRECT, which {directory} does not know: choose another --basetemp"
    return ""


@contextlib.contextmanager
def private_libvirtd(directory: Path) -> Iterator[Libvirtd]:
    """Run one whose files are all below `directory`, on a file system that knows O_DIRECT."""
    root = Root(directory)
    for folder in _FOLDERS:
        root.path(folder).mkdir(parents=True, exist_ok=True)
    root.path("/var/run").symlink_to("/run")
    root.write("/etc/libvirt/qemu.conf", _QEMU_CONF)
    root.write("/etc/libvirt/hooks/qemu.d/dgx-kvm", HOOK.read_text(), 0o755)
    root.write("/usr/bin/dgx-kvm", "#!/bin/sh\n", 0o755)  # the hook looks whether it is there
    root.write("/etc/libvirt/libvirtd.conf", _LIBVIRTD_CONF)
    namespaces = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child")
    process = subprocess.Popen(
        (*namespaces, "sh", "-c", _INIT, "init", str(directory)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": _SBIN, "LANG": "C.UTF-8"},
    )
    assert process.stdin and process.stdout
    try:
        said = process.stdout.readline()
        assert said == "ready\n", "libvirtd did not start; see var/log/libvirt/libvirtd.log"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        yield Libvirtd(root, int(children))
    finally:
        process.stdin.close()
        process.wait(timeout=30)


def _run(*command: str) -> str:
    environment = {"PATH": _SBIN, "LANG": "C.UTF-8"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout
