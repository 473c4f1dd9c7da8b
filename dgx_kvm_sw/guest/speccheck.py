"""What no schema can say about vms.yaml: names given once, references, quotas, pins, shares.

Nothing here trusts a value's type: these checks also run when the schema was not kept, so that
one run names every mistake.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dgx_kvm_sw.guest.document import Document, Path
from dgx_kvm_sw.guest.problems import shown, unknown
from dgx_kvm_sw.model.errors import Problem
from dgx_kvm_sw.model.pci import PciAddress
from dgx_kvm_sw.model.spec import SIZES, SourceLine

_AMOUNTS = ("vcpus", "cpus", "memory", "nics", "drives")


@dataclass(frozen=True)
class VmEntry:
    """One item of `vms`, with the values it takes from `defaults`."""

    document: Document
    path: Path
    own: Mapping[str, Any]
    settings: Mapping[str, Any]  # defaults, then its own

    @property
    def source(self) -> SourceLine:
        return SourceLine(self.document.file, self.document.span(self.path).line)

    @property
    def name(self) -> str:
        return str(self.own.get("name", ""))

    @property
    def tenant(self) -> str:
        return str(self.settings.get("tenant", ""))

    @property
    def gpus(self) -> int | None:
        """Its size, or None where that is not one of the sizes there are."""
        gpus = self.own.get("gpus")
        return gpus if gpus in SIZES else None

    def problem(self, key: str, message: str, hint: str = "") -> Problem:
        """A problem with its own value of `key`, or with the VM when that is not its own."""
        path = (*self.path, key) if key in self.own else self.path
        return self.document.problem(path, message, hint)


@dataclass(frozen=True)
class TenantEntry:
    """One item of `tenants`."""

    document: Document
    name: str
    limits: Mapping[str, Any]

    @property
    def source(self) -> SourceLine:
        return SourceLine(self.document.file, self.document.keys["tenants", self.name].line)


def vm_entries(documents: Sequence[Document]) -> list[VmEntry]:
    """Return the VMs of all files in order; the first file is vms.yaml with the defaults."""
    defaults = documents[0].mapping("defaults")
    return [
        VmEntry(document, ("vms", index), own, _settings(defaults, own))
        for document in documents
        for index, own in enumerate(document.sequence("vms"))
        if isinstance(own, dict)
    ]


def _settings(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return what holds for a VM; of its OS disk it may say one part and `defaults` another."""
    settings = {**defaults, **own}
    if "os_disk" in settings:
        parts = (disk_parts(each.get("os_disk", {})) for each in (defaults, own))
        settings["os_disk"] = {key: value for part in parts for key, value in part.items()}
    return settings


def disk_parts(value: Any) -> dict[str, Any]:
    """Return an OS disk as a mapping, however it is written."""
    return value if isinstance(value, dict) else {"size": value}


def tenant_entries(documents: Sequence[Document]) -> list[TenantEntry]:
    return [
        TenantEntry(document, name, document.mapping("tenants", name))
        for document in documents
        for name in document.mapping("tenants")
    ]


def mistakes(
    documents: Sequence[Document], sizes: Mapping[int, Document], images: Collection[str] | None
) -> Iterator[Problem]:
    """Yield every mistake between the parts of the files; `sizes` are the size templates."""
    vms, tenants = vm_entries(documents), tenant_entries(documents)
    yield from _misplaced_keys(documents[1:], documents[0].file)
    yield from _repeated_names(vms, tenants)
    # `defaults` is checked where it stands, not once for every VM that takes from it.
    sections: list[tuple[Document, Path]] = [
        (documents[0], ("defaults",)),
        *((vm.document, vm.path) for vm in vms),
    ]
    yield from _unknown_references(sections, "tenant", {tenant.name for tenant in tenants})
    if images is not None:
        yield from _unknown_references(sections, "image", images)
    yield from _repeated_in_disks(sections, "name", "there is already a disk {} here")
    yield from _repeated_in_disks(sections, "mount", "another disk of this VM is mounted at {}")
    yield from _impossible_disks(sections)
    yield from _impossible_overlays(vms, sizes)
    yield from _impossible_vlans(sections)
    yield from _bad_pins(vms)
    yield from _exceeded_quotas(vms, tenants)
    yield from _shares_of_nothing(vms, sizes)


def _misplaced_keys(drop_ins: Sequence[Document], main: str) -> Iterator[Problem]:
    for document in drop_ins:
        for key in ("host", "defaults"):
            if key in document.mapping():
                yield document.key_problem((key,), "holds for the whole host", f"move it to {main}")


def _repeated_names(vms: Sequence[VmEntry], tenants: Sequence[TenantEntry]) -> Iterator[Problem]:
    declared: dict[str, SourceLine] = {}
    for vm in vms:
        if vm.name in declared:
            message = f"{shown(vm.name)} is already declared at {declared[vm.name]}"
            yield vm.problem("name", message, "every VM needs a name of its own")
        elif vm.name:
            declared[vm.name] = vm.source
    declared = {}
    for tenant in tenants:
        if tenant.name in declared:
            message = f"is already declared at {declared[tenant.name]}"
            yield tenant.document.key_problem(("tenants", tenant.name), message, "keep one of them")
        declared.setdefault(tenant.name, tenant.source)


def _unknown_references(
    sections: Sequence[tuple[Document, Path]], key: str, known: Collection[str]
) -> Iterator[Problem]:
    """Yield a problem for every `key` (tenant, image) whose value is not among the known."""
    for document, path in sections:
        value = document.get(*path, key)
        if isinstance(value, str) and value not in known:
            yield document.problem((*path, key), *unknown(key, value, known))


