"""The shape of an emulated machine: sockets, memory, and where each PCI device sits.

A shape file (`shapes/*.yaml`) says:

    product_name   what DMI shows
    sockets, nodes, cores, memory_gib    cores and memory of each NUMA node, two threads a core.
                   Node n is on socket n * sockets // nodes
    scale          {cores, memory_gib}: what a node of the real machine has of them. What the
                   product sees is an ordinary machine with less of both
    kinds          {kind: {model: one of models.py}}, served by devices.py; or
                   {kind: {driver: QEMU's own device, properties: {...}}}
    pci            by NUMA node, lines "kind path". A path leads from the root port down to the
                   device; the first bus is the number of its root complex (0: the chipset's own).
                   Root ports, then by turns the upstream and the downstream ports of switches;
                   the kind "empty" ends at a port with nothing behind.

Addresses are those that firmware gives the running machine: it numbers buses depth first, and the
empty ports are there to make a GPU's address that of the real machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

SHAPES = Path(__file__).with_name("shapes")
THREADS = 2
EMPTY = "empty"
SERVED = "vfio-user-pci"  # QEMU's driver of devices that devices.py serves
SLOT = re.compile(r"([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")


class ShapeError(ValueError):
    """A shape file that describes no machine."""


@dataclass(frozen=True, order=True)
class Slot:
    """A function on a bus; `str` gives it as lspci does."""

    bus: int
    device: int
    function: int

    def __str__(self) -> str:
        return f"{self.bus:02x}:{self.device:02x}.{self.function}"


@dataclass(frozen=True)
class RootComplex:
    """A root bus; bus 0 is the chipset's own, each other is a `pxb-pcie`."""

    bus: int
    node: int

    @property
    def name(self) -> str:
        return f"root{self.bus:02x}"


@dataclass(frozen=True)
class Bridge:
    """A port of the tree; `parent` names the bridge or root complex whose bus it sits on."""

    name: str
    driver: str
    slot: Slot
    parent: str


@dataclass(frozen=True)
class Device:
    """An endpoint; `model` is empty when QEMU itself emulates it."""

    name: str
    kind: str
    node: int
    path: tuple[Slot, ...]
    parent: str
    driver: str
    model: str = ""
    properties: Mapping[str, Any] = field(default_factory=dict)

    @property
    def slot(self) -> Slot:
        return self.path[-1]

    @property
    def address(self) -> str:
        """Its address in the running machine, as sysfs writes it."""
        return f"0000:{self.slot}"


@dataclass(frozen=True)
class Scale:
    """What each NUMA node of the real machine has."""

    cores: int
    memory_gib: int


@dataclass(frozen=True)
class Shape:
    """A machine. Bridges come before what sits on them."""

    name: str
    product_name: str
    sockets: int
    nodes: int
    cores: int
    memory_gib: int
    scale: Scale
    roots: tuple[RootComplex, ...]
    bridges: tuple[Bridge, ...]
    devices: tuple[Device, ...]

    @property
    def cpus(self) -> int:
        """Threads of the whole machine."""
        return self.nodes * self.cores * THREADS

    @property
    def note(self) -> str:
        """What it has, and what the machine has that it stands for."""
        real = f"{self.nodes * self.scale.cores * THREADS} and {self.nodes * self.scale.memory_gib}"
        here = f"{self.cpus} CPUs and {self.nodes * self.memory_gib} GiB of memory"
        return f"{self.product_name}, scaled down: {here}, for {real} of the real machine"

    @property
    def served(self) -> tuple[Device, ...]:
        """What devices.py serves, each on the socket `<name>.sock`."""
        return tuple(device for device in self.devices if device.model)

    @property
    def gpus(self) -> tuple[Device, ...]:
        return self.of_kind("gpu")

    @property
    def nvswitches(self) -> tuple[Device, ...]:
        return self.of_kind("nvswitch")

    def of_kind(self, kind: str) -> tuple[Device, ...]:
        return tuple(device for device in self.devices if device.kind == kind)

    def node_cpus(self, node: int) -> range:
        """The CPUs of a NUMA node: the siblings of a core are neighbours, as QEMU numbers them."""
        each = self.cores * THREADS
        return range(node * each, (node + 1) * each)


