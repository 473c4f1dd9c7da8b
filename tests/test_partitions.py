"""rank(): links, then least loss, then neighbours, then the caller's taste, then the lowest."""

from __future__ import annotations

from dgx_kvm_sw.decide.partitions import rank
from dgx_kvm_sw.model.platform import Partition


def part(gpus: tuple[int, ...], links: int = 6) -> Partition:
    return Partition(sum(1 << gpu for gpu in gpus), gpus, (), links, 0)


TREE = tuple(
    part(tuple(range(first, first + size))) for size in (8, 4, 2, 1) for first in range(0, 8, size)
)


def best(*taken: tuple[int, ...], size: int = 1) -> list[tuple[int, ...]]:
    return [partition.gpus for partition in rank(TREE, taken, size)]


def test_only_free_sets_of_the_size_are_ranked() -> None:
    assert best((0,), (5,), size=2) == [(2, 3), (6, 7)]
    assert best((0,), (5,), size=4) == []
    assert best(size=3) == []


def test_links_come_first() -> None:
    """Even where it breaks the last large set: a VM is slow for its whole life."""
    few, many = part((0, 1), links=5), part((4, 5), links=6)
    whole = part((4, 5, 6, 7))
    assert rank((few, many, whole), [], 2)[0] is many


def test_then_the_choice_that_keeps_the_most_large_sets() -> None:
    assert best((0,))[0] == (1,)
    assert best((0,), (1,), (2,))[0] == (3,)
    assert best((0, 1), (4,))[0] == (5,)
    assert best((0, 1), size=2)[0] == (2, 3)


def test_of_equal_losses_the_one_among_more_vms() -> None:
    """Counted in VMs: where three meet already, room for a large one comes last anyway."""
    assert best((0,), (1,), (4, 5))[0] == (2,)
    assert best((0, 1), (4,), (5,))[0] == (6,)


def test_then_the_callers_preference_then_the_lowest() -> None:
    assert best()[0] == (0,)
    prefers_high = rank(TREE, [], 1, lambda partition: (-partition.gpus[0],))
    assert prefers_high[0].gpus == (7,)
    assert rank(TREE, [(0,)], 1, lambda partition: (-partition.gpus[0],))[0].gpus == (1,)


def test_the_order_of_the_list_and_of_the_vms_changes_nothing() -> None:
    taken = [(0,), (4, 5)]
    expected = rank(TREE, taken, 1)
    assert rank(tuple(reversed(TREE)), taken[::-1], 1) == expected
