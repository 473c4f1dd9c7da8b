"""Every shape of GPU VM on every platform is one that libvirt, QEMU and UEFI accept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from xml.etree import ElementTree

import pytest
from hosts import SimulatedHost

from dgx_kvm_sw.guest.domainxml import parse
from dgx_kvm_sw.guest.hypervisor import Hypervisor
from dgx_kvm_sw.host import simulate
from dgx_kvm_sw.model.domain import DomainFacts, PciController
from integration.guest_pci import UNASSIGNED, Function, functions
from integration.private_libvirtd import BRIDGE, Libvirtd
from integration.stand_ins import bar_mib, startable

pytestmark = pytest.mark.integration

SHAPES = [
    (platform, gpus)
    for platform in simulate.names()
    for gpus in (1, 2, 4, 8, 16)
    if gpus < 16 or platform == "dgx2"
]
# The largest trees, and the largest BARs; with the largest trees of those, emulation is slow.
BOOTED = [("dgx2", 16), ("dgx-a100", 8), ("dgx-h100", 1), ("dgx-b200", 1)]
_BOOT_SECONDS = 120


def shape(host: SimulatedHost, gpus: int, vcpus_per_cell: int = 0) -> tuple[DomainFacts, str]:
    host.declare(f"name: vm, gpus: {gpus}, networks: [{{bridge: {BRIDGE}}}]")
    host.plan()
    definition = host.situation.definitions["vm"]
    topology = host.situation.topology
    return definition.facts, startable(definition.xml, topology, vcpus_per_cell=vcpus_per_cell)


@contextlib.contextmanager
def started(libvirtd: Libvirtd, xml: str, *options: str) -> Iterator[None]:
    disk = "/var/lib/dgx-kvm/images/vm.os.qcow2"
    libvirtd.inside("qemu-img", "create", "-q", "-f", "qcow2", disk, "1G")
    hypervisor = Hypervisor(libvirtd.uri)
    hypervisor.define("vm", xml)
    try:
        libvirtd.virsh("start", "vm", *options)
        yield
        libvirtd.virsh("destroy", "vm")
    finally:
        hypervisor.undefine("vm", hypervisor.domain("vm").uuid)
        hypervisor.close()


@pytest.mark.parametrize(("platform", "gpus"), SHAPES)
def test_qemu_takes_the_shape(
    libvirtd: Libvirtd, host: Callable[[str], SimulatedHost], platform: str, gpus: int
) -> None:
    facts, xml = shape(host(platform), gpus)
    with started(libvirtd, xml, "--paused"):
        live = libvirtd.virsh("dumpxml", "vm")
    assert parse(live).controllers == facts.controllers
    addresses = ElementTree.fromstring(live).iterfind("devices/shmem/address")
    buses = [int(address.get("bus", "0"), 0) for address in addresses]
    assert buses == [hostdev.bus for hostdev in facts.hostdevs]


@pytest.mark.parametrize(("platform", "gpus"), BOOTED)
def test_firmware_numbers_the_tree_and_places_all_bars(
    libvirtd: Libvirtd, host: Callable[[str], SimulatedHost], platform: str, gpus: int
) -> None:
    here = host(platform)
    facts, xml = shape(here, gpus, vcpus_per_cell=2)
    with started(libvirtd, xml):
        found = booted(libvirtd, len(facts.hostdevs))
    expanders = [c for c in facts.controllers if c.bus_nr is not None]
    ends = [*(expander.bus_nr for expander in expanders), 256][1:]
    after = {expander.index: end for expander, end in zip(expanders, ends, strict=True)}
    for number, hostdev in enumerate(facts.hostdevs):
        function = found[f"shmem{number}"]
        *_, expander = controllers_above(facts, hostdev.bus)
        first, *below = function.buses
        assert first == expander.bus_nr
        assert below == sorted(set(below))
        assert first < below[0] and below[-1] < (after[expander.index] or 0)
        sizes = [size for _, size in function.bars]
        assert bar_mib(here.situation.topology, hostdev.source) << 20 in sizes
    others = [function for alias, function in found.items() if not alias.startswith("shmem")]
    assert others and all(function.buses[0] == 0 for function in others)


def controllers_above(facts: DomainFacts, bus: int) -> Iterator[PciController]:
    """The controllers from this bus up to its expander bus."""
    by_index = {controller.index: controller for controller in facts.controllers}
    up: int | None = bus
    while up is not None:
        yield by_index[up]
        up = by_index[up].bus


def booted(libvirtd: Libvirtd, stand_ins: int) -> dict[str, Function]:
    """Wait until firmware has placed every BAR of every stand-in."""
    deadline = time.monotonic() + _BOOT_SECONDS
    while time.monotonic() < deadline:
        found = functions(libvirtd, "vm")
        ready = [
            alias
            for alias, function in found.items()
            if alias.startswith("shmem") and not any(UNASSIGNED in bar for bar in function.bars)
        ]
        if len(ready) == stand_ins:
            return found
        time.sleep(0.5)
    raise AssertionError(f"not all BARs have an address after {_BOOT_SECONDS} s")
