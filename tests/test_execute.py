"""execute(): whatever stops it and wherever, the next apply ends in what is declared."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import libvirt
import pytest
from hosts import ALL, SimulatedHost
from machines import bind, own

from dgx_kvm_sw import execute as module
from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.decide.plan import Intent
from dgx_kvm_sw.execute import (
    JOURNAL,
    PREPARED,
    Event,
    Outcome,
    Power,
    Stage,
    execute,
    locked_site,
)
from dgx_kvm_sw.guest.hypervisor import POOL, Hypervisor
from dgx_kvm_sw.guest.simulated import SimulatedHypervisor
from dgx_kvm_sw.host.fabric import VfioFabric
from dgx_kvm_sw.model.actions import Action, PreparePartition, StartDomain
from dgx_kvm_sw.model.domain import CurrentState
from dgx_kvm_sw.model.errors import BusyError, HostError
from dgx_kvm_sw.model.pci import PciAddress
from dgx_kvm_sw.model.platform import Partition
from dgx_kvm_sw.reconcile import LOCK, POOL_PATH

Host = Callable[..., SimulatedHost]

BEFORE = (
    "name: left, gpus: 1, pin: [0]",
    "name: right, gpus: 1, pin: [1]",
    "name: grows, gpus: 1, vcpus: 4",
    "name: stops, gpus: 0",
    "name: gone, gpus: 2, disks: [{name: data, size: 1GiB}]",
)
AFTER = (
    "name: left, gpus: 1, pin: [1]",
    "name: right, gpus: 1, pin: [0]",
    "name: grows, gpus: 2, disks: [{name: data, size: 1GiB}]",
    "name: stops, gpus: 0, state: stopped",
    "name: new, gpus: 2, networks: [{bridge: br0}]",
)


@pytest.fixture
def h100(host: Host) -> SimulatedHost:
    return host("dgx-h100")


def journal(host: SimulatedHost) -> list[dict[str, object]]:
    return [json.loads(line) for line in host.root.read(JOURNAL).splitlines()]


def happened(failures: tuple[tuple[Action, Exception], ...]) -> list[str]:
    return [f"{type(action).__name__} {action.vm}" for action, _ in failures]


def marks(host: SimulatedHost) -> list[str]:
    return host.root.names(PREPARED)


# -- killed anywhere --------------------------------------------------------------------------


@pytest.fixture
def changing(h100: SimulatedHost) -> SimulatedHost:
    """A host on which nearly everything is about to change, beside a domain of somebody else."""
    h100.foreign("theirs", pins=(5,), memory=2)
    h100.declare(*BEFORE)
    h100.settle()
    h100.declare(*AFTER)
    return h100


def in_child(work: Callable[[], object]) -> int:
    """Run in a process of its own; return its exit status as wait() gives it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_at(host: SimulatedHost, number: int) -> bool:
    """Apply in a process that is killed at the event of this number; False if there is none."""
    events: Iterator[int] = iter(range(number + 1))

    def report(event: Event) -> None:
        if next(events, -1) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    status = in_child(lambda: host.apply(ALL, report))
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def restore(host: SimulatedHost, files: dict[str, bytes]) -> None:
    for path in set(host.files()) - files.keys():
        Path(path).unlink()
    for path, content in files.items():
        Path(path).write_bytes(content)
    for mark in marks(host):
        host.root.remove(f"{PREPARED}/{mark}")


def different(found: CurrentState, wanted: CurrentState) -> list[str]:
    """Every fact that is not as in an undisturbed run, as words."""
    words = [
        f"{domain.name} {part} {field.name}: {getattr(ours, field.name)} != {theirs}"
        for domain in found.domains
        for part in ("facts", "live")
        if (ours := getattr(domain, part)) and (other := wanted.domain(domain.name))
        for field in fields(ours)
        if getattr(ours, field.name) != (theirs := getattr(getattr(other, part), field.name, None))
    ]
    return words if words or found == wanted else [f"{found} != {wanted}"]


