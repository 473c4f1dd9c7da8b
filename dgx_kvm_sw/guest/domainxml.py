"""Domain facts to XML, through the template, and libvirt's XML back to domain facts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from dgx_kvm_sw.guest.templates import Templates
from dgx_kvm_sw.model.domain import (
    Cell,
    DomainDef,
    DomainDisk,
    DomainFacts,
    Hostdev,
    Interface,
    Ownership,
    PciController,
)
from dgx_kvm_sw.model.errors import BadFileError, Problem
from dgx_kvm_sw.model.pci import CpuSet, PciAddress
from dgx_kvm_sw.model.spec import Firmware, Network, NetworkKind

NAMESPACE = "urn:dgx-kvm:vm:1"

_INTERFACE_KINDS = {"direct": NetworkKind.MACVTAP, "network": NetworkKind.NETWORK}

# Devices that libvirt adds by itself to any q35 domain, so nobody asked for them.
_IMPLIED = {"emulator", "console", "input ps2", "audio none", "watchdog itco", "memballoon none"}


@dataclass(frozen=True)
class LibvirtFeatures:
    """What this libvirt knows beyond the oldest one supported (8.0)."""

    allocation_threads: bool  # 8.2: parallel preallocation
    maxphysaddr: bool  # 8.7: guest sees the host's physical address width

    @classmethod
    def of(cls, version: int) -> LibvirtFeatures:
        """`version` as libvirt counts: major * 1,000,000 + minor * 1,000 + release."""
        return cls(version >= 8_002_000, version >= 8_007_000)


def render(templates: Templates, facts: DomainFacts, libvirt: LibvirtFeatures) -> DomainDef:
    """Print the domain by its template. The result's facts are what the XML really says:
    a site's template may add a device or override a value, and then that is what is desired.

    Raises BadFileError when the template is wrong or does not make a domain.
    """
    assert facts.owner is not None
    template = facts.owner.template
    xml = templates.render(template, domain=facts, libvirt=libvirt)
    file = str(templates.path(template))
    try:
        rendered = parse(xml)
    except (ElementTree.ParseError, ValueError, AttributeError) as error:
        raise BadFileError((_broken(file, xml, error),)) from error
    if (rendered.name, rendered.uuid, rendered.owner) != (facts.name, facts.uuid, facts.owner):
        message = "does not print the name, uuid and metadata of the domain as given"
        raise BadFileError((Problem(file, 0, 0, 0, 0, "", message),))
    return DomainDef(rendered, xml)


def metadata(owner: Ownership) -> tuple[str, str, str]:
    """Return our metadata as libvirt takes it: the element, its prefix, its namespace."""
    element = Element(
        "vm",
        {
            "tenant": owner.tenant,
            "template": owner.template,
            "template-digest": owner.template_digest,
        },
    )
    return ElementTree.tostring(element, encoding="unicode"), "dgx-kvm", NAMESPACE


def _broken(file: str, xml: str, error: Exception) -> Problem:
    message = f"its output is not a domain: {error}"
    if isinstance(error, ElementTree.ParseError):
        line, column = error.position
        near = "".join(xml.splitlines()[line - 1 : line]).strip()[:80]
        reason = str(error).split(":", maxsplit=1)[0]
        message = f"its output is not XML: {reason}, column {column} near {near!r}"
    return Problem(file, 0, 0, 0, 0, "", message)


def parse(xml: str) -> DomainFacts:
    """Read what we compare from a domain's XML, ours or not."""
    domain = ElementTree.fromstring(xml)
    owner = _owner(domain)
    # What the guest gets; `virsh setvcpus` and `setmem` may leave that below the maximum.
    vcpu = domain.find("vcpu")
    vcpus = int((vcpu.get("current") or vcpu.text or "1") if vcpu is not None else "1")
    cells = _cells(domain)
    backing = domain.find("memoryBacking/hugepages")
    page = backing.find("page") if backing is not None else None
    controllers = _controllers(domain)
    threads = domain.find("cpu/topology")
    return DomainFacts(
        name=_text(domain, "name"),
        uuid=_text(domain, "uuid"),
        owner=owner,
        memory_mib=_memory_kib(domain, whole=owner is None) // 1024,
        threads_per_core=int(threads.get("threads", "1")) if threads is not None else 1,
        cells=cells,
        vcpu_pins=_vcpu_pins(domain, vcpus),
        emulator_pin=_cpuset(domain.find("cputune/emulatorpin")),
        iothread_pins=_iothread_pins(domain),
        hugepage_kib=_page_kib(page) if page is not None else (2048 if backing is not None else 0),
        firmware=_firmware(domain),
        mmio64_mib=_kib(domain.find("devices/controller[@model='pcie-root']/pcihole64")) // 1024,
        controllers=controllers,
        hostdevs=_hostdevs(domain),
        disks=_disks(domain),
        interfaces=_interfaces(domain),
        on_reboot=_text(domain, "on_reboot", "restart"),
        extra_devices=_extra_devices(domain),
    )


