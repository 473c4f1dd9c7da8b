"""Topology + platform table -> Platform: what this machine is, which GPU sets are legal on it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.host.topology import discover
from dgx_kvm_sw.model.errors import HostError
from dgx_kvm_sw.model.pci import PciAddress, PciDevice
from dgx_kvm_sw.model.platform import FabricModel, Partition, Platform
from dgx_kvm_sw.model.spec import SIZES
from dgx_kvm_sw.model.topology import Gpu, Topology

TABLE = Path(__file__).parents[1] / "data" / "platforms.yaml"
PHYSICAL_IDS = "/var/lib/dgx-kvm/fabric-ids.json"


def survey(root: Root) -> tuple[Platform, Topology]:
    """Discover the machine below `root` and recognise it."""
    physical_ids, notes = read_physical_ids(root)
    return match(discover(root, physical_ids), notes, physical_ids)


def match(
    topology: Topology, notes: tuple[str, ...] = (), recorded: Iterable[PciAddress] = ()
) -> tuple[Platform, Topology]:
    """Recognise the machine by the ids of its GPUs and NVSwitches; boards are set on the result.

    `notes` go before those of its own into the platform. `recorded` are the addresses of all GPUs
    when they were last seen together: a GPU that is gone then keeps its index free.
    """
    board_type = _recognise(topology)
    if not board_type:
        return _unknown(topology, notes), topology
    topology = _with_boards(topology, board_type.boards)
    topology = _numbered(topology, recorded, board_type.gpus)
    partitions, found_notes = _legal(topology, board_type)
    platform = Platform(
        name=board_type.name,
        title=board_type.title,
        fabric_model=board_type.fabric_model,
        boards=board_type.boards,
        partitions=tuple(sorted(partitions, key=lambda partition: partition.id)),
        gpus=board_type.gpus,
        notes=(*notes, *found_notes),
    )
    return platform, topology


def supported_names() -> tuple[str, ...]:
    """The machines in the table."""
    return tuple(name for text in _documents() for name in _parse(text)["machines"])


def read_physical_ids(root: Root) -> tuple[dict[PciAddress, int], tuple[str, ...]]:
    """Return the fabric's numbers of the GPUs and notes; a file that cannot be read counts as none.

    The mode switch writes it while the nvidia driver, which knows the ids, is still bound.
    """
    if not root.exists(PHYSICAL_IDS):
        return {}, ()
    try:
        ids = json.loads(root.read(PHYSICAL_IDS))["ids"]
        return {PciAddress.parse(text): int(number) for text, number in ids.items()}, ()
    except (HostError, ValueError, TypeError, KeyError, AttributeError):
        return {}, (f"{PHYSICAL_IDS} cannot be read and is not used.",)


# The table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A partition as Fabric Manager numbers it, with the links it has in the shared model."""

    id: int
    links: int
    physical_ids: tuple[int, ...]


@dataclass(frozen=True)
class _Share:
    """What comes with a passed-through set of GPUs of one size."""

    nvswitches: int
    links: int  # of each GPU


@dataclass(frozen=True)
class _BoardType:
    """One document of the table, read for one machine."""

    name: str
    title: str
    gpus: int
    nvswitches: int  # that are PCI devices
    boards: int
    fabric_model: FabricModel
    passthrough: Mapping[int, _Share]  # by number of GPUs
    rows: tuple[_Row, ...]

    @property
    def physical_ids(self) -> frozenset[int]:
        return frozenset(number for row in self.rows for number in row.physical_ids)

    def board_of(self, physical_id: int) -> int:
        return (physical_id - 1) // (self.gpus // self.boards)

    def may_pass_through(self, physical_ids: tuple[int, ...]) -> bool:
        """Links between boards stay closed for every VM but that of the whole machine."""
        boards = {self.board_of(number) for number in physical_ids}
        size = len(physical_ids)
        return size in self.passthrough and (len(boards) == 1 or size == self.gpus)


def _documents() -> list[str]:
    return TABLE.read_text(encoding="utf-8").split("\n---\n")[1:]


