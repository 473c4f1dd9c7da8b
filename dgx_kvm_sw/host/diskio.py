"""How QEMU is to read and write disks on this host: by io_uring where all parts have it."""

from __future__ import annotations

import contextlib
import os
import shutil

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.access.run import run, search_path
from dgx_kvm_sw.model.errors import HostError

_REMEMBERED = "/run/dgx-kvm/disk-io"  # goes with the kernel's boot
_SECONDS = 30.0


def disk_io(root: Root) -> str:
    """Return "io_uring" or "native".

    Builds of QEMU differ (some distributions leave io_uring out), so one is asked: qemu-img is of
    the same source as QEMU itself. A sysctl other than 0 keeps io_uring from QEMU, not from root.
    """
    if root.read("/proc/sys/kernel/io_uring_disabled", "0") != "0":
        return "native"
    program = shutil.which("qemu-img", path=search_path()) or ""
    about = os.stat(program) if program else None
    build = f"{about.st_mtime_ns} {about.st_size}" if about else ""
    remembered, _, answer = root.read(_REMEMBERED, "").rpartition(" ")
    if remembered == build and answer:
        return answer
    answer = "io_uring" if _opens("io_uring") else "native"
    with contextlib.suppress(HostError):  # only a memory: not root, or a full disk
        root.write(_REMEMBERED, f"{build} {answer}", sync=False)
    return answer


def _opens(aio: str) -> bool:
    """Whether qemu-img can open a file in this way."""
    options = f"driver=raw,file.driver=file,file.filename={__file__},file.aio={aio}"
    try:
        done = run(("qemu-img", "info", "--image-opts", options), timeout=_SECONDS)
    except HostError:
        return False
    return done.code == 0
