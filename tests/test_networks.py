"""Networks of our own: names, subnets, VLANs; made on demand and removed with their last VM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hosts import ALL, SimulatedHost

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.decide import networks
from dgx_kvm_sw.decide.networks import HostNetworking, on_host
from dgx_kvm_sw.decide.plan import Intent
from dgx_kvm_sw.execute import Power
from dgx_kvm_sw.guest import domainxml, networkxml
from dgx_kvm_sw.guest.domainxml import LibvirtFeatures
from dgx_kvm_sw.guest.templates import Templates
from dgx_kvm_sw.host.networking import filtering_bridges, routes
from dgx_kvm_sw.model.domain import HostNetwork
from dgx_kvm_sw.model.spec import Network, NetworkKind

Host = Callable[..., SimulatedHost]
TENANTS = "tenants: {hr: {}, it: {}, hr-a: {}}\n"


@pytest.fixture
def at(host: Host) -> SimulatedHost:
    return host("dgx-h100")


@pytest.mark.parametrize(
    ("kind", "name", "tenant", "expected"),
    [
        ("nat", "", "", "dgx-kvm-nat"),
        ("nat", "", "hr", "dgx-kvm-nat.hr"),
        ("nat", "a", "", "dgx-kvm-nat..a"),
        ("isolated", "b", "hr-a", "dgx-kvm-isolated.hr-a.b"),
        ("isolated", "a-b", "hr", "dgx-kvm-isolated.hr.a-b"),
    ],
)
def test_tenants_never_share_a_name(kind: str, name: str, tenant: str, expected: str) -> None:
    found = on_host(Network(NetworkKind(kind), name), tenant)
    assert found == Network(NetworkKind.NETWORK, expected)


def test_networks_are_made_for_their_vms_and_removed_with_the_last(at: SimulatedHost) -> None:
    vm = "gpus: 0, tenant: hr, networks: [{nat: true}, {isolated: lab}]"
    at.declare(f"name: a, {vm}", f"name: b, {vm}", head=TENANTS)
    texts = [action.describe() for action in at.plan().actions]
    assert "make network dgx-kvm-nat.hr (192.168.150.1/24)" in texts
    at.settle()
    assert not at.plan().pending
    assert [n.name for n in at.state().networks] == ["dgx-kvm-isolated.hr.lab", "dgx-kvm-nat.hr"]
    at.declare(f"name: a, {vm}", head=TENANTS)
    at.settle(ALL)
    assert len(at.state().networks) == 2
    at.declare(head=TENANTS)
    plan = at.plan(ALL)
    assert [a.describe() for a in plan.actions][-1] == "remove network dgx-kvm-nat.hr"
    at.settle(ALL)
    assert at.state().networks == ()


def names(at: SimulatedHost) -> list[str]:
    return [network.name for network in at.state().networks]


@pytest.mark.parametrize("state", ["stopped", "running"])
def test_a_network_goes_in_the_apply_in_which_its_last_vm_leaves_it(
    at: SimulatedHost, state: str
) -> None:
    vm = f"name: a, gpus: 0, state: {state}, networks: [{{nat: true}}]"
    at.declare(f"{vm}, tenant: hr", head=TENANTS)
    at.settle()
    at.declare(f"{vm}, tenant: it", head=TENANTS)
    at.settle(Intent(restart=True))
    assert names(at) == ["dgx-kvm-nat.it"]
    assert not at.plan().pending


def test_a_running_vm_keeps_the_network_it_is_to_leave(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 0, networks: [{nat: true}]")
    at.settle()
    at.declare("name: a, gpus: 0")
    at.settle()
    assert names(at) == ["dgx-kvm-nat"]
    at.by_hand("a", lambda domain: domain.destroy())
    at.settle()  # it is off and defined without the network
    assert names(at) == []


def test_a_network_stays_without_a_word_when_its_vm_could_not_leave_it(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 0, networks: [{nat: true}]")
    at.settle()
    at.declare("name: a, gpus: 0")
    outcome = at.apply(Intent(restart=True), power=Power(timeout=0))
    assert [action.describe() for action, _ in outcome.failures] == ["shut down a"]
    assert names(at) == ["dgx-kvm-nat"]


def test_a_subnet_touches_no_route_and_no_network() -> None:
    have = (HostNetwork("default", "virbr0", "192.168.150.1/24", ours=False),)

    def address(*taken: str) -> str:
        used = [*taken, *(network.address for network in have)]
        return networks._free_address(used) or "none"

    assert address() == "192.168.151.1/24"
    assert address("192.168.0.0/16") == "172.20.150.1/24"
    assert address("192.168.0.0/16", "172.16.0.0/12") == "10.100.150.1/24"
    assert address("192.168.0.0/16", "172.16.0.0/12", "10.0.0.0/8") == "none"


def test_a_bridge_tags_vlans_only_where_it_can(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 0, networks: [{bridge: br0, vlan: 20}]")
    at.plan()
    vms = at.situation.spec.vms

    def refusal(libvirt: int, *filtering: str) -> str:
        host = HostNetworking((), filtering, libvirt)
        return " ".join(r.reasons[0] for r in networks.refusals(vms, {}, host))

    assert "libvirt 9.0 cannot put VLAN 20 on bridge br0" in refusal(9_000_000, "br0")
    assert "bridge br0 does not filter VLANs" in refusal(11_000_000)
    assert refusal(11_000_000, "br0") == ""


def test_a_vlan_survives_xml_and_libvirt_takes_it(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 0, networks: [{bridge: br0}]")
    at.settle()
    facts = at.domain("a").facts
    tagged = tuple(
        replace(each, network=replace(each.network, vlan=20)) for each in facts.interfaces
    )
    wanted = replace(facts, interfaces=tagged)
    features = LibvirtFeatures(allocation_threads=True, maxphysaddr=True)
    definition = domainxml.render(Templates(at.root), wanted, features)
    assert definition.facts == wanted
    with at.hypervisor() as hypervisor:
        hypervisor.define("a", definition.xml)
    assert at.domain("a").facts == wanted


def test_the_kernel_tells_routes_and_filtering_bridges(at: SimulatedHost) -> None:
    root: Root = at.root
    head = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
    rows = "eth0 00000000 0100000A 0003 0 0 0 00000000 0 0 0\neth0 0000000A 0 1 0 0 0 000000FF 0\n"
    root.write("/proc/net/route", head + rows)
    assert routes(root) == ("10.0.0.0/8",)


def test_filtering_bridges(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = Root(tmp_path_factory.mktemp("root"))
    root.write("/sys/class/net/br0/bridge/vlan_filtering", "1\n")
    root.write("/sys/class/net/br1/bridge/vlan_filtering", "0\n")
    assert filtering_bridges(root) == ("br0",)


@pytest.mark.parametrize("address", ["", "192.168.150.1/24"])
def test_networks_survive_xml(address: str) -> None:
    network = HostNetwork("dgx-kvm-x", "dgx-br", address)
    assert networkxml.parse(networkxml.render(network), active=True) == network
    assert ("nat" in networkxml.render(network)) is bool(address)
