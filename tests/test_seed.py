"""The seed: what a guest is told, written once, kept as long as nothing changes, nobody else's."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from catalogues import add
from hosts import ALL, SimulatedHost
from test_firstboot import KEY

from dgx_kvm_sw.access.hooks import HOOKS
from dgx_kvm_sw.cli.seed import _refusal
from dgx_kvm_sw.decide.plan import Intent
from dgx_kvm_sw.execute import JOURNAL
from dgx_kvm_sw.guest.seed import held_digest
from dgx_kvm_sw.model.actions import WriteSeed
from dgx_kvm_sw.model.errors import BadFileError
from tools import documents

pytestmark = pytest.mark.commands  # xorriso

A = f"name: a, gpus: 0, image: debian-12, ssh_keys: ['{KEY}'], networks: [{{bridge: br0}}]"
SECRET = "#cloud-config\npassword: VERYSECRET\n"


@pytest.fixture
def at(host: Callable[..., SimulatedHost]) -> SimulatedHost:
    found = host("dgx-h100")
    add(found.root, "debian-12")
    return found


def iso(at: SimulatedHost, vm: str = "a") -> Path:
    return at.root.path(f"/var/lib/dgx-kvm/images/{vm}.seed.iso")


def unpacked(at: SimulatedHost, folder: Path, vm: str = "a") -> dict[str, str]:
    """The files of a seed as a guest finds them."""
    command = ("xorriso", "-osirrox", "on", "-indev", iso(at, vm), "-extract", "/", folder)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Volume id    : 'cidata'" in done.stderr
    return {path.name: path.read_text() for path in folder.iterdir()}


def told(at: SimulatedHost, name: str = "user-data", vm: str = "a") -> Any:
    at.plan()
    seed = at.situation.seed(vm)
    assert seed is not None
    return yaml.safe_load(seed.files[name])


def writes(at: SimulatedHost, intent: Intent = Intent()) -> list[str]:  # noqa: B008
    return [action.vm for action in at.plan(intent).actions if isinstance(action, WriteSeed)]


def hook(at: SimulatedHost, stage: str, script: str) -> None:
    at.root.write(f"{HOOKS}/{stage}/10-ours", f"#!/bin/sh\nset -e\n{script}\n", 0o755)


# -- what is in it ------------------------------------------------------------------------------


def test_a_seed_is_a_cd_with_three_files(at: SimulatedHost, tmp_path: Path) -> None:
    at.declare(A)
    at.settle()
    found = unpacked(at, tmp_path / "cd")
    assert sorted(found) == ["meta-data", "network-config", "user-data"]
    facts = at.domain("a").facts
    meta = yaml.safe_load(found["meta-data"])
    assert meta == {"instance-id": facts.uuid, "local-hostname": "a"}
    network = yaml.safe_load(found["network-config"])["ethernets"]["net0"]
    assert network["match"] == {"macaddress": facts.interfaces[0].mac}
    assert found["user-data"].startswith("#cloud-config\n")


def test_nobody_has_a_password_and_only_the_keys_log_in(at: SimulatedHost) -> None:
    at.declare(f"{A}, user: ann")
    found = told(at)
    (user,) = found["users"]
    assert (user["name"], user["lock_passwd"], user["ssh_authorized_keys"]) == ("ann", True, [KEY])
    assert found["ssh_pwauth"] is False
    assert not {"passwd", "plain_text_passwd", "hashed_passwd"} & user.keys()


def test_values_are_text_whatever_is_in_them(at: SimulatedHost) -> None:
    """Neither XML's nor YAML's special characters change a key's comment."""
    key = KEY.replace("ann@desk", '<o\'b & \\"c\\": {{x}} #')
    at.declare(A.replace(f"'{KEY}'", f'"{key}"'))
    (user,) = told(at)["users"]
    assert user["ssh_authorized_keys"] == [key.replace('\\"', '"')]


def test_a_disk_is_mounted_by_name_and_formatted_only_when_empty(at: SimulatedHost) -> None:
    at.declare(f"{A}, disks: [{{name: data, size: 1GiB, mount: /data}}, {{name: b, size: 1GiB}}]")
    found = told(at)
    (mount,) = found["mounts"]
    assert mount[:2] == ["/dev/disk/by-id/virtio-data", "/data"] and "nofail" in mount[3]
    (setup,) = found["fs_setup"]
    assert "test $? -ne 2 || mkfs.ext4" in setup["cmd"] and "overwrite" not in setup


