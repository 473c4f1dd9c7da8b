"""A whole simulated host: files, machine, libvirt's test driver; plan and apply as a user does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import libvirt

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.decide.plan import Intent
from dgx_kvm_sw.execute import Event, Outcome, Power, execute
from dgx_kvm_sw.guest.hypervisor import Hypervisor
from dgx_kvm_sw.guest.simulated import SimulatedHypervisor
from dgx_kvm_sw.host import simulate
from dgx_kvm_sw.host.topology import discover
from dgx_kvm_sw.model.actions import Plan, VmPlan
from dgx_kvm_sw.model.domain import CurrentState, DomainStatus
from dgx_kvm_sw.reconcile import Site, Situation, gather, read_current

ALL = Intent(restart=True, prune=True, delete_disks=True)
FOREIGN_XML = """
<domain type="test"><name>{name}</name><memory unit="GiB">{memory}</memory>
  <vcpu>{vcpus}</vcpu>{cputune}<os><type>hvm</type></os>
  <devices>{devices}</devices></domain>
"""


def share_machine(machine: Root, directory: Path) -> None:
    """Lay out a host that shares the /sys of another, which nobody may change."""
    directory.mkdir(parents=True)
    for name in ("etc", "var", "proc"):
        shutil.copytree(machine.path(f"/{name}"), directory / name)
    (directory / "sys").symlink_to(machine.path("/sys"))


class SimulatedHost:
    """One host, with the last plan made on it."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self.site = Site(root, simulated=True)
        self.situation: Situation
        node = simulate.libvirt_node_xml(discover(root))
        root.write("/libvirt/node.xml", node, sync=False)
        self.declare()

    def declare(self, *vms: str, head: str = "") -> None:
        """Write vms.yaml: each VM is the inside of a flow mapping, "name: a, gpus: 1"."""
        text = f"version: 1\n{head}vms:\n" + "".join(f"- {{{vm}}}\n" for vm in vms)
        self.root.write("/etc/dgx-kvm/vms.yaml", text, sync=False)

    def template(self, name: str, text: str) -> None:
        self.root.write(f"/etc/dgx-kvm/templates/{name}", text, sync=False)

    @contextmanager
    def hypervisor(self) -> Iterator[Hypervisor]:
        with self.site.hypervisor() as hypervisor:
            yield hypervisor

    def plan(self, intent: Intent = Intent()) -> Plan:  # noqa: B008 - a frozen value
        with self.hypervisor() as hypervisor:
            self.situation = gather(self.site, hypervisor, intent)
            return self.situation.plan(intent)

    def row(self, vm: str, intent: Intent = Intent()) -> VmPlan:  # noqa: B008
        return next(row for row in self.plan(intent).vms if row.vm == vm)

    def apply(
        self,
        intent: Intent = Intent(),  # noqa: B008
        report: Callable[[Event], None] = lambda event: None,
        power: Power = Power(timeout=5),  # noqa: B008
    ) -> Outcome:
        """Plan and execute; what fails is in the outcome."""
        with self.hypervisor() as hypervisor:
            self.situation = gather(self.site, hypervisor, intent)
            actions = self.situation.plan(intent).actions
            return execute(
                self.site,
                hypervisor,
                self.situation.platform,
                actions,
                self.situation.definitions,
                self.situation.seeds,
                report,
                power,
            )

    def settle(self, intent: Intent = Intent()) -> None:  # noqa: B008
        """Apply, and insist that all of it was done."""
        failures = self.apply(intent).failures
        assert [f"{action.describe()}: {error.message}" for action, error in failures] == []

    def state(self) -> CurrentState:
        with self.hypervisor() as hypervisor:
            return read_current(hypervisor)

    def domain(self, name: str) -> DomainStatus:
        found = self.state().domain(name)
        assert found is not None
        return found

    def files(self) -> dict[str, bytes]:
        """Everything that libvirt and we remember, by path; what a refused plan must not touch."""
        found = {}
        for top in ("libvirt", "etc", "var"):
            for folder, _, names in os.walk(self.root.path(f"/{top}")):
                paths = (Path(folder, name) for name in names)
                found.update({str(path): path.read_bytes() for path in paths if path.is_file()})
        return found

    # -- what others do to the host -----------------------------------------------------------

    def by_hand(self, name: str, change: Callable[[libvirt.virDomain], object]) -> None:
        """Do something to a domain with libvirt itself, as virsh would."""
        with self.hypervisor() as hypervisor:
            assert isinstance(hypervisor, SimulatedHypervisor)
            change(hypervisor._connection.lookupByName(name))
            hypervisor._save(name)

    def foreign(
        self,
        name: str,
        *,
        devices: tuple[str, ...] = (),
        vfs: tuple[str, ...] = (),
        pins: tuple[int, ...] = (),
        memory: int = 1,
        running: bool = True,
    ) -> None:
        """Make a domain that is not ours, with these PCI devices, virtual functions as network
        interfaces, CPUs, and GiB of memory.
        """
        hostdevs = "".join(_hostdev(device) for device in devices)
        hostdevs += "".join(_vf(device) for device in vfs)
        tune = "".join(f'<vcpupin vcpu="{v}" cpuset="{cpu}"/>' for v, cpu in enumerate(pins))
        xml = FOREIGN_XML.format(
            name=name,
            memory=memory,
            vcpus=max(1, len(pins)),
            cputune=f"<cputune>{tune}</cputune>" if tune else "",
            devices=hostdevs,
        )
        with self.hypervisor() as hypervisor:
            hypervisor.define(name, xml)
            if running:
                hypervisor.start(name, hypervisor.domain(name).uuid)


def _hostdev(address: str) -> str:
    return (
        '<hostdev mode="subsystem" type="pci" managed="no">'
        f"<source><address {_place(address)}/></source></hostdev>"
    )


def _vf(address: str) -> str:
    source = f'<source><address type="pci" {_place(address)}/></source>'
    return f'<interface type="hostdev" managed="yes">{source}</interface>'


def _place(address: str) -> str:
    domain, bus, rest = address.split(":")
    slot, function = rest.split(".")
    return f'domain="0x{domain}" bus="0x{bus}" slot="0x{slot}" function="0x{function}"'