@pytest.mark.parametrize("part", range(4))
def test_an_apply_killed_anywhere_is_finished_by_the_next(
    changing: SimulatedHost, part: int
) -> None:
    start = changing.files()
    changing.settle(ALL)
    wanted = changing.state()
    assert [domain.name for domain in wanted.domains] == [
        "grows", "left", "new", "right", "stops", "theirs",
    ]  # fmt: skip
    number = part
    while True:
        restore(changing, start)
        if not killed_at(changing, number):
            break
        changing.settle(ALL)
        assert different(changing.state(), wanted) == [], f"killed at event {number}"
        assert marks(changing) == []
        assert changing.plan(ALL).actions == ()
        number += 4
    assert number >= 40


def test_an_apply_killed_again_and_again_ends_too(changing: SimulatedHost) -> None:
    start = changing.files()
    changing.settle(ALL)
    wanted = changing.state()
    restore(changing, start)
    rounds = 0
    while killed_at(changing, 13):  # at least one of four VMs that start together has started
        rounds += 1
        assert rounds < 40
    assert changing.state() == wanted


@pytest.mark.parametrize("method", ["delete_volume", "undefine"])
def test_a_deletion_killed_half_way_leaves_no_disk_behind(
    changing: SimulatedHost, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A disk without its VM would be given, with its data, to the next VM of that name."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(SimulatedHypervisor, method, die)
        assert in_child(lambda: changing.apply(ALL)) == signal.SIGKILL
    assert changing.state().domain("gone") is not None
    changing.settle(ALL)
    assert changing.state().domain("gone") is None
    assert [v.name for v in changing.state().volumes if v.name.startswith("gone.")] == []


def test_a_mark_left_by_a_killed_apply_starts_nothing_by_hand(changing: SimulatedHost) -> None:
    """It was good for one start of one apply; the hook would let any `virsh start` pass."""

    def report(event: Event) -> None:
        if event.stage is Stage.DONE and isinstance(event.action, PreparePartition):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(lambda: changing.apply(ALL, report)) == signal.SIGKILL
    assert marks(changing)
    changing.declare(*(vm + ", state: stopped" for vm in AFTER if "state" not in vm))
    changing.apply(Intent())
    assert marks(changing) == []


# -- two at once ------------------------------------------------------------------------------


def test_of_two_applies_one_works_and_the_other_is_told_who(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 1")
    fork = multiprocessing.get_context("fork")
    inside, leave = fork.Event(), fork.Event()

    def first() -> None:
        with locked_site(h100.site, "apply"):
            inside.set()
            leave.wait(20)
            h100.settle()

    worker = fork.Process(target=first)
    worker.start()
    assert inside.wait(20)
    with pytest.raises(BusyError) as caught, locked_site(h100.site, "apply"):
        pytest.fail("two processes hold the lock")
    assert f"`dgx-kvm apply` (process {worker.pid})" in caught.value.message
    leave.set()
    worker.join(20)
    assert worker.exitcode == 0
    with locked_site(h100.site, "apply"):
        assert not h100.plan().pending


def test_the_lock_goes_with_a_killed_process(h100: SimulatedHost) -> None:
    def die() -> None:
        with locked_site(h100.site, "apply"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == signal.SIGKILL
    with locked_site(h100.site, "apply"):
        assert str(os.getpid()) in h100.root.read(LOCK)


# -- failures ---------------------------------------------------------------------------------


def test_a_failing_action_stops_its_vm_and_no_other(tmp_path: Path) -> None:
    host = SimulatedHost(own("dgx-h100", tmp_path))
    host.declare("name: a, gpus: 1, pin: [0]", "name: b, gpus: 1, pin: [1]")
    with host.hypervisor() as hypervisor:
        plan = host.plan()
        bind(host.root, host.situation.topology.gpus[0].pci.address, "nvidia")
        events: list[Event] = []
        outcome = execute(
            host.site,
            hypervisor,
            host.situation.platform,
            plan.actions,
            host.situation.definitions,
            host.situation.seeds,
            events.append,
        )
    assert happened(outcome.failures) == ["PreparePartition a"]
    assert "is bound to nvidia, not to vfio-pci" in outcome.failures[0][1].message
    skipped = [event.action for event in events if event.stage is Stage.SKIPPED]
    assert [(type(action), action.vm) for action in skipped] == [(StartDomain, "a")]
    assert outcome.done == len(plan.actions) - 2


def test_what_could_not_be_started_again_is_not_stopped(tmp_path: Path) -> None:
    host = SimulatedHost(own("dgx-h100", tmp_path))
    host.declare("name: a, gpus: 1, pin: [0]")
    host.settle()
    host.declare("name: a, gpus: 1, pin: [0], vcpus: 8")
    bind(host.root, host.situation.topology.gpus[0].pci.address, "nvidia")
    outcome = host.apply(ALL)
    assert happened(outcome.failures) == ["ShutDownDomain a"]
    assert "is bound to nvidia" in outcome.failures[0][1].message
    assert host.domain("a").running


def test_a_start_that_fails_leaves_no_mark(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 1")
    h100.settle()
    with h100.hypervisor() as hypervisor:
        facts = h100.domain("a").facts
        outcome = run(h100, hypervisor, prepare(h100, "a"), StartDomain("a", facts.uuid))
    assert happened(outcome.failures) == ["StartDomain a"]
    assert "already running" in outcome.failures[0][1].message
    assert marks(h100) == []


def test_a_shutdown_that_fails_leaves_the_vm_and_its_devices_alone(h100: SimulatedHost) -> None:
    """Not waiting at all is how a guest that does not listen looks; nobody gets its GPU."""
    h100.declare("name: a, gpus: 1, pin: [0]", "name: b, gpus: 1, state: stopped")
    h100.settle()
    h100.declare("name: a, gpus: 1, state: stopped, pin: [0]", "name: b, gpus: 1, pin: [1]")
    before = h100.domain("a").live
    outcome = h100.apply(ALL, power=Power(timeout=0))
    assert happened(outcome.failures) == ["ShutDownDomain a"]
    assert "did not shut down within 0 s" in outcome.failures[0][1].message
    assert h100.domain("a").live == before
    assert h100.domain("b").running


def test_force_pulls_the_plug(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 1")
    h100.settle()
    h100.declare("name: a, gpus: 1, state: stopped")
    assert h100.apply(ALL, power=Power(timeout=0, force=True)).failures == ()
    assert not h100.domain("a").running


def run(host: SimulatedHost, hypervisor: Hypervisor, *actions: Action) -> Outcome:
    """Carry out actions that no plan would hold."""
    host.plan()
    return execute(host.site, hypervisor, host.situation.platform, actions, {}, {})


def prepare(host: SimulatedHost, vm: str, *devices: PciAddress) -> PreparePartition:
    facts = host.domain(vm).facts
    held = tuple(hostdev.source for hostdev in facts.hostdevs)
    return PreparePartition(vm, facts.uuid, None, devices or held)


# -- prepare and start ------------------------------------------------------------------------


def test_nothing_starts_unprepared(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 1, state: stopped")
    h100.settle()
    with h100.hypervisor() as hypervisor:
        outcome = run(h100, hypervisor, StartDomain("a", h100.domain("a").facts.uuid))
        assert hypervisor.domain("a").live is None
    assert [error.message for _, error in outcome.failures] == ["a is not prepared"]


def test_a_mark_is_for_one_vm(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 1, state: stopped", "name: b, gpus: 1, state: stopped")
    h100.settle()
    with h100.hypervisor() as hypervisor:
        start = StartDomain("b", h100.domain("b").facts.uuid)
        outcome = run(h100, hypervisor, prepare(h100, "a"), start)
    assert happened(outcome.failures) == ["StartDomain b"]


def test_the_mark_is_there_during_the_start_and_gone_after_it(
    h100: SimulatedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    start = SimulatedHypervisor.start

    def watched(self: SimulatedHypervisor, name: str, uuid: str) -> None:
        seen.append((uuid, marks(h100)))
        start(self, name, uuid)

    monkeypatch.setattr(SimulatedHypervisor, "start", watched)
    h100.declare("name: a, gpus: 1")
    h100.settle()
    uuid = h100.domain("a").facts.uuid
    assert seen == [(uuid, [uuid])]
    assert marks(h100) == []
    assert h100.root.path(PREPARED).stat().st_mode & 0o022 == 0


def test_prepare_never_touches_what_a_running_domain_holds(
    h100: SimulatedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched = watch_fabric(monkeypatch)
    h100.declare("name: a, gpus: 1", "name: b, gpus: 1, state: stopped")
    h100.settle()
    h100.foreign("theirs", devices=("0000:31:00.0",))
    mine, theirs = h100.domain("a").facts.hostdevs[0].source, PciAddress.parse("0000:31:00.0")
    touched.clear()
    for device, holder in ((mine, "a"), (theirs, "theirs")):
        with h100.hypervisor() as hypervisor:
            outcome = run(h100, hypervisor, prepare(h100, "b", device))
        (failure,) = outcome.failures
        assert f"b cannot have PCI device {device}" in failure[1].message
        assert holder in failure[1].message
    assert touched == []


def test_two_vms_that_start_together_never_share_a_device(
    h100: SimulatedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their definitions overlap, as after a crash; each thread asks before either runs."""
    touched = watch_fabric(monkeypatch, together=2)
    h100.declare("name: a, gpus: 1, state: stopped", "name: b, gpus: 1, state: stopped")
    h100.settle()
    devices = tuple(hostdev.source for hostdev in h100.domain("a").facts.hostdevs)
    chain: list[Action] = []
    for vm, order in (("a", devices), ("b", devices[::-1])):
        chain += [prepare(h100, vm, *order), StartDomain(vm, h100.domain(vm).facts.uuid)]
    with h100.hypervisor() as hypervisor:
        outcome = run(h100, hypervisor, *chain)
    assert len(outcome.failures) == 1
    assert len(touched) == 1


def watch_fabric(
    monkeypatch: pytest.MonkeyPatch, together: int = 1
) -> list[tuple[PciAddress, ...]]:
    """Write down what is prepared; hold each up for a moment so that others could come too."""
    touched: list[tuple[PciAddress, ...]] = []
    crowd = threading.Barrier(together)

    def watched(
        self: VfioFabric, partition: Partition | None, devices: tuple[PciAddress, ...]
    ) -> None:
        touched.append(devices)
        with suppress(threading.BrokenBarrierError):
            crowd.wait(0.5 if together > 1 else None)

    monkeypatch.setattr(VfioFabric, "prepare", watched)
    return touched


def test_vms_start_side_by_side(h100: SimulatedHost, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = threading.Barrier(8)
    start = Hypervisor.start

    def watched(self: Hypervisor, name: str, uuid: str) -> None:
        meeting.wait(10)  # all of them, or none
        start(self, name, uuid)

    monkeypatch.setattr(Hypervisor, "start", watched)
    h100.declare(*(f"name: v{n}, gpus: 1" for n in range(8)))
    h100.settle()


# -- the journal ------------------------------------------------------------------------------


def test_the_journal_says_what_happened(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 1")
    h100.settle()
    lines = journal(h100)
    assert [(line["event"], line.get("action")) for line in lines] == [
        ("plan", None),
        ("done", "CreateVolume"),
        ("done", "DefineDomain"),
        ("done", "PreparePartition"),
        ("done", "StartDomain"),
        ("end", None),
    ]
    assert lines[0]["actions"] == 4
    assert (lines[-1]["done"], lines[-1]["failed"]) == (4, 0)
    assert {line["pid"] for line in lines} == {os.getpid()}
    assert {line["vm"] for line in lines[1:-1]} == {"a"}
    assert all(str(line["time"])[10] == "T" for line in lines)
    assert h100.root.path(JOURNAL).stat().st_mode & 0o777 == 0o640


def test_the_journal_says_what_failed_and_why(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 1")
    h100.settle()
    with h100.hypervisor() as hypervisor:
        uuid = h100.domain("a").facts.uuid
        run(h100, hypervisor, prepare(h100, "a"), StartDomain("a", uuid), StartDomain("a", uuid))
    *_, failed, skipped, end = journal(h100)
    assert failed["event"] == "failed" and "already running" in str(failed["error"])
    assert skipped["event"] == "skipped"
    assert (end["done"], end["failed"]) == (1, 1)


@pytest.fixture
def poolless(h100: SimulatedHost, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hypervisor]:
    """Connected to a host whose pool is off and cannot start, as when it is not mounted; VM a has
    its disk there, b elsewhere.
    """
    h100.declare("name: a, gpus: 1", "name: b, gpus: 1")
    h100.settle()
    with h100.hypervisor() as hypervisor:
        elsewhere = hypervisor.domain("b").inactive.replace(POOL_PATH, "/srv/disks")
        hypervisor.define("b", elsewhere)
    h100.plan()

    def refuse(pool: libvirt.virStoragePool, flags: int = 0) -> None:
        raise libvirt.libvirtError("cannot open directory")

    with h100.hypervisor() as hypervisor:
        hypervisor._connection.storagePoolLookupByName(POOL).destroy()
        monkeypatch.setattr(libvirt.virStoragePool, "create", refuse)
        yield hypervisor


NO_POOL = (
    "its disks are not to be had: libvirt could not make the storage pool dgx-kvm at"
    f" {POOL_PATH}: cannot open directory"
)


def test_without_the_pool_only_vms_with_disks_on_it_stay_off(
    h100: SimulatedHost, poolless: Hypervisor
) -> None:
    for vm in "ab":
        poolless.shut_down(vm, poolless.domain(vm).uuid, 1, force=True)
    restarts = [each for vm in "ab" for each in h100.situation.restart_actions(vm)]
    starts = tuple(each for each in restarts if each.phase >= PreparePartition.phase)
    outcome = execute(h100.site, poolless, h100.situation.platform, starts, {}, {})
    ((action, error),) = outcome.failures
    assert (action.vm, error.message) == ("a", f"a is not started: {NO_POOL}")
    assert "is mounted and whole" in error.hint
    assert [each.name for each in poolless.domains() if each.live] == ["b"]


def test_without_the_pool_no_vm_is_stopped_to_be_started_again(
    h100: SimulatedHost, poolless: Hypervisor
) -> None:
    actions = sorted(h100.situation.restart_actions("a"), key=lambda action: action.phase)
    outcome = execute(h100.site, poolless, h100.situation.platform, tuple(actions), {}, {})
    assert [error.message for _, error in outcome.failures] == [f"a runs on: {NO_POOL}"]
    assert poolless.domain("a").live


def test_many_threads_write_whole_lines(h100: SimulatedHost) -> None:
    h100.declare(*(f"name: v{n}, gpus: 1" for n in range(8)))
    h100.settle()
    assert len(journal(h100)) == 2 + 4 * 8


@pytest.mark.parametrize("obstacle", ["directory", "full", "read-only folder"])
def test_without_a_journal_nothing_is_done(h100: SimulatedHost, obstacle: str) -> None:
    path = h100.root.path(JOURNAL)
    path.parent.mkdir(parents=True, exist_ok=True)
    if obstacle == "directory":
        path.mkdir()
    elif obstacle == "full":
        path.symlink_to("/dev/full")
    else:
        path.symlink_to("/proc/nothing/journal")
    h100.declare("name: a, gpus: 1")
    before = h100.files()
    events: list[Event] = []
    with pytest.raises(HostError, match=r"cannot .*journal\.jsonl"):
        h100.apply(report=events.append)
    assert events == []
    assert h100.files() == before
    assert h100.state() == CurrentState((), ())


def test_a_journal_that_fits_only_in_part_is_no_journal(h100: SimulatedHost) -> None:
    """The kernel writes what fits and reports no error: a file size limit is like a full disk."""
    import resource

    h100.declare("name: a, gpus: 1")
    h100.root.append(JOURNAL, "x" * 980 + "\n")
    h100.plan()
    before = h100.files()

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(HostError, match="file too large"):
            h100.apply()

    assert in_child(limited) == 0
    assert h100.files() == before
    h100.settle()  # with room again
    last = h100.root.read(JOURNAL).splitlines()[-1]
    assert json.loads(last)["event"] == "end"


def test_a_long_journal_is_put_aside_once(
    h100: SimulatedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_JOURNAL_BYTES", 200)
    old = h100.root.path(f"{JOURNAL}.1")
    for number in range(3):
        h100.declare(f"name: v{number}, gpus: 0")
        h100.settle(ALL)
    assert old.exists()
    assert all(json.loads(line) for line in old.read_text().splitlines())
    assert journal(h100)[0]["event"] in ("plan", "end")


def test_a_journal_that_cannot_be_put_aside_stops_the_apply(
    h100: SimulatedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_JOURNAL_BYTES", 0)
    h100.root.append(JOURNAL, "{}\n")
    h100.root.path(f"{JOURNAL}.1").mkdir()
    with pytest.raises(HostError, match="cannot"):
        h100.apply()


def test_nothing_to_do_is_written_down_too(host: Host) -> None:
    at = host("dgx-b200")
    at.settle()
    assert [line["event"] for line in journal(at)] == ["plan", "end"]
    assert isinstance(at.root, Root)
