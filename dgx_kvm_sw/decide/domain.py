"""Turn a placement into the facts of a domain: the last decision before XML is printed."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dgx_kvm_sw.decide.guest_pci import guest_tree, mmio64_mib
from dgx_kvm_sw.decide.networks import on_host
from dgx_kvm_sw.model.domain import (
    Cell,
    DomainDisk,
    DomainFacts,
    DomainStatus,
    Hostdev,
    Interface,
    Ownership,
    Volume,
)
from dgx_kvm_sw.model.pci import CpuSet, PciDevice
from dgx_kvm_sw.model.placement import GuestCell, Placement
from dgx_kvm_sw.model.spec import DiskFormat, NetworkKind, VmSpec
from dgx_kvm_sw.model.topology import Topology


@dataclass(frozen=True)
class Surroundings:
    """What a domain's facts need besides the VM and its placement."""

    machine_id: str
    pool_path: str
    images: dict[str, tuple[str, str]]  # image name -> path and format of its file
    template_digests: dict[str, str]  # template name -> digest
    cloud_init: frozenset[str]  # images whose guests read a seed
    disk_io: str = "native"  # how QEMU is to read and write disks here
    volumes: tuple[Volume, ...] = ()  # that there are


LOGICAL_VOLUME = "dgx-kvm."  # what the names of all of ours start with
SEED = ".seed.iso"


def domain_uuid(machine_id: str, name: str) -> str:
    """Return the UUID of a VM of this host: the same for the same name, always."""
    return str(uuid.uuid5(uuid.UUID(machine_id), name))


def desired_domain(
    vm: VmSpec,
    placement: Placement,
    topology: Topology,
    around: Surroundings,
    volumes: tuple[Volume, ...],
) -> DomainFacts:
    """Return the facts of the domain that this VM, with these disks, is to be."""
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
        hostdevs=tuple(each for each in hostdevs if each.source not in placement.vfs),
        disks=(*_disks(vm, around, volumes, queues), *_seed_disk(vm, around)),
        interfaces=tuple(_interfaces(vm, around, queues, placement, hostdevs)),
        on_reboot="destroy",
    )


def declared_volumes(vm: VmSpec, around: Surroundings) -> tuple[Volume, ...]:
    """Return the disks as the file has them: the OS disk, from its image, and the data disks."""
    os_disk = vm.resources.os_disk
    image = around.images.get(vm.image, ("", ""))
    origin = ("", "", *image) if os_disk.copy else image
    wanted = [_file(vm, "os", os_disk.size_mib, os_disk.format, around, *origin)]
    for disk in vm.disks:
        if disk.volume_group:
            name = f"{LOGICAL_VOLUME}{vm.name}.{disk.name}"
            path = f"/dev/{disk.volume_group}/{name}"
            wanted.append(Volume(name, path, disk.size_mib, "raw", group=disk.volume_group))
        else:
            wanted.append(_file(vm, disk.name, disk.size_mib, disk.format, around))
    return tuple(wanted)


def desired_volumes(vm: VmSpec, around: Surroundings) -> tuple[Volume, ...]:
    """Return the VM's disks; one that is there stays what it is, whatever kind of disk or version
    of its image the file asks for now.
    """
    declared = zip(declared_volumes(vm, around), _disk_names(vm), strict=True)
    return tuple(_as_made(volume, vm.name, name, around) for volume, name in declared)


def _disk_names(vm: VmSpec) -> tuple[str, ...]:
    return ("os", *(disk.name for disk in vm.disks))


def _file(
    vm: VmSpec, disk: str, size: int, kind: DiskFormat, around: Surroundings, *origin: str
) -> Volume:
    name = f"{vm.name}.{disk}.{kind}"
    return Volume(name, f"{around.pool_path}/{name}", size, str(kind), *origin)


def _as_made(wanted: Volume, vm: str, disk: str, around: Surroundings) -> Volume:
    """The disk as it is wanted, or as it was made, of the size it is wanted in."""
    names = {f"{vm}.{disk}.{kind}" for kind in DiskFormat} | {f"{LOGICAL_VOLUME}{vm}.{disk}"}
    have = {volume.path: volume for volume in around.volumes if volume.name in names}
    found = have.get(wanted.path, next(iter(have.values()), wanted))
    return replace(found, capacity_mib=wanted.capacity_mib)


