"""What one value may be, and what is said when it is something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from specfiles import Host, marked

from dgx_kvm_sw.guest.schema import schema_text


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


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
        ("gpus: 0, os_disk: {from: copied}", "'copied' is not one of", "did you mean `copy`?"),
        ("gpus: 0, disks: [{name: d, size: 1GiB, lvm: a/b}]", "'a/b' is not the name of an LV", ""),
        ("gpus: 0, networks: [{nat: false}]", "false is not true or the name of a net", ""),
        ("gpus: 0, networks: [{nat: no}]", "'no' is not true or the name of a network", ""),
        ("gpus: 0, networks: [{isolated: A}]", "'A' is not the name of a network, 1 to", "`a`"),
        ("gpus: 0, networks: [{network: dgx-kvm-nat}]", "'dgx-kvm-nat' is not the name of a", ""),
        ("gpus: 0, networks: [{bridge: a, vlan: 4095}]", "4095 is not a VLAN number", ""),
        ("gpus: 0, networks: [{vlan: 5}]", "a mapping is not a network with exactly one", ""),
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


def test_a_wrong_name_of_a_tenant_is_marked_itself(host: Host) -> None:
    problem = host.problem("version: 1\ntenants: {HR: {}}\n")
    assert (problem.path, marked(problem)) == ("tenants.HR", "HR")


@pytest.mark.parametrize("key", ["on_fault", "numa"])
def test_keys_of_later_versions_are_not_accepted_in_silence(host: Host, key: str) -> None:
    assert host.vm_problem(f"gpus: 0, {key}: x").message == "is not a known key"
