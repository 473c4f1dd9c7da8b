"""What VMs say of their hardware, as the story reads it."""

from __future__ import annotations

import pytest

from lab import report

PORTS = "pci0000:fb/0000:fb:00.0/0000:fc:00.0/0000:fd"
SAID = f"""\
lab-guest: cpus 2, cores 0 1
lab-guest: node 0: cpus 0, 234000 kB, distances 10 20
lab-guest: node 1: cpus 1, 230000 kB, distances 20 10
lab-guest: pci 0000:01:00.0 1af4:1041 class 020000 node -1 below pci0000:00/0000:00:02.0
lab-guest: pci 0000:fc:00.0 104c:8232 class 060400 node 0 below pci0000:fb/0000:fb:00.0
lab-guest: pci 0000:fe:00.0 10de:1db8 class 030200 node 0 below {PORTS}:00.0 chip 0x140000A1
"""
NIC = "lab-guest: pci 0000:ff:00.0 8086:10c9 class 020000 node 0 below "


def given(said: str) -> list[report.Seen]:
    return [one for one in report.devices(said) if one.id in ("10de:1db8", "8086:10c9")]


def test_devices_have_their_id_kind_and_place() -> None:
    *_, gpu = report.devices(SAID)
    assert gpu == report.Seen("0000:fe:00.0", "10de:1db8", report.GPU, f"{PORTS}:00.0")
    assert gpu.switch == "pci0000:fb/0000:fb:00.0/0000:fc:00.0"
    assert len(report.devices(SAID)) == 3


def test_hardware_is_cpus_and_devices() -> None:
    kinds = [line.split()[0] for line in report.hardware(f"GRUB\r\n{SAID}")]
    assert kinds == ["cpus", "pci", "pci", "pci"]
    assert report.hardware(SAID.replace("\n", "\r\n")) == report.hardware(SAID)
    assert report.hardware(SAID.replace("104c:8232", "104c:8233")) != report.hardware(SAID)


def test_memory_is_that_of_all_nodes() -> None:
    assert report.memory_kib(SAID) == 464000


@pytest.mark.parametrize(("place", "far"), [
    (f"{PORTS}:01.0", []),
    ("pci0000:f0/0000:f0:00.0/0000:f1:00.0/0000:f2:00.0", ["0000:ff:00.0"]),  # another switch
    ("pci0000:fb/0000:fb:01.0", ["0000:ff:00.0"]),  # a root port of the same bus
])  # fmt: skip
def test_a_nic_is_beside_a_gpu_on_the_same_switch(place: str, far: list[str]) -> None:
    assert report.far_nics(given(f"{SAID}{NIC}{place}\n")) == far


def test_a_gpu_on_a_root_port_has_nothing_beside_it() -> None:
    said = SAID.replace(f"{PORTS}:00.0", "pci0000:fb/0000:fb:00.0")
    assert report.far_nics(given(f"{said}{NIC}pci0000:fb/0000:fb:01.0\n")) == ["0000:ff:00.0"]