def _text(element: Element, path: str, default: str = "") -> str:
    return (element.findtext(path) or default).strip()


def _kib(element: Element | None) -> int:
    """A size element in KiB; libvirt prints KiB but takes any unit."""
    if element is None or not element.text:
        return 0
    return _to_kib(int(element.text), element.get("unit", "KiB"))


def _memory_kib(domain: Element, *, whole: bool) -> int:
    """What the guest may use now, or with `whole` all that it may ever take."""
    memory = _kib(domain.find("memory"))
    return memory if whole else _kib(domain.find("currentMemory")) or memory


def _to_kib(number: int, unit: str) -> int:
    factors = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
    if re.fullmatch(r"[KMGT]B", unit):
        return number * int(1000 ** (" KMGT".index(unit[0]))) // 1024
    return number * factors[unit[0].lower()] // 1024


def _page_kib(page: Element) -> int:
    return _to_kib(int(page.get("size", "0")), page.get("unit", "KiB"))


def _cpuset(element: Element | None) -> CpuSet:
    return CpuSet.parse(element.get("cpuset", "") if element is not None else "")


def _owner(domain: Element) -> Ownership | None:
    element = domain.find(f"metadata/{{{NAMESPACE}}}vm")
    if element is None:
        return None
    return Ownership(
        element.get("tenant", ""), element.get("template", ""), element.get("template-digest", "")
    )


def _firmware(domain: Element) -> Firmware:
    os = domain.find("os")
    loader = os.find("loader") if os is not None else None
    efi = os is not None and os.get("firmware") == "efi"
    flash = loader is not None and loader.get("type") == "pflash"
    return Firmware.UEFI if efi or flash else Firmware.BIOS


def _vcpu_pins(domain: Element, vcpus: int) -> tuple[CpuSet, ...]:
    pins = {int(p.get("vcpu", "0")): _cpuset(p) for p in domain.iterfind("cputune/vcpupin")}
    return tuple(pins.get(vcpu, CpuSet.of(())) for vcpu in range(vcpus))


def _iothread_pins(domain: Element) -> tuple[CpuSet, ...]:
    pins = {int(p.get("iothread", "0")): _cpuset(p) for p in domain.iterfind("cputune/iothreadpin")}
    count = int(_text(domain, "iothreads", "0"))
    return tuple(pins.get(thread, CpuSet.of(())) for thread in range(1, count + 1))


def _cells(domain: Element) -> tuple[Cell, ...]:
    nodes = {
        node.get("cellid"): list(CpuSet.parse(node.get("nodeset", "")))
        for node in domain.iterfind("numatune/memnode")
        if node.get("mode", "strict") == "strict"
    }
    cells = []
    for cell in domain.iterfind("cpu/numa/cell"):
        bound = nodes.get(cell.get("id"), [])
        memory = _to_kib(int(cell.get("memory", "0")), cell.get("unit", "KiB"))
        siblings = sorted(
            cell.iterfind("distances/sibling"), key=lambda sibling: int(sibling.get("id", "0"))
        )
        cells.append(
            Cell(
                vcpus=CpuSet.parse(cell.get("cpus", "")),
                memory_mib=memory // 1024,
                host_node=bound[0] if len(bound) == 1 else None,
                distances=tuple(int(sibling.get("value", "0")) for sibling in siblings),
            )
        )
    return tuple(cells)


def _hex(element: Element | None, name: str) -> int:
    return int(element.get(name, "0"), 0) if element is not None else 0


