"""Files: whole or not at all, below one root, errors in words."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dgx_kvm_sw.access import files
from dgx_kvm_sw.access.files import Root, explained, locked, template_path, write_atomically
from dgx_kvm_sw.guest.templates import Templates
from dgx_kvm_sw.model.errors import BusyError, HostError


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_absolute_paths_stay_below_the_root(root: Root) -> None:
    assert root.path("/etc/x") == root.directory / "etc/x"
    assert Root().path("/etc/x") == Path("/etc/x")


def test_reading(root: Root) -> None:
    root.path("/f").write_bytes(b" a\xff\n")
    assert root.read("/f") == "a\N{REPLACEMENT CHARACTER}"
    assert root.read("/none", "default") == "default"
    with pytest.raises(HostError, match=r"cannot read .*/none: no such file or directory"):
        root.read("/none")


def test_names_are_sorted_and_a_missing_folder_is_empty(root: Root) -> None:
    for name in "ba":
        root.write(f"/d/{name}", "")
    assert root.names("/d") == ["a", "b"]
    assert root.names("/none") == root.names("/d/a") == []


def test_links_are_read_by_their_last_part(root: Root) -> None:
    root.path("/driver").symlink_to("../../bus/pci/drivers/vfio-pci")
    assert root.link_name("/driver") == "vfio-pci"
    assert root.link_name("/none") is None


# -- atomic writes ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755])
def test_a_file_has_its_mode_whatever_the_umask(root: Root, mode: int) -> None:
    before = os.umask(0o077)
    try:
        root.write("/deep/er/f", "text", mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE(root.path("/deep/er/f").stat().st_mode) == mode
    assert root.read("/deep/er/f") == "text"


def test_a_reader_sees_the_old_file_or_the_new(root: Root) -> None:
    """However often it looks while others write."""
    texts = {str(n) * 50_000 for n in range(3)}
    root.write("/f", "0" * 50_000, sync=False)
    stop = threading.Event()

    def writer(text: str) -> None:
        while not stop.is_set():
            root.write("/f", text, sync=False)

    writers = [threading.Thread(target=writer, args=(text,)) for text in texts]
    for thread in writers:
        thread.start()
    seen = {root.read("/f") for _ in range(300)}
    stop.set()
    for thread in writers:
        thread.join()
    assert seen <= texts
    assert root.names("/") == ["f"]


def test_a_write_is_on_disk_before_it_has_the_name(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut needs: the file's data, then its name, then the folder."""
    log: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        log.append(f"{kind} of {os.fstat(descriptor).st_size if kind == 'file' else ''}")
        fsync(descriptor)

    def replaced(source: str, target: Path) -> None:
        log.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    root.write("/f", "four")
    assert log == ["file of 4", "rename", "folder of "]


