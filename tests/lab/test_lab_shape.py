"""The lab's shapes: their trees are what firmware will number, and what they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dgx_kvm_sw.host import simulate
from lab import shape
from lab.models import MODELS
from lab.shape import Bridge, Device, Shape, ShapeError, Slot

SMALL = """
product_name: small
sockets: 1
nodes: 1
cores: 1
memory_gib: 1
scale: {cores: 24, memory_gib: 768}
kinds:
  gpu: {model: v100-sxm3}
pci:
  - node: 0
    devices:
"""


def parts_of(machine: Shape) -> list[Bridge | Device]:
    return [*machine.bridges, *machine.devices]


def numbered(machine: Shape) -> list[Slot]:
    """The slots of all bridges and devices, on the buses that firmware gives them."""
    parts = parts_of(machine)
    slots: list[Slot] = []

    def walk(name: str, bus: int) -> int:
        last = bus
        below = (part for part in parts if part.parent == name)
        for part in sorted(below, key=lambda part: part.slot):
            slots.append(Slot(bus, part.slot.device, part.slot.function))
            if isinstance(part, Bridge):
                last = walk(part.name, last + 1)
        return last

    last = -1
    for root in sorted(machine.roots, key=lambda root: root.bus):
        assert root.bus > last
        last = walk(root.name, root.bus)
    return slots


@pytest.mark.parametrize("name", shape.names())
def test_addresses_are_those_that_firmware_gives(name: str) -> None:
    machine = shape.named(name)
    assert sorted(numbered(machine)) == sorted(part.slot for part in parts_of(machine))


@pytest.mark.parametrize("name", shape.names())
def test_every_part_has_its_name_and_its_model(name: str) -> None:
    machine = shape.named(name)
    names = [root.name for root in machine.roots] + [part.name for part in parts_of(machine)]
    assert len(set(names)) == len(names)
    assert all(device.model in MODELS for device in machine.served)
    assert all(len(device.path) % 2 == 0 for device in machine.devices)


@pytest.mark.parametrize(("name", "counts"), [
    ("dgx2", (16, 12, 8, 1, 8)),
    ("dgx2-small", (4, 2, 2, 1, 2)),
    ("dgx-a100", (8, 6, 8, 1, 8)),
    ("dgx-h100", (8, 4, 8, 1, 8)),
])  # fmt: skip
def test_counts(name: str, counts: tuple[int, ...]) -> None:
    kinds = ("gpu", "nvswitch", "ib", "data-nic", "data-drive")
    machine = shape.named(name)
    assert tuple(len(machine.of_kind(kind)) for kind in kinds) == counts


@pytest.mark.parametrize("name", ["dgx2", "dgx-a100", "dgx-h100"])
def test_gpus_and_nvswitches_sit_where_those_of_the_simulated_machine_do(name: str) -> None:
    real = yaml.safe_load(simulate.SAMPLES.read_text(encoding="utf-8"))[name]
    wanted = {
        (kind, part["node"], path.split("/")[-1])
        for part in real["pci"]
        for kind, path, *_ in map(str.split, part["devices"])
    }
    machine = shape.named(name)
    found = {
        (device.kind, device.node, str(device.slot))
        for device in (*machine.gpus, *machine.nvswitches)
    }
    assert found == {device for device in wanted if device[0] in ("gpu", "nvswitch")}
    for device in (*machine.gpus, *machine.nvswitches):
        identity = MODELS[device.model].identity
        same = f"{identity.vendor:04x}:{identity.device:04x}"
        assert real["kinds"][device.kind]["id"] == same
        assert real["kinds"][device.kind]["class"] == identity.class_code


@pytest.mark.parametrize("name", shape.names())
def test_it_says_what_it_is_scaled_down_from(name: str) -> None:
    machine = shape.named(name)
    samples = yaml.safe_load(simulate.SAMPLES.read_text(encoding="utf-8"))
    (real,) = (each["numa"] for each in samples.values()
               if each["product_name"] == machine.product_name)  # fmt: skip
    scale = machine.scale
    assert (scale.cores, scale.memory_gib) == (real["cores"], real["memory_gib"])
    assert machine.nodes == real["nodes"]
    assert machine.cores < scale.cores
    assert machine.memory_gib < scale.memory_gib
    assert f"{machine.cpus} CPUs" in machine.note


def test_cpus_of_a_node_are_whole_cores() -> None:
    machine = shape.named("dgx2")
    assert [machine.node_cpus(node) for node in range(2)] == [range(12), range(12, 24)]
    assert machine.cpus == 24


@pytest.mark.parametrize(("lines", "reason"), [
    (["gpu 10:00.0/11:00.0", "gpu 10:00.0/11:00.0"], "11:00.0 is taken twice"),
    (["tpu 10:00.0/11:00.0"], "no such kind: tpu"),
    (["gpu 10:00/11:00.0"], "not an address: '10:00'"),
    (["gpu"], "not an address: ''"),
])  # fmt: skip
def test_what_describes_no_machine_is_refused(
    lines: list[str], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL + "".join(f"      - {line}\n" for line in lines), encoding="utf-8")
    with pytest.raises(ShapeError, match=f"small.yaml: {reason}"):
        shape.load(path)


def test_a_device_is_on_the_node_of_its_root_complex(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    text = SMALL + "      - gpu 10:00.0/11:00.0\n  - {node: 1, devices: [gpu 10:01.0/12:00.0]}\n"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ShapeError, match="on NUMA node 0"):
        shape.load(path)