def _controllers(domain: Element) -> tuple[PciController, ...]:
    """The controllers at and below expander buses; libvirt adds others of its own elsewhere."""
    found: dict[int, PciController] = {}
    elements = domain.findall("devices/controller[@type='pci']")
    for element in sorted(elements, key=lambda element: int(element.get("index", "0"))):
        index, model = int(element.get("index", "0")), element.get("model", "")
        address, target = element.find("address"), element.find("target")
        if model == "pcie-expander-bus" and target is not None:
            cell = int(_text(target, "node", "0"))
            bus_nr = int(target.get("busNr", "0"))
            found[index] = PciController(index, model, None, None, bus_nr, cell)
        elif address is not None and _hex(address, "bus") in found:
            bus, slot = _hex(address, "bus"), _hex(address, "slot")
            found[index] = PciController(index, model, bus, slot)
    return tuple(found.values())


def _hostdevs(domain: Element) -> tuple[Hostdev, ...]:
    result = []
    for element in domain.iterfind("devices/hostdev[@type='pci']"):
        result.append(_hostdev(element))
    return tuple(sorted(result, key=lambda hostdev: hostdev.source))


def _hostdev(element: Element) -> Hostdev:
    source, rom = element.find("source/address"), element.find("rom")
    address = PciAddress(*(_hex(source, k) for k in ("domain", "bus", "slot", "function")))
    rom_bar = rom is None or rom.get("bar") != "off"
    managed = element.get("managed") == "yes"
    return Hostdev(address, _hex(element.find("address"), "bus"), rom_bar, managed)


def _disks(domain: Element) -> tuple[DomainDisk, ...]:
    result = []
    for element in domain.iterfind("devices/disk"):
        driver, source, target = (element.find(tag) for tag in ("driver", "source", "target"))
        attributes = driver.attrib if driver is not None else {}
        iothread = attributes.get("iothread")
        backing = element.find("backingStore/source")
        result.append(
            DomainDisk(
                target=target.get("dev", "") if target is not None else "",
                path=source.get("file", source.get("dev", "")) if source is not None else "",
                block=element.get("type") == "block",
                format=attributes.get("type", "raw"),
                io=attributes.get("io", ""),
                discard=attributes.get("discard", ""),
                serial=_text(element, "serial"),
                queues=int(attributes.get("queues", "1")),
                iothread=int(iothread) if iothread else None,
                backing=backing.get("file", "") if backing is not None else "",
                backing_format=_backing_format(element),
                cdrom=element.get("device") == "cdrom",
            )
        )
    return tuple(result)


def _backing_format(disk: Element) -> str:
    """libvirt adds what it finds below the backing file, and an empty end of the chain."""
    backing = disk.find("backingStore/format")
    return backing.get("type", "") if backing is not None else ""


def _interfaces(domain: Element) -> tuple[Interface, ...]:
    result = []
    for element in domain.iterfind("devices/interface"):
        mac, source, driver = (element.find(tag) for tag in ("mac", "source", "driver"))
        kind = _INTERFACE_KINDS.get(element.get("type", ""), NetworkKind.BRIDGE)
        names = source.attrib if source is not None else {}
        tag = element.find("vlan/tag")
        vlan = int(tag.get("id", "0")) if tag is not None else 0
        network = Network(kind, names.get(str(kind), names.get("dev", "")), vlan)
        vf = _hostdev(element) if element.find("source/address") is not None else None
        if vf:
            network = Network(NetworkKind.VF, str(vf.source), vlan)
        queues = int(driver.get("queues", "1")) if driver is not None else 1
        address = mac.get("address", "") if mac is not None else ""
        result.append(Interface(address, network, queues, vf))
    return tuple(result)


def _extra_devices(domain: Element) -> tuple[str, ...]:
    """Devices beyond those that our template prints, each as "element kind"."""
    ours = {"disk", "interface", "controller", "hostdev pci", "serial", "channel unix"}
    counts = {"serial": 1, "channel unix": 1}
    extra = []
    for element in domain.iterfind("devices/*"):
        kind = element.get("type") or element.get("model") or element.get("bus") or ""
        if element.tag == "input":
            kind = element.get("bus", "") if element.get("bus") == "ps2" else kind
        name = f"{element.tag} {kind}".strip()
        known = element.tag if element.tag in ours else name
        if element.tag == "controller" and kind == "usb" and element.get("model") != "none":
            extra.append("controller usb")
        elif known in _IMPLIED or element.tag in _IMPLIED:
            continue
        elif known not in ours:
            extra.append(name)
        elif known in counts:
            counts[known] -= 1
            if counts[known] < 0:
                extra.append(name)
    return tuple(sorted(extra))
