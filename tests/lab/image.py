"""The host's disk: a Debian release with GRUB on an NVMe drive, as its installer leaves it.

Made without root and without mounting. Its first boot has no grub.cfg and no GRUB of its own yet;
`build.py` lets the machine make them itself.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from lab.inner import BUSYBOX, KERNEL, MODULES, save_pieces
from lab.packages import bootstrap
from lab.tools import Tools

RELEASES = ("bookworm", "trixie")
BASE = (
    "linux-image-amd64", "systemd-sysv", "udev", "dbus", "initramfs-tools", "grub-efi-amd64",
    "kmod", "procps", "iproute2", "pciutils", "ethtool", "nvme-cli", "busybox-static", "zstd",
    "openssh-client",
)  # fmt: skip
# What the package's substituted dependencies come to, and what its tests look with.
MORE = ("python3", "python3-debian", "numactl")
CONTROL = Path(__file__).parents[2] / "debian/control"
OVERLAY = Path(__file__).with_name("overlay")  # files of the host that the lab adds

LABEL = "lab-root"
ROOT_UUID = "d6c50ab1-0c1f-4d8b-9d0a-5f5d3ec1a2b7"
SIZE_MIB = 12 * 1024
ESP_MIB = 64
ESP_START_MIB, ROOT_START_MIB = 1, 1 + ESP_MIB
ROOT_MIB = SIZE_MIB - ROOT_START_MIB - 1  # GPT keeps a copy at the end

_GRUB = (OVERLAY / "etc/default/grub").read_text()
WORDS = re.findall(r'^GRUB_CMDLINE_LINUX="(.*)"$', _GRUB, re.MULTILINE)[0]
FIRST_GRUB_CFG = f"""\
search --no-floppy --label {LABEL} --set root
linux /vmlinuz root=LABEL={LABEL} ro {WORDS}
initrd /initrd.img
boot
"""

# Run in the new root file system.
INSIDE = (
    "passwd -q -d root",
    "mkdir -p /var/log/journal",  # so that the last boot's journal can be read, as on any Debian
    "systemctl -q enable systemd-networkd lab-shell.service lab-console.service",
    # What would wait for a network, or start in an hour; some slow services that nobody here needs.
    "systemctl -q mask apt-daily.timer apt-daily-upgrade.timer man-db.timer e2scrub_all.timer"
    " fstrim.timer dpkg-db-backup.timer systemd-networkd-wait-online.service"
    " systemd-timesyncd.service nvmf-autoconnect.service e2scrub_reap.service"
    " systemd-binfmt.service proc-sys-fs-binfmt_misc.automount serial-getty@ttyS0.service",
)


def recipe(release: str, dependencies: bool) -> list[object]:
    """All that decides how the disk comes out, but for the day's state of the archive."""
    overlay = [[str(file.relative_to(OVERLAY)), file.read_text()] for file in _overlay_files()]
    parts: tuple[Callable[..., object], ...] = (make_disk, _options, save_pieces)
    made = [inspect.getsource(part) for part in parts]
    pieces = [KERNEL, BUSYBOX, MODULES]
    sizes = [SIZE_MIB, ESP_MIB]
    return [release, _packages(dependencies), overlay, INSIDE, FIRST_GRUB_CFG, sizes, made, pieces]


def _packages(dependencies: bool) -> list[str]:
    """With `dependencies`, the machine needs no archive when our package comes."""
    return [*BASE, *(_depends() if dependencies else ()), *(MORE if dependencies else ())]


def _depends() -> list[str]:
    found = re.search(r"^Depends:(.*?)^(?=\S)", CONTROL.read_text(), re.DOTALL | re.MULTILINE)
    assert found
    names = [item.split() for item in found[1].split(",")]
    return [words[0] for words in names if words and not words[0].startswith("$")]


def _overlay_files() -> list[Path]:
    return sorted(path for path in OVERLAY.rglob("*") if path.is_file())


def make_disk(tools: Tools, directory: Path, release: str, dependencies: bool) -> Path:
    """Leave `disk.raw` in the directory."""
    tree, disk = directory / "root.tar", directory / "disk.raw"
    bootstrap(tree, release, _packages(dependencies), _options())
    with disk.open("wb") as file:
        file.truncate(SIZE_MIB << 20)
    table = (
        "label: gpt\n"
        f"start={ESP_START_MIB}MiB, size={ESP_MIB}MiB, type=uefi\n"
        f"start={ROOT_START_MIB}MiB, size={ROOT_MIB}MiB, type=linux\n"
    )
    tools.run("sbin/sfdisk", "--quiet", str(disk), text=table)
    tools.run(
        "sbin/mke2fs", "-q", "-t", "ext4", "-L", LABEL, "-U", ROOT_UUID,
        # Neither is known to the GRUB and e2fsck of bookworm.
        "-O", "^metadata_csum_seed,^orphan_file",
        "-E", f"offset={ROOT_START_MIB << 20},lazy_itable_init=1,nodiscard",
        "-d", str(tree), str(disk), f"{ROOT_MIB}M",
    )  # fmt: skip
    save_pieces(tree, directory / "guest")
    tree.unlink()
    tools.make_esp(directory, disk, ESP_START_MIB, ESP_MIB, FIRST_GRUB_CFG)
    return disk


def _options() -> Sequence[str]:
    return [
        "--variant=minbase",
        "--format=tar",
        # update-initramfs runs while packages are set up, where MODULES=dep cannot work yet.
        f"--customize-hook=sync-in {shlex.quote(str(OVERLAY))} /",
        *(f'--customize-hook=chroot "$1" sh -ec {shlex.quote(line)}' for line in INSIDE),
    ]
