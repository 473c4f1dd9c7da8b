"""guest_tree(): the guest sees the host's PCIe tree, cut down to what it gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from machines import MACHINES
from placing import declare, inputs_of, vm

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.decide.fit import Inputs
from dgx_kvm_sw.decide.guest_pci import guest_tree, mmio64_mib
from dgx_kvm_sw.decide.placement import place
from dgx_kvm_sw.model.domain import Hostdev, PciController
from dgx_kvm_sw.model.pci import PciAddress, PciDevice

Tree = tuple[tuple[PciController, ...], tuple[Hostdev, ...]]

CASES = [
    (name, size)
    for name in MACHINES
    for size in ((1, 2, 4, 8, 16) if name == "dgx2" else (1, 2, 4, 8))
]


@pytest.fixture(scope="module")
def inputs(machine: Callable[[str], Root]) -> Callable[[str], Inputs]:
    return lambda name: inputs_of(machine(name))


def devices_of(inputs: Inputs, size: int) -> list[PciDevice]:
    """What the last of as many VMs as fit gets: one that is not at the machine's start."""
    count = len(inputs.topology.gpus) // size
    placed = place(declare(inputs, *(vm(f"v{n}", size) for n in range(count)))).placed
    return [d for d in inputs.topology.devices() if d.address in placed[-1].devices]


def node(device: PciDevice) -> int:
    return device.numa_node or 0


def chain(tree: Tree, address: PciAddress) -> list[int]:
    """Controllers from the expander bus down to the port that a device sits on."""
    controllers = {controller.index: controller for controller in tree[0]}
    (bus,) = (hostdev.bus for hostdev in tree[1] if hostdev.source == address)
    found = [bus]
    while (above := controllers[found[0]].bus) is not None:
        found.insert(0, above)
    return found


@pytest.mark.parametrize(("name", "size"), CASES)
def test_devices_meet_where_they_meet_on_the_host(
    inputs: Callable[[str], Inputs], name: str, size: int
) -> None:
    """For any two devices: a shared guest switch exactly if the host has one, and as deep."""
    devices = devices_of(inputs(name), size)
    tree = guest_tree(devices, node)
    for one in devices:
        for other in devices:
            if one.address >= other.address:
                continue
            mine, theirs = chain(tree, one.address), chain(tree, other.address)
            assert (mine[0] == theirs[0]) is (one.root == other.root)
            assert (mine[1] == theirs[1]) is (one.upstream[0] == other.upstream[0])


@pytest.mark.parametrize(("name", "size"), CASES)
def test_a_third_device_is_as_near_as_on_the_host(
    inputs: Callable[[str], Inputs], name: str, size: int
) -> None:
    """Of two devices the one that is nearer to a GPU on the host is not farther in the guest."""
    devices = devices_of(inputs(name), size)
    tree = guest_tree(devices, node)

    def shared(one: list[object], other: list[object]) -> int:
        return sum(1 for a, b in zip(one, other, strict=False) if a == b)

    for gpu in devices[:4]:
        depths = sorted(
            (
                shared([gpu.root, *gpu.upstream], [other.root, *other.upstream]),
                shared([*chain(tree, gpu.address)], [*chain(tree, other.address)]),
            )
            for other in devices
            if other != gpu
        )
        guest = [depth for _, depth in depths]
        assert guest == sorted(guest)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_every_device_has_a_port_of_its_own(
    inputs: Callable[[str], Inputs], name: str, size: int
) -> None:
    devices = devices_of(inputs(name), size)
    controllers, hostdevs = guest_tree(devices, node)
    models = {controller.index: controller.model for controller in controllers}
    assert {hostdev.source for hostdev in hostdevs} == {device.address for device in devices}
    assert len({hostdev.bus for hostdev in hostdevs}) == len(devices)
    ports = {"pcie-root-port", "pcie-switch-downstream-port"}
    assert {models[hostdev.bus] for hostdev in hostdevs} <= ports


