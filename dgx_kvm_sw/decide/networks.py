"""Virtual networks of ours: what they are called, which addresses they get, who needs them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from dgx_kvm_sw.model.base import digest
from dgx_kvm_sw.model.domain import CurrentState, HostNetwork
from dgx_kvm_sw.model.placement import Unplaceable
from dgx_kvm_sw.model.spec import Network, NetworkKind, VmSpec

_OURS = (NetworkKind.NAT, NetworkKind.ISOLATED)
_BRIDGE_NAME = 15  # longest name of an interface in Linux
_BRIDGE_VLANS = 11_000_000  # libvirt 11.0.0 tags on bridges that filter VLANs


@dataclass(frozen=True)
class HostNetworking:
    """What the host's own network says to ours."""

    routes: tuple[str, ...] = ()  # "10.0.0.0/8"
    filtering: tuple[str, ...] = ()  # bridges that filter VLANs
    libvirt: int = 0  # version, as libvirt counts


def on_host(network: Network, tenant: str) -> Network:
    """What a network of the file is to libvirt: a network of ours is one of its networks.

    Tenant and name are kept apart by dots, which neither may hold: no two tenants share one.
    """
    if network.kind not in _OURS:
        return network
    parts = [tenant, network.source] if network.source else [tenant] if tenant else []
    return Network(NetworkKind.NETWORK, ".".join([f"dgx-kvm-{network.kind}", *parts]))


def needed(
    vms: Iterable[VmSpec], have: tuple[HostNetwork, ...], routes: tuple[str, ...]
) -> dict[str, HostNetwork]:
    """Return the networks of ours that these VMs need, by name: as they are, or as they will be.

    One that cannot be, for want of a subnet that nobody uses, is left out.
    """
    there = {network.name: network for network in have}
    used = [*routes, *(network.address for network in have if network.address)]
    networks: dict[str, HostNetwork] = {}
    for vm in vms:
        for network in vm.networks:
            name = on_host(network, vm.tenant).source
            if network.kind not in _OURS or name in networks:
                continue
            if name in there:
                networks[name] = there[name]
                continue
            address = _free_address(used) if network.kind is NetworkKind.NAT else ""
            if address is not None:
                used += [address] if address else []
                bridge = name if len(name) <= _BRIDGE_NAME else f"dgx-{digest(name)[:11]}"
                networks[name] = HostNetwork(name, bridge, address, active=False)
    return networks


def refusals(
    vms: Iterable[VmSpec], networks: dict[str, HostNetwork], host: HostNetworking
) -> Iterator[Unplaceable]:
    """Refuse VMs whose networks cannot be, before anything is changed."""
    for vm in vms:
        for network in vm.networks:
            if found := _refusal(vm, network, networks, host):
                yield found
                break


def unused(current: CurrentState, networks: Collection[str]) -> list[HostNetwork]:
    """Networks of ours that no VM needs and no domain has, or will have."""
    held = {name for domain in current.domains for name in domain.networks}
    return [n for n in current.networks if n.ours and n.name not in {*networks, *held}]


def _refusal(
    vm: VmSpec, network: Network, networks: dict[str, HostNetwork], host: HostNetworking
) -> Unplaceable | None:
    if network.kind in _OURS:
        name = on_host(network, vm.tenant).source
        if name not in networks:
            reason = "the host has routes to every private subnet that its NAT network could have"
            return Unplaceable(vm.name, (reason,), ("use a bridge of the host instead",))
        if not networks[name].ours:
            reason = f"libvirt has a network {name} that dgx-kvm did not make"
            return Unplaceable(vm.name, (reason,), ("rename or undefine that network",))
    if network.kind is NetworkKind.BRIDGE and network.vlan:
        return _bridge_refusal(vm, network, host)
    return None


def _bridge_refusal(vm: VmSpec, network: Network, host: HostNetworking) -> Unplaceable | None:
    bridge, vlan = network.source, network.vlan
    if host.libvirt < _BRIDGE_VLANS:
        version = f"{host.libvirt // 1_000_000}.{host.libvirt // 1000 % 1000}"
        reason = f"libvirt {version} cannot put VLAN {vlan} on bridge {bridge}: 11.0 is the first"
    elif bridge not in host.filtering:
        reason = f"bridge {bridge} does not filter VLANs, so it cannot put VLAN {vlan} on a port"
    else:
        return None
    hint = f"make a VLAN interface with tag {vlan} and a bridge of it, and name that bridge"
    return Unplaceable(vm.name, (reason,), (hint,))


def _free_address(used: list[str]) -> str | None:
    """The host's address in the first private subnet that touches nothing used."""
    from ipaddress import ip_interface  # takes time that a plan without NAT need not pay

    taken = [ip_interface(each).network for each in used]
    taken = [network for network in taken if network.version == 4]
    candidates = [f"192.168.{n}.1/24" for n in range(150, 250)]
    candidates += [f"172.{n}.150.1/24" for n in range(20, 32)]
    candidates += [f"10.{n}.150.1/24" for n in range(100, 250)]
    for candidate in candidates:
        network = ip_interface(candidate).network
        if not any(network.overlaps(other) for other in taken):
            return candidate
    return None
