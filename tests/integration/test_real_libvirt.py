"""From vms.yaml to sixteen QEMUs and back, on a real libvirt."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from catalogues import describe

from dgx_kvm_sw.execute import JOURNAL, PREPARED, execute
from dgx_kvm_sw.guest import images
from dgx_kvm_sw.host.diskio import disk_io
from dgx_kvm_sw.model.actions import MarkRestartNeeded
from dgx_kvm_sw.model.errors import HypervisorError
from dgx_kvm_sw.reconcile import POOL_PATH, gather
from integration.claimed_host import ClaimedHost
from integration.running import Qemu

pytestmark = pytest.mark.integration

# Most have SeaBIOS: it gives up at once without an OS, where UEFI keeps a slow machine busy.
SIXTEEN = (
    "name: vm-0, firmware: uefi, vcpus: 4, disks: [{name: data, size: 1GiB}]",
    "name: vm-1, firmware: uefi, image: tiny",
    *(f"name: vm-{number}, firmware: bios" for number in range(2, 16)),
)
NAMES = tuple(f"vm-{number}" for number in range(16))

FOREIGN = """\
<domain type='qemu'><name>foreign</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>
"""
RANDOMNESS = "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"


@pytest.fixture(autouse=True)
def _image(claimed: ClaimedHost) -> None:
    root, path = claimed.site.root, "/usr/share/dgx-kvm/images/tiny.qcow2"
    if not root.exists(path):
        root.path(path).parent.mkdir(parents=True)
        words = ("qemu-img", "create", "-q", "-f", "qcow2", root.path(path), "256M")
        subprocess.run(words, check=True)
    describe(root, "tiny", path, virtual_size_bytes=256 << 20)


def qemu(claimed: ClaimedHost, name: str) -> Qemu:
    return Qemu(claimed.libvirtd.qemu_pid(name))


def pids(claimed: ClaimedHost) -> dict[str, int]:
    running = claimed.libvirtd.virsh("list", "--name").split()
    return {name: claimed.libvirtd.qemu_pid(name) for name in running}


def pinned(claimed: ClaimedHost, name: str) -> dict[int, str]:
    """What libvirt believes of the pins of a running domain's vCPUs."""
    rows = claimed.libvirtd.virsh("vcpupin", name, "--live").splitlines()[2:]
    return {int(row.split()[0]): row.split()[1] for row in rows if row.strip()}


def test_sixteen_vms_start_as_declared(claimed: ClaimedHost) -> None:
    claimed.reach()
    claimed.declare(SIXTEEN)
    begin = time.monotonic()
    outcome = claimed.apply()
    print(f"\n16 VMs made and started in {time.monotonic() - begin:.1f} s")
    # disk, define, prepare, start; vm-0 has two disks, vm-1 a seed
    assert outcome.done == 16 * 4 + 2
    assert set(pids(claimed)) == set(NAMES)
    for name in NAMES:
        process = qemu(claimed, name)
        vcpus = 4 if name == "vm-0" else 2
        cores = vcpus // 2
        assert f"-smp {vcpus},sockets=1,dies=1,cores={cores},threads=2\n" in process.arguments
        assert f'"iothread":"iothread1","num-queues":{vcpus},' in process.arguments
        assert '-object {"qom-type":"iothread","id":"iothread1"}\n' in process.arguments
        assert '"size":268435456,"host-nodes":[0],"policy":"bind"}\n' in process.arguments
        assert f'"mq":true,"vectors":{2 * vcpus + 2},' in process.arguments
        assert '"cache":{"direct":true,' in process.arguments
        assert f'"aio":"{disk_io(claimed.site.root)}"' in process.arguments
        pins = {vcpu: str(vcpu % 2) for vcpu in range(vcpus)}
        assert process.vcpu_affinity() == pinned(claimed, name) == pins
        assert process.helper_affinity() == {"0"}
    assert not claimed.plan().pending
    assert claimed.apply().done == 0


