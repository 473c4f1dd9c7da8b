"""Choose hardware for every VM of the file, deterministically, and say why when impossible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dgx_kvm_sw.decide.fit import DoesNotFit, Inputs, choose_vfs, fit
from dgx_kvm_sw.decide.ledger import Ledger
from dgx_kvm_sw.decide.search import Search, pinned
from dgx_kvm_sw.decide.vfs import NoVf
from dgx_kvm_sw.model.pci import CpuSet
from dgx_kvm_sw.model.placement import Candidate, Placement, Placements, Room, Unplaceable
from dgx_kvm_sw.model.platform import Partition
from dgx_kvm_sw.model.spec import VmSpec
from dgx_kvm_sw.model.topology import Topology

_MOST_HOLDERS = 4  # VMs named one by one before a refusal only counts them


def place(inputs: Inputs) -> Placements:
    """Place all VMs: what runs stays; what is defined stays, unless the file pins its GPUs for
    another VM; then pins; then larger before smaller.

    If the plain order leaves a VM out, other choices are searched; what still does not fit
    is refused with reasons and does not hinder the rest.
    """
    search = Search(inputs)
    placed = search.run(search.order())
    by_vm = {placement.vm: placement for placement in placed}
    left_out = [vm for vm in inputs.spec.vms if vm.name not in by_vm]
    ledger = search.ledger(placed)
    return Placements(
        tuple(by_vm[vm.name] for vm in inputs.spec.vms if vm.name in by_vm),
        tuple(_unplaceable(search, vm, ledger) for vm in left_out),
    )


def candidates(inputs: Inputs, vm: VmSpec) -> tuple[Candidate, ...]:
    """Return every legal partition of the VM's size with a verdict, the best first.

    The other VMs stand where `place` puts them.
    """
    search = Search(inputs)
    placed = [p for p in search.run(search.order()) if p.vm != vm.name]
    return tuple(_verdicts(search, vm, search.ledger(placed)))


def fits(inputs: Inputs, one_more: dict[int, VmSpec]) -> dict[int, Room]:
    """Return what room there is for more VMs of each size; `one_more` is a sample VM by size."""
    search = Search(inputs)
    start = search.ledger(search.run(search.order()))
    result = {}
    for size, vm in one_more.items():
        ledger = start
        placed: list[Placement] = []
        while placement := search.best(_numbered(vm, len(placed)), ledger):
            placed.append(placement)
            ledger = ledger.take(placement)
        refused = None if placed else _unplaceable(search, vm, start)
        result[size] = Room(len(placed), placed[0] if placed else None, refused)
    return result


def _numbered(vm: VmSpec, number: int) -> VmSpec:
    return replace(vm, name=f"{vm.name} {number}")  # a space: no VM of the file has this name


def summary(placement: Placement, topology: Topology) -> str:
    """Return one line for a person: what a VM gets, and where."""
    gpus = [gpu.index for gpu in topology.gpus if gpu.pci.address in placement.gpus]
    parts = []
    if gpus:
        kind = "GPU" if len(gpus) == 1 else "GPUs"
        parts.append(f"{kind} {CpuSet.of(gpus)}")
    counts = (
        (len(placement.nvswitches), "NVSwitch", "NVSwitches"),
        (len(placement.nics), "NIC", "NICs"),
        (len(placement.drives), "drive", "drives"),
        (len(placement.vfs), "VF", "VFs"),
    )
    parts += [f"{count} {one if count == 1 else many}" for count, one, many in counts if count]
    parts += [f"{placement.vcpus} threads", f"{placement.memory_mib / 1024:g} GiB"]
    nodes = CpuSet.of(cell.host_node for cell in placement.cells)
    return f"{', '.join(parts)} on NUMA node{'s' if len(nodes) > 1 else ''} {nodes}"


# -- explaining ------------------------------------------------------------------------------------


def _verdicts(search: Search, vm: VmSpec, ledger: Ledger) -> list[Candidate]:
    options = [option for option in search.options(vm, ledger) if option]
    others = [p for p in search.inputs.platform.of_size(vm.gpus) if p not in options]
    result, fitting = [], 0
    for partition in (*options, *others):
        try:
            fit(search.inputs, search.caps, ledger, vm, partition)
        except DoesNotFit as error:
            holders = _holders(search, vm, partition, ledger)
            result.append(Candidate(partition, str(error), holders))
            continue
        if partition in others:
            why = "the file pins other GPUs" if vm.pin else "a VM that runs stays where it is"
            verdict = f"would fit, but {why}"
        else:
            fitting += 1
            verdict = "chosen" if fitting == 1 else f"fits, ranked {fitting}"
        result.append(Candidate(partition, verdict))
    return result


def _unplaceable(search: Search, vm: VmSpec, ledger: Ledger) -> Unplaceable:
    try:  # first, as it is the same for all sets of GPUs
        choose_vfs(search.inputs, ledger, vm, [], [])
    except NoVf as error:
        return Unplaceable(vm.name, (error.reason,), (error.remedy,))
    if not vm.gpus:
        return _unplaceable_without_gpus(search, vm, ledger)
    sizes = search.inputs.platform.sizes
    if vm.gpus not in sizes:
        offered = ", ".join(map(str, sizes)) or "none"
        title = search.inputs.platform.title
        reason = f"{title} has no legal set of {vm.gpus} GPUs (sizes: {offered})"
        return Unplaceable(vm.name, (reason,), ())
    if vm.pin and not search.options(vm, ledger):
        legal = ", ".join(_indexes(p) for p in search.inputs.platform.of_size(vm.gpus))
        reason = f"its pin {', '.join(vm.pin)} is not a legal set of GPUs (legal: {legal})"
        return Unplaceable(vm.name, (reason,), ("pin one of the legal sets, or remove the pin",))
    verdicts = _verdicts(search, vm, ledger)
    if vm.pin:
        wanted = pinned(search.inputs.topology, vm)
        verdicts = [v for v in verdicts if v.partition.gpus == wanted]
    return Unplaceable(vm.name, _grouped(verdicts), _remedies(search, vm, ledger, verdicts))


def _unplaceable_without_gpus(search: Search, vm: VmSpec, ledger: Ledger) -> Unplaceable:
    try:
        fit(search.inputs, search.caps, ledger, vm, None)
    except DoesNotFit as error:
        hint = "ask for less, or raise host.cpu_pool in the file"
        return Unplaceable(vm.name, (str(error),), (hint,))
    raise AssertionError(f"{vm.name} fits after all")


def _remedies(
    search: Search, vm: VmSpec, ledger: Ledger, verdicts: list[Candidate]
) -> tuple[str, ...]:
    """Name the fewest VMs whose leaving would make room."""
    best: tuple[str, ...] | None = None
    for verdict in verdicts:
        gpus = [search.inputs.topology.gpu(i).pci.address for i in verdict.partition.gpus]
        if not all(search.inputs.health.usable(gpu) for gpu in gpus):
            continue
        names = verdict.holders
        if (
            names
            and (best is None or len(names) < len(best))
            and _helps(search, vm, ledger, verdict.partition, names)
        ):
            best = names
    if best is None:
        return ()
    return (f"it would fit without {' and '.join(best)}",)


def _holders(search: Search, vm: VmSpec, partition: Partition, ledger: Ledger) -> tuple[str, ...]:
    addresses = (search.inputs.topology.gpu(index).pci.address for index in partition.gpus)
    holders = {ledger.holder(address, vm.name) for address in addresses}
    return tuple(sorted(holder for holder in holders if holder))


def _helps(
    search: Search, vm: VmSpec, ledger: Ledger, partition: Partition, gone: tuple[str, ...]
) -> bool:
    try:
        fit(search.inputs, search.caps, ledger.without(gone), vm, partition)
    except DoesNotFit:
        return False
    return True


def _indexes(partition: Partition) -> str:
    return "-".join(map(str, partition.gpus))


def _grouped(verdicts: list[Candidate]) -> tuple[str, ...]:
    """One sentence for each distinct reason, naming the sets it stands for."""
    reasons: dict[str, list[Partition]] = {}
    held: dict[tuple[str, ...], list[Partition]] = {}
    for verdict in verdicts:
        if verdict.holders:
            held.setdefault(verdict.holders, []).append(verdict.partition)
        else:
            reasons.setdefault(verdict.verdict, []).append(verdict.partition)
    sentences = [
        reason if len(found) == found[0].size == 1 else f"{_sets(found)}: {reason}"
        for reason, found in reasons.items()
    ]
    if len(held) <= _MOST_HOLDERS:
        sentences += [f"{_sets(found)}: held by {_and(names)}" for names, found in held.items()]
    else:
        names = sorted({name for holders in held for name in holders})
        count = sum(len(found) for found in held.values())
        sentences.append(f"{count} sets of GPUs are held by {_and(names)}")
    return tuple(sentences)


def _and(names: Sequence[str]) -> str:
    """Join names; of many only the first few."""
    if len(names) > _MOST_HOLDERS:
        return f"{', '.join(names[:_MOST_HOLDERS])} and {len(names) - _MOST_HOLDERS} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _sets(partitions: list[Partition]) -> str:
    return ", ".join(_gpus(partition) for partition in partitions)


def _gpus(partition: Partition) -> str:
    gpus = partition.gpus
    if len(gpus) > 1 and gpus == tuple(range(gpus[0], gpus[-1] + 1)):
        return f"GPUs {gpus[0]}-{gpus[-1]}"
    return f"GPU{'s' if len(gpus) > 1 else ''} {', '.join(map(str, gpus))}"
