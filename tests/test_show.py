from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import machines
import pytest
from hosts import SimulatedHost

from dgx_kvm_sw.cli import show
from dgx_kvm_sw.cli.output import View
from dgx_kvm_sw.cli.picture import bar, flowed, line, table
from dgx_kvm_sw.host.health import QUARANTINE
from dgx_kvm_sw.model.errors import UsageError
from dgx_kvm_sw.reconcile import Situation

GOLDEN = Path(__file__).parent / "data" / "show"
HEAD = """tenants: {hr: {max_gpus: 4}, it: {}, sci: {}}
defaults: {networks: [{bridge: br0}]}
"""
SIX = (
    "name: hr-train, tenant: hr, gpus: 2",
    "name: it-lab, tenant: it, gpus: 2, memory: 160GiB",
    "name: rapids, tenant: sci, gpus: 8",
    "name: notebook, tenant: sci, gpus: 1, state: stopped",
    "name: it-test, tenant: it, gpus: 1",
    "name: build-1, tenant: it, gpus: 0, vcpus: 4, memory: 8GiB",
)
MIXED = (
    "name: train, gpus: 4",
    "name: infer, gpus: 1",
    "name: lab, gpus: 1, pin: [7]",
    "name: web, gpus: 0, vcpus: 8, memory: 16GiB",
)
ESCAPES = re.compile(r"\033\[[0-9;]*m")

Hosts = Callable[..., SimulatedHost]


def view(width: int, *, color: bool = False, unicode: bool = True) -> View:
    return View(width, color, unicode)


def look(host: SimulatedHost) -> Situation:
    host.plan()
    return host.situation


def with_vms(host: SimulatedHost, vms: tuple[str, ...]) -> SimulatedHost:
    """A host on which all that was declared is made."""
    host.declare(*vms, head=HEAD)
    host.settle()
    return host


def in_trouble(directory: Path) -> SimulatedHost:
    """A DGX-2 with broken devices, foreign domains, and a file that asks for other things."""
    root = machines.own("dgx2", directory)
    host = with_vms(SimulatedHost(root), SIX)
    machines.bind(root, "0000:e7:00.0", None)
    for address in ("0000:36:00.0", "0000:e6:00.0"):
        machines.change(root, address, "current_link_width", "8")
    failed = {
        "address": "0000:b9:00.0",
        "state": "failed",
        "reason": "reported XID 79 (GPU has fallen off the bus)",
        "since": "2026-03-01T02:10:00Z",
    }
    root.write(QUARANTINE, json.dumps({"version": 1, "devices": [failed]}))
    host.foreign("old-lab", devices=("0000:e5:00.0",), memory=4)
    host.foreign("desktop", running=False)
    host.declare(
        SIX[0],
        SIX[1].replace("160GiB", "144GiB"),
        SIX[2],
        SIX[3].replace("stopped", "running"),
        SIX[5],
        "name: newcomer, tenant: hr, gpus: 1",
        "name: huge, tenant: sci, gpus: 16",
        head=HEAD,
    )
    return host


@pytest.fixture(scope="module")
def trouble(tmp_path_factory: pytest.TempPathFactory) -> Situation:
    return look(in_trouble(tmp_path_factory.mktemp("trouble") / "host"))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the file of this name, or write it with --regenerate-output."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--regenerate-output"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == text + "\n"

    return compare


Golden = Callable[[str, str], None]


# -- golden texts ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_status_of_a_host_in_use(host: Hosts, golden: Golden, width: int) -> None:
    situation = look(with_vms(host("dgx2"), SIX))
    golden(f"status-{width}", show.status(situation, view(width)))
    golden(f"status-{width}-ascii", show.status(situation, view(width, unicode=False)))


@pytest.mark.parametrize("width", [80, 120])
def test_status_of_a_host_in_trouble(trouble: Situation, golden: Golden, width: int) -> None:
    golden(f"status-trouble-{width}", show.status(trouble, view(width)))
    golden(f"status-trouble-{width}-ascii", show.status(trouble, view(width, unicode=False)))


@pytest.mark.parametrize("name", ["dgx-a100", "dgx-h100"])
def test_status_of_machines_of_another_shape(host: Hosts, golden: Golden, name: str) -> None:
    situation = look(with_vms(host(name), MIXED))
    golden(f"status-{name}-80", show.status(situation, view(80)))
    golden(f"status-{name}-160", show.status(situation, view(160)))


def test_status_before_the_first_apply(host: Hosts, golden: Golden) -> None:
    fresh = host("dgx2")
    golden("status-empty-80", show.status(look(fresh), view(80)))
    fresh.declare(*SIX, head=HEAD)
    golden("status-declared-80", show.status(look(fresh), view(80)))


