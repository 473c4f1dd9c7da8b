"""vms.yaml, vms.d and the size templates: what they mean, and what a load does about mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from specfiles import MAIN, SHIPPED, Host, marked

from dgx_kvm_sw.access.files import Root, template_path
from dgx_kvm_sw.guest import schema, spec
from dgx_kvm_sw.guest.problems import problems_json
from dgx_kvm_sw.guest.schema import schema_text
from dgx_kvm_sw.model.errors import BadFileError, HostError
from dgx_kvm_sw.model.spec import (
    SIZES,
    Disk,
    DiskFormat,
    Firmware,
    HostShare,
    Hugepages,
    Network,
    NetworkKind,
    OsDisk,
    PowerState,
    Share,
    SourceLine,
    Tenant,
)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


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
    assert (gets.iothreads, gets.os_disk.size_mib) == (3, 1536 * 1024)


def test_kinds_of_disks_and_networks(host: Host) -> None:
    vm = host.vm(
        "gpus: 0, disks: [{name: a, size: 1GiB, format: raw}, {name: b, size: 1GiB, lvm: vg}],"
        " networks: [{nat: true}, {nat: own}, {isolated: lab}, {bridge: br0, vlan: 7}]"
    )
    assert vm.disks == (Disk("a", 1024, DiskFormat.RAW), Disk("b", 1024, DiskFormat.RAW, "vg"))
    assert vm.networks == (
        Network(NetworkKind.NAT, ""),
        Network(NetworkKind.NAT, "own"),
        Network(NetworkKind.ISOLATED, "lab"),
        Network(NetworkKind.BRIDGE, "br0", 7),
    )


def test_parts_of_an_os_disk_come_from_where_they_are_said(host: Host) -> None:
    """From the VM, else from defaults, else from the file of its size (50 GiB)."""
    defaults = "version: 1\ndefaults: {os_disk: {from: copy, format: raw}}\n"
    vms = "vms: [{name: a, gpus: 1}, {name: b, gpus: 1, os_disk: 9GiB}, "
    last = "{name: c, gpus: 1, os_disk: {format: qcow2}}]\n"
    found = [vm.resources.os_disk for vm in host.load(defaults + vms + last).vms]
    assert found == [
        OsDisk(50 * 1024, True, DiskFormat.RAW),
        OsDisk(9 * 1024, True, DiskFormat.RAW),
        OsDisk(50 * 1024, True, DiskFormat.QCOW2),
    ]


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        ("image: i, os_disk: {format: raw}", "a raw disk cannot be an overlay", "from: copy"),
        ("disks: [{name: a, size: 1GiB, lvm: v, format: qcow2}]", "a logical volume is raw", ""),
        ("networks: [{macvtap: eno1, vlan: 5}]", "macvtap puts no VLAN tags", "eno1.5"),
        ("networks: [{nat: true, vlan: 5}]", "goes with bridge and vf only", "remove it"),
    ],
)
def test_what_cannot_go_together(host: Host, keys: str, message: str, hint: str) -> None:
    problem = host.vm_problem(f"gpus: 0, {keys}")
    assert message in problem.message
    assert hint in problem.hint


def test_a_size_template_gives_what_a_vm_does_not_say(host: Host) -> None:
    shipped = (SHIPPED / "templates/2-gpu.yaml").read_text()
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
    assert host.load((SHIPPED / "vms.yaml").read_text()).vms == ()


def test_the_examples_in_the_shipped_file_are_right(host: Host) -> None:
    comments = (SHIPPED / "vms.yaml").read_text().partition("vms: []")[2]
    examples = re.sub(r"(?m)^# (?=(vms|defaults|tenants|host):$|  )", "", comments)
    loaded = host.load("version: 1\n" + examples)
    assert [vm.name for vm in loaded.vms] == ["first", "hr-train", "fixed", "build"]
    assert [tenant.name for tenant in loaded.tenants] == ["hr", "it"]
    assert loaded.reserve == HostShare(Share(0.04), Share(0.06))


@pytest.mark.parametrize("size", [size for size in SIZES if size])
def test_a_gpu_vm_gets_its_whole_part_of_the_machine(host: Host, size: int) -> None:
    gets = host.vm(f"gpus: {size}").resources
    assert (gets.cpus, gets.memory, gets.nics, gets.drives) == (Share(1.0),) * 4
    assert (gets.nvswitches, gets.hugepages) == (True, Hugepages.AUTO)
    assert gets.os_disk == OsDisk(50 * 1024)
    assert gets.iothreads == {1: 1, 2: 1, 4: 2, 8: 2, 16: 4}[size]
    assert 8 <= gets.max_queues <= 32


def test_a_vm_without_gpus_gets_a_little_and_no_devices(host: Host) -> None:
    gets = host.vm("gpus: 0").resources
    assert (gets.cpus, gets.memory, gets.nics, gets.drives) == (2, 4096, 0, 0)
    assert (gets.nvswitches, gets.hugepages, gets.max_queues) == (False, Hugepages.AUTO, 4)
    assert (gets.iothreads, gets.os_disk.size_mib) == (1, 20 * 1024)


def test_the_admins_template_wins_over_the_packaged_one(tmp_path: Path) -> None:
    root = Root(tmp_path)
    assert template_path(root, "1-gpu.yaml") == SHIPPED / "templates/1-gpu.yaml"
    for folder in ("/usr/share/dgx-kvm/templates", "/etc/dgx-kvm/templates"):
        root.write(f"{folder}/1-gpu.yaml", "")
        assert template_path(root, "1-gpu.yaml") == root.path(f"{folder}/1-gpu.yaml")
    with pytest.raises(HostError, match="nothing.j2"):
        template_path(root, "nothing.j2")


# Problems


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
    shipped = (SHIPPED / "templates/1-gpu.yaml").read_text()
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
    shipped = (SHIPPED / "templates/2-gpu.yaml").read_text()
    host.write("templates/2-gpu.yaml", shipped + "# a word\n")
    digests.append(host.load(vms).digest)
    assert len(set(digests)) == 4


def test_the_digest_covers_the_schemas(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    before = host.load().digest
    shutil.copytree(schema.DATA, host.root.path("/data"))
    monkeypatch.setattr(schema, "DATA", host.root.path("/data"))
    assert host.load().digest == before
    (schema.DATA / "size.schema.json").write_text("{}")
    assert host.load().digest != before


def test_texts_that_passed_the_schema_are_not_checked_again(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "version: 1\nvms: [{name: a, gpus: 2}]\n"
    passed = host.load(text)
    with monkeypatch.context() as without:
        # Importing the library is most of what is saved, so it must not even be there.
        without.setitem(cast(dict[str, Any], sys.modules), "jsonschema", None)
        assert host.load(text, validated=passed.digest) == passed
    with pytest.raises(BadFileError):
        host.load(text.replace("2", "3"), validated=passed.digest)


def test_what_the_schema_cannot_say_is_checked_each_time(host: Host) -> None:
    text = "version: 1\nvms: [{name: a, gpus: 0, image: debian-12}]\n"
    passed = host.load(text)
    host.images = ["ubuntu-22.04"]
    with pytest.raises(BadFileError):
        host.load(text, validated=passed.digest)
