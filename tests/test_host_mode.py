"""The switch between bare metal and KVM mode, run by sh on a root of its own.

update-grub and update-initramfs are small programs here. Every program that changes something
counts itself, so a test can make the n-th of them fail, or the power with it (all processes of
the script are killed at once); afterwards grub.cfg must boot one mode whole.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.commands

SHIPPED = Path(__file__).parents[1] / "debian/host"
WORD = "dgx_kvm.mode=kvm"
BLACKLIST = "module_blacklist=nvidia,nvidia_drm,nvidia_modeset,nvidia_uvm,nouveau"
INTEL = f"{WORD} intel_iommu=on iommu=pt {BLACKLIST}"
NIC = "0000:05:00.0 0x15b3 0x101b 0x020700"

# A grub-mkconfig in small: the drop-ins under `set -e`, two kernels, their recovery entries, and
# another system's entry that is none of our business.
UPDATE_GRUB = r"""
set -e
GRUB_CMDLINE_LINUX=net.ifnames=1 GRUB_CMDLINE_LINUX_DEFAULT=quiet
for file in "$DPKG_ROOT"/etc/default/grub.d/*.cfg; do . "$file"; done
[ "$1" = -o ]
entry() {
    printf "menuentry 'Debian (%s)' --class os \$menuentry_id_option '%s' {\n" "$1" "$1"
    printf '\tlinux\t/boot/vmlinuz root=UUID=1 ro %s\n}\n' "$2"
}
normal="$GRUB_CMDLINE_LINUX $GRUB_CMDLINE_LINUX_DEFAULT"
{
    entry gnulinux-simple-1 "$normal"
    echo "submenu 'Advanced' \$menuentry_id_option 'gnulinux-advanced-1' {"
    for version in 6.1.0-1 6.1.0-2; do
        entry "gnulinux-$version-advanced-1" "$normal"
        entry "gnulinux-$version-recovery-1" "single $GRUB_CMDLINE_LINUX"
    done
    echo "}"
    entry osprober-gnulinux-simple-2 quiet
} >"$2.new"
cat "$2.new" >"$2"
rm "$2.new"
"""

# The image: what the hook would copy. An unarmed host's image has nothing of ours.
UPDATE_INITRAMFS = r"""
[ "$*" = "-u -k all" ] || exit 1
list=$DPKG_ROOT/var/lib/dgx-kvm/devices
{ echo image; [ ! -e "$list" ] || { echo ours; cat "$list"; }; } >"$DPKG_ROOT/boot/initrd.img"
"""

# In front of each program: count; at the number asked for fail, or take everything down, either
# before the program's work or after it.
COUNTED = r"""#!/bin/sh
echo "${0##*/} $*" >>"$STEPS"
now=$(wc -l <"$STEPS")
work() {
%s
}
if [ "$now" = "${STOP_AT:-}" ]; then
    case $STOP_HOW in
        fail) exit 1 ;;
        kill-before) kill -9 0 ;;
        kill-after) (work "$@"); kill -9 0 ;;
    esac
