"""The plan: what is done, what is only said, and what waits for a flag; on simulated machines."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from catalogues import add
from hosts import ALL, SimulatedHost
from machines import MACHINES, own

from dgx_kvm_sw.decide.plan import Intent
from dgx_kvm_sw.guest.hypervisor import POOL, Hypervisor
from dgx_kvm_sw.guest.simulated import SimulatedHypervisor
from dgx_kvm_sw.model.actions import (
    Action,
    Change,
    CreateVolume,
    Effect,
    Plan,
    UndefineDomain,
    Verb,
)
from dgx_kvm_sw.model.base import to_json
from dgx_kvm_sw.model.errors import HostError
from dgx_kvm_sw.reconcile import POOL_PATH, gather

Host = Callable[..., SimulatedHost]

RESTART = Intent(restart=True)
PRUNE = Intent(prune=True)


@pytest.fixture
def h100(host: Host) -> SimulatedHost:
    return host("dgx-h100")


def steps(plan: Plan) -> list[str]:
    """The plan's actions as words."""
    return [f"{type(action).__name__} {action.vm}" for action in plan.actions]


def effects(changes: tuple[Change, ...]) -> dict[str, Effect]:
    return {change.field: change.effect for change in changes}


def pool_file(name: str) -> str:
    return f"{POOL_PATH}/{name}"


# -- a VM that is not there -------------------------------------------------------------------


