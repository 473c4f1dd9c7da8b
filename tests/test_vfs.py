"""SR-IOV virtual functions as networks: chosen near the GPUs, kept, held once, refused in words.

The DGX-2 of these tests has 8 VFs of enp134s0f0 on NUMA node 1, and 2 of a NIC on the PCIe switch
of GPUs 0 and 1.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import ALL, SimulatedHost
from machines import SAMPLE_VF, bind, change, device_path, keep_with_host, make_vfs, own, set_flags

from dgx_kvm_sw.cli import show
from dgx_kvm_sw.cli.output import View
from dgx_kvm_sw.cli.room import room
from dgx_kvm_sw.decide.plan import Intent
from dgx_kvm_sw.decide.seed import desired_seed
from dgx_kvm_sw.execute import execute
from dgx_kvm_sw.model.actions import DefineDomain, Effect
from dgx_kvm_sw.model.placement import Unplaceable
from dgx_kvm_sw.model.spec import Network, NetworkKind
from dgx_kvm_sw.reconcile import gather

FAR, FAR_NIC = "enp134s0f0", "0000:86:00.0"
NEAR, NEAR_NIC = "near0", "0000:35:00.0"
FAR_VFS = [*(f"0000:86:00.{n}" for n in range(2, 8)), "0000:86:01.0", "0000:86:01.1"]
PLAIN = View(100, False, True)
NEAR_VFS = ["0000:35:10.0", "0000:35:10.1"]
WITHOUT_VFS = "enp134s0f1"


@pytest.fixture
def at(tmp_path: Path) -> SimulatedHost:
    root = own("dgx2", tmp_path)
    keep_with_host(root, NEAR_NIC, NEAR)
    assert make_vfs(root, NEAR_NIC, 2, NEAR) == NEAR_VFS
    return SimulatedHost(root)


def vm(name: str, *sources: str, more: str = "gpus: 0, vcpus: 2, memory: 1GiB") -> str:
    networks = ", ".join(f"{{vf: {source}}}" for source in sources)
    return f"name: {name}, {more}, networks: [{networks}]"


def placed(at: SimulatedHost, name: str, intent: Intent = Intent()) -> list[str]:  # noqa: B008
    at.plan(intent)
    placement = at.situation.placements.of(name)
    assert placement is not None, at.situation.placements.unplaceable
    return [str(address) for address in placement.vfs]


def refused(at: SimulatedHost, *vms: str) -> Unplaceable:
    at.declare(*vms)
    at.plan()
    (found,) = at.situation.placements.unplaceable
    return found


# -- which one --------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpu", "vf"), [(1, NEAR_VFS[0]), (9, FAR_VFS[0])])
def test_auto_is_of_the_nic_nearest_to_the_gpus(at: SimulatedHost, gpu: int, vf: str) -> None:
    at.declare(vm("a", "auto", more=f"gpus: 1, pin: [{gpu}]"))
    assert placed(at, "a") == [vf]


def test_without_gpus_auto_is_of_a_nic_of_the_same_numa_node(at: SimulatedHost) -> None:
    at.declare(vm("a", "auto"))
    (vf,) = placed(at, "a")
    placement = at.situation.placements.of("a")
    assert placement is not None
    assert vf == (NEAR_VFS if placement.cells[0].host_node == 0 else FAR_VFS)[0]


@pytest.mark.parametrize("source", [FAR, FAR_NIC, f'"{FAR_NIC}"', "86:00.0"])
def test_a_nic_is_named_by_interface_or_address(at: SimulatedHost, source: str) -> None:
    at.declare(vm("a", source, more="gpus: 1, pin: [0]"))
    assert placed(at, "a") == [FAR_VFS[0]]


def test_a_vm_may_have_several_and_no_two_vms_share_one(at: SimulatedHost) -> None:
    five = (vm(f"v{n}", "auto", "auto", more="gpus: 1") for n in range(5))
    at.declare(*five, vm("last", "auto"))
    at.plan()
    given = [str(a) for p in at.situation.placements.placed for a in p.vfs]
    assert sorted(given) == sorted(FAR_VFS + NEAR_VFS)
    (left_out,) = at.situation.placements.unplaceable
    assert left_out.vm == "last"
    assert left_out.reasons[0].startswith("the host has 10 VFs and none is free: VF 0 of NIC")


def test_room_for_more_vms_ends_with_the_vfs(at: SimulatedHost) -> None:
    at.declare(head="defaults: {networks: [{vf: near0}]}\n")
    at.plan()
    assert room(at.situation)[1] == 2


def test_a_network_that_names_a_nic_chooses_before_auto(at: SimulatedHost) -> None:
    at.declare(vm("a", "auto", NEAR, NEAR, more="gpus: 1, pin: [0]"))
    assert placed(at, "a") == [FAR_VFS[0], *NEAR_VFS]


def test_auto_leaves_what_another_vm_names(at: SimulatedHost) -> None:
    at.declare(
        vm("a", "auto", more="gpus: 1, pin: [0]"),
        vm("b", NEAR, NEAR, more="gpus: 1, pin: [2]"),
    )
    assert placed(at, "a") == [FAR_VFS[0]]
    assert placed(at, "b") == NEAR_VFS


def test_auto_takes_the_last_one_when_that_vm_has_its_own(at: SimulatedHost) -> None:
    at.declare(vm("b", NEAR))
    at.settle()
    at.declare(vm("b", NEAR), vm("a", "auto", more="gpus: 1, pin: [0]"))
    assert placed(at, "a") == [NEAR_VFS[1]]


# -- what it has, it keeps --------------------------------------------------------------------


def test_a_second_apply_does_nothing(at: SimulatedHost) -> None:
    at.declare(vm("a", "auto", FAR, more="gpus: 1"), vm("b", "auto"))
    at.settle()
    assert not at.plan().pending and not at.plan().actions


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_what_is_defined_stays_when_others_leave_or_come(at: SimulatedHost, state: str) -> None:
    both = [vm(name, "auto", FAR) + f", state: {state}" for name in ("a", "b")]
    at.declare(*both)
    at.settle()
    kept = placed(at, "b")
    at.declare(both[1])
    at.settle(ALL)
    at.declare(vm("new", "auto", FAR, more="gpus: 1"), both[1])
    assert placed(at, "b") == kept
    assert not set(placed(at, "new")) & set(kept)


def test_each_network_keeps_its_own(at: SimulatedHost) -> None:
    at.declare(vm("a", "auto", "auto", more="gpus: 1, pin: [0], state: stopped"))
    at.settle()
    first, second = placed(at, "a")
    at.declare(vm("a", NEAR, "auto", more="gpus: 1, pin: [0], state: stopped"))
    assert placed(at, "a") == [first, second]
    at.declare(vm("a", "auto", NEAR, more="gpus: 1, pin: [0], state: stopped"))
    assert placed(at, "a") == [first, second]
    at.declare(vm("a", FAR, "auto", more="gpus: 1, pin: [0], state: stopped"))
    assert placed(at, "a") == [FAR_VFS[0], second]


def test_a_running_vm_that_grows_leaves_a_stopped_one_what_it_is_defined_with(
    at: SimulatedHost,
) -> None:
    off = vm("off", FAR) + ", state: stopped"
    at.declare(off, vm("a", FAR))
    at.settle()
    at.declare(off, vm("a", FAR, FAR))
    assert placed(at, "a") == [FAR_VFS[1], FAR_VFS[2]]
    assert placed(at, "off") == [FAR_VFS[0]]


def test_what_waits_for_a_restart_stays_what_it_is(at: SimulatedHost) -> None:
    at.declare(vm("a", FAR), vm("b", FAR))
    at.settle()
    at.declare(vm("a", NEAR), vm("b", FAR))
    at.settle()
    (interface,) = at.domain("a").facts.interfaces
    assert interface.vf is not None and str(interface.vf.source) == NEAR_VFS[0]
    for _ in range(2):
        assert placed(at, "a") == [NEAR_VFS[0]]
        assert not [a for a in at.plan().actions if isinstance(a, DefineDomain)]
        at.settle()


def test_a_network_that_comes_does_not_take_the_vf_of_another(at: SimulatedHost) -> None:
    at.declare(vm("a", "auto", more="gpus: 1, pin: [0], state: stopped"))
    at.settle()
    assert placed(at, "a") == [NEAR_VFS[0]]
    at.declare(vm("a", "auto", NEAR, more="gpus: 1, pin: [0], state: stopped"))
    assert placed(at, "a") == NEAR_VFS


def test_a_running_vm_keeps_its_vf_while_its_nic_is_down(at: SimulatedHost) -> None:
    at.declare(vm("a", FAR))
    at.settle()
    set_flags(at.root, FAR_NIC, 0x1002)
    assert placed(at, "a") == [FAR_VFS[0]]
    assert not at.plan().actions


def test_a_vf_that_is_gone_is_replaced(at: SimulatedHost) -> None:
    at.declare(vm("a", FAR) + ", state: stopped")
    at.settle()
    (device_path(at.root, FAR_NIC) / "virtfn0").unlink()
    assert placed(at, "a") == [FAR_VFS[1]]


def test_a_vf_that_the_host_took_while_its_vm_was_off_is_replaced(at: SimulatedHost) -> None:
    at.declare(vm("a", FAR) + ", state: stopped")
    at.settle()
    up(at)
    assert placed(at, "a") == [FAR_VFS[1]]


def test_restart_hands_a_vf_from_one_vm_to_another(at: SimulatedHost) -> None:
    """While the first runs, libvirt has it on vfio-pci: that is nobody else's doing."""
    one = "gpus: 0, vcpus: 2, memory: 1GiB"
    at.declare(vm("a", NEAR, NEAR))
    at.settle()
    for vf in NEAR_VFS:
        bind(at.root, vf, "vfio-pci")
    at.declare(f"name: a, {one}", vm("b", NEAR))
    assert refused_now(at) == ["b"]
    at.settle()  # now it only runs with them, and is defined without
    assert refused_now(at) == ["b"]
    assert "is held by a" in at.situation.placements.unplaceable[0].reasons[0]
    assert placed(at, "b", ALL) == [NEAR_VFS[0]]
    at.settle(ALL)
    assert [i.vf is None for i in at.domain("a").facts.interfaces] == []


