"""Machines and commands of the lab that fail: what they say, without QEMU."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

import pytest

from lab import __main__ as command
from lab import machine
from lab.console import Lines
from lab.machine import Machine
from lab.packages import LabError, bootstrap
from lab.qemu import Hardware
from lab.shape import named
from lab.tools import Tools


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine whose QEMU ends at once."""
    monkeypatch.setattr(machine, "ROOT", tmp_path / "lab")
    tools = Tools(tmp_path / "tools")
    variables = tools.path("share/OVMF/OVMF_VARS_4M.fd")
    program(tools.path("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"), "echo no such device; exit 1")
    variables.parent.mkdir(parents=True)
    variables.touch()
    hardware = Hardware(named("dgx2-small"), tmp_path / "host.qcow2", served=False)
    return Machine(tools, hardware, "host")


@pytest.mark.commands
def test_a_qemu_that_ends_at_once_is_heard(switched_off: Machine) -> None:
    with switched_off, pytest.raises(LabError, match="QEMU ended\nno such device"):
        switched_off.power_on()
        switched_off.wait_for_shell(60)


def test_a_failure_says_where_the_logs_and_the_disk_are(
    switched_off: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LabError), switched_off:
        raise LabError("a step failed")
    said = capsys.readouterr().out
    assert f"its logs are in {tmp_path}/lab/runs/host, its disk is {tmp_path}/host.qcow2" in said
    with switched_off:
        pass
    assert capsys.readouterr().out == ""


def test_a_shell_needs_a_terminal() -> None:
    with pytest.raises(LabError, match="needs a terminal"):
        command._shell(Namespace())


def test_a_disk_that_is_not_there_is_not_made_anew() -> None:
    with pytest.raises(LabError, match="never-booted.qcow2 to go on with"):
        command._machine(Namespace(name="never-booted", keep_disk=True))


def test_a_machine_that_does_not_answer_is_the_labs_own_error(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="nobody listens"):
        Lines(tmp_path / "shell.sock", timeout=0)


@pytest.mark.commands
def test_packages_that_cannot_be_had_are_the_labs_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "bin/mmdebstrap", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    with pytest.raises(LabError, match="mmdebstrap made no bookworm"):
        bootstrap(tmp_path / "root.tar", "bookworm", ["base-files"], [])