def test_a_new_vm_is_made_and_started(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 1, disks: [{name: data, size: 1GiB}]")
    plan = h100.plan()
    assert steps(plan) == [
        "CreateVolume a",
        "CreateVolume a",
        "DefineDomain a",
        "PreparePartition a",
        "StartDomain a",
    ]
    (row,) = plan.vms
    assert (row.verb, row.changes, row.pending) == (Verb.CREATE, (), ())
    assert row.summary == "GPU 0, 1 NIC, 1 drive, 24 threads, 229 GiB on NUMA node 0"


def test_a_new_stopped_vm_is_made_and_not_started(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 1, state: stopped")
    assert steps(h100.plan()) == ["CreateVolume a", "DefineDomain a"]


def test_a_disk_that_is_there_is_used_again(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 0")
    h100.settle()
    h100.declare()
    h100.settle(Intent(restart=True, prune=True))
    h100.declare("name: a, gpus: 0")
    assert steps(h100.plan()) == ["DefineDomain a", "PreparePartition a", "StartDomain a"]


def test_what_cannot_be_placed_is_in_the_plan_and_hinders_no_other(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 16", "name: b, gpus: 1")
    plan = h100.plan()
    assert [refused.vm for refused in plan.unplaceable] == ["a"]
    assert {action.vm for action in plan.actions} == {"b"}
    h100.settle()
    assert h100.plan().pending


# -- a stopped VM -----------------------------------------------------------------------------


def test_a_stopped_vm_is_changed_at_once(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 1, state: stopped")
    h100.settle()
    h100.declare("name: a, gpus: 1, state: stopped, vcpus: 8")
    plan = h100.plan()
    assert steps(plan) == ["DefineDomain a"]
    (row,) = plan.vms
    assert (row.verb, row.pending) == (Verb.CHANGE, ())
    assert row.changes[0] == Change("vcpus", "24", "8", Effect.LIVE)


def test_a_vm_that_somebody_stopped_is_started_again(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 1")
    h100.settle()
    h100.by_hand("a", lambda domain: domain.destroy())
    plan = h100.plan()
    assert steps(plan) == ["PreparePartition a", "StartDomain a"]
    assert plan.vms[0].changes == (Change("state", "stopped", "running", Effect.LIVE),)


# -- a running VM -----------------------------------------------------------------------------


@pytest.fixture
def running(h100: SimulatedHost) -> SimulatedHost:
    h100.declare("name: a, gpus: 1", head="tenants: {hr: {}, it: {}}\n")
    h100.settle()
    return h100


def test_a_running_vm_is_redefined_and_runs_on(running: SimulatedHost) -> None:
    before = running.domain("a").live
    running.declare("name: a, gpus: 1, vcpus: 8")
    plan = running.plan()
    assert steps(plan) == ["DefineDomain a", "MarkRestartNeeded a"]
    (row,) = plan.vms
    assert (row.verb, row.pending) == (Verb.CHANGE, ("--restart",))
    assert row.changes[0] == Change("vcpus", "24", "8", Effect.NEXT_RESTART)
    running.settle()
    assert running.domain("a").live == before
    assert running.domain("a").facts.vcpus == 8


def test_a_pending_restart_stays_in_sight_without_being_done_twice(running: SimulatedHost) -> None:
    running.declare("name: a, gpus: 1, vcpus: 8")
    running.settle()
    plan = running.plan()
    assert plan.actions == () and plan.pending
    assert plan.vms[0].pending == ("--restart",)
    assert plan.vms[0].changes[0] == Change("vcpus", "24", "8", Effect.NEXT_RESTART)


@pytest.mark.parametrize("redefined", [False, True])
def test_a_restart_applies_it(running: SimulatedHost, redefined: bool) -> None:
    running.declare("name: a, gpus: 1, vcpus: 8")
    if redefined:
        running.settle()
    plan = running.plan(RESTART)
    define = [] if redefined else ["DefineDomain a"]
    assert steps(plan) == [
        "ShutDownDomain a",
        "ReleasePartition a",
        *define,
        "PreparePartition a",
        "StartDomain a",
    ]
    (row,) = plan.vms
    assert (row.verb, row.pending) == (Verb.REPLACE, ())
    assert set(effects(row.changes).values()) == {Effect.NEEDS_RESTART}
    running.settle(RESTART)
    live = running.domain("a").live
    assert live is not None and live.vcpus == 8
    assert not running.plan().pending


def test_an_edit_undone_before_the_restart_leaves_nothing_to_do(running: SimulatedHost) -> None:
    before = running.domain("a")
    running.declare("name: a, gpus: 2")
    running.settle()
    running.declare("name: a, gpus: 1")
    assert steps(running.plan()) == ["DefineDomain a"]
    running.settle()
    assert running.domain("a") == before
    assert not running.plan().pending


def test_restart_touches_no_vm_that_is_as_declared(running: SimulatedHost) -> None:
    running.declare("name: a, gpus: 1", "name: b, gpus: 1")
    assert {action.vm for action in running.plan(RESTART).actions} == {"b"}


def test_a_new_tenant_is_written_down_while_the_vm_runs(running: SimulatedHost) -> None:
    running.declare("name: a, gpus: 1, tenant: hr", head="tenants: {hr: {}}\n")
    plan = running.plan()
    assert steps(plan) == ["DefineDomain a"]
    assert plan.vms[0].changes == (Change("tenant", "", "hr", Effect.LIVE),)
    assert plan.vms[0].pending == ()
    running.settle()
    live = running.domain("a").live
    assert live is not None and live.owner is not None and live.owner.tenant == "hr"
    assert not running.plan().pending


def test_pins_that_somebody_moved_are_moved_back_while_the_vm_runs(running: SimulatedHost) -> None:
    before = running.domain("a")
    running.by_hand("a", lambda domain: domain.pinVcpu(3, (True, True)))
    assert running.domain("a") != before
    plan = running.plan()
    assert steps(plan) == ["DefineDomain a"]
    assert effects(plan.vms[0].changes) == {"cpu pins": Effect.LIVE}
    running.settle()
    assert running.domain("a") == before
    assert not running.plan().pending


@pytest.mark.parametrize("intent", [Intent(), RESTART])
def test_a_running_vm_declared_stopped_is_stopped_with_restart(
    running: SimulatedHost, intent: Intent
) -> None:
    running.declare("name: a, gpus: 1, state: stopped")
    plan = running.plan(intent)
    assert plan.vms[0].changes == (Change("state", "running", "stopped", Effect.NEEDS_RESTART),)
    assert plan.vms[0].pending == (() if intent.restart else ("--restart",))
    assert steps(plan) == (["ShutDownDomain a", "ReleasePartition a"] if intent.restart else [])
    running.settle(intent)
    assert running.domain("a").running is not intent.restart
    assert running.plan().pending is not intent.restart


def test_what_a_vm_to_be_stopped_also_changes_is_not_called_live(running: SimulatedHost) -> None:
    running.declare("name: a, gpus: 1, state: stopped, vcpus: 8")
    assert effects(running.plan().vms[0].changes)["vcpus"] is Effect.NEXT_RESTART


GONE = "its disk /var/lib/dgx-kvm/images/a.os.qcow2 is gone"


@pytest.mark.parametrize("kind", ["", ", os_disk: {format: raw}"])
def test_a_missing_disk_is_not_made_again(running: SimulatedHost, kind: str) -> None:
    """Its file system may just not be mounted; whatever the file says of it now."""
    with running.hypervisor() as hypervisor:
        hypervisor.delete_volume(pool_file("a.os.qcow2"))
    running.declare(f"name: a, gpus: 1{kind}", "name: b, gpus: 1")
    plan = running.plan(RESTART)
    assert {action.vm for action in plan.actions} == {"b"}
    (refused,) = plan.unplaceable
    assert (refused.vm, refused.reasons) == ("a", (GONE,))
    assert "mount or restore it" in refused.remedies[0]
    running.settle()
    assert running.domain("b").running


def test_a_stopped_vm_whose_disk_is_missing_is_not_started(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 1")
    h100.settle()
    h100.by_hand("a", lambda domain: domain.destroy())
    with h100.hypervisor() as hypervisor:
        hypervisor.delete_volume(pool_file("a.os.qcow2"))
    assert h100.plan().actions == ()
    h100.declare()
    h100.settle(ALL)
    h100.declare("name: a, gpus: 1")
    h100.settle()
    assert h100.domain("a").running


def pool_off(hypervisor: Hypervisor) -> None:
    hypervisor._connection.storagePoolLookupByName(POOL).destroy()


def test_with_the_pool_off_vms_stay_and_nothing_is_made(running: SimulatedHost) -> None:
    """Disks that cannot be looked at are not missing, and no new one is promised."""
    head = "tenants: {hr: {}, it: {}}\n"
    running.declare("name: a, gpus: 1, os_disk: 99GiB", "name: b, gpus: 1", head=head)
    with running.hypervisor() as hypervisor:
        pool_off(hypervisor)
        plan = gather(running.site, hypervisor, RESTART).plan(RESTART)
    assert plan.actions == ()
    (refused,) = plan.unplaceable
    assert refused.vm == "b"
    assert refused.remedies == ("virsh pool-start dgx-kvm",)
    assert any("the storage pool dgx-kvm is not active" in note for note in plan.notes)


def test_without_an_answer_of_lvm_only_new_volumes_wait(
    h100: SimulatedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a volume group has lost a drive, or an ordinary user asks."""
    disk = "disks: [{name: d, size: 1GiB, lvm: data}]"
    h100.declare(f"name: a, gpus: 1, {disk}")
    h100.settle()

    def refuses(hypervisor: SimulatedHypervisor) -> None:
        raise HostError("lvs refuses: no permission", "try it")

    monkeypatch.setattr(SimulatedHypervisor, "logical_volumes", refuses)
    assert not h100.plan().pending
    h100.declare(f"name: a, gpus: 1, {disk}", f"name: b, gpus: 1, {disk}", "name: c, gpus: 1")
    plan = h100.plan()
    assert {action.vm for action in plan.actions} == {"c"}
    (refused,) = plan.unplaceable
    assert (refused.vm, refused.reasons) == (
        "b",
        ("LVM does not answer: lvs refuses: no permission",),
    )
    assert any("lvs refuses" in note for note in plan.notes)


def test_a_new_disk_is_made_at_once_and_attached_at_the_next_restart(
    running: SimulatedHost,
) -> None:
    running.declare("name: a, gpus: 1, disks: [{name: data, size: 1GiB}]")
    assert steps(running.plan()) == ["CreateVolume a", "DefineDomain a", "MarkRestartNeeded a"]
    running.settle()
    assert running.plan().actions == ()


def test_a_disk_never_shrinks_but_the_difference_is_told(running: SimulatedHost) -> None:
    running.declare("name: a, gpus: 1, os_disk: 9GiB")
    plan = running.plan()
    assert plan.actions == ()
    note = "a: disk a.os.qcow2 has 50 GiB, the file says 9; disks are not made smaller"
    assert plan.notes == (note,)


def test_a_disk_grows_while_its_vm_is_off(running: SimulatedHost) -> None:
    running.declare("name: a, gpus: 1, os_disk: 99GiB")
    assert steps(running.plan()) == []
    (row,) = running.plan().vms
    grown = Change("size of a.os.qcow2", "50GiB", "99GiB", Effect.NEXT_RESTART)
    assert (row.changes, row.pending) == ((grown,), ("--restart",))
    assert steps(running.plan(RESTART)) == [
        "ShutDownDomain a",
        "ReleasePartition a",
        "GrowVolume a",
        "PreparePartition a",
        "StartDomain a",
    ]
    running.settle(RESTART)
    assert not running.plan().pending
    assert [volume.capacity_mib for volume in running.state().volumes] == [99 * 1024]


def test_a_disk_of_a_stopped_vm_grows_at_once(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 1, state: stopped")
    h100.settle()
    h100.declare("name: a, gpus: 1, state: stopped, os_disk: 99GiB")
    assert steps(h100.plan()) == ["GrowVolume a"]
    h100.settle()
    assert not h100.plan().pending


# -- orphans ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "intent", "pending", "done"),
    [
        ("stopped", Intent(), ("--prune",), ()),
        ("stopped", RESTART, ("--prune",), ()),
        ("stopped", PRUNE, (), ("UndefineDomain a",)),
        ("running", Intent(), ("--prune", "--restart"), ()),
        ("running", RESTART, ("--prune",), ()),
        ("running", PRUNE, ("--restart",), ()),
        (
            "running",
            Intent(restart=True, prune=True),
            (),
            ("ShutDownDomain a", "ReleasePartition a", "UndefineDomain a"),
        ),
        ("running", Intent(delete_disks=True), ("--prune", "--restart"), ()),
    ],
)
def test_an_orphan_goes_only_when_every_flag_it_needs_is_given(
    h100: SimulatedHost, state: str, intent: Intent, pending: tuple[str, ...], done: tuple[str, ...]
) -> None:
    h100.declare(f"name: a, gpus: 1, state: {state}")
    h100.settle()
    h100.declare()
    plan = h100.plan(intent)
    (row,) = plan.vms
    assert (row.verb, row.pending, tuple(steps(plan))) == (Verb.DELETE, pending, done)
    expected = {
        ("--prune",): Effect.NEEDS_PRUNE,
        ("--prune", "--restart"): Effect.NEEDS_PRUNE,
        ("--restart",): Effect.NEEDS_RESTART,
        (): Effect.LIVE,
    }
    assert row.changes[0] == Change("declared", "yes", "no longer", expected[pending])
    h100.settle(intent)
    assert (h100.state().domain("a") is None) is bool(done)
    assert [volume.name for volume in h100.state().volumes] == ["a.os.qcow2"]


def test_disks_are_deleted_only_when_asked_and_it_is_said(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 0, disks: [{name: data, size: 1GiB}]", "name: b, gpus: 0")
    h100.settle()
    h100.declare("name: b, gpus: 0")
    plan = h100.plan(ALL)
    disks = (pool_file("a.data.qcow2"), pool_file("a.os.qcow2"))
    (undefine,) = (each for each in plan.actions if isinstance(each, UndefineDomain))
    assert undefine.delete_volumes == disks
    assert plan.vms[0].changes[1] == Change(
        "disks", ", ".join(disks), "deleted", Effect.DESTROYS_DATA
    )
    h100.settle(ALL)
    assert [volume.name for volume in h100.state().volumes] == ["b.os.qcow2"]


def test_a_disk_that_is_not_the_vms_own_is_never_deleted(h100: SimulatedHost) -> None:
    """A site template may attach a disk of the pool that many VMs share."""
    h100.template(
        "site.xml.j2",
        '{#- template_api: 1 -#}\n{% extends "dist/domain.xml.j2" %}\n'
        "{% block extra_devices %}"
        f'<disk type="file" device="disk"><source file="{pool_file("shared.os.qcow2")}"/>'
        '<target dev="vdz" bus="virtio"/><readonly/></disk>'
        f'<disk type="file" device="disk"><source file="{pool_file("aa.os.qcow2")}"/>'
        '<target dev="vdy" bus="virtio"/><readonly/></disk>'
        "{% endblock %}\n",
    )
    h100.declare("name: shared, gpus: 0", "name: aa, gpus: 0")
    h100.settle()
    h100.declare(
        "name: shared, gpus: 0", "name: aa, gpus: 0", "name: a, gpus: 0, template: site.xml.j2"
    )
    h100.settle()
    h100.declare("name: shared, gpus: 0", "name: aa, gpus: 0")
    h100.settle(ALL)
    assert [volume.name for volume in h100.state().volumes] == ["aa.os.qcow2", "shared.os.qcow2"]


@pytest.mark.commands  # xorriso
def test_what_was_a_disk_of_an_orphan_once_is_named(h100: SimulatedHost) -> None:
    add(h100.root, "debian-12")  # so that there is a seed, which is no disk
    vm = "name: a, state: stopped, gpus: 0, image: debian-12, disks: [{name: %s, size: 1GiB}]"
    for disk in "d", "e":
        h100.declare(vm % disk)
        h100.settle()
    h100.declare()
    changes = {c.field: (c.old, c.new) for c in h100.row("a", ALL).changes}
    path = "/var/lib/dgx-kvm/images/a"
    assert changes["disks"] == (f"{path}.e.qcow2, {path}.os.qcow2", "deleted")
    assert changes["detached disks"] == (f"{path}.d.qcow2", "kept")


def test_an_orphan_keeps_its_devices_until_it_goes(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 8, state: stopped")
    h100.settle()
    h100.declare("name: b, gpus: 8")
    assert [refused.vm for refused in h100.plan().unplaceable] == ["b"]
    assert h100.plan(PRUNE).unplaceable == ()
    h100.settle(PRUNE)
    assert h100.domain("b").running and not h100.plan().pending


# -- domains of others ------------------------------------------------------------------------


def test_a_domain_of_others_is_named_and_left_alone(h100: SimulatedHost) -> None:
    h100.foreign("theirs")
    h100.declare("name: a, gpus: 1")
    assert h100.plan(ALL).unmanaged == ("theirs",)
    before = h100.domain("theirs")
    h100.settle(ALL)
    h100.declare()
    h100.settle(ALL)
    assert h100.domain("theirs") == before


def test_a_name_that_others_use_is_refused(h100: SimulatedHost) -> None:
    h100.foreign("a")
    h100.declare("name: a, gpus: 1", "name: b, gpus: 1")
    plan = h100.plan(ALL)
    (refused,) = plan.unplaceable
    assert refused.reasons == ("libvirt has a domain of this name that dgx-kvm did not make",)
    assert refused.remedies == ("rename the VM at /etc/dgx-kvm/vms.yaml:3, or the domain",)
    assert {action.vm for action in plan.actions} == {"b"}


def test_what_others_hold_is_not_given_away(h100: SimulatedHost) -> None:
    h100.foreign("theirs", devices=("0000:1b:00.0",), pins=(3, 4), memory=8)
    h100.declare(*(f"name: v{n}, gpus: 1" for n in range(8)))
    h100.apply()
    state = h100.state()
    ours = [domain.facts for domain in state.domains if domain.managed]
    assert len(ours) == 7
    devices = {str(hostdev.source) for facts in ours for hostdev in facts.hostdevs}
    pins = {cpu for facts in ours for pin in facts.vcpu_pins for cpu in pin}
    assert "0000:1b:00.0" not in devices and not pins & {3, 4}


# -- the whole plan ---------------------------------------------------------------------------


def test_phases_run_in_order_and_each_vm_in_file_order(h100: SimulatedHost) -> None:
    h100.declare("name: gone, gpus: 1", "name: stays, gpus: 1", "name: grows, gpus: 1")
    h100.settle()
    h100.declare("name: new, gpus: 1", "name: grows, gpus: 2", "name: stays, gpus: 1")
    plan = h100.plan(ALL)
    assert steps(plan) == [
        "ShutDownDomain grows",
        "ShutDownDomain gone",
        "ReleasePartition grows",
        "ReleasePartition gone",
        "UndefineDomain gone",
        "CreateVolume new",
        "DefineDomain new",
        "DefineDomain grows",
        "PreparePartition new",
        "StartDomain new",
        "PreparePartition grows",
        "StartDomain grows",
    ]
    assert [row.vm for row in plan.vms] == ["new", "grows", "gone"]
    assert all(action.describe() for action in plan.actions)


def test_a_plan_is_json(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 1", "name: b, gpus: 16")
    assert json.loads(json.dumps(to_json(h100.plan())))["vms"][0]["vm"] == "a"


def test_a_swap_by_pins_needs_restart_and_says_so(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 1, pin: [0]", "name: b, gpus: 1, pin: [1]")
    h100.settle()
    h100.declare("name: a, gpus: 1, pin: [1]", "name: b, gpus: 1, pin: [0]")
    plan = h100.plan()
    assert plan.actions == ()
    assert all("--restart would make room" in r.remedies[0] for r in plan.unplaceable)
    h100.settle(RESTART)
    assert not h100.plan().pending


def test_what_a_restart_sets_free_is_given_away_in_the_same_plan(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 1, nics: 8")
    h100.settle()
    h100.declare("name: a, gpus: 1, nics: 0", "name: b, gpus: 1, nics: 8")
    assert [refused.vm for refused in h100.plan().unplaceable] == ["b"]
    assert "--restart would make room" in h100.plan().unplaceable[0].remedies[0]
    h100.settle(RESTART)
    assert not h100.plan().pending


def test_a_vm_that_loses_its_place_to_nobody_keeps_it(h100: SimulatedHost) -> None:
    """One that asks for the impossible is not stopped, so nobody may count on what it holds."""
    h100.declare("name: a, gpus: 1, pin: [0]")
    h100.settle()
    h100.declare("name: a, gpus: 16", "name: b, gpus: 1, pin: [0]", "name: c, gpus: 1")
    plan = h100.plan(RESTART)
    assert {refused.vm for refused in plan.unplaceable} == {"a", "b"}
    assert {action.vm for action in plan.actions} == {"c"}


def test_a_vm_declared_stopped_leaves_its_gpus_to_a_pin_with_restart(h100: SimulatedHost) -> None:
    h100.declare("name: a, gpus: 1, pin: [0]")
    h100.settle()
    h100.declare("name: a, gpus: 1, state: stopped", "name: b, gpus: 1, pin: [0]")
    assert [refused.vm for refused in h100.plan().unplaceable] == ["b"]
    assert h100.plan(RESTART).unplaceable == ()
    h100.settle(RESTART)
    assert not h100.plan().pending


# -- idempotence: the key property ------------------------------------------------------------


def random_vms(rng: random.Random, gpus: int) -> list[str]:
    """Some VMs that may or may not fit together, with many of the keys a VM can have."""
    vms, left = [], gpus
    for number in rng.sample(range(12), rng.randint(1, 8)):
        size = rng.choice([size for size in (0, 1, 1, 2, 4, 8, 16) if size <= max(left, 1)])
        keys = [f"name: vm{number}", f"gpus: {size}"]
        options = [
            f"state: {rng.choice(['running', 'stopped'])}",
            f"vcpus: {2 * rng.randint(1, 4)}",
            f"memory: {rng.randint(1, 9)}GiB",
            f"disks: [{{name: data, size: {rng.randint(1, 3)}GiB}}]",
            f"networks: [{{{rng.choice(['bridge: br0', 'network: default', 'macvtap: e1'])}}}]",
            f"tenant: {rng.choice(['hr', 'it'])}",
            f"firmware: {rng.choice(['uefi', 'bios'])}",
            f"hugepages: {rng.choice(['auto', 'none'])}",
            f"nvswitches: {rng.choice(['true', 'false'])}",
            f"nics: {rng.randint(0, 2)}",
            f"drives: {rng.randint(0, 2)}",
            f"pin: [{rng.randrange(gpus)}]" if size == 1 else "iothreads: 2",
        ]
        keys += rng.sample(options, rng.randint(0, 5))
        vms.append(", ".join(keys))
        left -= size
    pins = [pin_of(vm) for vm in vms]
    return [vm for n, vm in enumerate(vms) if not pins[n] or pins[n] not in pins[:n]]


def pin_of(vm: str) -> str:
    return vm.partition("pin: ")[2].partition("]")[0]


def quiet(plan: Plan, refused: set[str]) -> bool:
    """Whether nothing is left to do or to say but for what is refused."""
    return (
        plan.actions == ()
        and not [row for row in plan.vms if row.vm not in refused]
        and {each.vm for each in plan.unplaceable} <= refused
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", MACHINES)
def test_what_was_applied_has_nothing_left_to_do(host: Host, name: str, seed: int) -> None:
    rng = random.Random(f"{name} {seed}")
    at = host(name)
    gpus = 16 if name == "dgx2" else 8
    head = "tenants: {hr: {}, it: {}}\n"
    for intent in (Intent(), ALL, ALL, ALL):
        at.declare(*random_vms(rng, gpus), head=head)
        at.settle(intent)
        plan = at.plan(intent)
        refused = {each.vm for each in at.situation.placements.unplaceable}
        assert quiet(plan, refused), (plan.actions, plan.vms, plan.unplaceable)
        again = at.plan()
        assert again.actions == ()
        if not refused:
            assert not again.pending


@pytest.mark.parametrize("name", MACHINES)
def test_edits_without_flags_settle_too(host: Host, name: str) -> None:
    """Without --restart things stay pending, but nothing is done twice."""
    rng = random.Random(name)
    at = host(name)
    head = "tenants: {hr: {}, it: {}}\n"
    for _ in range(5):
        at.declare(*random_vms(rng, 8), head=head)
        at.settle()
        assert at.plan().actions == ()


def test_a_device_that_fails_under_a_running_vm_plans_nothing_for_it(tmp_path: Path) -> None:
    at = SimulatedHost(own("dgx-h100", tmp_path))
    at.declare("name: a, gpus: 1", "name: b, gpus: 1")
    at.settle()
    (gpu, *_) = (hostdev.source for hostdev in at.domain("a").facts.hostdevs)
    config = at.root.path(f"/sys/bus/pci/devices/{gpu}/config")
    config.write_bytes(b"\xff" * 64)
    assert not at.plan(ALL).pending
    at.by_hand("a", lambda domain: domain.destroy())
    plan = at.plan()
    assert {action.vm for action in plan.actions} == {"a"}
    at.settle()
    assert gpu not in {hostdev.source for hostdev in at.domain("a").facts.hostdevs}


def kinds(actions: tuple[Action, ...]) -> set[type]:
    return {type(action) for action in actions}


def test_a_data_disk_alone_is_no_reason_to_stop_anybody(running: SimulatedHost) -> None:
    running.declare("name: a, gpus: 1, disks: [{name: data, size: 1GiB}]")
    assert CreateVolume in kinds(running.plan().actions)
    assert running.domain("a").running