def refused_now(at: SimulatedHost) -> list[str]:
    at.plan()
    return [each.vm for each in at.situation.placements.unplaceable]


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "reason", "remedy"),
    [
        ("nope0", "there is no NIC nope0", f"NICs of the host: enp6s0, {NEAR}, {FAR}"),
        ("enp6s0", "NIC enp6s0 has no SR-IOV", "name another NIC"),
        (WITHOUT_VFS, f"NIC {WITHOUT_VFS} has no virtual functions", "SR-IOVVirtualFunctions="),
        ("3a:00.0", "NIC 0000:3a:00.0 is InfiniBand", "name an Ethernet NIC"),
    ],
)
def test_a_nic_without_vfs_is_refused_with_what_to_do(
    at: SimulatedHost, source: str, reason: str, remedy: str
) -> None:
    for more in ("gpus: 1", "gpus: 0, vcpus: 2, memory: 1GiB"):
        found = refused(at, vm("a", source, more=more))
        assert found.reasons[0].startswith(reason) and len(found.reasons) == 1
        assert remedy in found.remedies[0]


def test_a_nic_that_goes_to_vms_makes_none(at: SimulatedHost) -> None:
    bind(at.root, NEAR_NIC, "vfio-pci")
    found = refused(at, vm("a", NEAR_NIC))
    assert found.reasons == (f"NIC {NEAR} goes to VMs as a whole",)
    assert "DGX_KVM_KEEP" in found.remedies[0]


