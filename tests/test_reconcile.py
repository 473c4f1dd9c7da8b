"""gather(): files, host and libvirt in one picture; who a VM is, what a name means."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hosts import SimulatedHost

from dgx_kvm_sw.decide.plan import Intent
from dgx_kvm_sw.model.actions import PreparePartition, ShutDownDomain, StartDomain
from dgx_kvm_sw.model.errors import BadFileError, HostError, UsageError


@pytest.fixture
def at(host: Callable[..., SimulatedHost]) -> SimulatedHost:
    return host("dgx-h100")


def test_a_vm_is_the_same_to_libvirt_for_ever(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 0, networks: [{bridge: br0}, {bridge: br1}]")
    at.settle()
    first = at.domain("a").facts
    assert first.interfaces[0].mac != first.interfaces[1].mac
    at.declare()
    at.settle(Intent(restart=True, prune=True))
    at.declare("name: b, gpus: 0", "name: a, gpus: 0, networks: [{bridge: br0}, {bridge: br1}]")
    at.settle()
    again = at.domain("a").facts
    assert (again.uuid, again.interfaces) == (first.uuid, first.interfaces)
    assert all(interface.mac.startswith("52:54:00:") for interface in again.interfaces)


def test_two_hosts_give_a_name_two_identities(host: Callable[..., SimulatedHost]) -> None:
    uuids = set()
    for name in ("dgx-h100", "dgx-h200"):
        each = host(name, name)
        each.declare("name: a, gpus: 0, state: stopped")
        each.settle()
        uuids.add(each.domain("a").facts.uuid)
    assert len(uuids) == 2


def test_a_new_machine_id_keeps_the_domains_there_are(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 1")
    at.settle()
    at.root.write("/etc/machine-id", "0" * 32 + "\n", sync=False)
    assert not at.plan().pending


@pytest.mark.parametrize("text", ["", "x" * 32, "0" * 31])
def test_without_a_machine_id_nothing_is_made(at: SimulatedHost, text: str) -> None:
    at.root.write("/etc/machine-id", text, sync=False)
    at.declare("name: a, gpus: 1")
    with pytest.raises(HostError, match="does not hold a machine id") as caught:
        at.apply()
    assert "systemd-machine-id-setup" in caught.value.hint


def test_a_bad_file_changes_nothing(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 3")
    with pytest.raises(BadFileError):
        at.apply()
    assert at.state().domains == ()


def test_what_passed_the_schema_is_remembered_by_its_text(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 1")
    at.plan()
    remembered = at.root.read("/run/dgx-kvm/validated")
    assert remembered == at.situation.spec.digest
    at.declare("name: a, gpus: 3")
    with pytest.raises(BadFileError):
        at.plan()
    assert at.root.read("/run/dgx-kvm/validated") == remembered


# -- the fingerprint --------------------------------------------------------------------------


def fingerprint(at: SimulatedHost) -> str:
    at.plan()
    return at.situation.fingerprint


def test_the_same_situation_has_the_same_fingerprint(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 1")
    assert fingerprint(at) == fingerprint(at)


@pytest.mark.parametrize("change", ["file", "size", "template", "libvirt", "quarantine"])
def test_every_input_is_in_the_fingerprint(at: SimulatedHost, change: str) -> None:
    at.declare("name: a, gpus: 1")
    before = fingerprint(at)
    if change == "file":
        at.declare("name: a, gpus: 1 ")
    elif change == "size":
        shipped = at.site.root.directory.parents[0]  # the admin's copy differs by a comment
        assert shipped.exists()
        from dgx_kvm_sw.access.files import template_path

        text = template_path(at.root, "1-gpu.yaml").read_text()
        at.template("1-gpu.yaml", f"{text}# mine\n")
    elif change == "template":
        from dgx_kvm_sw.access.files import template_path

        text = template_path(at.root, "domain.xml.j2").read_text()
        at.template("domain.xml.j2", f"{text}{{# mine #}}\n")
    elif change == "libvirt":
        at.foreign("theirs")
    else:
        address = at.situation.topology.gpus[3].pci.address
        at.root.write(
            "/var/lib/dgx-kvm/health.json",
            f'{{"version": 1, "devices": [{{"address": "{address}", "state": "failed",'
            ' "reason": "XID 79", "since": "now"}]}',
        )
    assert fingerprint(at) != before


# -- names ------------------------------------------------------------------------------------


def test_a_name_leads_to_a_domain_or_a_reason(at: SimulatedHost) -> None:
    at.foreign("theirs")
    at.declare("name: train, gpus: 1")
    at.settle()
    at.declare("name: train, gpus: 1", "name: later, gpus: 1")
    at.plan()
    assert at.situation.domain("train").running
    for name, words, hint in (
        ("theirs", "a domain that dgx-kvm did not make", "use virsh"),
        ("later", "declared but not made yet", "dgx-kvm apply"),
        ("trian", "there is no VM trian", "did you mean train?"),
        ("zzzzzz", "there is no VM zzzzzz", "dgx-kvm status"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            at.situation.domain(name)
        assert hint in caught.value.hint


# -- start, stop, restart ---------------------------------------------------------------------


def test_every_start_is_prepared_with_its_partition(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 2, state: stopped")
    at.settle()
    at.plan()
    prepare, start = at.situation.start_actions("a")
    assert isinstance(prepare, PreparePartition) and isinstance(start, StartDomain)
    held = tuple(hostdev.source for hostdev in at.domain("a").facts.hostdevs)
    assert prepare.devices == held
    assert prepare.partition is not None and prepare.partition.size == 2


def test_start_and_stop_do_nothing_where_nothing_is_to_do(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 1", "name: b, gpus: 1, state: stopped")
    at.settle()
    at.plan()
    assert at.situation.start_actions("a") == ()
    assert at.situation.stop_actions("b") == ()
    stop, _, *start = at.situation.restart_actions("a")
    assert isinstance(stop, ShutDownDomain) and len(start) == 2


def test_a_stop_releases_what_runs_and_a_start_takes_what_is_defined(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 1")
    at.settle()
    at.declare("name: a, gpus: 2")
    at.settle()
    at.plan()
    _, release, prepare, _ = at.situation.restart_actions("a")
    assert len(getattr(prepare, "devices")) > len(getattr(release, "devices"))  # noqa: B009
