"""Fixtures that several test modules share."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commandline import EIGHT, Host
from hosts import SimulatedHost, share_machine

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.host import simulate


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate-output",
        action="store_true",
        help="write the golden files anew; read their diff before committing it",
    )


def pytest_configure() -> None:
    """Have SIGINT reach what tests start: a shell ignores it for what it runs in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_commands(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit test runs no command unless it says so: its answer would depend on this machine."""
    if not any(map(request.node.get_closest_marker, ("commands", "images", "integration"))):

        def refuse(*arguments: Any, **_: Any) -> None:
            pytest.fail(f"a unit test runs the command {arguments[1:]}")

        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Root]:
    """Sample machines by name, to look at; tests that change one build their own."""
    folder: Path = tmp_path_factory.mktemp("machines")

    def of(name: str) -> Root:
        simulate.build(name, folder / name)
        return Root(folder / name)

    return of


@pytest.fixture
def host(machine: Callable[[str], Root], tmp_path: Path) -> Callable[..., SimulatedHost]:
    """Simulated hosts by the name of their machine, whose /sys all tests share."""

    def of(name: str, folder: str = "host") -> SimulatedHost:
        share_machine(machine(name), tmp_path / folder)
        return SimulatedHost(Root(tmp_path / folder))

    return of


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Host:
    """The command line on a simulated DGX-2 with no VM declared."""
    host = Host(tmp_path / "machine", capsys)
    host("validate")
    return host


@pytest.fixture
def eight(run: Host) -> Host:
    """The same with eight VMs of two GPUs declared."""
    run.declare(EIGHT)
    return run