def test_a_nic_that_is_down_makes_none(at: SimulatedHost) -> None:
    """libvirt sets MAC addresses by the NIC, and refuses while it is down."""
    set_flags(at.root, NEAR_NIC, 0x1002)
    found = refused(at, vm("a", NEAR))
    assert found.reasons == (f"NIC {NEAR} is down, so libvirt cannot set up its VFs",)
    assert f"ip link set {NEAR} up" in found.remedies[0]
    at.declare(vm("a", "auto", more="gpus: 1, pin: [0]"))
    assert placed(at, "a") == [FAR_VFS[0]]


def test_without_any_vf_auto_is_refused(host: Callable[..., SimulatedHost]) -> None:
    found = refused(host("dgx-h100"), vm("a", "auto", more="gpus: 1"))
    assert found.reasons == ("no NIC of the host has virtual functions",)
    assert "SR-IOVVirtualFunctions=" in found.remedies[0]


# -- those that are not free ------------------------------------------------------------------


def up(at: SimulatedHost) -> None:
    set_flags(at.root, SAMPLE_VF, 0x1003)


def in_a_bridge(at: SimulatedHost) -> None:
    (interface,) = (device_path(at.root, SAMPLE_VF) / "net").iterdir()
    (interface / "master").symlink_to("../br0")


