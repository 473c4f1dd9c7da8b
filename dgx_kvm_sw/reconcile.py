"""Gather what is declared and what is there, and decide: files, host and libvirt meet here."""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from dgx_kvm_sw import disks, seeds
from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.decide import networks
from dgx_kvm_sw.decide.changes import same
from dgx_kvm_sw.decide.domain import (
    Surroundings,
    desired_domain,
    desired_volumes,
    with_seed_of,
)
from dgx_kvm_sw.decide.fit import Inputs
from dgx_kvm_sw.decide.holdings import holdings_of
from dgx_kvm_sw.decide.placement import place, summary
from dgx_kvm_sw.decide.plan import (
    RESTART,
    Desired,
    Intent,
    devices_of,
    diff,
    start_actions,
    stop_actions,
)
from dgx_kvm_sw.decide.search import gpu_indexes
from dgx_kvm_sw.decide.seed import desired_seed
from dgx_kvm_sw.decide.vfs import with_strays
from dgx_kvm_sw.guest import domainxml, images
from dgx_kvm_sw.guest import seed as guest_seed
from dgx_kvm_sw.guest import spec as spec_file
from dgx_kvm_sw.guest.templates import Templates
from dgx_kvm_sw.host import health as host_health
from dgx_kvm_sw.host import networking, platforms
from dgx_kvm_sw.host.diskio import disk_io
from dgx_kvm_sw.model.actions import Action, Plan
from dgx_kvm_sw.model.base import digest
from dgx_kvm_sw.model.domain import (
    CurrentState,
    DomainDef,
    DomainFacts,
    DomainStatus,
    HostNetwork,
    Volume,
)
from dgx_kvm_sw.model.errors import HostError, UsageError
from dgx_kvm_sw.model.health import HealthReport
from dgx_kvm_sw.model.pci import PciAddress
from dgx_kvm_sw.model.placement import Holding, Placement, Placements, Unplaceable
from dgx_kvm_sw.model.platform import Partition, Platform
from dgx_kvm_sw.model.seed import Seed
from dgx_kvm_sw.model.spec import NO_SPEC, HostSpec, VmSpec
from dgx_kvm_sw.model.topology import Topology

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing libvirt costs 30 ms that `validate` and `topology` need not pay
    from dgx_kvm_sw.guest.hypervisor import Hypervisor

SPEC_FILE = "/etc/dgx-kvm/vms.yaml"
POOL_PATH = "/var/lib/dgx-kvm/images"
LOCK = "/run/dgx-kvm/lock"
_VALIDATED = "/run/dgx-kvm/validated"


@dataclass(frozen=True)
class Site:
    """Where everything is: the machine's root, the spec file, libvirt."""

    root: Root
    spec_file: str = SPEC_FILE
    spec_root: Root | None = None  # where a file given on the command line is; None = root
    uri: str = "qemu:///system"
    simulated: bool = False

    @contextlib.contextmanager
    def hypervisor(self, *, read_only: bool = False) -> Iterator[Hypervisor]:
        """Connect to libvirt, or to its test driver on a simulated machine."""
        if self.simulated:
            from dgx_kvm_sw.guest.simulated import SimulatedHypervisor

            connection: Hypervisor = SimulatedHypervisor(self.root)
        else:
            from dgx_kvm_sw.guest.hypervisor import Hypervisor

            connection = Hypervisor(self.uri, read_only=read_only)
        try:
            yield connection
        finally:
            connection.close()

    def load_spec(self, known_images: images.Catalogue | None) -> HostSpec:
        """Read vms.yaml and what belongs to it; remembers which text has passed the schema."""
        remembered = self.root.read(_VALIDATED, "")
        root = self.spec_root or self.root
        known = known_images.names if known_images else None
        spec = spec_file.load(root, self.spec_file, known, remembered, self.root)
        if spec.digest != remembered:
            with contextlib.suppress(HostError):  # only a memory: not root, or a full disk
                self.root.write(_VALIDATED, spec.digest, sync=False)
        return spec

    def machine_id(self) -> str:
        """The machine's id, 32 hexadecimal digits: names become UUIDs with it."""
        text = self.root.read("/etc/machine-id")
        if len(text) != 32 or not set(text) <= set("0123456789abcdef"):
            raise HostError(
                f"{self.root.path('/etc/machine-id')} does not hold a machine id",
                "make one with `systemd-machine-id-setup`",
            )
        return text


