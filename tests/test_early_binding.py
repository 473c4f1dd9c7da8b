"""The initramfs script that gives devices to vfio-pci, and the hook that packs what it needs.

Each attribute of the small /sys here keeps all that was written to it, a line a write.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.commands

SHIPPED = Path(__file__).parents[1] / "debian/host"
KVM = "root=UUID=1 ro dgx_kvm.mode=kvm iommu=pt"
GPU, NVSWITCH, DISPLAY = "0000:07:00.0", "0000:c1:00.0", "0000:08:00.0"
NIC, BOOT_DRIVE, DRIVE, BMC = "0000:05:00.0", "0000:80:00.0", "0000:81:00.0", "0000:03:00.0"
DEVICES = {
    BMC: ("0x1a03", "0x2000", "0x030000"),
    NIC: ("0x15b3", "0x101b", "0x020700"),
    GPU: ("0x10de", "0x20b0", "0x030200"),
    DISPLAY: ("0x10de", "0x1fb0", "0x030000"),
    "0000:08:00.1": ("0x10de", "0x10fa", "0x040300"),
    BOOT_DRIVE: ("0x144d", "0xa824", "0x010802"),
    DRIVE: ("0x144d", "0xa824", "0x010802"),
    NVSWITCH: ("0x10de", "0x1af1", "0x068000"),
}
MODPROBES = ["modprobe vfio-pci", "modprobe vfio_iommu_type1"]
LIST = "".join(f"{address} {' '.join(DEVICES[address])}\n" for address in (NIC, DRIVE))


@dataclass
class Initramfs:
    root: Path

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def lines(self, name: str) -> list[str]:
        return (self.root / name).read_text().splitlines()

    def boot(self, words: str = KVM) -> list[str]:
        """Run the script; return what was probed."""
        self.write("proc/cmdline", f"{words}\n")
        done = subprocess.run(
            ["sh", self.root / "dgx-kvm"],
            env={"DGX_KVM_ROOT": str(self.root), "PATH": f"{self.root}/programs:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        return self.lines("sys/bus/pci/drivers_probe")

    def overridden(self) -> list[str]:
        devices = self.root / "sys/bus/pci/devices"
        return [
            address
            for address in sorted(os.listdir(devices))
            if (devices / address / "driver_override").read_text() == "vfio-pci\n"
        ]


@pytest.fixture
def initramfs(tmp_path: Path) -> Initramfs:
    initramfs = Initramfs(tmp_path)
    for address, (vendor, device, code) in DEVICES.items():
        folder = f"sys/bus/pci/devices/{address}"
        for name, value in (("vendor", vendor), ("device", device), ("class", code)):
            initramfs.write(f"{folder}/{name}", f"{value}\n")
        initramfs.write(f"{folder}/driver_override", "")
    initramfs.write("sys/bus/pci/drivers_probe", "")
    initramfs.write("dev/kmsg", "")
    initramfs.write("etc/dgx-kvm/devices", LIST)
    initramfs.write("dgx-kvm", (SHIPPED / "init-top").read_text())
    # modprobe must come first: a probe without the driver binds nothing.
    modprobe = f"#!/bin/sh\necho modprobe $* >>{tmp_path}/sys/bus/pci/drivers_probe\n"
    initramfs.write("programs/modprobe", modprobe).chmod(0o755)
    return initramfs


def test_gpus_and_nvswitches_by_class_the_rest_by_the_list(initramfs: Initramfs) -> None:
    given = [GPU, DISPLAY, NVSWITCH, NIC, DRIVE]
    assert initramfs.boot() == [*MODPROBES, *given]
    assert initramfs.overridden() == sorted(given)


@pytest.mark.parametrize("words", ["ro quiet", "xdgx_kvm.mode=kvm", "dgx_kvm.mode=kvm2"])
def test_without_the_word_nothing_happens(initramfs: Initramfs, words: str) -> None:
    assert initramfs.boot(words) == []
    assert initramfs.overridden() == []
    assert initramfs.lines("dev/kmsg") == []


def test_shared_fabric_keeps_the_nvswitches(initramfs: Initramfs) -> None:
    initramfs.boot(f"{KVM} dgx_kvm.nvswitch=host")
    assert initramfs.overridden() == sorted([GPU, DISPLAY, NIC, DRIVE])


@pytest.mark.parametrize("attribute", ["vendor", "device", "class"])
def test_another_device_at_the_address_is_left_alone(initramfs: Initramfs, attribute: str) -> None:
    initramfs.write(f"sys/bus/pci/devices/{NIC}/{attribute}", "0xabcd\n")
    assert NIC not in initramfs.boot()
    assert DRIVE in initramfs.overridden()
    words = f"dgx-kvm: {NIC} is not the device of the list (0x15b3 0x101b 0x020700); left alone"
    assert words in initramfs.lines("dev/kmsg")


def test_absent_device_does_not_stop_the_others(initramfs: Initramfs) -> None:
    absent = "0000:ff:00.0 0x15b3 0x101b 0x020700"
    initramfs.write("etc/dgx-kvm/devices", f"{absent}\n{LIST}")
    assert initramfs.boot()[-2:] == [NIC, DRIVE]
    assert f"dgx-kvm: {absent.split()[0]} is not" in "".join(initramfs.lines("dev/kmsg"))


def test_device_of_a_built_in_driver_is_unbound_first(initramfs: Initramfs) -> None:
    unbind = f"sys/bus/pci/devices/{DRIVE}/driver/unbind"
    initramfs.write(unbind, "")
    initramfs.boot()
    assert initramfs.lines(unbind) == [DRIVE]
    assert DRIVE not in "".join(initramfs.lines("dev/kmsg"))


def test_device_left_without_driver_is_reported(initramfs: Initramfs) -> None:
    initramfs.boot()
    words = f"dgx-kvm: {GPU} has no driver; is vfio-pci in this initramfs?"
    assert words in initramfs.lines("dev/kmsg")


def test_missing_module_is_reported_and_the_boot_goes_on(initramfs: Initramfs) -> None:
    initramfs.write("programs/modprobe", "#!/bin/sh\nexit 1\n")
    assert initramfs.boot() == [GPU, DISPLAY, NVSWITCH, NIC, DRIVE]
    assert "dgx-kvm: vfio-pci cannot be loaded" in initramfs.lines("dev/kmsg")


def test_image_without_a_list_binds_by_class(initramfs: Initramfs) -> None:
    (initramfs.root / "etc/dgx-kvm/devices").unlink()
    assert initramfs.boot() == [*MODPROBES, GPU, DISPLAY, NVSWITCH]


@pytest.mark.parametrize("name", ["init-top", "initramfs-hook"])
def test_initramfs_tools_may_ask_for_prerequisites(name: str) -> None:
    """They are asked without the environment of a build or a boot."""
    done = subprocess.run(
        ["sh", SHIPPED / name, "prereqs"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


# --- the hook


def run_hook(root: Path) -> Path:
    functions = root / "usr/share/initramfs-tools/hook-functions"
    functions.parent.mkdir(parents=True)
    functions.write_text('manual_add_modules() { echo "$@" >>"$DESTDIR/modules"; }\n')
    image = root / "image"
    image.mkdir()
    script = image / "scripts/init-top/dgx-kvm"  # mkinitramfs has copied it before
    script.parent.mkdir(parents=True)
    shutil.copy(SHIPPED / "init-top", script)
    environment = {"DPKG_ROOT": str(root), "DESTDIR": str(image), "PATH": "/usr/bin:/bin"}
    subprocess.run(["sh", SHIPPED / "initramfs-hook"], env=environment, check=True)
    return image


def test_image_of_an_armed_host_keeps_script_and_gets_module_and_list(tmp_path: Path) -> None:
    devices = tmp_path / "var/lib/dgx-kvm/devices"
    devices.parent.mkdir(parents=True)
    devices.write_text(LIST)
    image = run_hook(tmp_path)
    assert (image / "etc/dgx-kvm/devices").read_text() == LIST
    assert (image / "modules").read_text() == "vfio-pci vfio_iommu_type1\n"
    assert os.access(image / "scripts/init-top/dgx-kvm", os.X_OK)


def test_image_of_another_host_gets_nothing(tmp_path: Path) -> None:
    assert not [path for path in run_hook(tmp_path).rglob("*") if path.is_file()]