def under_a_vlan(at: SimulatedHost) -> None:
    (interface,) = (device_path(at.root, SAMPLE_VF) / "net").iterdir()
    (interface / "upper_vlan5").symlink_to("../vlan5")


def in_a_container(at: SimulatedHost) -> None:
    (interface,) = (device_path(at.root, SAMPLE_VF) / "net").iterdir()
    (interface / "flags").unlink()
    interface.rmdir()


def at_a_driver_of_programs(at: SimulatedHost) -> None:
    shutil.rmtree(device_path(at.root, SAMPLE_VF) / "net")
    bind(at.root, SAMPLE_VF, "uio_pci_generic")


def of_some_program(at: SimulatedHost) -> None:
    bind(at.root, SAMPLE_VF, "vfio-pci")


def in_a_shared_group(at: SimulatedHost) -> None:
    for address in FAR_VFS[1:2]:
        link = device_path(at.root, address) / "iommu_group"
        link.unlink()
        link.symlink_to((device_path(at.root, SAMPLE_VF) / "iommu_group").readlink())


def in_quarantine(at: SimulatedHost) -> None:
    entry = f'{{"address": "{SAMPLE_VF}", "state": "failed", "reason": "lost", "since": ""}}'
    at.root.write("/var/lib/dgx-kvm/health.json", f'{{"devices": [{entry}]}}')


def silent(at: SimulatedHost) -> None:
    (device_path(at.root, SAMPLE_VF) / "config").write_bytes(b"\xff" * 64)


def of_a_foreign_domain(at: SimulatedHost) -> None:
    at.foreign("theirs", vfs=(SAMPLE_VF,), running=False)


def of_a_foreign_domain_as_a_mere_device(at: SimulatedHost) -> None:
    at.foreign("theirs", devices=(SAMPLE_VF,))


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (up, "is the host's: enp134s0f0v0 is up"),
        (in_a_bridge, "is the host's: enp134s0f0v0 carries another link"),
        (under_a_vlan, "is the host's: enp134s0f0v0 carries another link"),
        (in_a_container, "in another network namespace, so a container has it"),
        (at_a_driver_of_programs, "is bound to uio_pci_generic, so some program has it"),
        (of_some_program, "is bound to vfio-pci, but no domain has it"),
        (in_a_shared_group, "shares an IOMMU group with VF 1 of NIC enp134s0f0"),
        (in_quarantine, "lost"),
        (silent, "does not answer on the PCI bus"),
        (of_a_foreign_domain, "is held by theirs"),
        (of_a_foreign_domain_as_a_mere_device, "is held by theirs"),
    ],
)
def test_what_others_use_is_not_free(
    at: SimulatedHost, use: Callable[[SimulatedHost], None], reason: str
) -> None:
    for link in device_path(at.root, FAR_NIC).glob("virtfn[2-7]"):
        link.unlink()
    use(at)
    at.declare(vm("a", FAR))
    if use is in_a_shared_group:
        assert refused_now(at) == ["a"]
    else:
        assert placed(at, "a") == [FAR_VFS[1]]
    found = refused(at, vm("a", FAR, FAR))
    assert (
        f"NIC {FAR} has 2 VFs and none is free: VF 0 of NIC {FAR} ({SAMPLE_VF})"
        in (found.reasons[0])
    )
    assert reason in found.reasons[0]
    assert ("ACS" if use is in_a_shared_group else "free one") in found.remedies[0]


