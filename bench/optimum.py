"""The most a placement rule can accept on a partition list: an exact dynamic programme.

Requests arrive as a Poisson stream, stay an exponential time of mean 1, and leave at once if
no legal partition is free. A state is the set of partitions that hold a VM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import yaml

from dgx_kvm_sw.host.platforms import TABLE
from dgx_kvm_sw.model.base import StrEnum
from dgx_kvm_sw.model.platform import FabricModel, Partition

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

MIX = {1: 0.50, 2: 0.25, 4: 0.15, 8: 0.08, 16: 0.02}  # share of requests by number of GPUs
TOLERANCE = 1e-8  # width of the interval that encloses a returned share


class Objective(StrEnum):
    REQUESTS = "requests"  # every accepted request counts 1
    GPUS = "gpus"  # every accepted request counts its GPUs


LISTS = {
    "dgx2-shared": ("dgx2", FabricModel.SHARED),
    "dgx2-passthrough": ("dgx2", FabricModel.PASSTHROUGH),
    "dgx-h100": ("dgx-h100", FabricModel.SHARED),
}


def partitions(name: str) -> tuple[Partition, ...]:
    """Return one of LISTS; GPU indexes are physical id - 1, as numbering changes no optimum."""
    machine, fabric_model = LISTS[name]
    documents = yaml.safe_load_all(TABLE.read_text(encoding="utf-8"))
    table = next(d for d in documents if d and machine in d["machines"])
    rows = [(number, ids, links) for number, (links, ids) in table["partitions"].items()]
    rows += [(table["singles"] + index, [index + 1], 0) for index in range(table["gpus"])]
    if fabric_model is FabricModel.PASSTHROUGH:
        # Between boards, links are open only to the VM that has the whole machine.
        half = table["gpus"] // table["boards"]
        rows = [
            (number, ids, table["passthrough"][len(ids)][1])
            for number, ids, _ in rows
            if len(ids) == table["gpus"] or len({(gpu - 1) // half for gpu in ids}) == 1
        ]
    return tuple(
        Partition(number, tuple(gpu - 1 for gpu in ids), tuple(ids), links, nvswitches=0)
        for number, ids, links in rows
    )


@dataclass(frozen=True, eq=False)
class Chain:
    """The states of a partition list, one for each class of symmetric states, and their moves.

    Tables are indexed [state, partition]; where a move is impossible they hold the state itself.
    """

    partitions: tuple[Partition, ...]
    states: Ints  # representatives: bit i is set where partitions[i] holds a VM
    busy: Ints  # bit i is set where GPU i belongs to a VM
    free: Flags  # the partition can be given
    after: Ints  # the state once the partition was given
    left: Ints  # the state once the partition's VM has gone


def chain(listed: tuple[Partition, ...], fold: bool = True) -> Chain:
    """Build the chain of a list; without `fold` every state stands for itself alone."""
    every, every_busy = _every_state(listed)
    orbit = _orbits(every, symmetries(listed) if fold else [])
    chosen = np.unique(orbit)
    states, busy = every[chosen], every_busy[chosen]

    def index(reached: Ints) -> Ints:
        return np.searchsorted(chosen, orbit[np.searchsorted(every, reached)])

    free, after, left = [], [], []
    for position, partition in enumerate(listed):
        bit = 1 << position
        fits = busy & gpu_mask(partition) == 0
        free.append(fits)
        after.append(index(np.where(fits, states | bit, states)))
        left.append(index(states & ~bit))
    tables = (np.stack(columns, axis=1) for columns in (free, after, left))
    return Chain(listed, states, busy, *tables)


def gpu_mask(partition: Partition) -> int:
    return sum(1 << gpu for gpu in partition.gpus)


def symmetries(listed: tuple[Partition, ...]) -> list[tuple[int, ...]]:
    """Return exchanges of two equal halves that map the list to itself, as orders of positions.

    On DGX-2 these are GPU in pair, pair in quad, quad in board (both boards at once where
    partitions cross them) and the boards. Links must agree too, so that a rule that looks at
    links decides alike on symmetric states. The shared list has 459,683 states; folding pairs
    and quads leaves 15,128, folding boards and quads in boards 3,886.
    """
    position = {(frozenset(p.gpus), p.links): index for index, p in enumerate(listed)}
    found = []
    for one, other in combinations(listed, 2):
        if one.size != other.size or set(one.gpus) & set(other.gpus):
            continue
        swap = dict(zip(one.gpus + other.gpus, other.gpus + one.gpus, strict=True))
        images = [
            position.get((frozenset(swap.get(gpu, gpu) for gpu in p.gpus), p.links)) for p in listed
        ]
        if None not in images:
            found.append(tuple(image for image in images if image is not None))
    return found


def _every_state(listed: tuple[Partition, ...]) -> tuple[Ints, Ints]:
    """Return all sets of disjoint partitions in ascending order, and the GPUs they occupy."""
    states = busy = np.zeros(1, dtype=np.int64)
    for position, partition in enumerate(listed):
        mask = gpu_mask(partition)
        fits = busy & mask == 0
        states = np.concatenate([states, states[fits] | 1 << position])
        busy = np.concatenate([busy, busy[fits] | mask])
    return states, busy


def _orbits(states: Ints, exchanges: list[tuple[int, ...]]) -> Ints:
    """Return for each state the index of the smallest state that exchanges turn it into."""
    images = []
    for exchange in exchanges:
        moved = np.zeros_like(states)
        for source, target in enumerate(exchange):
            moved |= (states >> source & 1) << target
        images.append(np.searchsorted(states, moved))
    smallest = np.arange(len(states))
    while True:
        before = smallest
        for image in images:
            smallest = np.minimum(smallest, smallest[image])
        if (smallest == before).all():
            return smallest


# How what a rule leaves open turns out: a reduction of values over rows that begin at `starts`.
Outcome = Callable[[Floats, Ints], Floats]


def best(values: Floats, starts: Ints) -> Floats:
    reduced: Floats = np.maximum.reduceat(values, starts)
    return reduced


def worst(values: Floats, starts: Ints) -> Floats:
    reduced: Floats = np.minimum.reduceat(values, starts)
    return reduced


def drawn(values: Floats, starts: Ints) -> Floats:
    """Every entry of a row is equally likely."""
    summed: Floats = np.add.reduceat(values, starts)
    mean: Floats = summed / np.diff(starts, append=len(values))
    return mean


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of states, end to end; none is empty."""

    targets: Ints
    starts: Ints

    def reduce(self, value: Floats, outcome: Outcome) -> Floats:
        return outcome(value[self.targets], self.starts)


