"""Rank the free legal partitions of a size: most links first, then least loss for later VMs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from dgx_kvm_sw.model.platform import Partition

Preference = Callable[[Partition], tuple[int, ...]]


def rank(
    partitions: tuple[Partition, ...],
    taken: Sequence[Collection[int]],
    size: int,
    preference: Preference = lambda partition: (),
) -> list[Partition]:
    """Return the free partitions of `size`, best first.

    `taken` holds the GPU indexes of every VM, one set each; a GPU that cannot be used is a set
    of its own. Order, each step settling the ties of the one before:

    1. NVLinks per GPU.
    2. Least loss: the most free 16-, 8-, 4-, 2- and 1-partitions left, compared in that order.
    3. Most neighbours: VMs that meet the larger partitions around the candidate. Where many are
       already, room for a large VM comes last anyway. Counted in VMs, not in GPUs: one VM of
       four leaves sooner than the last of four.
    4. `preference` (smaller is better), then the lowest GPUs: the same state, the same answer.

    Accepted load stays within 0.5 % of the exact optimum however 4 falls (bench/placement.py).
    """
    masks = [_mask(partition.gpus) for partition in partitions]
    vms = [_mask(gpus) for gpus in taken]
    busy = _mask(gpu for gpus in taken for gpu in gpus)
    sizes = [partition.size for partition in partitions]
    largest_first = sorted(set(sizes), reverse=True)
    meeting = [sum(1 for vm in vms if vm & mask) for mask in masks]

    def order(partition: Partition, mask: int) -> tuple[object, ...]:
        left = dict.fromkeys(largest_first, 0)
        neighbours = 0
        for other, other_size, count in zip(masks, sizes, meeting, strict=True):
            if not other & (busy | mask):
                left[other_size] += 1
            if other & mask == mask:
                neighbours += count
        loss = tuple(-count for count in left.values())
        return (-partition.links, loss, -neighbours, preference(partition), partition.gpus)

    free = [
        (partition, mask)
        for partition, mask in zip(partitions, masks, strict=True)
        if partition.size == size and not mask & busy
    ]
    return [partition for partition, _ in sorted(free, key=lambda item: order(*item))]


def _mask(gpus: Iterable[int]) -> int:
    mask = 0
    for gpu in gpus:
        mask |= 1 << gpu
    return mask
