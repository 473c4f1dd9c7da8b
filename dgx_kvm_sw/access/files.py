"""A rooted view of the file system: every path of ours is below one root; writes are atomic."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dgx_kvm_sw.model.errors import BusyError, HostError, NoTemplateError


class Root:
    """Absolute paths ("/sys/class/net") below a directory; "/" is the machine itself."""

    def __init__(self, directory: str | Path = "/") -> None:
        self.directory = Path(directory)

    def path(self, absolute: str) -> Path:
        return self.directory / absolute.lstrip("/")

    def read(self, absolute: str, default: str | None = None) -> str:
        """Return a file's text, stripped. `default` stands for a file that cannot be read."""
        try:
            return self.path(absolute).read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            if default is not None:
                return default
            raise explained(error, "read", self.path(absolute)) from error

    def names(self, absolute: str) -> list[str]:
        """Sorted names in a directory; empty when there is no such directory."""
        try:
            return sorted(os.listdir(self.path(absolute)))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise explained(error, "list", self.path(absolute)) from error

    def exists(self, absolute: str) -> bool:
        return self.path(absolute).exists()

    def link_name(self, absolute: str) -> str | None:
        """The last part of a symbolic link's target, or None when there is no link."""
        try:
            return os.path.basename(os.readlink(self.path(absolute)))
        except OSError:
            return None

    def write(self, absolute: str, text: str, mode: int = 0o644, *, sync: bool = True) -> None:
        """Replace a file as a whole: write a new one beside it, sync, rename."""
        write_atomically(self.path(absolute), text, mode, sync=sync)

    def put(self, absolute: str, text: str) -> None:
        """Write into a file that is there, such as an attribute in sysfs: nothing is replaced."""
        try:
            descriptor = os.open(self.path(absolute), os.O_WRONLY | os.O_TRUNC)
            try:
                os.write(descriptor, text.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise explained(error, "write", self.path(absolute)) from error

    def append(self, absolute: str, text: str, mode: int = 0o640, *, sync: bool = True) -> None:
        """Append whole lines to a log in one write."""
        path = self.path(absolute)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, mode)
            try:
                _write_whole(descriptor, text.encode())
                if sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise explained(error, "write", path) from error

    def remove(self, absolute: str) -> None:
        """Remove a file; one that is gone already is fine."""
        try:
            self.path(absolute).unlink(missing_ok=True)
        except OSError as error:
            raise explained(error, "remove", self.path(absolute)) from error


def _write_whole(descriptor: int, data: bytes) -> None:
    """Write all of `data`, or nothing: the kernel writes what still fits on a full disk."""
    written = 0
    try:
        while written < len(data):
            written += os.write(descriptor, data[written:])
    except OSError:
        if written:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
        raise


_SOURCE_TREE = Path(__file__).parents[2] / "etc/dgx-kvm/templates"
_LOCK_POLL_SECONDS = 0.1
_PRISTINE = "/usr/share/dgx-kvm/templates"
_MACHINES_OWN = ("/boot", "/dev", "/etc", "/proc", "/run", "/sys", "/usr", "/var")


def template_path(root: Root, name: str) -> Path:
    """Find a template: the admin's own, else the pristine one; raises HostError without either.

    A link of the admin's that leads nowhere counts as there: reading it fails, and says so.
    """
    admins = root.path("/etc/dgx-kvm/templates") / name
    try:
        admins.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return pristine_template_path(root, name)
    except OSError as error:
        raise explained(error, "read", admins) from error
    return admins


def pristine_template_path(root: Root, name: str) -> Path:
    """Find a template as it was shipped: below the root, in the source tree, or installed.

    The last two serve roots that are not a whole system: a simulated machine, a test.
    """
    for folder in (root.path(_PRISTINE), _SOURCE_TREE, Path(_PRISTINE)):
        if (folder / name).exists():
            return folder / name
    raise NoTemplateError(
        f"there is no template {name!r} in {root.path('/etc/dgx-kvm/templates')} or {_PRISTINE}",
        "name a template that is there, or reinstall the package dgx-kvm-sw",
    )


def write_atomically(
    path: Path, content: str | bytes, mode: int = 0o644, *, sync: bool = True
) -> None:
    """Write so that a reader, or with `sync` a power cut, sees the old file or the new one."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(content if isinstance(content, bytes) else content.encode())
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
        if sync:
            sync_path(path.parent)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise explained(error, "write", path) from error


def sync_path(path: str | Path) -> None:
    """Have what a file holds, or which names a folder has, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, holder: str, wait: float = 0.0) -> Iterator[None]:
    """Hold an exclusive lock on `path`; raises BusyError naming the holder when it is taken,
    and still is after `wait` seconds.

    The lock belongs to the open file, so it goes with the process however that ends.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o640)
    except OSError as error:
        raise explained(error, "open the lock", path) from error
    try:
        _lock(descriptor, wait)
        with contextlib.suppress(OSError):  # a full disk; the name is only for others to read
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{holder}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, wait: float) -> None:
    end = time.monotonic() + wait
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                break
        time.sleep(_LOCK_POLL_SECONDS)
    other = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "a process"
    raise BusyError(
        f"{other} is changing the VMs of this host",
        "wait for it to end, then try again; --wait SECONDS does",
    )


def explained(error: OSError, doing: str, path: Path) -> HostError:
    """Turn an OSError into one sentence with a next step."""
    become_root = "run the command as root"
    if not path.is_absolute() or f"/{path.parts[1]}" not in _MACHINES_OWN:
        become_root = f"choose another directory, or {become_root}"
    hints = {
        errno.ENOSPC: "free some space on that file system and try again",
        errno.EACCES: become_root,
        errno.EPERM: become_root,
        errno.EROFS: "mount that file system writable and try again",
    }
    reason = (error.strerror or str(error)).lower()
    return HostError(f"cannot {doing} {path}: {reason}", hints.get(error.errno or 0, ""))
