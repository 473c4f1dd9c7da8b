"""match(): which machine this is, and which sets of its GPUs may form a VM."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path

import pytest
from machines import MACHINES, change, own, plug, unplug, without_numa, write_physical_ids

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.host.platforms import PHYSICAL_IDS, read_physical_ids, supported_names, survey
from dgx_kvm_sw.model.pci import PciAddress
from dgx_kvm_sw.model.platform import FabricModel, Partition, Platform
from dgx_kvm_sw.model.topology import Topology

Machine = Callable[[str], Root]
PASSTHROUGH, SHARED = FabricModel.PASSTHROUGH, FabricModel.SHARED


def sets(platform: Platform, size: int) -> list[tuple[int, ...]]:
    return sorted(partition.gpus for partition in platform.of_size(size))


def by_id(platform: Platform) -> dict[int, Partition]:
    return {partition.id: partition for partition in platform.partitions}


def gpu_addresses(topology: Topology) -> list[PciAddress]:
    return [gpu.pci.address for gpu in topology.gpus]


def runs(size: int, count: int) -> list[tuple[int, ...]]:
    """Blocks of consecutive GPU indexes."""
    return [tuple(range(first, first + size)) for first in range(0, count, size)]


# Machines in the table ------------------------------------------------------------------------


def test_every_sample_machine_is_supported_and_the_other_way_round() -> None:
    assert supported_names() == MACHINES


@pytest.mark.parametrize(
    ("name", "model", "boards", "counts"),
    [
        ("dgx2", PASSTHROUGH, 2, {16: 1, 8: 2, 4: 4, 2: 8, 1: 16}),
        ("dgx-a100", PASSTHROUGH, 1, {8: 1, 4: 2, 2: 4, 1: 8}),
        ("dgx-h100", SHARED, 1, {8: 1, 4: 2, 2: 4, 1: 8}),
        ("dgx-h200", SHARED, 1, {8: 1, 4: 2, 2: 4, 1: 8}),
        ("dgx-b200", SHARED, 1, {8: 1, 4: 2, 2: 4, 1: 8}),
    ],
)
def test_a_whole_machine_is_recognised_without_a_note(
    machine: Machine, name: str, model: FabricModel, boards: int, counts: dict[int, int]
) -> None:
    platform, _ = survey(machine(name))
    assert platform.name == name
    assert platform.fabric_model is model
    assert platform.boards == boards
    assert Counter(partition.size for partition in platform.partitions) == counts
    assert platform.notes == ()


@pytest.mark.parametrize("name", MACHINES)
def test_partitions_of_a_size_are_disjoint_and_nested(machine: Machine, name: str) -> None:
    platform, topology = survey(machine(name))
    for size in platform.sizes:
        members = [gpu for gpus in sets(platform, size) for gpu in gpus]
        assert sorted(members) == list(range(len(topology.gpus)))
    for small, large in combinations([set(one.gpus) for one in platform.partitions], 2):
        assert small <= large or large <= small or not small & large


@pytest.mark.parametrize("name", MACHINES)
def test_partitions_name_their_gpus_both_ways(machine: Machine, name: str) -> None:
    platform, topology = survey(machine(name))
    for one in platform.partitions:
        assert list(one.gpus) == sorted(one.gpus)
        assert one.physical_ids == tuple(topology.gpus[index].physical_id for index in one.gpus)


@pytest.mark.parametrize("name", MACHINES)
def test_ids_are_unique_and_in_order(machine: Machine, name: str) -> None:
    platform, _ = survey(machine(name))
    ids = [partition.id for partition in platform.partitions]
    assert ids == sorted(set(ids))


def test_fabric_managers_number_of_a_single_gpu_comes_from_its_physical_id(
    machine: Machine,
) -> None:
    for name, first in {"dgx2": 17, "dgx-a100": 19, "dgx-h100": 7, "dgx-b200": 8}.items():
        for partition in survey(machine(name))[0].of_size(1):
            assert partition.id == first + partition.physical_ids[0] - 1


@pytest.mark.parametrize(
    ("name", "shares"),  # GPUs: (NVSwitches, links of each GPU)
    [
        ("dgx2", {16: (12, 6), 8: (6, 6), 4: (3, 3), 2: (1, 1), 1: (0, 0)}),
        ("dgx-a100", {8: (6, 12), 4: (3, 6), 2: (1, 2), 1: (0, 0)}),
        ("dgx-h100", {8: (0, 18), 4: (0, 18), 2: (0, 18), 1: (0, 0)}),
        ("dgx-b200", {8: (0, 18), 4: (0, 18), 2: (0, 18), 1: (0, 0)}),
    ],
)
def test_nvswitches_and_links_by_size(
    machine: Machine, name: str, shares: dict[int, tuple[int, int]]
) -> None:
    platform, _ = survey(machine(name))
    for one in platform.partitions:
        assert (one.nvswitches, one.links) == shares[one.size]


def test_a_set_across_boards_is_for_the_shared_model_only(machine: Machine) -> None:
    """Fabric Manager's partitions 3 and 4 of a DGX-2 use links between the boards."""
    platform, topology = survey(machine("dgx2"))
    for one in platform.partitions:
        boards = {topology.gpus[index].board for index in one.gpus}
        assert len(boards) == 1 or one.size == 16
    assert not by_id(platform).keys() & {3, 4}


