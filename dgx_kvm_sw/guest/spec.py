"""Reads vms.yaml, vms.d and the size templates: one complete HostSpec, or what is wrong."""

from __future__ import annotations

import math
import os.path
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dgx_kvm_sw.access.files import Root, explained, template_path
from dgx_kvm_sw.guest import firstboot
from dgx_kvm_sw.guest.document import WHOLE_FILE, Document
from dgx_kvm_sw.guest.schema import schema_text, violations
from dgx_kvm_sw.guest.speccheck import VmEntry, disk_parts, mistakes, tenant_entries, vm_entries
from dgx_kvm_sw.guest.yamlsource import MAX_BYTES, parse
from dgx_kvm_sw.model.base import digest
from dgx_kvm_sw.model.errors import BadFileError, HostError, Problem
from dgx_kvm_sw.model.spec import (
    SIZES,
    Amount,
    Disk,
    DiskFormat,
    Firmware,
    HostShare,
    HostSpec,
    Hugepages,
    Network,
    NetworkKind,
    OsDisk,
    PowerState,
    Resources,
    Share,
    Tenant,
    VmSpec,
)

_RESERVE = {"cpus": "4%", "memory": "6%"}
_CPU_POOL = {"cpus": "4%", "memory": "4%"}
_VM_DEFAULTS: dict[str, Any] = {
    "tenant": "",
    "pin": [],
    "image": "",
    "user": "dgx",
    "ssh_keys": [],
    "user_data": "",
    "firmware": "uefi",
    "disks": [],
    "networks": [],
    "template": "domain.xml.j2",
    "state": "running",
}

_SCHEMAS = ("vms", "size")
_SIZE = re.compile(r"([0-9.]+) ?([KMGT])iB")
_KIB = {"K": 1, "M": 1 << 10, "G": 1 << 20, "T": 1 << 30}


@dataclass(frozen=True)
class _Read:
    """All files of one load."""

    files: tuple[Document, ...]  # vms.yaml, then vms.d
    sizes: Mapping[int, Document]  # templates of the sizes that VMs have

    @property
    def everything(self) -> tuple[Document, ...]:
        return (*self.files, *self.sizes.values())


def load(
    root: Root,
    spec_file: str,
    images: Collection[str] | None = None,
    validated: str = "",
    templates: Root | None = None,
) -> HostSpec:
    """Read `spec_file` and the vms.d beside it; raises BadFileError with all their problems.

    `images` are the names an `image` may have; None leaves that unchecked. `validated` is the
    digest of a HostSpec that was loaded before: the schema check, most of the time that a load
    takes, need not be repeated for the same texts. `templates` is the root of the size templates
    where that is another one.
    """
    read = _read_all(root, spec_file, templates)
    schemas = {name: schema_text(name) for name in _SCHEMAS}
    found = digest(schemas, [(each.file, each.source.text) for each in read.everything])
    problems = [*_unreadable(read)]
    if found != validated:
        problems += _violations(read, schemas)
    named = firstboot.Files(root)
    if all(each.complete for each in read.everything):
        problems += firstboot.mistakes(read.files, named)
        # Otherwise what is declared in the unreadable file would be called missing here.
        problems += mistakes(read.files, read.sizes, images)
    if problems:
        order = {each.file: index for index, each in enumerate(read.everything)}
        last = len(order)  # files that ours name
        problems.sort(key=lambda each: (order.get(each.file, last), each.line, each.column))
        # A line with a key may hold the private half of one.
        shown = (replace(p, snippet="") if "ssh_keys[" in p.path else p for p in problems)
        raise BadFileError(tuple(dict.fromkeys(shown)))
    return _host_spec(read, found, named)


def sample_vm(root: Root, spec_file: str, gpus: int, templates: Root | None = None) -> VmSpec:
    """Return a VM that says nothing but its size, as `defaults` and the size's template make it.

    Raises BadFileError when they are wrong: nothing has looked at the template of a size that
    no VM has.
    """
    main = _document(root.path(spec_file), spec_file)
    defaults = {key: value for key, value in main.mapping("defaults").items() if key != "tenant"}
    vm = {"name": f"{gpus}-gpu", "gpus": gpus}
    file = replace(main, value={"version": 1, "defaults": defaults, "vms": [vm]})
    read = _Read((file,), {gpus: _size_template(root, gpus, templates)})
    problems = [*_unreadable(read), *mistakes(read.files, read.sizes, None)]
    if not problems:
        try:
            return _host_spec(read, "", firstboot.Files(root)).vms[0]
        except (KeyError, TypeError, ValueError, AttributeError):
            problems += _violations(read, {name: schema_text(name) for name in _SCHEMAS})
    raise BadFileError(tuple(problems))


def _read_all(root: Root, spec_file: str, templates: Root | None) -> _Read:
    files = tuple(_document(root.path(file), file) for file in _files(root, spec_file))
    used = {vm.gpus for vm in vm_entries(files)}
    sizes = [size for size in SIZES if size in used]
    return _Read(files, {size: _size_template(root, size, templates) for size in sizes})


def _files(root: Root, spec_file: str) -> Iterator[str]:
    yield spec_file
    folder = os.path.join(os.path.dirname(spec_file), "vms.d")
    for name in root.names(folder):
        if name.endswith(".yaml") and not name.startswith("."):
            yield os.path.join(folder, name)


