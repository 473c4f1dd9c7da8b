"""What vms.yaml says about first boots: keys, addresses, mounts, user data, each mistake named."""

from __future__ import annotations

import base64
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from specfiles import Host

from dgx_kvm_sw.model.spec import Addressing


def public_key(kind: str = "ssh-ed25519", comment: str = "ann@desk") -> str:
    fields = b"".join(len(part).to_bytes(4, "big") + part for part in (kind.encode(), b"k" * 32))
    return f"{kind} {base64.b64encode(fields).decode()} {comment}"


KEY = public_key()
PRIVATE = "-----BEGIN OPENSSH PRIVATE KEY-----\nVERYSECRET\n-----END OPENSSH PRIVATE KEY-----\n"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.root.write("/root/keys", f"# the team\n\n{KEY}\n{public_key(comment='bob')}\n")
    return host


def test_defaults_are_a_user_without_keys_and_dhcp(host: Host) -> None:
    found = host.vm("gpus: 0, networks: [{bridge: br0}]").first_boot
    assert (found.user, found.ssh_keys, found.user_data) == ("dgx", (), "")
    assert found.addressing == (Addressing(),)


def test_keys_are_lines_and_files_each_once(host: Host) -> None:
    found = host.vm(f"gpus: 0, user: ann, ssh_keys: ['{KEY}', /root/keys]").first_boot
    assert (found.user, found.ssh_keys) == ("ann", (KEY, public_key(comment="bob")))


def test_options_before_a_key_are_kept(host: Host) -> None:
    line = f'from="10.0.0.0/8" {KEY}'
    assert host.vm(f"gpus: 0, ssh_keys: ['{line}']").first_boot.ssh_keys == (line,)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("hello", "is not a public key of SSH"),
        (KEY[:40], "is a public key that was cut off or changed"),
        (KEY.replace("ssh-ed25519", "ssh-rsa"), "is a public key that was cut off or changed"),
        (KEY.replace("ssh-ed25519", "ssh-dss"), "is not a public key of SSH"),
    ],
)
def test_a_bad_key_is_told_where_it_stands(host: Host, key: str, message: str) -> None:
    problem = host.vm_problem(f"gpus: 0, ssh_keys: ['{key}']")
    assert (problem.message, problem.line, problem.snippet) == (message, 3, "")
    host.root.write("/root/keys", f"{KEY}\n{key}\n")
    problem = host.vm_problem("gpus: 0, ssh_keys: [/root/keys]")
    assert (problem.file, problem.line, problem.message) == ("/root/keys", 2, message)
    assert problem.snippet == ""


def test_a_private_key_is_refused_and_never_repeated(host: Host) -> None:
    host.root.write("/root/id", PRIVATE)
    problem = host.vm_problem("gpus: 0, ssh_keys: [/root/id]")
    assert problem.message == "/root/id is a private key, which stays with its owner"
    inline = PRIVATE.replace("\n", "\\n")
    text = f'version: 1\nvms: [{{name: a, gpus: 0, ssh_keys: ["{inline}"]}}]\n'
    found = host.problems(text)
    assert found[-1].message == "is a private key, which stays with its owner"
    assert "VERYSECRET" not in f"{problem}{found}"


def test_what_cannot_be_read_is_named(host: Host) -> None:
    problem = host.vm_problem("gpus: 0, ssh_keys: [/root/nothing]")
    assert problem.message == "/root/nothing cannot be read: no such file or directory"
    host.root.write("/root/none", "# nobody yet\n")
    assert host.vm_problem("gpus: 0, ssh_keys: [/root/none]").message == "/root/none holds no key"
    assert "no such file" in host.vm_problem("gpus: 0, user_data: /root/nothing").message


