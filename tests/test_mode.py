"""Who holds the GPUs, and what a boot in KVM mode left to do, on a small DGX of files."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import mode_host
import pytest
from mode_host import (
    BOOT_DRIVE,
    DRIVE,
    FOR_VMS,
    GPU,
    GPU_2,
    HOST_NIC,
    IDS,
    KVM,
    NIC,
    NVSWITCH,
    VFIO_IOMMU,
    ModeHost,
)

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.cli.modeview import held_texts
from dgx_kvm_sw.host import verify
from dgx_kvm_sw.host.holders import holders
from dgx_kvm_sw.host.platforms import survey
from dgx_kvm_sw.model.mode import Process

OVERRIDE = f"/sys/bus/pci/devices/{GPU}/driver_override"


@pytest.fixture
def host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> ModeHost:
    return mode_host.build(tmp_path / "host", capsys)


@pytest.fixture
def booted(host: ModeHost) -> ModeHost:
    host.boot_kvm()
    return host


def held(host: ModeHost) -> list[str]:
    _, topology = survey(host.root)
    return held_texts(holders(host.root, topology).devices)


def processes(host: ModeHost) -> dict[str, tuple[Process, ...]]:
    _, topology = survey(host.root)
    found = holders(host.root, topology)
    return {str(each.address): each.processes for each in found.devices}


def on_bare_metal(host: ModeHost) -> None:
    """The nvidia driver numbers its device nodes in an order of its own."""
    for address, minor in ((GPU, 1), (GPU_2, 0)):
        path = f"/proc/driver/nvidia/gpus/{address}/information"
        host.write(path, f"Model: \t V100\nDevice Minor: \t {minor}\n")
    host.write(f"/proc/driver/nvidia-nvswitch/devices/{NVSWITCH}/information", "BIOS: 1\n")


# -- who holds what -----------------------------------------------------------------------------


def test_a_process_is_found_by_the_minor_of_the_gpu_it_has_open(host: ModeHost) -> None:
    on_bare_metal(host)
    host.process(812, "python3", "/dev/nvidiactl", "/dev/nvidia1", "/dev/nvidia1")
    assert processes(host) == {GPU: (Process(812, "python3"),), GPU_2: (), NVSWITCH: ()}


def test_a_process_is_found_at_an_nvswitch(host: ModeHost) -> None:
    on_bare_metal(host)
    host.process(900, "nv-fabricmanager", "/dev/nvidia-nvswitchctl", "/dev/nvidia-nvswitch0")
    assert processes(host)[NVSWITCH] == (Process(900, "nv-fabricmanager"),)


def test_a_vm_is_found_by_the_group_it_has_open(booted: ModeHost) -> None:
    group = booted.root.link_name(f"/sys/bus/pci/devices/{GPU}/iommu_group")
    words = "\0".join(("/usr/bin/qemu-system-x86_64", "-name", "guest=hr-train,debug-threads=on"))
    booted.process(77, "qemu-system-x86", "/dev/vfio/vfio", f"/dev/vfio/{group}", cmdline=words)
    booted.process(78, "qemu-system-x86", f"/dev/vfio/{group}1")  # another group's
    found = processes(booted)
    assert found[GPU] == (Process(77, "qemu-system-x86", "hr-train"),)
    assert found[GPU_2] == ()


def test_a_vm_is_found_by_the_device_that_iommufd_opens(booted: ModeHost) -> None:
    booted.root.path(f"/sys/bus/pci/devices/{GPU_2}/vfio-dev/vfio3").mkdir(parents=True)
    booted.process(77, "qemu-system-x86", "/dev/iommu", "/dev/vfio/devices/vfio3")
    assert processes(booted)[GPU_2] == (Process(77, "qemu-system-x86"),)


def test_what_vanishes_or_hides_is_no_error(host: ModeHost) -> None:
    on_bare_metal(host)
    host.process(5, "shell", "/dev/nvidia0")
    host.root.path("/proc/6").mkdir()  # ended: its fd is gone
    host.write("/proc/7", "")
    host.write("/proc/8/fd/3", "a file that is no link\n")
    found = holders(host.root, survey(host.root)[1])
    assert found.complete
    assert [process.pid for each in found.devices for process in each.processes] == [5]


@pytest.mark.commands
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become nobody")
def test_processes_of_others_are_known_to_be_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are root's alone
        tree = mode_host.program_for_everybody(Path(folder))
        host = mode_host.build(Path(folder) / "host", capsys)
        on_bare_metal(host)
        host.process(5, "shell", "/dev/nvidia0")
        host.root.path("/proc/5/fd").chmod(0o700)
        program = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "from dgx_kvm_sw.access.files import Root\n"
            "from dgx_kvm_sw.host import holders, platforms\n"
            "root = Root(sys.argv[2])\n"
            "print(holders.holders(root, platforms.survey(root)[1]).complete)"
        )
        words = ["/usr/bin/python3", "-c", program, str(tree), str(host.root.directory)]
        for user, complete in ((0, "True\n"), (65534, "False\n")):
            done = subprocess.run(
                words, user=user, cwd="/", capture_output=True, text=True, check=True, timeout=60
            )
            assert done.stdout == complete


def test_devices_that_are_held_alike_share_a_line(host: ModeHost) -> None:
    on_bare_metal(host)
    assert held(host) == ["2 GPUs: nvidia driver", "1 NVSwitch: nvidia-nvswitch driver"]
    host.process(812, "nvidia-persistenced", "/dev/nvidia0", "/dev/nvidia1")
    assert held(host)[0] == "2 GPUs: nvidia driver; held by nvidia-persistenced (812)"
    host.process(813, "python3", "/dev/nvidia0")
    host.bind(NVSWITCH, None)
    assert held(host) == [
        "GPU 0: nvidia driver; held by nvidia-persistenced (812)",
        "GPU 1: nvidia driver; held by nvidia-persistenced (812), python3 (813)",
        "1 NVSwitch: no driver",
    ]


def test_sixteen_gpus_are_one_line(machine: Callable[[str], Root]) -> None:
    _, topology = survey(machine("dgx2"))
    texts = held_texts(holders(machine("dgx2"), topology).devices)
    assert texts == ["16 GPUs, 12 NVSwitches: vfio-pci driver"]


# -- verify -------------------------------------------------------------------------------------


def troubles(host: ModeHost) -> list[str]:
    return [str(trouble) for trouble in verify.verify(host.root)]


def test_all_is_well_after_a_boot_in_kvm_mode(booted: ModeHost) -> None:
    assert troubles(booted) == []
    assert booted.root.read(OVERRIDE) == "(null)"  # nothing was touched


@pytest.mark.parametrize("address", FOR_VMS)
def test_a_device_that_another_driver_has_is_named_and_left_alone(
    address: str, booted: ModeHost
) -> None:
    booted.bind(address, "stray")
    (trouble,) = troubles(booted)
    assert f"{address} is held by the driver stray, not vfio-pci" in trouble
    assert "update-initramfs -u -k all" in trouble
    assert booted.root.read(f"/sys/bus/pci/devices/{address}/driver_override") == "(null)"


def test_devices_of_the_host_may_have_any_driver(booted: ModeHost) -> None:
    booted.bind(HOST_NIC, None)
    booted.bind(BOOT_DRIVE, "nvme")
    assert troubles(booted) == []


class Kernel(Root):
    """A root whose drivers_probe binds, as the kernel's does."""

    def put(self, absolute: str, text: str) -> None:
        super().put(absolute, text)
        device = f"/sys/bus/pci/devices/{text}"
        if absolute.endswith("/drivers_probe") and self.exists(device):
            driver = self.read(f"{device}/driver_override")
            self.path(f"{device}/driver").symlink_to(f"../../drivers/{driver}")