def _parse(text: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.load(text, yaml.CSafeLoader)
    return document


def _recognise(topology: Topology) -> _BoardType | None:
    """Find the machine whose GPU id and NVSwitch id these are, all of them and nothing else.

    Fewer than the table says are fine: a broken machine is still that machine.
    """
    gpu_ids = {gpu.pci.id for gpu in topology.gpus}
    switch_ids = {switch.pci.id for switch in topology.nvswitches}
    if len(gpu_ids) != 1:
        return None
    (gpu_id,) = gpu_ids
    for document in (_parse(text) for text in _documents() if gpu_id in text):
        expected = {document["nvswitches"]["id"]} if document["nvswitches"] else set()
        if switch_ids != expected or len(topology.gpus) > document["gpus"]:
            continue
        for name, machine in document["machines"].items():
            if gpu_id in machine["gpus"]:
                return _board_type(name, machine["title"], document)
    return None


def _board_type(name: str, title: str, document: Mapping[str, Any]) -> _BoardType:
    rows = [_Row(row, links, tuple(ids)) for row, (links, ids) in document["partitions"].items()]
    numbers = sorted({number for row in rows for number in row.physical_ids})
    rows += [_Row(document["singles"] + number - 1, 0, (number,)) for number in numbers]
    return _BoardType(
        name=name,
        title=title,
        gpus=document["gpus"],
        nvswitches=document["nvswitches"].get("count", 0),
        boards=document["boards"],
        fabric_model=FabricModel(document["fabric_model"]),
        passthrough={size: _Share(*share) for size, share in document["passthrough"].items()},
        rows=tuple(rows),
    )


def _with_boards(topology: Topology, boards: int) -> Topology:
    """Set the baseboard of GPUs and NVSwitches: each board hangs on the sockets of its side."""
    nodes = [node.id for node in topology.numa_nodes]
    devices = [gpu.pci for gpu in topology.gpus] + [sw.pci for sw in topology.nvswitches]
    roots = sorted({pci.root for pci in devices})

    def board(pci: PciDevice) -> int:
        if pci.numa_node in nodes and len(nodes) >= boards:
            return nodes.index(pci.numa_node) * boards // len(nodes) + 1
        # Without NUMA: root complexes are numbered socket by socket too.
        return roots.index(pci.root) * boards // len(roots) + 1

    return replace(
        topology,
        gpus=tuple(replace(gpu, board=board(gpu.pci)) for gpu in topology.gpus),
        nvswitches=tuple(replace(sw, board=board(sw.pci)) for sw in topology.nvswitches),
    )


def _numbered(topology: Topology, recorded: Iterable[PciAddress], gpus: int) -> Topology:
    """Number the GPUs by their place in the whole machine, where that is known.

    Otherwise one dead GPU would move the number of every GPU behind it, and a pin to GPU 8 would
    mean other hardware. A record that does not add up to the whole machine is an old one.
    """
    places = sorted({gpu.pci.address for gpu in topology.gpus} | set(recorded))
    if len(places) != gpus:
        return topology
    numbered = (replace(gpu, index=places.index(gpu.pci.address)) for gpu in topology.gpus)
    return replace(topology, gpus=tuple(numbered))


# Partitions of a machine in the table ---------------------------------------------------------


def _legal(topology: Topology, board_type: _BoardType) -> tuple[list[Partition], list[str]]:
    """Return the legal partitions of a recognised machine, and what its operator should know."""
    doubt = _doubt_about_ids(topology.gpus, board_type)
    notes = _missing_gpus(topology.gpus, board_type, ids_known=not doubt)
    if not doubt:
        partitions = _by_physical_id(topology.gpus, board_type)
    elif board_type.fabric_model is FabricModel.SHARED:
        partitions = _whole_or_single(topology.gpus, board_type)
        notes.append(
            f"{doubt} Fabric Manager isolates sets of physical ids, so until they are known a VM "
            "gets one GPU or all of them. The mode switch records them if the nvidia driver runs."
        )
    else:
        partitions = _by_board(topology, board_type)
        notes.append(
            f"{doubt} Partitions follow the PCIe tree instead, as every GPU reaches every "
            "NVSwitch of its board."
        )
    possible = [one for one in partitions if _has_switches(one, topology, board_type)]
    lost = {partition.size for partition in set(partitions) - set(possible)}
    return possible, notes + _missing_switches(topology, board_type, lost)


def _doubt_about_ids(gpus: tuple[Gpu, ...], board_type: _BoardType) -> str:
    """Say why the physical ids cannot be relied on; "" when they can."""
    ids = [gpu.physical_id for gpu in gpus if gpu.physical_id is not None]
    if not ids:
        return "The physical ids of the GPUs are not known."
    if len(ids) < len(gpus):
        without = (gpu.index for gpu in gpus if gpu.physical_id is None)
        return f"The physical id of GPU {_listed(without)} is not known."
    if len(set(ids)) < len(ids):
        return "Two GPUs are said to have the same physical id."
    if wrong := set(ids) - board_type.physical_ids:
        return f"No machine of this kind has a physical id {_listed(wrong)}."
    sides = {(gpu.board, board_type.board_of(n)) for gpu, n in zip(gpus, ids, strict=True)}
    if not len(sides) == len({board for board, _ in sides}) == len({side for _, side in sides}):
        return "The physical ids contradict the PCIe tree: they mix GPUs of different boards."
    return ""


def _missing_gpus(gpus: tuple[Gpu, ...], board_type: _BoardType, ids_known: bool) -> list[str]:
    if len(gpus) == board_type.gpus:
        return []
    note = f"{len(gpus)} of {board_type.gpus} GPUs are found"
    if not ids_known:
        return [f"{note}."]
    found = {gpu.physical_id for gpu in gpus if gpu.physical_id is not None}
    boards = {board_type.board_of(number) for number in found}
    # A lone board may be strapped as the upper one: expect the ids of the boards that are there.
    missing = {
        number
        for number in board_type.physical_ids - found
        if board_type.board_of(number) in boards or len(boards) < board_type.boards
    }
    return [f"{note}; missing: physical id {_listed(missing)}."]


def _missing_switches(topology: Topology, board_type: _BoardType, lost: set[int]) -> list[str]:
    found = len(topology.nvswitches)
    if found >= board_type.nvswitches:
        return []
    cost = f", too few for some or all VMs of {_listed(lost)} GPUs" if lost else ""
    return [f"{found} of {board_type.nvswitches} NVSwitches are found{cost}."]


def _by_physical_id(gpus: tuple[Gpu, ...], board_type: _BoardType) -> list[Partition]:
    """Resolve Fabric Manager's sets to GPU indexes, leaving out those with a missing GPU."""
    index = {gpu.physical_id: gpu.index for gpu in gpus}
    partitions = []
    for row in board_type.rows:
        if not set(row.physical_ids) <= index.keys():
            continue
        ids = tuple(sorted(row.physical_ids, key=lambda number: index[number]))
        indexes = tuple(index[number] for number in ids)
        if board_type.fabric_model is FabricModel.SHARED:
            partitions.append(Partition(row.id, indexes, ids, row.links, 0))
        elif board_type.may_pass_through(ids):
            share = board_type.passthrough[len(ids)]
            partitions.append(Partition(row.id, indexes, ids, share.links, share.nvswitches))
    return partitions


def _by_board(topology: Topology, board_type: _BoardType) -> list[Partition]:
    """Take sets from the PCIe tree of each board, and the whole machine."""
    sets: list[tuple[int, ...]] = []
    for board in range(1, board_type.boards + 1):
        gpus = [gpu for gpu in topology.gpus if gpu.board == board]
        sets += _nested_sets(gpus, topology)
    if board_type.boards > 1 and len(topology.gpus) == board_type.gpus:
        sets.append(tuple(gpu.index for gpu in topology.gpus))
    sets = _largest_first(gpus for gpus in sets if len(gpus) in board_type.passthrough)
    shares = [board_type.passthrough[len(gpus)] for gpus in sets]
    return [
        Partition(number, gpus, (), share.links, share.nvswitches)
        for number, (gpus, share) in enumerate(zip(sets, shares, strict=True))
    ]


def _whole_or_single(gpus: tuple[Gpu, ...], board_type: _BoardType) -> list[Partition]:
    """Return the sets that are certain without physical ids.

    The whole machine has one id whoever is who; those of single GPUs are not known, so they
    count on from Fabric Manager's last, which no one can take for one of its own.
    """
    last = max(row.id for row in board_type.rows)
    partitions = [Partition(last + 1 + gpu.index, (gpu.index,), (), 0, 0) for gpu in gpus]
    if len(gpus) == board_type.gpus:
        whole = next(row for row in board_type.rows if len(row.physical_ids) == len(gpus))
        partitions.append(Partition(whole.id, tuple(gpu.index for gpu in gpus), (), whole.links, 0))
    return partitions


def _has_switches(partition: Partition, topology: Topology, board_type: _BoardType) -> bool:
    """Whether the NVSwitches found are enough for this partition."""
    if board_type.fabric_model is FabricModel.SHARED:
        # GPUs never register with a fabric that lacks a switch (Fabric Manager guide, H100).
        return partition.size == 1 or len(topology.nvswitches) >= board_type.nvswitches
    boards = {topology.gpu(index).board for index in partition.gpus}
    return partition.nvswitches <= sum(switch.board in boards for switch in topology.nvswitches)


# A machine that is not in the table -----------------------------------------------------------


def _unknown(topology: Topology, notes: tuple[str, ...]) -> Platform:
    """Derive partitions from the PCIe tree alone."""
    gpus, nvswitches = topology.gpus, len(topology.nvswitches)
    sets = _nested_sets(gpus, topology)
    if not gpus:
        note = "No NVIDIA GPU is found on this machine."
    elif nvswitches:
        # Which NVLinks join which GPUs is not known, so no set is known to be isolated from the
        # rest; alone, or with nobody beside it, a VM needs no links closed but its own.
        sets = [members for members in sets if len(members) in (1, len(gpus))]
        note = (
            f"This machine is not in the platform table, so it is not known how its {nvswitches} "
            "NVSwitches join the GPUs: a VM gets one GPU or all of them."
        )
    else:
        note = (
            "This machine is not in the platform table: partitions follow its PCIe tree, and "
            "nothing is known of NVLinks between its GPUs."
        )
    return Platform(
        name="generic",
        title=topology.product_name or "unknown machine",
        fabric_model=FabricModel.PASSTHROUGH if nvswitches else FabricModel.NONE,
        boards=1,
        partitions=tuple(
            Partition(number, members, (), 0, nvswitches if 1 < len(members) == len(gpus) else 0)
            for number, members in enumerate(_largest_first(sets))
        ),
        gpus=len(gpus),
        notes=(*notes, note),
    )


@dataclass(frozen=True)
class _GpuSet:
    """GPUs, and the smallest part of the machine that has them all: a way from the top down."""

    gpus: tuple[int, ...]
    place: tuple[object, ...]


def _nested_sets(gpus: Sequence[Gpu], topology: Topology) -> list[tuple[int, ...]]:
    """Return GPU sets of 1, 2, 4, 8, 16 in which every set is two smaller ones, near each other."""
    level = [_GpuSet((gpu.index,), _place(gpu, topology)) for gpu in gpus]
    sets: list[tuple[int, ...]] = []
    while level and len(level[0].gpus) <= max(SIZES):
        sets += [one.gpus for one in level]
        level = _paired(level)
    return sets


def _paired(sets: list[_GpuSet]) -> list[_GpuSet]:
    """Join sets two by two from the leaves of the tree up; what has no partner waits higher up."""
    pairs = []
    for depth in range(max(len(one.place) for one in sets), -1, -1):
        waiting: dict[tuple[object, ...], _GpuSet] = {}
        for one in sorted(sets, key=lambda one: one.gpus):
            here = one.place[:depth]
            if partner := waiting.pop(here, None):
                pairs.append(_GpuSet(tuple(sorted(partner.gpus + one.gpus)), here))
            else:
                waiting[here] = one
        sets = list(waiting.values())
    return pairs


def _place(gpu: Gpu, topology: Topology) -> tuple[object, ...]:
    """Return the way to a GPU: socket, NUMA node, root complex, bridges.

    sysfs does not tell sockets of nodes; they are the nodes within one SLIT distance.
    """
    node = topology.node(gpu.pci.numa_node)
    reaches = sorted({d for other in topology.numa_nodes for _, d in other.distances}, reverse=True)
    near = [
        min((other for other, distance in node.distances if distance <= reach), default=node.id)
        for reach in reaches
    ]
    return (*near, gpu.pci.root, *gpu.pci.upstream)


def _largest_first(sets: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return sorted(sets, key=lambda members: (-len(members), members))


def _listed(numbers: Iterable[int]) -> str:
    *first, last = map(str, sorted(numbers))
    return f"{', '.join(first)} and {last}" if first else last
