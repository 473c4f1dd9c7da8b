"""rank() against the exact optimum, and the exact optimum against brute force."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import pytest

from bench.optimum import (
    LISTS,
    MIX,
    Chain,
    Flags,
    Objective,
    accepted,
    best,
    chain,
    partitions,
    worst,
)
from bench.placement import (
    LOADS,
    SHORTFALL,
    best_ranked,
    first_ranked,
    simulate,
    worse_in_links,
)
from dgx_kvm_sw.model.platform import Partition

Vms = frozenset[Partition]


@dataclass(frozen=True, eq=False)
class Case:
    """A list's chain with what rank() holds equally good in each state."""

    model: Chain
    ranked: Flags


@cache
def case(name: str) -> Case:
    model = chain(partitions(name))
    return Case(model, best_ranked(model))


@cache
def optimum(name: str, load: float, objective: Objective) -> float:
    return accepted(case(name).model, load, objective)


# -- the gates --------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("name", LISTS)
def test_accepted_load_is_near_the_optimum_however_ties_fall(
    name: str, load: float, objective: Objective
) -> None:
    share = accepted(case(name).model, load, objective, case(name).ranked, worst)
    assert share >= optimum(name, load, objective) * (1 - SHORTFALL)


@pytest.mark.parametrize("name", LISTS)
def test_no_choice_has_fewer_links_than_a_free_set_of_the_size(name: str) -> None:
    checked, fewer = worse_in_links(case(name).model, case(name).ranked)
    assert checked
    assert fewer == 0


@pytest.mark.parametrize("objective", Objective)
def test_concrete_run_agrees_with_the_exact_bounds(objective: Objective) -> None:
    model, ranked = case("dgx2-shared").model, case("dgx2-shared").ranked
    run = simulate(model.partitions, 0.7, first_ranked(model.partitions))[objective]
    # Two margins: one of twenty honest runs would fall outside a single one.
    assert run.mean + 2 * run.margin >= accepted(model, 0.7, objective, ranked, worst)
    assert run.mean - 2 * run.margin <= accepted(model, 0.7, objective, ranked, best)


# -- the optimum itself -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "states"), [("dgx2-shared", 3886), ("dgx2-passthrough", 2279), ("dgx-h100", 67)]
)
def test_states_up_to_symmetry(name: str, states: int) -> None:
    """By hand where nothing crosses: quad 11, board 11 * 12 / 2 + 1, two boards 67 * 68 / 2 + 1."""
    assert len(case(name).model.states) == states


@pytest.mark.parametrize("objective", Objective)
def test_folding_symmetric_states_changes_nothing(objective: Objective) -> None:
    unfolded = chain(partitions("dgx-h100"), fold=False)
    assert len(unfolded.states) == 26**2 + 1
    for outcome in (best, worst):
        folded = accepted(case("dgx-h100").model, 0.7, objective, outcome=outcome)
        assert accepted(unfolded, 0.7, objective, outcome=outcome) == pytest.approx(
            folded, abs=1e-7
        )


QUAD = tuple(
    Partition(number, gpus, gpus, 0, 0)
    for number, gpus in enumerate([(0, 1, 2, 3), (0, 1), (2, 3), (0,), (1,), (2,), (3,)])
)


@pytest.mark.parametrize("load", [0.5, 1.5])
def test_optimum_is_the_best_of_all_rules_tried_one_by_one(load: float) -> None:
    """On four GPUs one choice matters: where a second single goes, given the first: 3 ** 4 rules.

    All others are between sets that a symmetry exchanges.
    """
    model = chain(QUAD)
    tried = [shares_of_rule(rule, load) for rule in product(range(3), repeat=4)]
    for index, objective in enumerate(Objective):
        shares = [shares[index] for shares in tried]
        assert max(shares) > min(shares)
        found = [accepted(model, load, objective, outcome=outcome) for outcome in (best, worst)]
        assert found == pytest.approx([max(shares), min(shares)], abs=1e-7)


def shares_of_rule(second: tuple[int, ...], load: float) -> tuple[float, float]:
    """Return the accepted shares of requests and GPUs of the quad, by plain linear algebra.

    `second[g]` says which of the three free GPUs a single gets beside a lone single on GPU g.
    """
    sizes = (1, 2, 4)
    mean_size = sum(size * MIX[size] for size in sizes)
    flows: dict[Vms, dict[Vms, float]] = {}
    to_visit: list[Vms] = [frozenset()]
    gains: dict[Vms, tuple[float, float]] = {}
    while to_visit:
        vms = to_visit.pop()
        if vms in flows:
            continue
        flows[vms] = {vms - {vm}: 1.0 for vm in vms}
        given = {size: choice for size in sizes if (choice := chosen(vms, size, second))}
        for size, partition in given.items():
            flows[vms][vms | {partition}] = load * 4 * MIX[size] / mean_size
        requests = sum(MIX[size] for size in given) / sum(MIX[size] for size in sizes)
        gains[vms] = requests, sum(size * MIX[size] for size in given) / mean_size
        to_visit += flows[vms]
    states = list(flows)
    present = stationary([[flows[one].get(other, 0.0) for other in states] for one in states])
    pairs = [(p * gains[vms][0], p * gains[vms][1]) for p, vms in zip(present, states, strict=True)]
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


def chosen(vms: Vms, size: int, second: tuple[int, ...]) -> Partition | None:
    busy = [gpu for vm in vms for gpu in vm.gpus]
    free = [p for p in QUAD if p.size == size and not set(p.gpus) & set(busy)]
    if size == 1 and len(busy) == 1:
        return free[second[busy[0]]]
    return free[0] if free else None


def stationary(rates: list[list[float]]) -> list[float]:
    """Return the long-run share of each state, by elimination without subtraction (GTH)."""
    rates = [list(row) for row in rates]
    for last in range(len(rates) - 1, 0, -1):
        out = sum(rates[last][:last])
        for row in rates[:last]:
            row[last] /= out
            for column in range(last):
                row[column] += row[last] * rates[last][column]
    weights = [1.0]
    for state in range(1, len(rates)):
        weights.append(sum(weights[i] * rates[i][state] for i in range(state)))
    return [weight / sum(weights) for weight in weights]
