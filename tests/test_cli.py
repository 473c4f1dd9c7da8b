"""The command line as its users meet it: verbs, exit codes, messages, on a simulated DGX-2."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commandline import DGX_KVM, PROJECT, Host

import dgx_kvm_sw
from dgx_kvm_sw.cli import arguments, kinds, main, overview, verbs
from dgx_kvm_sw.cli.version import version
from dgx_kvm_sw.host import simulate
from dgx_kvm_sw.model.errors import ExitCode, HostError
from dgx_kvm_sw.model.mode import Mode
from dgx_kvm_sw.model.spec import SIZES
from dgx_kvm_sw.reconcile import LOCK

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
    said = capsys.readouterr().out
    changelog = (PROJECT / "debian/changelog").read_text()
    assert changelog.startswith(f"dgx-kvm-sw ({said.removeprefix('dgx-kvm ').strip()}) ")
    assert not hasattr(dgx_kvm_sw, "__version__")


def test_version_of_what_is_installed_is_in_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(HostError, match="the version is not known"):
        version(tmp_path / "changelog")
    (tmp_path / "dgx_kvm_sw-7.8.9.dist-info").mkdir()
    (tmp_path / "dgx_kvm_sw-7.8.9.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: dgx-kvm-sw\nVersion: 7.8.9\n"
    )
    assert version(tmp_path / "changelog") == "7.8.9"
    (tmp_path / "changelog").write_text("another (1.0) unstable; urgency=low\n")
    assert version(tmp_path / "changelog") == "7.8.9"
    (tmp_path / "changelog").write_text("dgx-kvm-sw (0.2~rc1) unstable; urgency=low\n")
    assert version(tmp_path / "changelog") == "0.2~rc1"


def test_tables_of_the_command_line_agree_with_those_of_the_program() -> None:
    assert simulate.names() == verbs.PLATFORMS
    assert tuple(map(str, SIZES)) == kinds.SIZES
    assert tuple(map(str, Mode)) == verbs.MODES
    assert {int(code) for code in ExitCode} | {130} == {code for code, _ in overview.EXIT_CODES}


def test_every_exit_code_is_returned_by_something() -> None:
    sources = [file.read_text() for file in (PROJECT / "dgx_kvm_sw").rglob("*.py")]
    assert all(any(f"ExitCode.{code.name}" in text for text in sources) for code in ExitCode)


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
        ("stop", "NAME is missing", "--all"),
        ("stop vm-0 --all", "--all means every VM", "leave out the names"),
        ("mode kvn", "there is no mode 'kvn'", "did you mean kvm?"),
        ("mode kvm --json", "`mode kvm` has no --json", "dgx-kvm mode --json"),
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


@pytest.mark.parametrize(
    "words",
    [
        ["apply", ""],
        ["plan", "-o", ""],
        ["plan", "--file="],
        ["--root", "", "apply"],
        ["validate", ""],
        ["image", "import", "x", "--name", "x", "--sha256", "0", "--signature", "", "--keyring="],
    ],
)
def test_an_empty_name_is_not_taken_for_none(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """`apply "$PLAN"` without such a variable would apply the file, and not a plan."""
    assert main(words) == ExitCode.USAGE
    assert "'' is not a name" in capsys.readouterr().err


def test_a_name_with_a_newline_is_refused_on_one_line(run: Host) -> None:
    result = run("start", "a\nb")
    assert result.code == ExitCode.USAGE
    assert "'a\\nb' is not a VM name" in result.err


def test_options_may_stand_before_or_after_the_verb(run: Host) -> None:
    assert main(["validate", *run.words]) == 0
    assert main([*run.words[:2], "validate", *run.words[2:]]) == 0


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
        ("--help", ["argparse", "re", "dataclasses", "yaml", "libvirt", "importlib.metadata"]),
        ("topology", ["libvirt", "jinja2", "jsonschema"]),
        ("validate", ["libvirt", "jinja2", "jsonschema"]),
        ("apply", ["jinja2", "jsonschema", "difflib.SequenceMatcher", "ssl", "subprocess"]),
        ("plan", ["jinja2", "jsonschema", "importlib.metadata"]),
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
