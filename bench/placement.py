"""Measure decide.partitions.rank against the exact optimum: python3 -m bench.placement."""

from __future__ import annotations

import heapq
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.optimum import (
    LISTS,
    MIX,
    Chain,
    Flags,
    Objective,
    Outcome,
    accepted,
    best,
    chain,
    drawn,
    gpu_mask,
    partitions,
    worst,
)
from dgx_kvm_sw.decide.partitions import rank
from dgx_kvm_sw.model.platform import Partition

LOADS = (0.5, 0.7, 0.9)  # GPUs asked for per GPU of the machine
SHORTFALL = 0.005  # gate: of the exact optimum, for requests and for GPUs
SLOWEST = 1e-3  # gate: seconds per choice, 99th percentile

# What a request of a size gets in a concrete state, which is the GPU masks of the VMs.
Rule = Callable[[tuple[int, ...], int], Partition | None]


def best_ranked(model: Chain) -> Flags:
    """Mark, as [state, partition], what rank() holds equally good but for preference and index.

    Links, sizes and neighbours are the same on symmetric states, so these sets hold for every
    state of a class; the index that breaks the tie in the end does not. Whoever evaluates them
    with `worst` bounds from below what any breaking of ties can reach.
    """
    position = {partition.id: index for index, partition in enumerate(model.partitions)}
    sizes = sorted({partition.size for partition in model.partitions})
    marked = np.zeros_like(model.free)
    for state, vm_bits in enumerate(model.states):
        vms = [model.partitions[index].gpus for index in _bits(int(vm_bits))]
        for size in sizes:
            ranked = rank(model.partitions, vms, size)
            if not ranked:
                continue
            # Ties the other way round: what leads now is the last of the equally good ones.
            last = rank(model.partitions, vms, size, _backwards)[0]
            equal = ranked[: ranked.index(last) + 1]
            marked[state, [position[partition.id] for partition in equal]] = True
    return marked


def _backwards(partition: Partition) -> tuple[int, ...]:
    return tuple(-gpu for gpu in partition.gpus)


def _bits(mask: int) -> list[int]:
    return [index for index in range(mask.bit_length()) if mask >> index & 1]


# -- simulation -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    mean: float
    margin: float  # half of the 95 % confidence interval


def simulate(
    listed: tuple[Partition, ...], load: float, rule: Rule, arrivals: int = 100_000, seed: int = 2
) -> dict[str, Estimate]:
    """Run a rule on concrete states. The same seed gives every rule the same requests."""
    draw = random.Random(seed)
    sizes = sorted({partition.size for partition in listed})
    shares = [MIX[size] for size in sizes]
    mean_size = sum(s * m for s, m in zip(sizes, shares, strict=True)) / sum(shares)
    rate = load * max(sizes) / mean_size
    leaving: list[tuple[float, int]] = []  # (time, GPUs), a heap
    now, batches, batch = 0.0, 20, arrivals // 20
    results: dict[str, list[float]] = {objective: [] for objective in Objective}
    for _ in range(batches):
        offered, taken = [0] * (max(sizes) + 1), [0] * (max(sizes) + 1)
        for size in draw.choices(sizes, shares, k=batch):
            now += draw.expovariate(rate)
            stay = draw.expovariate(1)
            while leaving and leaving[0][0] < now:
                heapq.heappop(leaving)
            offered[size] += 1
            if given := rule(tuple(sorted(vm for _, vm in leaving)), size):
                taken[size] += 1
                heapq.heappush(leaving, (now + stay, gpu_mask(given)))
        results[Objective.REQUESTS].append(sum(taken) / sum(offered))
        results[Objective.GPUS].append(_weighted(taken) / _weighted(offered))
    return {objective: _estimate(values) for objective, values in results.items()}


def _weighted(counts: list[int]) -> int:
    return sum(size * count for size, count in enumerate(counts))


def _estimate(values: list[float]) -> Estimate:
    student = 2.093  # 20 batches, 95 %
    margin = student * statistics.stdev(values) / len(values) ** 0.5
    return Estimate(statistics.fmean(values), margin)


def first_ranked(listed: tuple[Partition, ...]) -> Rule:
    known: dict[tuple[tuple[int, ...], int], Partition | None] = {}

    def rule(vms: tuple[int, ...], size: int) -> Partition | None:
        if (vms, size) not in known:
            known[vms, size] = next(iter(rank(listed, [_bits(vm) for vm in vms], size)), None)
        return known[vms, size]

    return rule


