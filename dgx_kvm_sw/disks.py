"""What is to be said of the VMs' disks before any is made: their images, the room, differences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.decide import storage
from dgx_kvm_sw.decide.domain import Surroundings, declared_volumes
from dgx_kvm_sw.decide.plan import Desired
from dgx_kvm_sw.guest import images
from dgx_kvm_sw.guest.images import Catalogue
from dgx_kvm_sw.model.domain import CurrentState, Volume
from dgx_kvm_sw.model.placement import Unplaceable
from dgx_kvm_sw.model.spec import HostSpec, VmSpec

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing libvirt costs 30 ms
    from dgx_kvm_sw.guest.hypervisor import Hypervisor


def image_refusals(
    desired: list[Desired], current: CurrentState, spec: HostSpec, catalogue: Catalogue
) -> Iterator[Unplaceable]:
    """Refuse VMs whose OS disk is to be made of an image that cannot be used. A disk that is
    there needs its image no more.
    """
    have = {volume.path for volume in current.volumes}
    volumes = {want.facts.name: want.volumes[0] for want in desired}
    for vm in spec.vms:
        volume = volumes.get(vm.name)
        if vm.image and volume and volume.path not in have:
            made = (volume.capacity_mib, volume.name, str(vm.firmware))
            if why := images.refusal(catalogue, vm.image, *made):
                yield Unplaceable(vm.name, (why[0],), (why[1],))


def room(
    root: Root,
    hypervisor: Hypervisor,
    pool: str,
    desired: list[Desired],
    current: CurrentState,
    catalogue: Catalogue,
) -> tuple[tuple[Unplaceable, ...], str]:
    """Refuse VMs whose new disks do not fit; and say when disks promise more than there is."""
    wanted = {want.facts.name: want.volumes for want in desired}
    news = {vm: storage.new_volumes(volumes, current) for vm, volumes in wanted.items()}
    grow = any(storage.growths(volumes, current) for volumes in wanted.values())
    if not grow and not any(news.values()):
        return (), ""
    made_of = {image.base: image.path for image in catalogue.images.values()}

    def from_file(volume: Volume) -> Volume:
        """A copy of what its base will be made of, where that is not there yet."""
        there = root.exists(volume.source)
        file = volume.source if there else made_of.get(volume.source, volume.source)
        return replace(volume, source=str(root.path(file)))

    new = [volume for volumes in news.values() for volume in volumes if volume.source]
    copies = {volume.path: hypervisor.copy_mib(from_file(volume)) for volume in new}
    space = hypervisor.space(str(root.path(pool)))
    refused = tuple(storage.refusals(wanted, current, space, copies))
    return refused, storage.overcommitment(wanted, current, space)


def notes(
    desired: list[Desired], spec: HostSpec, current: CurrentState, around: Surroundings
) -> Iterator[str]:
    """Disks are made once: say where the file now asks for others, and change nothing.

    A newer version of a disk's image is no news here; `dgx-kvm image show` has it.
    """
    held = {volume.path: volume for volume in current.volumes}
    vms: dict[str, VmSpec] = {vm.name: vm for vm in spec.vms}
    for want in desired:
        vm = vms[want.facts.name]
        for volume, declared in zip(want.volumes, declared_volumes(vm, around), strict=True):
            if have := held.get(volume.path):
                yield from (f"{vm.name}: {text}" for text in _differences(have, declared))


def _differences(have: Volume, declared: Volume) -> Iterator[str]:
    if (have.format, have.group) != (declared.format, declared.group):
        where = f"in volume group {declared.group}" if declared.group else "on the pool"
        yield f"disk {have.path} stays what it is; the file says {declared.format} {where}"
    sizes = f"{have.capacity_mib / 1024:g} GiB, the file says {declared.capacity_mib / 1024:g}"
    if have.capacity_mib > declared.capacity_mib:
        yield f"disk {have.name} has {sizes}; disks are not made smaller"
    elif have.group and -(-declared.capacity_mib // 4) > -(-have.capacity_mib // 4):
        yield f"disk {have.name} has {sizes}; logical volumes are not resized"
    made, wanted = _origin(have.backing), _origin(declared.backing)
    if made != wanted and have.backing:
        yield (
            f"disk {have.name} was made from {made}, the file says"
            f" {wanted or 'independent of any image'}; a disk stays what it was made from"
        )
    elif made != wanted:
        yield (
            f"disk {have.name} is independent of any image, the file says an overlay on {wanted};"
            " it stays what it is"
        )


def _origin(backing: str) -> str:
    """The image that a disk was made from, or the file where that is no base of ours."""
    return images.base_owner(backing) or backing
