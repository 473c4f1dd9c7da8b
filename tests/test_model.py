"""Values: written forms and back, JSON."""

from __future__ import annotations

import json
import random

import pytest

from dgx_kvm_sw.model.base import StrEnum, digest, to_json
from dgx_kvm_sw.model.errors import BadFileError, Problem
from dgx_kvm_sw.model.health import DeviceState
from dgx_kvm_sw.model.pci import CpuSet, Link, PciAddress
from dgx_kvm_sw.model.placement import GuestCell
from dgx_kvm_sw.model.spec import Share, SourceLine


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("0000:34:00.0", "0000:34:00.0"),
        ("34:00.0", "0000:34:00.0"),
        (" 0000:B7:1F.7 ", "0000:b7:1f.7"),
        ("10000:01:00.0", "10000:01:00.0"),
    ],
)
def test_addresses_are_read_and_written(text: str, written: str) -> None:
    assert str(PciAddress.parse(text)) == written
    assert PciAddress.parse(written) == PciAddress.parse(text)


@pytest.mark.parametrize(
    "text", ["", "34:00", "34:00.8", "0000:34:00.0.1", "000:34:00.0", "zz:00.0", "0000:34:00.0 x"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a PCI address like 0000:34:00.0"):
        PciAddress.parse(text)


def test_addresses_sort_as_the_bus_is() -> None:
    order = ["0000:02:00.0", "0000:10:00.0", "0000:10:00.1", "0001:01:00.0"]
    assert [str(a) for a in sorted(map(PciAddress.parse, reversed(order)))] == order


@pytest.mark.parametrize(
    ("text", "cpus", "written"),
    [
        ("", [], ""),
        ("3", [3], "3"),
        ("0-3,8", [0, 1, 2, 3, 8], "0-3,8"),
        ("8,0-3", [0, 1, 2, 3, 8], "0-3,8"),
        ("0-1,2-3", [0, 1, 2, 3], "0-3"),
        ("5,5,4-6\n", [4, 5, 6], "4-6"),
    ],
)
def test_cpu_lists_are_read_and_written(text: str, cpus: list[int], written: str) -> None:
    assert list(CpuSet.parse(text)) == cpus
    assert str(CpuSet.parse(text)) == written
    assert len(CpuSet.parse(text)) == len(cpus)


def test_cpu_lists_come_back_as_they_were() -> None:
    rng = random.Random(1)
    for _ in range(200):
        cpus = CpuSet.of(rng.sample(range(300), rng.randint(0, 60)))
        assert CpuSet.parse(str(cpus)) == cpus


@pytest.mark.parametrize("text", ["a", "-1", "1-2-3", "0x3", "1;2"])
def test_what_is_no_cpu_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        CpuSet.parse(text)


@pytest.mark.parametrize(
    ("link", "degraded"),
    [
        (Link(16, 16, 16, 16), False),
        (Link(16, 8, 16, 16), True),
        (Link(8, 16, 16, 16), True),
    ],
)
def test_a_link_below_its_best_is_degraded(link: Link, degraded: bool) -> None:
    assert link.degraded is degraded


def test_values_are_plain_json() -> None:
    cell = GuestCell(1, ((0, 48), (1, 49)), 1024)
    assert to_json(cell) == {"host_node": 1, "cores": [[0, 48], [1, 49]], "memory_mib": 1024}
    mixed = (PciAddress(0, 0x34, 0, 0), CpuSet.of((1, 2)), Share(0.5), DeviceState.OK, None, True)
    assert to_json(mixed) == ["0000:34:00.0", "1-2", "50%", "ok", None, True]
    assert to_json({1: SourceLine("f", 2)}) == {"1": "f:2"}
    assert json.dumps(to_json(mixed))


def test_a_digest_is_of_content_and_short() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(CpuSet.of((1, 2))) != digest(CpuSet.of((1, 3)))
    assert digest(1, 2) != digest((1, 2), ())
    assert len(digest("")) == 16 and int(digest(""), 16)


def test_enums_print_as_their_values() -> None:
    class Color(StrEnum):
        RED = "red"

    assert f"{Color.RED}" == str(Color.RED) == "red"


def test_a_problem_points_at_its_place() -> None:
    problem = Problem("f.yaml", 3, 5, 3, 8, "vms[0]", "is wrong", "be right", "    abc")
    assert str(problem) == ("f.yaml:3:5: vms[0]: is wrong (be right)\n        abc\n        ^^^")
    assert str(Problem("f.yaml", 0, 0, 0, 0, "", "is empty")) == "f.yaml: is empty"
    assert BadFileError((problem, problem)).message.count("is wrong") == 2