def test_topology_of_a_host_in_trouble(trouble: Situation, golden: Golden) -> None:
    machine = (trouble.topology, trouble.platform, trouble.health)
    golden("topology-80", show.topology(*machine, view(80)))


def test_topology_of_eight_numa_nodes(host: Hosts, golden: Golden) -> None:
    found = look(host("dgx-a100"))
    machine = (found.topology, found.platform, found.health)
    golden("topology-dgx-a100-120-ascii", show.topology(*machine, view(120, unicode=False)))


def test_explanations(host: Hosts, trouble: Situation, golden: Golden) -> None:
    fresh = host("dgx2")
    fresh.declare(*SIX, head=HEAD)
    situation = look(fresh)
    for name in ("hr-train", "notebook", "build-1"):
        golden(f"explain-{name}-80", show.explain(situation, name, view(80)))
    for name in ("it-lab", "newcomer"):
        golden(f"explain-trouble-{name}-80", show.explain(trouble, name, view(80)))


def test_what_fits(host: Hosts, golden: Golden) -> None:
    golden("fits-80", show.fits(look(with_vms(host("dgx2"), SIX)), view(80)))


# -- rules that hold for every picture --------------------------------------------------------


def all_texts(situation: Situation, shown: View) -> list[str]:
    vms = [vm.name for vm in situation.spec.vms]
    machine = (situation.topology, situation.platform, situation.health)
    return [
        show.status(situation, shown),
        show.topology(*machine, shown),
        show.fits(situation, shown),
        *(show.explain(situation, vm, shown) for vm in vms),
    ]


@pytest.mark.parametrize("width", [40, 72, 80, 99, 100, 120, 160, 200])
def test_no_line_is_wider_than_the_view(trouble: Situation, width: int) -> None:
    for text in all_texts(trouble, view(width)):
        assert max(map(len, text.splitlines())) <= width
        assert not any(row != row.rstrip() for row in text.splitlines())


@pytest.mark.parametrize("name", machines.MACHINES)
def test_every_machine_fits_into_80_columns(host: Hosts, name: str) -> None:
    situation = look(with_vms(host(name), MIXED))
    for text in all_texts(situation, view(80)):
        assert max(map(len, text.splitlines())) <= 80
    board = show.status(situation, view(80))
    assert "…" not in board  # all of it is there, nothing was cut


def test_ascii_and_colours_change_nothing_else(trouble: Situation) -> None:
    plain = all_texts(trouble, view(100))
    ascii_only = all_texts(trouble, view(100, unicode=False))
    coloured = all_texts(trouble, view(100, color=True))
    assert "\033" not in "".join(plain) and "\033" in "".join(coloured)
    assert [ESCAPES.sub("", text) for text in coloured] == plain
    for text, other in zip(plain, ascii_only, strict=True):
        assert other.isascii()
        assert [len(row) for row in text.splitlines()] == [len(row) for row in other.splitlines()]


def test_a_machine_at_rest_has_no_sections(host: Hosts) -> None:
    text = show.status(look(with_vms(host("dgx-h100"), MIXED)), view(100))
    for heading in ("Faults", "Refused", "Not as in the file", "Other domains", "Notes"):
        assert heading not in text


def test_a_gpu_shows_its_holder_and_its_fault(trouble: Situation) -> None:
    text = show.status(trouble, view(100))
    assert "│ A │ A!│" in text  # GPU 9 failed under hr-train
    assert "│ * │ ! │" in text  # a foreign domain, and a GPU without its driver
    assert "│ d │ H │" in text  # a stopped VM's, and one that is no longer declared


def test_more_vms_than_letters_and_columns(host: Hosts) -> None:
    vms = tuple(f"name: cpu-{i}, gpus: 0" for i in range(12))
    gpu_vms = tuple(f"name: {'x' * 55}-{i}, gpus: 1" for i in range(16))
    text = show.status(look(with_vms(host("dgx2"), (*vms, *gpu_vms))), view(80))
    assert "│A │B ││C │D │" in text  # VMs on the board come first
    assert "\n+  cpu-11" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_board_on_one_numa_node_is_drawn_whole(tmp_path: Path) -> None:
    root = machines.own("dgx2", tmp_path / "host")
    machines.without_numa(root)
    text = show.status(look(SimulatedHost(root)), view(80))
    assert "┌14┬15┐" in text