def test_a_device_without_a_driver_is_given_to_vfio(booted: ModeHost) -> None:
    booted.bind(GPU, None)
    booted.bind(DRIVE, None)
    kernel = Kernel(booted.root.directory)
    assert verify.verify(kernel) == ()
    assert kernel.link_name(f"/sys/bus/pci/devices/{GPU}/driver") == "vfio-pci"
    assert kernel.link_name(f"/sys/bus/pci/devices/{DRIVE}/driver") == "vfio-pci"
    assert verify.verify(kernel) == ()


def test_a_device_that_vfio_does_not_take_is_named(booted: ModeHost) -> None:
    booted.bind(GPU, None)
    (trouble,) = troubles(booted)
    assert f"GPU {GPU} has no driver, and vfio-pci did not take it" in trouble
    assert booted.root.read(OVERRIDE) == "vfio-pci"
    assert booted.root.read("/sys/bus/pci/drivers_probe") == GPU
    booted.root.remove(OVERRIDE)
    assert "cannot write" in troubles(booted)[0]


@pytest.mark.commands
def test_vfio_is_loaded_where_the_boot_image_lacked_it(
    booted: ModeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in FOR_VMS:
        booted.bind(address, None)
    booted.root.path("/sys/bus/pci/drivers/vfio-pci").rmdir()
    drivers = booted.root.path("/sys/bus/pci/drivers")
    booted.program("modprobe", f'#!/bin/sh\nmkdir "{drivers}/$1"\n')
    folder = booted.root.path("/usr/sbin")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    assert verify.verify(Kernel(booted.root.directory)) == ()
    assert (drivers / "vfio-pci").is_dir()


@pytest.mark.commands
def test_kvm_is_loaded_before_libvirt_looks_for_it(
    booted: ModeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    booted.root.remove("/dev/kvm")
    monkeypatch.setenv("PATH", f"{booted.root.path('/usr/sbin')}:{os.environ['PATH']}")
    booted.program("modprobe", "#!/bin/sh\nexit 1\n")
    (trouble,) = troubles(booted)
    assert trouble.startswith("there is no /dev/kvm, so no VM can start: see what `modprobe kvm_")
    booted.program("modprobe", f"#!/bin/sh\n: >{booted.root.path('/dev/kvm')}\n")
    assert troubles(booted) == []


@pytest.mark.commands
def test_without_vfios_iommu_driver_no_vm_starts(
    booted: ModeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = booted.root.path(VFIO_IOMMU)
    folder.rmdir()
    monkeypatch.setenv("PATH", f"{booted.root.path('/usr/sbin')}:{os.environ['PATH']}")
    booted.program("modprobe", "#!/bin/sh\nexit 1\n")
    (trouble,) = troubles(booted)
    assert trouble.startswith("the module vfio_iommu_type1 is not loaded")
    booted.program("modprobe", f'#!/bin/sh\nmkdir "{folder}"\n')
    assert troubles(booted) == []


def test_where_the_host_runs_the_fabric_nvswitches_and_nvidia_stay(booted: ModeHost) -> None:
    booted.boot_kvm(words=f"{KVM} dgx_kvm.nvswitch=host")
    booted.bind(NVSWITCH, "nvidia-nvswitch")
    booted.write("/proc/modules", "nvidia 1 0 - Live 0x0\n")
    assert troubles(booted) == []
    booted.bind(GPU, "nvidia")
    assert len(troubles(booted)) == 1


def test_a_listed_device_that_is_gone_is_named(booted: ModeHost) -> None:
    booted.write("/var/lib/dgx-kvm/devices", f"0000:99:00.0 {IDS[NIC]}\n")
    (trouble,) = troubles(booted)
    assert trouble.startswith("InfiniBand NIC 0000:99:00.0 is gone from the PCI bus: ")


def test_another_device_at_a_listed_address_is_named_and_left_to_the_host(
    booted: ModeHost,
) -> None:
    booted.device(DRIVE, "0x144d 0xffff 0x010802")
    booted.bind(DRIVE, None)
    (trouble,) = troubles(booted)
    assert f"{DRIVE} is another device now: 0x144d 0xffff 0x010802, not" in trouble
    override = booted.root.read(f"/sys/bus/pci/devices/{DRIVE}/driver_override")
    assert override == "(null)"


def test_without_groups_no_device_can_be_given_away(booted: ModeHost) -> None:
    for group in booted.root.names("/sys/kernel/iommu_groups"):
        booted.root.path(f"/sys/kernel/iommu_groups/{group}").rename(
            booted.root.path(f"/proc/{group}-gone")
        )
    (trouble,) = troubles(booted)
    assert "there are no IOMMU groups" in trouble


def test_a_group_shared_with_the_host_is_named(booted: ModeHost) -> None:
    booted.group(50, GPU, HOST_NIC)
    (trouble,) = troubles(booted)
    assert f"GPU {GPU} shares IOMMU group 50 with NIC {HOST_NIC}, which stays" in trouble


def test_interrupts_that_are_not_remapped_are_a_trouble(booted: ModeHost) -> None:
    booted.write("/sys/kernel/irq/24/chip_name", "PCI-MSI\n")
    (trouble,) = troubles(booted)
    assert "interrupt remapping is not in use" in trouble


@pytest.mark.parametrize("module", ["nvidia", "nouveau"])
def test_a_driver_that_should_have_stayed_out_is_named(module: str, booted: ModeHost) -> None:
    booted.write("/proc/modules", f"{module} 1 0 - Live 0x0\nnvidia_x 1 0 - Live 0x0\n")
    (trouble,) = troubles(booted)
    assert f"the module {module} is loaded" in trouble


@pytest.mark.parametrize(
    ("words", "there", "missing"),
    [
        ("default_hugepagesz=1G hugepagesz=1G hugepages=8", "8", ""),
        ("default_hugepagesz=1G hugepagesz=1G hugepages=8", "5", "5 of 8"),
        ("hugepagesz=1G hugepages=0:4,1:4", "7", "7 of 8"),
        ("default_hugepagesz=1G hugepages=8", "0", "0 of 8"),
        ("hugepagesz=2M hugepages=512", "0", ""),
        ("hugepagesz=1G hugepages=8 hugepagesz=2M hugepages=512", "8", ""),
        ("hugepages=512", "0", ""),
        ("", "0", ""),
    ],
)
def test_huge_pages_that_were_asked_for_are_counted(
    words: str, there: str, missing: str, booted: ModeHost
) -> None:
    booted.boot_kvm(words=f"{KVM} {words}")
    booted.write("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", f"{there}\n")
    found = troubles(booted)
    assert len(found) == bool(missing)
    assert all(f"{missing} huge pages of 1 GiB are there" in trouble for trouble in found)


def test_verify_tells_whoever_asks_and_forgets_when_all_is_well(booted: ModeHost) -> None:
    booted.bind(GPU, "nvidia")
    booted.bind(NIC, "mlx5_core")
    result = booted("mode --verify")
    assert (result.code, result.out) == (1, "")
    lines = booted.root.read("/run/dgx-kvm/problems").splitlines()
    assert len(lines) == 2
    assert result.err.splitlines() == [f"dgx-kvm: {line}" for line in lines]
    assert booted.root.read("/run/motd.d/dgx-kvm") == (
        "dgx-kvm: 2 problems after boot in KVM mode; see: dgx-kvm mode"
    )
    booted.boot_kvm()
    well = booted("mode --verify")
    assert (well.code, well.err) == (0, "")
    assert not booted.root.exists("/run/dgx-kvm/problems")
    assert not booted.root.exists("/run/motd.d/dgx-kvm")


def test_a_bare_metal_boot_has_nothing_to_verify(host: ModeHost) -> None:
    result = host("mode --verify")
    assert (result.code, result.out) == (0, "this boot is bare metal: there is nothing to verify\n")
    assert host.root.read(OVERRIDE) == "(null)"
