"""The root file system of an image, as a directory: mmdebstrap, the overlay, the hooks."""

from __future__ import annotations

import shlex
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

from tools import archive
from tools.images.programs import BuildError, call
from tools.images.recipes import Image
from tools.images.sources import sources


@dataclass(frozen=True)
class Identity:
    """What names one build of an image; the same in a second build of the same version."""

    version: str  # "12.20261122"
    epoch: int  # seconds since 1970, as in SOURCE_DATE_EPOCH
    root_uuid: str
    esp_id: str  # as mkfs.fat writes it in fstab: "1A2B-3C4D"

    @classmethod
    def of(cls, image: Image, version: str, epoch: int) -> Identity:
        root = uuid.uuid5(uuid.NAMESPACE_URL, f"dgx-kvm-image:{image.name}:{version}")
        return cls(version, epoch, str(root), f"{root.hex[:4]}-{root.hex[4:8]}".upper())


@dataclass(frozen=True)
class Contents:
    """What is in a tree."""

    kernel: str
    driver: str  # full version, or empty
    packages: str  # a line "name version" each


def make_tree(image: Image, identity: Identity, folder: Path, log: Path) -> Path:
    """Fill `folder`/root; needs root."""
    settings, listed, root = folder / "apt.conf", folder / "apt.sources", folder / "root"
    settings.write_text(archive.download_settings() + 'Acquire::Languages "none";\n')
    listed.write_text(sources(image))
    call(
        log, "mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory",
        f"--aptopt={settings}",
        f"--include={','.join(image.packages)}",
        f"--customize-hook=sync-in {shlex.quote(str(image.overlay))} /",
        *(f"--customize-hook={hook}" for hook in image.hooks),
        # How this machine reaches the archives is nobody else's business: cloud-init writes
        # sources at the first boot.
        "--customize-hook=rm -f \"$1\"/etc/apt/apt.conf.d/99mmdebstrap"
        " \"$1\"/etc/apt/sources.list \"$1\"/etc/apt/sources.list.d/*",
        image.suite, root, listed,
        env=environment(image, identity), mounts=True,
    )  # fmt: skip
    return root


def environment(image: Image, identity: Identity) -> dict[str, str]:
    """What hooks are told, beside the tree as their first argument."""
    return {
        "SOURCE_DATE_EPOCH": str(identity.epoch),
        "IMAGE_NAME": image.name,
        "IMAGE_TITLE": image.title,
        "IMAGE_VERSION": identity.version,
        "IMAGE_OS": image.os,
        "IMAGE_RELEASE": image.release,
        "IMAGE_SUITE": image.suite,
        "IMAGE_VARIANT": image.variant,
        "IMAGE_DRIVER": image.driver,
        "IMAGE_OPTIONAL": " ".join(image.optional),
        "IMAGE_ROOT_UUID": identity.root_uuid,
        "IMAGE_ESP_ID": identity.esp_id,
    }


def contents(root: Path, log: Path) -> Contents:
    """Look at a finished tree."""
    kernels = sorted(path.name.partition("-")[2] for path in root.glob("boot/vmlinuz-*"))
    if len(kernels) != 1:
        raise BuildError(
            f"the tree has {len(kernels) or 'no'} kernels, not one", "name one in the recipe"
        )
    drivers = {
        built.parent.name for built in root.glob(f"var/lib/dkms/nvidia*/*/{kernels[0]}")
    } or _prebuilt_driver(root, kernels[0], log)
    query = ("dpkg-query", f"--admindir={root}/var/lib/dpkg", "-W", "-f")
    packages = call(log, *query, "${db:Status-Abbrev}${Package} ${Version}\n")
    installed = sorted(line[3:].strip() for line in packages.splitlines() if line[:2] == "ii")
    return Contents(kernels[0], "".join(sorted(drivers)[-1:]), "\n".join(installed) + "\n")


def _prebuilt_driver(root: Path, kernel: str, log: Path) -> set[str]:
    """Ubuntu has modules that are built already."""
    modules = sorted(root.glob(f"lib/modules/{kernel}/kernel/nvidia*/**/nvidia.ko*"))
    return {call(log, "modinfo", "-F", "version", module).strip() for module in modules[:1]}


def remove(folder: Path) -> None:
    """Remove a folder, never what is mounted in it."""
    if folder.exists():
        command = ["rm", "-rf", "--one-file-system", str(folder)]
        subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