fi
work "$@"
"""


@dataclass
class Host:
    root: Path
    programs: Path
    steps: Path

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.steps.write_text("")
        return subprocess.run(
            ["sh", self.root / "usr/lib/dgx-kvm/host-mode", *arguments],
            env={
                "DPKG_ROOT": str(self.root),
                "PATH": f"{self.programs}:/usr/bin:/bin",
                "STEPS": str(self.steps),
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,  # so that `kill -9 0` takes the script and its children only
        )

    def path(self, name: str) -> Path:
        return self.root / name

    def copy(self, root: Path) -> Host:
        shutil.copytree(self.root, root, symlinks=True)
        return Host(root, self.programs, self.steps)

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def program(self, name: str, work: str) -> None:
        path = self.programs / name
        path.write_text(COUNTED % work)
        path.chmod(0o755)

    def did(self) -> list[str]:
        """The programs that ran, by name, without syncs."""
        names = [line.split()[0] for line in self.steps.read_text().splitlines()]
        return [name for name in names if name != "sync"]

    def files(self) -> dict[str, tuple[str, int]]:
        return {
            str(path.relative_to(self.root)): (
                hashlib.sha256(path.read_bytes()).hexdigest(),
                path.stat().st_mode,
            )
            for path in self.root.rglob("*")
            if path.is_file()
        }

    def boots(self) -> str:
        """The mode that grub.cfg boots, or "broken" when its entries differ or one is cut off."""
        text = self.path("boot/grub/grub.cfg").read_text()
        normal = [
            WORD in entry.split()
            for entry in text.split("menuentry ")
            if " 'gnulinux-" in entry and "recovery" not in entry and "linux\t" in entry
        ]
        others = [
            WORD in entry.split()
            for entry in text.split("menuentry ")
            if "recovery" in entry or "osprober" in entry
        ]
        if len(normal) != 3 or len(others) != 3 or any(others) or len(set(normal)) != 1:
            return "broken"
        return "kvm" if normal[0] else "bare-metal"

    def image_is_ours(self) -> bool:
        return "ours" in self.path("boot/initrd.img").read_text()

    def status(self) -> dict[str, str]:
        done = self("status")
        assert (done.returncode, done.stderr) == (0, "")
        return dict(line.split(": ", 1) for line in done.stdout.splitlines())


def build(root: Path, programs: Path) -> Host:
    host = Host(root, programs, programs / "steps")
    programs.mkdir()
    host.program("update-grub", UPDATE_GRUB)
    host.program("update-initramfs", UPDATE_INITRAMFS)
    for name in ("sync", "mv", "rm"):
        host.program(name, f'/bin/{name} "$@"')
    for source, target in (
        ("host-mode", "usr/lib/dgx-kvm/host-mode"),
        ("grub-guard.cfg", "etc/default/grub.d/zz-dgx-kvm.cfg"),
        ("live-host", "usr/lib/dgx-kvm/live-host"),
        ("bare-metal", "usr/lib/dgx-kvm/bare-metal"),
        ("init-top", "usr/share/initramfs-tools/scripts/init-top/dgx-kvm"),
        ("initramfs-hook", "usr/share/initramfs-tools/hooks/dgx-kvm"),
    ):
        host.write(target, "")
        shutil.copy(SHIPPED / source, host.path(target))
    # As a cloud image has it: it assigns, so a file of ours that sorted before it would be lost.
    host.write("etc/default/grub.d/iommu.cfg", "GRUB_CMDLINE_LINUX_DEFAULT=nosplash\n")
    host.write("usr/lib/dgx-kvm/assignable", f"#!/bin/sh\necho '{NIC}'\n").chmod(0o755)
    host.write("proc/cpuinfo", "processor\t: 0\nvendor_id\t: GenuineIntel\n" * 2)
    host.write("proc/cmdline", "root=UUID=1 ro quiet\n")
    host.write("boot/grub/grub.cfg", "")
    host.path("var/lib/dgx-kvm").mkdir(parents=True)
    environment = {"DPKG_ROOT": str(root), "PATH": "/usr/bin:/bin", "STEPS": str(host.steps)}
    for command in (
        ["update-grub", "-o", str(root / "boot/grub/grub.cfg")],
        ["update-initramfs", "-u", "-k", "all"],
    ):
        subprocess.run([programs / command[0], *command[1:]], env=environment, check=True)
    host.path("boot/grub/grub.cfg").chmod(0o444)
    return host


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return build(tmp_path / "root", tmp_path / "programs")


@pytest.fixture
def armed(host: Host) -> Host:
    done = host("arm")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return host


# --- arm


def test_arm_prepares_all_before_grub(host: Host) -> None:
    done = host("arm")
    assert (done.returncode, done.stderr) == (0, "")
    assert host.boots() == "kvm"
    assert host.image_is_ours()
    assert NIC in host.path("boot/initrd.img").read_text()
    assert host.path("var/lib/dgx-kvm/devices").read_text() == f"{NIC}\n"
    assert host.path("var/lib/dgx-kvm/cmdline").read_text() == f"{INTEL}\n"
    steps = host.steps.read_text()
    order = [
        "mv -f {state}/devices.new {state}/devices",
        "update-initramfs -u -k all",
        "mv -f {state}/cmdline.new {state}/cmdline",
        "update-grub -o {grub}.dgx-kvm",
        "sync {grub}.dgx-kvm",
        "mv -f {grub}.dgx-kvm {grub}",
    ]
    names = {
        "state": host.path("var/lib/dgx-kvm"),
        "grub": host.path("boot/grub/grub.cfg"),
    }
    places = [steps.index(step.format(**names)) for step in order]
    assert places == sorted(places)
    assert steps.splitlines()[-1] == f"sync {host.path('boot/grub')}"


def test_every_file_is_synced_before_its_rename_and_its_folder_after(host: Host) -> None:
    host("arm")
    steps = host.steps.read_text().splitlines()
    renames = [n for n, step in enumerate(steps) if step.startswith("mv ")]
    assert len(renames) == 5
    for n in renames:
        _, _, old, new = steps[n].split()
        assert steps[n - 1] == f"sync {old}"
        assert steps[n + 1] == f"sync {Path(new).parent}"


def test_our_words_come_last_and_survive_other_drop_ins(armed: Host) -> None:
    lines = armed.path("boot/grub/grub.cfg").read_text().splitlines()
    normal = [line for line in lines if "\tlinux" in line and "nosplash" in line]
    assert len(normal) == 3
    assert all(line.endswith(f"nosplash {INTEL}") for line in normal)


def test_mode_of_grub_cfg_is_kept(armed: Host) -> None:
    assert armed.path("boot/grub/grub.cfg").stat().st_mode & 0o777 == 0o444
    armed("disarm")
    assert armed.path("boot/grub/grub.cfg").stat().st_mode & 0o777 == 0o444


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_owner_of_grub_cfg_is_kept(host: Host) -> None:
    os.chown(host.path("boot/grub/grub.cfg"), 12, 34)
    host("arm")
    state = host.path("boot/grub/grub.cfg").stat()
    assert (state.st_uid, state.st_gid) == (12, 34)


def test_link_to_grub_cfg_stays_a_link(host: Host) -> None:
    link = host.path("boot/grub/grub.cfg")
    link.rename(host.path("boot/real.cfg"))
    link.symlink_to("../real.cfg")
    assert host("arm").returncode == 0
    assert link.is_symlink()
    assert host.boots() == "kvm"


def test_arm_again_changes_nothing(armed: Host) -> None:
    before = armed.files()
    assert armed("arm").returncode == 0
    assert armed.files() == before


def test_host_without_devices_by_address_is_armed(host: Host) -> None:
    host.write("usr/lib/dgx-kvm/assignable", "#!/bin/sh\n")
    assert host("arm").returncode == 0
    assert host.path("var/lib/dgx-kvm/devices").read_text() == ""
    assert host.image_is_ours()


# --- the words


@pytest.mark.parametrize(
    ("vendor", "settings", "words"),
    [
        ("GenuineIntel", "", INTEL),
        ("AuthenticAMD", "", f"{WORD} iommu=pt {BLACKLIST}"),
        ("AuthenticAMD", "DGX_KVM_FABRIC=shared", f"{WORD} iommu=pt dgx_kvm.nvswitch=host"),
        ("GenuineIntel", 'DGX_KVM_CMDLINE_EXTRA=" a.b=c   d "\nfalse', f"{INTEL} a.b=c d"),
        (
            "GenuineIntel",
            "DGX_KVM_HUGEPAGES_1G=900",
            f"{INTEL} default_hugepagesz=1G hugepagesz=1G hugepages=900",
        ),
    ],
)
def test_words_follow_cpu_and_settings(host: Host, vendor: str, settings: str, words: str) -> None:
    host.write("proc/cpuinfo", f"vendor_id\t: {vendor}\n")
    host.write("etc/default/dgx-kvm", f"{settings}\n")
    assert host("arm").returncode == 0
    assert host.path("var/lib/dgx-kvm/cmdline").read_text() == f"{words}\n"
    assert host.boots() == "kvm"
    host.write("proc/cmdline", f"root=UUID=1 ro nosplash {words}\n")
    assert host.status() == {"configured": "kvm", "booted": "kvm", "reboot": "not needed"}


# --- refusals: each before anything is changed


def refuse_no_grub_cfg(host: Host) -> str:
    host.path("boot/grub/grub.cfg").unlink()
    return "GRUB does not start this host"


def refuse_no_update_grub(host: Host) -> str:
    (host.programs / "update-grub").unlink()
    return "GRUB does not start this host"


def refuse_no_update_initramfs(host: Host) -> str:
    (host.programs / "update-initramfs").unlink()
    return "install initramfs-tools"


def refuse_images_switched_off(host: Host) -> str:
    host.write("etc/initramfs-tools/update-initramfs.conf", "# x\nupdate_initramfs=no\n")
    return "says update_initramfs=no: set it to yes"


def refuse_other_cpu(host: Host) -> str:
    host.write("proc/cpuinfo", "CPU implementer\t: 0x41\n")
    return "neither Intel's nor AMD's"


def refuse_quoting(host: Host) -> str:
    host.write("etc/default/dgx-kvm", "DGX_KVM_CMDLINE_EXTRA='a;b'\n")
    return "a character with a meaning for GRUB"


def refuse_hugepages(host: Host) -> str:
    host.write("etc/default/dgx-kvm", "DGX_KVM_HUGEPAGES_1G=all\n")
    return "is not a number"


def refuse_fabric(host: Host) -> str:
    host.write("etc/default/dgx-kvm", "DGX_KVM_FABRIC=shared-nvswitch\n")
    return "choose passthrough or shared"


def refuse_unknown_use(host: Host) -> str:
    host.write("usr/lib/dgx-kvm/assignable", "#!/bin/sh\necho 'no /proc' >&2; exit 1\n")
    return "no /proc"


@pytest.mark.parametrize(
    "obstacle",
    [
        refuse_no_grub_cfg,
        refuse_no_update_grub,
        refuse_no_update_initramfs,
        refuse_images_switched_off,
        refuse_other_cpu,
        refuse_quoting,
        refuse_hugepages,
        refuse_fabric,
        refuse_unknown_use,
    ],
)
def test_arm_refuses_with_words(host: Host, obstacle: Callable[[Host], str]) -> None:
    words = obstacle(host)
    before = host.files()
    done = host("arm")
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert host.files() == before


def test_settings_of_the_caller_do_not_count(host: Host) -> None:
    host("arm", DGX_KVM_CMDLINE_EXTRA="init=/bin/sh")
    assert "init=" not in host.path("boot/grub/grub.cfg").read_text()


def drop_guard(host: Host) -> None:
    host.path("etc/default/grub.d/zz-dgx-kvm.cfg").unlink()


def assign_after_guard(host: Host) -> None:
    host.write("etc/default/grub.d/zzz.cfg", "GRUB_CMDLINE_LINUX_DEFAULT=quiet\n")


def forget_one_kernel(host: Host) -> None:
    host.program(
        "update-grub",
        UPDATE_GRUB.replace('-advanced-1" "$normal"', '-advanced-1" "${normal% *}"'),
    )


def find_no_kernel(host: Host) -> None:
    host.program("update-grub", 'echo "# empty" >"$2"')


@pytest.mark.parametrize(
    "fault", [drop_guard, assign_after_guard, forget_one_kernel, find_no_kernel]
)
def test_grub_cfg_without_the_words_is_not_used(host: Host, fault: Callable[[Host], None]) -> None:
    fault(host)
    before = host.path("boot/grub/grub.cfg").read_bytes()
    done = host("arm")
    assert done.returncode == 1
    assert "grub.cfg is as it was: update-grub" in done.stderr
    assert host.path("boot/grub/grub.cfg").read_bytes() == before
    assert not host.path("var/lib/dgx-kvm/cmdline").exists()  # the next kernel must not switch it
    assert not list(host.path("boot/grub").glob("*.dgx-kvm*"))


def test_rearming_that_fails_keeps_the_old_words(armed: Host) -> None:
    armed.write("etc/default/dgx-kvm", "DGX_KVM_CMDLINE_EXTRA=more\n")
    armed.program("update-grub", "exit 1")
    assert armed("arm").returncode == 1
    assert armed.path("var/lib/dgx-kvm/cmdline").read_text() == f"{INTEL}\n"
    assert armed.boots() == "kvm"


def test_disarm_that_finds_no_kernel_keeps_grub_cfg(armed: Host) -> None:
    find_no_kernel(armed)
    assert "update-grub found no kernel" in armed("disarm").stderr
    assert armed.boots() == "kvm"


# --- disarm


def test_disarm_leaves_the_host_as_it_was(host: Host) -> None:
    before = host.files()
    host("arm")
    assert host.files() != before
    assert host("disarm", "--forget").returncode == 0
    assert host.files() == before


def test_disarm_remembers_the_choice_and_nothing_else(host: Host) -> None:
    before = host.files()
    host("arm")
    assert host("disarm").returncode == 0
    after = host.files()
    assert after.pop("var/lib/dgx-kvm/disarmed")
    assert after == before


def test_disarm_switches_grub_first_and_rebuilds_images_last(armed: Host) -> None:
    armed("disarm", "--forget")
    steps = [step.split(f" {armed.root}")[0] for step in armed.steps.read_text().splitlines()]
    assert steps.index("mv -f") < steps.index("update-initramfs -u -k all")


def test_disarm_twice(armed: Host) -> None:
    armed("disarm")
    before = armed.files()
    assert armed("disarm").returncode == 0
    assert armed.files() == before


def test_word_put_there_by_others_is_named(armed: Host) -> None:
    text = f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {WORD}"\n'
    armed.write("etc/default/grub.d/mine.cfg", text)
    done = armed("disarm")
    assert done.returncode == 1
    assert "without our doing; remove it from /etc/default/grub" in done.stderr
    assert armed.boots() == "kvm"


def test_disarm_where_nothing_was_armed(host: Host) -> None:
    host.path("var/lib/dgx-kvm").rmdir()
    before = host.files()
    assert host("disarm", "--forget").returncode == 0
    assert host.files() == before
    host.path("boot/grub/grub.cfg").unlink()
    assert host("disarm").returncode == 0


def test_guard_is_inert_without_the_package(armed: Host) -> None:
    """dpkg keeps a conffile on removal, and a removal can be cut off before prerm's work."""
    armed.path("usr/lib/dgx-kvm/host-mode").unlink()
    target = armed.path("boot/grub/grub.cfg")
    environment = {"DPKG_ROOT": str(armed.root), "PATH": "/usr/bin:/bin", "STEPS": "/dev/null"}
    target.chmod(0o644)
    subprocess.run([armed.programs / "update-grub", "-o", target], env=environment, check=True)
    assert armed.boots() == "bare-metal"


