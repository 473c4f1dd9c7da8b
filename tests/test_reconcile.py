"""gather(): files, host and libvirt in one picture; who a VM is, what a name means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import SimulatedHost
from machines import own, unplug

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


@pytest.mark.parametrize(
    "asked",
    [
        "disks: [{name: d, size: 40TiB, lvm: data}]",
        "disks: [{name: d, size: 1GiB, lvm: nothing-there}]",
        "networks: [{bridge: br0, vlan: 5}]",
    ],
)
def test_what_a_vm_runs_on_is_nobodys_as_long_as_it_cannot_be_what_it_asks(
    at: SimulatedHost, asked: str
) -> None:
    """Whatever refuses it: it is not stopped, so it leaves nothing to others."""
    at.declare("name: a, gpus: 8")
    at.settle()
    at.declare(f"name: a, gpus: 4, {asked}", "name: b, gpus: 4")
    plan = at.plan(Intent(restart=True))
    assert {refused.vm for refused in plan.unplaceable} == {"a", "b"}
    assert plan.actions == ()
    at.declare("name: a, gpus: 4", "name: b, gpus: 4")
    assert at.plan(Intent(restart=True)).unplaceable == ()


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


def test_growth_of_a_running_vm_is_refused_as_it_would_be_for_a_new_one(at: SimulatedHost) -> None:
    """Its own GPUs do not hide the GPUs that wait, and no other place is offered to it."""
    at.declare("name: a, gpus: 1, state: running")
    at.settle()
    before = at.domain("a").facts
    at.declare("name: a, gpus: 1, vcpus: 40")
    for intent in (Intent(), Intent(restart=True)):
        (refused,) = at.plan(intent).unplaceable
        assert "would eat into the share" in refused.reasons[0]
    at.apply()
    assert at.domain("a").facts == before


def test_a_gpu_that_is_gone_moves_no_number_no_vm_and_no_share(tmp_path: Path) -> None:
    host = SimulatedHost(own("dgx2", tmp_path))
    host.declare(
        "name: p, gpus: 1, pin: [8]", "name: q, gpus: 2, pin: [10, 11]", "name: r, gpus: 1"
    )
    host.settle()
    holders = {a for d in host.state().domains for h in d.facts.hostdevs for a in (h.source,)}
    free = [g.pci.address for g in host.situation.topology.gpus if g.pci.address not in holders]
    unplug(host.root, free[0])
    assert not host.plan(Intent(restart=True)).pending
    host.declare("name: p, gpus: 1, pin: [8]", "name: n, gpus: 1")
    assert "4 threads, 86 GiB" in host.row("n").summary


def test_a_defined_vm_without_gpus_keeps_what_it_has(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 8", "name: c, gpus: 0, vcpus: 8")
    at.settle()
    at.declare("name: a, gpus: 8, state: stopped", "name: c, gpus: 0, vcpus: 8, state: stopped")
    at.settle(Intent(restart=True))
    at.declare("name: n, gpus: 4", "name: c, gpus: 0, vcpus: 8, state: stopped")
    at.settle(Intent(restart=True, prune=True))
    assert not at.plan().pending


ADDS_A_GPU = """{#- template_api: 1 -#}
{% extends "dist/domain.xml.j2" %}
{% block extra_devices %}<hostdev mode="subsystem" type="pci" managed="no"><source>
<address domain="0" bus="0x43" slot="0" function="0"/></source></hostdev>{% endblock %}
"""


def test_a_template_cannot_give_away_what_another_vm_has(at: SimulatedHost) -> None:
    at.template("site.xml.j2", ADDS_A_GPU)
    at.declare("name: a, gpus: 1, pin: [1]", "name: b, gpus: 0, template: site.xml.j2")
    (refused,) = at.plan().unplaceable
    assert refused.vm == "b"
    assert refused.reasons == ("site.xml.j2 adds GPU 1 (0000:43:00.0), which a holds",)
    at.settle()
    assert [domain.name for domain in at.state().domains] == ["a"]


def test_a_new_vm_of_an_old_name_names_the_disks_it_takes(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 0")
    at.settle()
    at.declare()
    gone = at.row("a", Intent(restart=True, prune=True))
    assert ("disks", "kept") in [(change.field, change.new) for change in gone.changes]
    at.settle(Intent(restart=True, prune=True))
    at.declare("name: a, gpus: 0")
    (change,) = at.row("a").changes
    assert (change.field, change.old, change.new) == ("disks", "a.os.qcow2", "used as they are")


def test_pages_that_a_node_has_not_are_named(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 1, hugepages: 2MiB")
    (refused,) = at.plan().unplaceable
    assert "has no pages of 2 MiB" in refused.reasons[0]
