"""What is to be said of the VMs' disks before any is made: their images, the room, differences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.decide import storage
from dgx_kvm_sw.decide.domain import LOGICAL_VOLUME, Surroundings, declared_volumes, is_own
from dgx_kvm_sw.decide.plan import Desired
from dgx_kvm_sw.guest import bases, images
from dgx_kvm_sw.guest.images import Catalogue
from dgx_kvm_sw.model.domain import CurrentState, DomainStatus, Unread, Volume, VolumeGroup
from dgx_kvm_sw.model.errors import HostError, HypervisorError
from dgx_kvm_sw.model.placement import Unplaceable
from dgx_kvm_sw.model.spec import HostSpec, VmSpec

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing libvirt costs 30 ms
    from dgx_kvm_sw.guest.hypervisor import Hypervisor


def read(
    hypervisor: Hypervisor, domains: tuple[DomainStatus, ...], spec: HostSpec, pool: str
) -> tuple[tuple[Volume, ...], tuple[VolumeGroup, ...], tuple[Unread, ...]]:
    """Read the disks on the pool, and LVM where a VM has a disk of it or is to have one; what
    cannot be looked at is there as far as definitions name it.
    """
    held = _held_volumes(domains, pool)
    unread: list[Unread] = []
    try:
        volumes = _of_pool(hypervisor, {volume.path for volume in held if not volume.group})
    except HypervisorError as error:
        volumes = tuple(volume for volume in held if not volume.group)
        unread.append(Unread(False, error.message, error.hint))
    groups: tuple[VolumeGroup, ...] = ()
    logical = tuple(volume for volume in held if volume.group)
    if logical or any(disk.volume_group for vm in spec.vms for disk in vm.disks):
        try:
            groups, logical = hypervisor.logical_volumes()
        except HostError as error:
            unread.append(Unread(True, f"LVM does not answer: {error.message}", error.hint))
    return volumes + logical, groups, tuple(unread)


def _of_pool(hypervisor: Hypervisor, held: set[str]) -> tuple[Volume, ...]:
    """The disks on the pool. One that a VM has and libvirt does not know may be back since it
    looked; without the right to let it look again, what it knows has to do.
    """
    volumes = hypervisor.volumes()
    if held - {volume.path for volume in volumes}:
        with contextlib.suppress(HypervisorError):
            return hypervisor.volumes(fresh=True)
    return volumes


def now(root: Root, hypervisor: Hypervisor, pool: str) -> tuple[Volume, ...]:
    """Look at the disks on the pool anew; raises HypervisorError when they cannot be known."""
    volumes = hypervisor.volumes(fresh=True)
    if not volumes and any(name.endswith((".qcow2", ".raw")) for name in root.names(pool)):
        raise HypervisorError(
            f"libvirt does not know the disks in {root.path(pool)}",
            "define a storage pool dgx-kvm there with `virsh pool-define-as`, and start it",
        )
    return volumes


def _held_volumes(domains: Iterable[DomainStatus], pool: str) -> tuple[Volume, ...]:
    """The disks of ours that definitions name, as far as those say what they are."""
    found = {}
    for domain in domains:
        for disk in domain.facts.disks:
            folder, _, name = disk.path.rpartition("/")
            group = folder.removeprefix("/dev/") if name.startswith(LOGICAL_VOLUME) else ""
            if is_own(domain, disk) and (group or folder == pool):
                origin = (disk.backing, disk.backing_format)
                found[disk.path] = Volume(name, disk.path, 0, disk.format, *origin, group=group)
    return tuple(found.values())


def refusals(
    desired: list[Desired], current: CurrentState, spec: HostSpec, catalogue: Catalogue
) -> Iterator[Unplaceable]:
    """Refuse VMs that have lost a disk, and those whose new disks cannot be made."""
    vms = {vm.name: vm for vm in spec.vms}
    for want in desired:
        vm = vms[want.facts.name]
        new = storage.new_volumes(want.volumes, current)
        why = _lost(want, current) or _unread(new, current) or _of_image(vm, want, new, catalogue)
        if why:
            yield Unplaceable(vm.name, (why[0],), (why[1],))


def _lost(want: Desired, current: CurrentState) -> tuple[str, str] | None:
    """A disk that is gone may be on a file system that is not mounted, and a new one in its place
    would look like lost data. A domain is defined after its disks are made, so this is no work
    of ours that was cut off.
    """
    have = {volume.path for volume in current.volumes}
    wanted = {disk.serial for disk in want.facts.disks if not disk.cdrom}
    if held := current.domain(want.facts.name):
        for disk in held.facts.disks:
            if is_own(held, disk) and disk.serial in wanted and disk.path not in have:
                remedy = "mount or restore it; to begin anew, delete the VM and apply"
                return f"its disk {disk.path} is gone", remedy
    return None


def _unread(new: tuple[Volume, ...], current: CurrentState) -> tuple[str, str] | None:
    """Where disks cannot be looked at, none is new for sure."""
    for each in current.unread:
        if any(each.logical == bool(volume.group) for volume in new):
            return each.reason, each.remedy
    return None


def _of_image(
    vm: VmSpec, want: Desired, new: tuple[Volume, ...], catalogue: Catalogue
) -> tuple[str, str] | None:
    """An OS disk that is there needs its image no more."""
    volume = want.volumes[0]
    if not vm.image or volume not in new:
        return None
    made = (volume.capacity_mib, volume.name, str(vm.firmware))
    return images.refusal(catalogue, vm.image, *made)


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

    copies: dict[str, int] = {}
    damaged = []
    for vm, volumes in news.items():
        for volume in (each for each in volumes if each.source):
            try:
                copies[volume.path] = hypervisor.copy_mib(from_file(volume))
            except HostError as error:
                remedy = f"dgx-kvm image verify {images.base_owner(volume.source)}".rstrip()
                damaged.append(Unplaceable(vm, (error.message,), (remedy,)))
                wanted.pop(vm, None)
    space = hypervisor.space(str(root.path(pool)))
    copying = _copying(root, hypervisor, pool, catalogue)
    refused = (*damaged, *storage.refusals(wanted, current, space, copies, copying))
    return refused, storage.overcommitment(wanted, current, space)


def _copying(
    root: Root, hypervisor: Hypervisor, pool: str, catalogue: Catalogue
) -> storage.Copying:
    needed = {image.base: bases.copy_mib(root, image) for image in catalogue.images.values()}
    mib = {base: size for base, size in needed.items() if size}
    folder = root.path(images.BASES)
    if not mib or bases.device(folder) == bases.device(root.path(pool)):
        return storage.Copying(mib)
    return storage.Copying(mib, hypervisor.space(str(folder)).free_mib)


def notes(
    root: Root,
    desired: list[Desired],
    spec: HostSpec,
    current: CurrentState,
    around: Surroundings,
    catalogue: Catalogue,
) -> Iterator[str]:
    """Disks are made once: say where one lies on what is damaged or gone, or where the file now
    asks for others, and change nothing.

    A newer version of a disk's image is no news here; `dgx-kvm image show` has it.
    """
    yield from (f"{each.reason} ({each.remedy})" for each in current.unread)
    users = bases.users(current)
    for base, text, remedy in bases.damages(root, catalogue, users):
        if base in users:
            yield f"{text} ({remedy})"
    held = {volume.path: volume for volume in current.volumes}
    vms: dict[str, VmSpec] = {vm.name: vm for vm in spec.vms}
    for want in desired:
        vm = vms[want.facts.name]
        for volume, declared in zip(want.volumes, declared_volumes(vm, around), strict=True):
            if have := held.get(volume.path):
                if vm.image and not around.images.get(vm.image, ("", ""))[0]:
                    declared = replace(declared, backing=have.backing)  # nobody knows better
                yield from (f"{vm.name}: {text}" for text in _differences(have, declared))


def _differences(have: Volume, declared: Volume) -> Iterator[str]:
    if (have.format, have.group) != (declared.format, declared.group):
        where = f"in volume group {declared.group}" if declared.group else "on the pool"
        yield f"disk {have.path} stays what it is; the file says {declared.format} {where}"
    sizes = f"{have.capacity_mib / 1024:g} GiB, the file says {declared.capacity_mib / 1024:g}"
    if have.capacity_mib > declared.capacity_mib:
        yield f"disk {have.name} has {sizes}; disks are not made smaller"
    elif (
        have.group
        and have.capacity_mib
        and -(-declared.capacity_mib // 4) > -(-have.capacity_mib // 4)
    ):
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