@pytest.mark.parametrize(("name", "size"), CASES)
def test_expander_buses_have_room_for_all_below_them(
    inputs: Callable[[str], Inputs], name: str, size: int
) -> None:
    controllers, _ = guest_tree(devices_of(inputs(name), size), node)
    expanders = [c for c in controllers if c.model == "pcie-expander-bus"]
    below = Counter(
        chain((controllers, (Hostdev(PciAddress(0, 0, 0, 0), c.index),)), PciAddress(0, 0, 0, 0))[0]
        for c in controllers
    )
    end = 256
    for expander in sorted(expanders, key=lambda c: -(c.bus_nr or 0)):
        assert expander.bus_nr is not None
        assert expander.bus_nr + below[expander.index] <= end
        end = expander.bus_nr
    assert end > 8  # the guest's own bus and its ports come before
    assert all(c.cell is None and c.bus_nr is None for c in controllers if c not in expanders)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_controllers_are_as_pcie_allows(
    inputs: Callable[[str], Inputs], name: str, size: int
) -> None:
    """Ports sit on expander buses, switches on ports; no place is used twice."""
    controllers, _ = guest_tree(devices_of(inputs(name), size), node)
    models = {controller.index: controller.model for controller in controllers}
    above = {
        "pcie-root-port": "pcie-expander-bus",
        "pcie-switch-upstream-port": "pcie-root-port",
        "pcie-switch-downstream-port": "pcie-switch-upstream-port",
    }
    places = [(c.bus, c.slot) for c in controllers if c.bus is not None]
    assert len(places) == len(set(places))
    assert all(slot is not None and slot < 32 for _, slot in places)
    assert [c.index for c in controllers] == list(range(1, len(controllers) + 1))
    for controller in controllers:
        if controller.bus is not None:
            seat = models[controller.bus]
            nested = {above[controller.model], "pcie-switch-downstream-port"}
            assert seat in nested if "upstream" in controller.model else seat in above.values()
            assert seat == above[controller.model] or "upstream" in controller.model


@pytest.mark.parametrize(("name", "size"), CASES)
def test_devices_of_two_root_complexes_never_share_one(
    inputs: Callable[[str], Inputs], name: str, size: int
) -> None:
    devices = devices_of(inputs(name), size)
    tree = guest_tree(devices, node)
    expanders = {chain(tree, device.address)[0]: device.root for device in devices}
    assert len(expanders) == len({device.root for device in devices})
    cells = {c.index: c.cell for c in tree[0]}
    assert all(cells[chain(tree, d.address)[0]] == d.numa_node for d in devices)


def test_a_gpu_and_its_nic_share_a_switch(inputs: Callable[[str], Inputs]) -> None:
    """The pair of GPUs of a DGX-2 switch and the NIC between them: what NCCL looks for."""
    devices = [d for d in inputs("dgx2").topology.devices() if d.address.bus in (0x34, 0x35, 0x36)]
    models = [controller.model for controller in guest_tree(devices, node)[0]]
    assert models == [
        "pcie-expander-bus",
        "pcie-root-port",
        "pcie-switch-upstream-port",
        "pcie-switch-downstream-port",
        "pcie-switch-downstream-port",
        "pcie-switch-downstream-port",
    ]


def test_a_lone_device_needs_no_switch(inputs: Callable[[str], Inputs]) -> None:
    device = inputs("dgx2").topology.gpus[3].pci
    controllers, hostdevs = guest_tree([device], lambda _: 0)
    assert [controller.model for controller in controllers] == [
        "pcie-expander-bus",
        "pcie-root-port",
    ]
    assert hostdevs == (Hostdev(device.address, 2),)


def test_no_devices_need_no_tree() -> None:
    assert guest_tree([], node) == ((), ())
    assert mmio64_mib([]) == 0


def test_functions_of_one_device_have_ports_of_their_own(
    inputs: Callable[[str], Inputs],
) -> None:
    one = inputs("dgx2").topology.gpus[0].pci
    two = replace(one, address=replace(one.address, function=1))
    _, hostdevs = guest_tree([one, two], node)
    assert len({hostdev.bus for hostdev in hostdevs}) == 2


@pytest.mark.parametrize(("name", "size"), CASES)
def test_the_window_holds_every_bar_twice(
    inputs: Callable[[str], Inputs], name: str, size: int
) -> None:
    devices = devices_of(inputs(name), size)
    window = mmio64_mib(devices)
    assert window & (window - 1) == 0
    assert window >= 64 * 1024
    total = sum(size for device in devices for size in device.bar_bytes) >> 20
    assert 2 * total <= window
    assert window < 4 * total or window == 64 * 1024
