"""Compare what is declared with what libvirt holds, and order what has to be done."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dgx_kvm_sw.decide.changes import LIVE_FIELDS, Difference, differences, same, size_text
from dgx_kvm_sw.decide.domain import detached_disks, own_disks
from dgx_kvm_sw.decide.networks import unused
from dgx_kvm_sw.decide.storage import growths
from dgx_kvm_sw.model.actions import (
    Action,
    Change,
    CreateVolume,
    DefineDomain,
    Effect,
    EnsureNetwork,
    GrowVolume,
    MarkRestartNeeded,
    Plan,
    PreparePartition,
    ReleasePartition,
    RemoveNetwork,
    ShutDownDomain,
    StartDomain,
    UndefineDomain,
    Verb,
    VmPlan,
    WriteSeed,
)
from dgx_kvm_sw.model.domain import (
    CurrentState,
    DomainFacts,
    DomainStatus,
    HostNetwork,
    Volume,
)
from dgx_kvm_sw.model.pci import PciAddress
from dgx_kvm_sw.model.placement import Unplaceable
from dgx_kvm_sw.model.platform import Partition
from dgx_kvm_sw.model.seed import SeedState
from dgx_kvm_sw.model.spec import PowerState
from dgx_kvm_sw.model.topology import Topology

RESTART = "--restart"
PRUNE = "--prune"


@dataclass(frozen=True)
class Intent:
    """What the user allowed beyond what disturbs nobody."""

    restart: bool = False  # stop or restart running VMs where that is declared
    prune: bool = False  # delete VMs that are no longer in the file
    delete_disks: bool = False  # with prune: their disks too


@dataclass(frozen=True)
class Desired:
    """A VM as it is to be: its domain, its disks, its power state."""

    facts: DomainFacts
    volumes: tuple[Volume, ...]
    partition: Partition | None
    state: PowerState
    summary: str  # one line for a person
    networks: tuple[HostNetwork, ...] = ()  # of ours that it needs, as they are or will be
    seed: SeedState | None = None  # None: nobody would read one, or we may not know

    @property
    def devices(self) -> tuple[PciAddress, ...]:
        return devices_of(self.facts)

    @property
    def seed_actions(self) -> tuple[WriteSeed, ...]:
        """What brings the seed up to date, while the VM is off."""
        stale = self.seed is not None and self.seed.stale
        return (WriteSeed(self.facts.name, self.facts.uuid),) if stale else ()

    def grow_actions(self, current: CurrentState) -> tuple[GrowVolume, ...]:
        """What makes the disks that are there as large as the file says, while the VM is off."""
        return tuple(GrowVolume(self.facts.name, g.volume) for g in growths(self.volumes, current))


@dataclass(frozen=True)
class _Step:
    vm: VmPlan
    actions: tuple[Action, ...]


Preparation = CreateVolume | EnsureNetwork  # what harms nothing that runs


def diff(
    desired: tuple[Desired, ...],
    unplaceable: tuple[Unplaceable, ...],
    current: CurrentState,
    topology: Topology,
    intent: Intent,
    networks: tuple[str, ...] = (),
) -> Plan:
    """Return the plan that makes `current` what is desired, as far as `intent` allows.

    `networks` are those of ours that any VM of the file needs, one that does not fit included.
    """
    declared = {want.facts.name for want in desired} | {refused.vm for refused in unplaceable}
    orphans = [d for d in current.domains if d.managed and d.name not in declared]
    steps = [_vm_step(want, current, topology, intent) for want in desired]
    steps += [_orphan_step(domain, current, intent) for domain in orphans]
    actions = [action for step in steps if step for action in step.actions]
    after = tuple(filter(None, (_after(domain, actions) for domain in current.domains)))
    leave = [_removal(n, current) for n in unused(replace(current, domains=after), networks)]
    steps += leave
    actions += [action for step in leave for action in step.actions]
    return Plan(
        vms=tuple(step.vm for step in steps if step),
        actions=tuple(sorted(actions, key=lambda action: action.phase)),  # stable: file order
        unplaceable=unplaceable,
        unmanaged=tuple(domain.name for domain in current.domains if not domain.managed),
    )


def devices_of(facts: DomainFacts) -> tuple[PciAddress, ...]:
    return facts.devices


def start_actions(domain: DomainFacts, partition: Partition | None) -> tuple[Action, ...]:
    """The only way a VM is started: its partition is prepared directly before."""
    prepare = PreparePartition(domain.name, domain.uuid, partition, devices_of(domain))
    return (prepare, StartDomain(domain.name, domain.uuid))


def stop_actions(domain: DomainFacts) -> tuple[Action, ...]:
    release = ReleasePartition(domain.name, domain.uuid, devices_of(domain))
    return (ShutDownDomain(domain.name, domain.uuid), release)


def _vm_step(
    want: Desired, current: CurrentState, topology: Topology, intent: Intent
) -> _Step | None:
    held = current.domain(want.facts.name)
    name = want.facts.name
    have = {volume.path for volume in current.volumes}
    active = {network.name for network in current.networks if network.active}
    grows = want.grow_actions(current)
    larger = [
        (f"size of {g.volume.name}", size_text(g.held_mib), size_text(g.volume.capacity_mib))
        for g in growths(want.volumes, current)
    ]
    prepare: tuple[Preparation, ...] = (
        *(EnsureNetwork(name, network) for network in want.networks if network.name not in active),
        *(CreateVolume(name, volume) for volume in want.volumes if volume.path not in have),
    )
    if held is None:
        start = start_actions(want.facts, want.partition) if _runs(want) else ()
        define = DefineDomain(want.facts.name, want.facts, live=False)
        # Whose data it is that a new VM of an old name gets has to be seen before.
        old = [volume.name for volume in want.volumes if volume.path in have]
        changes = (Change("disks", ", ".join(old), "used as they are", Effect.LIVE),) if old else ()
        changes += tuple(_change(each, Effect.LIVE) for each in larger)
        changes += tuple(_missing(p) for p in prepare if isinstance(p, EnsureNetwork))
        row = VmPlan(name, Verb.CREATE, changes, want.summary)
        return _Step(row, (*prepare, *grows, *want.seed_actions, define, *start))
    step = _running_step if held.running else _stopped_step
    return step(want, held, topology, intent, prepare, grows, larger)


def _stopped_step(
    want: Desired,
    held: DomainStatus,
    topology: Topology,
    intent: Intent,
    prepare: tuple[Preparation, ...],
    grows: tuple[GrowVolume, ...],
    larger: list[Difference],
) -> _Step | None:
    changes = [_change(d, Effect.LIVE) for d in differences(held.facts, want.facts, topology)]
    changes += [_change(each, Effect.LIVE) for each in larger]
    changes += [_missing(each) for each in prepare]
    changes += [_seed_change(want.seed) for _ in want.seed_actions if want.seed]
    actions: list[Action] = [*prepare, *grows, *want.seed_actions]
    if not same(held.facts, want.facts):
        actions.append(DefineDomain(want.facts.name, want.facts, live=False))
    if _runs(want):
        changes.append(Change("state", "stopped", "running", Effect.LIVE))
        actions += start_actions(want.facts, want.partition)
    if not actions:
        return None
    return _Step(VmPlan(want.facts.name, Verb.CHANGE, tuple(changes)), tuple(actions))


def _running_step(
    want: Desired,
    held: DomainStatus,
    topology: Topology,
    intent: Intent,
    prepare: tuple[Preparation, ...],
    grows: tuple[GrowVolume, ...],
    larger: list[Difference],
) -> _Step | None:
    assert held.live is not None
    name = want.facts.name
    live = differences(held.live, want.facts, topology) + larger
    redefine = not held.persistent or not same(held.facts, want.facts)
    define = (DefineDomain(name, want.facts, live=False),) if redefine else ()
    if not _runs(want):
        changes = [Change("state", "running", "stopped", Effect.NEEDS_RESTART)]
        felt = Effect.LIVE if intent.restart else Effect.NEXT_RESTART
        changes += [_change(d, felt) for d in live]
        stop = (*stop_actions(held.live), *want.seed_actions) if intent.restart else ()
        row = _row(name, Verb.CHANGE, changes, () if intent.restart else (RESTART,))
        return _Step(row, (*prepare, *stop, *(grows if stop else ()), *define))
    if {field for field, _, _ in live} - LIVE_FIELDS:
        if intent.restart:
            changes = [_change(d, Effect.NEEDS_RESTART) for d in live]
            chain = (
                *stop_actions(held.live), *prepare, *grows, *want.seed_actions, *define
            )  # fmt: skip
            row = _row(name, Verb.REPLACE, changes)
            return _Step(row, (*chain, *start_actions(want.facts, want.partition)))
        mark = (MarkRestartNeeded(name, held.facts.uuid),) if redefine else ()
        changes = [_change(d, Effect.NEXT_RESTART) for d in live]
        return _Step(_row(name, Verb.CHANGE, changes, (RESTART,)), (*prepare, *define, *mark))
    drifted = live or differences(held.facts, want.facts, topology)
    if not held.persistent:
        drifted = [*drifted, ("definition", "gone", "as declared")]
    if not drifted and not prepare:
        return None
    changes = [_change(d, Effect.LIVE) for d in drifted] + [_missing(each) for each in prepare]
    repin = (DefineDomain(name, want.facts, live=True),) if drifted else ()
    return _Step(_row(name, Verb.CHANGE, changes), (*prepare, *repin))


def _orphan_step(domain: DomainStatus, current: CurrentState, intent: Intent) -> _Step:
    """A VM of ours that the file no longer declares: kept until the user says otherwise."""
    missing = (PRUNE,) if not intent.prune else ()
    if domain.running and not intent.restart:
        missing += (RESTART,)
    disks = own_disks(domain, current.volumes)
    effects = {PRUNE: Effect.NEEDS_PRUNE, RESTART: Effect.NEEDS_RESTART}
    effect = effects[missing[0]] if missing else Effect.LIVE
    changes = [Change("declared", "yes", "no longer", effect)]
    if intent.delete_disks and disks:
        changes.append(Change("disks", ", ".join(disks), "deleted", Effect.DESTROYS_DATA))
    elif disks:
        changes.append(Change("disks", ", ".join(disks), "kept", Effect.LIVE))
    if apart := detached_disks(domain, current.volumes):
        changes.append(Change("detached disks", ", ".join(apart), "kept", Effect.LIVE))
    row = _row(domain.name, Verb.DELETE, changes, missing)
    if missing:
        return _Step(row, ())
    facts = domain.live or domain.facts
    stop: tuple[Action, ...] = stop_actions(facts) if domain.running else ()
    undefine = UndefineDomain(domain.name, facts.uuid, disks if intent.delete_disks else ())
    return _Step(row, (*stop, undefine))


def _runs(want: Desired) -> bool:
    return want.state is PowerState.RUNNING


def _row(name: str, verb: Verb, changes: list[Change], pending: tuple[str, ...] = ()) -> VmPlan:
    return VmPlan(name, verb, tuple(changes), pending=pending)


def _change(difference: tuple[str, str, str], effect: Effect) -> Change:
    return Change(*difference, effect)


def _seed_change(seed: SeedState) -> Change:
    felt = "felt only by a guest that boots for the first time"
    old, new = ("written before", f"changed, {felt}") if seed.held else ("missing", "written")
    return Change("first boot settings", old, new, Effect.LIVE)


def _missing(prepare: Preparation) -> Change:
    if isinstance(prepare, EnsureNetwork):
        return Change("network", f"{prepare.network.name} is not there", "made", Effect.LIVE)
    how = "created empty"
    if origin := prepare.volume.source or prepare.volume.backing:
        how = f"created from {origin}"
    return Change("disks", f"{prepare.volume.name} is missing", how, Effect.LIVE)


def _after(domain: DomainStatus, actions: list[Action]) -> DomainStatus | None:
    """A domain as it is defined and runs when these actions are done; None when it is gone."""
    for action in actions:
        if action.vm == domain.name:
            match action:
                case UndefineDomain():
                    return None
                case ShutDownDomain():
                    domain = replace(domain, live=None)
                case DefineDomain(facts=facts):
                    domain = replace(domain, facts=facts)
    return domain


def _removal(network: HostNetwork, current: CurrentState) -> _Step:
    """A network of ours that no VM has or will have; its row is named unlike any VM."""
    removal = RemoveNetwork.of(network, current)
    row = _row(removal.vm, Verb.DELETE, [Change("used", "yes", "no longer", Effect.LIVE)])
    return _Step(row, (removal,))
