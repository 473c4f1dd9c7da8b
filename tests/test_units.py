"""Our systemd units: their order at boot and, the other way round, at shutdown."""

from __future__ import annotations

import configparser
from pathlib import Path

UNITS = Path(__file__).parents[1] / "debian/units"


def starts_after(name: str) -> set[str]:
    unit = configparser.ConfigParser()
    unit.read(UNITS / name)
    return set(unit["Unit"]["After"].split())


def test_vms_are_off_before_what_they_run_on_ends() -> None:
    needed = {"libvirtd.service", "virtqemud.service", "virtlogd.service"}
    assert needed <= starts_after("dgx-kvm-guests.service")


def test_no_vm_is_started_before_it_is_known_how_it_is_shut_down() -> None:
    for name in ("dgx-kvm.service", "dgx-kvm-watch.service"):
        assert "dgx-kvm-guests.service" in starts_after(name)
