"""What firmware made of a guest's PCIe tree, as QEMU's monitor tells it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from integration.private_libvirtd import Libvirtd

UNASSIGNED = -1
IVSHMEM = (0x1AF4, 0x1110)  # vendor, device


@dataclass(frozen=True)
class Function:
    """A PCI function that is no bridge; `buses` lead to it from its root bus down."""

    buses: tuple[int, ...]
    id: tuple[int, int]  # vendor, device
    bars: tuple[tuple[int, int], ...]  # address and size


def enumerated(libvirtd: Libvirtd, domain: str) -> list[Function]:
    """Return every function of the guest but for its bridges."""
    answer = libvirtd.virsh("qemu-monitor-command", domain, '{"execute": "query-pci"}')
    found: list[Function] = []
    for root in json.loads(answer)["return"]:
        _walk(root["devices"], (root["bus"],), found)
    return found


def _walk(devices: list[dict[str, Any]], buses: tuple[int, ...], found: list[Function]) -> None:
    for device in devices:
        if bridge := device.get("pci_bridge"):
            _walk(bridge.get("devices", []), (*buses, bridge["bus"]["secondary"]), found)
            continue
        bars = tuple((region["address"], region["size"]) for region in device["regions"])
        found.append(Function(buses, (device["id"]["vendor"], device["id"]["device"]), bars))
