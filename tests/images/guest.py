"""A VM in QEMU without KVM, made from an image as dgx-kvm makes it: an overlay, a seed, an agent.

What it may reach of a network is nothing; what may reach it is a port of this machine's loopback.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OVMF = Path("/usr/share/OVMF")
DISK_GIB = 12
CPUS = 2
BOOT_SECONDS = 1500  # on a machine of two busy cores one takes some minutes
MAC = "52:54:00:12:34:56"
USER = "tester"


@dataclass(frozen=True)
class Guest:
    """A VM that runs, and how to speak to it."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    def ssh(self, command: str, seconds: int = 120) -> str:
        """Run a command as root in the guest."""
        done = subprocess.run(
            ("ssh", "-F", "none", "-i", self.folder / "key", "-p", str(self.port),
             "-o", "StrictHostKeyChecking=accept-new", "-o", "BatchMode=yes",
             "-o", f"UserKnownHostsFile={self.folder}/known", "-o", "ConnectTimeout=60",
             f"{USER}@127.0.0.1", "sudo", "sh", "-c", f"'{command}'"),
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip
        if done.returncode:
            fault = NoAnswerError if done.returncode == 255 else GuestError
            raise fault(f"{command}: exit {done.returncode}: {done.stderr}\n{done.stdout}")
        return done.stdout

    def wait_for_first_boot(self) -> None:
        """Wait until the key of the seed opens the guest and cloud-init has done all."""
        for _ in range(BOOT_SECONDS // 5):
            # Meanwhile the SSH server is started again, when it has got its keys.
            with contextlib.suppress(NoAnswerError, subprocess.TimeoutExpired):
                self.ssh("cloud-init status --wait", seconds=900)
                return
            if self.process.poll() is not None:
                break
            time.sleep(5)
        raise GuestError(f"no answer by ssh; its console:\n{self.console()[-4000:]}")

    def agent(self, command: str, seconds: float = 60) -> Any:
        """Ask the guest agent."""
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(seconds)
            channel.connect(str(self.folder / "agent"))
            channel.sendall(json.dumps({"execute": command}).encode() + b"\n")
            answer = channel.makefile("rb").readline()
        return json.loads(answer)["return"]

    def console(self) -> str:
        return (self.folder / "console").read_text(errors="replace")


class GuestError(Exception):
    """The guest does not do what was asked."""


class NoAnswerError(GuestError):
    """SSH itself failed."""


@contextlib.contextmanager
def booted(image: Path, firmware: str, folder: Path) -> Iterator[Guest]:
    """Start a VM; it is off at the end of the `with`."""
    key = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", folder / "key")
    subprocess.run(key, check=True)
    _make_seed(folder)
    overlay = folder / "vm.os.qcow2"
    subprocess.run(
        ("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", image, overlay,
         f"{DISK_GIB}G"),
        check=True,
    )  # fmt: skip
    port = _free_port()
    command = _command(overlay, firmware, port, folder)
    with (folder / "qemu.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield Guest(folder, port, process)
    finally:
        process.kill()
        process.wait()


def _command(overlay: Path, firmware: str, port: int, folder: Path) -> list[str]:
    uefi: list[str] = []
    if firmware == "uefi":
        shutil.copy(OVMF / "OVMF_VARS_4M.fd", folder / "vars.fd")
        uefi = [
            "-drive", f"if=pflash,format=raw,readonly=on,file={OVMF}/OVMF_CODE_4M.fd",
            "-drive", f"if=pflash,format=raw,file={folder}/vars.fd",
        ]  # fmt: skip
    return [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "max",
        "-smp", str(CPUS), "-m", "2048", "-nodefaults", "-no-user-config", "-display", "none",
        *uefi, "-serial", f"file:{folder}/console",
        "-drive", f"if=none,id=os,file={overlay},format=qcow2,cache=unsafe,discard=unmap",
        "-device", "virtio-blk-pci,drive=os,bootindex=1",
        "-drive", f"if=none,id=seed,media=cdrom,readonly=on,format=raw,file={folder}/seed.iso",
        "-device", "ide-cd,drive=seed",
        "-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22",
        "-device", f"virtio-net-pci,netdev=net,mac={MAC}",
        "-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
        "-chardev", f"socket,id=agent,server=on,wait=off,path={folder}/agent",
        "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
    ]  # fmt: skip


def _make_seed(folder: Path) -> None:
    public = (folder / "key.pub").read_text().strip()
    seed = folder / "seed"
    seed.mkdir()
    (seed / "meta-data").write_text("instance-id: one\nlocal-hostname: lab\n")
    (seed / "user-data").write_text(
        "#cloud-config\n"
        f"users: [{{name: {USER}, ssh_authorized_keys: ['{public}'], shell: /bin/bash,"
        " sudo: 'ALL=(ALL) NOPASSWD:ALL'}]\n"
    )
    # What no fallback would come to: only the second version can say it.
    (seed / "network-config").write_text(
        "version: 2\nethernets:\n  lan0:\n"
        f"    match: {{macaddress: '{MAC}'}}\n    set-name: lan0\n"
        "    addresses: [10.0.2.15/24]\n    gateway4: 10.0.2.2\n"
        "    nameservers: {addresses: [10.0.2.3]}\n"
    )
    subprocess.run(
        ("xorriso", "-as", "mkisofs", "-quiet", "-V", "cidata", "-J", "-r",
         "-o", folder / "seed.iso", seed),
        check=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
