"""Hooks: the administrator's programs, in order, bounded in time, and nobody else's."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.access.hooks import HOOKS, run_hooks
from dgx_kvm_sw.model.errors import HostError

pytestmark = pytest.mark.commands

_NOBODY = 65534


class Stage:
    """The folder of a stage, and what its hooks wrote down and the journal was told."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self.folder = root.path(f"{HOOKS}/image-added")
        self.folder.mkdir(parents=True)
        self.log: list[Mapping[str, object]] = []
        self.failures: list[str] = []

    def add(self, name: str, script: str, mode: int = 0o755) -> Path:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\nexec 3>>{self.root.directory}/ran\n{script}\n")
        path.chmod(mode)
        return path

    def run(self, timeout: float = 30) -> None:
        run_hooks(self.root, "image-added", {"WHAT": "a b"}, self.log.append, timeout)

    def run_all(self) -> None:
        def failed(error: HostError) -> None:
            self.failures.append(error.message)

        run_hooks(self.root, "image-added", {}, self.log.append, 30, failed)

    @property
    def ran(self) -> list[str]:
        return self.root.read("/ran", "").splitlines()


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(Root(tmp_path))


def test_hooks_run_in_the_order_of_their_names_and_know_why(stage: Stage) -> None:
    stage.add("20-second", 'echo "second $WHAT" >&3')
    stage.add("10-first", 'echo "first $DGX_KVM_STAGE" >&3')
    stage.run()
    assert stage.ran == ["first image-added", "second a b"]


def test_no_folder_is_no_hook(tmp_path: Path) -> None:
    run_hooks(Root(tmp_path), "vm-seed", {}, print)


@pytest.mark.parametrize("name", ["10-old.dpkg-old", "10-edited~", ".hidden", "ten.sh"])
def test_names_that_run_parts_passes_over_are_passed_over(stage: Stage, name: str) -> None:
    stage.add(name, "echo ran >&3")
    stage.run()
    assert stage.ran == []


def test_what_is_not_executable_is_switched_off(stage: Stage) -> None:
    stage.add("README", "echo ran >&3", 0o644)
    stage.run()
    assert stage.ran == []


def test_a_failure_says_which_hook_and_why_and_ends_the_stage(stage: Stage) -> None:
    hook = stage.add("10-bad", "echo trying; echo 'no such host' >&2; exit 7")
    stage.add("20-after", "echo after >&3")
    with pytest.raises(HostError, match=f"{hook} failed with code 7: no such host"):
        stage.run()
    assert stage.ran == []
    assert stage.log[0]["output"] == "trying\nno such host"
    assert (stage.log[0]["hook"], stage.log[0]["code"]) == (str(hook), 7)


def test_where_failures_are_only_told_the_others_run(stage: Stage) -> None:
    stage.add("10-bad", "exit 7")
    stage.add("20-after", "echo after >&3")
    stage.run_all()
    assert stage.ran == ["after"]
    assert len(stage.failures) == 1
    assert "10-bad failed with code 7" in stage.failures[0]


def test_a_hook_that_takes_too_long_is_ended_with_all_it_started(stage: Stage) -> None:
    hook = stage.add("10-slow", "sleep 60 & wait")
    begin = time.monotonic()
    with pytest.raises(HostError, match=f"{hook} was ended: it took more than 1 s"):
        stage.run(timeout=1)
    assert time.monotonic() - begin < 30
    assert "took more than 1 s" in str(stage.log[0]["error"])


def test_what_is_no_program_is_named(stage: Stage) -> None:
    hook = stage.add("10-text", "")
    hook.write_text("no interpreter here\n")
    with pytest.raises(HostError, match=f"cannot run {hook}: exec format error"):
        stage.run()


@pytest.mark.parametrize("what", ["hook", "folder", "hooks.d", "home of a link"])
def test_nothing_is_run_that_others_can_change(stage: Stage, what: str) -> None:
    hook = stage.add("10-mine", "echo ran >&3")
    open_to_all = {"hook": hook, "folder": hook.parent, "hooks.d": hook.parents[1]}.get(what)
    if open_to_all is None:
        open_to_all = stage.root.path("/home")
        open_to_all.mkdir()
        hook.symlink_to(hook.rename(open_to_all / "10-mine"))
    open_to_all.chmod(0o777)
    with pytest.raises(HostError, match=rf"others than root can change {open_to_all}$") as raised:
        stage.run()
    assert f"chmod go-w {open_to_all}" in raised.value.hint
    assert stage.ran == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_nothing_of_another_user_is_run(stage: Stage) -> None:
    hook = stage.add("10-theirs", "echo ran >&3")
    os.chown(hook, _NOBODY, _NOBODY)
    with pytest.raises(HostError, match=f"others than root can change {hook}"):
        stage.run()
    assert stage.ran == []
