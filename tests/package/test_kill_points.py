"""A kill at any moment of an installation or a removal leaves one mode whole, and no dead end.

Where a kill may fall: see `powercut`. A step is one change; of some hundred, these tests take
some spread over all, and all of them when DGX_KVM_ALL_KILL_POINTS is set. What a real power cut
adds, data that was never written out, is not tested here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from package import boot, powercut, snapshot
from package.conftest import Hosts, Start
from package.debs import NAME
from package.machine import KERNELS, Machine
from package.snapshot import Snapshot

pytestmark = [
    pytest.mark.package,
    pytest.mark.skipif(not powercut.SUPPORTED, reason="counts the system calls of x86-64"),
]

Begin = Callable[["Action"], AbstractContextManager[Machine]]

POINTS = 10
FOLDERS = (
    "boot",
    "etc",
    "var",
    "usr/lib/dgx-kvm",
    "usr/share/dgx-kvm",
    "usr/share/initramfs-tools",
)
INSTALL = ("dpkg", "--install", "/tmp/package.deb")
REMOVE = ("dpkg", "--remove", NAME)
PURGE = ("dpkg", "--purge", NAME)


@dataclass(frozen=True)
class Action:
    """What is cut off, and how the same is reached without a cut."""

    command: tuple[str, ...]
    from_installed: bool


ACTIONS = {
    "install": Action(INSTALL, False),
    "remove": Action(REMOVE, True),
    "purge": Action(PURGE, True),
}


@dataclass(frozen=True)
class State:
    """Where a machine is in the end."""

    disk: Snapshot
    grub_cfg: str
    images: list[list[str]]
    status: str


def state(host: Machine) -> State:
    status = host.run("dpkg-query", "--show", "--showformat=${db:Status-Abbrev}", NAME).output
    listings = [boot.image_listing(host, kernel) for kernel in KERNELS]
    return State(snapshot.take(host, FOLDERS), host.read(boot.GRUB_CFG), listings, status)


@pytest.fixture(params=ACTIONS)
def action(request: pytest.FixtureRequest) -> Action:
    return ACTIONS[request.param]


@pytest.fixture
def begin(ready: Hosts, installed: Hosts, suite: str, start: Start, deb: Path) -> Begin:
    """Start a machine on which an action can be run."""

    @contextlib.contextmanager
    def of(action: Action) -> Iterator[Machine]:
        with start((installed if action.from_installed else ready)(suite, True)) as host:
            host.write("/tmp/package.deb", deb.read_bytes())
            yield host

    return of


@pytest.mark.parametrize(
    ("suite", "everything"),
    [("bookworm", True), ("trixie", False)],
    ids=["power-cut", "one-process"],
)
def test_a_kill_leaves_one_mode_whole_and_can_be_made_good(
    begin: Begin, action: Action, everything: bool
) -> None:
    with begin(action) as host:
        steps = powercut.changes(_inside(host, action))
        wanted = state(host)
    for at in _points(steps):
        with begin(action) as host:
            if not powercut.cut(_inside(host, action), at, everything=everything):
                continue  # triggers of other packages do not always do the same
            _boots_one_mode(host, at)
            _settle(host, at)
            _boots_one_mode(host, at)
            repeated = host.run(*action.command)
            assert repeated.code == 0, f"after a kill at {at}:\n{repeated.output}"
            reached = state(host)
            left = snapshot.differences(wanted.disk, reached.disk)
            assert left == [], f"after a kill at {at}"
            assert reached == wanted, f"after a kill at {at}"


def _inside(host: Machine, action: Action) -> tuple[str, ...]:
    return (*host.enter, *host.environment(), *action.command)


def _points(steps: list[str]) -> list[int]:
    """Half of them anywhere, half while the mode is switched, counted from 1."""
    switching = [number for number, program in enumerate(steps, 1) if program == "host-mode"]
    assert switching, "the command was not traced"
    if os.environ.get("DGX_KVM_ALL_KILL_POINTS"):
        return list(range(1, len(steps) + 1))
    anywhere = _spread(range(1, len(steps) + 1), POINTS // 2)
    return sorted({*anywhere, *_spread(range(switching[0], switching[-1] + 1), POINTS // 2)})


def _spread(numbers: range, count: int) -> list[int]:
    return [numbers[index * (len(numbers) - 1) // (count - 1)] for index in range(count)]


def _boots_one_mode(host: Machine, at: int) -> None:
    mode = boot.mode(host)
    assert mode in ("kvm", "bare-metal"), f"after a kill at {at}: {mode}"
    if mode == "kvm":
        for kernel in KERNELS:
            listing = boot.image_listing(host, kernel)
            ours = {"scripts/init-top/dgx-kvm", "etc/dgx-kvm/devices"}
            assert ours <= set(listing), f"after a kill at {at}: KVM mode without its image"


def _settle(host: Machine, at: int) -> None:
    """What an administrator or apt does first after a cut."""
    settled = host.run("dpkg", "--configure", "--pending")
    unpacked_in_part = "you should\n reinstall it" in settled.output  # the action is that
    assert settled.code == 0 or unpacked_in_part, f"after a kill at {at}:\n{settled.output}"
