"""The one connection to libvirt, on its own test driver: what it does, and what it says."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import libvirt
import pytest
from hosts import FOREIGN_XML, SimulatedHost

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.guest import domainxml
from dgx_kvm_sw.guest.hypervisor import POOL, Hypervisor
from dgx_kvm_sw.model.domain import Ownership, Volume
from dgx_kvm_sw.model.errors import HypervisorError
from dgx_kvm_sw.model.pci import CpuSet

XML = FOREIGN_XML.format(name="a", memory=1, vcpus=2, cputune="", devices="")
NOBODY = "00000000-0000-0000-0000-000000000000"


@pytest.fixture
def hypervisor(tmp_path: Path) -> Iterator[Hypervisor]:
    """A connection of its own: test:///default is one for the whole process."""
    (tmp_path / "node.xml").write_text("<node/>")
    connection = Hypervisor(f"test://{tmp_path}/node.xml")
    yield connection
    connection.close()


@pytest.fixture
def uuid(hypervisor: Hypervisor) -> str:
    hypervisor.define("a", XML)
    return hypervisor.domain("a").uuid


def test_domains_are_listed_by_name_with_what_they_run(hypervisor: Hypervisor, uuid: str) -> None:
    hypervisor.define("Z", XML.replace("<name>a", "<name>Z"))
    hypervisor.start("a", uuid)
    assert [(each.name, each.live is not None) for each in hypervisor.domains()] == [
        ("Z", False),
        ("a", True),
    ]
    assert hypervisor.domain("a").uuid == uuid


def test_a_misspelt_element_is_refused_and_nothing_changes(hypervisor: Hypervisor) -> None:
    """The control is VALIDATE: without it the test driver drops the element silently."""
    with pytest.raises(HypervisorError, match="could not define a: .*schema"):
        hypervisor.define("a", XML.replace("<vcpu>", "<vcpuu>1</vcpuu><vcpu>"))
    assert hypervisor.domains() == ()


@pytest.mark.parametrize(
    ("words", "act"),
    [
        ("could not start x: ", lambda h: h.start("x", NOBODY)),
        ("could not shut down x: ", lambda h: h.shut_down("x", NOBODY, 1, force=False)),
        ("could not find x: ", lambda h: h.domain("x")),
        ("could not define x: ", lambda h: h.define("x", "<domain")),
        ("could not delete the disk /x: ", lambda h: h.delete_volume("/x")),
        ("could not create the disk x: ", lambda h: h.create_volume(Volume("x", "/x", 1, "raw"))),
    ],
)
def test_errors_name_the_deed_and_the_object_on_one_line(
    hypervisor: Hypervisor, words: str, act: Callable[[Hypervisor], None]
) -> None:
    with pytest.raises(HypervisorError) as caught:
        act(hypervisor)
    assert caught.value.message.startswith(f"libvirt {words}")
    assert "\n" not in caught.value.message


def test_a_libvirt_that_does_not_answer_is_said() -> None:
    with pytest.raises(HypervisorError, match="libvirt does not answer at test:///nowhere.xml"):
        Hypervisor("test:///nowhere.xml")


def test_a_running_domain_is_not_started_again(hypervisor: Hypervisor, uuid: str) -> None:
    hypervisor.start("a", uuid)
    with pytest.raises(HypervisorError, match="already running"):
        hypervisor.start("a", uuid)


def test_shutting_down_what_is_off_is_done(hypervisor: Hypervisor, uuid: str) -> None:
    hypervisor.shut_down("a", uuid, 1, force=False)


@pytest.mark.parametrize("force", [False, True])
def test_a_guest_that_does_not_listen(hypervisor: Hypervisor, uuid: str, force: bool) -> None:
    """No time to wait is what such a guest comes to; only force turns it off."""
    hypervisor.start("a", uuid)
    expect_only_force_to_stop(hypervisor, uuid, 0, force, "a did not shut down within 0 s")


def expect_only_force_to_stop(
    hypervisor: Hypervisor, uuid: str, seconds: float, force: bool, otherwise: str
) -> None:
    if force:
        hypervisor.shut_down("a", uuid, seconds, force=True)
    else:
        with pytest.raises(HypervisorError, match=otherwise) as caught:
            hypervisor.shut_down("a", uuid, seconds, force=False)
        assert "dgx-kvm stop a --force" in caught.value.hint
    assert (hypervisor.domain("a").live is None) is force


def test_a_shut_down_waits_for_its_end(hypervisor: Hypervisor, uuid: str) -> None:
    hypervisor.start("a", uuid)
    hypervisor.shut_down("a", uuid, 5, force=False)
    assert hypervisor.domain("a").live is None