def names() -> tuple[str, ...]:
    """The shapes that come with the lab."""
    return tuple(sorted(path.stem for path in SHAPES.glob("*.yaml")))


def named(name: str) -> Shape:
    """Load one of the lab's own shapes."""
    return load(SHAPES / f"{name}.yaml")


def load(path: Path) -> Shape:
    """Read a shape file; what it leaves unsaid or says twice is an error."""
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return _shape(path.stem, text)
    except (KeyError, TypeError) as error:
        raise ShapeError(f"{path}: {error!r}") from error
    except ShapeError as error:
        raise ShapeError(f"{path}: {error}") from error


def _shape(name: str, text: Mapping[str, Any]) -> Shape:
    tree = _Tree(text["kinds"])
    for part in text["pci"]:
        for line in part["devices"]:
            tree.add(part["node"], line)
    strays = sorted({root.node for root in tree.roots.values()} - set(range(text["nodes"])))
    if strays:
        raise ShapeError(f"no such NUMA node: {strays[0]}")
    return Shape(
        name=name,
        product_name=text["product_name"],
        sockets=text["sockets"],
        nodes=text["nodes"],
        cores=text["cores"],
        memory_gib=text["memory_gib"],
        scale=Scale(**text["scale"]),
        roots=tuple(tree.roots.values()),
        bridges=tuple(tree.bridges.values()),
        devices=tuple(tree.devices),
    )


class _Tree:
    """The PCI tree while it is read line by line."""

    def __init__(self, kinds: Mapping[str, Mapping[str, Any]]) -> None:
        self.kinds = kinds
        self.roots: dict[int, RootComplex] = {}
        self.bridges: dict[tuple[Slot, ...], Bridge] = {}
        self.devices: list[Device] = []
        self.taken: set[Slot] = set()

    def add(self, node: int, line: str) -> None:
        kind, _, text = line.partition(" ")
        path = tuple(map(_slot, text.split("/")))
        root = self.roots.setdefault(path[0].bus, RootComplex(path[0].bus, node))
        if root.node != node:
            raise ShapeError(f"{line}: its root complex is on NUMA node {root.node}")
        ports = path if kind == EMPTY else path[:-1]
        parent = root.name
        for depth in range(1, len(ports) + 1):
            parent = self._bridge(ports[:depth], parent).name
        if kind != EMPTY:
            self._claim(path[-1])
            self.devices.append(self._device(kind, node, path, parent))

    def _bridge(self, path: tuple[Slot, ...], parent: str) -> Bridge:
        if path not in self.bridges:
            self._claim(path[-1])
            driver = "x3130-upstream" if len(path) % 2 == 0 else "xio3130-downstream"
            if len(path) == 1:
                driver = "pcie-root-port"
            name = f"port{path[-1]}".replace(":", "").replace(".", "")
            self.bridges[path] = Bridge(name, driver, path[-1], parent)
        return self.bridges[path]

    def _device(self, kind: str, node: int, path: tuple[Slot, ...], parent: str) -> Device:
        if kind not in self.kinds:
            raise ShapeError(f"no such kind: {kind}")
        about = self.kinds[kind]
        return Device(
            name=f"{kind}{sum(device.kind == kind for device in self.devices)}",
            kind=kind,
            node=node,
            path=path,
            parent=parent,
            driver=about.get("driver", SERVED),
            model=about.get("model", ""),
            properties=about.get("properties", {}),
        )

    def _claim(self, slot: Slot) -> None:
        if slot in self.taken:
            raise ShapeError(f"{slot} is taken twice")
        self.taken.add(slot)


def _slot(text: str) -> Slot:
    match = SLOT.fullmatch(text)
    if not match:
        raise ShapeError(f"not an address: {text!r}")
    return Slot(int(match[1], 16), int(match[2], 16), int(match[3]))
