"""The seed of a VM: rendered, written as an ISO image that cloud-init finds, and recognised again.

The image itself says what it was made from, in the field for its application: so whether it is
still right is seen without making it again, and there is nothing beside it that could disagree.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dgx_kvm_sw.access.files import Root, explained, write_atomically
from dgx_kvm_sw.access.run import run
from dgx_kvm_sw.guest.firstboot import MIME
from dgx_kvm_sw.guest.templates import Templates
from dgx_kvm_sw.model.base import digest
from dgx_kvm_sw.model.errors import BadFileError, HostError, Problem
from dgx_kvm_sw.model.seed import Seed, SeedFacts

TEMPLATE = "cloud-init.yaml.j2"
FILES = ("meta-data", "network-config", "user-data", "vendor-data")

_WORK = "/run/dgx-kvm/seed"  # in memory: user data may be secret
_LABEL = "cidata"  # by which cloud-init finds it
_MARK = "dgx-kvm seed "
_SECTOR = 2048
_DESCRIPTOR = 16 * _SECTOR  # ISO 9660: the primary volume descriptor is sector 16,
_APPLICATION = slice(574, 574 + 128)  # and in it this field, in capitals, with blanks behind
_SECONDS = 60.0

# Ours comes second, as it is the later part that says how the two are merged: what is there stays,
# mappings grow, and our items stand before those of the same list.
_MERGE_HOW = "list(prepend)+dict(no_replace,recurse_list)+str()"


def seed_digest(templates: Templates, facts: SeedFacts) -> str:
    """Return a digest of all that a seed is made from. It does not need Jinja."""
    return digest(templates.digest(TEMPLATE), facts)


def held_digest(root: Root, path: str) -> str | None:
    """Return the digest of what a seed was made from: "" for none, None when we may not know."""
    try:
        with root.path(path).open("rb") as stream:
            stream.seek(_DESCRIPTOR)
            field = stream.read(_SECTOR)[_APPLICATION].decode("ascii", "replace").strip().lower()
    except PermissionError:
        return None
    except OSError:
        return ""
    return field.removeprefix(_MARK) if field.startswith(_MARK) else ""


# -- what is in it ------------------------------------------------------------------------------


def render(templates: Templates, facts: SeedFacts) -> Seed:
    """Print a seed's files by the template, with the operator's own user data beside ours.

    Raises BadFileError when the template is wrong or prints no seed.
    """
    import yaml

    text = templates.render(TEMPLATE, vm=replace(facts, user_data=""))  # it may hold secrets
    try:
        parts = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _bad(templates, f"its output is not YAML: {_one_line(error)}") from error
    _check(templates, parts, facts)
    files = {name: _dumped(parts[name]) for name in sorted(parts)}
    if facts.user_data:
        ours = _dumped({**parts["user-data"], "merge_how": _MERGE_HOW})
        files["user-data"] = _multipart(facts.user_data, f"#cloud-config\n{ours}")
    else:
        files["user-data"] = f"#cloud-config\n{files['user-data']}"
    return Seed(facts, seed_digest(templates, facts), files)


def _dumped(value: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(value, sort_keys=False, width=1000)


def _check(templates: Templates, parts: Any, facts: SeedFacts) -> None:
    if not isinstance(parts, dict) or not {"user-data", "meta-data"} <= parts.keys():
        raise _bad(templates, "its output is not a mapping with user-data and meta-data")
    for name, value in parts.items():
        if name not in FILES or not isinstance(value, dict):
            raise _bad(templates, f"its output has {name!r}, which is no mapping of a seed's file")
    if parts["meta-data"].get("instance-id") != facts.uuid:
        # Or every guest would begin anew, with new host keys, when its id changes.
        raise _bad(templates, "does not print the instance-id as given")


def _bad(templates: Templates, message: str) -> BadFileError:
    problem = Problem(str(templates.path(TEMPLATE)), 0, 0, 0, 0, "", message)
    return BadFileError((problem,))


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or "it cannot be parsed"
    return f"{reason}, in line {mark.line + 1} of it" if mark else str(reason)


def _multipart(theirs: str, ours: str) -> str:
    """Return user data of two parts, the operator's and ours."""
    import email
    from email.mime.multipart import MIMEMultipart
    from email.mime.text import MIMEText

    whole = MIMEMultipart(boundary=f"=={digest(theirs, ours)}==")
    if MIME.match(theirs):
        whole.attach(email.message_from_string(theirs))
    else:
        whole.attach(MIMEText(theirs))  # cloud-init knows by its first line what it is
    whole.attach(MIMEText(ours, "cloud-config"))
    return whole.as_string()


# -- the image ----------------------------------------------------------------------------------


def write(root: Root, path: str, seed: Seed, prepare: Callable[[Path], None]) -> None:
    """Write a seed's image; the caller holds the lock, and no running VM has it.

    `prepare` is called with the folder of the files before, and may change them.
    """
    work = root.path(_WORK)
    try:
        shutil.rmtree(work, ignore_errors=True)  # of a command that was killed
        work.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(mode=0o700)
        files = work / "files"
        files.mkdir(mode=0o700)
        for name, text in seed.files.items():
            write_atomically(files / name, text, 0o600, sync=False)
        prepare(files)
        image = work / "seed.iso"
        _make(files, image, seed)
        write_atomically(root.path(path), image.read_bytes(), 0o600)
    except OSError as error:
        raise explained(error, "make a seed in", work) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _make(files: Path, image: Path, seed: Seed) -> None:
    mkisofs = ("xorriso", "-no_rc", "-as", "mkisofs", "-quiet", "-J", "-r")
    labels = ("-V", _LABEL, "-A", f"{_MARK}{seed.digest}")
    done = run((*mkisofs, *labels, "-o", os.fspath(image), os.fspath(files)), timeout=_SECONDS)
    if done.code:
        raise HostError(f"xorriso could not make the seed of {seed.facts.name}", _last(done.err))


def _last(text: str) -> str:
    return text.strip().rpartition("\n")[2]