def test_a_driver_may_take_time_to_make_the_interface(at: SimulatedHost) -> None:
    """As after the VM was stopped, when libvirt has just given it back."""
    at.declare(vm("a", FAR) + ", state: stopped")
    at.settle()
    shutil.rmtree(device_path(at.root, SAMPLE_VF) / "net")
    bind(at.root, SAMPLE_VF, "iavf")
    at.declare(vm("a", FAR))
    at.settle()
    assert at.domain("a").running and placed(at, "a") == [SAMPLE_VF]


def test_a_device_in_the_iommu_group_of_a_vf_is_not_given_away(at: SimulatedHost) -> None:
    """It would take the VF, which has a driver of the host, along."""
    link = device_path(at.root, "0000:3a:00.0") / "iommu_group"
    link.unlink()
    link.symlink_to((device_path(at.root, SAMPLE_VF) / "iommu_group").readlink())
    at.declare("name: a, gpus: 1, pin: [2], nics: 1")
    at.plan()
    (placement,) = at.situation.placements.placed
    assert [str(nic) for nic in placement.nics] != ["0000:3a:00.0"]


def test_a_template_cannot_take_the_vf_of_another_vm(at: SimulatedHost) -> None:
    add = (
        '<hostdev mode="subsystem" type="pci" managed="yes"><source>'
        '<address domain="0" bus="0x35" slot="0x10" function="0"/></source></hostdev>'
    )
    extends = '{#- template_api: 1 -#}\n{% extends "dist/domain.xml.j2" %}'
    at.template("site.xml.j2", f"{extends}{{% block extra_devices %}}{add}{{% endblock %}}")
    at.declare(vm("a", NEAR), "name: b, gpus: 0, vcpus: 2, template: site.xml.j2")
    assert refused_now(at) == ["b"]
    assert "site.xml.j2 adds VF 0 of NIC near0" in at.situation.placements.unplaceable[0].reasons[0]


# -- the domain -------------------------------------------------------------------------------


