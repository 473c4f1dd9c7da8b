"""Name the differences of two domains in the words of vms.yaml."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from dgx_kvm_sw.model.domain import Cell, DomainDisk, DomainFacts, Hostdev
from dgx_kvm_sw.model.pci import CpuSet, PciAddress
from dgx_kvm_sw.model.spec import Network
from dgx_kvm_sw.model.topology import Topology

# Differences that a running domain can take over at once; everything else needs a start.
LIVE_FIELDS = frozenset({"tenant", "cpu pins", "emulator pins"})

Difference = tuple[str, str, str]  # field, what libvirt holds, what is declared


def same(one: DomainFacts, other: DomainFacts) -> bool:
    """Whether two domains are the same to us; the order of hostdevs is not a difference."""
    return _comparable(one) == _comparable(other)


def differences(held: DomainFacts, wanted: DomainFacts, topology: Topology) -> list[Difference]:
    """Return every difference that `same` sees, in the order a person would ask for them.

    What merely follows from another difference is left out: other devices make another PCIe
    tree, another number of vCPUs has other pins.
    """
    old, new = _words(held, topology), _words(wanted, topology)
    keys = [key for key in new if old[key] != new[key]]
    kinds = ("gpus", "NVSwitches", "nics", "drives", "other devices")
    if set(kinds) & set(keys) or set(held.devices) != set(wanted.devices):
        keys = [key for key in keys if key not in ("PCIe tree", "64-bit PCI window")]
    if "disks" in keys:
        keys = [key for key in keys if key != "disk driver"]
    if "vcpus" in keys:
        keys = [key for key in keys if key not in ("cpu pins", "queues")]
    if _nodes(held) == _nodes(wanted) and ("vcpus" in keys or "memory" in keys):
        keys = [key for key in keys if key != "NUMA nodes"]
    if not keys and not same(held, wanted):
        return [("definition", "changed", "as declared")]
    found = [(key, old[key], new[key]) for key in keys]
    return [
        (key, "changed", "as on the host") if key == "PCIe tree" else (key, before, after)
        for key, before, after in found
    ]


def _nodes(facts: DomainFacts) -> list[int | None]:
    return [cell.host_node for cell in facts.cells]


def _comparable(facts: DomainFacts) -> DomainFacts:
    return replace(facts, hostdevs=tuple(sorted(facts.hostdevs, key=_source)))


def _source(hostdev: Hostdev) -> PciAddress:
    return hostdev.source


def _words(facts: DomainFacts, topology: Topology) -> dict[str, str]:
    owner = facts.owner
    return {
        "uuid": facts.uuid,
        "tenant": owner.tenant if owner else "",
        **_devices(facts, topology),
        "vcpus": str(facts.vcpus),
        "memory": size_text(facts.memory_mib),
        "hugepages": _page(facts.hugepage_kib),
        "NUMA nodes": _cells(facts),
        "cpu pins": _ranges(facts.vcpu_pins),
        "emulator pins": str(facts.emulator_pin) or "none",
        "iothreads": f"{len(facts.iothread_pins)} on {_ranges(facts.iothread_pins)}",
        "threads per core": str(facts.threads_per_core),
        "firmware": str(facts.firmware),
        "disks": _disks(facts),
        "disk driver": _list(
            f"{d.target} io {d.io}, discard {d.discard}" for d in facts.disks if not d.cdrom
        ),
        "networks": _networks(facts),
        "queues": _queues(facts),
        "device settings": _settings(facts),
        "PCIe tree": _tree(facts),
        "64-bit PCI window": f"{facts.mmio64_mib // 1024} GiB",
        "on_reboot": facts.on_reboot,
        "extra devices": ", ".join(facts.extra_devices) or "none",
        "template": f"{owner.template} {owner.template_digest[:8]}" if owner else "none",
    }


def _devices(facts: DomainFacts, topology: Topology) -> dict[str, str]:
    held = {hostdev.source for hostdev in facts.hostdevs}
    kinds: dict[str, list[PciAddress]] = {
        "NVSwitches": [switch.pci.address for switch in topology.nvswitches],
        "nics": [nic.pci.address for nic in topology.nics],
        "drives": [drive.pci.address for drive in topology.drives],
    }
    gpus = [str(gpu.index) for gpu in topology.gpus if gpu.pci.address in held]
    words = {"gpus": f"{len(gpus)} ({', '.join(gpus)})" if gpus else "0"}
    known = {gpu.pci.address for gpu in topology.gpus}
    for kind, addresses in kinds.items():
        words[kind] = _list(address for address in addresses if address in held)
        known.update(addresses)
    words["other devices"] = _list(sorted(held - known))
    return words


def _list(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in items) or "none"


def size_text(mib: int) -> str:
    return f"{mib // 1024}GiB" if mib % 1024 == 0 else f"{mib}MiB"


def _page(kib: int) -> str:
    return {0: "none", 2048: "2MiB", 1024 * 1024: "1GiB"}.get(kib, f"{kib}KiB")


def _ranges(pins: tuple[CpuSet, ...]) -> str:
    """The pins in guest order; one CPU for each is printed as one list."""
    if not pins:
        return "none"
    if len(set(pins)) == 1:
        return str(pins[0]) or "none"
    if all(len(pin) == 1 for pin in pins):
        order = [next(iter(pin)) for pin in pins]
        whole = str(CpuSet.of(order))
        return whole if order == sorted(order) else f"{whole} (in the order {order})"
    return " / ".join(str(pin) or "any" for pin in pins)


def _cells(facts: DomainFacts) -> str:
    def one(cell: Cell) -> str:
        node = cell.host_node if cell.host_node is not None else "any"
        far = f", distances {' '.join(map(str, cell.distances))}" if cell.distances else ""
        return f"{node} (vCPUs {cell.vcpus}, {size_text(cell.memory_mib)}{far})"

    return _list(one(cell) for cell in facts.cells)


def _queues(facts: DomainFacts) -> str:
    disks = [disk.queues for disk in facts.disks if not disk.cdrom]
    return _list(disks + [each.queues for each in facts.interfaces if not each.vf])


def _disks(facts: DomainFacts) -> str:
    def one(disk: DomainDisk) -> str:
        if disk.cdrom:
            return f"{disk.target} {disk.path} (CD)"
        thread = disk.iothread or "none"
        serial = disk.serial or "none"
        over = f", over {disk.backing}" if disk.backing else ""
        words = f"{disk.format}, serial {serial}, IO thread {thread}{over}"
        return f"{disk.target} {disk.path} ({words})"

    return _list(one(disk) for disk in facts.disks)


def _networks(facts: DomainFacts) -> str:
    def one(network: Network) -> str:
        vlan = f", VLAN {network.vlan}" if network.vlan else ""
        return f"{network.kind} {network.source}{vlan}"

    return _list(f"{one(i.network)} ({i.mac})" for i in facts.interfaces)


def _vfs(facts: DomainFacts) -> list[Hostdev]:
    return [interface.vf for interface in facts.interfaces if interface.vf]


def _settings(facts: DomainFacts) -> str:
    vfs = _vfs(facts)
    rom = [str(h.source) for h in (*facts.hostdevs, *vfs) if h.rom_bar]
    managed = [str(h.source) for h in facts.hostdevs if h.managed]
    unmanaged = [str(h.source) for h in vfs if not h.managed]
    parts = [f"ROM BAR of {', '.join(rom)}"] if rom else []
    parts += [f"managed {', '.join(managed)}"] if managed else []
    parts += [f"not managed {', '.join(unmanaged)}"] if unmanaged else []
    return "; ".join(parts) or "as made"


def _tree(facts: DomainFacts) -> str:
    """A sketch of the tree that differs whenever the tree does."""
    counts = Counter(controller.model for controller in facts.controllers)
    buses = {c.index: c for c in facts.controllers}

    def path(bus: int) -> str:
        controller = buses.get(bus)
        if controller is None:
            return "root"
        if controller.bus is None:
            return f"cell {controller.cell} bus {controller.bus_nr}"
        return f"{path(controller.bus)}.{controller.slot}"

    places = [f"{h.source} at {path(h.bus)}" for h in (*facts.hostdevs, *_vfs(facts))]
    ports = ", ".join(f"{count} {model}" for model, count in sorted(counts.items()))
    return f"{ports}: {', '.join(sorted(places))}" if places or ports else "flat"
