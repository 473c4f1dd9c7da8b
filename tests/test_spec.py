"""vms.yaml: what it may say, what it means, and what is said about a mistake in it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from dgx_kvm_sw.access.files import Root, template_path
from dgx_kvm_sw.guest import spec
from dgx_kvm_sw.guest.problems import problems_json
from dgx_kvm_sw.guest.schema import schema_text
from dgx_kvm_sw.guest.yamlsource import parse
from dgx_kvm_sw.model.errors import BadFileError, HostError, Problem
from dgx_kvm_sw.model.spec import (
    SIZES,
    Disk,
    Firmware,
    HostShare,
    HostSpec,
    Hugepages,
    Network,
    NetworkKind,
    PowerState,
    Share,
    SourceLine,
    Tenant,
    VmSpec,
)

MAIN = "/etc/dgx-kvm/vms.yaml"
SOURCE_TREE = Path(__file__).parents[1]


class Host:
    """A root folder with the files of an admin in it."""

    def __init__(self, directory: Path) -> None:
        self.root = Root(directory)
        self.images: Collection[str] | None = None
        self.write("vms.yaml", "version: 1\n")

    def write(self, name: str, text: str | bytes) -> None:
        path = self.root.path(f"/etc/dgx-kvm/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    def load(self, text: str | bytes | None = None, validated: str = "") -> HostSpec:
        if text is not None:
            self.write("vms.yaml", text)
        return spec.load(self.root, MAIN, self.images, validated)

    def vm(self, keys: str) -> VmSpec:
        """Load a file with one VM, given as the inside of a YAML flow mapping."""
        (vm,) = self.load(f"version: 1\nvms: [{{name: a, {keys}}}]\n").vms
        return vm

    def problems(self, text: str | bytes | None = None) -> tuple[Problem, ...]:
        with pytest.raises(BadFileError) as caught:
            self.load(text)
        return caught.value.problems

    def problem(self, text: str | bytes | None = None) -> Problem:
        (problem,) = self.problems(text)
        return problem

    def vm_problem(self, keys: str) -> Problem:
        """Return the only problem of a file with one VM, given as in `vm`."""
        return self.problem(f"version: 1\nvms:\n- {{name: a, {keys}}}\n")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def marked(problem: Problem) -> str:
    """Return the part of the source line that a one-line problem points at."""
    assert problem.line == problem.end_line
    return problem.snippet[problem.column - 1 : problem.end_column - 1]


# What the files mean


@pytest.mark.parametrize("vms", ["", "vms:\n", "vms: null\n", "vms: []\n"])
def test_a_file_may_have_no_vms(host: Host, vms: str) -> None:
    assert host.load(f"version: 1\n{vms}").vms == ()


def test_a_vm_needs_only_a_name_and_a_number_of_gpus(host: Host) -> None:
    vm = host.vm("gpus: 2")
    assert (vm.name, vm.gpus, vm.tenant, vm.pin, vm.image) == ("a", 2, "", (), "")
    assert (vm.disks, vm.networks, vm.template) == ((), (), "domain.xml.j2")
    assert (vm.state, vm.firmware) == (PowerState.RUNNING, Firmware.UEFI)
    assert vm.source == SourceLine(MAIN, 2)


def test_a_vm_may_say_everything(host: Host) -> None:
    host.images = ["debian-12"]
    (vm,) = host.load("""
version: 1
tenants: {hr: {max_gpus: 4, max_vms: 3}}
vms:
  - name: hr-train
    tenant: hr
    gpus: 2
    pin: [8, 0000:34:00.0]
    vcpus: 20
    memory: 160GiB
    nics: 1
    drives: 50%
    nvswitches: false
    hugepages: 2MiB
    image: debian-12
    firmware: bios
    os_disk: 1.5TiB
    disks: [{name: data, size: 500 GiB}]
    networks: [{bridge: br0}, {network: default}, {macvtap: eno1}]
    max_queues: 6
    iothreads: 3
    template: site.xml.j2
    state: stopped
