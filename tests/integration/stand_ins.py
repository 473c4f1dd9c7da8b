"""A GPU domain that starts on any machine: emulated devices stand where the passed-through are.

What is tested stays as rendered: controllers, bus numbers, addresses, guest NUMA cells and their
distances, the 64-bit PCI window. A stand-in is shared memory on PCI (ivshmem), whose one large
BAR is as large as the largest of the device it stands for; nothing of it is ever touched.
"""

from __future__ import annotations

from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from dgx_kvm_sw.guest.domainxml import parse
from dgx_kvm_sw.model.pci import PciAddress
from dgx_kvm_sw.model.topology import Topology

_MEMORY_MIB = 2048  # with little and a wide address space, OVMF hangs
_LEAST_BAR_MIB = 1


def startable(xml: str, topology: Topology, *, vcpus_per_cell: int = 0) -> str:
    """Rewrite a rendered domain so that plain QEMU on two CPUs and one NUMA node can start it.

    `vcpus_per_cell` cuts down the CPUs, which firmware brings up one by one; 0 leaves them all.
    """
    ElementTree.register_namespace("qemu", "http://libvirt.org/schemas/domain/qemu/1.0")
    domain = ElementTree.fromstring(xml)
    domain.set("type", "qemu")
    for path in ("memoryBacking", "metadata", "features/kvm", "cpu/cache"):
        _remove(domain, path)
    if vcpus_per_cell:
        _fewer_vcpus(domain, vcpus_per_cell)
    _pin_to_two_cpus(domain)
    _bind_to_node_0(domain)
    _emulate_cpu(domain, parse(xml).mmio64_mib)
    _replace_hostdevs(domain, xml, topology)
    for driver in domain.iterfind("devices/interface/driver"):
        del driver.attrib["name"]
    return ElementTree.tostring(domain, encoding="unicode")


def bar_mib(topology: Topology, address: PciAddress) -> int:
    """The size of a stand-in's large BAR, in MiB."""
    device = next(device for device in topology.devices() if device.address == address)
    return max(_LEAST_BAR_MIB, max(device.bar_bytes) >> 20)


def _only(domain: Element, path: str) -> Element:
    element = domain.find(path)
    assert element is not None, path
    return element


def _remove(domain: Element, path: str) -> None:
    parent = domain.find(path.rpartition("/")[0] or ".")
    element = domain.find(path)
    if parent is not None and element is not None:
        parent.remove(element)


def _fewer_vcpus(domain: Element, per_cell: int) -> None:
    cells = domain.findall("cpu/numa/cell")
    for number, cell in enumerate(cells):
        cell.set("cpus", f"{number * per_cell}-{(number + 1) * per_cell - 1}")
    _only(domain, "vcpu").text = str(len(cells) * per_cell)
    threads = int(_only(domain, "cpu/topology").get("threads", "1"))
    _only(domain, "cpu/topology").set("cores", str(len(cells) * per_cell // threads))
    tune = _only(domain, "cputune")
    for pin in tune.findall("vcpupin")[len(cells) * per_cell :]:
        tune.remove(pin)
    for driver in domain.iterfind("devices/*/driver[@queues]"):
        driver.set("queues", str(min(int(driver.get("queues", "1")), len(cells) * per_cell)))


def _pin_to_two_cpus(domain: Element) -> None:
    for number, pin in enumerate(domain.iterfind("cputune/vcpupin")):
        pin.set("cpuset", str(number % 2))
    for tag in ("emulatorpin", "iothreadpin"):
        for pin in domain.iterfind(f"cputune/{tag}"):
            pin.set("cpuset", "0")


def _bind_to_node_0(domain: Element) -> None:
    for binding in domain.iterfind("numatune/*"):
        binding.set("nodeset", "0")
    cells = domain.findall("cpu/numa/cell")
    size = _MEMORY_MIB // len(cells) * 1024
    for cell in cells:
        cell.set("memory", str(size))
    _only(domain, "memory").text = str(size * len(cells))


def _emulate_cpu(domain: Element, mmio64_mib: int) -> None:
    """The widest CPU that QEMU emulates, but with an address space of four such windows.

    Firmware helps itself to an eighth of the address space, so the window has to be asked for;
    and on a wide one it is slow, and needs much memory, for it maps all of that in small pages.
    """
    cpu = _only(domain, "cpu")
    del cpu.attrib["migratable"]
    cpu.set("mode", "maximum")
    width = _only(cpu, "maxphysaddr")
    width.set("mode", "emulate")
    width.set("bits", str((mmio64_mib << 20).bit_length() + 1))


def _replace_hostdevs(domain: Element, xml: str, topology: Topology) -> None:
    devices = _only(domain, "devices")
    for element in devices.findall("hostdev"):
        devices.remove(element)
    for hostdev in parse(xml).hostdevs:
        size = bar_mib(topology, hostdev.source)
        name = f"{hostdev.source}-{size}".replace(":", "-")
        shared = SubElement(devices, "shmem", {"name": name})
        SubElement(shared, "model", {"type": "ivshmem-plain"})
        SubElement(shared, "size", {"unit": "M"}).text = str(size)
        place = {"domain": "0x0000", "bus": f"{hostdev.bus:#04x}", "slot": "0x00"}
        SubElement(shared, "address", {"type": "pci", **place, "function": "0x0"})
