"""place(): all hardware of every VM, nothing twice, nothing moved in vain, reasons in words."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from machines import MACHINES
from placing import (
    after,
    assert_sound,
    chosen,
    declare,
    failed,
    gpu,
    holding,
    indexes,
    inputs_of,
    refused,
    vm,
    vms,
    with_pages,
    with_pool,
)

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.decide.capacity import capacities
from dgx_kvm_sw.decide.devices import distance
from dgx_kvm_sw.decide.fit import Inputs
from dgx_kvm_sw.decide.placement import candidates, fits, place
from dgx_kvm_sw.model.pci import PciAddress
from dgx_kvm_sw.model.placement import GuestCell, Holding
from dgx_kvm_sw.model.spec import Hugepages, Share, VmSpec
from dgx_kvm_sw.model.topology import HugepagePool

Sound = Callable[[str], Inputs]


@pytest.fixture(scope="module")
def sound(machine: Callable[[str], Root]) -> Sound:
    """The inputs of a machine that nothing is wrong with, without VMs."""
    known: dict[str, Inputs] = {}

    def of(name: str) -> Inputs:
        if name not in known:
            known[name] = inputs_of(machine(name))
        return known[name]

    return of


def compositions(total: int, largest: int = 16) -> Iterator[tuple[int, ...]]:
    """Every multiset of legal sizes with this sum."""
    if total == 0:
        yield ()
    for size in (16, 8, 4, 2, 1):
        if size <= min(total, largest):
            yield from ((size, *rest) for rest in compositions(total - size, size))


FULL = [(name, sizes) for name in MACHINES for sizes in compositions(16 if name == "dgx2" else 8)]


# -- full machines ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sizes"), FULL, ids=str)
def test_every_full_set_is_placed_without_over_commitment(
    sound: Sound, name: str, sizes: tuple[int, ...]
) -> None:
    inputs = declare(sound(name), *vms(*sizes))
    placements = place(inputs)
    assert placements.unplaceable == ()
    assert [each.vm for each in placements.placed] == [each.name for each in inputs.spec.vms]
    assert_sound(inputs, placements)


@pytest.mark.parametrize("name", MACHINES)
def test_the_order_of_the_file_decides_no_fit(sound: Sound, name: str) -> None:
    gpus = len(sound(name).topology.gpus)
    sizes = [gpus // 2, gpus // 4, gpus // 8, gpus // 8]
    for order in itertools.permutations(sizes):
        inputs = declare(sound(name), *vms(*order))
        placements = place(inputs)
        assert placements.unplaceable == ()
        assert_sound(inputs, placements)


@pytest.mark.parametrize("name", MACHINES)
def test_a_share_is_the_vms_part_of_the_machine(sound: Sound, name: str) -> None:
    """Twice the GPUs, at least twice the rest; the whole machine gets all but reserve and pool."""
    inputs = sound(name)
    total = len(inputs.topology.gpus)
    found = {
        size: place(declare(inputs, vm("a", size))).placed[0] for size in inputs.platform.sizes
    }
    for size in inputs.platform.sizes[:-1]:
        assert found[2 * size].vcpus >= 2 * found[size].vcpus
        assert found[2 * size].memory_mib >= 2 * found[size].memory_mib
    caps = capacities(inputs.topology, inputs.spec, inputs.platform.gpus).values()
    threads = inputs.topology.threads_per_core
    assert found[total].vcpus == threads * sum(cap.gpu_cores for cap in caps)
    half = place(declare(inputs, vm("a", total, cpus=Share(0.5), memory=Share(0.5)))).placed[0]
    assert half.vcpus <= found[total].vcpus / 2
    assert half.memory_mib <= found[total].memory_mib / 2


@pytest.mark.parametrize("name", MACHINES)
def test_nics_are_on_the_pcie_switch_of_a_gpu_of_the_vm(sound: Sound, name: str) -> None:
    """Where the machine is full of equal VMs, each gets the NICs beside its own GPUs."""
    inputs = sound(name)
    near = _lowest_shared_switch(inputs)
    for size in inputs.platform.sizes:
        count = len(inputs.topology.gpus) // size
        for placement in place(declare(inputs, *vms(*[size] * count))).placed:
            for nic in placement.nics:
                assert near[nic] & set(placement.gpus)


def _lowest_shared_switch(inputs: Inputs) -> dict[PciAddress, set[PciAddress]]:
    """For each NIC the GPUs that no other GPU is nearer than."""
    result = {}
    for nic in inputs.topology.nics:
        far = {
            g.pci.address: distance(inputs.topology, g.pci, nic.pci) for g in inputs.topology.gpus
        }
        result[nic.pci.address] = {a for a, hops in far.items() if hops == min(far.values())}
    return result


@pytest.mark.parametrize("name", MACHINES)
def test_a_drive_is_the_nearest_to_the_gpus_of_the_vm(sound: Sound, name: str) -> None:
    inputs = sound(name)
    free = [d.pci for d in inputs.topology.drives if not d.block_devices]
    for one in inputs.topology.gpus:
        (placed,) = place(declare(inputs, vm("a", 1, pin=(str(one.index),), drives=1))).placed
        hops = {d.address: distance(inputs.topology, one.pci, d) for d in free}
        assert hops[placed.drives[0]] == min(hops.values())


def test_devices_that_the_host_uses_are_never_given(sound: Sound) -> None:
    for name in MACHINES:
        inputs = sound(name)
        total = len(inputs.topology.gpus)
        used = {nic.pci.address for nic in inputs.topology.nics if nic.interfaces}
        used |= {d.pci.address for d in inputs.topology.drives if d.block_devices}
        (whole,) = place(declare(inputs, vm("a", total))).placed
        assert used and not used & set(whole.devices)


# -- determinism and stability ----------------------------------------------------------------


@pytest.mark.parametrize("name", MACHINES)
def test_the_same_inputs_have_the_same_answer(sound: Sound, name: str) -> None:
    inputs = declare(sound(name), *vms(2, 1, 4, 0))
    assert place(inputs) == place(inputs)


def test_the_order_of_holdings_changes_nothing(sound: Sound) -> None:
    inputs = declare(sound("dgx2"), *vms(4, 2, 1, 1))
    held = after(inputs, place(inputs), running=False)
    for order in itertools.permutations(held.holdings):
        assert place(replace(held, holdings=order)) == place(held)


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("name", MACHINES)
def test_what_is_there_stays_as_it_is(sound: Sound, name: str, running: bool) -> None:
    gpus = len(sound(name).topology.gpus)
    inputs = declare(sound(name), *vms(1, gpus // 2, 2, 1))
    placements = place(inputs)
    again = place(after(inputs, placements, running=running))
    assert again.unplaceable == ()
    assert all(each.kept for each in again.placed)
    assert [replace(each, kept=False) for each in again.placed] == list(placements.placed)


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_new_vm_moves_nothing(sound: Sound, size: int, running: bool) -> None:
    before = declare(sound("dgx2"), *vms(1, 2, 1, 2))
    placements = place(before)
    now = declare(after(before, placements, running=running), vm("new", size), *before.spec.vms)
    found = place(now)
    assert found.of("new") is not None
    for old in placements.placed:
        assert found.of(old.vm) == replace(old, kept=True)
    assert_sound(now, found)


def test_a_new_pinned_vm_moves_no_stopped_one_that_it_leaves_room(sound: Sound) -> None:
    before = declare(sound("dgx2"), *vms(1, 1, 1))
    placements = place(before)
    free = next(g for g in range(16) if g not in {i for (i,) in chosen(before).values()})
    now = declare(
        after(before, placements, running=False),
        *before.spec.vms,
        vm("new", 1, pin=(str(free),)),
    )
    found = place(now)
    assert indexes(now, found.of("new")) == (free,)
    for old in placements.placed:
        assert found.of(old.vm) == replace(old, kept=True)


def test_running_vms_never_move_even_to_a_better_place(sound: Sound) -> None:
    """Singles that stand in the way of an 8-set stay, and the 8-set is refused by their names."""
    inputs = sound("dgx2")
    spread = {f"vm{n}": gpus for n, gpus in enumerate((0, 8))}
    base = declare(inputs, *(vm(name, 1, pin=(str(g),)) for name, g in spread.items()))
    held = after(base, place(base), running=True)
    now = declare(held, vm("vm0", 1), vm("vm1", 1), vm("big", 16))
    assert chosen(now) == {"vm0": (0,), "vm1": (8,)}
    (reason,) = refused(now, "big").reasons
    assert reason == "GPUs 0-15: held by vm0 and vm1"
    assert refused(now, "big").remedies == ("it would fit without vm0 and vm1",)


def test_stopped_vms_make_room_only_when_a_vm_would_be_left_out(sound: Sound) -> None:
    inputs = sound("dgx2")
    base = declare(inputs, vm("vm0", 1, pin=("0",)), vm("vm1", 1, pin=("8",)))
    held = after(base, place(base), running=False)
    loose = (vm("vm0", 1), vm("vm1", 1))
    assert chosen(declare(held, *loose, vm("big", 4)))["vm1"] == (8,)
    roomy = chosen(declare(held, *loose, vm("big", 8)))
    assert len(roomy) == 3 and len(roomy["big"]) == 8


def test_undoing_an_edit_moves_nothing(sound: Sound) -> None:
    """A running VM whose definition already says otherwise has two holdings."""
    before = declare(sound("dgx2"), vm("a", 2), vm("b", 2))
    first = place(before)
    a, b = first.placed
    edited = declare(after(before, first), vm("a", 4), before.spec.vms[1])
    wanted = place(edited).of("a")
    assert wanted is not None and wanted.partition is not None and wanted.partition.size == 4
    both = (holding(a, running=True), holding(wanted, running=True), holding(b, running=True))
    undone = place(replace(before, holdings=both))
    assert undone.of("a") == replace(a, kept=True)
    assert undone.of("b") == replace(b, kept=True)


# -- pins -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MACHINES)
def test_every_legal_partition_can_be_pinned(sound: Sound, name: str) -> None:
    inputs = sound(name)
    for partition in inputs.platform.partitions:
        pin = tuple(map(str, reversed(partition.gpus)))
        assert chosen(declare(inputs, vm("a", partition.size, pin=pin))) == {"a": partition.gpus}


@pytest.mark.parametrize("name", MACHINES)
def test_pci_addresses_pin_like_indexes(sound: Sound, name: str) -> None:
    inputs = sound(name)
    pair = inputs.platform.of_size(2)[-1]
    pin = (str(pair.gpus[1]), str(gpu(inputs, pair.gpus[0])))
    assert chosen(declare(inputs, vm("a", 2, pin=pin)))["a"] == pair.gpus


@pytest.mark.parametrize("form", ["{0:02x}:{1:02x}.{2}", "0000:{0:02X}:{1:02X}.{2}"])
def test_an_address_pins_in_every_way_it_may_be_written(sound: Sound, form: str) -> None:
    inputs = sound("dgx2")
    at = gpu(inputs, 15)
    pin = (form.format(at.bus, at.slot, at.function),)
    assert chosen(declare(inputs, vm("a", 1, pin=pin))) == {"a": (15,)}


def test_an_illegal_pin_is_refused_with_the_legal_ones(sound: Sound) -> None:
    inputs = declare(sound("dgx2"), vm("a", 2, pin=("0", "15")), vm("b", 2))
    assert list(chosen(inputs)) == ["b"]
    (reason,) = refused(inputs, "a").reasons
    assert "its pin 0, 15 is not a legal set of GPUs" in reason
    for pair in inputs.platform.of_size(2):
        assert "-".join(map(str, pair.gpus)) in reason
    assert refused(inputs, "a").remedies == ("pin one of the legal sets, or remove the pin",)


def test_a_pin_of_a_gpu_that_is_not_there_is_refused(sound: Sound) -> None:
    inputs = declare(sound("dgx-h100"), vm("a", 1, pin=("8",)))
    assert "its pin 8 is not a legal set" in refused(inputs, "a").reasons[0]


def test_pins_win_over_stopped_vms_whatever_the_order(sound: Sound) -> None:
    before = declare(sound("dgx2"), vm("old", 1))
    first = place(before)
    held = after(before, first, running=False)
    (taken,) = chosen(before)["old"]
    pinned = vm("new", 1, pin=(str(taken),))
    for declared in ((vm("old", 1), pinned), (pinned, vm("old", 1))):
        found = chosen(declare(held, *declared))
        assert found["new"] == (taken,) and found["old"] != (taken,)


def test_pins_win_over_stopped_vms_also_where_not_all_can_fit(sound: Sound) -> None:
    before = declare(sound("dgx-h100"), *vms(*[1] * 8))
    held = after(before, place(before), running=False)
    (taken,) = chosen(before)["vm0"]
    found = chosen(declare(held, *before.spec.vms, vm("new", 1, pin=(str(taken),))))
    assert found["new"] == (taken,) and "vm0" not in found


def test_a_stopped_vm_keeps_its_pin_against_one_that_lost_it(sound: Sound) -> None:
    """After a crash two definitions may hold one GPU; the one that is pinned to it has it."""
    inputs = sound("dgx2")
    (first,) = place(declare(inputs, vm("a", 1, pin=("3",)))).placed
    held = tuple(holding(replace(first, vm=name), running=False) for name in ("a", "b"))
    found = chosen(replace(declare(inputs, vm("a", 1), vm("b", 1, pin=("3",))), holdings=held))
    assert found["b"] == (3,) and found["a"] != (3,)


def test_pins_never_move_running_vms(sound: Sound) -> None:
    before = declare(sound("dgx2"), vm("old", 1))
    held = after(before, place(before))
    (taken,) = chosen(before)["old"]
    inputs = declare(held, vm("old", 1), vm("new", 1, pin=(str(taken),)))
    assert chosen(inputs) == {"old": (taken,)}
    (reason,) = refused(inputs, "new").reasons
    assert reason == f"GPU {taken}: held by old"
    assert refused(inputs, "new").remedies == ("it would fit without old",)


# -- health -----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["failed", "unbound", "absent"])
@pytest.mark.parametrize("name", MACHINES)
def test_a_gpu_that_is_not_usable_is_avoided_and_named(sound: Sound, name: str, state: str) -> None:
    for index in range(len(sound(name).topology.gpus)):
        inputs = failed(sound(name), gpu(sound(name), index), state=state)
        count = len(inputs.topology.gpus)
        inputs = declare(inputs, *vms(*[1] * count))
        found = chosen(inputs)
        assert sorted(i for (i,) in found.values()) == [i for i in range(count) if i != index]
        (out,) = place(inputs).unplaceable
        assert any(f"GPU {index} ({gpu(inputs, index)}) XID 79" in r for r in out.reasons)
        whole = refused(declare(inputs, vm("whole", count)), "whole")
        assert f"GPU {index} ({gpu(inputs, index)}) XID 79" in whole.reasons[0]
        assert whole.remedies == ()


@pytest.mark.parametrize("name", MACHINES)
def test_large_sets_go_around_a_failed_gpu(sound: Sound, name: str) -> None:
    for index in range(len(sound(name).topology.gpus)):
        inputs = failed(sound(name), gpu(sound(name), index))
        half = len(inputs.topology.gpus) // 2
        inputs = declare(inputs, vm("a", half), vm("b", half // 2), vm("c", half // 4))
        placements = place(inputs)
        assert placements.unplaceable == ()
        assert_sound(inputs, placements)


def test_a_degraded_gpu_is_used(sound: Sound) -> None:
    inputs = failed(sound("dgx-h100"), gpu(sound("dgx-h100"), 0), state="degraded")
    assert len(chosen(declare(inputs, *vms(*[1] * 8)))) == 8


def test_a_pin_on_a_failed_gpu_is_refused_by_its_reason(sound: Sound) -> None:
    inputs = failed(sound("dgx2"), gpu(sound("dgx2"), 5))
    out = refused(declare(inputs, vm("a", 1, pin=("5",))), "a")
    assert out.reasons == (f"GPU 5 ({gpu(inputs, 5)}) XID 79",)


def test_a_running_vm_keeps_its_failed_gpu_and_a_stopped_one_leaves_it(sound: Sound) -> None:
    before = declare(sound("dgx2"), vm("a", 1))
    placements = place(before)
    (held,) = chosen(before)["a"]
    broken = failed(before, gpu(before, held))
    assert chosen(after(broken, placements, running=True))["a"] == (held,)
    assert chosen(after(broken, placements, running=False))["a"] != (held,)


@pytest.mark.parametrize("name", MACHINES)
def test_a_failed_nic_changes_no_other_vm(sound: Sound, name: str) -> None:
    """The share of a NIC or drive is not of what happens to work today."""
    gpus = len(sound(name).topology.gpus)
    before = declare(sound(name), *vms(*[2] * (gpus // 2 - 1)))
    placements = place(before)
    held = {nic for each in placements.placed for nic in each.nics}
    usable = [n.pci.address for n in before.topology.nics if before.health.usable(n.pci.address)]
    spare = next(address for address in usable if address not in held)
    for victim in (spare, placements.placed[0].nics[0]):
        found = place(after(failed(before, victim), placements))
        assert found.unplaceable == ()
        assert all(each.kept for each in found.placed)


def test_a_full_machine_with_a_failed_nic_still_takes_its_vms(sound: Sound) -> None:
    """Degraded is an ordinary plan with fewer devices."""
    inputs = sound("dgx2")
    broken = next(n.pci.address for n in inputs.topology.nics if not n.interfaces)
    inputs = declare(failed(inputs, broken), *vms(*[2] * 8))
    placements = place(inputs)
    assert placements.unplaceable == ()
    assert sorted(len(each.nics) for each in placements.placed) == [0, *[1] * 7]
    assert_sound(inputs, placements)


def test_a_number_of_nics_is_a_demand(sound: Sound) -> None:
    out = refused(declare(sound("dgx2"), vm("a", 1, nics=9)), "a")
    assert "9 NICs are needed and 8 are free" in out.reasons[0]


# -- VMs without GPUs -------------------------------------------------------------------------


def roomy(inputs: Inputs) -> Inputs:
    """The machine without huge pages, so that its pool of ordinary memory has some."""
    return with_pages(inputs)


@pytest.mark.parametrize("name", MACHINES)
def test_vms_without_gpus_leave_the_gpus_their_share(sound: Sound, name: str) -> None:
    """However many are asked for, a full set of GPU VMs has the same as without them."""
    bare = roomy(sound(name))
    gpus = len(bare.topology.gpus)
    alone = place(declare(bare, *vms(*[1] * gpus)))
    small = [vm(f"cpu{n}", 0, cpus=4, memory=2048) for n in range(40)]
    first = declare(bare, *small)
    some = place(first)
    assert_sound(first, some)
    assert some.placed and some.unplaceable
    both = declare(after(first, some), *small[: len(some.placed)], *vms(*[1] * gpus))
    found = place(both)
    assert found.unplaceable == ()
    assert_sound(both, found)
    for each in alone.placed:
        with_others = found.of(each.vm)
        assert with_others is not None
        assert (with_others.vcpus, with_others.memory_mib) == (each.vcpus, each.memory_mib)


@pytest.mark.parametrize("name", MACHINES)
def test_vms_without_gpus_use_what_gpu_vms_leave_over(sound: Sound, name: str) -> None:
    bare = with_pool(roomy(sound(name)), 0, 0)
    gpus = len(bare.topology.gpus)
    lean = vm("lean", gpus, cpus=16, memory=64 * 1024)
    small = vm("small", 0, cpus=8, memory=8192)
    assert chosen(declare(bare, small, lean)).keys() == {"small", "lean"}
    full = vm("full", gpus)
    assert chosen(declare(bare, small, full)).keys() == {"full"}
    assert chosen(declare(bare, small)) == {}  # its room is the share of the free GPUs


@pytest.mark.parametrize("running", [(), ("small",), ("lean",), ("small", "lean")])
def test_leftovers_stay_used_on_every_later_run(sound: Sound, running: tuple[str, ...]) -> None:
    """The VM that made the leftovers may be stopped: its share is not held free again for it."""
    bare = with_pool(roomy(sound("dgx2")), 0, 0)
    lean, small = vm("lean", 16, cpus=16, memory=64 * 1024), vm("small", 0, cpus=8, memory=8192)
    inputs = declare(bare, small, lean)
    first = place(inputs)
    held = tuple(holding(each, running=each.vm in running) for each in first.placed)
    again = place(replace(inputs, holdings=held))
    assert [each.vm for each in again.placed if each.kept] == ["small", "lean"]


def test_a_running_vm_keeps_what_is_the_share_of_a_gpu_by_now(sound: Sound) -> None:
    """The VM that had left it over is gone; the GPU is free and so would be its share."""
    bare = with_pool(roomy(sound("dgx2")), 0, 0)
    lean, small = vm("lean", 16, cpus=16, memory=64 * 1024), vm("small", 0, cpus=8, memory=8192)
    first = place(declare(bare, small, lean))
    held = tuple(holding(each, running=True) for each in first.placed if each.vm == "small")
    alone = place(replace(declare(bare, small), holdings=held))
    assert alone.placed == (replace(first.placed[0], kept=True),)
    more = vm("small", 0, cpus=12, memory=8192)
    (reason,) = place(replace(declare(bare, more), holdings=held)).unplaceable[0].reasons
    assert "would eat into the share" in reason


def test_a_new_vm_moves_no_stopped_one_without_gpus(sound: Sound) -> None:
    before = declare(roomy(sound("dgx-b200")), vm("small", 0, cpus=2))
    first = place(before)
    held = after(before, first, running=False)
    found = place(declare(held, *before.spec.vms, *vms(1, 1, 4)))
    assert found.of("small") == replace(first.placed[0], kept=True)


def test_numbers_larger_than_the_share_are_refused_while_gpus_are_free(sound: Sound) -> None:
    inputs = sound("dgx2")
    greedy = vm("a", 1, cpus=40)
    (reason, *_) = refused(declare(inputs, greedy), "a").reasons
    assert re.search(r"its CPUs would eat into the share of the \d+ free GPUs", reason)
    hungry = vm("a", 1, memory=700 * 1024)
    (reason, *_) = refused(declare(inputs, hungry), "a").reasons
    assert re.search(r"its memory would eat into the share of the \d+ free GPUs", reason)
    (modest,) = place(declare(inputs, vm("a", 1, cpus=4))).placed
    assert modest.vcpus == 4


def test_numbers_larger_than_the_share_may_use_what_no_gpu_waits_for(sound: Sound) -> None:
    large = vm("a", 1, pin=("3",), cpus=80)
    assert chosen(declare(sound("dgx-h100"), large)) == {}
    inputs = failed(sound("dgx-h100"), *(gpu(sound("dgx-h100"), n) for n in (0, 1, 2)))
    assert chosen(declare(inputs, large)) == {"a": (3,)}


def test_a_vm_without_gpus_prefers_a_node_without(sound: Sound) -> None:
    (placed,) = place(declare(roomy(sound("dgx-a100")), vm("a", 0))).placed
    caps = capacities(sound("dgx-a100").topology, sound("dgx-a100").spec, 8)
    assert [caps[cell.host_node].gpus for cell in placed.cells] != []
    with_gpus = {g.pci.numa_node for g in sound("dgx-a100").topology.gpus}
    assert not {cell.host_node for cell in placed.cells} & with_gpus


def test_a_vm_without_gpus_that_no_node_holds_spreads(sound: Sound) -> None:
    bare = with_pool(roomy(sound("dgx-b200")), Share(1.0), Share(1.0))
    (placed,) = place(declare(bare, vm("a", 0, cpus=200, memory=64 * 1024))).placed
    assert len(placed.cells) == 2 and placed.vcpus == 200
    assert_sound(declare(bare, vm("a", 0, cpus=200, memory=64 * 1024)), place(declare(bare)))


# -- demands that no machine meets ------------------------------------------------------------


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize(("cpus", "either"), [(5, "4 or 6"), (1, "2"), (31, "30 or 32")])
def test_half_cores_are_refused_with_the_whole_ones(
    sound: Sound, gpus: int, cpus: int, either: str
) -> None:
    out = refused(declare(roomy(sound("dgx2")), vm("a", gpus, cpus=cpus)), "a")
    assert (
        f"{cpus} CPU threads are not whole cores (2 threads each): write {either}"
        in (out.reasons[0])
    )


def test_memory_beyond_the_node_is_refused_with_figures(sound: Sound) -> None:
    out = refused(declare(sound("dgx2"), vm("a", 1, memory=1000 * 1024)), "a")
    words = r"NUMA node 0 has \d+ GiB in 1 GiB pages free, 1000 GiB are needed there"
    assert re.search(words, out.reasons[0])


def test_cpus_beyond_the_node_are_refused_with_figures(sound: Sound) -> None:
    out = refused(declare(sound("dgx2"), vm("a", 1, cpus=60)), "a")
    assert re.search(r"NUMA node 0 has 23 cores free, 30 are needed there", out.reasons[0])


def test_a_size_that_the_machine_has_not_is_refused_with_those_it_has(sound: Sound) -> None:
    out = refused(declare(sound("dgx-h100"), vm("a", 16)), "a")
    assert out.reasons == ("NVIDIA DGX H100 has no legal set of 16 GPUs (sizes: 1, 2, 4, 8)",)


def test_a_machine_without_gpus_says_so(sound: Sound) -> None:
    inputs = sound("dgx-b200")
    bare = replace(
        inputs,
        topology=replace(inputs.topology, gpus=()),
        platform=replace(inputs.platform, partitions=(), title="a server"),
    )
    found = place(declare(bare, vm("a", 1), vm("b", 0)))
    assert [each.vm for each in found.placed] == ["b"]
    assert found.unplaceable[0].reasons == ("a server has no legal set of 1 GPUs (sizes: none)",)


def test_one_vm_that_cannot_be_hinders_no_other(sound: Sound) -> None:
    inputs = sound("dgx2")
    base = declare(inputs, vm("vm0", 1, pin=("0",)), vm("vm1", 1, pin=("8",)))
    held = after(base, place(base), running=False)
    odd = vm("odd", 1, cpus=5)
    found = chosen(declare(held, vm("vm0", 1), vm("vm1", 1), vm("big", 8), odd))
    assert found.keys() == {"vm0", "vm1", "big"}


# -- remedies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MACHINES)
def test_remedies_make_room(sound: Sound, name: str) -> None:
    """Random full machines: what a refusal says would help, helps."""
    rng = random.Random(name)
    inputs = sound(name)
    gpus = len(inputs.topology.gpus)
    said = 0
    for _ in range(12):
        sizes = rng.choice(list(compositions(gpus)))
        before = declare(inputs, *vms(*sizes))
        placements = place(before)
        gone = {each.name for each in before.spec.vms if rng.random() < 0.2}
        stay = [each for each in before.spec.vms if each.name not in gone]
        held = tuple(holding(p, running=True) for p in placements.placed if p.vm not in gone)
        now = replace(declare(before, *stay, vm("new", rng.choice([1, 2, 4, gpus]))), holdings=held)
        for out in place(now).unplaceable:
            for remedy in out.remedies:
                said += 1
                names = re.findall(r"vm\d+", remedy)
                rest = tuple(v for v in now.spec.vms if v.name not in names)
                without = replace(
                    declare(now, *rest), holdings=tuple(h for h in held if h.vm not in names)
                )
                assert place(without).of("new") is not None
    assert said


# -- IOMMU groups -----------------------------------------------------------------------------


def grouped(inputs: Inputs, *members: PciAddress) -> Inputs:
    groups = tuple(
        (number, tuple(a for a in group if a not in members))
        for number, group in inputs.topology.iommu_groups
    )
    together = (*(group for group in groups if group[1]), (9999, members))
    return replace(inputs, topology=replace(inputs.topology, iommu_groups=together))


def test_gpus_of_one_iommu_group_go_to_one_vm(sound: Sound) -> None:
    inputs = sound("dgx2")
    inputs = grouped(inputs, gpu(inputs, 0), gpu(inputs, 1))
    inputs = declare(inputs, vm("a", 1, pin=("0",)), vm("b", 1, pin=("1",)))
    assert chosen(inputs) == {"a": (0,)}
    (reason,) = refused(inputs, "b").reasons
    assert "GPU 1 " in reason and "shares an IOMMU group with GPU 0 " in reason
    assert "which a holds" in reason
    pair = vm("a", 2, pin=("0", "1"))
    assert chosen(declare(inputs, pair)) == {"a": (0, 1)}


def test_a_gpu_in_a_group_with_what_the_host_uses_is_refused(sound: Sound) -> None:
    inputs = sound("dgx2")
    management = next(nic.pci.address for nic in inputs.topology.nics if nic.interfaces)
    inputs = declare(grouped(inputs, gpu(inputs, 0), management), vm("a", 1, pin=("0",)))
    (reason,) = refused(inputs, "a").reasons
    assert f"shares an IOMMU group with NIC {management}, which the host uses" in reason


def test_a_gpu_in_a_group_with_an_unknown_device_is_refused(sound: Sound) -> None:
    inputs = sound("dgx2")
    other = PciAddress.parse("0000:ff:1f.3")
    inputs = declare(grouped(inputs, gpu(inputs, 0), other), vm("a", 1, pin=("0",)))
    assert f"PCI device {other}, which the host uses" in refused(inputs, "a").reasons[0]


# -- domains that are not ours ----------------------------------------------------------------


def foreign(inputs: Inputs, *devices: PciAddress, cells: tuple[GuestCell, ...] = ()) -> Inputs:
    return replace(inputs, holdings=(Holding("theirs", False, True, devices, cells, 0),))


def test_foreign_devices_are_taken_even_while_their_domain_is_stopped(sound: Sound) -> None:
    inputs = sound("dgx-h100")
    held = Holding("theirs", False, False, (gpu(inputs, 2),), (), 0)
    inputs = declare(replace(inputs, holdings=(held,)), *vms(*[1] * 8))
    assert (2,) not in chosen(inputs).values()
    (out,) = place(inputs).unplaceable
    (reason,) = out.reasons  # eight holders: the first of them are named
    assert reason == "8 sets of GPUs are held by theirs, vm0, vm1, vm2 and 4 more"


def test_foreign_cpus_are_taken_by_whole_cores(sound: Sound) -> None:
    inputs = sound("dgx-b200")
    core = capacities(inputs.topology, inputs.spec, inputs.platform.gpus)[0].cores[3]
    cell = GuestCell(0, ((core[1],),), 0)
    inputs = declare(foreign(inputs, cells=(cell,)), *vms(4, 2, 1))
    used = {cpu for p in place(inputs).placed for c in p.cells for one in c.cores for cpu in one}
    assert not used & set(core)


def test_foreign_memory_is_taken(sound: Sound) -> None:
    inputs = sound("dgx-b200")
    cell = GuestCell(0, (), 900 * 1024)
    inputs = declare(foreign(inputs, cells=(cell,)), vm("a", 4, pin=("0", "1", "2", "3")))
    assert re.search(
        r"NUMA node 0 has [\d.]+ GiB free, \d+ GiB are needed there",
        refused(inputs, "a").reasons[0],
    )


# -- huge pages -------------------------------------------------------------------------------

GIB1 = HugepagePool(1 << 20, 640, 640)
MIB2 = HugepagePool(2048, 320 * 1024, 320 * 1024)


@pytest.mark.parametrize(
    ("pools", "asked", "page"),
    [
        ((GIB1,), Hugepages.AUTO, 1 << 20),
        ((MIB2,), Hugepages.AUTO, 2048),
        ((), Hugepages.AUTO, 0),
        ((HugepagePool(1 << 20, 8, 8),), Hugepages.AUTO, 0),  # a small pool is for others
        ((GIB1,), Hugepages.NONE, 0),
        ((GIB1, HugepagePool(2048, 1024, 1024)), Hugepages.MIB2, 2048),
        ((MIB2, HugepagePool(1 << 20, 60, 60)), Hugepages.GIB1, 1 << 20),
    ],
)
def test_the_page_size_follows_the_pools_or_the_file(
    sound: Sound, pools: tuple[HugepagePool, ...], asked: Hugepages, page: int
) -> None:
    small: VmSpec = vm("a", 1, hugepages=asked, memory=1024)
    inputs = declare(with_pages(sound("dgx2"), *pools), small)
    (placed,) = place(inputs).placed
    assert placed.hugepage_kib == page
    assert_sound(inputs, place(inputs))


def test_pages_that_are_not_there_are_not_free(sound: Sound) -> None:
    inputs = declare(with_pages(sound("dgx2")), vm("a", 1, hugepages=Hugepages.GIB1, memory=4096))
    assert "has no pages of 1 GiB" in refused(inputs, "a").reasons[0]


def test_memory_is_whole_pages(sound: Sound) -> None:
    inputs = declare(sound("dgx2"), vm("a", 1, memory=1536))
    assert "1536 MiB of memory are not whole pages of 1 GiB" in refused(inputs, "a").reasons[0]
    two = with_pages(sound("dgx2"), MIB2)
    assert (
        "1535 MiB of memory are not whole pages of 2 MiB"
        in (refused(declare(two, vm("a", 1, memory=1535)), "a").reasons[0])
    )
    assert place(declare(two, vm("a", 1, memory=1536))).placed[0].memory_mib == 1536


def test_huge_and_ordinary_memory_are_counted_apart(sound: Sound) -> None:
    inputs = with_pages(sound("dgx2"), HugepagePool(1 << 20, 500, 500))
    pages = vm("a", 1, pin=("0",), hugepages=Hugepages.GIB1, memory=500 * 1024)
    plain = vm("b", 1, pin=("1",), hugepages=Hugepages.NONE, memory=100 * 1024)
    inputs = failed(declare(inputs, pages, plain), *(gpu(inputs, n) for n in range(2, 16)))
    assert chosen(inputs) == {"a": (0,), "b": (1,)}


# -- candidates() and fits() ------------------------------------------------------------------


def test_every_legal_set_has_a_verdict(sound: Sound) -> None:
    inputs = failed(sound("dgx2"), gpu(sound("dgx2"), 5))
    inputs = declare(inputs, vm("a", 2), vm("b", 2))
    found = candidates(inputs, inputs.spec.vms[1])
    assert len(found) == len(inputs.platform.of_size(2))
    assert found[0].verdict == "chosen"
    assert found[0].partition.gpus == chosen(inputs)["b"]
    verdicts = {each.partition.gpus: each.verdict for each in found}
    assert verdicts[chosen(inputs)["a"]].endswith("is held by a")
    assert any("XID 79" in verdict for verdict in verdicts.values())
    assert sum(verdict.startswith("fits, ranked") for verdict in verdicts.values()) == 5


def test_the_verdict_says_why_a_set_that_fits_is_not_offered(sound: Sound) -> None:
    inputs = declare(sound("dgx2"), vm("a", 1))
    mine = Holding("a", True, True, (gpu(inputs, 3),), (), 0)
    running = replace(inputs, holdings=(mine,))
    for each, why in (
        (running, "would fit, but a VM that runs stays where it is"),
        (declare(inputs, vm("a", 1, pin=("3",))), "would fit, but the file pins other GPUs"),
    ):
        first, *others = candidates(each, each.spec.vms[0])
        assert (first.partition.gpus, first.verdict) == ((3,), "chosen")
        assert {other.verdict for other in others} == {why}


@pytest.mark.parametrize("name", MACHINES)
def test_fits_counts_what_then_fits(sound: Sound, name: str) -> None:
    inputs = declare(sound(name), *vms(1, 2))
    samples = {size: vm("sample", size) for size in inputs.platform.sizes}
    for size, room in fits(inputs, samples).items():
        assert (room.next is None) == (room.refused is not None) == (room.count == 0)
        more = vms(*[size] * room.count, prefix="more")
        assert place(declare(inputs, *inputs.spec.vms, *more)).unplaceable == ()
        one = declare(inputs, *inputs.spec.vms, *more, vm("last", size))
        held = after(inputs, place(inputs))
        assert place(replace(one, holdings=held.holdings)).of("last") is None