""").vms
    assert (vm.name, vm.tenant, vm.gpus, vm.source.line) == ("hr-train", "hr", 2, 5)
    assert vm.pin == ("8", "0000:34:00.0")
    assert (vm.image, vm.firmware, vm.template) == ("debian-12", Firmware.BIOS, "site.xml.j2")
    assert vm.state is PowerState.STOPPED
    assert vm.disks == (Disk("data", 500 * 1024),)
    assert vm.networks == (
        Network(NetworkKind.BRIDGE, "br0"),
        Network(NetworkKind.NETWORK, "default"),
        Network(NetworkKind.MACVTAP, "eno1"),
    )
    gets = vm.resources
    assert (gets.cpus, gets.memory, gets.nics, gets.drives) == (20, 160 * 1024, 1, Share(0.5))
    assert (gets.nvswitches, gets.hugepages, gets.max_queues) == (False, Hugepages.MIB2, 6)
    assert (gets.iothreads, gets.os_disk_mib) == (3, 1536 * 1024)


def test_a_size_template_gives_what_a_vm_does_not_say(host: Host) -> None:
    shipped = (SOURCE_TREE / "etc/dgx-kvm/templates/2-gpu.yaml").read_text()
    host.write("templates/2-gpu.yaml", shipped.replace("cpus: 100%", "cpus: 12"))
    assert host.vm("gpus: 2").resources.cpus == 12
    assert host.vm("gpus: 2, vcpus: 8").resources.cpus == 8


def test_defaults_stand_between_size_template_and_vm(host: Host) -> None:
    text = "version: 1\ndefaults: {memory: 50%, iothreads: 7}\nvms:\n"
    a, b = host.load(text + "- {name: a, gpus: 1}\n- {name: b, gpus: 1, memory: 8GiB}\n").vms
    assert (a.resources.memory, a.resources.iothreads) == (Share(0.5), 7)
    assert (b.resources.memory, b.resources.iothreads) == (8192, 7)


def test_defaults_hold_for_drop_ins_too(host: Host) -> None:
    host.write("vms.d/b.yaml", "vms: [{name: b, gpus: 0}]")
    (vm,) = host.load("version: 1\ndefaults: {state: stopped}").vms
    assert vm.state is PowerState.STOPPED


@pytest.mark.parametrize(
    ("size", "mib"),
    [
        ("1024KiB", 1),
        ("1025KiB", 2),
        ("3MiB", 3),
        ("2GiB", 2048),
        ("0.5GiB", 512),
        ("1TiB", 1 << 20),
    ],
)
def test_sizes_are_read_in_mib_and_never_rounded_down(host: Host, size: str, mib: int) -> None:
    assert host.vm(f"gpus: 0, memory: {size}").resources.memory == mib


def test_the_host_keeps_a_share_by_default(host: Host) -> None:
    loaded = host.load()
    assert loaded.reserve == HostShare(Share(0.04), Share(0.06))
    assert loaded.cpu_pool == HostShare(Share(0.04), Share(0.04))


def test_the_host_may_keep_numbers_instead(host: Host) -> None:
    loaded = host.load("version: 1\nhost: {reserve: {cpus: 4, memory: 92GiB}, cpu_pool: {cpus: 0}}")
    assert loaded.reserve == HostShare(4, 92 * 1024)
    assert loaded.cpu_pool == HostShare(0, Share(0.04))


def test_tenants_may_have_limits(host: Host) -> None:
    loaded = host.load("version: 1\ntenants:\n  hr: {max_gpus: 4, max_vms: 3}\n  it:\n")
    assert loaded.tenants == (
        Tenant("hr", 4, 3, SourceLine(MAIN, 3)),
        Tenant("it", None, None, SourceLine(MAIN, 4)),
    )


def test_drop_ins_follow_the_main_file_in_name_order(host: Host) -> None:
    host.write("vms.d/20.yaml", "vms: [{name: c, gpus: 0, tenant: it}]")
    host.write("vms.d/10.yaml", "version: 1\nvms: [{name: b, gpus: 0}]\ntenants: {it: {}}")
    host.write("vms.d/notes.txt", "not read")
    host.write("vms.d/.#10.yaml", "an editor's")
    loaded = host.load("version: 1\nvms: [{name: a, gpus: 0}]")
    assert [vm.name for vm in loaded.vms] == ["a", "b", "c"]
    assert loaded.files == (MAIN, "/etc/dgx-kvm/vms.d/10.yaml", "/etc/dgx-kvm/vms.d/20.yaml")
    assert str(loaded.vms[2].source) == "/etc/dgx-kvm/vms.d/20.yaml:1"


def test_another_file_brings_its_own_drop_ins(host: Host, tmp_path: Path) -> None:
    (tmp_path / "try/vms.d").mkdir(parents=True)
    (tmp_path / "try/new.yaml").write_text("version: 1\nvms: [{name: x, gpus: 0}]")
    (tmp_path / "try/vms.d/y.yaml").write_text("vms: [{name: y, gpus: 0}]")
    loaded = spec.load(Root("/"), str(tmp_path / "try/new.yaml"))
    assert [vm.name for vm in loaded.vms] == ["x", "y"]


@pytest.mark.parametrize(
    ("word", "text"),
    [("no", "no"), ("on", "on"), ("010", "010"), ("1e3", "1e3"), ("0x10", "0x10"), ('"1"', "1")],
)
def test_words_that_yaml_1_1_would_change_stay_as_written(host: Host, word: str, text: str) -> None:
    (vm,) = host.load(f"version: 1\nvms: [{{name: {word}, gpus: 0}}]").vms
    assert vm.name == text


def test_an_image_version_is_no_fraction(host: Host) -> None:
    assert host.vm("gpus: 0, image: 22.10").image == "22.10"


# What ships with the package


def test_the_shipped_files_are_right(host: Host) -> None:
    assert host.load((SOURCE_TREE / "etc/dgx-kvm/vms.yaml").read_text()).vms == ()


def test_the_examples_in_the_shipped_file_are_right(host: Host) -> None:
    comments = (SOURCE_TREE / "etc/dgx-kvm/vms.yaml").read_text().partition("vms: []")[2]
    examples = re.sub(r"(?m)^# (?=(vms|defaults|tenants|host):$|  )", "", comments)
    loaded = host.load("version: 1\n" + examples)
    assert [vm.name for vm in loaded.vms] == ["first", "hr-train", "fixed", "build"]
    assert [tenant.name for tenant in loaded.tenants] == ["hr", "it"]
    assert loaded.reserve == HostShare(Share(0.04), Share(0.06))


@pytest.mark.parametrize("size", [size for size in SIZES if size])
def test_a_gpu_vm_gets_its_whole_part_of_the_machine(host: Host, size: int) -> None:
    gets = host.vm(f"gpus: {size}").resources
    assert (gets.cpus, gets.memory, gets.nics, gets.drives) == (Share(1.0),) * 4
    assert (gets.nvswitches, gets.hugepages, gets.os_disk_mib) == (True, Hugepages.AUTO, 50 * 1024)
    assert gets.iothreads == {1: 1, 2: 1, 4: 2, 8: 2, 16: 4}[size]
    assert 8 <= gets.max_queues <= 32


def test_a_vm_without_gpus_gets_a_little_and_no_devices(host: Host) -> None:
    gets = host.vm("gpus: 0").resources
    assert (gets.cpus, gets.memory, gets.nics, gets.drives) == (2, 4096, 0, 0)
    assert (gets.nvswitches, gets.hugepages, gets.max_queues) == (False, Hugepages.NONE, 4)
    assert (gets.iothreads, gets.os_disk_mib) == (1, 20 * 1024)


def test_the_admins_template_wins_over_the_packaged_one(tmp_path: Path) -> None:
    root = Root(tmp_path)
    assert template_path(root, "1-gpu.yaml") == SOURCE_TREE / "etc/dgx-kvm/templates/1-gpu.yaml"
    for folder in ("/usr/share/dgx-kvm/templates", "/etc/dgx-kvm/templates"):
        root.write(f"{folder}/1-gpu.yaml", "")
        assert template_path(root, "1-gpu.yaml") == root.path(f"{folder}/1-gpu.yaml")
    with pytest.raises(HostError, match="nothing.j2"):
        template_path(root, "nothing.j2")


def schema_nodes(node: Any) -> list[dict[str, Any]]:
    """Return every object in a schema."""
    if isinstance(node, list):
        return [found for item in node for found in schema_nodes(item)]
    if not isinstance(node, dict):
        return []
    return [node, *(found for item in node.values() for found in schema_nodes(item))]


@pytest.mark.parametrize("name", ["vms", "size"])
def test_schemas_are_draft_07_and_describe_every_key(name: str) -> None:
    schema = json.loads(schema_text(name))
    Draft7Validator.check_schema(schema)
    keys = [key for node in schema_nodes(schema) for key in node.get("properties", {}).items()]
    assert len(keys) >= 9
    assert [key for key, rules in keys if not rules.get("description", "").endswith(".")] == []


def test_both_schemas_mean_the_same_by_the_same_word() -> None:
    vms, size = (json.loads(schema_text(name))["definitions"] for name in ("vms", "size"))
    assert size == {name: vms[name] for name in size}


def test_the_schema_documents_the_defaults_that_hold(host: Host) -> None:
    schema = json.loads(schema_text("vms"))
    vm = host.vm("gpus: 0")
    keys = schema["definitions"]["vm"]["properties"]
    for key in ("firmware", "template", "state"):
        assert keys[key]["default"] == getattr(vm, key)
    loaded = host.load()
    for name, parts in schema["properties"]["host"]["properties"].items():
        for key, rules in parts["properties"].items():
            assert rules["default"] == str(getattr(getattr(loaded, name), key))


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


def test_all_problems_of_all_files_are_told_in_file_order(host: Host) -> None:
    host.write("templates/0-gpu.yaml", "cpus: none\n")
    host.write("vms.d/a.yaml", "vms:\n- {name: a, gpus: 5}\n- {name: b, gpus: 0, tenant: hr}\n")
    host.write("vms.d/b.yaml", "vms: [\n")
    found = host.problems("version: 2\nvms:\n- {gpus: 0, pin: [1], nics: 65}\n")
    assert [(problem.file.rpartition("/")[2], problem.line) for problem in found] == [
        ("vms.yaml", 1),
        ("vms.yaml", 3),
        ("vms.yaml", 3),
        ("a.yaml", 2),
        ("b.yaml", 2),
        *[("0-gpu.yaml", 1)] * 9,
    ]


def test_what_is_only_a_consequence_of_an_unreadable_file_is_not_told(host: Host) -> None:
    host.write("vms.d/a.yaml", "vms: [{name: a, gpus: 0, tenant: hr}]")
    assert "not closed" in host.problem("version: 1\ntenants: {hr: {}\n").message


def test_a_problem_in_a_size_template_names_that_file(host: Host) -> None:
    shipped = (SOURCE_TREE / "etc/dgx-kvm/templates/1-gpu.yaml").read_text()
    host.write("templates/1-gpu.yaml", shipped.replace("memory: 100%", "memory: lots"))
    problem = host.vm_problem("gpus: 1")
    assert (problem.file, marked(problem)) == ("/etc/dgx-kvm/templates/1-gpu.yaml", "lots")
    assert host.vm("gpus: 2")  # a template that nobody uses is not read


def test_problems_as_json_have_terraforms_keys(host: Host) -> None:
    (problem,) = problems_json(host.problems("version: 1\nvmz: []\n"))
    assert problem == {
        "severity": "error",
        "summary": "is not a known key",
        "detail": "did you mean `vms`?",
        "file": MAIN,
        "path": "vmz",
        "range": {"start": {"line": 2, "column": 1}, "end": {"line": 2, "column": 4}},
        "snippet": "vmz: []",
    }
    (whole_file,) = problems_json(host.problems(""))
    assert whole_file["range"] is None
    assert json.dumps(whole_file)


def test_a_very_long_line_is_not_repeated(host: Host) -> None:
    assert host.problem("version: 1\nvmz: " + "x" * 300).snippet == ""


# Values


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        ("gpus: 32", "32 is not one of 0, 1, 2, 4, 8, 16", ""),
        ("gpus: -1", "-1 is not one of 0, 1, 2, 4, 8, 16", ""),
        ("gpus: yes", "'yes' is not one of 0, 1, 2, 4, 8, 16", ""),
        ("gpus: true", "true is not one of 0, 1, 2, 4, 8, 16", ""),
        ("gpus: '2'", "'2' is not one of 0, 1, 2, 4, 8, 16", "write 2 without quotes"),
        ("gpus: [2]", "a list is not one of 0, 1, 2, 4, 8, 16", ""),
        ("gpus: 2.0", "'2.0' is not one of 0, 1, 2, 4, 8, 16", ""),
        ("gpus: 02", "'02' is not one of 0, 1, 2, 4, 8, 16", ""),
        (f"gpus: {'9' * 99999}", "a number this large is not one of 0, 1, 2, 4, 8, 16", ""),
        ("gpus: 0, memory: 160", "160 is not a size like 160GiB", "did you mean `160GiB`?"),
        ("gpus: 0, memory: 160GB", "'160GB' is not a size like 160GiB", "did you mean `160GiB`?"),
        ("gpus: 0, memory: 2t", "'2t' is not a size like 160GiB", "did you mean `2TiB`?"),
        ("gpus: 0, memory: 1e30", "'1e30' is not a size like 160GiB", ""),
        ("gpus: 0, memory: 0GiB", "'0GiB' is not a size like 160GiB", ""),
        ("gpus: 0, memory: 0.0 GiB", "'0.0 GiB' is not a size like 160GiB", ""),
        ("gpus: 0, memory: -1GiB", "'-1GiB' is not a size like 160GiB", ""),
        ("gpus: 0, os_disk: 50", "50 is not a size like 160GiB", "did you mean `50GiB`?"),
        ("gpus: 0, os_disk: 50%", "'50%' is not a size like 160GiB", ""),
        ("gpus: 1, memory: 101%", "'101%' is not a size like 160GiB or a share", ""),
        ("gpus: 1, memory: 0%", "'0%' is not a size like 160GiB or a share", ""),
        ("gpus: 0, vcpus: 0", "0 is not a whole number of CPU threads, 1 to 4096", ""),
        ("gpus: 0, vcpus: 5000", "5000 is not a whole number of CPU threads, 1 to 4096", ""),
        ("gpus: 0, vcpus: '4'", "'4' is not a whole number of CPU", "write 4 without quotes"),
        ("gpus: 0, nics: -1", "-1 is not a whole number of devices, 0 to 64", ""),
        ("gpus: 0, drives: 65", "65 is not a whole number of devices, 0 to 64", ""),
        ("gpus: 0, nvswitches: yes", "'yes' is not true or false", "write true"),
        ("gpus: 0, nvswitches: Off", "'Off' is not true or false", "write false"),
        ("gpus: 0, nvswitches: 1", "1 is not true or false", ""),
        ("gpus: 0, hugepages: 1Gib", "'1Gib' is not one of auto,", "did you mean `1GiB`?"),
        ("gpus: 0, hugepages: 1", "1 is not one of auto, 1GiB, 2MiB, none", ""),
        ("gpus: 0, firmware: efi", "'efi' is not one of uefi, bios", "did you mean `uefi`?"),
        ("gpus: 0, state: Running", "'Running' is not one of", "did you mean `running`?"),
        ("gpus: 0, state: paused", "'paused' is not one of running, stopped", ""),
        ("gpus: 0, image: ../x", "'../x' is not the name of an image", ""),
        ("gpus: 0, image: 12", "12 is not the name of an image", 'put it in quotes: "12"'),
        ("gpus: 0, template: x.j2", "'x.j2' is not the name of a template file", ""),
        ("gpus: 0, template: a/b.xml.j2", "'a/b.xml.j2' is not the name of a template", ""),
        ("gpus: 0, max_queues: 0", "0 is not a whole number from 1 to 256", ""),
        ("gpus: 0, iothreads: 65", "65 is not a whole number from 0 to 64", ""),
        ("gpus: 1, pin: 8", "8 is not a list of GPUs", "put it in brackets"),
        ("gpus: 1, pin: [GPU8]", "'GPU8' is not a GPU index like 8 or a PCI address", ""),
        ("gpus: 0, disks: [{name: d}]", "`size` is missing", ""),
        ("gpus: 0, disks: [{name: a b, size: 1GiB}]", "'a b' is not a disk name", ""),
        ("gpus: 0, disks: [{name: os, size: 1GiB}]", "'os' is not a disk name", ""),
        ("gpus: 0, disks: [{name: d, size: 5}]", "5 is not a size", "did you mean `5GiB`?"),
        ("gpus: 0, networks: [br0]", "'br0' is not a network with exactly one of", ""),
        ("gpus: 0, networks: [{}]", "a mapping is not a network with exactly one of", ""),
        ("gpus: 0, networks: [{bridge: a, macvtap: b}]", "a mapping is not a network with", ""),
        ("gpus: 0, networks: [{bridg: a}]", "is not a known key", "did you mean `bridge`?"),
        ("gpus: 0, networks: [{bridge: a/b}]", "'a/b' is not the name of a network inter", ""),
        ("gpus: 0, networks: [{bridge: far-too-long-name}]", "'far-too-long-name' is not", ""),
    ],
)  # fmt: skip
def test_a_wrong_value_is_explained(host: Host, keys: str, message: str, hint: str) -> None:
    problem = host.vm_problem(keys)
    assert problem.message.startswith(message)
    assert hint in problem.hint
    assert bool(hint) == bool(problem.hint)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("HR", "'HR'"),
        ("a/b", "'a/b'"),
        ("-a", "'-a'"),
        ("a-", "'a-'"),
        ("a.b", "'a.b'"),
        ("é", "'é'"),
        ("''", "''"),
        ("x" * 300, "'" + "x" * 37 + "...'"),
        ("x" * 64, "'" + "x" * 37 + "...'"),
        ("true", "true"),
        ("12", "12"),
        ("[a]", "a list"),
    ],
)
def test_a_wrong_name_is_shown_safely(host: Host, name: str, shown: str) -> None:
    problem = host.problem(f"version: 1\nvms: [{{name: {name}, gpus: 0}}]\n")
    assert problem.message.startswith(f"{shown} is not a name of small letters, digits and hyphens")


def test_the_longest_name_is_a_host_name(host: Host) -> None:
    assert host.load(f"version: 1\nvms: [{{name: {'x' * 63}, gpus: 0}}]\n").vms


@pytest.mark.parametrize("wrong", [r'"a\n"', r'"a\e[31m"', r'"\u202ea"', "a\u00a0b", r'"a\tb"'])
def test_characters_that_cannot_be_seen_are_refused_and_not_printed(host: Host, wrong: str) -> None:
    problems = host.problems(f"version: 1\nvms: [{{name: {wrong}, gpus: 0}}]\n")
    assert "which cannot be seen" in problems[0].message
    assert all(line.isprintable() for each in problems for line in str(each).splitlines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 2", "2 is not a version this program knows; it knows 1"),
        ("version: '1'", "'1' is not a version this program knows; it knows 1"),
        ("version: true", "true is not a version this program knows; it knows 1"),
        ("vms: []", "`version` is missing"),
        ("5", "5 is not a mapping that starts with `version: 1`"),
        ("- version: 1", "a list is not a mapping that starts with `version: 1`"),
        ("version: 1\nvms: {a: {gpus: 1}}", "a mapping is not a list of VMs"),
        ("version: 1\nvms: [5]", "5 is not a mapping of the keys of a VM, like gpus: 2"),
        ("version: 1\nvms:\n- \n", "has no value"),
        ("version: 1\ntenants: [hr]", "a list is not a mapping"),
        ("version: 1\ntenants: {HR: {}}", "'HR' is not a name of small letters"),
        ("version: 1\ntenants: {hr: 4}", "4 is not a mapping"),
        ("version: 1\ntenants: {hr: {max_gpus: -1}}", "-1 is not a whole number from 0 to 1000"),
        ("version: 1\ntenants: {hr: {gpus: 1}}", "is not a known key"),
        ("version: 1\nhost: {reserve: {cpus: 0}}", "0 is not a whole number of CPU threads, 1 to"),
        ("version: 1\nhost: {reserve: {memory: 4}}", "4 is not a size like 160GiB or a share"),
        ("version: 1\nhost: {resrve: {}}", "is not a known key"),
        ("version: 1\ndefaults: {name: a}", "'name' is not a key that all VMs can share"),
        ("version: 1\ndefaults: {gpus: 1}", "'gpus' is not a key that all VMs can share"),
        ("version: 1\ndefaults: {pin: [1]}", "'pin' is not a key that all VMs can share"),
        ("version: 1\ndefaults: {memry: 1GiB}", "is not a known key"),
    ],
)
def test_a_wrong_section_is_explained(host: Host, text: str, message: str) -> None:
    assert host.problem(text).message.startswith(message)


@pytest.mark.parametrize("key", ["ssh_keys", "user_data", "on_fault"])
def test_keys_of_later_versions_are_not_accepted_in_silence(host: Host, key: str) -> None:
    assert host.vm_problem(f"gpus: 0, {key}: x").message == "is not a known key"


def test_host_and_defaults_belong_in_the_main_file(host: Host) -> None:
    host.write("vms.d/a.yaml", "defaults: {state: stopped}\nhost: {}\n")
    found = host.problems()
    assert [(problem.path, problem.message) for problem in found] == [
        ("defaults", "holds for the whole host"),
        ("host", "holds for the whole host"),
    ]
    assert MAIN in found[0].hint


# Between the parts


def test_a_key_given_twice_is_refused(host: Host) -> None:
    problem = host.problem("version: 1\nvms:\n- name: a\n  gpus: 0\n  gpus: 0\n")
    assert (problem.line, marked(problem)) == (5, "gpus")
    assert problem.message == "is given twice; the first is in line 4"


def test_a_name_given_twice_names_the_other_place(host: Host) -> None:
    host.write("vms.d/b.yaml", "vms:\n- {name: a, gpus: 0}\n")
    here, there = host.problems("version: 1\nvms:\n- {name: a, gpus: 0}\n- {name: a, gpus: 0}\n")
    assert here.message == there.message == f"'a' is already declared at {MAIN}:3"
    assert (here.line, there.file) == (4, "/etc/dgx-kvm/vms.d/b.yaml")


def test_a_tenant_given_twice_names_the_other_place(host: Host) -> None:
    host.write("vms.d/b.yaml", "tenants: {hr: {max_gpus: 16}}")
    problem = host.problem("version: 1\ntenants:\n  hr: {max_gpus: 1}\n")
    assert (problem.file, marked(problem)) == ("/etc/dgx-kvm/vms.d/b.yaml", "hr")
    assert problem.message == f"is already declared at {MAIN}:3"


@pytest.mark.parametrize(
    ("tenant", "hint"), [("hrr", "did you mean `hr`?"), ("zzz", "known tenants: hr, it")]
)
def test_an_unknown_tenant_is_told(host: Host, tenant: str, hint: str) -> None:
    vm = f"vms: [{{name: a, gpus: 0, tenant: {tenant}}}]"
    problem = host.problem(f"version: 1\ntenants: {{hr: {{}}, it: {{}}}}\n{vm}\n")
    assert (problem.message, problem.hint) == (f"there is no tenant '{tenant}'", hint)
    assert marked(problem) == tenant


def test_an_unknown_image_is_told(host: Host) -> None:
    assert host.vm("gpus: 0, image: debian12")  # nobody said which images there are
    host.images = ["debian-12", "ubuntu-22.04"]
    problem = host.vm_problem("gpus: 0, image: debian12")
    assert problem.message == "there is no image 'debian12'"
    assert problem.hint == "did you mean `debian-12`?"
    host.images = []
    assert host.vm_problem("gpus: 0, image: debian12").hint == "no image is known"


def test_a_wrong_default_is_told_once(host: Host) -> None:
    vms = "vms: [{name: a, gpus: 0}, {name: b, gpus: 0}]"
    problem = host.problem(f"version: 1\ndefaults: {{tenant: hr}}\n{vms}\n")
    assert (problem.path, problem.line) == ("defaults.tenant", 2)


@pytest.mark.parametrize(("gpus", "pin"), [(2, "[8]"), (1, "[8, 9]"), (1, "[]"), (0, "[1]")])
def test_every_gpu_is_pinned_or_none(host: Host, gpus: int, pin: str) -> None:
    problem = host.vm_problem(f"gpus: {gpus}, pin: {pin}")
    assert problem.message.endswith(f"GPUs are pinned, but gpus is {gpus}")
    assert marked(problem) == pin


@pytest.mark.parametrize(
    ("first", "second"), [("8", "8"), ("0000:b7:00.0", "B7:00.0"), ("34:00.0", "0000:34:00.0")]
)
def test_no_gpu_is_pinned_twice(host: Host, first: str, second: str) -> None:
    pins = f"- {{name: a, gpus: 1, pin: [{first}]}}\n- {{name: b, gpus: 1, pin: [{second}]}}\n"
    problem = host.problem(f"version: 1\nvms:\n{pins}")
    assert problem.message.endswith(f"is already pinned by 'a' at {MAIN}:3")
    assert (problem.path, marked(problem)) == ("vms[1].pin[0]", second)
    assert "already pinned" in host.vm_problem(f"gpus: 2, pin: [{first}, {second}]").message


def test_the_vm_that_is_too_much_for_its_tenant_is_told(host: Host) -> None:
    vms = "".join(f"- {{name: a{n}, tenant: hr, gpus: 2}}\n" for n in range(4))
    problem = host.problem(f"version: 1\ntenants:\n  hr: {{max_gpus: 4}}\nvms:\n{vms}")
    assert (problem.path, problem.message) == ("vms[2].gpus", "with this VM tenant 'hr' has 6 GPUs")
    assert problem.hint == f"max_gpus is 4 at {MAIN}:3"
    problem = host.problem(f"version: 1\ntenants:\n  hr: {{max_vms: 3}}\nvms:\n{vms}")
    assert (problem.path, problem.message) == ("vms[3].name", "with this VM tenant 'hr' has 4 VMs")
    assert host.load(f"version: 1\ntenants: {{hr: {{max_gpus: 8, max_vms: 4}}}}\nvms:\n{vms}")


def test_quotas_count_vms_of_all_files_and_of_defaults(host: Host) -> None:
    host.write("vms.d/b.yaml", "vms: [{name: b, gpus: 4}]")
    main = "version: 1\ntenants: {hr: {max_gpus: 4}}\ndefaults: {tenant: hr}\n"
    problem = host.problem(main + "vms: [{name: a, gpus: 1}]")
    assert problem.file == "/etc/dgx-kvm/vms.d/b.yaml"


@pytest.mark.parametrize("key", ["vcpus", "memory", "nics", "drives"])
def test_a_vm_without_gpus_has_no_shares(host: Host, key: str) -> None:
    problem = host.vm_problem(f"gpus: 0, {key}: 50%")
    assert (problem.path, marked(problem)) == (f"vms[0].{key}", "50%")
    assert problem.message == f"{key} is 50% of what GPUs bring along; this VM has none"
    text = f"version: 1\ndefaults: {{{key}: 50%}}\nvms:\n- {{name: a, gpus: 0}}\n"
    assert host.problem(text).path == "vms[0]"


def test_the_template_of_vms_without_gpus_has_no_shares(host: Host) -> None:
    shipped = (SOURCE_TREE / "etc/dgx-kvm/templates/0-gpu.yaml").read_text()
    host.write("templates/0-gpu.yaml", shipped.replace("cpus: 2", "cpus: 10%"))
    problem = host.vm_problem("gpus: 0, vcpus: 2")
    assert (problem.file, problem.path) == ("/etc/dgx-kvm/templates/0-gpu.yaml", "cpus")


def test_disks_of_one_vm_have_different_names(host: Host) -> None:
    disk = "{name: data, size: 1GiB}"
    problem = host.vm_problem(f"gpus: 0, disks: [{disk}, {disk}]")
    assert problem.message == "this VM already has a disk 'data'"
    assert problem.path == "vms[0].disks[1].name"


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


def test_files_that_cannot_be_read_are_told(host: Host) -> None:
    path = host.root.path(MAIN)
    path.unlink()
    with pytest.raises(HostError, match=f"there is no file {path}"):
        host.load()
    path.mkdir()
    with pytest.raises(HostError, match=f"cannot read {path}: is a directory"):
        host.load()
    path.rmdir()
    path.symlink_to(path)
    with pytest.raises(HostError, match=f"cannot read {path}: too many levels"):
        host.load()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_told(host: Host) -> None:
    host.root.path(MAIN).chmod(0)
    with pytest.raises(HostError, match="permission denied"):
        host.load()


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


NASTY_VALUES = [
    "null", "~", "''", '"\\0"', "yes", "[]", "{}", "[[]]", "[{}]", "{a: {}}", "-0", "1e999",
    ".inf", ".nan", "-" + "9" * 5000, "2026-11-22", "12:30:45", "0b1", "0o7", "<<", "=", "🐧",
    "a: b", "|\n x", ">\n x", "[null, true, 1, a, [], {}]", "{name: [], size: {}}",
    "'" + "x" * 99999 + "'", "\ud7ff", "%", "0%", "100%", "1e2%", "--1", "../../etc", "$(reboot)",
    "{{ 7 * 7 }}", "</domain>", "'\u2028'",
]  # fmt: skip

NASTY_PLACES = [
    "{}", "version: {}", "version: 1\nvms: {}", "version: 1\nvms:\n- {}", "version: 1\ntenants: {}",
    "version: 1\nhost: {}", "version: 1\ndefaults: {}", "version: 1\ntenants:\n  {}: 1",
    "version: 1\n? {}\n: 1", "version: 1\ntenants:\n  hr: {}", "version: 1\nhost:\n  reserve: {}",
    *(
        f"version: 1\nvms:\n- gpus: 0\n  name: a\n- name: b\n  gpus: 1\n  {key}: {{}}"
        for key in json.loads(schema_text("vms"))["definitions"]["vm"]["properties"]
    ),
    "version: 1\ndefaults:\n  tenant: {}", "version: 1\ndefaults:\n  memory: {}",
]  # fmt: skip


@pytest.mark.parametrize("place", NASTY_PLACES)
def test_nothing_ends_in_a_traceback(host: Host, place: str) -> None:
    host.images = ["debian-12"]
    host.write("vms.d/a.yaml", "version: 1\ntenants: {it: {}}\nvms: [{name: c, gpus: 0}]")
    for value in NASTY_VALUES:
        try:
            host.load(place.replace("{}", value))
        except BadFileError as error:
            assert error.problems
            assert len(str(error)) < 20000
            assert all(line.isprintable() for line in str(error).splitlines())


# The digest, and what it saves


def test_the_digest_covers_everything_that_was_read(host: Host) -> None:
    vms = "version: 1\nvms: [{name: a, gpus: 2}]\n"
    digests = [host.load(vms).digest, host.load(vms).digest]
    assert len(set(digests)) == 1
    digests.append(host.load(vms + "# a word\n").digest)
    host.write("vms.d/b.yaml", "version: 1\n")
    digests.append(host.load(vms).digest)
    shipped = (SOURCE_TREE / "etc/dgx-kvm/templates/2-gpu.yaml").read_text()
    host.write("templates/2-gpu.yaml", shipped + "# a word\n")
    digests.append(host.load(vms).digest)
    assert len(set(digests)) == 4


def test_texts_that_passed_the_schema_are_not_checked_again(host: Host) -> None:
    text = "version: 1\nvms: [{name: a, gpus: 2}]\n"
    passed = host.load(text)
    assert host.load(text, validated=passed.digest) == passed
    with pytest.raises(BadFileError):
        host.load(text.replace("2", "3"), validated=passed.digest)


def test_what_the_schema_cannot_say_is_checked_each_time(host: Host) -> None:
    text = "version: 1\nvms: [{name: a, gpus: 0, image: debian-12}]\n"
    passed = host.load(text)
    host.images = ["ubuntu-22.04"]
    with pytest.raises(BadFileError):
        host.load(text, validated=passed.digest)
