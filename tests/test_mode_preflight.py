"""What KVM mode needs of a host, each condition taken away from one that has all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mode_host
import pytest
from mode_host import AMD, BMC, BRIDGE, DRIVE, GPU, HOST_NIC, NIC, NVSWITCH, ModeHost

from dgx_kvm_sw.host.preflight import preflight
from dgx_kvm_sw.model.mode import Check, Verdict

pytestmark = pytest.mark.commands

TABLES = "/sys/firmware/acpi/tables"
Change = Callable[[ModeHost], None]


@pytest.fixture
def host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> ModeHost:
    return mode_host.build(tmp_path / "host", capsys)


def unmet(host: ModeHost) -> list[Check]:
    return [check for check in preflight(host.root) if check.verdict is not Verdict.OK]


def test_a_dgx_as_delivered_meets_them_all(host: ModeHost) -> None:
    assert unmet(host) == []
    result = host("mode --check")
    assert result.code == 0
    assert "ok    GPUs                 2 GPUs and 1 NVSwitch\n" in result.out
    assert host("mode --check --json").json["possible"] is True


def test_an_emulated_host_may_have_an_amd_cpu_and_an_intel_iommu(host: ModeHost) -> None:
    host.write("/proc/cpuinfo", AMD)
    assert unmet(host) == []


def _amd(host: ModeHost) -> None:
    host.write("/proc/cpuinfo", AMD)
    mode_host.firmware(host, "IVRS", 0)


def test_so_does_one_with_amd_cpus(host: ModeHost) -> None:
    _amd(host)
    assert unmet(host) == []


def test_so_does_one_that_runs_in_kvm_mode(host: ModeHost) -> None:
    host.boot_kvm()
    assert unmet(host) == []


def _file(path: str, text: str) -> Change:
    return lambda host: host.write(path, text)


def _gone(path: str) -> Change:
    return lambda host: host.root.remove(path)


def _amd_without(path: str, text: str) -> Change:
    def change(host: ModeHost) -> None:
        _amd(host)
        host.root.remove(f"{TABLES}/IVRS") if path == "IVRS" else host.write(path, text)

    return change


def _no_gpus(host: ModeHost) -> None:
    for address in (GPU, mode_host.GPU_2):
        host.device(address, "0x10de 0x20b0 0x040300")


def _dmar(flags: int) -> Change:
    return lambda host: mode_host.firmware(host, "DMAR", flags)


def _short_table(host: ModeHost) -> None:
    host.root.path(f"{TABLES}/DMAR").write_bytes(b"DMAR")


def _unreadable_table(host: ModeHost) -> None:
    host.root.remove(f"{TABLES}/DMAR")
    host.root.path(f"{TABLES}/DMAR").mkdir()  # root may read any file


def _full_boot(host: ModeHost) -> None:
    """The largest image is larger than what is free; it takes no room itself."""
    with host.root.path("/boot/initrd.img-1").open("wb") as file:
        file.truncate(1 << 43)


def _not_remapped(host: ModeHost) -> None:
    host.boot_kvm()
    host.write("/sys/kernel/irq/24/chip_name", "PCI-MSI")


@pytest.mark.parametrize(
    ("change", "verdict", "name", "message", "hint"),
    [
        (_file("/proc/cpuinfo", mode_host.INTEL.replace("vmx", "")), "fail", "virtualization",
         "does not offer VT-x", "Intel Virtualization Technology (VT-x)"),
        (_amd_without("/proc/cpuinfo", AMD.replace("svm", "")), "fail", "virtualization",
         "does not offer SVM", "SVM Mode"),
        (_gone(f"{TABLES}/DMAR"), "fail", "IOMMU", "no ACPI table DMAR", "VT-d"),
        (_amd_without("IVRS", ""), "fail", "IOMMU", "no ACPI table IVRS", "AMD-Vi"),
        (_dmar(0), "fail", "interrupt remapping", "does not offer it", "Interrupt Remapping"),
        (_dmar(2), "fail", "interrupt remapping", "does not offer it", "Interrupt Remapping"),
        (_short_table, "fail", "interrupt remapping", "does not offer it", "Interrupt Remapping"),
        (_unreadable_table, "warn", "interrupt remapping", "cannot be read", "as root"),
        (_dmar(3), "warn", "interrupt remapping", "not to use x2APIC", "x2APIC"),
        (_not_remapped, "fail", "interrupt remapping", "not in use", "Interrupt Remapping"),
        (_gone("/usr/sbin/update-grub"), "fail", "GRUB", "there is no update-grub", "GRUB"),
        (_gone("/boot/grub/grub.cfg"), "fail", "GRUB", "no /boot/grub/grub.cfg", "GRUB"),
        (_gone("/usr/sbin/update-initramfs"), "fail", "initramfs", "no update-initramfs",
         "apt install initramfs-tools"),
        (_file("/etc/initramfs-tools/update-initramfs.conf", "# x\nupdate_initramfs=no\n"),
         "fail", "initramfs", "update_initramfs=no", "set it to yes"),
        (_full_boot, "warn", "room in /boot", "may take 8388608 MiB", "apt autoremove"),
        (_file(f"/lib/modules/{mode_host.RELEASE}/modules.dep", "kernel/x.ko:\n"), "fail",
         "vfio-pci", f"kernel {mode_host.RELEASE} has no module vfio-pci", "linux-modules-extra"),
        (_file("/etc/default/dgx-kvm", "DGX_KVM_FABRIC=mixed\n"), "fail", "kernel options",
         "is mixed", "choose passthrough or shared"),
        (_no_gpus, "fail", "GPUs", "no NVIDIA GPU", "lspci"),
    ],
)  # fmt: skip
def test_each_condition_that_is_not_met_is_named_with_what_to_do(
    change: Change, verdict: str, name: str, message: str, hint: str, host: ModeHost
) -> None:
    change(host)
    found = {check.name: check for check in unmet(host)}
    assert found[name].verdict == Verdict(verdict)
    assert message in found[name].message
    assert hint in found[name].hint
    result = host("mode --check")
    assert result.code == (1 if verdict == "fail" else 0)
    assert f"{verdict}  {name} " in result.out


def test_a_builtin_vfio_will_do(host: ModeHost) -> None:
    folder = f"/lib/modules/{mode_host.RELEASE}"
    host.root.remove(f"{folder}/modules.dep")
    host.write(f"{folder}/modules.builtin", "kernel/drivers/vfio/pci/vfio-pci.ko\n")
    assert unmet(host) == []


def test_initramfs_images_that_are_not_switched_off(host: ModeHost) -> None:
    host.write("/etc/initramfs-tools/update-initramfs.conf", "#update_initramfs=no\n")
    assert unmet(host) == []


# -- IOMMU groups -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "other"), [(GPU, HOST_NIC), (GPU, BMC), (NVSWITCH, HOST_NIC), (GPU, DRIVE)]
)
def test_a_gpu_that_shares_a_group_with_what_stays_is_refused_naming_both(
    device: str, other: str, host: ModeHost
) -> None:
    host.write("/etc/default/dgx-kvm", f"DGX_KVM_KEEP='{other}'\n")
    host.group(9, device, other)
    checks = [check for check in unmet(host) if check.name == "IOMMU groups"]
    assert [check.verdict for check in checks] == [Verdict.FAIL]
    assert device in checks[0].message
    assert other in checks[0].message
    assert "ACS" in checks[0].hint


@pytest.mark.parametrize("other", [BRIDGE, NIC, NVSWITCH])
def test_a_gpu_may_share_a_group_with_a_bridge_and_with_what_vms_get(
    other: str, host: ModeHost
) -> None:
    host.group(9, GPU, other)
    assert unmet(host) == []


def test_a_free_nic_beside_a_bad_pair_is_not_blamed(host: ModeHost) -> None:
    host.group(9, GPU, NIC, BMC)
    (check,) = unmet(host)
    assert BMC in check.message
    assert NIC not in check.message


def test_where_the_host_runs_the_fabric_an_nvswitch_stays(host: ModeHost) -> None:
    host.write("/etc/default/dgx-kvm", "DGX_KVM_FABRIC=shared\n")
    host.group(9, NVSWITCH)
    assert unmet(host) == []
    host.group(9, NVSWITCH, GPU)
    assert [check.name for check in unmet(host)] == ["IOMMU groups"]


def test_a_nic_that_stays_for_its_group_is_a_warning(host: ModeHost) -> None:
    host.group(9, NIC, BMC)
    (check,) = unmet(host)
    assert check.verdict is Verdict.WARN
    assert NIC in check.message
    assert BMC in check.message
    assert host("mode --check").code == 0


def test_a_drive_that_fstab_names_stays_and_is_no_warning(host: ModeHost) -> None:
    host.write("/etc/fstab", "/dev/nvme1n1 /raid ext4 defaults 0 2\n")
    assert unmet(host) == []
    assert "1 goes to VMs, 3 stay with the host" in host("mode --check").out


def test_what_the_host_uses_must_be_known(host: ModeHost) -> None:
    host.root.remove("/proc/net/route")
    (check,) = unmet(host)
    assert (check.name, check.verdict) == ("NICs and drives", Verdict.FAIL)
    assert "mount /proc" in check.hint


def test_quiet_names_only_what_fails(host: ModeHost) -> None:
    assert host("mode --check -q").out == ""
    host.root.remove(f"{TABLES}/DMAR")
    result = host("mode --check -q")
    assert (result.code, result.out) == (1, "")
    assert "dgx-kvm: IOMMU: VT-d is off" in result.err