def fails(code: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("step", ["fsync", "replace", "fchmod"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    root: Root, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    root.write("/f", "old")
    monkeypatch.setattr(os, step, fails(errno.ENOSPC))
    with pytest.raises(HostError) as caught:
        root.write("/f", "new")
    assert caught.value.message.endswith("/f: no space left on device")
    assert caught.value.hint == "free some space on that file system and try again"
    assert root.read("/f") == "old"
    assert root.names("/") == ["f"]


def test_a_file_in_the_way_of_a_folder_is_said(root: Root) -> None:
    root.write("/f", "")
    with pytest.raises(HostError, match=r"cannot write .*/f/g: "):
        root.write("/f/g", "")
    root.path("/d").mkdir()
    with pytest.raises(HostError, match=r"cannot write .*/d: is a directory"):
        write_atomically(root.path("/d"), "")
    assert root.names("/") == ["d", "f"]


@pytest.mark.parametrize(
    ("code", "path", "hint"),
    [
        (errno.EACCES, "/etc/x", "run the command as root"),
        (errno.EPERM, "/run/x", "run the command as root"),
        (errno.EACCES, "/home/me/x", "choose another directory, or run the command as root"),
        (errno.EPERM, "x", "choose another directory, or run the command as root"),
        (errno.EROFS, "/x", "mount that file system writable and try again"),
        (errno.EIO, "/x", ""),
    ],
)
def test_errors_say_what_to_do(code: int, path: str, hint: str) -> None:
    error = explained(OSError(code, os.strerror(code)), "write", Path(path))
    assert error.message == f"cannot write {path}: {os.strerror(code).lower()}"
    assert error.hint == hint


# -- logs -------------------------------------------------------------------------------------


def test_lines_are_appended_whole(root: Root) -> None:
    for line in "ab":
        root.append("/log/f", f"{line}\n")
    assert root.path("/log/f").read_text() == "a\nb\n"
    assert stat.S_IMODE(root.path("/log/f").stat().st_mode) & 0o027 == 0


def test_a_line_that_does_not_fit_leaves_no_half(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk takes what fits, and tells only whoever comes with the rest."""
    root.append("/f", "whole\n")
    write = os.write
    calls: list[int] = []

    def nearly_full(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:3])

    monkeypatch.setattr(os, "write", nearly_full)
    with pytest.raises(HostError, match="no space left on device"):
        root.append("/f", "second\n")
    assert root.path("/f").read_text() == "whole\n"
    assert len(calls) == 2


def test_removing_what_is_gone_is_fine(root: Root) -> None:
    root.write("/f", "")
    root.remove("/f")
    root.remove("/f")
    root.path("/d").mkdir()
    with pytest.raises(HostError, match=r"cannot remove .*/d: is a directory"):
        root.remove("/d")


# -- the lock ---------------------------------------------------------------------------------


def test_the_lock_is_for_one_at_a_time(root: Root) -> None:
    path = root.path("/run/lock")
    with locked(path, "first (process 1)"):
        with pytest.raises(BusyError) as caught, locked(path, "second"):
            pytest.fail("both hold it")
        assert caught.value.message == "first (process 1) is changing the VMs of this host"
        assert caught.value.exit_code == 75
    with locked(path, "third"):
        assert root.read("/run/lock") == "third"


def test_the_lock_is_given_back_after_an_error(root: Root) -> None:
    with pytest.raises(KeyError), locked(root.path("/lock"), "first"):
        raise KeyError
    with locked(root.path("/lock"), "second"):
        pass


def test_waiting_for_the_lock(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LOCK_POLL_SECONDS", 0.01)
    path = root.path("/lock")
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(path, "first"):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(10)
    with pytest.raises(BusyError), locked(path, "second", wait=0.05):
        pytest.fail("both hold it")
    threading.Timer(0.05, leave.set).start()
    with locked(path, "second", wait=10):
        assert root.read("/lock") == "second"
    thread.join()


def test_a_lock_that_cannot_be_opened_is_said(root: Root) -> None:
    root.path("/lock").mkdir()
    with (
        pytest.raises(HostError, match="cannot open the lock"),
        locked(root.path("/lock"), "first"),
    ):
        pass


# -- templates --------------------------------------------------------------------------------


def test_the_admins_template_goes_before_the_shipped_one(root: Root) -> None:
    shipped = template_path(root, "domain.xml.j2")
    assert shipped.is_file()
    root.write("/usr/share/dgx-kvm/templates/domain.xml.j2", "")
    assert template_path(root, "domain.xml.j2").is_relative_to(root.path("/usr"))
    root.write("/etc/dgx-kvm/templates/domain.xml.j2", "")
    assert template_path(root, "domain.xml.j2").is_relative_to(root.path("/etc"))
    assert files.pristine_template_path(root, "domain.xml.j2").is_relative_to(root.path("/usr"))


def test_a_link_that_leads_nowhere_is_not_taken_for_the_shipped_template(root: Root) -> None:
    link = root.path("/etc/dgx-kvm/templates/domain.xml.j2")
    link.parent.mkdir(parents=True)
    link.symlink_to("nowhere")
    assert template_path(root, "domain.xml.j2") == link
    with pytest.raises(HostError, match=r"cannot read the template .*: no such file"):
        Templates(root).digest("domain.xml.j2")


def test_a_template_that_is_nowhere_is_said(root: Root) -> None:
    with pytest.raises(HostError, match="there is no template 'none.j2'"):
        template_path(root, "none.j2")
