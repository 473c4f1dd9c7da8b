"""A machine: its power button, its root shell, files in and out, and what it leaves behind."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from lab import control
from lab.cache import ROOT, say, step
from lab.console import LONGEST, Qmp, Result, Shell, Silence
from lab.devices import CONTROL
from lab.packages import LabError
from lab.qemu import Hardware, command
from lab.shape import SHAPES
from lab.tools import Tools

BOOT = 900  # seconds; many times what the smallest machine needs on an idle host
ANSWER = 300.0  # seconds; for what takes one, on a host with other work to do
COPY = 1800.0  # seconds; archives may hold images
STUCK = ("grub>", "grub rescue>", "(initramfs)", "end Kernel panic", "emergency mode")
SHARED = (
    "mkdir -p /run/lab && mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 lab /run/lab"
)
# Under load networkd gives up making the bridge, for good; a NIC without it would go to VMs.
BRIDGED = """\
for second in $(seq 300); do
    ls -d /sys/class/net/br0/brif/en* >/dev/null 2>&1 && exit
    [ $((second % 60)) != 0 ] || systemctl restart systemd-networkd
    sleep 1
done
echo br0 has no NIC
exit 1"""


class Machine:
    """An emulated host, from power on to power cut; leaves no process and no socket.

    Its files stay in `.cache/lab/runs/NAME` until the next machine of this name: console.log,
    shell.log, devices.log, qemu.log, and the overlay of the disk.
    """

    def __init__(self, tools: Tools, hardware: Hardware, name: str = "host") -> None:
        self.tools = tools
        self.hardware = hardware
        self.name = name
        self.real = ROOT / "runs" / name
        shutil.rmtree(self.real, ignore_errors=True)
        self.real.mkdir(parents=True)
        # Paths of unix sockets are at most 107 bytes, so they lead through a short link.
        self.short = Path(tempfile.mkdtemp(prefix="dgx-lab-"))
        self.directory = self.short / "m"
        self.directory.symlink_to(self.real)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.shell: Shell | None = None
        self.boot_id = ""

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if isinstance(error, Exception):
            say(f"{self.name}: its logs are in {self.real}, its disk is {self.hardware.disk}")

    # --- power

    def boot(self, timeout: float = BOOT) -> None:
        """Press the power button and wait until systemd has started all."""
        with step(f"{self.name}: boot"):
            self.power_on()
            self.wait_for_shell(timeout)
            self.settled(timeout)

    def power_on(self) -> None:
        """Start QEMU and the devices; a machine that was cut off starts from its disk again."""
        if "qemu" in self.processes:
            raise LabError(f"{self.name} is on")
        if self.hardware.served:
            self._start_devices()
        self.boot_id = ""
        for leftover in ("console.sock", "shell.sock", "qmp.sock"):
            (self.directory / leftover).unlink(missing_ok=True)
        self._start("qemu", command(self.tools, self.hardware, self.directory))

    def wait_for_shell(self, timeout: float = BOOT) -> None:
        """Wait until the shell of another boot than the last one answers. It does so long before
        systemd has started all; `settled` waits for that.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                if self.shell is None:
                    self.shell = Shell(self.directory / "shell.sock", timeout=2)
                self.boot_id = self.shell.hello(5, other_than=self.boot_id)
                return
            except Silence as error:
                if self.processes["qemu"].poll() is not None:
                    raise self._failure("QEMU ended") from error
                end = self.console()[-500:]
                if stuck := next((word for word in STUCK if word in end), ""):
                    raise self._failure(f"stuck at {stuck!r}") from error
                if time.monotonic() > deadline:
                    raise self._failure(f"no shell after {timeout:.0f} s") from error

    def reboot(self, timeout: float = BOOT) -> None:
        """Reboot as an administrator does; returns when systemd has started all."""
        with step(f"{self.name}: reboot"):
            self._shell().send("systemctl reboot")
            self.wait_for_shell(timeout)
            self.settled(timeout)

    def power_off(self, timeout: float = ANSWER) -> None:
        """Shut down as an administrator does."""
        with step(f"{self.name}: power off"):
            self._shell().send("systemctl poweroff")
            try:
                self.processes["qemu"].wait(timeout)
            except subprocess.TimeoutExpired as error:
                raise self._failure("it does not go off") from error
        self.power_cut()

    def power_cut(self) -> None:
        """Pull the plug. What the host had not yet written to its drive is lost."""
        self._stop("qemu")
        self.detach()

    def detach(self) -> None:
        """Leave the shell to another process; `boot_id` tells it which boot this is."""
        if self.shell:
            self.shell.close()
            self.shell = None

    def close(self) -> None:
        """Pull the plug and end all that was started for this machine."""
        self.power_cut()
        self._stop("devices")
        shutil.rmtree(self.short, ignore_errors=True)

    # --- in the machine

    def run(self, text: str, timeout: float = ANSWER) -> Result:
        """Run a bash script as root; its end is waited for."""
        if len(text.encode()) > LONGEST:
            script = self._share("script", text.encode())
            text = f"{SHARED} && cp /run/lab/{script} /run/; umount /run/lab; bash /run/{script}"
        shell = self._shell()
        try:
            return shell.answer(shell.send(text), timeout)
        except Silence as error:
            raise self._failure(f"`{text[:200]}` gave no answer in {timeout:.0f} s") from error

    def check(self, text: str, timeout: float = ANSWER) -> str:
        """The output of a script that has to succeed."""
        result = self.run(text, timeout)
        if result.code:
            raise LabError(f"{self.name}: `{text}` ended with {result.code}:\n{result.output}")
        return result.output

    def settled(self, timeout: float = BOOT) -> str:
        """Wait until systemd has started all, udev has a driver for each device and the bridge
        its NIC; systemd's word for the state, such as `running`.
        """
        state = self.run("systemctl is-system-running --wait", timeout).output.strip()
        self.check(f"udevadm settle --timeout={timeout:.0f}", timeout + ANSWER)
        self.check(BRIDGED, timeout)
        return state

    def put(self, source: Path, target: str) -> None:
        """Copy a file into the machine; its mode is kept."""
        name = self._share(source.name, source.read_bytes(), source.stat().st_mode & 0o777)
        where, name = shlex.quote(target), shlex.quote(name)
        script = f"{SHARED} && cp -p /run/lab/{name} {where}; r=$?; umount /run/lab; exit $r"
        self.check(script, COPY)
        (self.directory / "share" / shlex.split(name)[0]).unlink()

    def unpack(self, archive: Path, folder: str) -> None:
        """Have what one folder of a tar holds in this folder of the machine."""
        self.put(archive, "/srv/archive.tar")
        self.check(
            f"mkdir -p {folder} && tar -xf /srv/archive.tar -C {folder} --strip-components=1"
            " --no-same-owner && rm /srv/archive.tar",
            COPY,
        )

    def get(self, source: str) -> bytes:
        """A file of the machine."""
        where = shlex.quote(source)
        self.check(f"{SHARED} && cp {where} /run/lab/out; r=$?; umount /run/lab; exit $r")
        file = self.directory / "share" / "out"
        data = file.read_bytes()
        file.unlink()
        return data

    # --- beside it

    def qmp(self, name: str, **arguments: Any) -> Any:
        """Ask QEMU itself."""
        monitor = Qmp(self.directory / "qmp.sock")
        with contextlib.closing(monitor):
            return monitor.execute(name, **arguments)

    def devices(self) -> control.Client:
        """What the emulated GPUs and NVSwitches have seen; close it, or use `with`."""
        return control.Client(self.directory / CONTROL)

    def console(self) -> str:
        """What the first serial port has shown since the machine was made."""
        log = self.directory / "console.log"
        return log.read_text(errors="replace") if log.exists() else ""

    # ---

    def _share(self, name: str, data: bytes, mode: int = 0o644) -> str:
        file = self.directory / "share" / name
        file.write_bytes(data)
        file.chmod(mode)
        return name

    def _shell(self) -> Shell:
        if self.shell is None:
            raise LabError(f"{self.name} is off")
        return self.shell

    def _start_devices(self) -> None:
        if "devices" in self.processes:
            return
        shape = SHAPES / f"{self.hardware.shape.name}.yaml"
        arguments = ["--shape", str(shape), "--directory", str(self.directory)]
        self._start("devices", [sys.executable, "-u", "-m", "lab.devices", *arguments])
        log, deadline = self.directory / "devices.log", time.monotonic() + 15
        while not log.read_text().endswith("ready\n"):
            if time.monotonic() > deadline or self.processes["devices"].poll() is not None:
                raise LabError(f"{self.name}: no devices: {log.read_text()[-2000:]}")
            time.sleep(0.1)

    def _start(self, name: str, argv: list[str]) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            # It ends with us, whatever ends us.
            self.processes[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                env={**self.tools.environment(), "PYTHONPATH": str(SHAPES.parents[1])},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _stop(self, name: str) -> None:
        process = self.processes.pop(name, None)
        if process:
            process.kill()
            process.wait()

    def _failure(self, text: str) -> LabError:
        console = "\n".join(self.console().splitlines()[-25:])
        qemu = (self.directory / "qemu.log").read_text()[-1000:]
        return LabError(
            f"{self.name}: {text}\n{qemu}\n--- end of {self.real}/console.log:\n{console}"
        )


def overlay(tools: Tools, base: Path, file: Path) -> Path:
    """A new disk that begins as `base` and leaves it as it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    tools.run(
        "bin/qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(file)
    )
    return file


@contextlib.contextmanager
def running(tools: Tools, hardware: Hardware, name: str = "host") -> Iterator[Machine]:
    """A machine that has booted; off and gone at the end."""
    with Machine(tools, hardware, name) as machine:
        machine.boot()
        yield machine