def _size_template(root: Root, size: int, templates: Root | None) -> Document:
    path = template_path(templates or root, f"{size}-gpu.yaml")
    inside = path.is_relative_to(root.directory)
    return _document(path, f"/{path.relative_to(root.directory)}" if inside else str(path))


def _document(path: Path, file: str) -> Document:
    try:
        with path.open("rb") as stream:
            return parse(file, stream.read(MAX_BYTES + 1))
    except FileNotFoundError:
        hint = "create it; `version: 1` alone is a file without VMs"
        raise HostError(f"there is no file {path}", hint) from None
    except OSError as error:
        raise explained(error, "read", path) from error


def _unreadable(read: _Read) -> Iterator[Problem]:
    for each in read.everything:
        yield from each.problems
        if each.complete and each.value is None:
            needs = "`version: 1`" if each in read.files else "`cpus`, `memory` and the others"
            yield each.source.problem(WHOLE_FILE, f"is empty; it needs at least {needs}")


def _violations(read: _Read, schemas: Mapping[str, str]) -> Iterator[Problem]:
    for index, each in enumerate(read.files):
        if each.value is not None:
            yield from violations(each, schemas["vms"], optional=index > 0)
    for each in read.sizes.values():
        if each.value is not None:
            yield from violations(each, schemas["size"])


# From here on everything is known to be as the schemas say.


def _host_spec(read: _Read, found: str, named: firstboot.Files) -> HostSpec:
    host = read.files[0].mapping("host")
    return HostSpec(
        vms=tuple(_vm(vm, read.sizes, named) for vm in vm_entries(read.files)),
        tenants=tuple(
            Tenant(each.name, each.limits.get("max_gpus"), each.limits.get("max_vms"), each.source)
            for each in tenant_entries(read.files)
        ),
        reserve=_host_share({**_RESERVE, **host.get("reserve", {})}),
        cpu_pool=_host_share({**_CPU_POOL, **host.get("cpu_pool", {})}),
        files=tuple(each.file for each in read.files),
        digest=found,
    )


def _host_share(section: Mapping[str, Any]) -> HostShare:
    return HostShare(cpus=_amount(section["cpus"]), memory=_amount(section["memory"]))


def _vm(entry: VmEntry, sizes: Mapping[int, Document], named: firstboot.Files) -> VmSpec:
    gpus = entry.own["gpus"]
    template = sizes[gpus].mapping()
    settings = {**_VM_DEFAULTS, **template, **entry.settings}
    settings["os_disk"] = {
        **disk_parts(template["os_disk"]),
        **disk_parts(entry.settings.get("os_disk", {})),
    }
    if "vcpus" in settings:
        settings["cpus"] = settings["vcpus"]
    return VmSpec(
        name=entry.name,
        tenant=settings["tenant"],
        gpus=gpus,
        pin=tuple(str(pin) for pin in settings["pin"]),
        state=PowerState(settings["state"]),
        image=settings["image"],
        firmware=Firmware(settings["firmware"]),
        disks=tuple(_disk(disk) for disk in settings["disks"]),
        networks=tuple(_network(network) for network in settings["networks"]),
        template=settings["template"],
        resources=_resources(settings),
        first_boot=firstboot.first_boot(settings, named),
        source=entry.source,
    )


def _resources(settings: Mapping[str, Any]) -> Resources:
    return Resources(
        cpus=_amount(settings["cpus"]),
        memory=_amount(settings["memory"]),
        nics=_amount(settings["nics"]),
        nvswitches=settings["nvswitches"],
        drives=_amount(settings["drives"]),
        hugepages=Hugepages(settings["hugepages"]),
        max_queues=settings["max_queues"],
        iothreads=settings["iothreads"],
        os_disk=_os_disk(settings["os_disk"]),
    )


def _os_disk(parts: Mapping[str, Any]) -> OsDisk:
    copy = parts.get("from", "overlay") == "copy"
    return OsDisk(_mib(parts["size"]), copy, DiskFormat(parts.get("format", "qcow2")))


def _disk(disk: Mapping[str, Any]) -> Disk:
    group = disk.get("lvm", "")
    kind = DiskFormat.RAW if group else DiskFormat(disk.get("format", "qcow2"))
    return Disk(disk["name"], _mib(disk["size"]), kind, group, disk.get("mount", ""))


def _network(network: Mapping[str, Any]) -> Network:
    kind = next(kind for kind in NetworkKind if str(kind) in network)
    name = network[str(kind)]
    return Network(kind, "" if name is True else name, network.get("vlan", 0))


def _amount(value: int | str) -> Amount:
    """Read a number, a share ("50%") or a size ("4GiB", in MiB)."""
    if isinstance(value, int):
        return value
    return Share(float(value[:-1]) / 100) if value.endswith("%") else _mib(value)


def _mib(size: str) -> int:
    """Read a size; part of a MiB counts as one, so that nothing gets less than asked for."""
    match = _SIZE.fullmatch(size)
    if not match:
        raise ValueError(size)  # the schema has the same pattern
    return math.ceil(float(match[1]) * _KIB[match[2]] / 1024)