def test_a_vm_without_networks_says_nothing_about_them(at: SimulatedHost) -> None:
    """cloud-init then tries the NICs there are; an empty configuration would forbid it."""
    at.declare("name: a, gpus: 0, image: debian-12")
    at.plan()
    assert sorted(at.situation.seeds["a"].files) == ["meta-data", "user-data"]


def test_without_keys_a_note_says_that_nobody_can_log_in(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 0, image: debian-12", A.replace("name: a", "name: b"))
    assert at.plan().notes == ("a: nobody can log in; give it ssh_keys in the file",)


# -- when it is written -------------------------------------------------------------------------


def test_an_empty_disk_gets_no_seed(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 0")
    at.settle()
    assert not iso(at).exists()
    assert not any(disk.cdrom for disk in at.domain("a").facts.disks)


def test_an_empty_disk_is_not_set_up_and_a_note_says_so(at: SimulatedHost) -> None:
    at.declare("name: a, gpus: 0, disks: [{name: data, size: 1GiB, mount: /data}]")
    (note,) = at.plan().notes
    assert note.startswith("a: /data will not be set up in the guest")


def test_a_second_apply_does_nothing(at: SimulatedHost) -> None:
    at.declare(A)
    at.settle()
    before = iso(at).stat()
    plan = at.plan()
    assert (plan.pending, plan.actions, plan.notes) == (False, (), ())
    assert at.apply().done == 0
    assert iso(at).stat().st_ino == before.st_ino


def test_only_root_may_read_it(at: SimulatedHost) -> None:
    at.declare(A)
    at.settle()
    assert iso(at).stat().st_mode & 0o777 == 0o600
    assert not at.root.exists("/run/dgx-kvm/seed")


def test_a_change_waits_for_the_next_start_of_a_running_vm(at: SimulatedHost) -> None:
    """It needs no restart, is no difference, and is not forgotten."""
    at.declare(A)
    at.settle()
    before = iso(at).read_bytes()
    at.declare(f"{A}, user: ann")
    plan = at.plan()
    assert (plan.pending, plan.actions) == (False, ())
    assert plan.notes[0].startswith("a: its first boot settings have changed, which only a guest")
    assert at.apply().done == 0 and iso(at).read_bytes() == before
    assert writes(at, Intent(restart=True)) == []
    actions = at.situation.restart_actions("a")
    assert "WriteSeed" in [type(action).__name__ for action in actions]


def test_a_change_of_a_stopped_vm_is_named_and_written_once(at: SimulatedHost) -> None:
    at.declare(f"{A}, state: stopped")
    at.settle()
    uuid = at.domain("a").facts.uuid
    at.declare(f"{A}, state: stopped, user: ann")
    (change,) = at.row("a").changes
    assert change.field == "first boot settings"
    assert change.new == "changed, felt only by a guest that boots for the first time"
    at.settle()
    assert not at.plan().pending
    assert told(at)["users"][0]["name"] == "ann"
    assert told(at, "meta-data")["instance-id"] == uuid  # or the guest would begin anew


def test_a_seed_that_is_gone_is_written_before_the_next_start(at: SimulatedHost) -> None:
    at.declare(f"{A}, state: stopped")
    at.settle()
    iso(at).unlink()
    at.plan()
    names = [type(action).__name__ for action in at.situation.start_actions("a")]
    assert names == ["WriteSeed", "PreparePartition", "StartDomain"]


@pytest.mark.parametrize("change", ["key file", "user data", "template", "cut off"])
def test_whatever_it_is_made_from_makes_it_stale(at: SimulatedHost, change: str) -> None:
    at.root.write("/root/keys", f"{KEY}\n")
    at.root.write("/root/ud", SECRET)
    vm = A.replace(f"'{KEY}'", "/root/keys") + ", user_data: /root/ud, state: stopped"
    at.declare(vm)
    at.settle()
    assert writes(at) == []
    fingerprint = at.situation.fingerprint
    if change == "key file":
        at.root.write("/root/keys", f"{KEY}2\n")
    elif change == "user data":
        at.root.write("/root/ud", f"{SECRET}a: b\n")
    elif change == "template":
        shipped = Path(__file__).parents[1] / "etc/dgx-kvm/templates/cloud-init.yaml.j2"
        at.template("cloud-init.yaml.j2", f"{shipped.read_text()}{{# mine #}}\n")
    else:
        iso(at).write_bytes(b"")
    assert writes(at) == ["a"]
    assert at.situation.fingerprint != fingerprint  # so a saved plan is stale too


def test_a_seed_goes_with_its_domain_and_disks_stay(at: SimulatedHost) -> None:
    """It is remade from the file; what it says may be secret."""
    at.declare(A)
    at.settle()
    at.declare()
    row = at.row("a")
    assert [c.old for c in row.changes if c.field == "disks"] == [
        "/var/lib/dgx-kvm/images/a.os.qcow2"
    ]
    at.settle(Intent(restart=True, prune=True))
    assert not iso(at).exists()
    assert [volume.name for volume in at.state().volumes] == ["a.os.qcow2"]
    at.declare(A)
    at.settle()
    at.declare()
    at.settle(ALL)
    assert not iso(at).exists() and at.state().volumes == ()


# -- the template -------------------------------------------------------------------------------

EXTENDS = '{#- template_api: 1 #}{% extends "dist/cloud-init.yaml.j2" %}\n'


def test_a_template_of_the_site_adds_its_own(at: SimulatedHost) -> None:
    block = "{% block more_user_data %}\n  packages: [htop]\n{%- endblock %}"
    at.template("cloud-init.yaml.j2", f"{EXTENDS}{block}\n")
    at.declare(A)
    assert told(at)["packages"] == ["htop"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{#- template_api: 1 #}\na: [", "its output is not YAML"),
        ("{#- template_api: 1 #}\na: 1", "is not a mapping with user-data and meta-data"),
        (
            "{#- template_api: 1 #}\nuser-data: {}\nmeta-data: {instance-id: x}",
            "does not print the instance-id as given",
        ),
        (
            EXTENDS + "{% block network_config %}\nscript: x\n{% endblock %}",
            "its output has 'script'",
        ),
        ("{#- template_api: 1 #}\n{{ vm.nothing }}", "no attribute 'nothing'"),
    ],
)
def test_a_bad_template_changes_nothing(at: SimulatedHost, text: str, message: str) -> None:
    at.template("cloud-init.yaml.j2", text)
    at.declare(A)
    with pytest.raises(BadFileError, match=message):
        at.apply()
    assert at.state().domains == ()


# -- secrets ------------------------------------------------------------------------------------


def test_user_data_is_in_the_seed_and_nowhere_else(
    at: SimulatedHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    popen = subprocess.Popen.__init__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        started.append(f"{args}{kwargs}")
        popen(self, *args, **kwargs)

    monkeypatch.setattr(subprocess.Popen, "__init__", watched)
    at.root.write("/root/ud", SECRET, 0o600)
    at.declare(f"{A}, user_data: /root/ud")
    plan = at.plan()
    at.settle()
    assert "VERYSECRET" in unpacked(at, tmp_path / "cd")["user-data"]
    assert any("xorriso" in command for command in started)
    assert "VERYSECRET" not in f"{started}{plan}{at.situation.seeds}{at.situation.spec}"
    holding = [path for path, data in at.files().items() if b"VERYSECRET" in data]
    assert [Path(path).name for path in holding] == ["a.seed.iso"]


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of files that the kernel is to refuse: root may read everything."""
    names: set[str] = set()
    opened, path_open = os.open, Path.open

    def check(path: Any) -> None:
        if os.path.basename(path) in names:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def guarded(path: Any, *args: Any, **kwargs: Any) -> int:
        check(path)
        return opened(path, *args, **kwargs)

    def path_guarded(path: Path, *args: Any, **kwargs: Any) -> Any:
        check(path)
        return path_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", guarded)
    monkeypatch.setattr(Path, "open", path_guarded)
    return names


def test_who_may_not_read_the_seed_is_told_what_it_is_to_be(
    at: SimulatedHost, unreadable: set[str]
) -> None:
    at.declare(A)
    at.settle()
    unreadable.add("a.seed.iso")
    assert told(at)["users"][0]["ssh_authorized_keys"] == [KEY]
    assert not at.plan().pending and writes(at) == []


def refusal(at: SimulatedHost) -> str:
    at.plan()
    assert at.situation.seed("a") is None
    return str(_refusal(at.situation, "a"))


def test_why_there_is_no_seed_to_show(at: SimulatedHost, unreadable: set[str]) -> None:
    at.root.write("/root/ud", SECRET, 0o600)
    at.declare(f"{A}, user_data: /root/ud")
    unreadable.add("ud")
    assert "may not be read by you" in refusal(at)
    at.declare("name: a, gpus: 0")
    assert refusal(at).startswith("a gets no first boot settings")
    add(at.root, "plain", cloud_init=False)
    at.declare("name: a, gpus: 0, image: plain")
    assert "its image plain has no cloud-init" in refusal(at)
    at.declare(A)
    at.settle()
    at.declare()
    assert "it is not in the file any more" in refusal(at)


def test_a_template_does_not_get_the_user_data(at: SimulatedHost) -> None:
    block = "{% block more_user_data %}\n  packages: [{{ vm.user_data | tojson }}]\n{% endblock %}"
    at.template("cloud-init.yaml.j2", f"{EXTENDS}{block}\n")
    at.root.write("/root/ud", SECRET, 0o600)
    at.declare(f"{A}, user_data: /root/ud")
    at.plan()
    text = at.situation.seeds["a"].files["user-data"]
    assert text.count("VERYSECRET") == 1 and "packages:\n- ''" in text


# -- hooks --------------------------------------------------------------------------------------


def test_a_hook_may_edit_the_seed(at: SimulatedHost, tmp_path: Path) -> None:
    hook(at, "vm-seed", 'echo "# $DGX_KVM_VM $DGX_KVM_IMAGE" >>"$DGX_KVM_SEED_DIR/user-data"')
    at.declare(A)
    at.settle()
    assert unpacked(at, tmp_path / "cd")["user-data"].endswith("# a debian-12\n")
    assert not at.plan().pending


def test_a_hook_runs_before_each_start_and_knows_the_gpus(at: SimulatedHost) -> None:
    hook(at, "vm-start", f'echo "$DGX_KVM_VM $DGX_KVM_GPUS" >>{at.root.directory}/ran')
    at.declare("name: g, gpus: 2, pin: [0, 1]")
    at.settle()
    gpus = [str(gpu.pci.address) for gpu in at.situation.topology.gpus[:2]]
    assert at.root.read("/ran") == f"g {' '.join(gpus)}"


@pytest.mark.parametrize("stage", ["vm-seed", "vm-start"])
def test_hooks_are_told_what_the_man_page_says(at: SimulatedHost, stage: str) -> None:
    hook(at, stage, f"env | sed -n 's/^\\(DGX_KVM_[A-Z_]*\\)=.*/\\1/p' >{at.root.directory}/told")
    at.declare(A)
    at.settle()
    (said,) = (text for name, text in documents.FILES if name == f"{HOOKS}/{stage}/")
    assert set(at.root.read("/told").split()) == set(re.findall(r"DGX_KVM_[A-Z_]+", said))


@pytest.mark.parametrize("stage", ["vm-seed", "vm-start"])
def test_a_failing_hook_stops_its_vm_and_no_other(at: SimulatedHost, stage: str) -> None:
    hook(at, stage, '[ "$DGX_KVM_VM" != a ] || { echo no licence; exit 3; }')
    at.declare(A, A.replace("name: a", "name: b"))
    outcome = at.apply()
    ((action, error),) = outcome.failures
    assert action.vm == "a"
    assert error.message.startswith("a is not started: the hook ")
    assert error.message.endswith("10-ours failed with code 3: no licence")
    found = at.state()
    held = found.domain("a")
    assert held is None or not held.running
    assert at.domain("b").running
    assert "10-ours" in at.root.read(JOURNAL)
    at.root.remove(f"{HOOKS}/{stage}/10-ours")
    at.settle()
    assert at.domain("a").running


def test_a_file_that_is_no_seed_has_no_digest(at: SimulatedHost) -> None:
    at.root.write("/x", "x" * 50_000)
    assert held_digest(at.root, "/x") == held_digest(at.root, "/none") == ""