def is_own(domain: DomainStatus, disk: DomainDisk) -> bool:
    """Whether a disk is the domain's own, by its name, and no CD."""
    name = disk.path.rpartition("/")[2]
    return not disk.cdrom and name.startswith(_own_prefixes(domain.name))


def _own_prefixes(vm: str) -> tuple[str, ...]:
    """What the names of a VM's own disks start with: on the pool, in LVM."""
    return (f"{vm}.", f"{LOGICAL_VOLUME}{vm}.")


def own_disks(domain: DomainStatus, volumes: tuple[Volume, ...]) -> tuple[str, ...]:
    """Return paths of the domain's own disks: a site's template may attach what others use too.

    VM names hold no dot, so what starts like one of its disks is one.
    """
    attached = {disk.path for disk in domain.facts.disks if is_own(domain, disk)}
    return tuple(volume.path for volume in volumes if volume.path in attached)


def detached_disks(domain: DomainStatus, volumes: tuple[Volume, ...]) -> tuple[str, ...]:
    """Return paths of disks that were the domain's own once: nothing of ours deletes them."""
    attached = {disk.path for disk in domain.facts.disks}
    return tuple(path for path in _disks_named(domain.name, volumes) if path not in attached)


def _disks_named(vm: str, volumes: tuple[Volume, ...]) -> Iterator[str]:
    for volume in volumes:
        if volume.name.startswith(_own_prefixes(vm)) and volume.name != f"{vm}{SEED}":
            yield volume.path


def seed_path(vm: str, pool_path: str) -> str:
    return f"{pool_path}/{vm}{SEED}"


def interface_macs(vm: VmSpec, machine_id: str) -> tuple[str, ...]:
    """Return the MAC address of each network of a VM."""
    identity = domain_uuid(machine_id, vm.name)
    return tuple(_mac(identity, number) for number in range(len(vm.networks)))


def _interfaces(
    vm: VmSpec,
    around: Surroundings,
    queues: int,
    placement: Placement,
    hostdevs: tuple[Hostdev, ...],
) -> Iterator[Interface]:
    vfs = iter(placement.vfs)
    for mac, network in zip(interface_macs(vm, around.machine_id), vm.networks, strict=True):
        if network.kind is NetworkKind.VF:
            address = next(vfs)
            (place,) = (each for each in hostdevs if each.source == address)
            # Unlike other devices it is the host's until then, with a driver; and what libvirt
            # says to it by its NIC, MAC address and VLAN, it also takes back.
            given = replace(network, source=str(address))
            yield Interface(mac, given, 1, replace(place, managed=True))
        else:
            yield Interface(mac, on_host(network, vm.tenant), queues)


def _disks(
    vm: VmSpec, around: Surroundings, volumes: tuple[Volume, ...], queues: int
) -> tuple[DomainDisk, ...]:
    threads = vm.resources.iothreads
    return tuple(
        DomainDisk(
            target=f"vd{chr(ord('a') + number)}",
            path=volume.path,
            block=bool(volume.group),
            format=volume.format,
            io=around.disk_io,
            # A raw file is there to have its space for sure: what a guest trims stays its own.
            discard="ignore" if volume.format == "raw" and not volume.group else "unmap",
            serial=disk,
            queues=queues,
            # Said, so that libvirt need not find out, and leaves that file's owner alone.
            backing=volume.backing,
            backing_format=volume.backing_format,
            iothread=number % threads + 1 if threads else None,
        )
        for number, (disk, volume) in enumerate(zip(_disk_names(vm), volumes, strict=True))
    )


def with_seed_of(facts: DomainFacts, held: DomainFacts) -> DomainFacts:
    """Keep the CD with the seed, whatever image the file names now: a cloud-init that misses it
    begins anew.
    """
    disks = {disk.path for disk in facts.disks}
    kept = (disk for disk in held.disks if disk.cdrom and disk.path.endswith(SEED))
    return replace(facts, disks=(*facts.disks, *(d for d in kept if d.path not in disks)))


def _seed_disk(vm: VmSpec, around: Surroundings) -> tuple[DomainDisk, ...]:
    if vm.image not in around.cloud_init:
        return ()
    path = seed_path(vm.name, around.pool_path)
    return (
        DomainDisk(
            "sda", path, block=False, format="raw", io="", discard="", serial="",
            queues=1, iothread=None, cdrom=True,
        ),
    )  # fmt: skip


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