def test_the_domain_has_it_by_its_address_with_a_mac_of_its_own(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 1, pin: [0], networks: [{bridge: br0}, {vf: auto, vlan: 100}]")
    at.settle()
    bridge, interface = at.domain("a").facts.interfaces
    assert interface.network == Network(NetworkKind.VF, NEAR_VFS[0], 100)
    assert interface.vf is not None
    assert (str(interface.vf.source), interface.vf.managed) == (NEAR_VFS[0], True)
    assert interface.mac != bridge.mac and interface.mac.startswith("52:54:00:")
    ports = {c.index: c for c in at.domain("a").facts.controllers}
    (gpu, *_) = (h for h in at.domain("a").facts.hostdevs if str(h.source) == "0000:34:00.0")
    assert ports[gpu.bus].bus == ports[interface.vf.bus].bus  # ports of one switch


def test_the_guest_finds_it_by_the_mac_that_libvirt_gives_it(at: SimulatedHost) -> None:
    address = "{vf: auto, address: 10.1.0.5/24}"
    at.declare(f"name: a, gpus: 1, networks: [{{bridge: br0}}, {address}]")
    at.settle()
    (spec,) = at.situation.spec.vms
    seed = desired_seed(spec, at.site.machine_id(), at.domain("a").facts.uuid)
    macs = [interface.mac for interface in at.domain("a").facts.interfaces]
    assert [network.mac for network in seed.networks] == macs
    assert seed.networks[1].addressing.addresses == ("10.1.0.5/24",)


def test_a_change_of_the_vlan_waits_for_a_restart(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 1, networks: [{vf: enp134s0f0, vlan: 100}]")
    at.settle()
    at.declare("name: a, gpus: 1, networks: [{vf: enp134s0f0, vlan: 101}]")
    (change,) = at.row("a").changes
    assert (change.field, change.effect) == ("networks", Effect.NEXT_RESTART)
    assert f"vf {SAMPLE_VF}, VLAN 100" in change.old


def test_another_vf_is_one_difference_and_not_a_new_pcie_tree(at: SimulatedHost) -> None:
    at.declare(vm("a", NEAR, more="gpus: 1, pin: [0]"))
    at.settle()
    at.declare(vm("a", FAR, more="gpus: 1, pin: [0]"))
    assert [change.field for change in at.row("a").changes] == ["networks"]


def test_its_start_is_refused_when_its_nic_went_down_or_the_host_took_it(
    at: SimulatedHost,
) -> None:
    at.declare(vm("a", FAR), vm("b", NEAR))
    with at.hypervisor() as hypervisor:
        found = gather(at.site, hypervisor, Intent())
        set_flags(at.root, FAR_NIC, 0x1002)
        set_flags(at.root, NEAR_VFS[0], 0x1003)
        done = execute(
            at.site,
            hypervisor,
            found.platform,
            found.plan(Intent()).actions,
            found.definitions,
            found.seeds,
        )
    messages = {action.vm: error.message for action, error in done.failures}
    assert f"is a virtual function of NIC {FAR_NIC}, which is down" in messages["a"]
    assert "is the host's: near0v0 is up" in messages["b"]


def test_a_running_domain_that_has_it_stops_the_start_of_another(at: SimulatedHost) -> None:
    at.declare(vm("a", NEAR) + ", state: stopped")
    at.settle()
    at.foreign("theirs", vfs=(NEAR_VFS[0],))
    with at.hypervisor() as hypervisor:
        found = gather(at.site, hypervisor, Intent())
        done = execute(
            at.site, hypervisor, found.platform, found.start_actions("a"), found.definitions, {}
        )
    ((_, error),) = done.failures
    assert "the running domain theirs holds it" in error.message


def test_a_change_of_the_hosts_vfs_spoils_a_saved_plan(at: SimulatedHost) -> None:
    at.declare(vm("a", NEAR))
    at.plan()
    before = at.situation.fingerprint
    change(at.root, SAMPLE_VF, "device", "0x1019")
    at.plan()
    assert at.situation.fingerprint != before


# -- what operators see -----------------------------------------------------------------------


def test_explain_says_whose_it_is_and_how_far(at: SimulatedHost) -> None:
    at.declare(vm("a", "auto", FAR, more="gpus: 1, pin: [0]"))
    at.plan()
    text = " ".join(show.explain(at.situation, "a", PLAIN).split())
    assert f"VFs {NEAR_VFS[0]}: of NIC {NEAR}, same PCIe switch as GPU 0" in text
    assert f"{FAR_VFS[0]}: of NIC {FAR}, NUMA node 1, far from GPU 0 node" in text


def test_a_refusal_that_holds_for_all_sets_is_said_once(at: SimulatedHost) -> None:
    at.declare(vm("a", WITHOUT_VFS, more="gpus: 1"))
    at.plan()
    assert show.explain(at.situation, "a", PLAIN).count("has no virtual functions") == 1


def test_status_shows_who_has_which(at: SimulatedHost) -> None:
    at.declare(vm("a", FAR), vm("b", NEAR, FAR))
    at.settle()
    set_flags(at.root, FAR_VFS[7], 0x1003)
    at.plan()
    (row,) = [line for line in show.status(at.situation, PLAIN).splitlines() if "VFs" in line]
    assert [part.strip() for part in row.split("VFs")] == ["", "B ·", "A B · · · · · ▒"]
    found = {each["address"]: each for each in show.status_json(at.situation)["devices"]}
    assert (found[FAR_VFS[1]]["kind"], found[FAR_VFS[1]]["index"]) == ("vf", 1)
    assert (found[FAR_VFS[1]]["holder"], found[FAR_VFS[1]]["in_use"]) == ("b", True)
    assert found[FAR_VFS[7]]["kept_by_host"] is True


def test_the_hosts_own_use_of_a_vf_is_no_fault_but_a_silent_one_is(at: SimulatedHost) -> None:
    up(at)
    at.plan()
    assert "Faults" not in show.status(at.situation, PLAIN)
    silent(at)
    at.plan()
    text = show.status(at.situation, PLAIN)
    assert f"VF 0 of NIC {FAR} ({SAMPLE_VF})  does not answer on the PCI bus" in text


def test_the_tree_counts_them(at: SimulatedHost) -> None:
    at.plan()
    situation = at.situation
    text = show.topology(situation.topology, situation.platform, situation.health, PLAIN)
    (line,) = [line for line in text.splitlines() if FAR in line]
    assert line.endswith(f"{FAR}, 8/8 VFs")