@pytest.mark.parametrize("keys", ["user_data: /root/it", "ssh_keys: [/root/it]"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_a_regular_file_is_read(host: Host, keys: str, kind: str) -> None:
    """A pipe that nobody writes to would hang every verb."""
    path = host.root.path("/root/it")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    problem = host.vm_problem(f"gpus: 0, {keys}")
    assert (problem.message, problem.line) == ("/root/it is not a regular file", 3)


def test_a_file_of_a_gigabyte_is_refused_and_not_read(host: Host) -> None:
    host.root.write("/root/it", "")
    os.truncate(host.root.path("/root/it"), 1 << 30)
    tracemalloc.start()
    problem = host.vm_problem("gpus: 0, user_data: /root/it")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (problem.message, problem.line) == ("/root/it is larger than 1 MiB", 3)
    assert peak < 1 << 26


@pytest.mark.parametrize(
    "text",
    [
        "#cloud-config\npackages: [a]\n",
        "#cloud-config-archive\n- content: x\n",
        "#!/bin/sh\n",
        "MIME-Version: 1.0\n\n",
        "#include\nx\n",
    ],
)
def test_user_data_is_taken_as_it_is(host: Host, text: str) -> None:
    host.root.write("/root/ud", text)
    assert host.vm("gpus: 0, user_data: /root/ud").first_boot.user_data == text


def test_a_cloud_config_of_many_vms_is_looked_at_once(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.root.write("/root/ud", "#cloud-config\na: b\n")
    load, told = yaml.load, []

    def counted(text: str, loader: Any) -> Any:
        told.append(text)
        return load(text, loader)

    monkeypatch.setattr(yaml, "load", counted)
    vms = "".join(f"- {{name: {n}, gpus: 0, user_data: /root/ud}}\n" for n in "abc")
    host.load(f"version: 1\nvms:\n{vms}")
    assert told == ["#cloud-config\na: b\n"]


def test_the_mark_that_some_editors_begin_a_file_with_is_no_part_of_it(host: Host) -> None:
    host.root.write("/root/ud", "\ufeff#!/bin/sh\n")
    assert host.vm("gpus: 0, user_data: /root/ud").first_boot.user_data == "#!/bin/sh\n"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("password: SECRET\n", 3, "/root/ud does not begin as user data does"),
        ("#cloud-config\na: [SECRET\nb: c\n", 3, "is not YAML"),
        ("#cloud-config\n- SECRET\n", 0, "is not a mapping, as cloud-config is"),
        pytest.param(
            f"#cloud-config\na: {'[' * 50_000}{']' * 50_000}\n",
            0,
            "is nested too deeply",
            id="deep",
        ),
    ],
)
def test_bad_user_data_is_told_without_repeating_it(
    host: Host, text: str, line: int, message: str
) -> None:
    host.root.write("/root/ud", text)
    problem = host.vm_problem("gpus: 0, user_data: /root/ud")
    assert (problem.line, problem.message) == (line, message)
    assert "SECRET" not in str(problem)


def test_addresses(host: Host) -> None:
    vm = host.vm(
        "gpus: 0, networks: [{bridge: br0, address: 10.1.0.5/24, gateway: 10.1.0.1, dns: 10.1.0.2},"
        " {network: default, address: ['10.2.0.5/24', 'fd00::5/64'], gateway: ['fd00::1']},"
        " {macvtap: eno1, address: dhcp}]"
    )
    assert vm.first_boot.addressing == (
        Addressing(("10.1.0.5/24",), ("10.1.0.1",), ("10.1.0.2",)),
        Addressing(("10.2.0.5/24", "fd00::5/64"), ("fd00::1",)),
        Addressing(),
    )
    assert [str(network.kind) for network in vm.networks] == ["bridge", "network", "macvtap"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("address: 10.1.0.500/24", "10.1.0.500/24 is not an address"),
        ("address: 10.1.0.5/40", "10.1.0.5/40 is not an address"),
        ("address: 10.1.0.0/24", "10.1.0.0/24 is an address that no machine can have"),
        ("address: 10.1.0.255/24", "10.1.0.255/24 is an address that no machine can have"),
        ("address: 224.0.0.5/24", "224.0.0.5/24 is an address that no machine can have"),
        ("address: 'fd00::/64'", "fd00::/64 is an address that no machine can have"),
        ("address: '::1/128'", "::1/128 is an address that no machine can have"),
        ("address: 10.1.0.5/24, gateway: 10.1.0.5", "10.1.0.5 is the VM's own address"),
        ("address: 10.1.0.5/24, gateway: 10.2.0.1", "10.2.0.1 is in no network of this VM"),
        ("gateway: 10.2.0.1", "10.2.0.1 is in no network of this VM"),
        ("dns: 1.2.3", "1.2.3 is not an IP address"),
        (
            "macvtap: eno1",
            "a mapping is not a network with exactly one of bridge, network, macvtap",
        ),
    ],
)
def test_bad_networks_are_told(host: Host, keys: str, message: str) -> None:
    problem = host.vm_problem(f"gpus: 0, networks: [{{bridge: br0, {keys}}}]")
    assert problem.message.startswith(message)


@pytest.mark.parametrize("address", ["10.1.0.4/31", "10.1.0.5/32", "fd00::ffff/112", "fd00::/127"])
def test_small_networks_have_no_address_but_those_of_machines(host: Host, address: str) -> None:
    vm = host.vm(f"gpus: 0, networks: [{{bridge: b, address: '{address}'}}]")
    assert vm.first_boot.addressing[0].addresses == (address,)


def test_an_address_is_given_once_in_a_network(host: Host) -> None:
    text = "version: 1\nvms:\n" + "".join(
        f"- {{name: {name}, gpus: 0, networks: [{{bridge: {bridge}, address: 10.1.0.5/24}}]}}\n"
        for name, bridge in (("a", "br0"), ("b", "br1"), ("c", "br0"))
    )
    problem = host.problem(text)
    assert problem.message == "10.1.0.5/24 is already an address of a in this network"
    assert problem.line == 5


def two_vms(one: str, other: str) -> str:
    vms = f"- {{name: a, gpus: 0, {one}}}\n- {{name: b, gpus: 0, {other}}}\n"
    return f"version: 1\ntenants: {{red: {{}}, blue: {{}}}}\nvms:\n{vms}"