@pytest.mark.parametrize("way", ["shutdown", "destroy"])
def test_a_guest_may_go_off_by_itself_just_before(
    hypervisor: Hypervisor, uuid: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control is the refusal: libvirt turns nothing off that is off."""
    destroy, refused = libvirt.virDomain.destroy, getattr(libvirt.virDomain, way)

    def late(domain: libvirt.virDomain) -> None:
        destroy(domain)
        with pytest.raises(libvirt.libvirtError, match="not running"):
            refused(domain)
        refused(domain)

    monkeypatch.setattr(libvirt.virDomain, way, late)
    hypervisor.start("a", uuid)
    hypervisor.shut_down("a", uuid, 1 if way == "shutdown" else 0, force=way == "destroy")
    assert hypervisor.domain("a").live is None


def test_a_guest_that_has_powered_off_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU takes its time to give back GPUs and memory; libvirt refuses to ask it again."""
    monkeypatch.setattr("dgx_kvm_sw.guest.hypervisor._ASK_AGAIN_SECONDS", 0)
    powered_off = "<runstate xmlns='http://libvirt.org/schemas/domain/test/1.0'>4</runstate>"
    domain = XML.replace("</domain>", f"{powered_off}</domain>")
    (tmp_path / "node.xml").write_text(f"<node>{domain}</node>")
    with contextlib.closing(Hypervisor(f"test://{tmp_path}/node.xml")) as hypervisor:
        uuid = hypervisor.domain("a").uuid
        with pytest.raises(HypervisorError, match="a did not shut down within"):
            hypervisor.shut_down("a", uuid, 0.5, force=False)
        assert hypervisor.domain("a").live is not None  # the test driver would turn it off
        ends = libvirt_domain(hypervisor, uuid).destroy
        monkeypatch.setattr("dgx_kvm_sw.guest.hypervisor.time.sleep", lambda _: ends())
        hypervisor.shut_down("a", uuid, 5, force=False)
        assert hypervisor.domain("a").live is None


@pytest.mark.parametrize("force", [False, True])
def test_a_paused_guest_hears_nothing(hypervisor: Hypervisor, uuid: str, force: bool) -> None:
    hypervisor.start("a", uuid)
    libvirt_domain(hypervisor, uuid).suspend()
    begin = time.monotonic()
    expect_only_force_to_stop(hypervisor, uuid, 30, force, "a is paused")
    assert time.monotonic() - begin < 20


def libvirt_domain(hypervisor: Hypervisor, uuid: str) -> libvirt.virDomain:
    return hypervisor._connection.lookupByUUIDString(uuid)


def test_pins_and_metadata_of_a_running_domain_change(hypervisor: Hypervisor) -> None:
    """The test driver has 8 CPUs here; nothing of the definition changes."""
    tune = "<cputune><vcpupin vcpu='0' cpuset='0'/><emulatorpin cpuset='0'/></cputune>"
    hypervisor.define("a", XML.replace("<os>", f"{tune}<os>"))
    facts = domainxml.parse(hypervisor.domain("a").inactive)
    hypervisor.start("a", facts.uuid)
    pins = (CpuSet.of((3,)), CpuSet.of((4, 5)))
    moved = replace(facts, vcpu_pins=pins, emulator_pin=CpuSet.of((7,)))
    hypervisor.update_live(moved, domainxml.metadata(Ownership("hr", "t", "d")))
    live = hypervisor.domain("a").live
    assert live is not None
    now = domainxml.parse(live)
    assert (now.vcpu_pins, now.emulator_pin) == (pins, CpuSet.of((7,)))
    assert now.owner == Ownership("hr", "t", "d")


def test_the_pool_is_made_once_and_holds_volumes(hypervisor: Hypervisor) -> None:
    assert hypervisor.volumes() == ()
    hypervisor.ensure_pool("/pool")
    hypervisor.ensure_pool("/pool")
    disk = Volume("a.os.qcow2", "/pool/a.os.qcow2", 2048, "qcow2", "/images/a&b.qcow2", "qcow2")
    hypervisor.create_volume(disk)
    assert hypervisor.volumes() == (disk,)
    with pytest.raises(HypervisorError, match="exists"):
        hypervisor.create_volume(disk)
    hypervisor.remove_empty_pool()
    assert hypervisor.volumes() == (disk,), "there is a disk on it"
    hypervisor.delete_volume(disk.path)
    hypervisor.remove_empty_pool()
    with pytest.raises(libvirt.libvirtError):
        hypervisor._connection.storagePoolLookupByName(POOL)
    assert hypervisor.volumes() == ()
    assert POOL == "dgx-kvm"


def test_disks_of_a_pool_that_is_off_are_not_known(hypervisor: Hypervisor) -> None:
    """None at all is what only a host without the pool has."""
    hypervisor.ensure_pool("/pool")
    hypervisor._connection.storagePoolLookupByName(POOL).destroy()
    for fresh in (False, True):
        with pytest.raises(HypervisorError, match="pool dgx-kvm is not active, so") as caught:
            hypervisor.volumes(fresh=fresh)
        assert caught.value.hint == "virsh pool-start dgx-kvm"


# -- the simulation's memory ------------------------------------------------------------------


@pytest.fixture
def at(host: Callable[..., SimulatedHost]) -> SimulatedHost:
    return host("dgx-b200")


def test_the_simulation_remembers_between_commands(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 1", "name: b, gpus: 0, state: stopped")
    at.settle()
    first = at.state()
    assert [domain.running for domain in first.domains] == [True, False]
    assert at.state() == first


def test_the_simulation_moves_pins_beyond_the_eighth_cpu(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 1, pin: [7]")
    at.settle()
    before = at.domain("a").live
    at.by_hand("a", lambda domain: domain.pinVcpu(0, (True,)))
    at.settle()
    assert at.domain("a").live == before and before is not None
    assert min(min(pin) for pin in before.vcpu_pins) > 8


@pytest.mark.parametrize("folder", ["domains", "volumes"])
def test_a_half_written_file_of_a_killed_command_is_passed_over(
    at: SimulatedHost, folder: str
) -> None:
    at.declare("name: a, gpus: 0")
    at.settle()
    before = at.state()
    at.root.path(f"/libvirt/{folder}/.a.json.x7d2k").write_text('{"inactive": "<dom')
    assert at.state() == before


def test_hosts_are_apart(host: Callable[..., SimulatedHost]) -> None:
    one, other = host("dgx-b200", "one"), host("dgx-b200", "other")
    one.declare("name: a, gpus: 0")
    one.settle()
    assert other.state().domains == ()
    saved = json.loads(one.root.read("/libvirt/domains/a.json"))
    assert saved.keys() == {"inactive", "live"}
    assert isinstance(one.root, Root) and isinstance(one.root.directory, Path)
