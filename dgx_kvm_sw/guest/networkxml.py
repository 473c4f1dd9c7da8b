"""Virtual networks of ours to libvirt's XML, and any network back to what matters of it."""

from __future__ import annotations

from html import escape
from xml.etree import ElementTree

from dgx_kvm_sw.model.domain import HostNetwork

NAMESPACE = "urn:dgx-kvm:network:1"


def render(network: HostNetwork) -> str:
    """A network with an address of the host is NAT; one without is nothing but a bridge."""
    name, bridge = escape(network.name), escape(network.bridge)
    about = f"<metadata><dgx-kvm:network xmlns:dgx-kvm='{NAMESPACE}'/></metadata>"
    forward = addresses = ""
    if network.address:
        host, _, bits = network.address.partition("/")
        first = host.rpartition(".")[0]
        forward = "<forward mode='nat'/>"
        addresses = (
            f"<ip address='{host}' prefix='{bits}'>"
            f"<dhcp><range start='{first}.2' end='{first}.254'/></dhcp></ip>"
        )
    bridged = f"<bridge name='{bridge}' stp='on' delay='0'/>"
    return f"<network><name>{name}</name>{about}{forward}{bridged}{addresses}</network>"


def parse(xml: str, *, active: bool) -> HostNetwork:
    network = ElementTree.fromstring(xml)
    bridge, ip = network.find("bridge"), network.find("ip")
    address = ""
    if ip is not None and ip.get("family", "ipv4") == "ipv4":
        mask = ip.get("netmask", "255.255.255.255").split(".")
        bits = ip.get("prefix") or sum(int(byte).bit_count() for byte in mask)
        address = f"{ip.get('address', '')}/{bits}"
    return HostNetwork(
        name=(network.findtext("name") or "").strip(),
        bridge=bridge.get("name", "") if bridge is not None else "",
        address=address,
        ours=network.find(f"metadata/{{{NAMESPACE}}}network") is not None,
        active=active,
    )