# --- refresh


def test_refresh_does_nothing_when_all_is_as_wanted(armed: Host) -> None:
    before = armed.files()
    done = armed("refresh")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not {"mv", "update-grub", "update-initramfs"} & set(armed.did())
    assert armed.files() == before


def test_nothing_is_said_where_sigpipe_is_ignored(armed: Host) -> None:
    """systemd and apt start programs so; a long menu then met a grep that had seen enough."""
    menu = armed.path("boot/grub/grub.cfg")
    menu.chmod(0o644)
    normal, rest = menu.read_text().split("submenu", 1)
    menu.write_text(normal * 3000 + f"submenu{rest}")
    program = armed.root / "usr/lib/dgx-kvm/host-mode"
    done = subprocess.run(
        ["sh", "-c", 'trap "" PIPE; exec sh "$0" refresh', program],
        env={
            "DPKG_ROOT": str(armed.root),
            "PATH": f"{armed.programs}:/usr/bin:/bin",
            "STEPS": str(armed.steps),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


def test_refresh_never_arms(host: Host) -> None:
    before = host.files()
    assert host("refresh").returncode == 0
    assert host.files() == before
    host("arm")
    host("disarm")
    assert host("refresh").returncode == 0
    assert host.boots() == "bare-metal"
    assert not host.path("var/lib/dgx-kvm/cmdline").exists()


def test_arm_after_disarm_forgets_the_choice(armed: Host) -> None:
    before = armed.files()
    armed("disarm")
    armed("arm")
    assert armed.files() == before


def test_refresh_takes_new_words_without_new_images(armed: Host) -> None:
    armed.write("etc/default/dgx-kvm", "DGX_KVM_CMDLINE_EXTRA=more\n")
    assert armed("refresh").returncode == 0
    assert "update-initramfs" not in armed.did()
    assert armed.path("boot/grub/grub.cfg").read_text().count(f"{INTEL} more\n") == 3


def test_refresh_drops_words_that_are_no_longer_wanted(host: Host) -> None:
    settings = host.write("etc/default/dgx-kvm", "DGX_KVM_CMDLINE_EXTRA=more\n")
    host("arm")
    settings.unlink()
    assert host("refresh").returncode == 0
    assert "more" not in host.path("boot/grub/grub.cfg").read_text()
    assert host.path("var/lib/dgx-kvm/cmdline").read_text() == f"{INTEL}\n"


def test_disarm_without_update_grub_says_so(armed: Host) -> None:
    (armed.programs / "update-grub").unlink()
    done = armed("disarm")
    assert done.returncode == 1
    assert "install grub2-common" in done.stderr
    assert armed.status()["unfinished"].endswith("run dgx-kvm mode bare-metal")


def test_refresh_rebuilds_images_for_a_new_script_only(armed: Host) -> None:
    armed.write("usr/share/initramfs-tools/scripts/init-top/dgx-kvm", "new version\n")
    assert armed("refresh").returncode == 0
    assert "update-initramfs" in armed.did()
    assert "update-grub" not in armed.did()
    armed("refresh")
    assert "update-initramfs" not in armed.did()


def test_refresh_takes_no_device_from_the_host(armed: Host) -> None:
    armed.write("usr/lib/dgx-kvm/assignable", "#!/bin/sh\necho another\n")
    assert armed("refresh").returncode == 0
    assert armed.path("var/lib/dgx-kvm/devices").read_text() == f"{NIC}\n"


def test_refresh_without_the_list_does_not_build_images_without_it(armed: Host) -> None:
    armed.path("var/lib/dgx-kvm/devices").unlink()
    done = armed("refresh")
    assert done.returncode == 1
    assert done.stderr.endswith("devices is gone: run dgx-kvm mode kvm\n")
    assert armed.image_is_ours()


def test_refresh_takes_back_what_arm_had_prepared(host: Host) -> None:
    before = host.files()
    host.program("update-grub", "exit 1")
    assert host("arm").returncode == 1
    assert host.image_is_ours()
    assert host("refresh").returncode == 0
    assert host.files() == before


def test_refresh_mends_grub_cfg(armed: Host) -> None:
    cfg = armed.path("boot/grub/grub.cfg")
    cfg.chmod(0o644)
    cfg.write_text(cfg.read_text().replace(f" {INTEL}", "", 1))
    assert armed.boots() == "broken"
    assert armed.status()["unfinished"].endswith("run dgx-kvm mode kvm")
    assert armed("refresh").returncode == 0
    assert armed.boots() == "kvm"


# --- status


def test_status_names_both_modes(host: Host) -> None:
    bare, kvm = "bare-metal", "kvm"
    expected = {"configured": bare, "booted": bare, "reboot": "not needed"}
    assert host.status() == expected
    host("arm")
    assert host.status() == {"configured": kvm, "booted": bare, "reboot": "needed"}
    host.write("proc/cmdline", f"root=UUID=1 ro nosplash {INTEL}\n")
    assert host.status() == {"configured": kvm, "booted": kvm, "reboot": "not needed"}
    host("disarm")
    assert host.status() == {"configured": bare, "booted": kvm, "reboot": "needed"}


def test_status_asks_for_a_reboot_for_new_words(armed: Host) -> None:
    armed.write("proc/cmdline", f"root=UUID=1 ro {INTEL.replace('iommu=pt', 'iommu=on')}\n")
    assert armed.status()["reboot"] == "needed"


def test_status_changes_nothing(armed: Host) -> None:
    before = armed.files()
    armed.status()
    assert armed.files() == before
    assert not armed.did()


def test_options_says_the_words_and_changes_nothing(host: Host) -> None:
    before = host.files()
    assert host("options").stdout == f"{INTEL}\n"
    assert host.files() == before


# --- what tells the administrator to reboot (Debian Policy 9.12)


def waiting(host: Host) -> list[str]:
    flag = host.path("run/reboot-required")
    packages = flag.with_name("reboot-required.pkgs")
    assert flag.exists() == packages.exists()
    return packages.read_text().splitlines() if packages.exists() else []


def test_a_reboot_is_asked_for_once_and_no_longer_than_it_is_due(host: Host) -> None:
    assert waiting(host) == []
    host("arm")
    host("arm")
    assert waiting(host) == ["dgx-kvm-sw"]
    host("disarm")
    assert waiting(host) == []
    host.write("proc/cmdline", f"root=UUID=1 ro nosplash {INTEL}\n")
    host("refresh")
    assert waiting(host) == ["dgx-kvm-sw"]


def test_another_list_of_devices_needs_a_reboot(armed: Host) -> None:
    armed.write("proc/cmdline", f"root=UUID=1 ro nosplash {INTEL}\n")
    armed("arm")
    assert armed.status()["reboot"] == "not needed"
    armed.write("usr/lib/dgx-kvm/assignable", "#!/bin/sh\necho another\n")
    armed("arm")
    assert armed.status()["reboot"] == "needed"
    assert waiting(armed) == ["dgx-kvm-sw"]


def test_others_that_wait_for_a_reboot_go_on_waiting(host: Host) -> None:
    host.write("run/reboot-required", "*** System restart required ***\n")
    host.write("run/reboot-required.pkgs", "linux-image-6.1.0-2\n")
    host("arm")
    assert waiting(host) == ["linux-image-6.1.0-2", "dgx-kvm-sw"]
    host("disarm")
    assert waiting(host) == ["linux-image-6.1.0-2"]
    assert host.path("run/reboot-required").read_text().startswith("***")


# --- configure, where no host runs; where one does: tests/package


def test_image_under_construction_waits_for_its_first_boot(host: Host) -> None:
    before = host.files()
    done = host("configure")
    assert done.returncode == 0
    assert "KVM mode waits for the first boot" in done.stderr
    after = host.files()
    assert after.pop("var/lib/dgx-kvm/arm-at-boot")
    assert after == before
    assert host("disarm", "--forget").returncode == 0
    assert host.files() == before


def test_disarmed_image_stays_disarmed(host: Host) -> None:
    host("disarm")
    before = host.files()
    assert host("configure").stderr == ""
    assert host.files() == before


# --- one at a time


def test_second_call_waits_its_turn(armed: Host) -> None:
    before = armed.files()
    with subprocess.Popen(
        ["flock", armed.path("var/lib/dgx-kvm"), "sh", "-c", "echo locked; read end"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout and other.stdout.readline() == "locked\n"
        done = armed("disarm")
        other.communicate("end\n")
    assert (done.returncode, armed.files()) == (1, before)
    assert "another host-mode is at work" in done.stderr


@pytest.mark.parametrize("words", [[], ["kvm"], ["arm", "--forget"], ["disarm", "now"], ["fail"]])
def test_other_words_are_refused(host: Host, words: list[str]) -> None:
    before = host.files()
    done = host(*words)
    assert (done.returncode, host.files()) == (2, before)
    assert done.stderr.startswith("usage: ")


# --- cut off at every step


@pytest.mark.parametrize("how", ["fail", "kill-before", "kill-after"])
@pytest.mark.parametrize("verb", ["arm", "disarm"])
def test_cut_off_anywhere(host: Host, tmp_path: Path, verb: str, how: str) -> None:
    clean = host.files()
    if verb == "disarm":
        host("arm")
    before = host.files()
    copies = (tmp_path / f"copy{number}" for number in itertools.count())
    whole = host.copy(next(copies))
    whole(verb)
    wanted = whole.files()
    steps = len(whole.steps.read_text().splitlines())
    assert steps > 10
    for step in range(1, steps + 1):
        cut = host.copy(next(copies))
        done = cut(verb, STOP_AT=f"{step}", STOP_HOW=how)
        assert done.returncode == (1 if how == "fail" else -9), step

        assert cut.boots() in ("kvm", "bare-metal"), step
        if cut.boots() == "kvm":
            assert cut.image_is_ours(), step
            if verb == "arm":
                assert cut.path("var/lib/dgx-kvm/cmdline").read_text() == f"{INTEL}\n", step

        mended = cut.copy(next(copies))
        assert mended("refresh").returncode == 0, step
        assert mended.files() in (before, wanted), step

        removed = cut.copy(next(copies))
        assert removed("disarm", "--forget").returncode == 0, step
        assert removed.files() == clean, step

        assert cut(verb).returncode == 0, step
        assert cut.files() == wanted, step
