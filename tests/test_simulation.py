"""`--simulate`: a machine in a directory, made at first use, and nothing outside of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commandline import DGX_KVM, Host

from dgx_kvm_sw.cli import simulation
from dgx_kvm_sw.cli.verbs import PLATFORMS
from dgx_kvm_sw.model.errors import DgxKvmError, ExitCode

TWO = """\
version: 1
vms:
  - {name: a, gpus: 8, image: debian-12}
  - {name: b, gpus: 0, memory: 4GiB, vcpus: 2}
"""


@pytest.mark.commands  # xorriso
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_main_job_works_on_every_platform(
    platform: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Host(tmp_path / "machine", capsys, platform)
    assert run("plan").last == "Nothing to do: no VM is declared."
    run.declare(TWO)
    run("apply")
    for verb in ("status", "topology", "fits", "explain a", "plan", "diff"):
        result = run(verb)
        assert result.code == 0, (verb, result)
        assert result.err == ""


def test_machines_live_in_the_state_directory_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    root = simulation.machine("dgx2", None)
    assert root.directory == tmp_path / "state/dgx-kvm/dgx2"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # the XDG specification: ignore such
    monkeypatch.setenv("HOME", str(tmp_path))
    assert simulation.machine("dgx2", None).directory == tmp_path / ".local/state/dgx-kvm/dgx2"


def test_two_platforms_never_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Host(tmp_path / "machine", capsys)("validate")
    result = Host(tmp_path / "machine", capsys, "dgx-h100")("validate")
    assert result.code == ExitCode.FAILED
    assert "already simulates dgx2, not dgx-h100" in result.err


def test_a_directory_with_other_files_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(DgxKvmError, match="holds other files"):
        simulation.machine("dgx2", str(tmp_path))
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_removing_the_directory_resets_the_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Host(tmp_path / "machine", capsys)
    run("create a --gpus 1")
    assert run("plan").last == "Nothing to do: 1 VM is as declared."
    shutil.rmtree(run.directory)
    assert run("plan").last == "Nothing to do: no VM is declared."


def test_nothing_is_written_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Host(tmp_path / "machine", capsys)
    run("create a --gpus 1")
    run("status")
    assert os.listdir(tmp_path) == ["machine"]


@pytest.mark.commands
@pytest.mark.parametrize("delay", [0.05, 0.1, 0.15, 0.2, 0.25, 0.3])
def test_a_killed_first_use_is_taken_up_again(
    delay: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Host(tmp_path / "machine", capsys)
    process = subprocess.Popen([DGX_KVM, *run.words, "validate"], stdout=subprocess.DEVNULL)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run("create a --gpus 1").last == "Done: 1 created, 1 started."
    assert not [name for name in os.listdir(run.directory) if name.startswith(".building")]


@pytest.mark.commands
def test_two_first_uses_at_once_both_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Host(tmp_path / "machine", capsys)
    words = [DGX_KVM, *run.words, "plan"]
    both = [subprocess.Popen(words, stdout=subprocess.DEVNULL) for _ in range(4)]
    assert [process.wait() for process in both] == [0, 0, 0, 0]


@pytest.mark.commands
def test_state_below_what_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = [DGX_KVM, "--simulate", "dgx2", "--state", f"{tmp_path}/file/machine", "plan"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.FAILED
    assert done.stderr.startswith("dgx-kvm: cannot ")