def test_boards_of_gpus_and_nvswitches(machine: Machine) -> None:
    _, topology = survey(machine("dgx2"))
    assert [gpu.board for gpu in topology.gpus] == [1] * 8 + [2] * 8
    assert [switch.board for switch in topology.nvswitches] == [1] * 6 + [2] * 6


def test_boards_without_numa(tmp_path: Path) -> None:
    root = own("dgx2", tmp_path)
    without_numa(root)
    platform, topology = survey(root)
    assert [gpu.board for gpu in topology.gpus] == [1] * 8 + [2] * 8
    assert [switch.board for switch in topology.nvswitches] == [1] * 6 + [2] * 6
    assert platform.notes == ()


# A physical id is not an index ----------------------------------------------------------------


def test_fabric_managers_pairs_are_resolved_through_physical_ids(machine: Machine) -> None:
    dgx2 = by_id(survey(machine("dgx2"))[0])
    assert (dgx2[9].physical_ids, dgx2[9].gpus) == ((1, 4), (0, 1))
    assert (dgx2[12].physical_ids, dgx2[12].gpus) == ((6, 7), (2, 3))
    h100 = by_id(survey(machine("dgx-h100"))[0])
    assert (h100[3].physical_ids, h100[3].gpus) == ((1, 3), (2, 3))


def test_the_sets_follow_the_ids_when_those_change(tmp_path: Path) -> None:
    root = own("dgx2", tmp_path)
    addresses = gpu_addresses(survey(root)[1])
    write_physical_ids(root, {str(one): number for number, one in enumerate(addresses, 1)})
    platform, _ = survey(root)
    assert by_id(platform)[9].gpus == (0, 3)
    assert by_id(platform)[5].gpus == (0, 3, 5, 6)


def test_a_lone_board_strapped_as_the_upper_one(tmp_path: Path) -> None:
    root = own("dgx-a100", tmp_path)
    addresses = gpu_addresses(survey(root)[1])
    write_physical_ids(root, {str(one): number for number, one in enumerate(addresses, 9)})
    platform, _ = survey(root)
    assert by_id(platform).keys() == {2, 9, 10, 15, 16, 17, 18, *range(27, 35)}
    assert sets(platform, 2) == runs(2, 8)
    assert platform.notes == ()


@pytest.mark.parametrize("name", ["dgx2", "dgx-a100"])
def test_passthrough_without_physical_ids_follows_the_pcie_tree(tmp_path: Path, name: str) -> None:
    root = own(name, tmp_path)
    root.remove(PHYSICAL_IDS)
    platform, topology = survey(root)
    for size in platform.sizes:
        assert sets(platform, size) == runs(size, len(topology.gpus))
    assert {one.physical_ids for one in platform.partitions} == {()}
    assert {one.nvswitches for one in platform.of_size(4)} == {3}
    (note,) = platform.notes
    assert "are not known" in note
    assert "PCIe tree" in note


@pytest.mark.parametrize("name", ["dgx-h100", "dgx-h200", "dgx-b200"])
def test_the_shared_model_without_physical_ids_gives_one_gpu_or_all(
    tmp_path: Path, name: str
) -> None:
    root = own(name, tmp_path)
    known, _ = survey(root)
    root.remove(PHYSICAL_IDS)
    platform, _ = survey(root)
    assert platform.sizes == (1, 8)
    (whole,) = platform.of_size(8)
    assert whole.id == known.of_size(8)[0].id
    assert not by_id(known).keys() & {one.id for one in platform.of_size(1)}
    (note,) = platform.notes
    assert "one GPU or all" in note