def test_files_of_a_running_vm(claimed: ClaimedHost) -> None:
    claimed.reach(*SIXTEEN)
    root = claimed.site.root
    for name in NAMES:
        assert root.exists(f"/var/log/libvirt/qemu/{name}.console.log")
        assert root.exists(f"{POOL_PATH}/{name}.os.qcow2")
        has_uefi = name in ("vm-0", "vm-1")
        assert root.exists(f"/var/lib/libvirt/qemu/nvram/{name}_VARS.fd") == has_uefi
    described = claimed.libvirtd.inside(
        "qemu-img", "info", "--force-share", "--output=json", f"{POOL_PATH}/vm-1.os.qcow2"
    )
    disk = json.loads(described)
    assert disk["backing-filename"] == images.catalogue(root).images["tiny"].base
    assert disk["virtual-size"] == 1 << 30


def test_serial_console_is_kept(claimed: ClaimedHost) -> None:
    claimed.reach("name: uefi")
    log = claimed.site.root.path("/var/log/libvirt/qemu/uefi.console.log")
    deadline = time.monotonic() + 60
    while b"BdsDxe" not in log.read_bytes():
        assert time.monotonic() < deadline, "the firmware says nothing on the serial console"
        time.sleep(0.2)


def test_changed_memory_waits_for_a_restart(claimed: ClaimedHost) -> None:
    claimed.reach(*SIXTEEN)
    before = pids(claimed)
    claimed.declare([*SIXTEEN[:15], f"{SIXTEEN[15]}, memory: 384MiB"])
    (row,) = claimed.plan().vms
    assert [(change.field, change.old, change.new) for change in row.changes[:1]] == [
        ("memory", "256MiB", "384MiB")
    ]
    claimed.apply()
    assert pids(claimed) == before
    assert '"size":268435456' in qemu(claimed, "vm-15").arguments
    plan = claimed.plan()
    assert plan.pending
    assert not [action for action in plan.actions if not isinstance(action, MarkRestartNeeded)]

    claimed.apply("--restart")
    after = pids(claimed)
    assert {name for name in NAMES if before[name] != after[name]} == {"vm-15"}
    assert '"size":402653184' in qemu(claimed, "vm-15").arguments
    assert not claimed.plan().pending


@pytest.mark.parametrize(
    ("command", "field"),
    [
        (("vcpupin", "vm", "1", "0", "--live"), "cpu pins"),
        (("vcpupin", "vm", "1", "0", "--config"), "cpu pins"),
        (("emulatorpin", "vm", "1", "--live"), "emulator pins"),
    ],
)
def test_moved_threads_are_moved_back(
    claimed: ClaimedHost, command: tuple[str, ...], field: str
) -> None:
    claimed.reach("name: vm, firmware: bios")
    before = pids(claimed)
    claimed.libvirtd.virsh(*command)
    (row,) = claimed.plan().vms
    assert [change.field for change in row.changes] == [field]
    claimed.apply()
    assert not claimed.plan().pending
    assert pids(claimed) == before
    assert qemu(claimed, "vm").vcpu_affinity() == {0: "0", 1: "1"}
    assert qemu(claimed, "vm").helper_affinity() == {"0"}


@pytest.mark.parametrize(
    ("command", "field"),
    [
        (("setmem", "vm", "128M", "--config"), "memory"),
        (("setvcpus", "vm", "1", "--config"), "vcpus"),
        (("attach-device", "vm", "/run/rng.xml", "--config"), "extra devices"),
        (("attach-device", "vm", "/run/rng.xml", "--live"), "extra devices"),
        (("attach-disk", "vm", "/run/x", "vdb", "--config"), "disks"),
        (("detach-disk", "vm", "vda", "--config"), "disks"),
        (("iothreadadd", "vm", "5", "--config"), "iothreads"),
        (("iothreadpin", "vm", "1", "1", "--config"), "iothreads"),
    ],
)
def test_drift_is_found_and_named(
    claimed: ClaimedHost, command: tuple[str, ...], field: str
) -> None:
    claimed.reach("name: vm, firmware: bios")
    claimed.site.root.write("/run/rng.xml", RANDOMNESS)
    claimed.libvirtd.inside("virsh", *command)
    (row,) = claimed.plan().vms
    assert field in [change.field for change in row.changes]
    claimed.apply("--restart")
    assert not claimed.plan().pending
    assert set(pids(claimed)) == {"vm"}