def lowest_id(listed: tuple[Partition, ...]) -> Rule:
    """Ubicloud's rule."""
    masks = {
        size: [(gpu_mask(p), p) for p in sorted(listed, key=lambda p: p.id) if p.size == size]
        for size in MIX
    }

    def rule(vms: tuple[int, ...], size: int) -> Partition | None:
        busy = sum(vms)  # no two VMs share a GPU
        return next((p for mask, p in masks[size] if not mask & busy), None)

    return rule


# -- links and time ---------------------------------------------------------------------------


def worse_in_links(model: Chain, marked: Flags) -> tuple[int, int]:
    """Count marked choices, and those with fewer links per GPU than a free set of the size."""
    links = np.array([partition.links for partition in model.partitions])
    sizes = np.array([partition.size for partition in model.partitions])
    fewer = 0
    for size in np.unique(sizes):
        most = np.where(model.free & (sizes == size), links, -1).max(axis=1)
        fewer += int((marked & (sizes == size) & (links < most[:, None])).sum())
    return int(marked.sum()), fewer


def choice_times(model: Chain, count: int = 3000) -> tuple[float, float]:
    """Return the median and the 99th percentile, in seconds, over choices drawn at random."""
    draw = random.Random(1)
    states, given = np.nonzero(model.free)
    times = []
    for choice in draw.choices(range(len(states)), k=count):
        state, size = states[choice], model.partitions[given[choice]].size
        vms = [model.partitions[index].gpus for index in _bits(int(model.states[state]))]
        start = time.perf_counter()
        rank(model.partitions, vms, size)
        times.append(time.perf_counter() - start)
    percentiles = statistics.quantiles(times, n=100)
    return percentiles[49], percentiles[98]


# -- report -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    what: str
    kept: bool


def main() -> int:
    print("Accepted share of requests and of GPUs, and the distance to the exact optimum.")
    print("Ties: what rank() holds equally good before preference and index. * simulated, 95 %.\n")
    gates = [gate for name in LISTS for gate in report(name)]
    print("Gates; 'rank(), worst of ties' counts, as a caller's preference may settle ties so:")
    for gate in gates:
        print(f"  {'kept  ' if gate.kept else 'MISSED'}  {gate.what}")
    return 0 if all(gate.kept for gate in gates) else 1


def report(name: str) -> list[Gate]:
    listed = partitions(name)
    model = chain(listed)
    print(f"{name}: {len(listed)} partitions, {len(model.states)} states up to symmetry")
    print(f"  load  {'rule':38} {'requests':>8}{'GPUs':>22}")
    ranked = best_ranked(model)
    gates = []
    for load in LOADS:
        gates += _compare(name, model, load, ranked)
    checked, worse = worse_in_links(model, ranked)
    gates.append(Gate(f"{name}: never fewer links than a free set has", worse == 0))
    print(f"  links per GPU: {checked} choices, {worse} below the best free set of the size")
    median, slow = choice_times(model)
    print(f"  time per choice: median {median * 1e6:.0f} us, p99 {slow * 1e6:.0f} us")
    gates.append(Gate(f"{name}: p99 of a choice under 1 ms", slow < SLOWEST))
    print()
    return gates


def _compare(name: str, model: Chain, load: float, ranked: Flags) -> list[Gate]:
    listed = model.partitions
    optimum = _exact(model, load, model.free, best)
    ours = _exact(model, load, ranked, worst)
    rows = (
        ("exact optimum (for each column)", optimum),
        ("rank(), best of ties", _exact(model, load, ranked, best)),
        ("rank(), worst of ties", ours),
        ("rank(), lowest GPUs of ties *", simulate(listed, load, first_ranked(listed))),
        ("lowest id *", simulate(listed, load, lowest_id(listed))),
        ("any legal set, drawn evenly", _exact(model, load, model.free, drawn)),
        ("worst legal set (for each column)", _exact(model, load, model.free, worst)),
    )
    for rule, values in rows:
        cells = (_cell(values[objective], optimum[objective]) for objective in Objective)
        print(f"  {load:4}  {rule:38}{''.join(cells)}")
    return [
        Gate(
            f"{name}, load {load}: {objective} within {SHORTFALL:.1%} of the optimum",
            ours[objective].mean >= optimum[objective].mean * (1 - SHORTFALL),
        )
        for objective in Objective
    ]


def _exact(model: Chain, load: float, allowed: Flags, outcome: Outcome) -> dict[str, Estimate]:
    return {o: Estimate(accepted(model, load, o, allowed, outcome), 0) for o in Objective}


def _cell(value: Estimate, optimum: Estimate) -> str:
    margin = f"+-{value.margin:.4f}" if value.margin else ""
    return f"{value.mean:9.4f}{margin:8}{value.mean / optimum.mean - 1:+9.2%}"


if __name__ == "__main__":
    sys.exit(main())
