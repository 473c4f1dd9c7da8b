"""A reboot of a guest is a reboot; whatever else turns a VM off leaves it off."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from catalogues import describe

from dgx_kvm_sw.decide.reboots import MOST_REBOOTS
from dgx_kvm_sw.execute import JOURNAL, PREPARED, locked_site
from dgx_kvm_sw.guest import hypervisor
from dgx_kvm_sw.guest.hypervisor import Hypervisor
from dgx_kvm_sw.model.errors import HypervisorError
from dgx_kvm_sw.reconcile import POOL_PATH
from integration.claimed_host import ClaimedHost
from integration.key_guest import boot_disk

pytestmark = pytest.mark.integration

TREE = Path(__file__).parents[2]
VM = "name: {}, firmware: bios, image: keys"
ONE, TWO = VM.format("one"), VM.format("two")
FOREIGN = """\
<domain type='qemu'><name>foreign</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os><on_reboot>destroy</on_reboot></domain>
"""


def until(what: str, true: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited in vain for: {what}"
        time.sleep(0.05)


class Guests:
    """The guests of a host, by their names, and a watcher of them."""

    def __init__(self, host: ClaimedHost) -> None:
        self.host = host
        self.virsh = host.libvirtd.virsh
        self.root = host.site.root
        self._seen: dict[str, int] = {}
        self.log = self.root.path("/run/watch.log")
        self.watcher = self._command("watch", self.log.open("wb"))
        until("the watcher", lambda: "Waiting for reboots" in self.said)

    def _command(self, words: str, output: object = None) -> subprocess.Popen[bytes]:
        where = ("--root", str(self.root.directory), "--connect", self.host.libvirtd.uri)
        command = (sys.executable, "-m", "dgx_kvm_sw", *where, *words.split())
        return subprocess.Popen(command, cwd=TREE, stdout=output, stderr=subprocess.STDOUT)  # type: ignore[call-overload, no-any-return]

    def dgx_kvm(self, words: str) -> subprocess.Popen[bytes]:
        return self._command(words, subprocess.PIPE)

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def journal(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.root.read(JOURNAL).splitlines()]

    def running(self) -> set[str]:
        return set(self.virsh("list", "--name").split())

    def _readies(self, name: str) -> int:
        return self.root.read(f"/var/log/libvirt/qemu/{name}.console.log", "").count("ready")

    def await_ready(self, name: str) -> None:
        """Wait until the guest has booted since the last time this was asked."""
        until(f"{name} is up", lambda: self._readies(name) > self._seen.get(name, 0))
        self._seen[name] = self._readies(name)

    def press(self, name: str, key: str) -> None:
        self.virsh("send-key", name, f"KEY_{key}")

    def await_off(self, name: str) -> None:
        until(f"{name} is off", lambda: name not in self.running())

    def reboots(self, name: str) -> None:
        """Let it reboot and be back, by which time the watcher knows all that was before."""
        self.press(name, "R")
        self.await_ready(name)


@pytest.fixture
def guests(claimed: ClaimedHost) -> Iterator[Guests]:
    root, path = claimed.site.root, "/usr/share/dgx-kvm/images/keys.img"
    root.path(path).parent.mkdir(parents=True, exist_ok=True)
    root.path(path).unlink(missing_ok=True)  # the base is a link to it
    disk = boot_disk()
    root.path(path).write_bytes(disk)
    describe(root, "keys", path, format="raw", virtual_size_bytes=len(disk))
    claimed.reach()
    for log in root.path("/var/log/libvirt/qemu").glob("*.console.log"):
        log.unlink()
    root.remove(JOURNAL)
    found = Guests(claimed)
    claimed.declare([ONE, TWO])
    claimed.apply()
    for name in ("one", "two"):
        found.await_ready(name)
    yield found
    found.watcher.kill()
    found.watcher.wait()


def test_a_reboot_is_started_again_through_the_fabric_and_the_hook(guests: Guests) -> None:
    before = guests.host.libvirtd.qemu_pid("one")
    lines = len(guests.journal)
    guests.reboots("one")
    until("the end of it", lambda: "Done: 1 started." in guests.said)
    assert guests.host.libvirtd.qemu_pid("one") != before
    entries = [(e["event"], e.get("action", "")) for e in guests.journal[lines:]]
    assert entries == [
        ("rebooted", ""),
        ("plan", ""),
        ("done", "PreparePartition"),
        ("done", "StartDomain"),
        ("end", ""),
    ]
    assert guests.root.names(PREPARED) == []
    assert guests.said.splitlines()[1:] == ["Rebooted: one.", "Done: 1 started."]
    assert "custom-monitor" not in guests.root.read("/var/log/libvirt/qemu/one.log")


def test_other_ways_to_reboot(guests: Guests) -> None:
    guests.press("one", "T")  # a triple fault
    guests.await_ready("one")
    guests.virsh("reset", "two")
    guests.await_ready("two")
    assert guests.running() == {"one", "two"}


def test_a_guest_that_hears_nothing_yet_is_asked_again(
    guests: Guests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is still booting: ours never listens to its power button."""
    monkeypatch.setattr(hypervisor, "_ASK_AGAIN_SECONDS", 0.5)
    uri = guests.host.libvirtd.uri
    event = ("qemu-monitor-event", "one", "POWERDOWN", "--loop", "--timeout", "6")
    asked = subprocess.Popen(("virsh", "--connect", uri, *event), stdout=subprocess.PIPE, text=True)
    with contextlib.closing(Hypervisor(uri)) as connection:
        uuid = guests.virsh("domuuid", "one").strip()
        with pytest.raises(HypervisorError, match="one did not shut down within 2 s"):
            connection.shut_down("one", uuid, 2, force=False)
    assert asked.communicate()[0].count("event POWERDOWN") in (3, 4, 5)