def test_pulled_plug_is_found(claimed: ClaimedHost) -> None:
    claimed.reach("name: vm, firmware: bios")
    claimed.libvirtd.virsh("destroy", "vm")
    (row,) = claimed.plan().vms
    assert ("state", "stopped", "running") in [(c.field, c.old, c.new) for c in row.changes]
    claimed.apply()
    assert set(pids(claimed)) == {"vm"}


@pytest.mark.parametrize("vms", [(), ("name: vm, firmware: bios, state: stopped",)])
def test_domain_undefined_while_it_runs_can_be_stopped(
    claimed: ClaimedHost, vms: tuple[str, ...]
) -> None:
    claimed.reach("name: vm, firmware: bios")
    claimed.libvirtd.virsh("undefine", "vm")
    claimed.declare(vms)
    claimed.apply("--restart", "--prune")  # it goes with its plug, so the next apply makes it
    claimed.reach(*vms)
    assert not pids(claimed)


def test_removed_disk_is_not_made_again_but_taken_when_it_is_back(claimed: ClaimedHost) -> None:
    claimed.reach("name: vm, firmware: bios, state: stopped")
    disk = claimed.site.root.path(f"{POOL_PATH}/vm.os.qcow2")
    away = disk.rename(disk.parent.parent / "away.qcow2")
    (refused,) = claimed.plan().unplaceable
    assert refused.reasons == (f"its disk {POOL_PATH}/vm.os.qcow2 is gone",)
    assert claimed.plan().actions == ()
    claimed.libvirtd.virsh("pool-refresh", "dgx-kvm")
    away.rename(disk)  # libvirt has to look to see it
    assert not claimed.plan().pending


def test_prune_keeps_disks_and_foreign_domains(claimed: ClaimedHost) -> None:
    claimed.reach("name: stays, firmware: bios", "name: goes")
    root = claimed.site.root
    root.write("/run/foreign.xml", FOREIGN)
    claimed.libvirtd.inside("virsh", "define", "/run/foreign.xml")
    claimed.libvirtd.virsh("start", "foreign")
    before = pids(claimed)
    claimed.declare(["name: stays, firmware: bios"])
    assert claimed.apply().done == 0
    assert pids(claimed) == before

    claimed.apply("--prune", "--restart")
    assert set(pids(claimed)) == {"stays", "foreign"}
    assert "goes" not in claimed.libvirtd.virsh("list", "--all", "--name")
    assert root.exists(f"{POOL_PATH}/goes.os.qcow2")
    assert not root.exists("/var/lib/libvirt/qemu/nvram/goes_VARS.fd")
    assert pids(claimed)["foreign"] == before["foreign"]
    assert claimed.plan().unmanaged == ("foreign",)
    claimed.libvirtd.virsh("destroy", "foreign")
    claimed.libvirtd.virsh("undefine", "foreign")


