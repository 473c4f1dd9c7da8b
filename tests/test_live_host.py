"""What the package asks of a host before it is installed on it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.commands

LIVE_HOST = Path(__file__).parents[1] / "debian/host/live-host"
DMAR = "sys/firmware/acpi/tables/DMAR"


def ask(root: Path, call: str) -> str:
    done = subprocess.run(
        ["sh", "-euc", f'. "$0"; {call}', LIVE_HOST],
        env={"DPKG_ROOT": str(root), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def write(root: Path, name: str, content: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def dmar(flags: int) -> bytes:
    """An ACPI table: 36 bytes of header, the width of addresses, the flags, 10 reserved bytes."""
    return b"DMAR" + bytes(32) + bytes([45, flags]) + bytes(10)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host on which nothing is to be complained about."""
    write(tmp_path, "proc/cpuinfo", b"vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx sse\n" * 2)
    write(tmp_path, DMAR, dmar(1))
    return tmp_path


def test_intel_host_in_order(host: Path) -> None:
    assert ask(host, "hardware_refusal") == ""


def test_amd_host_in_order(host: Path) -> None:
    write(host, "proc/cpuinfo", b"vendor_id\t: AuthenticAMD\nflags\t\t: fpu svm sse\n")
    (host / DMAR).unlink()
    write(host, "sys/firmware/acpi/tables/IVRS", b"IVRS")
    assert ask(host, "hardware_refusal") == ""


@pytest.mark.parametrize(
    ("vendor", "setting"),
    [("GenuineIntel", "Intel Virtualization Technology (VT-x)"), ("AuthenticAMD", "SVM Mode")],
)
def test_virtualization_switched_off(host: Path, vendor: str, setting: str) -> None:
    write(host, "proc/cpuinfo", f"vendor_id\t: {vendor}\nflags\t\t: fpu xvmx sse\n".encode())
    assert f'switch on "{setting}" in the firmware setup' in ask(host, "hardware_refusal")


@pytest.mark.parametrize(
    ("vendor", "flag", "setting"),
    [("GenuineIntel", "vmx", "Intel VT-d"), ("AuthenticAMD", "svm", "IOMMU (AMD-Vi)")],
)
def test_iommu_switched_off(host: Path, vendor: str, flag: str, setting: str) -> None:
    write(host, "proc/cpuinfo", f"vendor_id\t: {vendor}\nflags\t\t: {flag}\n".encode())
    (host / DMAR).unlink()
    assert f'switch on "{setting}" in the firmware setup' in ask(host, "hardware_refusal")


def test_interrupt_remapping_switched_off(host: Path) -> None:
    write(host, DMAR, dmar(2))  # X2APIC_OPT_OUT alone
    assert 'switch on "Interrupt Remapping"' in ask(host, "hardware_refusal")


def test_nvidia_devices_are_counted_by_class(host: Path) -> None:
    for address, vendor, code in (
        ("0000:07:00.0", "0x10de", "0x030200"),
        ("0000:08:00.0", "0x10de", "0x030000"),
        ("0000:c1:00.0", "0x10de", "0x068000"),
        ("0000:03:00.0", "0x1a03", "0x030000"),
    ):
        folder = f"sys/bus/pci/devices/{address}"
        write(host, f"{folder}/vendor", f"{vendor}\n".encode())
        write(host, f"{folder}/class", f"{code}\n".encode())
    assert ask(host, "count_nvidia 0x0302 0x0300") == "2"
    assert ask(host, "count_nvidia 0x0680") == "1"


def test_root_directory_of_another_system_is_no_live_host(host: Path) -> None:
    assert ask(host, "if live_host; then echo live; else echo not; fi") == "not"
