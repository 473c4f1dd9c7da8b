"""The verb image: the catalogue of guest images, looked at, verified, added to, taken from."""

from __future__ import annotations

import difflib
import functools
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgx_kvm_sw.access.files import explained
from dgx_kvm_sw.cli.bar import bar
from dgx_kvm_sw.cli.imageoptions import READING
from dgx_kvm_sw.cli.output import complain, counted, listed, say, say_json, size, view_of
from dgx_kvm_sw.cli.session import site_of
from dgx_kvm_sw.guest import announcing, bases, checksums, images
from dgx_kvm_sw.guest.images import Catalogue, Fault, Image
from dgx_kvm_sw.model.base import to_json
from dgx_kvm_sw.model.domain import Volume
from dgx_kvm_sw.model.errors import BadFileError, DgxKvmError, ExitCode, UsageError
from dgx_kvm_sw.reconcile import Site, disks_now, read_current

_FOUND_BY_READING = ("hash mismatch", "bases damaged")
_HEAD = ("NAME", "VERSION", "SIZE", "DRIVER", "FROM", "STATE")
_Users = Mapping[str, set[str]]  # by base: the VMs whose disks lie on it


def image(args: Namespace) -> int:
    """Do one of the actions; each has a function of its own."""
    if args.json and args.action not in READING:
        raise UsageError(f"`image {args.action}` has no --json; image list and image show have")
    actions: dict[str, Callable[[Site, Namespace], int]] = {
        "list": _list,
        "show": _show,
        "verify": _verify,
        "import": _import,
        "remove": _remove,
        "rescan": _rescan,
    }
    return actions[args.action](site_of(args), args)


# -- looking ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """An image as it is shown; one whose manifest is bad has nothing but a name and a fault."""

    name: str
    image: Image | None
    fault: Fault | None
    state: str
    vms: tuple[str, ...]  # whose disks lie on it
    vms_elsewhere: tuple[str, ...]  # whose disks lie on another version of it
    verified: bool  # somebody has read the file as it is now, and it was as it has to be

    def json(self) -> dict[str, Any]:
        known = to_json(self.image) if self.image else {"name": self.name}
        return {
            **known,
            "imported": bool(self.image and self.image.imported),
            "state": self.state,
            "problem": self.fault.reason if self.fault else "",
            "remedy": self.fault.remedy if self.fault else "",
            "verified": self.verified,
            "vms": list(self.vms),
            "vms_on_other_versions": list(self.vms_elsewhere),
        }


def _rows(site: Site, found: Catalogue, users: _Users) -> list[_Row]:
    memory = checksums.remembered(site.root)
    rows = []
    for name in sorted(found.names):
        each, fault = found.images.get(name), found.faults.get(name)
        verified = bool(each) and not fault and _is_verified(site, each, memory)
        state = fault.state if fault else "ok" if verified else "ok, not verified yet"
        base = each.base if each else ""
        rows.append(_Row(name, each, fault, state, *_vms(users, name, base), verified))
    for each in found.older:
        state = f"not used: there is {found.images[each.name].version}"
        rows.append(_Row(each.name, each, None, state, *_vms(users, each.name, each.base), False))
    return rows


