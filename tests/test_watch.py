"""What the watcher relies on: marks of VMs that were stopped, and how its unit is ordered.

What it does with a guest that reboots is in tests/integration/test_watch.py.
"""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
from commandline import Host

from dgx_kvm_sw.cli import main
from dgx_kvm_sw.execute import STOPPED
from dgx_kvm_sw.guest.simulated import SimulatedHypervisor

UNIT = Path(__file__).parents[1] / "debian/units/dgx-kvm-watch.service"


def left_off(host: Host) -> list[str]:
    """The names of the VMs that bear the mark."""
    hypervisor = SimulatedHypervisor(host.root)
    names = {domain.uuid: domain.name for domain in hypervisor.domains()}
    hypervisor.close()
    return sorted(names.get(uuid, "gone") for uuid in host.root.names(STOPPED))


def test_a_simulated_machine_has_nothing_to_watch(eight: Host) -> None:
    result = eight("watch")
    assert (result.code, result.out) == (1, "")
    assert result.err == "dgx-kvm: a simulated VM never reboots\n  nothing runs in it\n"


def test_without_qemu_behind_libvirt_it_says_so(
    eight: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--root", str(eight.directory), "--connect", "test:///default"]
    assert main([*words, "watch"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("dgx-kvm: libvirt could not tell what happens to its domains: ")
    assert len(said.splitlines()) == 1


def test_a_stop_leaves_a_mark_that_goes_with_the_next_start(eight: Host) -> None:
    eight("apply")
    assert left_off(eight) == []
    eight("stop vm-0 vm-1")
    assert left_off(eight) == ["vm-0", "vm-1"]
    eight("start vm-1")
    assert left_off(eight) == ["vm-0"]
    eight("apply")
    assert left_off(eight) == []
    eight("restart vm-0")
    assert left_off(eight) == []


def test_a_stop_of_what_is_off_leaves_the_mark_too(eight: Host) -> None:
    eight("apply")
    hypervisor = SimulatedHypervisor(eight.root)
    hypervisor.shut_down("vm-0", hypervisor.domain("vm-0").uuid, 5, force=True)
    hypervisor.close()
    assert eight("stop vm-0 nobody").code == 64
    assert left_off(eight) == []
    assert eight("stop vm-0").out == "vm-0 is stopped already\n"
    assert left_off(eight) == ["vm-0"]


def test_stop_all_leaves_off_who_is_off_for_a_moment_too(eight: Host) -> None:
    eight("apply")
    hypervisor = SimulatedHypervisor(eight.root)
    hypervisor.shut_down("vm-0", hypervisor.domain("vm-0").uuid, 5, force=True)
    hypervisor.close()
    assert eight("stop --all").last == "Done: 7 stopped."
    assert left_off(eight) == [f"vm-{number}" for number in range(8)]


def test_what_could_not_be_stopped_is_not_left_off(eight: Host) -> None:
    eight("apply")
    assert eight("stop vm-0 --timeout 0").code == 1
    assert left_off(eight) == []


def test_a_deleted_vm_leaves_no_mark(eight: Host) -> None:
    eight("apply")
    eight("stop vm-0")
    eight.declare("version: 1\n")
    eight("apply --prune --restart")
    assert eight.root.names(STOPPED) == []


def test_the_unit_ends_before_the_vms_are_shut_down() -> None:
    """systemd stops in the reverse order of starting."""
    unit = configparser.ConfigParser()
    unit.read(UNIT)
    assert unit["Unit"]["ConditionKernelCommandLine"] == "dgx_kvm.mode=kvm"
    assert "dgx-kvm-guests.service" in unit["Unit"]["After"].split()
    assert unit["Service"]["ExecStart"] == "/usr/bin/dgx-kvm watch"
    assert unit["Service"]["Restart"] == "on-failure"
