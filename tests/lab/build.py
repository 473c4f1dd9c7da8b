"""What a machine needs before it can boot, each kept in `.cache/lab` for the next time."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path

from lab import image, inner
from lab.cache import made, step
from lab.machine import Machine, overlay
from lab.packages import LabError
from lab.qemu import Hardware
from lab.shape import named
from lab.tools import Tools, tools

# What an installer does at its end. Until then the packages' own initramfs has all modules,
# because MODULES=dep can look at nothing where there is no machine yet.
FINISH = """\
set -e
printf 'MODULES=dep\\nCOMPRESS=gzip\\nCOMPRESSLEVEL=1\\n' >/etc/initramfs-tools/conf.d/lab
grub-install --target=x86_64-efi --efi-directory=/boot/efi --no-nvram --removable 2>&1
update-initramfs -u -k all 2>&1
update-grub 2>&1
: >/etc/machine-id
rm -rf /var/log/journal/* /var/cache/apt/*.bin /var/lib/apt/lists/*_*
"""
FINISHING_SHAPE = "dgx2-small"
BUILT = Path(__file__).parents[2] / "build/deb"
README = Path(__file__).with_name("guide.md")  # for whoever sits at the console
CATALOGUE, GUEST_IMAGE = "/usr/share/dgx-kvm/images.d", "/srv/lab-guest.qcow2"


def disk(release: str = "bookworm", dependencies: bool = True) -> Path:
    """The disk of an installed host: boot it through an overlay only."""
    name = f"{release}{'' if dependencies else '-bare'}"
    recipe = [image.recipe(release, dependencies), FINISH]

    def make(directory: Path) -> None:
        _install(tools(), directory, release, dependencies)

    return made(name, recipe, make) / "disk.qcow2"


def guest_image(release: str = "bookworm") -> Path:
    """The disk image of VMs, from the same release as their host."""
    host = disk(release).parent
    recipe = [host.name, inner.INIT.read_text(), Path(inner.__file__).read_text()]

    def make(directory: Path) -> None:
        inner.make_guest(tools(), directory, host / "guest")

    return made(f"guest-{release}", recipe, make) / "guest.qcow2"


def package() -> Path:
    """The package that `make deb` left."""
    found = sorted(BUILT.glob("*.deb"))
    if len(found) != 1:
        raise LabError(f"there is not one package in {BUILT}; make it: make deb")
    return found[0]


def installed_disk(release: str, deb: Path) -> Path:
    """The disk of a host that has the package and an image for VMs, and boots in KVM mode."""
    base, guest = disk(release), guest_image(release)
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (deb, README)]
    recipe = [base.parent.name, guest.parent.name, *contents]

    def make(directory: Path) -> None:
        kit = tools()
        file = overlay(kit, base, directory / "disk.qcow2")
        with Machine(kit, Hardware(named(FINISHING_SHAPE), file), f"install-{release}") as machine:
            machine.boot()
            with step("dpkg -i"):
                machine.put(deb, f"/root/{deb.name}")
                machine.check(f"dpkg -i /root/{deb.name}", timeout=1800)
            add_guest_image(machine, guest)
            machine.put(README, "/root/README.md")
            machine.power_off()

    return made(f"installed-{release}", recipe, make) / "disk.qcow2"


def add_guest_image(machine: Machine, guest: Path) -> None:
    """Put the image of VMs into the catalogue, as an image package would."""
    machine.put(guest, GUEST_IMAGE)
    manifest = json.dumps(_manifest(guest))
    machine.check(
        f"mkdir -p {CATALOGUE} && echo {shlex.quote(manifest)} >{CATALOGUE}/lab-guest.json"
    )


def _manifest(guest: Path) -> dict[str, object]:
    content = guest.read_bytes()
    return {
        "manifest": 1,
        "name": "lab-guest",
        "version": "1",
        "path": GUEST_IMAGE,
        "format": "qcow2",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size_bytes": len(content),
        "virtual_size_bytes": int.from_bytes(content[24:32], "big"),  # of qcow2's header
        "cloud_init": False,
        "guest_agent": False,
    }


def _install(kit: Tools, directory: Path, release: str, dependencies: bool) -> None:
    with step(f"packages of {release}"):
        raw = image.make_disk(kit, directory, release, dependencies)
    qcow2 = directory / "disk.qcow2"
    kit.run("bin/qemu-img", "convert", "-O", "qcow2", str(raw), str(qcow2))
    raw.unlink()
    hardware = Hardware(named(FINISHING_SHAPE), qcow2, served=False)
    with Machine(kit, hardware, name=f"finish-{directory.stem}") as machine:
        machine.boot()
        with step("GRUB and initramfs, made by the machine itself"):
            machine.check(FINISH, timeout=600)
        machine.power_off()