def test_devices_for_the_next_start_are_small_letters(host: Hosts) -> None:
    used = with_vms(host("dgx-h100"), MIXED)
    used.declare(MIXED[0], MIXED[1].replace("gpus: 1", "gpus: 2"), *MIXED[2:], head=HEAD)
    used.settle()
    situation = look(used)
    text = show.status(situation, view(80))
    assert "│ b │ │ b │ │ B │ │ C │" in text
    assert "b kept for B's next start" in text
    assert "It runs with GPU 6; a restart gives it" in show.explain(situation, "infer", view(80))


def test_a_vm_with_the_name_of_a_foreign_domain(host: Hosts) -> None:
    taken = host("dgx2")
    taken.foreign("web")
    taken.declare("name: web, gpus: 1", "name: wec, gpus: 1")
    situation = look(taken)
    assert "libvirt has a domain of this name" in show.status(situation, view(80))
    assert "libvirt has a domain of this name" in show.explain(situation, "web", view(80))


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("hr-trian", "there is no VM hr-trian in the file", "did you mean `hr-train`?"),
        ("it-test", "it-test is no longer in the file, so nothing decides where it is", "--prune"),
        ("old-lab", "old-lab is a domain that dgx-kvm did not make", "virsh"),
    ],
)
def test_names_that_cannot_be_explained(
    trouble: Situation, name: str, message: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        show.explain(trouble, name, view(80))
    assert caught.value.message == message
    assert hint in caught.value.hint


def test_a_wrong_size_template_is_said_and_breaks_nothing(host: Hosts) -> None:
    used = host("dgx2")
    used.root.write("/etc/dgx-kvm/templates/4-gpu.yaml", "cpus: lots\n", sync=False)
    situation = look(used)
    assert "× 4 " not in show.status(situation, view(80))
    assert "/etc/dgx-kvm/templates/4-gpu.yaml" in show.fits(situation, view(80))


# -- for programs ------------------------------------------------------------------------------


def test_json_is_plain_and_versioned(trouble: Situation) -> None:
    machine = (trouble.topology, trouble.platform, trouble.health)
    names = [vm.name for vm in trouble.spec.vms]
    documents = [
        show.status_json(trouble),
        show.topology_json(*machine),
        show.fits_json(trouble),
        *(show.explain_json(trouble, name) for name in names),
    ]
    for document in documents:
        assert json.loads(json.dumps(document)) == document
        assert document["version"] == 1


def test_status_json_says_what_the_picture_shows(trouble: Situation) -> None:
    document = show.status_json(trouble)
    devices = {device["address"]: device for device in document["devices"]}
    assert devices["0000:b9:00.0"]["holder"] == "hr-train"
    assert devices["0000:b9:00.0"]["state"] == "failed"
    assert devices["0000:e5:00.0"]["holder"] == "old-lab"
    assert devices["0000:01:00.0"]["kept_by_host"]
    vms = {vm["name"]: vm for vm in document["vms"]}
    assert vms["it-lab"]["state"] == "restart needed"
    assert vms["it-test"]["state"] == "not in the file" and vms["it-test"]["running"]
    assert vms["huge"]["refused"]["reasons"]
    assert vms["hr-train"]["gpus"] == [8, 9]
    assert not document["in_sync"]


# -- the parts they are made of ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("amounts", "width", "text"),
    [
        ((1, 1, 2), 8, "aabbcccc"),
        ((1, 1000, 0), 6, "abbbbb"),  # what is there is seen
        ((1, 5, 4), 2, "bc"),  # the smallest makes room
        ((0, 0, 0), 3, "   "),
    ],
)
def test_bars(amounts: tuple[int, ...], width: int, text: str) -> None:
    parts = [(sign, "", amount) for sign, amount in zip("abc", amounts, strict=True)]
    assert bar(parts, width).text == text


def test_lines_are_cut_with_an_ellipsis() -> None:
    assert line("abc", "def").cut(6).text == "abcdef"
    assert line("abc", "def").cut(5).text == "abcd…"


def test_flowed_words_are_not_broken() -> None:
    rows = flowed([("one two", ""), ("three", ""), ("four five", "")], 20, "Some")
    assert [row.text for row in rows] == ["Some  one two  three", "      four five"]


def test_tables_give_way_where_they_may() -> None:
    rows = table(("a", "b"), [["x" * 30, "1"]], 20, right=(1,), shrink=(0,))
    assert [row.width for row in rows] == [20, 20]
    assert rows[1].text.endswith("…  1")


@pytest.mark.commands
def test_looking_needs_no_slow_imports() -> None:
    code = (
        "import sys, dgx_kvm_sw.cli.show\n"
        "print([m for m in ('libvirt', 'jinja2', 'jsonschema') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
