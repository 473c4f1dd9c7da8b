"""What is printed depends on who reads it; documents are made from the argument tree."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import DGX_KVM, EIGHT, PROJECT, Host

sys.path.insert(0, str(PROJECT))

from dgx_kvm_sw.cli.output import View, counted, listed, view_of
from dgx_kvm_sw.cli.verbs import EVERYWHERE, VERBS
from dgx_kvm_sw.model.errors import Problem
from tools import documents


def test_words() -> None:
    assert [counted(n, "VM") for n in (0, 1, 2)] == ["0 VMs", "1 VM", "2 VMs"]
    assert counted(2, "NVSwitch", "NVSwitches") == "2 NVSwitches"
    assert listed("abc") == "a, b, c"
    assert listed("abcdefghij", most=3) == "a, b, c, and 7 more"


def test_paint_only_with_colours() -> None:
    assert View(80, True, True).paint("x", "red") == "\033[31mx\033[0m"
    assert View(80, False, True).paint("x", "red") == "x"


class _Terminal(io.StringIO):
    encoding = "UTF-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "no_color", "color"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, False, True),
        ({"TERM": "dumb"}, False, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(
    environment: dict[str, str], no_color: bool, color: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "TERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert view_of(_Terminal(), no_color).color is color
    assert view_of(io.StringIO(), no_color).color is False


def test_nobody_reads_a_closed_stream() -> None:
    assert view_of(None) == View(100, False, False)


@pytest.mark.parametrize(("columns", "width"), [("72", 72), ("0", 100), ("wide", 100), ("", 100)])
def test_width(columns: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert view_of(io.StringIO()).width == width


@pytest.mark.commands
def test_progress_is_one_line_on_a_terminal_and_gone_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = Host(tmp_path / "machine", capsys)
    host("validate")
    host.declare(EIGHT)
    master, slave = pty.openpty()
    result = subprocess.run(
        [DGX_KVM, *host.words, "apply"], stdout=subprocess.PIPE, stderr=slave, check=True
    )
    os.close(slave)
    said = os.read(master, 1 << 20).decode()
    assert "/32 start vm-" in said
    assert said.endswith("\r\033[K")
    assert "\n" not in said
    assert result.stdout.endswith(b"Done: 8 created, 8 started.\n")


@pytest.mark.parametrize(
    ("snippet", "columns", "carets"),
    [
        ("name: xyz", (7, 10), "      ^^^"),
        ("名前: xyz", (5, 8), "      ^^^"),
        ("name: 機械", (7, 9), "      ^^^^"),
        ("e\u0301: xyz", (5, 8), "   ^^^"),
        ("\tname: xyz", (8, 11), "\t      ^^^"),
        ("name:", (8, 8), "       ^"),
    ],
)
def test_carets_stand_below_what_they_mean(
    snippet: str, columns: tuple[int, int], carets: str
) -> None:
    problem = Problem("f", 1, columns[0], 1, columns[1], "", "is wrong", "", snippet)
    assert str(problem) == f"f:1:{columns[0]}: is wrong\n    {snippet}\n    {carets}"


# -- man pages and completion -------------------------------------------------------------------


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    assert documents.main([str(folder)]) == 0
    return folder


@pytest.mark.commands
@pytest.mark.parametrize("name", ["dgx-kvm.1", "vms.yaml.5"])
def test_man_pages_are_clean(name: str, build: Path) -> None:
    environment = {**os.environ, "MANWIDTH": "80", "LC_ALL": "C.UTF-8"}
    words = ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", str(build / name)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == ""
    subprocess.run(["lexgrog", build / name], capture_output=True, check=True)


def test_the_manual_has_every_verb_and_option(build: Path) -> None:
    text = (build / "dgx-kvm.1").read_text().replace("\\-", "-")
    assert all(f"\n.SS dgx-kvm {verb.name}" in text for verb in VERBS)
    assert "\n.SS dgx-kvm image import [OPTION]... FILE --name NAME --sha256 HEX\n" in text
    assert all(f"\\fB{name}\\fR" in text for names, _, _ in EVERYWHERE for name in names)
    assert all(f"\n\\fB{code}\\fR\n" in text for code in (0, 1, 2, 64, 65, 75, 130))


def test_the_example_in_vms_yaml_5_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = Host(tmp_path / "machine", capsys)
    file = tmp_path / "vms.yaml"
    file.write_text(documents.EXAMPLE_FILE)
    assert host(f"validate {file}").out == "3 VMs, no mistakes\n"
    assert host(f"-f {file} plan").last == "Plan: 3 to create, 0 to change, 0 to delete."


@pytest.mark.commands
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("dgx-kvm pl", "plan"),
        ("dgx-kvm -f x.yaml va", "validate"),
        ("dgx-kvm --simulate dgx-h1", "dgx-h100"),
        ("dgx-kvm apply --del", "--delete-disks"),
        ("dgx-kvm stop vm-3", "vm-3"),
        ("dgx-kvm create vm", ""),
        ("dgx-kvm mode ba", "bare-metal"),
        ("dgx-kvm mode --ch", "--check"),
        ("dgx-kvm plan --connect q", ""),
        ("dgx-kvm ima", "image"),
        ("dgx-kvm image ver", "verify"),
        ("dgx-kvm image import --sh", "--sha256"),
    ],
)
def test_completion(
    line: str, offered: str, build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = Host(tmp_path / "machine", capsys)
    host("validate")
    host.declare(EIGHT)
    script = (
        "compopt() { :; }; source $1; shift; COMP_WORDS=($@); COMP_CWORD=$(($# - 1));"
        ' _dgx_kvm; echo "${COMPREPLY[*]}"'
    )
    words = line.split()
    if "vm-3" in words:
        words[1:1] = host.words
    bash = ["bash", "-euc", script, "bash", str(build / "bash-completion/dgx-kvm"), *words]
    done = subprocess.run(bash, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == (offered, "")