def test_a_paused_guest_is_not_asked_but_its_plug_can_be_pulled(guests: Guests) -> None:
    """As one whose disk has no room; libvirt refuses to shut it down."""
    guests.virsh("suspend", "one")
    with contextlib.closing(Hypervisor(guests.host.libvirtd.uri)) as connection:
        uuid = guests.virsh("domuuid", "one").strip()
        with pytest.raises(HypervisorError, match="one is paused"):
            connection.shut_down("one", uuid, 30, force=False)
    assert guests.dgx_kvm("stop one --force --timeout 30").wait() == 0
    assert guests.running() == {"two"}


@pytest.mark.parametrize("how", ["power off", "destroy", "dgx-kvm stop"])
def test_what_was_turned_off_stays_off(guests: Guests, how: str) -> None:
    if how == "power off":
        guests.press("one", "P")
    elif how == "destroy":
        guests.virsh("destroy", "one")
    else:
        assert guests.dgx_kvm("stop one --force --timeout 0").wait() == 0
    guests.await_off("one")
    guests.reboots("two")
    assert guests.running() == {"two"}
    assert "Rebooted: one" not in guests.said


def test_a_guest_that_reboots_while_it_is_being_stopped(guests: Guests) -> None:
    lines = len(guests.journal)
    stop = guests.dgx_kvm("stop one --timeout 30")
    until("the stop", lambda: len(guests.journal) > lines)
    time.sleep(0.5)  # it has asked the guest, which does not hear ACPI
    guests.press("one", "R")
    assert stop.wait() == 0
    guests.reboots("two")
    assert guests.running() == {"two"}
    assert "one was stopped meanwhile: it stays off.\n" in guests.said
    assert guests.dgx_kvm("start one").wait() == 0
    guests.await_ready("one")
    guests.reboots("one")  # what was stopped once is not left off for ever


def test_another_command_is_waited_for(guests: Guests) -> None:
    with locked_site(guests.host.site, "test"):
        guests.press("one", "R")
        guests.await_off("one")
        until("the watcher knows", lambda: "Rebooted: one" in guests.said)
        time.sleep(0.5)
        assert guests.running() == {"two"}
    guests.await_ready("one")


def test_a_stop_that_waits_beside_the_watcher_is_obeyed_whoever_is_first(guests: Guests) -> None:
    with locked_site(guests.host.site, "test"):
        guests.press("one", "R")
        guests.await_off("one")
        stop = guests.dgx_kvm("stop one --wait 30 --force --timeout 0")
        time.sleep(1)
    assert stop.wait() == 0
    guests.reboots("two")
    assert guests.running() == {"two"}


