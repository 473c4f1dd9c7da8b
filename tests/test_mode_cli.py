"""`dgx-kvm mode`: what it says and switches, with the shipped scripts on a small DGX of files."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import mode_host
import pytest
from commandline import DGX_KVM, Host
from mode_host import DRIVE, GPU, IDS, NIC, WORDS, ModeHost

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.host import mode as host_mode
from dgx_kvm_sw.model.errors import ExitCode, HostError
from dgx_kvm_sw.model.mode import Mode

pytestmark = pytest.mark.commands

BLACKLIST = "module_blacklist=nvidia,nvidia_drm,nvidia_modeset,nvidia_uvm,nouveau"
GRUB_CFG = "/boot/grub/grub.cfg"
OURS = "<metadata><dgx-kvm:vm xmlns:dgx-kvm='urn:dgx-kvm:vm:1' version='1'></dgx-kvm:vm></metadata>"


@pytest.fixture
def host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> ModeHost:
    host = mode_host.build(tmp_path / "host", capsys)
    monkeypatch.setenv("PATH", f"{host.root.path('/usr/sbin')}:{os.environ['PATH']}")
    return host


@pytest.fixture
def booted(host: ModeHost) -> ModeHost:
    """Armed, and booted so."""
    assert host("mode kvm -q").code == 0
    host.boot_kvm(words=f"{mode_host.BARE} {WORDS} {BLACKLIST}")
    return host


def boots_kvm(host: ModeHost) -> bool:
    return "dgx_kvm.mode=kvm" in host.root.read(GRUB_CFG)


# -- showing ------------------------------------------------------------------------------------


def test_bare_metal_with_all_that_a_switch_would_change(host: ModeHost) -> None:
    host.write(f"/proc/driver/nvidia/gpus/{GPU}/information", "Device Minor: 0\n")
    host.process(812, "nvidia-persistenced", "/dev/nvidia0")
    text = host("mode").out
    assert text == (
        "This boot: bare metal\n"
        "Next boot: bare metal\n"
        "\n"
        "Held now\n"
        "  GPU 0: nvidia driver; held by nvidia-persistenced (812)\n"
        "  GPU 1: nvidia driver\n"
        "  1 NVSwitch: nvidia-nvswitch driver\n"
        "\n"
        "To VMs in KVM mode, beside the GPUs\n"
        "  0000:05:00.0  NIC ib0\n"
        "  0000:81:00.0  NVMe drive nvme1n1\n"
        "\n"
        "Stay with the host\n"
        "  0000:06:00.0  NIC eno1            eno1 has an address or a route\n"
        "  0000:80:00.0  NVMe drive nvme0n1  nvme0n1 is mounted, in fstab or swap\n"
        "\n"
        "KVM mode would change\n"
        f"  kernel words  {WORDS}\n"
        f"                {BLACKLIST}\n"
        "  do not start  nvidia-persistenced, nvsm-core\n"
        "  to switch     dgx-kvm mode kvm, then reboot; `dgx-kvm mode --check` says whether this"
        " host can\n"
    )


def test_kvm_mode_with_the_way_back_and_what_went_wrong(booted: ModeHost) -> None:
    booted.write("/run/dgx-kvm/problems", "GPU 3 is odd: look at it\n")
    text = booted("mode").out
    assert text.startswith("This boot: KVM mode\nNext boot: KVM mode\n")
    assert "Problems after this boot\n  GPU 3 is odd: look at it\n" in text
    assert "In KVM mode\n  kernel words" in text
    assert "to go back    dgx-kvm mode bare-metal, then reboot\n" in text
    found = booted("mode --json").json
    assert (found["booted"], found["configured"], found["reboot_needed"]) == ("kvm", "kvm", False)
    assert found["armed"] == found["assignable"] == [NIC, DRIVE]
    assert found["problems"] == ["GPU 3 is odd: look at it"]
    assert found["held"][0]["driver"] == "vfio-pci"
    assert found["gated_units"] == ["nvidia-persistenced.service", "nvsm-core.service"]


def test_a_list_that_would_differ_now_is_shown(booted: ModeHost) -> None:
    booted.write("/var/lib/dgx-kvm/devices", f"{DRIVE} {IDS[DRIVE]}\n")
    booted.write("/etc/default/dgx-kvm", f"DGX_KVM_KEEP={DRIVE}\n")
    text = booted("mode").out
    assert f"  InfiniBand NIC {NIC} could go to VMs too\n" in text
    assert f"  NVMe drive {DRIVE} is in use now\n" in text


def test_a_switch_that_was_cut_off_is_shown(booted: ModeHost) -> None:
    booted.write(GRUB_CFG, booted.root.read(GRUB_CFG).replace("dgx_kvm.mode=kvm", ""))
    assert "\nUnfinished: grub.cfg does not boot kvm yet; run" in booted("mode").out
    assert "grub.cfg" in booted("mode --json").json["unfinished"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become nobody")
def test_who_may_not_read_grub_cfg_hears_nothing_wrong_of_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are root's alone
        program = str(mode_host.program_for_everybody(Path(folder)) / "bin/dgx-kvm")
        host = mode_host.build(Path(folder) / "host", capsys)
        monkeypatch.setenv("PATH", f"{host.root.path('/usr/sbin')}:{os.environ['PATH']}")
        assert host("mode kvm -q").code == 0
        host.root.path(GRUB_CFG).chmod(0o600)
        words = [program, "--root", str(host.root.directory), "mode"]
        done = subprocess.run(
            words, user=65534, cwd="/", capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("This boot: bare metal\nNext boot: KVM mode; reboot")
        assert "Unfinished" not in done.stdout


def test_settings_that_are_wrong_are_a_note(host: ModeHost) -> None:
    host.write("/etc/default/dgx-kvm", "DGX_KVM_FABRIC=mixed\n")
    result = host("mode")
    assert result.code == 0
    assert "is mixed: choose passthrough or shared" in " ".join(result.out.split())


def test_what_another_program_exported_leads_no_script_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DPKG_ROOT", "/nonexistent")
    assert host_mode.status(Root()).booted is Mode.BARE_METAL
    assert host_mode._environment(Root()) == {"DPKG_ROOT": "", "DGX_KVM_ROOT": ""}


def test_quiet_says_nothing(host: ModeHost) -> None:
    assert host("mode -q") == host("mode --check -q")
    assert host("mode -q").out == ""


# -- switching ----------------------------------------------------------------------------------


def test_there_and_back_again(host: ModeHost) -> None:
    before = host.root.read(GRUB_CFG)
    there = host("mode kvm")
    assert (there.code, there.err) == (0, "")
    assert there.out == (
        "The next boot is set to KVM mode: it gives 2 GPUs, 1 NVSwitch, 1 NIC and 1 NVMe drive"
        " to VMs.\n"
        "Until then nothing changes. When it suits: reboot\n"
        "To go back: dgx-kvm mode bare-metal\n"
    )
    assert boots_kvm(host)
    assert "Next boot: KVM mode; reboot to get there\n" in host("mode").out
    back = host("mode bare-metal")
    assert (back.code, back.out) == (0, "This host is in the mode asked for: bare metal."
                                        " No reboot is needed.\n")  # fmt: skip
    assert "linux\t/boot/vmlinuz root=UUID=1 ro quiet\n" in host.root.read(GRUB_CFG)
    assert before.splitlines()[1] == host.root.read(GRUB_CFG).splitlines()[1]


@pytest.mark.parametrize(("option", "shown"), [("--debug", True), ("--quiet", False)])
def test_what_the_script_says_on_its_way_is_shown_unless_quiet(
    option: str, shown: bool, host: ModeHost
) -> None:
    words = [DGX_KVM, "--root", str(host.root.directory), "mode", "kvm", option]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert ("update-grub at work\n" in done.stderr) is shown
    assert bool(done.stdout) is shown


def test_back_from_a_boot_in_kvm_mode(booted: ModeHost) -> None:
    back = booted("mode bare-metal")
    assert back.out == (
        "The next boot is set to bare metal: it keeps all devices with the host.\n"
        "Until then nothing changes. When it suits: reboot\n"
        "To go back: dgx-kvm mode kvm\n"
    )
    assert not boots_kvm(booted)


def test_the_mode_it_has_already_is_no_error(host: ModeHost) -> None:
    assert host("mode bare-metal").out == (
        "This host is already in the mode asked for: bare metal. No reboot is needed.\n"
    )
    assert host.root.exists("/var/lib/dgx-kvm/disarmed")  # the wish is remembered all the same
    host("mode kvm -q")
    image = host.root.path("/boot/initrd.img").stat().st_mtime_ns
    again = host("mode kvm")
    assert again.out.startswith("The next boot is already set to KVM mode: it gives 2 GPUs")
    assert host.root.path("/boot/initrd.img").stat().st_mtime_ns == image


def test_a_switch_that_was_cut_off_is_finished_by_the_same_command(booted: ModeHost) -> None:
    booted.write(GRUB_CFG, booted.root.read(GRUB_CFG).replace("dgx_kvm.mode=kvm", ""))
    assert booted("mode kvm").code == 0
    assert boots_kvm(booted)


def test_arming_again_takes_over_what_has_changed(booted: ModeHost) -> None:
    booted.write("/etc/default/dgx-kvm", f"DGX_KVM_KEEP={DRIVE}\n")
    again = booted("mode kvm")
    assert again.out.startswith(
        "The next boot is already set to KVM mode: it gives 2 GPUs, 1 NVSwitch and 1 NIC to VMs.\n"
    )
    assert [each.address for each in host_mode.armed_devices(booted.root)] == [NIC]


def test_a_host_that_cannot_is_refused_and_unchanged(host: ModeHost) -> None:
    host.root.remove("/sys/firmware/acpi/tables/DMAR")
    before = host.root.read(GRUB_CFG)
    result = host("mode kvm")
    assert (result.code, result.out) == (1, "")
    assert "dgx-kvm: IOMMU: VT-d is off" in result.err
    assert result.err.endswith(
        "dgx-kvm: KVM mode is not possible yet: IOMMU, interrupt remapping\n  nothing was changed\n"
    )
    assert host.root.read(GRUB_CFG) == before
    assert not host.root.exists("/var/lib/dgx-kvm")


def test_a_warning_hinders_no_switch(host: ModeHost) -> None:
    mode_host.firmware(host, "DMAR", 3)
    result = host("mode kvm")
    assert result.code == 0
    assert "dgx-kvm: warning: interrupt remapping: " in result.err
    assert boots_kvm(host)


def test_a_switch_that_fails_says_why_even_when_quiet(host: ModeHost) -> None:
    host.program("update-initramfs", "#!/bin/sh\necho no space left >&2\nexit 1\n")
    result = host("mode kvm -q")
    assert (result.code, result.out) == (1, "")
    assert "no space left" in result.err
    assert not boots_kvm(host)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become nobody")
@pytest.mark.parametrize("target", ["kvm", "bare-metal"])
def test_only_root_switches_this_machine(target: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        program = str(mode_host.program_for_everybody(Path(folder)) / "bin/dgx-kvm")
        words = [program, "mode", target]
        done = subprocess.run(
            words, user=65534, cwd="/", capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == (
        f"dgx-kvm: only root may switch this host to {Mode(target).words}\n"
        f"  run `sudo dgx-kvm mode {target}`\n"
    )


# -- rebooting ----------------------------------------------------------------------------------


def libvirt_with(host: ModeHost, *domains: str) -> str:
    """A libvirt where these domains run; returns what to say to dgx-kvm."""
    text = "".join(
        f"<domain type='test'><name>{name}</name><memory>1024</memory>"
        f"<os><type>hvm</type></os>{OURS if name.startswith('vm') else ''}</domain>"
        for name in domains
    )
    host.write("/node.xml", f"<node>{text}</node>\n")
    return f"--connect test://{host.root.path('/node.xml')}"


def with_systemctl(host: ModeHost) -> Path:
    """Give the root a systemctl that writes down what it is told."""
    told = host.root.path("/told")
    host.root.write("/usr/bin/systemctl", f'#!/bin/sh\necho "$@" >>{told}\n', 0o755, sync=False)
    return told


def test_reboot_follows_a_switch(host: ModeHost) -> None:
    told = with_systemctl(host)
    result = host(f"mode kvm --reboot {libvirt_with(host, 'other')}")
    assert (result.code, told.read_text()) == (0, "reboot\n")
    assert "Rebooting now.\n" in result.out
    assert boots_kvm(host)


def test_no_reboot_without_a_need(host: ModeHost) -> None:
    told = with_systemctl(host)
    assert host(f"mode bare-metal --reboot {libvirt_with(host)}").code == 0
    assert not told.exists()


def test_no_reboot_after_a_failure(host: ModeHost) -> None:
    told = with_systemctl(host)
    host.program("update-initramfs", "#!/bin/sh\nexit 1\n")
    assert host(f"mode kvm --reboot {libvirt_with(host)}").code == 1
    assert not told.exists()


def test_no_reboot_under_running_vms(host: ModeHost) -> None:
    told = with_systemctl(host)
    result = host(f"mode kvm --reboot {libvirt_with(host, 'vm-a', 'vm-b', 'other')}")
    assert (result.code, result.out) == (1, "")
    assert "vm-a, vm-b still run, and a reboot would take them down; nothing was changed" in (
        result.err
    )
    assert "dgx-kvm stop --all" in result.err
    assert not told.exists()
    assert not boots_kvm(host)


def test_no_reboot_under_a_vm_that_was_started_meanwhile(host: ModeHost) -> None:
    told = with_systemctl(host)
    option = libvirt_with(host, "vm-a")
    later = host.root.read("/node.xml")
    libvirt_with(host)
    node = host.root.path("/node.xml")
    host.program("update-initramfs", f'#!/bin/sh\necho "{later}" >{node}\n')
    result = host(f"mode kvm --reboot {option}")
    assert result.code == 1
    assert "vm-a still runs" in result.err
    assert "the mode is switched, but the host was not rebooted" in result.err
    assert not told.exists()
    assert boots_kvm(host)


def test_no_reboot_when_libvirt_does_not_say_what_runs(host: ModeHost) -> None:
    told = with_systemctl(host)
    result = host("mode kvm --reboot --connect test:///nonexistent.xml")
    assert result.code == 1
    assert "libvirt does not answer" in result.err
    assert not told.exists()


def test_a_reboot_that_systemd_refuses_is_told(host: ModeHost) -> None:
    host.root.write("/usr/bin/systemctl", "#!/bin/sh\necho no >&2\nexit 1\n", 0o755, sync=False)
    with pytest.raises(HostError, match="the mode is switched, but systemctl reboot failed: no"):
        host_mode.reboot(host.root)


# -- usage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("mode kvn", "there is no mode 'kvn'\n  did you mean kvm?"),
        ("mode --reboot", "--reboot follows a switch"),
        ("mode --check --reboot", "--reboot follows a switch"),
        ("mode kvm --check", "kvm and --check are two commands"),
        ("mode --check --verify", "--check and --verify are two commands"),
        ("mode kvm --json", "`mode kvm` has no --json"),
        ("mode --verify --json", "`mode --verify` has no --json"),
    ],
)
def test_usage(command: str, message: str, host: ModeHost) -> None:
    result = host(command)
    assert result.code == ExitCode.USAGE
    assert message in result.err


@pytest.mark.parametrize("words", ["", "kvm", "bare-metal", "--check", "--verify", "--json"])
def test_a_simulated_machine_has_no_mode(words: str, run: Host) -> None:
    result = run(f"mode {words}")
    assert result.code == ExitCode.FAILED
    assert "a simulated machine has no mode to show or switch\n" in result.err


def test_the_scripts_are_found_below_the_root_first(host: ModeHost) -> None:
    host.root.write("/usr/lib/dgx-kvm/host-mode", "#!/bin/sh\necho its own\n", 0o755, sync=False)
    assert host_mode.options(host.root) == "its own"
    shutil.rmtree(host.root.path("/usr/lib/dgx-kvm"))
    assert host_mode.options(host.root) == f"{WORDS} {BLACKLIST}"
