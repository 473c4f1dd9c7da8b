"""Text that is YAML, or is not, and where in it a problem is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from specfiles import MAIN, Host, marked

from dgx_kvm_sw.guest.yamlsource import parse
from dgx_kvm_sw.model.errors import Problem


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


# What a problem looks like


def test_a_problem_points_at_the_value(host: Host) -> None:
    problem = host.problem("version: 1\nvms:\n  - name: a\n    gpus: 3  # odd\n")
    assert problem == Problem(
        MAIN, 4, 11, 4, 12, "vms[0].gpus", "3 is not one of 0, 1, 2, 4, 8, 16", "",
        "    gpus: 3  # odd",
    )  # fmt: skip
    assert str(problem).splitlines() == [
        f"{MAIN}:4:11: vms[0].gpus: 3 is not one of 0, 1, 2, 4, 8, 16",
        "        gpus: 3  # odd",
        "              ^",
    ]


def test_columns_count_characters(host: Host) -> None:
    _, second = host.problems("version: 1\ntenants: {é🐧: {}, hr: {max_gpus: ä}}\n")
    assert (second.column, marked(second)) == (34, "ä")


def test_an_unknown_key_is_marked_itself(host: Host) -> None:
    problem = host.vm_problem("gpus: 0, imgae: debian-12")
    assert (problem.path, marked(problem)) == ("vms[0].imgae", "imgae")
    assert (problem.message, problem.hint) == ("is not a known key", "did you mean `image`?")


def test_a_missing_key_is_marked_at_its_vm(host: Host) -> None:
    name, gpus = host.problems("version: 1\nvms:\n  - state: stopped\n    memory: 1GiB\n")
    assert (name.message, gpus.message) == ("`name` is missing", "`gpus` is missing")
    assert (gpus.path, marked(gpus)) == ("vms[0]", "state: stopped")


def test_a_key_without_value_is_marked_at_the_key(host: Host) -> None:
    problem = host.problem("version: 1\nvms:\n- name: a\n  gpus: 0\n  image:\n")
    assert (problem.message, marked(problem)) == ("has no value", "image")


@pytest.mark.parametrize(
    "text",
    [
        "ssh_keys:\n-----BEGIN PRIVATE KEY-----\nSECRET\n-----END PRIVATE KEY-----\n",
        "key: |\n  -----BEGIN RSA PRIVATE KEY-----\nSECRET\n",
        "password SECRET\n",
        "- {name: a, hashed_passwd: SECRET\n",
        "chpasswd:\n  list: |\n\tSECRET\n",
        "- api-token:\n    x: y: SECRET\n",
        "'private key' : SECRET: x\n",
        "defaults: {client_secret: SECRET}\n",
    ],
)
def test_a_line_that_may_hold_a_secret_is_not_repeated(host: Host, text: str) -> None:
    said = "\n".join(map(str, host.problems(f"version: 1\n{text}")))
    assert "SECRET" not in said
    assert said.endswith("\n    (line not shown, it may hold a secret)")


@pytest.mark.parametrize(
    "text",
    [
        "vms:\n- name: secret-lab\n  gpus: x: y",
        "vms:\n- {name: secret, gpus: x: y}",
        "vms:\n- password: x\n  gpus: x: y",
        "# -----BEGIN x-----\n# -----END x-----\nx: y: z",
    ],
)
def test_other_lines_are(host: Host, text: str) -> None:
    assert host.problem(f"version: 1\n{text}\n").snippet == text.rpartition("\n")[2]


def test_a_very_long_line_is_not_repeated(host: Host) -> None:
    assert host.problem("version: 1\nvmz: " + "x" * 300).snippet == ""


def test_a_key_given_twice_is_refused(host: Host) -> None:
    problem = host.problem("version: 1\nvms:\n- name: a\n  gpus: 0\n  gpus: 0\n")
    assert (problem.line, marked(problem)) == (5, "gpus")
    assert problem.message == "is given twice; the first is in line 4"


@pytest.mark.parametrize("wrong", [r'"a\n"', r'"a\e[31m"', r'"\u202ea"', "a\u00a0b", r'"a\tb"'])
def test_characters_that_cannot_be_seen_are_refused_and_not_printed(host: Host, wrong: str) -> None:
    problems = host.problems(f"version: 1\nvms: [{{name: {wrong}, gpus: 0}}]\n")
    assert "which cannot be seen" in problems[0].message
    assert all(line.isprintable() for each in problems for line in str(each).splitlines())


# Text that is no YAML of ours


@pytest.mark.parametrize("loader", [yaml.CSafeLoader, yaml.SafeLoader])
@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("a:\n\tb: 1\n", (2, 1), "this is a tab"),
        ("a:\n  - b\n \t- c\n", (3, 2), "this is a tab"),
        ("a: b: c\n", (1, 5), "a `key: value` cannot stand here"),
        ("a: 1\n b: 2\n", (2, 3), "a `key: value` cannot stand here"),
        ("a: [1, 2\nb: 3\n", (1, 4), "this list is not closed with ], or lacks a comma"),
        ("a: {b: 1\nc: }\n", (1, 4), "this mapping is not closed with }, or lacks a comma"),
        ("a: [1,\n", (2, 1), "a value is missing here"),
        ("a: 'x\nb: 1\n", (1, 4), "this quote is never closed"),
        ("a:\n  b: 1\n c: 2\n", (3, 2), "the indentation does not fit the lines above"),
        ("a: 1\nb\nc: 2\n", (2, 1), "this is no `key: value`; the colon is missing"),
        ("a: @x\n", (1, 4), "a value cannot start with this character"),
        ("a: &x 1\n", (1, 4), "YAML anchors (&) and aliases (*) are not used here"),
        ("a: *x\n", (1, 4), "YAML anchors (&) and aliases (*) are not used here"),
        ("a: !!python/object/apply:os.system [x]\n", (1, 4), "YAML tags (!) are not used here"),
        ("a: 1\n---\nb: 2\n", (2, 1), "a second document starts here"),
        ("[a]: 1\n", (1, 1), "a key must be a word, not a list or a mapping"),
        ("? {a: b}\n: 1\n", (1, 3), "a key must be a word, not a list or a mapping"),
        ("[" * 10000, (1, 17), "this is nested more than 16 levels deep"),
        ("- " * 10000, (1, 33), "this is nested more than 16 levels deep"),
    ],
)
def test_a_syntax_error_is_told_in_plain_words(
    text: str, place: tuple[int, int], message: str, loader: Any
) -> None:
    document = parse("x", text.encode(), loader)
    (problem,) = document.problems
    assert (problem.line, problem.column, problem.message) == (*place, message)
    assert not document.complete


def test_an_unknown_escape_is_told(host: Host) -> None:
    problem = host.problem('version: "\\d"')
    assert problem.message == "unknown escape after \\ in double quotes"


@pytest.mark.parametrize(
    ("data", "place", "message"),
    [
        (b"", (0, 0), "is empty; it needs at least `version: 1`"),
        (b"# nothing\n---\n", (0, 0), "is empty; it needs at least `version: 1`"),
        (b"version: 1\n# caf\xe9\n", (2, 6), "byte 0xe9 is not UTF-8"),
        ("version: 1".encode("utf-16"), (1, 1), "byte 0xff is not UTF-8"),
        (b"version: 1\n\0", (2, 1), "the character U+0000 cannot stand in a text file"),
        (b"version: 1 # \x1b[31m\n", (1, 14), "the character U+001B cannot stand in a text file"),
        (b"#" * (1 << 20) + b"\n", (0, 0), "is larger than 1 MiB"),
    ],
)
def test_a_file_that_is_no_text_is_told(
    host: Host, data: bytes, place: tuple[int, int], message: str
) -> None:
    problem = host.problem(data)
    assert (problem.line, problem.column, problem.message) == (*place, message)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(host: Host) -> None:
    (vm,) = host.load(b"\xef\xbb\xbfversion: 1\r\nvms:\r\n- {name: a, gpus: 0}\r\n").vms
    assert vm.source.line == 3


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghijklmno", "bcdefghijklmnop", strict=False)
)


@pytest.mark.parametrize(
    "text",
    [BOMB, "[" * 1000000, "{a: " * 200000, "- " * 400000, "? " * 400000, '"' + "\\n" * 400000],
)
def test_a_bomb_costs_nothing(host: Host, text: str) -> None:
    started = time.process_time()
    assert len(host.problems(text)) == 1
    assert time.process_time() - started < 1