def test_a_stop_between_off_and_start_is_obeyed(guests: Guests) -> None:
    """It finds the VM off already."""
    guests.watcher.send_signal(signal.SIGSTOP)
    guests.press("one", "R")
    guests.await_off("one")
    assert guests.dgx_kvm("stop one").wait() == 0
    guests.watcher.send_signal(signal.SIGCONT)
    guests.reboots("two")
    assert guests.running() == {"two"}


def test_who_was_started_by_another_command_is_not_started_twice(guests: Guests) -> None:
    guests.watcher.send_signal(signal.SIGSTOP)
    guests.press("one", "R")
    guests.await_off("one")
    guests.host.apply()
    guests.await_ready("one")
    pid = guests.host.libvirtd.qemu_pid("one")
    guests.watcher.send_signal(signal.SIGCONT)
    guests.reboots("two")
    assert guests.host.libvirtd.qemu_pid("one") == pid
    assert "one is running already\n" in guests.said
    assert "dgx-kvm: " not in guests.said


def test_a_loop_of_reboots_is_left_off(guests: Guests) -> None:
    for _ in range(MOST_REBOOTS):
        guests.reboots("one")
    guests.press("one", "R")
    guests.await_off("one")
    guests.reboots("two")
    assert guests.running() == {"two"}
    often = "more than 5 times within 10 minutes"
    assert f"dgx-kvm: one has rebooted {often}: it is left off\n" in guests.said
    (entry,) = [entry for entry in guests.journal if entry["event"] == "left off"]
    assert (entry["vm"], entry["error"]) == ("one", often)


@pytest.mark.parametrize("broken", ["disk", "file"])
def test_a_start_that_fails_is_said_once_and_the_next_is_done(guests: Guests, broken: str) -> None:
    spec = guests.root.path("/etc/dgx-kvm/vms.yaml")
    text = spec.read_text()
    if broken == "disk":
        guests.root.path(f"{POOL_PATH}/one.os.qcow2").unlink()
    else:
        spec.write_text("version: 2\n")
    guests.press("one", "R")
    sentence = {
        "disk": "dgx-kvm: could not start one: libvirt could not start one: ",
        "file": "dgx-kvm: one stays off: a file has mistakes\n",
    }[broken]
    until(sentence, lambda: sentence in guests.said)
    spec.write_text(text)
    guests.reboots("two")
    assert guests.running() == {"two"}
    assert guests.said.count(sentence) == 1


def test_domains_of_others_are_left_alone_without_a_word(guests: Guests) -> None:
    guests.root.write("/run/foreign.xml", FOREIGN)
    guests.host.libvirtd.inside("virsh", "define", "/run/foreign.xml")
    guests.virsh("start", "foreign")
    guests.virsh("reset", "foreign")
    guests.await_off("foreign")
    guests.reboots("two")
    assert guests.running() == {"one", "two"}
    assert "foreign" not in guests.said
    guests.virsh("undefine", "foreign")


def test_the_end_of_libvirtd_ends_it_with_a_sentence(guests: Guests) -> None:
    guests.host.libvirtd.stop()
    try:
        assert guests.watcher.wait(timeout=10) == 1
    finally:
        guests.host.libvirtd.start()
    assert guests.said.endswith("dgx-kvm: libvirt has closed the connection\n")


def test_an_idle_watcher_ends_at_once_by_a_signal(guests: Guests) -> None:
    guests.watcher.terminate()
    assert guests.watcher.wait(timeout=5) == -signal.SIGTERM


def test_a_signal_lets_it_finish_the_start_under_way(guests: Guests) -> None:
    """The unit counts this exit code as success."""
    slow = "/etc/libvirt/hooks/qemu.d/slow"
    guests.root.write(slow, '#!/bin/sh\n[ "$2" != prepare ] || sleep 2\n', 0o755)
    try:
        guests.press("one", "R")
        until("its preparation", lambda: guests.root.names(PREPARED))
        guests.watcher.terminate()
        assert guests.watcher.wait(timeout=20) == 128 + signal.SIGTERM
    finally:
        guests.root.remove(slow)
    assert guests.running() == {"one", "two"}
    assert guests.root.names(PREPARED) == []