@pytest.mark.parametrize(
    ("ids", "doubt"),
    [
        ([], "The physical ids of the GPUs are not known."),
        ([1, 2, 3, 4, 5, 6, 7], "The physical id of GPU 7 is not known."),
        ([1, 2, 3, 4, 5, 6, 7, 7], "Two GPUs are said to have the same physical id."),
        ([1, 2, 3, 4, 5, 6, 7, 17], "No machine of this kind has a physical id 17."),
        ([1, 2, 3, 4, 5, 6, 7, 9], "they mix GPUs of different boards"),
    ],
)
def test_ids_that_cannot_be_right_are_not_used(
    tmp_path: Path, ids: Iterable[int], doubt: str
) -> None:
    root = own("dgx-a100", tmp_path)
    addresses = map(str, gpu_addresses(survey(root)[1]))
    write_physical_ids(root, dict(zip(addresses, ids, strict=False)))
    platform, _ = survey(root)
    assert doubt in platform.notes[0]
    assert sets(platform, 2) == runs(2, 8)


def test_ids_that_swap_gpus_between_boards_are_not_used(tmp_path: Path) -> None:
    root = own("dgx2", tmp_path)
    addresses = map(str, gpu_addresses(survey(root)[1]))
    write_physical_ids(
        root, dict(zip(addresses, [9, *range(2, 9), 1, *range(10, 17)], strict=True))
    )
    assert "mix GPUs of different boards" in survey(root)[0].notes[0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"ids": [1]}', '{"ids": {"x": 1}}'])
def test_a_spoilt_file_of_ids_is_said_and_not_used(tmp_path: Path, text: str) -> None:
    root = own("dgx2", tmp_path)
    root.write(PHYSICAL_IDS, text, sync=False)
    ids, notes = read_physical_ids(root)
    assert ids == {}
    assert notes == (f"{PHYSICAL_IDS} cannot be read and is not used.",)
    assert survey(root)[0].notes[0] == notes[0]


def test_no_file_of_ids_is_nothing_unusual(tmp_path: Path) -> None:
    assert read_physical_ids(Root(tmp_path)) == ({}, ())


# Machines with something missing --------------------------------------------------------------


def test_fifteen_of_sixteen_gpus(tmp_path: Path) -> None:
    """GPU 5 is gone: the pair {2,3}, its quad, its board and the whole cannot be had."""
    root = own("dgx2", tmp_path)
    unplug(root, gpu_addresses(survey(root)[1])[5])
    platform, topology = survey(root)
    assert platform.name == "dgx2"
    assert len(topology.gpus) == 15
    assert platform.notes == ("15 of 16 GPUs are found; missing: physical id 3.",)
    assert len(platform.of_size(1)) == 15
    assert not by_id(platform).keys() & {0, 1, 6, 10}
    assert by_id(platform)[11].gpus == (6, 7)  # the index of the GPU that is gone stays free
    assert [gpu.index for gpu in topology.gpus] == [i for i in range(16) if i != 5]
    root.path(PHYSICAL_IDS).unlink()  # without a record of the whole machine they close up
    assert [gpu.index for gpu in survey(root)[1].gpus] == list(range(15))


def test_fifteen_of_sixteen_gpus_without_physical_ids(tmp_path: Path) -> None:
    root = own("dgx2", tmp_path)
    root.remove(PHYSICAL_IDS)
    unplug(root, gpu_addresses(survey(root)[1])[5])
    platform, _ = survey(root)
    assert platform.notes[0] == "15 of 16 GPUs are found."
    assert sets(platform, 2) == [(0, 1), (2, 3), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14)]
    assert sets(platform, 4) == [(0, 1, 2, 3), (7, 8, 9, 10), (11, 12, 13, 14)]
    assert sets(platform, 8) == [tuple(range(7, 15))]
    assert sets(platform, 16) == []


def test_gpus_left_over_on_different_boards_are_no_pair(tmp_path: Path) -> None:
    root = own("dgx2", tmp_path)
    root.remove(PHYSICAL_IDS)
    addresses = gpu_addresses(survey(root)[1])
    unplug(root, addresses[7], addresses[15])
    platform, _ = survey(root)
    assert sets(platform, 2) == [(0, 1), (2, 3), (4, 5), (7, 8), (9, 10), (11, 12)]


def test_a_missing_nvswitch_costs_the_sizes_that_need_it(tmp_path: Path) -> None:
    root = own("dgx2", tmp_path)
    unplug(root, survey(root)[1].nvswitches[0].pci.address)
    platform, _ = survey(root)
    assert sets(platform, 16) == []
    assert sets(platform, 8) == [tuple(range(8, 16))]
    assert len(platform.of_size(4)) == 4
    assert platform.notes == (
        "11 of 12 NVSwitches are found, too few for some or all VMs of 8 and 16 GPUs.",
    )


def test_a_shared_fabric_without_one_nvswitch_serves_single_gpus(tmp_path: Path) -> None:
    root = own("dgx-h100", tmp_path)
    unplug(root, survey(root)[1].nvswitches[0].pci.address)
    platform, _ = survey(root)
    assert platform.sizes == (1,)
    assert platform.notes == (
        "3 of 4 NVSwitches are found, too few for some or all VMs of 2, 4 and 8 GPUs.",
    )


