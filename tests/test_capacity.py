"""What a node can give: reserve, pool, the nodes that serve GPUs, rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from machines import MACHINES
from placing import inputs_of, with_pages

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.decide.capacity import NodeCapacity, capacities, device_count
from dgx_kvm_sw.decide.fit import Inputs
from dgx_kvm_sw.decide.ledger import Ledger
from dgx_kvm_sw.model.pci import PciAddress
from dgx_kvm_sw.model.placement import GuestCell, Holding
from dgx_kvm_sw.model.spec import HostShare, Share
from dgx_kvm_sw.model.topology import HugepagePool

Sound = Callable[[str], Inputs]


@pytest.fixture(scope="module")
def sound(machine: Callable[[str], Root]) -> Sound:
    return lambda name: inputs_of(machine(name))


def of(inputs: Inputs, **shares: HostShare) -> dict[int, NodeCapacity]:
    return capacities(inputs.topology, replace(inputs.spec, **shares), inputs.platform.gpus)


@pytest.mark.parametrize("name", MACHINES)
def test_reserve_and_rest_are_the_whole_node(sound: Sound, name: str) -> None:
    inputs = sound(name)
    for cap in of(inputs).values():
        assert cap.reserve + cap.cores == inputs.topology.node(cap.id).cores
        assert len(cap.reserve) >= 1
        assert 0 < cap.gpu_cores < len(cap.cores)


@pytest.mark.parametrize(
    ("cpus", "cores"), [(Share(0.04), 1), (Share(0.05), 2), (4, 1), (5, 2), (Share(1.0), 23)]
)
def test_host_shares_are_rounded_up_to_cores_of_every_node(
    sound: Sound, cpus: Share | int, cores: int
) -> None:
    for cap in of(sound("dgx2"), reserve=HostShare(cpus, 0)).values():
        assert len(cap.reserve) == cores


@pytest.mark.parametrize(
    ("memory", "left"), [(Share(0.0), 768), (Share(0.001), 767), (10 * 1024, 763), (1, 767)]
)
def test_host_shares_are_rounded_up_to_gib_of_every_node(
    sound: Sound, memory: Share | int, left: int
) -> None:
    bare = with_pages(sound("dgx2"))
    for cap in of(bare, reserve=HostShare(1, memory)).values():
        assert cap.memory == {0: left * 1024}


def test_the_pool_is_of_the_memory_that_most_of_the_node_is(sound: Sound) -> None:
    pool = HostShare(0, Share(0.1))
    pages = with_pages(sound("dgx2"), HugepagePool(1 << 20, 600, 600))
    cap = of(pages, cpu_pool=pool)[0]
    assert cap.main_page_kib == 1 << 20
    assert cap.gpu_memory(1 << 20) == (600 - 77) * 1024
    bare = of(with_pages(sound("dgx2")), cpu_pool=pool)[0]
    assert bare.main_page_kib == 0
    assert bare.memory[0] - bare.gpu_memory(0) == 77 * 1024
    assert bare.gpu_memory(2048) == 0


def test_every_node_serves_itself_or_the_nearest_gpus(sound: Sound) -> None:
    inputs = sound("dgx-a100")
    caps = of(inputs)
    own = {g.pci.numa_node for g in inputs.topology.gpus}
    assert {cap.serves for cap in caps.values()} == own
    for cap in caps.values():
        assert cap.serves is not None
        assert (cap.id in own) is (cap.serves == cap.id)
        assert inputs.topology.node(cap.id).distance(cap.serves) <= 12
    helpers = [sum(cap.serves == node for cap in caps.values()) for node in own]
    assert helpers == [2, 2, 2, 2]


def test_without_gpus_no_node_serves_any(sound: Sound) -> None:
    inputs = sound("dgx-b200")
    bare = replace(inputs, topology=replace(inputs.topology, gpus=()))
    assert all(cap.serves is None and cap.gpus == 0 for cap in of(bare).values())


@pytest.mark.parametrize(
    ("amount", "available", "gpus", "all_gpus", "count"),
    [
        (Share(1.0), 8, 2, 16, 1),
        (Share(1.0), 8, 1, 16, 0),
        (Share(0.5), 8, 8, 8, 4),
        (Share(0.29), 100, 1, 1, 29),
        (Share(1.0), 8, 1, 0, 0),
        (3, 0, 1, 8, 3),
    ],
)
def test_shares_of_devices_are_rounded_down(
    amount: Share | int, available: int, gpus: int, all_gpus: int, count: int
) -> None:
    assert device_count(amount, available, gpus, all_gpus) == count


# -- the ledger -------------------------------------------------------------------------------

GPU = PciAddress.parse("0000:34:00.0")


def held(vm: str, memory: int, page: int = 0) -> Holding:
    return Holding(vm, True, True, (GPU,), (GuestCell(0, ((2, 50),), memory),), page)


def test_what_one_holds_is_taken_from_others_only(sound: Sound) -> None:
    node = of(with_pages(sound("dgx2")))[0]
    ledger = Ledger.of((held("a", 4096),))
    assert ledger.holder(GPU, "a") is None and ledger.holder(GPU, "b") == "a"
    assert (2, 50) in ledger.free_cores(node, "a")
    assert (2, 50) not in ledger.free_cores(node, "b")
    assert ledger.free_memory(node, 0, "b") == node.memory[0] - 4096
    assert ledger.free_memory(node, 0, "a") == node.memory[0]


def test_a_vm_between_two_definitions_counts_with_the_larger(sound: Sound) -> None:
    node = of(with_pages(sound("dgx2")))[0]
    ledger = Ledger.of((held("a", 4096), held("a", 1024)))
    assert node.memory[0] - ledger.free_memory(node, 0, "b") == 4096


def test_leaving_and_taking_make_new_ledgers(sound: Sound) -> None:
    node = of(with_pages(sound("dgx2")))[0]
    before = Ledger.of((held("a", 4096),))
    after = before.without(("a",))
    assert before.holder(GPU, "b") == "a"
    assert after == Ledger({}, {}, {})
    assert after.free_cores(node, "b") == list(node.cores)