def _repeated_in_disks(
    sections: Sequence[tuple[Document, Path]], key: str, message: str
) -> Iterator[Problem]:
    """Yield a problem for every disk with the `key` (name, mount) of another of the same VM."""
    for document, path in sections:
        seen: set[str] = set()
        for index in range(len(document.sequence(*path, "disks"))):
            place = (*path, "disks", index, key)
            value = document.get(*place)
            if isinstance(value, str):
                if value in seen:
                    yield document.problem(place, message.format(shown(value)))
                seen.add(value)


def _impossible_disks(sections: Sequence[tuple[Document, Path]]) -> Iterator[Problem]:
    for document, path in sections:
        for index in range(len(document.sequence(*path, "disks"))):
            disk = document.mapping(*path, "disks", index)
            if "lvm" in disk and disk.get("format") == "qcow2":
                place = (*path, "disks", index, "format")
                hint = "remove `format`, or `lvm`"
                yield document.problem(place, "a logical volume is raw", hint)


def _impossible_overlays(
    vms: Sequence[VmEntry], sizes: Mapping[int, Document]
) -> Iterator[Problem]:
    """Only qcow2 can be an overlay; which of its parts a VM says itself does not matter."""
    for vm in vms:
        of_size = sizes[vm.gpus].get("os_disk") if vm.gpus is not None and vm.gpus in sizes else {}
        disk = {**disk_parts(of_size), **disk_parts(vm.settings.get("os_disk", {}))}
        overlay = vm.settings.get("image") and disk.get("from") != "copy"
        if overlay and disk.get("format") == "raw":
            message = "a raw disk cannot be an overlay on its image"
            yield vm.problem("os_disk", message, "add `from: copy`, or make it qcow2")


def _impossible_vlans(sections: Sequence[tuple[Document, Path]]) -> Iterator[Problem]:
    for document, path in sections:
        for index in range(len(document.sequence(*path, "networks"))):
            network = document.mapping(*path, "networks", index)
            place = (*path, "networks", index, "vlan")
            if "vlan" in network and "macvtap" in network:
                under, tag = network["macvtap"], network["vlan"]
                message = "macvtap puts no VLAN tags on what the guest sends"
                hint = f"make a VLAN interface and name that: `macvtap: {under}.{tag}`"
                yield document.problem(place, message, hint)
            elif "vlan" in network and {"network", "nat", "isolated"} & network.keys():
                yield document.problem(place, "goes with bridge and vf only", "remove it")


def _bad_pins(vms: Sequence[VmEntry]) -> Iterator[Problem]:
    holders: dict[str, VmEntry] = {}
    for vm in vms:
        pins = vm.own.get("pin")
        if not isinstance(pins, list):
            continue
        if vm.gpus is not None and len(pins) != vm.gpus:
            message = f"{len(pins)} GPUs are pinned, but gpus is {vm.gpus}"
            yield vm.problem("pin", message, "pin every GPU of the VM, or none")
        for index, pin in enumerate(pins):
            gpu = _one_form(pin)
            if gpu in holders:
                holder = holders[gpu]
                message = f"GPU {gpu} is already pinned by {shown(holder.name)} at {holder.source}"
                yield vm.document.problem((*vm.path, "pin", index), message)
            holders.setdefault(gpu, vm)


def _one_form(pin: Any) -> str:
    """Return one text for all ways to write a GPU; the machine alone can match the two kinds."""
    try:
        return str(PciAddress.parse(str(pin)))
    except ValueError:
        return str(pin)


def _exceeded_quotas(vms: Sequence[VmEntry], tenants: Sequence[TenantEntry]) -> Iterator[Problem]:
    """Yield a problem at the first VM that is too much for its tenant, for each limit."""
    owned: dict[str, list[VmEntry]] = {}
    for vm in vms:
        owned.setdefault(vm.tenant, []).append(vm)
    for tenant in tenants:
        for limit, unit, key in (("max_gpus", "GPUs", "gpus"), ("max_vms", "VMs", "name")):
            allowed = tenant.limits.get(limit)
            total = 0
            for vm in owned.get(tenant.name, ()):
                total += 1 if unit == "VMs" else vm.gpus or 0
                if isinstance(allowed, int) and total > allowed:
                    message = f"with this VM tenant {shown(tenant.name)} has {total} {unit}"
                    hint = f"{limit} is {allowed} at {tenant.source}"
                    yield vm.problem(key, message, hint)
                    break


def _shares_of_nothing(vms: Sequence[VmEntry], sizes: Mapping[int, Document]) -> Iterator[Problem]:
    """A share is of what a VM's GPUs bring with them; without GPUs there is nothing to share."""
    hint = "give a number of CPU threads or devices, or a size like 4GiB"
    if 0 in sizes:
        for key, value in sizes[0].mapping().items():
            if key in _AMOUNTS and _is_share(value):
                message = f"{value} is of what GPUs bring along; these VMs have none"
                yield sizes[0].problem((key,), message, hint)
    for vm in vms:
        for key in _AMOUNTS:
            value = vm.settings.get(key)
            if vm.gpus == 0 and _is_share(value):
                message = f"{key} is {value} of what GPUs bring along; this VM has none"
                yield vm.problem(key, message, hint)


def _is_share(value: Any) -> bool:
    return isinstance(value, str) and value.endswith("%")
