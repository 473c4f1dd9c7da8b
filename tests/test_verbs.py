"""What each verb does and says, on a simulated DGX-2; the drawings have tests of their own."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from commandline import DGX_KVM, EIGHT, Host
from hosts import FOREIGN_XML

from dgx_kvm_sw.cli import main, verbs
from dgx_kvm_sw.guest.images import MANIFESTS
from dgx_kvm_sw.guest.simulated import SimulatedHypervisor
from dgx_kvm_sw.host.health import QUARANTINE
from dgx_kvm_sw.model.errors import ExitCode
from dgx_kvm_sw.reconcile import POOL_PATH

READS = [verb.name for verb in verbs.VERBS if verb.reads and verb.name != "mode"]


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
    done = eight("apply --prune --restart")
    assert f"disks: {POOL_PATH}/vm-7.os.qcow2 -> kept\n" in done.out
    assert done.last == "Done: 1 deleted."
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


@pytest.mark.parametrize("verb", ["status", "explain vm-0", "fits", "topology"])
def test_quiet_says_nothing_when_nothing_is_wrong(verb: str, eight: Host) -> None:
    result = eight(f"{verb} -q")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_a_machine_without_devices_is_no_error(eight: Host) -> None:
    eight("apply")
    shutil.rmtree(eight.root.path("/sys"))
    for verb in ("status", "fits", "topology", "plan", "explain vm-0"):
        assert "please report it" not in eight(verb).err
    assert "vm-0" in eight("status").out


def test_quiet_leaves_the_exit_code(eight: Host) -> None:
    for command, code in (("plan -q", 2), ("diff -q", 2), ("apply -q", 0), ("plan -q", 0)):
        result = eight(command)
        assert (result.code, result.out) == (code, "")


@pytest.mark.parametrize("verb", READS)
def test_every_verb_that_looks_has_json(verb: str, eight: Host) -> None:
    eight("apply")
    names = {"explain": "vm-0", "image": "list"}.get(verb, "")
    if verb == "seed":  # of a VM with an image
        eight.declare("version: 1\nvms: [{name: new, gpus: 0, image: debian-12}]\n")
        names = "new"
    result = eight(f"{verb} {names} --json")
    assert result.code == 0
    assert result.json["version"] == 1
    assert result.err == ""


def test_seed_prints_the_files_that_a_guest_gets(eight: Host) -> None:
    eight.declare(
        "version: 1\nvms: [{name: new, gpus: 0, image: debian-12}, {name: bare, gpus: 0}]"
    )
    result = eight("seed new")
    assert result.code == 0
    assert "--- meta-data\ninstance-id: " in result.out
    assert "--- user-data\n#cloud-config\n" in result.out
    assert "bare gets no first boot settings" in eight("seed bare").err
    assert "there is no VM nobody" in eight("seed nobody").err


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


@pytest.mark.parametrize("target", ["vms.yaml", "empty", "no-plan.json", "nothing/plan.json"])
def test_a_plan_replaces_only_a_plan(target: str, eight: Host, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "no-plan.json").write_text('{"version": 1}')
    (tmp_path / "vms.yaml").write_text(EIGHT)
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    result = eight(f"plan -o {tmp_path / target}")
    assert result.code == ExitCode.USAGE
    assert str(tmp_path / Path(target).parts[0]) in result.err
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    assert not (tmp_path / "nothing").exists()


def test_a_plan_replaces_an_older_one(eight: Host, tmp_path: Path) -> None:
    for _ in range(2):
        assert eight(f"plan -o {tmp_path / 'plan.json'}").code == ExitCode.CHANGES
        eight.declare(EIGHT.replace("vm-3", "vm-x"))
    assert eight(f"apply {tmp_path / 'plan.json'}").code == 0


def test_a_saved_plan_keeps_its_options(eight: Host, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    eight("apply")
    eight.declare("version: 1\n")
    eight(f"plan --prune --restart -o {file}")
    assert eight(f"apply {file} --prune").code == ExitCode.USAGE
    assert eight(f"apply {file}").last == "Done: 8 deleted."


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 1}',
        '{"version": 1, "file": 5, "intent": {}, "fingerprint": "", "actions": []}',
        "version: 1\n",
        pytest.param("[" * 99999, id="deep"),
    ],
)
def test_what_is_no_plan_is_not_applied(text: str, eight: Host, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    result = eight(f"apply {file}")
    assert result.code == ExitCode.BAD_FILE
    assert "this is not a saved plan" in result.err


# -- one VM -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verbs", [("restart",), ("stop", "start")])
def test_a_disk_that_waited_for_a_restart_grows_with_it(run: Host, verbs: tuple[str, ...]) -> None:
    """The watcher starts a VM whose guest has rebooted as `start` does."""
    run.declare("version: 1\nvms: [{name: a, gpus: 0}]\n")
    run("apply")
    run.declare("version: 1\nvms: [{name: a, gpus: 0, os_disk: 99GiB}]\n")
    assert "at next restart" in run("plan").out
    for verb in verbs:
        assert run(f"{verb} a").code == 0
    assert run("plan").code == 0, "it is as large as the file says"


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


def test_a_vm_can_be_stopped_whatever_the_file_says(eight: Host) -> None:
    eight("apply")
    eight.declare("version: 2\n")
    stop = eight("stop vm-0")
    assert (stop.code, stop.last) == (0, "Done: 1 stopped.")
    assert "has mistakes" in stop.err
    assert eight("start vm-0").code == ExitCode.BAD_FILE


def test_a_vm_can_be_stopped_whatever_is_broken(eight: Host) -> None:
    eight("apply")
    eight.spec.unlink()
    stop = eight("stop vm-0")
    assert (stop.code, stop.last) == (0, "Done: 1 stopped.")
    assert f"there is no file {eight.spec}" in stop.err
    eight.declare(EIGHT)
    for number, broken in enumerate((QUARANTINE, "/etc/machine-id"), start=1):
        before = eight.root.read(broken, "")
        eight.root.write(broken, "{")
        stop = eight(f"stop vm-{number}")
        assert (stop.code, stop.last) == (0, "Done: 1 stopped.")
        assert str(eight.root.path(broken)) in stop.err
        assert eight(f"start vm-{number}").code == ExitCode.FAILED
        eight.root.write(broken, before or '{"devices": []}')
    assert eight("stop nobody").code == ExitCode.USAGE


def test_stop_all_stops_every_vm_of_ours_that_runs(eight: Host) -> None:
    nothing = eight("stop --all")
    assert (nothing.code, nothing.out) == (0, "no VM runs\n")
    assert eight("stop --all -q").out == ""
    eight("apply")
    eight("stop vm-0")
    stop = eight("stop --all --timeout 30")
    assert (stop.code, stop.last) == (0, "Done: 7 stopped.")
    assert eight("stop --all").out == "no VM runs\n"


def test_stop_all_leaves_domains_of_others_alone(eight: Host) -> None:
    eight("apply")
    xml = FOREIGN_XML.format(name="theirs", memory=1, vcpus=1, cputune="", devices="")
    hypervisor = SimulatedHypervisor(eight.root)
    hypervisor.define("theirs", xml)
    hypervisor.start("theirs", hypervisor.domain("theirs").uuid)
    hypervisor.close()
    assert eight("stop --all").last == "Done: 8 stopped."
    assert SimulatedHypervisor(eight.root).domain("theirs").live


def test_stop_all_works_whatever_the_file_says(eight: Host) -> None:
    eight("apply")
    eight.declare("version: 2\n")
    stop = eight("stop --all")
    assert (stop.code, stop.last) == (0, "Done: 8 stopped.")
    assert "has mistakes" in stop.err


@pytest.mark.commands
def test_apply_at_boot_needs_no_terminal_and_no_home(eight: Host) -> None:
    words = [DGX_KVM, *eight.words, "apply", "--wait", "600"]
    nothing: dict[str, str] = {}
    done = subprocess.run(
        words, env=nothing, stdin=subprocess.DEVNULL, cwd="/", capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"Done: 8 created, 8 started.\n")


def test_apply_at_boot_without_libvirt_says_so(
    eight: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--root", str(eight.directory)]
    assert main([*root, "--connect", "test:///nonexistent.xml", "apply", "--wait", "600"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("dgx-kvm: libvirt does not answer at test:///nonexistent.xml: ")
    assert len(said.splitlines()) == 2


def test_size_templates_are_the_machines_even_for_another_file(run: Host, tmp_path: Path) -> None:
    template = run.root.path("/etc/dgx-kvm/templates/1-gpu.yaml")
    template.parent.mkdir(parents=True)
    text = (Path(__file__).parents[1] / "etc/dgx-kvm/templates/1-gpu.yaml").read_text()
    template.write_text(text.replace("memory: 100%", "memory: 7GiB"))
    other = tmp_path / "other.yaml"
    other.write_text("version: 1\nvms: [{name: a, gpus: 1}]\n")
    assert " 7 GiB on NUMA node" in run(f"-f {other} plan").out


def test_a_simulated_vm_has_no_console(eight: Host) -> None:
    assert "has no console" in eight("console vm-0").err


def test_a_network_comes_and_goes_with_a_vm_of_create(eight: Host) -> None:
    eight.declare("version: 1\n")
    assert eight("create one --gpus 0 --network nat=true").code == 0
    assert eight("create two --gpus 0 --network nat=true").code == 0
    saved = eight.directory / "libvirt/networks"
    assert [path.name for path in saved.iterdir()] == ["dgx-kvm-nat.json"]
    assert eight("delete one --stop --delete-disks").code == 0
    assert len(list(saved.iterdir())) == 1
    assert eight("delete two --stop --delete-disks").code == 0
    assert list(saved.iterdir()) == []


@pytest.mark.parametrize(
    ("before", "after", "last"),
    [
        ("disks: [{name: d, size: 1GiB}]", "disks: [{name: d, size: 2GiB}]", "Done: 1 changed."),
        ("", "networks: [{nat: true}]", "Done: 1 changed."),
    ],
)
def test_what_was_done_to_a_stopped_vm_is_told(
    run: Host, before: str, after: str, last: str
) -> None:
    vm = "version: 1\nvms: [{name: a, state: stopped, gpus: 0, %s}]\n"
    run.declare(vm % before)
    assert run("apply").last == "Done: 1 created."
    run.declare(vm % after)
    assert run("apply").last == last
    assert run("plan").code == 0


def test_a_network_that_goes_is_told(run: Host) -> None:
    vm = "version: 1\nvms: [{name: a, state: stopped, gpus: 0, %s}]\n"
    for networks, last in (
        ("networks: [{nat: true}]", "Done: 1 created."),
        ("", "Done: 1 changed, 1 network removed."),
    ):
        run.declare(vm % networks)
        assert run("apply").last == last


@pytest.mark.commands  # xorriso
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
    assert f"Its disks stay:\n  {POOL_PATH}/lab.data.qcow2\n  {POOL_PATH}/lab.os" in kept.out
    again = eight("create lab --gpus 2")  # without the data disk
    assert again.code == 0
    assert f"Note: lab takes the disk {POOL_PATH}/lab.os.qcow2 as it is\n" in again.out
    assert "lab.os.qcow2 was made from" in again.out  # what plan would note too
    gone = eight("delete lab --stop --delete-disks")
    assert gone.out == (
        f"Its disks are deleted:\n  {POOL_PATH}/lab.os.qcow2\n"
        f"Disks that were its own once stay:\n  {POOL_PATH}/lab.data.qcow2\nDone: 1 deleted.\n"
    )
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
        ("--gpus 1 --pin=", ExitCode.USAGE, "--pin: '' is not a GPU index"),
        ('--gpus 1 --image "},x:{', ExitCode.USAGE, "--image"),
        ("--gpus 1 --image 12", ExitCode.USAGE, "--image: there is no image '12'"),
        ("--gpus 1 --image zzz", ExitCode.USAGE, "known images: broken, debian-12"),
        ("--gpus 1 --image broken", ExitCode.FAILED, "'name' is missing"),
        ("--gpus 1 --tenant 12", ExitCode.USAGE, "--tenant: there is no tenant '12'"),
        ("--gpus 1 --vcpus many", ExitCode.USAGE, "--vcpus: 'many' is not"),
    ],
)
def test_a_create_that_is_refused_leaves_nothing(
    options: str, code: int, message: str, eight: Host
) -> None:
    eight.declare(EIGHT.replace("gpus: 2", "gpus: 1"))
    eight("apply")
    eight.root.write(f"{MANIFESTS}/broken.json", '{"manifest": 1}')
    before = _state(eight)
    result = eight(f"create lab {options}")
    assert result.code == code
    assert message in result.err
    assert _state(eight) == before


def test_delete_takes_no_disk_of_another_vm(run: Host) -> None:
    """A site template may attach a disk of the pool that others use too."""
    run.root.write(
        "/etc/dgx-kvm/templates/site.xml.j2",
        '{#- template_api: 1 -#}\n{% extends "dist/domain.xml.j2" %}\n{% block extra_devices %}'
        f'<disk type="file" device="disk"><source file="{POOL_PATH}/other.os.qcow2"/>'
        '<target dev="vdz" bus="virtio"/></disk>{% endblock %}\n',
    )
    run.declare("version: 1\nvms: [{name: other, gpus: 1}]\n")
    run("apply")
    run("create lab --gpus 1 --stopped")
    with run.root.path("/etc/dgx-kvm/vms.d/lab.yaml").open("a") as file:
        file.write("    template: site.xml.j2\n")
    run("apply")
    assert "other.os.qcow2" in run.root.read("/libvirt/domains/lab.json")
    gone = run("delete lab --delete-disks")
    assert (gone.code, "other.os.qcow2" in gone.out) == (0, False)
    assert run.root.names("/libvirt/volumes") == ["other.os.qcow2"]


def test_create_takes_no_vm_that_is_there_already(run: Host) -> None:
    run("create lab --gpus 1")
    run.root.remove("/etc/dgx-kvm/vms.d/lab.yaml")
    before = _state(run)
    result = run("create lab --gpus 1")
    assert result.code == ExitCode.USAGE
    assert "lab exists and is no longer declared\n" in result.err
    assert "`dgx-kvm apply --prune`" in result.err
    assert _state(run) == before


@pytest.mark.parametrize("name", ["123", "true", "null", "1e3", "0x1f", "no"])
def test_a_vm_may_have_any_name(name: str, run: Host) -> None:
    assert run(f"create {name} --gpus 1 --disk {name}=5GiB").last == "Done: 1 created, 1 started."
    assert run("plan").code == 0


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