@dataclass(frozen=True)
class Situation:
    """Everything known at one moment, and what follows from it."""

    inputs: Inputs
    current: CurrentState
    placements: Placements
    desired: tuple[Desired, ...]
    definitions: dict[str, DomainDef]  # by VM: those to be defined anew
    notes: tuple[str, ...]
    site: Site
    networks: tuple[str, ...] = ()  # of ours that the file needs
    seeds: dict[str, Seed] = field(default_factory=dict)  # by VM: those to be written anew

    @property
    def spec(self) -> HostSpec:
        return self.inputs.spec

    @property
    def topology(self) -> Topology:
        return self.inputs.topology

    @property
    def platform(self) -> Platform:
        return self.inputs.platform

    @property
    def health(self) -> HealthReport:
        return self.inputs.health

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of every input: file, templates, devices, health, and what libvirt holds."""
        wanted = [(want.facts, want.networks, want.seed) for want in self.desired]
        devices = self.topology.devices()
        return digest(self.spec.digest, wanted, devices, self.health, self.current)

    def plan(self, intent: Intent) -> Plan:
        refused = self.placements.unplaceable
        plan = diff(self.desired, refused, self.current, self.topology, intent, self.networks)
        return replace(plan, notes=self.notes)

    def domain(self, name: str) -> DomainStatus:
        """The VM of this name as libvirt holds it; raises for one that is not there or not ours."""
        found = self.current.domain(name)
        if found and found.managed:
            return found
        if found:
            raise UsageError(f"{name} is a domain that dgx-kvm did not make", "use virsh for it")
        if any(vm.name == name for vm in self.spec.vms):
            raise UsageError(f"{name} is declared but not made yet", "run `dgx-kvm apply`")
        names = [domain.name for domain in self.current.domains if domain.managed]
        close = difflib.get_close_matches(name, names, 1)
        raise UsageError(
            f"there is no VM {name}",
            f"did you mean {close[0]}?" if close else "`dgx-kvm status` lists the VMs",
        )

    def start_actions(self, name: str) -> tuple[Action, ...]:
        """Start a VM with the definition libvirt holds; nothing for one that runs."""
        held = self.domain(name)
        return () if held.running else self._start_actions(held)

    def stop_actions(self, name: str) -> tuple[Action, ...]:
        held = self.domain(name)
        return stop_actions(held.live) if held.live else ()

    def restart_actions(self, name: str) -> tuple[Action, ...]:
        """Stop and start a VM; the start takes whatever definition libvirt holds by then."""
        held = self.domain(name)
        return (*self.stop_actions(name), *self._start_actions(held))

    def _start_actions(self, held: DomainStatus) -> tuple[Action, ...]:
        ready: list[Action] = []  # what waits for the VM to be off
        for want in self.desired:
            if want.facts.name == held.name:
                ready += (*want.grow_actions(self.current), *want.seed_actions)
        return (*ready, *start_actions(held.facts, self._partition(held.facts)))

    def _partition(self, facts: DomainFacts) -> Partition | None:
        return self.platform.with_gpus(gpu_indexes(self.topology, devices_of(facts)))

    def seed(self, name: str) -> Seed | None:
        """The seed that a declared VM is to have; None where it has none or we may not know."""
        vm = next((vm for vm in self.spec.vms if vm.name == name), None)
        want = next((want for want in self.desired if want.facts.name == name), None)
        if vm is None:
            self.domain(name)  # says what there is of this name, if anything
        if vm is None or want is None or want.seed is None:
            return None
        facts = desired_seed(vm, self.site.machine_id(), want.facts.uuid)
        return self.seeds.get(name) or guest_seed.render(Templates(self.site.root), facts)

    def sample_vm(self, gpus: int) -> VmSpec:
        """A VM of this size that says nothing more of itself, to ask what would still fit."""
        root = self.site.spec_root or self.site.root
        return spec_file.sample_vm(root, self.site.spec_file, gpus, self.site.root)


def gather(
    site: Site, hypervisor: Hypervisor, intent: Intent, staying: frozenset[str] = frozenset()
) -> Situation:
    """Read files, host and libvirt, place every VM, and render what has to be defined anew.

    VMs that are `staying` run on with what they have, as they could not be started again.
    """
    catalogue = images.catalogue(site.root)
    spec = site.load_spec(None)  # of its images, each VM is told by itself
    platform, topology = platforms.survey(site.root)
    current = read_current(hypervisor, spec)
    health = _health(site, platform, topology, current)
    foreign = {domain.name for domain in current.domains if not domain.managed}
    ours = replace(spec, vms=tuple(vm for vm in spec.vms if vm.name not in foreign))
    holdings = _kept(holdings_of(current, topology, spec, intent), staying)
    inputs = Inputs(ours, topology, platform, health, holdings, intent.restart, staying)
    placements = _placed(inputs, current, intent)
    taken = tuple(_name_taken(vm) for vm in spec.vms if vm.name in foreign)
    placements = replace(placements, unplaceable=(*taken, *placements.unplaceable))
    templates = Templates(site.root)
    around = _around(site, catalogue, current, templates, ours)
    features = domainxml.LibvirtFeatures.of(hypervisor.version)
    host = networks.HostNetworking(
        networking.routes(site.root), networking.filtering_bridges(site.root), hypervisor.version
    )
    needed = networks.needed(ours.vms, current.networks, host.routes)
    parts = _wanted(site, inputs, placements, around, current, needed, templates, features)
    desired, definitions, renewed = parts
    refused = [*_template_conflicts(desired, placements, inputs)]
    refused += networks.refusals(ours.vms, needed, host)
    refused += disks.refusals(desired, current, ours, catalogue)
    names = {each.vm for each in refused}
    desired = [want for want in desired if want.facts.name not in names]
    short, note = disks.room(site.root, hypervisor, POOL_PATH, desired, current, catalogue)
    names |= {each.vm for each in short}
    if intent.restart and (stuck := _running(current) & names - staying):
        return gather(site, hypervisor, intent, staying | stuck)
    kept = tuple(want for want in desired if want.facts.name not in names)
    placements = replace(placements, unplaceable=(*placements.unplaceable, *refused, *short))
    notes = (
        *catalogue.problems,
        *disks.notes(site.root, desired, ours, current, around, catalogue),
        *seeds.notes(desired, renewed, current, ours, around),
        *filter(None, (note,)),
    )
    used = tuple(needed)
    return Situation(inputs, current, placements, kept, definitions, notes, site, used, renewed)


def _wanted(
    site: Site,
    inputs: Inputs,
    placements: Placements,
    around: Surroundings,
    current: CurrentState,
    needed: Mapping[str, HostNetwork],
    templates: Templates,
    features: domainxml.LibvirtFeatures,
) -> tuple[list[Desired], dict[str, DomainDef], dict[str, Seed]]:
    """Return what every placed VM is to be, and what has to be defined and written anew for it."""
    desired, definitions, renewed = [], {}, {}
    for vm in inputs.spec.vms:
        if placement := placements.of(vm.name):
            want = _desired(vm, placement, inputs, current, around, needed)
            want, seed = seeds.seeded(site.root, templates, vm, want, around)
            if seed:
                renewed[vm.name] = seed
            want, definition = _rendered(templates, want, current, features)
            desired.append(want)
            if definition:
                definitions[vm.name] = definition
    return desired, definitions, renewed


def _health(
    site: Site, platform: Platform, topology: Topology, current: CurrentState
) -> HealthReport:
    observed = host_health.assess(topology, site.root, platform.fabric_model)
    return with_strays(observed, topology, current)


def _around(
    site: Site,
    catalogue: images.Catalogue,
    current: CurrentState,
    templates: Templates,
    spec: HostSpec,
) -> Surroundings:
    return Surroundings(
        machine_id=site.machine_id(),
        pool_path=POOL_PATH,
        images={name: _base_of(catalogue, name) for name in catalogue.names},
        template_digests={
            name: templates.digest(name) for name in sorted({vm.template for vm in spec.vms})
        },
        cloud_init=frozenset(name for name in catalogue.names if catalogue.cloud_init(name)),
        disk_io="io_uring" if site.simulated else disk_io(site.root),
        volumes=current.volumes,
    )


def _template_conflicts(
    desired: list[Desired], placements: Placements, inputs: Inputs
) -> Iterator[Unplaceable]:
    """Refuse VMs whose template adds a host device that is not theirs to have.

    What a template adds is only known when it has been rendered, so placement cannot count it.
    """
    holders = {device: each.vm for each in placements.placed for device in each.devices}
    holders |= {device: held.vm for held in inputs.holdings for device in held.devices}
    claimed: dict[PciAddress, str] = {}
    for want in desired:
        name, placed = want.facts.name, placements.of(want.facts.name)
        for device in set(devices_of(want.facts)) - set(placed.devices if placed else ()):
            other = next((v for v in (holders.get(device), claimed.get(device)) if v), name)
            if other != name:
                what = inputs.topology.device_name(device)
                template = want.facts.owner.template if want.facts.owner else "its template"
                reason = f"{template} adds {what}, which {other} holds"
                yield Unplaceable(name, (reason,), ("take it out of the template",))
                break
            claimed[device] = name


def disks_now(site: Site, hypervisor: Hypervisor) -> tuple[Volume, ...]:
    """Look at the disks on our pool anew; raises HypervisorError when they cannot be known."""
    return disks.now(site.root, hypervisor, POOL_PATH)


def read_current(hypervisor: Hypervisor, spec: HostSpec = NO_SPEC) -> CurrentState:
    """Read all that libvirt holds, and LVM, where a VM has a disk of it or is to have one."""
    domains = []
    for found in hypervisor.domains():
        live = domainxml.parse(found.live) if found.live else None
        facts = domainxml.parse(found.inactive)
        domains.append(DomainStatus(facts, found.live is not None, live, found.persistent))
    volumes, groups, unread = disks.read(hypervisor, tuple(domains), spec, POOL_PATH)
    return CurrentState(tuple(domains), volumes, hypervisor.networks(), groups, unread)


def _placed(inputs: Inputs, current: CurrentState, intent: Intent) -> Placements:
    """Place all VMs; for those that are refused only because others may not be stopped, say so."""
    placements = place(inputs)
    if intent.restart:
        return _placed_with_the_stuck(inputs, current, placements)
    if not placements.unplaceable:
        return placements
    stopping = replace(intent, restart=True)
    holdings = holdings_of(current, inputs.topology, inputs.spec, stopping)
    then = place(replace(inputs, holdings=holdings, restart=True))
    hint = f"{RESTART} would make room: it lets running VMs leave what they no longer ask for"
    refused = tuple(
        replace(each, remedies=(hint,)) if then.of(each.vm) else each
        for each in placements.unplaceable
    )
    return replace(placements, unplaceable=refused)


def _placed_with_the_stuck(
    inputs: Inputs, current: CurrentState, placements: Placements
) -> Placements:
    """Place again as long as a running VM is refused whose hardware others may have been given:
    a VM that cannot be started again is not stopped, so it keeps what it holds.
    """
    while stuck := {
        held.vm
        for held in inputs.holdings
        if not (held.stays or placements.of(held.vm)) and held.vm in _running(current)
    }:
        inputs = replace(inputs, holdings=_kept(inputs.holdings, stuck))
        placements = place(inputs)
    return placements


def _running(current: CurrentState) -> set[str]:
    return {domain.name for domain in current.domains if domain.running}


def _kept(holdings: tuple[Holding, ...], vms: Collection[str]) -> tuple[Holding, ...]:
    return tuple(replace(held, stays=held.stays or held.vm in vms) for held in holdings)


def _name_taken(vm: VmSpec) -> Unplaceable:
    return Unplaceable(
        vm.name,
        ("libvirt has a domain of this name that dgx-kvm did not make",),
        (f"rename the VM at {vm.source}, or the domain",),
    )


def _desired(
    vm: VmSpec,
    placement: Placement,
    inputs: Inputs,
    current: CurrentState,
    around: Surroundings,
    needed: Mapping[str, HostNetwork],
) -> Desired:
    volumes = desired_volumes(vm, around)
    facts = desired_domain(vm, placement, inputs.topology, around, volumes)
    held = current.domain(vm.name)
    if held:  # a host whose machine id has changed keeps the UUIDs its domains were made with
        facts = with_seed_of(replace(facts, uuid=held.facts.uuid), held.facts)
    return Desired(
        facts=facts,
        volumes=volumes,
        partition=placement.partition,
        state=vm.state,
        summary=summary(placement, inputs.topology),
        networks=tuple(needed[n] for n in sorted(facts.networks) if n in needed),
    )


def _rendered(
    templates: Templates, want: Desired, current: CurrentState, features: domainxml.LibvirtFeatures
) -> tuple[Desired, DomainDef | None]:
    """Render a domain that is new or differs; what its template really says is what is desired.

    A domain that is as decided is not rendered: that keeps an apply with nothing to do quick.
    """
    held = current.domain(want.facts.name)
    running_as_wanted = held is None or held.live is None or same(held.live, want.facts)
    if held and held.persistent and same(held.facts, want.facts) and running_as_wanted:
        return want, None
    definition = domainxml.render(templates, want.facts, features)
    return replace(want, facts=definition.facts), definition


def _base_of(catalogue: images.Catalogue, name: str) -> tuple[str, str]:
    """What new disks of an image lie over; one whose manifest is bad has no disks made of it."""
    image = catalogue.images.get(name)
    return (image.base, image.format) if image else ("", "")
