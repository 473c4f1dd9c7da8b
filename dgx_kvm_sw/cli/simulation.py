"""`--simulate`: a machine that lives in one directory, made when it is first asked for."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

from dgx_kvm_sw.access.files import Root, locked
from dgx_kvm_sw.model.errors import HostError, UsageError

_MARK = "/simulated"  # says which machine lives here, and whether it is complete
_COMPLETE = "complete 2"  # the number grows with what is laid out; an older one is laid out anew
_LOCK = "/lock"
_IMAGES = ("debian-12", "ubuntu-22.04")
_SAMPLE_SPECS = (  # in a source tree, as installed
    Path(__file__).parents[2] / "etc/dgx-kvm/vms.yaml",
    Path("/usr/share/dgx-kvm/vms.yaml"),
)
_EMPTY_SPEC = "version: 1\nvms: []\n"
_SECONDS_TO_BUILD = 20


def machine(platform: str, directory: str | None) -> Root:
    """Return the simulated machine in `directory`, complete; removing the directory resets it."""
    root = Root(Path(directory).absolute() if directory else _default_directory(platform))
    if root.read(_MARK, "") != f"{platform} {_COMPLETE}":
        _check_is_ours(root, platform)
        with locked(root.path(_LOCK), "another command", _SECONDS_TO_BUILD):
            _build(root, platform)
    return root


def _default_directory(platform: str) -> Path:
    state = os.environ.get("XDG_STATE_HOME", "")
    try:
        base = Path(state) if os.path.isabs(state) else Path.home() / ".local/state"
    except RuntimeError:  # no HOME, and a user that is in no table
        raise UsageError(
            "there is no home directory to keep the simulated machine in",
            "say where with --state DIR",
        ) from None
    return base / "dgx-kvm" / platform


def _check_is_ours(root: Root, platform: str) -> None:
    """Never unpack a machine among other files, or over another machine."""
    found = root.read(_MARK, "").split()
    if found and found[0] != platform:
        raise HostError(
            f"{root.directory} already simulates {found[0]}, not {platform}",
            "choose another directory with --state, or remove this one",
        )
    if not found and set(root.names("/")) - {_LOCK.strip("/")}:
        raise HostError(
            f"{root.directory} holds other files",
            "give --state a directory that is empty or not there yet",
        )


def _build(root: Root, platform: str) -> None:
    """Make what is missing; the mark says "complete" last, so a killed build is taken up again."""
    from dgx_kvm_sw.guest.simulated import NODE_FILE
    from dgx_kvm_sw.host import platforms, simulate
    from dgx_kvm_sw.reconcile import SPEC_FILE

    root.write(_MARK, f"{platform}\n", sync=False)
    for left_over in root.directory.glob(".building-*"):  # of a build that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    simulate.build(platform, root.directory)
    _, topology = platforms.survey(root)
    root.write(NODE_FILE, simulate.libvirt_node_xml(topology), sync=False)
    for name in _IMAGES:
        _put_image(root, name)
    if not root.exists(SPEC_FILE):
        root.write(SPEC_FILE, _sample_spec(), sync=False)
    root.write(_MARK, f"{platform} {_COMPLETE}\n", sync=False)


def _put_image(root: Root, name: str) -> None:
    """Lay down what an image package does; the image itself is a few bytes."""
    from dgx_kvm_sw.guest.images import MANIFESTS, Image, manifest_text

    system, _, release = name.partition("-")
    content = f"the simulated guest image {name}\n"
    image = Image(
        name=name,
        version="1.0",
        path=f"/usr/share/dgx-kvm/images/{name}.qcow2",
        format="qcow2",
        sha256=hashlib.sha256(content.encode()).hexdigest(),
        size_bytes=len(content),
        virtual_size_bytes=2 << 30,
        title=f"{system.title()} {release}",
        os=system,
        release=release,
        package=f"dgx-kvm-image-{name}",
    )
    root.write(image.path, content, sync=False)
    root.write(f"{MANIFESTS}/{name}.json", manifest_text(image), sync=False)


def _sample_spec() -> str:
    for path in _SAMPLE_SPECS:
        with contextlib.suppress(OSError):
            return path.read_text(encoding="utf-8")
    return _EMPTY_SPEC