def test_everything_goes(claimed: ClaimedHost) -> None:
    claimed.reach(*SIXTEEN)
    claimed.declare([])
    claimed.apply("--prune", "--restart")
    assert not claimed.libvirtd.virsh("list", "--all", "--name").split()
    root = claimed.site.root
    assert root.names("/var/lib/libvirt/qemu/nvram") == []
    assert root.names(PREPARED) == []
    assert len(root.names(POOL_PATH)) >= 17
    claimed.declare(SIXTEEN)
    claimed.apply()  # on the disks that are there
    assert set(pids(claimed)) == set(NAMES)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_apply_is_completed_by_the_next(claimed: ClaimedHost, seed: int) -> None:
    claimed.reach()
    claimed.declare(SIXTEEN)
    journal = claimed.site.root.path(JOURNAL)
    lines = len(journal.read_text().splitlines())
    until = lines + random.Random(seed).randrange(1, 65)
    root, uri = str(claimed.site.root.directory), claimed.libvirtd.uri
    command = (sys.executable, "-m", "dgx_kvm_sw", "--root", root, "--connect", uri, "apply")
    tree = Path(__file__).parents[2]
    applying = subprocess.Popen(command, cwd=tree, stderr=subprocess.PIPE, text=True)
    while applying.poll() is None and len(journal.read_text().splitlines()) < until:
        time.sleep(0.005)
    applying.kill()
    _, said = applying.communicate()
    assert applying.returncode == -9, said
    claimed.apply()
    assert set(pids(claimed)) == set(NAMES)
    assert not claimed.plan().pending
    assert claimed.site.root.names(PREPARED) == []


def test_without_libvirtd(claimed: ClaimedHost) -> None:
    claimed.reach("name: vm, firmware: bios")
    before = pids(claimed)
    with claimed.site.hypervisor() as hypervisor:
        claimed.libvirtd.stop()
        with pytest.raises(HypervisorError) as broken:
            hypervisor.domains()
    with pytest.raises(HypervisorError) as refused:
        claimed.plan()
    for error in (broken.value, refused.value):
        assert "\n" not in error.message
        assert "libvirt" in error.message
    assert refused.value.hint
    claimed.libvirtd.start()
    assert not claimed.plan().pending
    assert pids(claimed) == before


def test_only_dgx_kvm_starts_its_vms(claimed: ClaimedHost) -> None:
    claimed.reach("name: vm, firmware: bios, state: stopped")
    with pytest.raises(AssertionError, match="vm is started by dgx-kvm only: run dgx-kvm start vm"):
        claimed.libvirtd.virsh("start", "vm")
    assert not pids(claimed)
    claimed.declare(["name: vm, firmware: bios"])
    claimed.apply()
    assert set(pids(claimed)) == {"vm"}


def test_side_by_side_and_one_by_one(claimed: ClaimedHost) -> None:
    """Sixteen starts: not a test of speed, but of both ways, and of what they take."""
    stopped = [f"{vm}, state: stopped" for vm in SIXTEEN]
    seconds = []
    for batches in ((NAMES,), tuple((name,) for name in NAMES)):
        claimed.reach(*stopped)
        assert not pids(claimed)
        begin = time.monotonic()
        with claimed.site.hypervisor() as hypervisor:
            found = gather(claimed.site, hypervisor, claimed.intent())
            for batch in batches:
                actions = tuple(action for name in batch for action in found.start_actions(name))
                done = execute(claimed.site, hypervisor, found.platform, actions, {}, {})
                assert not done.failures
        seconds.append(time.monotonic() - begin)
        assert set(pids(claimed)) == set(NAMES)
    print(f"\n16 starts: side by side {seconds[0]:.1f} s, one by one {seconds[1]:.1f} s")


def test_a_seed_is_attached_and_the_next_apply_does_nothing(claimed: ClaimedHost) -> None:
    claimed.reach("name: seeded, firmware: bios, image: tiny")
    root = claimed.site.root
    seed = f"{POOL_PATH}/seeded.seed.iso"
    arguments = qemu(claimed, "seeded").arguments
    assert f'"filename":"{seed}"' in arguments and "ide-cd" in arguments
    before = root.path(seed).stat()
    assert before.st_mode & 0o077 == 0
    assert not claimed.plan().pending
    assert claimed.apply().done == 0
    claimed.declare(["name: seeded, firmware: bios, image: tiny, user: ann"])
    assert not claimed.plan().actions
    assert root.path(seed).stat() == before
    claimed.reach()
    assert not root.exists(seed)