# Machines that are not in the table -----------------------------------------------------------


def without_nvswitches(root: Root) -> Topology:
    topology = survey(root)[1]
    unplug(root, *(switch.pci.address for switch in topology.nvswitches))
    return topology


def test_gpus_alone_do_not_make_a_dgx(tmp_path: Path) -> None:
    """H100s also come in fours without NVSwitches: nothing is taken for granted."""
    root = own("dgx-h100", tmp_path)
    without_nvswitches(root)
    platform, _ = survey(root)
    assert platform.name == "generic"
    assert platform.fabric_model is FabricModel.NONE
    assert "not in the platform table" in platform.notes[0]


@pytest.mark.parametrize("name", ["dgx2", "dgx-a100", "dgx-h100"])
def test_a_generic_machine_follows_its_pcie_tree(tmp_path: Path, name: str) -> None:
    root = own(name, tmp_path)
    count = len(without_nvswitches(root).gpus)
    platform, _ = survey(root)
    for size in platform.sizes:
        assert sets(platform, size) == runs(size, count)
    assert [one.id for one in platform.partitions] == list(range(2 * count - 1))
    assert platform.partitions[0].size == count


def test_six_gpus_on_two_sockets_split_by_socket_first(tmp_path: Path) -> None:
    """GPUs 0-2 are on one socket, 3-5 on the other; each leaves one over, and those pair up."""
    root = own("dgx-h100", tmp_path)
    addresses = gpu_addresses(without_nvswitches(root))
    unplug(root, addresses[3], addresses[7])
    platform, _ = survey(root)
    assert platform.sizes == (1, 2, 4)
    assert sets(platform, 2) == [(0, 1), (2, 5), (3, 4)]
    (four,) = sets(platform, 4)
    assert sum(set(pair) <= set(four) for pair in sets(platform, 2)) == 2


def test_gpus_of_one_switch_stay_together_although_others_come_first(tmp_path: Path) -> None:
    """Of the first four GPUs one is gone: its neighbour is left over, the other two share on."""
    root = own("dgx2", tmp_path)
    addresses = gpu_addresses(without_nvswitches(root))
    unplug(root, addresses[0], *addresses[4:])
    platform, _ = survey(root)
    assert sets(platform, 2) == [(1, 2)]


def test_a_socket_of_several_nodes_stays_together(tmp_path: Path) -> None:
    """On an A100 GPUs 2-3 (node 1) and 4-5 (node 7) are neighbours by number only."""
    root = own("dgx-a100", tmp_path)
    addresses = gpu_addresses(without_nvswitches(root))
    unplug(root, *addresses[:2])
    platform, _ = survey(root)
    assert sets(platform, 4) == [(2, 3, 4, 5)]


def test_unknown_nvswitches_leave_one_gpu_or_all(tmp_path: Path) -> None:
    root = own("dgx-h100", tmp_path)
    for switch in survey(root)[1].nvswitches:
        change(root, switch.pci.address, "device", "0x9999")
    platform, _ = survey(root)
    assert platform.name == "generic"
    assert platform.fabric_model is PASSTHROUGH
    assert platform.sizes == (1, 8)
    assert {one.nvswitches for one in platform.of_size(8)} == {4}
    assert {one.nvswitches for one in platform.of_size(1)} == {0}
    assert "one GPU or all" in platform.notes[0]


def test_mixed_gpus_are_no_known_machine(tmp_path: Path) -> None:
    root = own("dgx-h100", tmp_path)
    change(root, gpu_addresses(survey(root)[1])[0], "device", "0x2335")
    assert survey(root)[0].name == "generic"


def test_more_gpus_than_the_table_has_are_another_machine(tmp_path: Path) -> None:
    root = own("dgx-a100", tmp_path)
    plug(root, "0000:0f:01.0", like=gpu_addresses(survey(root)[1])[1])
    platform, topology = survey(root)
    assert len(topology.gpus) == 9
    assert platform.name == "generic"


@pytest.mark.parametrize("name", ["dgx2", "dgx-b200"])
def test_no_gpus_at_all(tmp_path: Path, name: str) -> None:
    root = own(name, tmp_path)
    topology = survey(root)[1]
    unplug(root, *gpu_addresses(topology), *(sw.pci.address for sw in topology.nvswitches))
    platform, _ = survey(root)
    assert platform.partitions == ()
    assert platform.fabric_model is FabricModel.NONE
    assert platform.notes == ("No NVIDIA GPU is found on this machine.",)