NET = "networks: [{%s, address: 10.1.0.5/24}]"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("tenant: red, " + NET % "isolated: x", "tenant: blue, " + NET % "isolated: x"),
        ("tenant: red, " + NET % "nat: true", "tenant: blue, " + NET % "nat: true"),
        (NET % "bridge: br0, vlan: 10", NET % "bridge: br0, vlan: 20"),
        (NET % "bridge: br0", NET % "network: br0"),
    ],
)
def test_separate_networks_may_have_the_same_addresses(host: Host, one: str, other: str) -> None:
    assert len(host.load(two_vms(one, other)).vms) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("tenant: red, " + NET % "isolated: x", "tenant: red, " + NET % "isolated: x"),
        ("tenant: red, " + NET % "bridge: br0", "tenant: blue, " + NET % "bridge: br0"),
        (NET % "bridge: br0, vlan: 10", NET % "bridge: br0, vlan: 10"),
        (NET % "bridge: br0", "networks: [{bridge: br0, address: 10.1.0.5/16}]"),
    ],
)
def test_tenants_that_share_a_network_share_its_addresses(host: Host, one: str, other: str) -> None:
    problem = host.problem(two_vms(one, other))
    assert "is already an address of a in this network" in problem.message
    assert problem.line == 5


def test_an_address_in_defaults_is_for_one_vm(host: Host) -> None:
    vm = "- {name: %s, gpus: 0}\n"
    text = f"version: 1\ndefaults:\n  {NET % 'bridge: br0'}\nvms:\n" + vm % "a"
    assert host.load(text).vms[0].first_boot.addressing[0].addresses == ("10.1.0.5/24",)
    problem = host.problem(text + vm % "b" + vm % "c")
    assert problem.message == "10.1.0.5/24 would be an address of a and of b"
    assert (problem.line, problem.path) == (3, "defaults.networks[0].address")
    problem = host.problem(text + "- {name: b, gpus: 0, " + NET % "bridge: br0" + "}\n")
    assert (problem.line, problem.path) == (6, "vms[1].networks[0].address")


@pytest.mark.parametrize(
    "path",
    [
        *("/", "data", "/a/../b", "/a b", "/data/"),
        *("/etc", "/etc/ssh", "/boot/efi", "/root/x", "/lib64/x", "/run/x"),
        *("/usr", "/usr/lib", "/usr/localx", "/usr/share/local"),
        *("/var", "/var/lib", "/var/log", "/var/cache"),
        *("/home/dgx/.ssh", "/home/dgx/.ssh/x"),
    ],
)
def test_where_a_disk_may_not_be_mounted(host: Host, path: str) -> None:
    problem = host.vm_problem(f"gpus: 0, disks: [{{name: a, size: 1GiB, mount: '{path}'}}]")
    assert "is not an absolute path like /data" in problem.message


@pytest.mark.parametrize(
    "path",
    ["/data", "/home", "/home/dgx", "/usr/local", "/usr/local/x", "/var/lib/docker", "/var/log/x"]
    + ["/library", "/usrdata", "/data/etc", "/home/dgx/.sshx"],
)
def test_where_a_disk_may_be_mounted(host: Host, path: str) -> None:
    (disk,) = host.vm(f"gpus: 0, disks: [{{name: a, size: 1GiB, mount: {path}}}]").disks
    assert disk.mount == path


def test_a_place_is_mounted_once(host: Host) -> None:
    disks = ", ".join(f"{{name: {name}, size: 1GiB, mount: /data}}" for name in "ab")
    problem = host.vm_problem(f"gpus: 0, disks: [{disks}]")
    assert problem.message == "another disk of this VM is mounted at '/data'"


@pytest.mark.parametrize("user", ["root", "Ann", "1st", "a b"])
def test_names_no_user_may_have(host: Host, user: str) -> None:
    assert "is not a user name" in host.vm_problem(f"gpus: 0, user: '{user}'").message


@pytest.mark.parametrize(
    "user", ["operator", "www-data", "nobody", "docker", "sshd", "_apt", "_ssh", "systemd-network"]
)
def test_a_user_of_the_system_is_nobody_to_log_in_as(host: Host, user: str) -> None:
    """useradd refuses to make one that is there, so the guest would have no user of ours."""
    problem = host.vm_problem(f"gpus: 0, user: {user}")
    assert problem.message == f"{user} is a user or group of the system's own"
    assert (problem.hint, problem.line) == ("choose another, like dgx", 3)
    problem = host.problem(f"version: 1\ndefaults:\n  user: {user}\n")
    assert (problem.line, problem.path) == (3, "defaults.user")


@pytest.mark.parametrize("user", ["dgx", "operator1", "admin", "ubuntu", "systemd"])
def test_names_like_theirs_are_free(host: Host, user: str) -> None:
    assert host.vm(f"gpus: 0, user: {user}").first_boot.user == user
