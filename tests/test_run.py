"""Running other programs: bounded in time, nothing of them stays behind, errors in sentences."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dgx_kvm_sw.access.run import run
from dgx_kvm_sw.model.errors import HostError

pytestmark = pytest.mark.commands


def test_what_a_program_says_and_its_code_come_back() -> None:
    done = run(["sh", "-c", 'echo "$1"; echo no >&2; exit 3', "sh", "a; b"], timeout=10)
    assert (done.code, done.out, done.err) == (3, "a; b\n", "no\n")


def test_words_are_words_and_no_shell_reads_them() -> None:
    assert run(["printf", "%s", "$HOME; `id` *"], timeout=10).out == "$HOME; `id` *"


def test_what_is_no_text_is_no_error() -> None:
    assert run(["printf", r"\377ok"], timeout=10).out.endswith("ok")


def test_a_program_gets_no_terminal_and_the_systems_folders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert run(["cat"], timeout=10).out == ""
    done = run(["sh", "-c", 'echo "$PATH $LC_ALL $EXTRA"'], timeout=10, env={"EXTRA": "x"})
    assert done.out == "/usr/bin:/bin:/usr/sbin:/sbin C.UTF-8 x\n"


def test_what_a_program_says_can_be_watched() -> None:
    said: list[str] = []
    done = run(["sh", "-c", "echo a; sleep 0.7; echo b"], timeout=10, watch=said.append)
    assert done.out == "a\nb\n"
    assert "a\n" in said


def test_a_program_is_ended_where_watching_it_fails() -> None:
    def stop(said: str) -> None:
        raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(["sleep", "60"], timeout=90, watch=stop)
    assert time.monotonic() - begun < 30


def test_a_watched_program_has_its_time_too() -> None:
    with pytest.raises(HostError, match="sleep was ended: it took more than 0.5 s"):
        run(["sleep", "60"], timeout=0.5, watch=lambda said: None)


def test_errors_may_be_shown_while_the_program_runs(capfd: pytest.CaptureFixture[str]) -> None:
    done = run(["sh", "-c", "echo out; echo progress >&2"], timeout=10, show_errors=True)
    assert (done.out, done.err) == ("out\n", "")
    assert capfd.readouterr().err == "progress\n"


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(HostError, match="cannot run no-such-program: no such file"):
        run(["no-such-program"], timeout=10)


def test_a_program_that_takes_too_long_is_ended_with_all_it_started(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(HostError, match=r"sh was ended: it took more than 3 s"):
        # The one in the background holds the output open.
        run(["sh", "-c", f"sleep 60 & echo $! >{tmp_path}/pid; wait"], timeout=3)
    assert time.monotonic() - begin < 30
    pid = int((tmp_path / "pid").read_text())
    while _runs(pid) and time.monotonic() - begin < 30:
        time.sleep(0.05)
    assert not _runs(pid)


def test_a_program_that_ignores_the_request_to_end_is_killed() -> None:
    begin = time.monotonic()
    with pytest.raises(HostError, match="was ended"):
        run(["sh", "-c", "trap '' TERM; sleep 60"], timeout=3)
    assert time.monotonic() - begin < 30


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z" and os.path.exists(f"/proc/{pid}")
