"""What firmware made of a guest's PCIe tree, as QEMU's monitor tells it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from integration.private_libvirtd import Libvirtd

UNASSIGNED = -1


@dataclass(frozen=True)
class Function:
    """A PCI function that is no bridge."""

    alias: str  # libvirt's name of the device
    buses: tuple[int, ...]  # those that lead to it, from its root bus down; 0 = not numbered yet
    bars: tuple[tuple[int, int], ...]  # address and size


def functions(libvirtd: Libvirtd, domain: str) -> dict[str, Function]:
    """Return every function of the guest but for its bridges, by alias."""
    answer = libvirtd.virsh("qemu-monitor-command", domain, '{"execute": "query-pci"}')
    roots = json.loads(answer)["return"]
    found = [each for root in roots for each in _below(root["devices"], (root["bus"],))]
    return {function.alias: function for function in found}


def _below(devices: list[dict[str, Any]], buses: tuple[int, ...]) -> Iterator[Function]:
    for device in devices:
        if bridge := device.get("pci_bridge"):
            below = (*buses, bridge["bus"]["secondary"])
            yield from _below(bridge.get("devices", []), below)
        else:
            bars = tuple((region["address"], region["size"]) for region in device["regions"])
            yield Function(device["qdev_id"], buses, bars)