def _rows(targets: Ints, wanted: Flags, stay: Flags) -> _Rows:
    """Keep the wanted targets, and the state itself where it may stay as it is."""
    itself = np.arange(len(targets))[:, None]
    kept = np.hstack([wanted, stay[:, None]])
    lengths = kept.sum(axis=1)
    return _Rows(np.hstack([targets, itself])[kept], np.cumsum(lengths) - lengths)


def _arrivals(model: Chain, allowed: Flags, size: int) -> tuple[_Rows, Flags]:
    """Return where a request may lead from each state, and whether it is accepted there."""
    of_size = [i for i, partition in enumerate(model.partitions) if partition.size == size]
    fits = allowed[:, of_size].any(axis=1)
    return _rows(model.after[:, of_size], allowed[:, of_size], ~fits), fits


def accepted(
    model: Chain,
    load: float,
    objective: Objective,
    allowed: Flags | None = None,
    outcome: Outcome = best,
) -> float:
    """Return the share of the offered requests, or of the offered GPUs, that is accepted.

    `allowed` ([state, partition]) is what the rule may give, all free ones by default; a rule
    never refuses what it could give. `load` is GPUs asked for per GPU of the machine.
    """
    sizes = sorted({partition.size for partition in model.partitions})
    mix = np.array([MIX[size] for size in sizes])
    rate = load * max(sizes) * mix / (mix @ sizes)  # arrivals of each size per unit of time
    worth = np.ones(len(sizes)) if objective is Objective.REQUESTS else np.array(sizes, float)
    worth /= rate @ worth
    arrivals = [_arrivals(model, model.free if allowed is None else allowed, s) for s in sizes]
    income = sum(r * w * fits for (_, fits), r, w in zip(arrivals, rate, worth, strict=True))
    gone = model.left != np.arange(len(model.states))[:, None]
    leaving = _rows(model.left, gone, np.ones(len(gone), dtype=bool))
    vms = gone.sum(axis=1)

    def drift(value: Floats) -> Floats:
        change = income + (vms + 1) * (leaving.reduce(value, drawn) - value)
        for (rows, _), frequency in zip(arrivals, rate, strict=True):
            change += frequency * (rows.reduce(value, outcome) - value)
        return np.asarray(change)

    return _relative_value_iteration(drift, len(gone), rate.sum() + max(sizes))


def _relative_value_iteration(
    drift: Callable[[Floats], Floats], states: int, fastest: float
) -> float:
    """Return the long-run gain per unit of time; it lies between the extremes of the drift.

    No state is left at a higher rate than `fastest`, so drift / fastest is one step of a
    discrete chain (uniformisation).
    """
    value = np.zeros(states)
    while True:
        change = drift(value)
        if np.ptp(change) < TOLERANCE:
            return float(change.max() + change.min()) / 2
        value += change / fastest
        value -= value[0]
