"""The command line as its users meet it: verbs, exit codes, messages, on a simulated DGX-2."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
from commandline import DGX_KVM, EIGHT, PROJECT, Host

from dgx_kvm_sw import __version__
from dgx_kvm_sw.cli import arguments, main, overview, verbs
from dgx_kvm_sw.host import simulate
from dgx_kvm_sw.model.errors import ExitCode
from dgx_kvm_sw.model.spec import SIZES
from dgx_kvm_sw.reconcile import LOCK

READS = [verb.name for verb in verbs.VERBS if verb.reads]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Host:
    host = Host(tmp_path / "machine", capsys)
    host("validate")
    return host


@pytest.fixture
def eight(run: Host) -> Host:
    run.declare(EIGHT)
    return run


# -- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", verbs.VERBS, ids=[verb.name for verb in verbs.VERBS])
def test_help_of_every_verb_says_what_it_does_with_an_example(
    verb: verbs.Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb.name, "--help"]) == 0
    text = capsys.readouterr().out
    assert verb.title[1:] in text
    assert f"\n  dgx-kvm {verb.name}" in text.replace("--simulate dgx-h100 ", "")


def test_every_example_is_a_command_line_that_parses() -> None:
    for example in [example for verb in verbs.VERBS for example in verb.examples]:
        arguments.parse(example.split()[1:])


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_verbs_options_and_exit_codes(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([flag]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb.name} " in text for verb in verbs.VERBS)
    assert all(name in text for names, _, _ in verbs.EVERYWHERE for name in names)
    assert all(f"\n  {int(code)} " in text for code in ExitCode)
    assert max(map(len, text.splitlines())) <= 100


def test_help_after_other_options_is_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "--help"]) == 0
    assert capsys.readouterr().out.strip() == overview.overview()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dgx-kvm {__version__}\n"
    assert f'version = "{__version__}"' in (PROJECT / "pyproject.toml").read_text()


def test_tables_of_the_command_line_agree_with_those_of_the_program() -> None:
    assert simulate.names() == verbs.PLATFORMS
    assert tuple(map(str, SIZES)) == verbs._SIZES
    assert {int(code) for code in ExitCode} | {130} == {code for code, _ in overview.EXIT_CODES}


# -- a wrong command line -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("", "a verb is missing", "--help"),
        ("aply", "there is no verb 'aply'", "did you mean apply?"),
        ("plan --restrt", "no option '--restrt'", "did you mean --restart?"),
        ("plan surplus", "no use for 'surplus'", "dgx-kvm plan --help"),
        ("--simulate dgx9 plan", "there is no platform 'dgx9'", "did you mean dgx2?"),
        ("plan --state /x", "--state is for --simulate", "--simulate"),
        ("apply --delete-disks", "--delete-disks works on what --prune deletes", "both"),
        ("apply --timeout soon", "--timeout: 'soon' is not a number of seconds", "--help"),
        ("apply --wait -1", "--wait", "--help"),
        ("apply --wait nan", "is not a number of seconds", "--help"),
        ("start", "NAME is missing", "dgx-kvm start --help"),
        ("create x", "--gpus is missing", "--help"),
        ("create x --gpus 3", "'3' is not a number of GPUs: 0, 1, 2, 4, 8, 16", "--help"),
        ("create x --gpus 1 --disk data", "'data' is not of the form LEFT=RIGHT", "--help"),
        ("create ../../x --gpus 1", "'../../x' is not a VM name", "--help"),
        ("apply --json", "no option '--json'", "--help"),
        ("--json apply", "no --json", "--help"),
        ("--root /nonexistent plan", "/nonexistent is not a directory", ""),
        ("apply --rest", "no option '--rest'", "--restart"),
    ],
)
def test_usage_errors_are_a_sentence_and_a_hint(
    line: str, message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(line.split())
    said = capsys.readouterr().err
    assert code == (ExitCode.FAILED if "nonexistent" in line else ExitCode.USAGE)
    assert message in said
    assert hint in said
    assert len(said.splitlines()) <= 2


def test_a_name_with_a_newline_is_refused_on_one_line(run: Host) -> None:
    result = run("start", "a\nb")
    assert result.code == ExitCode.USAGE
    assert "'a\\nb' is not a VM name" in result.err


def test_options_may_stand_before_or_after_the_verb(run: Host) -> None:
    assert main(["validate", *run.words]) == 0
    assert main([*run.words[:2], "validate", *run.words[2:]]) == 0


# -- validate -----------------------------------------------------------------------------------


def test_validate_counts_vms(eight: Host) -> None:
    assert eight("validate").out == "8 VMs, no mistakes\n"
    assert eight("validate --json").json["valid"] is True


def test_validate_names_every_mistake_with_its_place(run: Host) -> None:
    run.declare("version: 1\nvms:\n  - {name: a, gpus: 3}\n  - {name: b, gpus: 1, memry: 1GiB}\n")
    result = run("validate")
    assert result.code == ExitCode.BAD_FILE
    assert f"{run.spec}:3:21: vms[0].gpus: 3 is not one of" in result.err
    assert "did you mean `memory`?" in result.err
    assert f"\n{' ' * 27}^^^^^\n" in result.err
    found = run("validate --json")
    assert found.code == ExitCode.BAD_FILE
    assert [p["range"]["start"]["line"] for p in found.json["problems"]] == [3, 4]


def test_validate_takes_a_file_and_so_does_every_verb(run: Host, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("version: 1\nvms: [{name: a, gpus: 1}]\n")
    assert run(f"validate {other}").out == "1 VM, no mistakes\n"
    assert run(f"-f {other} plan").last == "Plan: 1 to create, 0 to change, 0 to delete."


@pytest.mark.parametrize("verb", ["validate", "plan", "diff", "apply", "status", "fits", "start x"])
@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", ExitCode.BAD_FILE),
        (b"\xff\xfe\x00", ExitCode.BAD_FILE),
        (b"[" * 100000, ExitCode.BAD_FILE),
        (b"a: &a [*a]", ExitCode.BAD_FILE),
        (None, ExitCode.FAILED),  # a directory
    ],
)
def test_a_bad_file_never_shows_a_traceback(
    verb: str, content: bytes | None, code: int, run: Host
) -> None:
    run.spec.unlink()
    if content is None:
        run.spec.mkdir()
    else:
        run.spec.write_bytes(content)
    result = run(verb)
    assert result.code == code
    assert str(run.spec) in result.err


def test_errors_come_as_json_too(run: Host) -> None:
    run.declare("version: 2\n")
    result = run("plan --json")
    assert result.code == ExitCode.BAD_FILE
    assert result.json["error"]["problems"][0]["path"] == "version"


# -- plan, diff, apply --------------------------------------------------------------------------


def test_a_second_apply_has_nothing_to_do(eight: Host) -> None:
    plan = eight("plan")
    assert (plan.code, plan.last) == (2, "Plan: 8 to create, 0 to change, 0 to delete.")
    assert "  + vm-0  GPUs 0-1" in plan.out
    first = eight("apply")
    assert (first.code, first.last) == (0, "Done: 8 created, 8 started.")
    second = eight("apply")
    assert (second.code, second.out) == (0, "Nothing to do: 8 VMs are as declared.\n")
    assert eight("plan").code == eight("diff").code == eight("status --check").code == 0


def test_a_change_of_a_running_vm_waits_for_restart(eight: Host) -> None:
    eight("apply")
    eight.declare(EIGHT.replace("vm-3, gpus: 2", "vm-3, gpus: 2, memory: 20GiB"))
    assert eight("status --check").code == ExitCode.CHANGES
    plan = eight("plan")
    assert plan.last == (
        "Plan: 0 to create, 1 to change (1 at next restart), 0 to delete;"
        " 1 waits for --restart: vm-3."
    )
    assert re.search(r"memory: \w+ -> 20GiB  \(at next restart\)", plan.out)
    assert eight("apply").last == "Done: 1 changed; 1 waits for --restart: vm-3."
    assert eight("apply").last == (
        "Nothing to do: 7 VMs are as declared; 1 waits for --restart: vm-3."
    )
    assert eight("apply --restart").last == "Done: 1 restarted."
    assert eight("plan").code == 0


def test_a_vm_that_left_the_file_stays_until_prune(eight: Host) -> None:
    eight("apply")
    eight.declare(EIGHT.replace("  - {name: vm-7, gpus: 2, networks: [{bridge: br0}]}\n", ""))
    assert eight("apply").last.endswith("1 waits for --prune --restart: vm-7.")
    assert eight("apply --prune").last.endswith("1 waits for --restart: vm-7.")
    assert (
        "vm-7.os.qcow2 -> deleted  (destroys data)"
        in eight("plan --prune --restart --delete-disks").out
    )
    assert eight("apply --prune --restart").last == "Done: 1 deleted."
    assert eight.root.exists("/libvirt/volumes/vm-7.os.qcow2")


def test_what_does_not_fit_is_refused_and_hinders_nobody(eight: Host) -> None:
    eight("apply")
    eight("stop vm-0")
    eight.declare(EIGHT + "  - {name: big, gpus: 16}\n")
    result = eight("apply")
    assert result.code == ExitCode.FAILED
    assert "! big  does not fit" in result.out
    assert result.last == "Done: 1 started; 1 does not fit: big."
    again = eight("apply -q")
    assert (again.code, again.last.partition(";")[0]) == (1, "Nothing to do: 8 VMs are as declared")


def test_diff_speaks_the_words_of_the_file_or_xml(eight: Host) -> None:
    eight("apply")
    eight.declare(EIGHT.replace("vm-3, gpus: 2", "vm-3, gpus: 2, memory: 20GiB"))
    words = eight("diff")
    assert words.code == ExitCode.CHANGES
    assert words.out.startswith("@@ vm-3 @@\n- memory: ")
    assert "\n+ memory: 20GiB\n" in words.out
    assert "--- libvirt/vm-3\n+++ declared/vm-3\n" in eight("diff --xml").out
    assert [row["vm"] for row in eight("diff --json").json["vms"]] == ["vm-3"]


def test_quiet_leaves_the_exit_code(eight: Host) -> None:
    for command, code in (("plan -q", 2), ("diff -q", 2), ("apply -q", 0), ("plan -q", 0)):
        result = eight(command)
        assert (result.code, result.out) == (code, "")


@pytest.mark.parametrize("verb", READS)
def test_every_verb_that_looks_has_json(verb: str, eight: Host) -> None:
    eight("apply")
    names = "vm-0" if verb == "explain" else ""
    result = eight(f"{verb} {names} --json")
    assert result.code == 0
    assert result.json["version"] == 1
    assert result.err == ""


# -- saved plans --------------------------------------------------------------------------------


def test_a_saved_plan_does_what_it_says_and_only_once(eight: Host, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert eight(f"plan -o {file}").code == ExitCode.CHANGES
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    saved = json.loads(file.read_text())
    assert {action["type"] for action in saved["actions"]} >= {"CreateVolume", "StartDomain"}
    assert eight(f"apply {file}").last == "Done: 8 created, 8 started."
    again = eight(f"apply {file}")
    assert again.code == ExitCode.FAILED
    assert "is stale" in again.err
    assert "nothing was done" in again.err


def test_a_stale_plan_changes_nothing(eight: Host, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    eight(f"plan -o {file}")
    eight.declare(EIGHT + "# a comment\n")
    assert eight(f"apply {file}").code == ExitCode.FAILED
    assert not eight.root.exists("/libvirt/domains")


def test_a_saved_plan_knows_its_file(run: Host, tmp_path: Path) -> None:
    spec, file = tmp_path / "other.yaml", tmp_path / "plan.json"
    spec.write_text("version: 1\nvms: [{name: a, gpus: 1}]\n")
    saved = run(f"-f {spec} plan -o {file}")
    assert f"To do exactly this: dgx-kvm apply {file}\nPlan: 1 to create" in saved.out
    assert run(f"apply {file}").last == "Done: 1 created, 1 started."


@pytest.mark.parametrize("target", ["/dev/null", "."])
def test_a_plan_replaces_no_device(target: str, run: Host) -> None:
    assert run(f"plan -o {target}").code == ExitCode.USAGE


def test_a_saved_plan_keeps_its_options(eight: Host, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    eight("apply")
    eight.declare("version: 1\n")
    eight(f"plan --prune --restart -o {file}")
    assert eight(f"apply {file} --prune").code == ExitCode.USAGE
    assert eight(f"apply {file}").last == "Done: 8 deleted."


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', "version: 1\n", "[" * 99999])
def test_what_is_no_plan_is_not_applied(text: str, eight: Host, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    result = eight(f"apply {file}")
    assert result.code == ExitCode.BAD_FILE
    assert "this is not a saved plan" in result.err


# -- one VM -------------------------------------------------------------------------------------


def test_start_stop_restart(eight: Host) -> None:
    eight("apply")
    assert eight("start vm-0").out == "vm-0 is running already\n"
    stop = eight("stop vm-0 vm-1")
    assert stop.last == "Done: 2 stopped."
    assert "vm-0, vm-1: the file says running, so the next apply starts them again" in stop.out
    again = eight("stop vm-0 vm-1")
    assert (again.code, again.out) == (0, "vm-0, vm-1 are stopped already\n")
    assert eight("start vm-0 vm-1").last == "Done: 2 started."
    assert eight("restart vm-0").last == "Done: 1 restarted."
    assert eight("stop vm-0 --force --timeout 0").last == "Done: 1 stopped."


@pytest.mark.parametrize("verb", ["start", "stop", "restart", "delete", "explain"])
def test_a_name_nobody_knows_is_answered_with_the_nearest(verb: str, eight: Host) -> None:
    eight("apply")
    result = eight(f"{verb} vm-77")
    assert result.code == ExitCode.USAGE
    assert "vm-77" in result.err
    assert "did you mean" in result.err


def test_a_wrong_name_among_right_ones_stops_nothing(eight: Host) -> None:
    eight("apply")
    assert eight("stop vm-0 nobody").code == ExitCode.USAGE
    assert eight("start vm-0").out == "vm-0 is running already\n"


def test_a_simulated_vm_has_no_console(eight: Host) -> None:
    assert "has no console" in eight("console vm-0").err


def test_create_and_delete_leave_nothing_behind(eight: Host) -> None:
    eight.declare(EIGHT.replace("gpus: 2", "gpus: 1"))
    eight("apply")
    before = _state(eight)
    made = eight(
        "create lab --gpus 2 --memory 20GiB --vcpus 4 --image debian-12 --disk data=5GiB"
        " --network bridge=br0 --network network=default --pin 14,15"
    )
    assert made.last == "Done: 1 created, 1 started."
    assert "+ lab  GPUs 14-15" in made.out
    assert eight("plan").code == 0
    assert "declared already" in eight("create lab --gpus 1").err
    refused = eight("delete lab")
    assert (refused.code, "--stop" in refused.err) == (ExitCode.FAILED, True)
    kept = eight("delete lab --stop")
    assert "Its disks stay:\n  /var/lib/dgx-kvm/images/lab.os.qcow2" in kept.out
    assert eight("create lab --gpus 2").code == 0
    assert eight("delete lab --stop --delete-disks").last == "Done: 1 deleted."
    assert _state(eight) - {"/libvirt/volumes/lab.data.qcow2"} == before


def _state(host: Host) -> set[str]:
    folders = ("/etc/dgx-kvm", "/etc/dgx-kvm/vms.d", "/libvirt/domains", "/libvirt/volumes")
    return {f"{folder}/{name}" for folder in folders for name in host.root.names(folder)} - {
        "/etc/dgx-kvm/vms.d"
    }


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--gpus 16", ExitCode.FAILED, "does not fit, so nothing was changed"),
        ("--gpus 1 --memory lots", ExitCode.USAGE, "--memory: 'lots' is not a size"),
        ("--gpus 1 --memory 20", ExitCode.USAGE, "did you mean `20GiB`?"),
        ("--gpus 1 --tenant nobody", ExitCode.USAGE, "--tenant: there is no tenant 'nobody'"),
        ("--gpus 1 --image debian-21", ExitCode.USAGE, "did you mean `debian-12`?"),
        ("--gpus 1 --disk os=1GiB", ExitCode.USAGE, "--disk"),
        ("--gpus 1 --network wire=x", ExitCode.USAGE, "--network"),
        ("--gpus 2 --pin 8", ExitCode.USAGE, "--pin"),
        ("--gpus 1 --pin [8", ExitCode.USAGE, "--pin"),
        ('--gpus 1 --image "},x:{', ExitCode.USAGE, "--image"),
    ],
)
def test_a_create_that_is_refused_leaves_nothing(
    options: str, code: int, message: str, eight: Host
) -> None:
    eight.declare(EIGHT.replace("gpus: 2", "gpus: 1"))
    eight("apply")
    before = _state(eight)
    result = eight(f"create lab {options}")
    assert result.code == code
    assert message in result.err
    assert _state(eight) == before


def test_create_changes_nothing_else(eight: Host) -> None:
    eight.declare(EIGHT.replace("gpus: 2", "gpus: 1"))
    result = eight("create lab --gpus 1 --stopped")
    assert "8 other VMs wait for `dgx-kvm apply`" in result.out
    assert result.last == "Done: 1 created."
    assert eight.root.names("/libvirt/domains") == ["lab.json"]


def test_delete_is_for_what_create_made(eight: Host) -> None:
    eight("apply")
    result = eight("delete vm-0 --stop")
    assert result.code == ExitCode.USAGE
    assert "vms.yaml:3" in result.err
    eight.declare(EIGHT.replace("vm-0", "vm-x"))
    assert "apply --prune" in eight("delete vm-0").err


# -- trouble ------------------------------------------------------------------------------------


def test_a_second_command_is_told_who_holds_the_lock(eight: Host) -> None:
    path = eight.root.path(LOCK)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        lock.write("`dgx-kvm apply` (process 1)")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        for verb in ("apply", "create x --gpus 1", "start vm-0", "stop vm-0"):
            result = eight(verb)
            assert result.code == ExitCode.BUSY
            assert "`dgx-kvm apply` (process 1) is changing the VMs" in result.err
        assert eight("plan").code == ExitCode.CHANGES  # looking needs no lock
        begin = time.monotonic()
        assert eight("apply --wait 0.5").code == ExitCode.BUSY
        assert time.monotonic() - begin >= 0.5


@pytest.mark.commands
def test_wait_goes_on_when_the_lock_is_free(eight: Host) -> None:
    path = eight.root.path(LOCK)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = subprocess.Popen(
            [DGX_KVM, *eight.words, "apply", "--wait", "30"], stdout=subprocess.PIPE, text=True
        )
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
    out, _ = waiting.communicate(timeout=30)
    assert out.endswith("Done: 8 created, 8 started.\n")


@pytest.mark.commands
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_apply_says_what_is_left_and_the_next_one_finishes(
    number: int, eight: Host
) -> None:
    process = subprocess.Popen(
        [DGX_KVM, *eight.words, "apply"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not eight.root.names("/libvirt/domains"):
        time.sleep(0.001)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert "Interrupted: " in out
    assert "left undone: " in out
    assert eight("apply").code == 0
    assert eight("plan").code == 0


@pytest.mark.commands
def test_a_full_disk_is_told_in_a_sentence(eight: Host) -> None:
    def no_space() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    for verb in ("apply", "create x --gpus 1", "plan -o plan.json"):
        result = eight.outside(verb, preexec_fn=no_space, cwd=eight.directory)
        assert result.returncode == ExitCode.FAILED
        assert "file too large" in result.stderr
        assert "Traceback" not in result.stderr
    assert eight("apply").code == 0


@pytest.mark.commands
def test_output_that_cannot_be_written(eight: Host) -> None:
    with open("/dev/full", "w") as full:
        for verb in ("status", "plan", "--help", "plan --json"):
            result = eight.outside(verb, capture_output=False, stdout=full, stderr=-1)
            assert result.returncode in (1, 2)
            assert len(result.stderr.splitlines()) == 1
            assert "no space left on device" in result.stderr.lower()


@pytest.mark.commands
def test_a_reader_that_leaves_early_is_no_error(eight: Host) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    for verb in ("topology", "--help", "plan --json"):
        result = eight.outside(verb, capture_output=False, stdout=writing, stderr=-1)
        assert result.stderr == ""
    os.close(writing)


@pytest.mark.commands
def test_a_locale_without_utf8_and_closed_streams_are_no_error(eight: Host) -> None:
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    for verb in ("status", "topology", "fits"):
        words = [DGX_KVM, *eight.words, *verb.split()]
        result = subprocess.run(words, env=environment, capture_output=True, check=False)
        assert (result.returncode, result.stderr) == (0, b"")
        closed = 'exec "$@" >&- 2>&-'
        assert subprocess.run(["sh", "-c", closed, "sh", *words], check=False).returncode == 0


def test_an_unexpected_error_is_a_sentence_unless_debug_is_given(
    eight: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr("dgx_kvm_sw.cli.declare.look", fail)
    result = eight("plan")
    assert result.code == ExitCode.FAILED
    assert "RecursionError: too deep\n  please report it" in result.err
    assert main([*eight.words, "--debug", "plan"]) == ExitCode.FAILED
    assert "Traceback" in capsys.readouterr().err


# -- speed and shape ----------------------------------------------------------------------------


@pytest.mark.commands
@pytest.mark.parametrize(
    ("command", "absent"),
    [
        ("--help", ["argparse", "re", "dataclasses", "yaml", "libvirt"]),
        ("topology", ["libvirt", "jinja2", "jsonschema"]),
        ("validate", ["libvirt", "jinja2", "jsonschema"]),
        ("apply", ["jinja2", "jsonschema", "difflib.SequenceMatcher", "ssl", "subprocess"]),
        ("plan", ["jinja2", "jsonschema"]),
    ],
)
def test_a_verb_loads_only_what_it_needs(command: str, absent: list[str], run: Host) -> None:
    rows = "".join(f"  - {{name: vm-{n}, gpus: 1}}\n" for n in range(16))
    run.declare(f"version: 1\nvms:\n{rows}")
    run("apply")
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from dgx_kvm_sw.cli import main;"
        " code = main(); print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    words = [] if command == "--help" else run.words
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-c", program, str(PROJECT), *words, command],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not set(absent) & set(done.stderr.split())


@pytest.mark.commands
def test_the_launcher_imports_nothing_from_where_it_is_called(tmp_path: Path) -> None:
    for name in ("argparse", "os", "dgx_kvm_sw", "re"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the wrong place')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for words in ([DGX_KVM, "plan", "--help"], [str(_link(tmp_path)), "--version"]):
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")


def _link(folder: Path) -> Path:
    link = folder / "dgx-kvm"
    link.symlink_to(DGX_KVM)
    return link