def _vms(users: _Users, name: str, base: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The VMs on this base, and those on other bases of the image."""
    others = {
        vm for path, who in users.items() if _is_of(path, name) and path != base for vm in who
    }
    return tuple(sorted(users.get(base, ()))), tuple(sorted(others))


def _is_verified(site: Site, each: Image | None, memory: checksums.Remembered) -> bool:
    return each is not None and each.sha256 == checksums.known(
        memory, each.path, site.root.path(each.path).stat()
    )


def _users(site: Site) -> _Users:
    """Which VMs lie on which base; where libvirt does not answer, that is said and not known."""
    try:
        with site.hypervisor(read_only=True) as hypervisor:
            return bases.users(read_current(hypervisor))
    except DgxKvmError as error:
        complain(f"which VMs use an image is not known: {error.message}")
        return {}


def _list(site: Site, args: Namespace) -> ExitCode:
    found, users = images.catalogue(site.root), _users(site)
    rows = _rows(site, found, users)
    if args.json:
        damaged = [
            {"path": base, "problem": text, "vms": sorted(users.get(base, ()))}
            for base, text, _ in bases.damages(site.root, found, users)
        ]
        listing = [row.json() for row in rows]
        say_json({"images": listing, "damaged_bases": damaged, "problems": list(found.problems)})
    elif not (rows or found.damaged):
        say("No guest images: `apt search dgx-kvm-image` or `dgx-kvm image import`")
    elif not args.quiet:
        wrong = [(f"{row.name} is not used: {row.fault.reason}", row.fault.remedy)
                 for row in rows if row.fault]  # fmt: skip
        wrong += [(text, remedy) for _, text, remedy in bases.damages(site.root, found, users)]
        say("\n".join((*_table(rows), *_steps(wrong))))
    return ExitCode.OK


def _table(rows: list[_Row]) -> Iterator[str]:
    cells = [_HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEAD))]
    for line in cells:
        yield "  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip()


def _cells(row: _Row) -> tuple[str, ...]:
    used = f", in use by {counted(len(row.vms), 'VM')}" if row.vms else ""
    each = row.image
    if each is None:
        return (row.name, "", "", "", "", row.state)
    origin = "import" if each.imported else "package"
    driver = each.driver or "-"
    return (row.name, each.version, size(each.size_bytes), driver, origin, f"{row.state}{used}")


def _steps(wrong: Iterable[tuple[str, str]]) -> Iterator[str]:
    """What is wrong, each with the next step."""
    arrow = "→" if view_of(sys.stdout).unicode else "->"
    for text, remedy in wrong:
        yield f"\n{text}\n  {arrow} {remedy}" if remedy else f"\n{text}"


def _show(site: Site, args: Namespace) -> ExitCode:
    found, users = images.catalogue(site.root), _users(site)
    _check_known(found, args.name)
    rows = [row for row in _rows(site, found, users) if row.name == args.name]
    if args.json:
        say_json({"images": [row.json() for row in rows]})
        return ExitCode.OK
    wrong = [(text, remedy) for _, text, remedy in _damages(site, found, users, args.name)]
    texts = ("\n\n".join("\n".join(_description(row)) for row in rows), *_steps(wrong))
    say("\n".join(texts), quiet=args.quiet)
    return ExitCode.OK


def _description(row: _Row) -> Iterator[str]:
    each = row.image
    facts: dict[str, str] = {"name": row.name}
    if each:
        facts |= {
            "version": each.version,
            "title": each.title,
            "system": " ".join(filter(None, (each.os, each.release, each.variant))),
            "kernel": each.kernel,
            "driver": each.driver,
            "firmware": ", ".join(each.firmware),
            "cloud-init": "yes" if each.cloud_init else "no",
            "guest agent": "yes" if each.guest_agent else "no",
            "disk": f"{size(each.virtual_size_bytes)}, {each.format}",
            "file": f"{each.path} ({size(each.size_bytes)})",
            "sha256": each.sha256,
            "from": "an import" if each.imported else f"package {each.package}".rstrip(),
        }
    facts |= {"state": row.state, "VMs": listed(row.vms) or "none"}
    facts["others on"] = (
        f"another version: {listed(row.vms_elsewhere)}" if row.vms_elsewhere else ""
    )
    if row.fault:
        facts |= {"problem": row.fault.reason, "what to do": row.fault.remedy}
    for key, value in facts.items():
        if value:
            yield f"{key + ':':<13}{value}"


def _damages(
    site: Site, found: Catalogue, users: _Users, name: str
) -> tuple[tuple[str, str, str], ...]:
    """What is wrong with the bases of one image: which, in words, and what to do."""
    every = bases.damages(site.root, found, users)
    return tuple(each for each in every if _is_of(each[0], name))


def _check_known(found: Catalogue, name: str) -> None:
    if name not in found.names:
        close = difflib.get_close_matches(name, found.names, 1)
        hint = f"did you mean {close[0]}?" if close else "`dgx-kvm image list` lists the images"
        raise UsageError(f"there is no image {name!r}", hint)


# -- verifying ----------------------------------------------------------------------------------


def _verify(site: Site, args: Namespace) -> ExitCode:
    found = images.catalogue(site.root)
    for name in args.names:
        _check_known(found, name)
    there, users = images.base_files(site.root), _users(site)
    owners = {images.base_owner(base) for base in (*there, *users)} - {""}
    names = list(dict.fromkeys(args.names)) or sorted({*found.names, *owners})
    good = True
    for name in names:
        paths = [base for base in there if _is_of(base, name)]
        fault = found.faults.get(name)
        # What was damaged when it was last read is read again.
        if name in found.images and (not fault or fault.state in _FOUND_BY_READING):
            paths.insert(0, found.images[name].path)
        read = _read(site, paths, name, quiet=args.quiet)
        good = _is_good(site, name, read, users, quiet=args.quiet) and good
    if not names:
        say("There are no images.", quiet=args.quiet)
    return ExitCode.OK if good else ExitCode.FAILED


def _is_good(
    site: Site, name: str, read: checksums.Remembered, users: _Users, *, quiet: bool
) -> bool:
    """Say what is known by now of an image and of all that disks lie on, or may."""
    found = images.catalogue(site.root, read)
    fault = found.faults.get(name)
    damages = _damages(site, found, users, name)
    is_damaged = any(base in found.damaged for base, _, _ in damages)
    base_state = "base damaged" if is_damaged else "base gone" if damages else "ok"
    state = fault.state if fault else base_state
    say(f"{name}: {state}", quiet=quiet and state == "ok")
    if fault:
        complain(fault.reason, fault.remedy)
    for _, text, remedy in damages:
        complain(text, remedy)
    return state == "ok"


def _read(site: Site, paths: Iterable[str], label: str, *, quiet: bool) -> checksums.Remembered:
    """Read files and remember their checksums; one file by several names is read once."""
    by_inode: dict[tuple[int, int], str] = {}
    read = {}
    for path in paths:
        file = site.root.path(path)
        try:
            found = file.stat()
        except OSError as error:
            raise explained(error, "read", file) from error
        inode = (found.st_dev, found.st_ino)
        if inode not in by_inode:
            with bar(label, quiet=quiet) as progress:
                by_inode[inode] = checksums.sha256_of(file, progress)
        read[path] = (checksums.State.of(found), by_inode[inode])
        checksums.remember(site.root, path, found, by_inode[inode])
    return read


# -- adding and removing ------------------------------------------------------------------------


def _import(site: Site, args: Namespace) -> ExitCode:
    from dgx_kvm_sw.guest.importing import Wanted, default_version, import_image

    wanted = Wanted(
        file=Path(args.image_file).absolute(),
        name=args.name,
        sha256=args.sha256.lower(),
        version=args.version or default_version(),
        title=args.title or "",
        os=args.os or "",
        release=args.release or "",
        driver=args.driver or "",
        signature=Path(args.signature) if args.signature else None,
        keyring=Path(args.keyring) if args.keyring else None,
    )
    with bar(args.name, quiet=args.quiet) as progress:
        made = import_image(site.root, wanted, progress)
    _journal(site, {"event": "image imported", "image": made.label, "sha256": made.sha256})
    where = site.root.path(made.path)
    say(f"Imported {made.label}, {size(made.size_bytes)}, as {where}.", quiet=args.quiet)
    return _announce(site)


def _remove(site: Site, args: Namespace) -> ExitCode:
    from dgx_kvm_sw.execute import locked_site
    from dgx_kvm_sw.guest.importing import remove_import

    with locked_site(site, f"image remove {args.name}", args.wait):
        found = images.catalogue(site.root)
        _check_removable(site, found, args.name)
        removed = remove_import(site.root, args.name)
    _journal(site, {"event": "image removed", "image": args.name})
    freed = sum(each.size_bytes for each in removed)
    say(f"Removed {args.name}, {size(freed)}.", quiet=args.quiet)
    return _announce(site)


def _check_removable(site: Site, found: Catalogue, name: str) -> None:
    """Raise unless this is an import that no disk and no declaration needs."""
    _check_known(found, name)
    imports = [each for each in found.everything if each.imported and each.name == name]
    if not imports and not site.root.exists(f"{images.IMPORTED}/{name}.json"):
        package = found.images[name].package if name in found.images else ""
        raise UsageError(
            f"image {name} was not imported, so its package removes it",
            f"apt remove {package or f'dgx-kvm-image-{name}'}",
        )
    ours = {each.path for each in imports}
    with site.hypervisor() as hypervisor:
        current, volumes = read_current(hypervisor), disks_now(site, hypervisor)

    def lies_on_it(path: str) -> bool:
        return path in ours or not ours and _is_of(path, name)

    users = bases.users(current, volumes)
    if vms := set[str]().union(*(who for path, who in users.items() if lies_on_it(path))):
        held = vms & {domain.name for domain in current.domains}
        raise UsageError(
            f"image {name} is needed: disks of {listed(sorted(vms))} lie on it",
            "; ".join(_ways_out(held, [v for v in volumes if lies_on_it(v.backing)])),
        )
    _check_undeclared(site, found, name)


def _ways_out(held: Set[str], disks: Iterable[Volume]) -> Iterator[str]:
    """How to remove these disks; only the VMs that libvirt holds can be deleted with theirs."""
    if held:
        yield f"delete {listed(sorted(held))} with --delete-disks first"
    for disk in disks:
        if disk.name.partition(".")[0] not in held:
            command = f"virsh vol-delete --pool dgx-kvm {disk.name}"
            yield f"disk {disk.path} is kept of a deleted VM: {command}"


def _is_of(path: str, name: str) -> bool:
    return images.base_owner(path) == name


def _check_undeclared(site: Site, found: Catalogue, name: str) -> None:
    """Raise when vms.yaml would be wrong without the image."""
    rest = [e for e in found.everything if e.name == name and not e.imported]
    if rest:
        return
    vms = [vm.name for vm in site.load_spec(found).vms if vm.image == name]
    without = {key: each for key, each in found.images.items() if key != name}
    faults = {key: fault for key, fault in found.faults.items() if key != name}
    try:
        site.load_spec(Catalogue(without, (), faults))
    except BadFileError:
        who = f" for {listed(vms)}" if vms else ""
        raise UsageError(
            f"image {name} is needed: {site.spec_file} names it{who}",
            "name another image there first",
        ) from None


def _rescan(site: Site, args: Namespace) -> ExitCode:
    """Say what is wrong, but never fail: dpkg calls this, for any package with an image."""
    found = images.catalogue(site.root)
    for problem in found.problems:
        complain(problem)
    for name in sorted(found.images.keys() & found.faults.keys()):
        complain(found.faults[name].reason, found.faults[name].remedy)
    return _announce(site)


def _announce(site: Site) -> ExitCode:
    """Run the hooks; one that fails is complained about and changes nothing else."""
    announcing.announce(
        site.root,
        functools.partial(_journal, site),
        lambda error: complain(error.message, error.hint),
    )
    return ExitCode.OK


def _journal(site: Site, entry: Mapping[str, object]) -> None:
    from dgx_kvm_sw.execute import write_journal

    write_journal(site, {**entry, "user": os.environ.get("SUDO_USER", "")}, sync=False)
