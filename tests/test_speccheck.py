"""What the parts of vms.yaml may be together."""

from __future__ import annotations

from pathlib import Path

import pytest
from specfiles import MAIN, SHIPPED, Host, marked


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_host_and_defaults_belong_in_the_main_file(host: Host) -> None:
    host.write("vms.d/a.yaml", "defaults: {state: stopped}\nhost: {}\n")
    found = host.problems()
    assert [(problem.path, problem.message) for problem in found] == [
        ("defaults", "holds for the whole host"),
        ("host", "holds for the whole host"),
    ]
    assert MAIN in found[0].hint


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
    shipped = (SHIPPED / "templates/0-gpu.yaml").read_text()
    host.write("templates/0-gpu.yaml", shipped.replace("cpus: 2", "cpus: 10%"))
    problem = host.vm_problem("gpus: 0, vcpus: 2")
    assert (problem.file, problem.path) == ("/etc/dgx-kvm/templates/0-gpu.yaml", "cpus")


def test_disks_of_one_vm_have_different_names(host: Host) -> None:
    disk = "{name: data, size: 1GiB}"
    problem = host.vm_problem(f"gpus: 0, disks: [{disk}, {disk}]")
    assert problem.message == "there is already a disk 'data' here"
    assert problem.path == "vms[0].disks[1].name"
    problem = host.problem(f"version: 1\ndefaults: {{disks: [{disk}, {disk}]}}")
    assert problem.path == "defaults.disks[1].name"
