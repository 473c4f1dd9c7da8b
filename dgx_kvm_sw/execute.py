"""Carry out a plan: under the lock, in order, one VM's failure stopping that VM only."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from dgx_kvm_sw.access.files import explained, locked
from dgx_kvm_sw.access.hooks import run_hooks
from dgx_kvm_sw.decide.domain import seed_path
from dgx_kvm_sw.guest import bases, domainxml, images
from dgx_kvm_sw.guest import seed as guest_seed
from dgx_kvm_sw.guest.checksums import Progress
from dgx_kvm_sw.guest.hypervisor import Hypervisor
from dgx_kvm_sw.host.fabric import Fabric, fabric_for
from dgx_kvm_sw.model.actions import (
    Action,
    CreateVolume,
    DefineDomain,
    EnsureNetwork,
    GrowVolume,
    MarkRestartNeeded,
    PreparePartition,
    ReleasePartition,
    RemoveNetwork,
    ShutDownDomain,
    StartDomain,
    UndefineDomain,
    WriteSeed,
)
from dgx_kvm_sw.model.base import StrEnum
from dgx_kvm_sw.model.domain import DomainDef, DomainDisk
from dgx_kvm_sw.model.errors import DgxKvmError, HostError, HypervisorError
from dgx_kvm_sw.model.pci import PciAddress
from dgx_kvm_sw.model.platform import Platform
from dgx_kvm_sw.model.seed import Seed
from dgx_kvm_sw.reconcile import LOCK, POOL_PATH, Site, disks_now, read_current

JOURNAL = "/var/lib/dgx-kvm/journal.jsonl"
PREPARED = "/run/dgx-kvm/prepared"
STOPPED = "/run/dgx-kvm/stopped"

_JOURNAL_BYTES = 4 << 20  # then it is renamed aside, once
_SHUTDOWN_SECONDS = 120.0
_PARALLEL = 16


class Stage(StrEnum):
    BEGIN = "begin"
    UNDER_WAY = "under way"
    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"  # an earlier action of the same VM failed


@dataclass(frozen=True)
class Part:
    """How far an action is that takes long, in bytes."""

    label: str
    done: int
    total: int


@dataclass(frozen=True)
class Event:
    """What happens to an action, for progress and the journal."""

    stage: Stage
    action: Action
    error: DgxKvmError | None = None
    part: Part | None = None  # of one that is under way


Report = Callable[[Event], None]


@dataclass(frozen=True)
class Power:
    """How VMs are shut down."""

    timeout: float = _SHUTDOWN_SECONDS
    force: bool = False  # destroy what is still up after the timeout


@dataclass(frozen=True)
class Outcome:
    done: int
    failures: tuple[tuple[Action, DgxKvmError], ...]


def locked_site(site: Site, purpose: str, wait: float = 0.0) -> AbstractContextManager[None]:
    """A context in which no other command changes the VMs of this host; waits so many seconds."""
    return locked(site.root.path(LOCK), f"`dgx-kvm {purpose}` (process {os.getpid()})", wait)


def leave_off(site: Site, uuid: str) -> None:
    """Mark a VM as stopped by a command of ours, so that no reboot of its guest that happens at
    the same time starts it again. The mark goes with its next start.
    """
    site.root.write(f"{STOPPED}/{uuid}", "", 0o600, sync=False)


def is_left_off(site: Site, uuid: str) -> bool:
    return site.root.exists(f"{STOPPED}/{uuid}")


def write_journal(site: Site, entry: Mapping[str, object], *, sync: bool) -> None:
    """Add one line, with the time; with `sync` it is on the disk, and a long journal put aside."""
    path = site.root.path(JOURNAL)
    try:
        if sync and path.exists() and path.stat().st_size > _JOURNAL_BYTES:
            path.replace(path.with_suffix(".jsonl.1"))
    except OSError as error:
        raise explained(error, "put aside", path) from error
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    line = json.dumps({"time": stamp, "pid": os.getpid(), **entry})
    site.root.append(JOURNAL, line + "\n", sync=sync)


def execute(
    site: Site,
    hypervisor: Hypervisor,
    platform: Platform,
    actions: tuple[Action, ...],
    definitions: dict[str, DomainDef],
    seeds: dict[str, Seed],
    report: Report = lambda event: None,
    power: Power = Power(),  # noqa: B008 - a frozen value
) -> Outcome:
    """Carry out `actions` in order; the caller holds the lock.

    Raises HostError before the first action when the journal cannot be written.
    """
    fabric = fabric_for(platform, site.root)
    run = _Run(site, hypervisor, fabric, definitions, seeds, report, power)
    return run.all(actions)


def _is_on_pool(disk: DomainDisk) -> bool:
    return disk.path.startswith(f"{POOL_PATH}/")


def _words(devices: Iterable[PciAddress]) -> str:
    return " ".join(map(str, devices))


@dataclass
class _Run:
    site: Site
    hypervisor: Hypervisor
    fabric: Fabric
    definitions: dict[str, DomainDef]
    seeds: dict[str, Seed]
    report: Report
    power: Power
    done: list[Action] = field(default_factory=list)  # threads append to it
    failures: list[tuple[Action, DgxKvmError]] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    held: dict[PciAddress, str] = field(default_factory=dict)
    no_disk: dict[str, HostError] = field(default_factory=dict)  # by VM: why it cannot start
    starting: dict[str, PreparePartition] = field(default_factory=dict)  # by VM

    def all(self, actions: tuple[Action, ...]) -> Outcome:
        write_journal(self.site, {"event": "plan", "actions": len(actions)}, sync=True)
        self.starting = {a.vm: a for a in actions if isinstance(a, PreparePartition)}
        for mark in self.site.root.names(PREPARED):  # of an apply that was killed
            self.site.root.remove(f"{PREPARED}/{mark}")
        for phase, group in itertools.groupby(actions, key=lambda action: action.phase):
            self._phase(phase, list(group))
        if any(isinstance(each, UndefineDomain) and each.delete_volumes for each in self.done):
            self._remove_unneeded_bases()
            self._remove_empty_pool()
        summary = {"event": "end", "done": len(self.done), "failed": len(self.failures)}
        write_journal(self.site, summary, sync=True)
        return Outcome(len(self.done), tuple(self.failures))

    def _phase(self, phase: int, actions: list[Action]) -> None:
        """Shut down and start VMs side by side, do everything else one by one."""
        chains: dict[str, list[Action]] = {}
        for action in actions:
            chains.setdefault(action.vm, []).append(action)
        if phase in (ShutDownDomain.phase, PreparePartition.phase):
            self.no_disk = self._without_pool()
        if phase == PreparePartition.phase:
            self.held = self._running_devices()
            self.no_disk = self.no_disk or self._moved_disks()
        if phase in (ShutDownDomain.phase, StartDomain.phase) and len(chains) > 1:
            with ThreadPoolExecutor(min(_PARALLEL, len(chains))) as pool:
                list(pool.map(self._chain, chains.values()))
        else:
            self._chain(actions)

    def _chain(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if self.failed & {action.vm, *getattr(action, "users", ())}:
                self._tell(Event(Stage.SKIPPED, action))
                continue
            self._tell(Event(Stage.BEGIN, action))
            try:
                self._do(action)
            except DgxKvmError as error:
                self.failed.add(action.vm)
                self.failures.append((action, error))
                self._tell(Event(Stage.FAILED, action, error))
            else:
                self.done.append(action)
                self._tell(Event(Stage.DONE, action))

    def _do(self, action: Action) -> None:
        match action:
            case ShutDownDomain():
                if start := self.starting.get(action.vm):
                    # What could not be started again is not stopped.
                    self._check_disks(action.vm, "runs on")
                    self.fabric.verify(start.partition, start.devices)
                self._shut_down(action)
            case ReleasePartition():
                self.fabric.release(action.devices)
            case UndefineDomain():
                if action.delete_volumes:  # libvirt deletes no disk that it has not seen
                    disks_now(self.site, self.hypervisor)
                for path in action.delete_volumes:  # first: while the domain is there, a killed
                    self.hypervisor.delete_volume(path)  # apply can be finished by the next one
                # It holds nothing that vms.yaml does not, perhaps secrets, and is easily made anew.
                self.site.root.remove(seed_path(action.vm, POOL_PATH))
                self.hypervisor.undefine(action.vm, action.uuid)
                self.site.root.remove(f"{STOPPED}/{action.uuid}")
            case CreateVolume():
                self._adopt(action)
                self.hypervisor.ensure_pool(POOL_PATH)
                name = action.volume.name
                self.hypervisor.create_volume(action.volume, self._progress(action, name))
            case GrowVolume():
                self.hypervisor.grow_volume(action.volume)
            case EnsureNetwork():
                self.hypervisor.ensure_network(action.network)
            case WriteSeed():
                self._write_seed(action)
            case DefineDomain():
                self._define(action)
            case PreparePartition():
                self._prepare(action)
            case StartDomain():
                self._start(action)
            case MarkRestartNeeded():
                pass  # a statement for the reader; status finds it by comparing
            case RemoveNetwork():
                self.hypervisor.remove_network(action.network.name)

    def _adopt(self, action: CreateVolume) -> None:
        """See that the file the disk is to lie over, or to be a copy of, is there, verified."""
        backing = action.volume.backing or action.volume.source
        if not images.base_owner(backing):
            return
        found = images.catalogue(self.site.root).images.values()
        image = next((image for image in found if image.base == backing), None)
        if image is None:
            raise HostError(
                f"the image that {backing} is made of is not there any more",
                "repeat this command: it takes the images that are there now",
            )

        bases.adopt(self.site.root, image, self._progress(action, f"reading {image.label}"))

    def _progress(self, action: Action, label: str) -> Progress:
        return lambda done, total: self.report(
            Event(Stage.UNDER_WAY, action, part=Part(label, done, total))
        )

    def _remove_unneeded_bases(self) -> None:
        """Remove the bases that only deleted disks lay on; where that fails they just stay."""
        try:
            volumes = disks_now(self.site, self.hypervisor)
            needed = bases.users(read_current(self.hypervisor), volumes)
            removed = bases.remove_unneeded(self.site.root, needed.keys())
            write_journal(self.site, {"event": "bases removed", "files": removed}, sync=False)
        except DgxKvmError as error:
            write_journal(self.site, {"event": "bases kept", "error": error.message}, sync=False)

    def _remove_empty_pool(self) -> None:
        """With the last disk our pool goes too, or libvirt would keep it beyond our removal."""
        try:
            self.hypervisor.remove_empty_pool()
        except DgxKvmError as error:
            write_journal(self.site, {"event": "pool kept", "error": error.message}, sync=False)

    def _shut_down(self, action: ShutDownDomain) -> None:
        leave_off(self.site, action.uuid)  # first: a guest may answer by a reboot
        power = self.power
        try:
            self.hypervisor.shut_down(action.vm, action.uuid, power.timeout, force=power.force)
        except DgxKvmError:
            self.site.root.remove(f"{STOPPED}/{action.uuid}")  # it runs on
            raise

    def _write_seed(self, action: WriteSeed) -> None:
        seed = self.seeds[action.vm]
        facts = seed.facts
        about = {"DGX_KVM_TENANT": facts.tenant, "DGX_KVM_IMAGE": facts.image}
        self.hypervisor.ensure_pool(POOL_PATH)
        guest_seed.write(
            self.site.root,
            seed_path(action.vm, POOL_PATH),
            seed,
            lambda folder: self._hooks(action, "vm-seed", {**about, "DGX_KVM_SEED_DIR": folder}),
        )

    def _hooks(self, action: Action, stage: str, about: Mapping[str, object]) -> None:
        """Run the administrator's hooks for one VM; what fails names the VM."""
        uuid = getattr(action, "uuid", "")
        known = {"DGX_KVM_VM": action.vm, "DGX_KVM_UUID": uuid, **about}
        environment = {key: str(value) for key, value in known.items()}
        try:
            run_hooks(self.site.root, stage, environment, lambda entry: self._log(action, entry))
        except HostError as error:
            raise HostError(f"{action.vm} is not started: {error.message}", error.hint) from error

    def _log(self, action: Action, entry: Mapping[str, object]) -> None:
        write_journal(self.site, {**entry, "vm": action.vm}, sync=False)

    def _define(self, action: DefineDomain) -> None:
        self.hypervisor.define(action.vm, self.definitions[action.vm].xml)
        if action.live and action.facts.owner:
            metadata = domainxml.metadata(action.facts.owner)
            self.hypervisor.update_live(action.facts, metadata)

    def _prepare(self, action: PreparePartition) -> None:
        """Make the partition ready and leave the mark without which the qemu hook, and we
        ourselves, start no VM. Nothing of it may touch a device that a running domain holds.
        """
        self._check_disks(action.vm, "is not started")
        for device in sorted(action.devices):
            holder = self.held.setdefault(device, action.vm)  # atomic: VMs start side by side
            if holder != action.vm:
                raise HostError(
                    f"{action.vm} cannot have PCI device {device}: the running domain"
                    f" {holder} holds it",
                    f"stop {holder} first",
                )
        self.fabric.prepare(action.partition, action.devices)
        self.fabric.verify(action.partition, action.devices)
        gpus = [device for device in action.devices if self._is_display(device)]
        about = {"DGX_KVM_GPUS": _words(gpus), "DGX_KVM_DEVICES": _words(action.devices)}
        self._hooks(action, "vm-start", about)
        self.site.root.write(f"{PREPARED}/{action.uuid}", "", 0o600, sync=False)

    def _check_disks(self, vm: str, otherwise: str) -> None:
        if reason := self.no_disk.get(vm):
            raise HostError(f"{vm} {otherwise}: {reason.message}", reason.hint)

    def _start(self, action: StartDomain) -> None:
        mark = f"{PREPARED}/{action.uuid}"
        if not self.site.root.exists(mark):
            raise HostError(f"{action.vm} is not prepared", f"run `dgx-kvm start {action.vm}`")
        self.site.root.remove(f"{STOPPED}/{action.uuid}")
        try:
            self.hypervisor.start(action.vm, action.uuid)
        finally:
            self.site.root.remove(mark)  # good for one start only

    def _is_display(self, device: PciAddress) -> bool:
        """Whether it is a GPU: PCI's base class 03."""
        return self.site.root.read(f"/sys/bus/pci/devices/{device}/class", "").startswith("0x03")

    def _running_devices(self) -> dict[PciAddress, str]:
        """Who holds what at this moment; asked of libvirt, as a shutdown may have failed."""
        held = {}
        for domain in self.hypervisor.domains():
            if domain.live:
                facts = domainxml.parse(domain.live)
                held.update(dict.fromkeys(facts.devices, facts.name))
        return held

    def _without_pool(self) -> dict[str, HostError]:
        """VMs that cannot start, as our pool is not to be had: a disk that nobody can look at is
        not safe.
        """
        try:
            if self.starting:
                self.hypervisor.ensure_pool(POOL_PATH)
                self.hypervisor.volumes(fresh=True)
        except HypervisorError as error:
            hint = error.hint or f"see that {POOL_PATH} is mounted and whole, then try again"
            reason = HostError(f"its disks are not to be had: {error.message}", hint)
            return {vm: reason for vm, disk in self._disks_to_start() if _is_on_pool(disk)}
        return {}

    def _moved_disks(self) -> dict[str, HostError]:
        """VMs whose definition names another backing file than their disk does: somebody has put
        an older disk back, say. A guest that sees a wrong file below its own data destroys it.
        """
        backings = {v.path: v.backing for v in self.hypervisor.volumes()}
        found = {}
        for vm, disk in self._disks_to_start():
            have = backings.get(disk.path, disk.backing)
            if disk.backing and have != disk.backing:
                lies = f"lies over {have or 'nothing'}, its definition says {disk.backing}"
                hint = "run `dgx-kvm apply`: it takes the disk as it is"
                found[vm] = HostError(f"disk {disk.path} {lies}", hint)
        return found

    def _disks_to_start(self) -> Iterator[tuple[str, DomainDisk]]:
        for domain in self.hypervisor.domains():
            if domain.name in self.starting:
                yield from ((domain.name, d) for d in domainxml.parse(domain.inactive).disks)

    # -- telling ----------------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        if event.stage is not Stage.BEGIN:
            entry: dict[str, object] = {
                "event": str(event.stage),
                "action": type(event.action).__name__,
                "vm": event.action.vm,
            }
            if event.error:
                entry["error"] = event.error.message
            write_journal(self.site, entry, sync=False)
        self.report(event)
