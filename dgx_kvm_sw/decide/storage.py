"""Whether there is room for the disks of new VMs, asked before anything is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dgx_kvm_sw.model.domain import CurrentState, Space, Volume
from dgx_kvm_sw.model.placement import Unplaceable

_METADATA_MIB = 1  # of a file that is as good as empty


@dataclass(frozen=True)
class Growth:
    """A disk that the file wants larger than it is."""

    volume: Volume  # as it is to be
    held_mib: int

    @property
    def more_mib(self) -> int:
        return self.volume.capacity_mib - self.held_mib


@dataclass(frozen=True)
class Copying:
    """Bases that have to be copied first, as their images are on another file system."""

    mib: Mapping[str, int]  # by path of the base
    free_mib: int | None = None  # where they go; None: to the file system of the pool


def new_volumes(wanted: tuple[Volume, ...], current: CurrentState) -> tuple[Volume, ...]:
    have = {volume.path for volume in current.volumes}
    return tuple(volume for volume in wanted if volume.path not in have)


def growths(wanted: tuple[Volume, ...], current: CurrentState) -> tuple[Growth, ...]:
    """Disks to be made larger; logical volumes are not: their new part would hold old data."""
    held = {volume.path: volume.capacity_mib for volume in current.volumes}
    return tuple(
        Growth(volume, held[volume.path])
        for volume in wanted
        if not volume.group and 0 < held.get(volume.path, 0) < volume.capacity_mib
    )


def refusals(
    wanted: Mapping[str, tuple[Volume, ...]],
    current: CurrentState,
    space: Space,
    copies: Mapping[str, int],
    bases: Copying,
) -> Iterator[Unplaceable]:
    """Refuse VMs, in file order, whose new disks do not fit; `copies`: MiB by path of a copy.

    What an earlier VM is to get counts as gone for the later ones, a base once.
    """
    pool, beside = space.free_mib, bases.free_mib or 0
    made: set[str] = set()
    groups = {group.name: group for group in current.groups}
    free = {group.name: group.free_mib for group in current.groups}
    for vm, volumes in wanted.items():
        new = new_volumes(volumes, current)
        files = sum(_least_mib(v, copies) for v in new if not v.group)
        files += sum(g.more_mib for g in growths(volumes, current) if g.volume.format == "raw")
        below = {v.backing or v.source for v in new} & bases.mib.keys() - made
        copied = sum(bases.mib[base] for base in below)
        if bases.free_mib is None:
            files, copied = files + copied, 0
        needs: dict[str, int] = {}
        for volume in (each for each in new if each.group):
            group = groups.get(volume.group)
            if group is None:
                yield _no_group(vm, volume.group, tuple(groups))
                break
            if volume.name in group.foreign:
                yield _foreign(vm, volume)
                break
            extents = -(-volume.capacity_mib // group.extent_mib)
            needs[group.name] = needs.get(group.name, 0) + extents * group.extent_mib
        else:
            short = next((name for name, mib in needs.items() if mib > free[name]), None)
            if files > pool:
                hint = "make room there, ask for less, or give the pool a larger file system"
                yield _short(vm, "the storage pool", files, pool, hint)
            elif copied > beside:
                hint = "make room there: a copy of the VM's image has to go there first"
                yield _short(vm, "the file system of the bases", copied, beside, hint)
            elif short:
                hint = "add a drive to it with `vgextend`, or ask for less"
                yield _short(vm, f"volume group {short}", needs[short], free[short], hint)
            else:
                pool, beside = pool - files, beside - copied
                made |= below
                free = {name: mib - needs.get(name, 0) for name, mib in free.items()}


def overcommitment(
    wanted: Mapping[str, tuple[Volume, ...]], current: CurrentState, space: Space
) -> str:
    """Return a sentence when new disks promise more than the pool could ever hold; else ""."""
    new = [v for volumes in wanted.values() for v in new_volumes(volumes, current)]
    promised = sum(v.capacity_mib for v in (*current.volumes, *new) if not v.group)
    if not any(not volume.group for volume in new) or promised <= space.total_mib:
        return ""
    return (
        f"the disks on the storage pool may grow to {_size(promised)} together, and its file"
        f" system has {_size(space.total_mib)}: a VM whose disk cannot grow pauses"
    )


def _least_mib(volume: Volume, copies: Mapping[str, int]) -> int:
    if volume.format == "raw":
        return volume.capacity_mib
    return max(_METADATA_MIB, copies.get(volume.path, 0))


def _short(vm: str, where: str, need: int, free: int, hint: str) -> Unplaceable:
    reason = f"its new disks need {_size(need)} of {where}, which has {_size(free)} free"
    return Unplaceable(vm, (reason,), (hint,))


def _no_group(vm: str, name: str, known: tuple[str, ...]) -> Unplaceable:
    hint = f"name one that is there: {', '.join(known)}" if known else "make it with `vgcreate`"
    return Unplaceable(vm, (f"there is no LVM volume group {name} on this host",), (hint,))


def _foreign(vm: str, volume: Volume) -> Unplaceable:
    reason = f"there is a logical volume {volume.name} in {volume.group} that dgx-kvm did not make"
    return Unplaceable(vm, (reason,), ("rename it with `lvrename`, or rename the VM's disk",))


def _size(mib: int) -> str:
    return f"{mib / 1024:.1f}".removesuffix(".0") + " GiB" if mib >= 1024 else f"{mib} MiB"
