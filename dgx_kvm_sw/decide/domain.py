"""Turn a placement into the facts of a domain: the last decision before XML is printed."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from dgx_kvm_sw.decide.guest_pci import guest_tree, mmio64_mib
from dgx_kvm_sw.model.domain import (
    Cell,
    DomainDisk,
    DomainFacts,
    DomainStatus,
    Interface,
    Ownership,
    Volume,
)
from dgx_kvm_sw.model.pci import CpuSet, PciDevice
from dgx_kvm_sw.model.placement import GuestCell, Placement
from dgx_kvm_sw.model.spec import VmSpec
from dgx_kvm_sw.model.topology import Topology


@dataclass(frozen=True)
class Surroundings:
    """What a domain's facts need besides the VM and its placement."""

    machine_id: str
    pool_path: str
    images: dict[str, tuple[str, str]]  # image name -> path and format of its file
    template_digests: dict[str, str]  # template name -> digest
    cloud_init: frozenset[str]  # images whose guests read a seed


def domain_uuid(machine_id: str, name: str) -> str:
    """Return the UUID of a VM of this host: the same for the same name, always."""
    return str(uuid.uuid5(uuid.UUID(machine_id), name))


def desired_domain(
    vm: VmSpec, placement: Placement, topology: Topology, around: Surroundings
) -> DomainFacts:
    """Return the facts of the domain that this VM is to be."""
    identity = domain_uuid(around.machine_id, vm.name)
    by_address = {device.address: device for device in topology.devices()}
    devices = [by_address[address] for address in placement.devices]
    controllers, hostdevs = guest_tree(
        devices, lambda device: _cell_of(device, placement.cells, topology)
    )
    pins = [CpuSet.of((cpu,)) for cell in placement.cells for core in cell.cores for cpu in core]
    queues = min(len(pins), vm.resources.max_queues)
    return DomainFacts(
        name=vm.name,
        uuid=identity,
        owner=Ownership(vm.tenant, vm.template, around.template_digests[vm.template]),
        memory_mib=placement.memory_mib,
        threads_per_core=len(placement.cells[0].cores[0]),
        cells=_cells(placement.cells, topology),
        vcpu_pins=tuple(pins),
        emulator_pin=placement.helper_cpus,
        iothread_pins=(placement.helper_cpus,) * vm.resources.iothreads,
        hugepage_kib=placement.hugepage_kib,
        firmware=vm.firmware,
        mmio64_mib=mmio64_mib(devices),
        controllers=controllers,
        hostdevs=hostdevs,
        disks=(*_disks(vm, around.pool_path, queues), *_seed_disk(vm, around)),
        interfaces=tuple(
            Interface(mac, network, queues)
            for mac, network in zip(interface_macs(vm, around.machine_id), vm.networks, strict=True)
        ),
        on_reboot="destroy",
    )


def desired_volumes(vm: VmSpec, around: Surroundings) -> tuple[Volume, ...]:
    """Return the VM's disks on the pool: the OS disk, over its image, and the data disks."""
    sizes = {"os": vm.resources.os_disk_mib, **{disk.name: disk.size_mib for disk in vm.disks}}
    volumes = []
    for disk, size in sizes.items():
        name = _volume_name(vm.name, disk)
        image = around.images[vm.image] if disk == "os" and vm.image else ("", "")
        volumes.append(Volume(name, f"{around.pool_path}/{name}", size, "qcow2", *image))
    return tuple(volumes)


def volume_prefix(vm: str) -> str:
    """What every disk of this VM on the pool starts with; VM names hold no dot."""
    return f"{vm}."


def own_disks(domain: DomainStatus, volumes: tuple[Volume, ...]) -> tuple[str, ...]:
    """Return paths of the domain's own disks: a site's template may attach what others use too."""
    attached = {disk.path for disk in domain.facts.disks if not disk.cdrom}
    prefix = volume_prefix(domain.name)
    return tuple(v.path for v in volumes if v.path in attached and v.name.startswith(prefix))


def seed_path(vm: str, pool_path: str) -> str:
    return f"{pool_path}/{volume_prefix(vm)}seed.iso"


def interface_macs(vm: VmSpec, machine_id: str) -> tuple[str, ...]:
    """Return the MAC address of each network of a VM."""
    identity = domain_uuid(machine_id, vm.name)
    return tuple(_mac(identity, number) for number in range(len(vm.networks)))


def _volume_name(vm: str, disk: str) -> str:
    return f"{volume_prefix(vm)}{disk}.qcow2"


def _disks(vm: VmSpec, pool_path: str, queues: int) -> tuple[DomainDisk, ...]:
    names = ["os", *(disk.name for disk in vm.disks)]
    threads = vm.resources.iothreads
    return tuple(
        DomainDisk(
            target=f"vd{chr(ord('a') + number)}",
            path=f"{pool_path}/{_volume_name(vm.name, disk)}",
            format="qcow2",
            serial=disk,
            queues=queues,
            iothread=number % threads + 1 if threads else None,
        )
        for number, disk in enumerate(names)
    )


def _seed_disk(vm: VmSpec, around: Surroundings) -> tuple[DomainDisk, ...]:
    """The CD with the seed. It stays for good: a cloud-init that misses it begins anew."""
    if vm.image not in around.cloud_init:
        return ()
    path = seed_path(vm.name, around.pool_path)
    return (DomainDisk("sda", path, "raw", "", queues=1, iothread=None, cdrom=True),)


def _cells(cells: tuple[GuestCell, ...], topology: Topology) -> tuple[Cell, ...]:
    result, first = [], 0
    for cell in cells:
        count = sum(len(core) for core in cell.cores)
        node = topology.node(cell.host_node)
        distances = tuple(node.distance(other.host_node) for other in cells)
        result.append(
            Cell(
                vcpus=CpuSet.of(range(first, first + count)),
                memory_mib=cell.memory_mib,
                host_node=cell.host_node,
                distances=distances if len(cells) > 1 else (),
            )
        )
        first += count
    return tuple(result)


def _cell_of(device: PciDevice, cells: tuple[GuestCell, ...], topology: Topology) -> int:
    """The guest cell of the device's NUMA node, or the nearest one there is."""
    node = topology.node(device.numa_node)
    return min(
        range(len(cells)),
        key=lambda index: (node.distance(cells[index].host_node), index),
    )


def _mac(identity: str, number: int) -> str:
    """A MAC address in QEMU's range that never changes for this VM and interface."""
    tail = uuid.uuid5(uuid.UUID(identity), f"interface {number}").bytes[:3]
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in tail)
