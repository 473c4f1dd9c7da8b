"""Which SR-IOV virtual functions (VFs) a VM gets: its own, then those nearest to its GPUs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from dgx_kvm_sw.decide.devices import Assignable, nearest
from dgx_kvm_sw.decide.ledger import Ledger
from dgx_kvm_sw.model.domain import CurrentState
from dgx_kvm_sw.model.health import DeviceHealth, DeviceState, HealthReport
from dgx_kvm_sw.model.mode import VFIO
from dgx_kvm_sw.model.pci import PciAddress, PciDevice
from dgx_kvm_sw.model.placement import Holding
from dgx_kvm_sw.model.spec import AUTO, NetworkKind, VmSpec
from dgx_kvm_sw.model.topology import Nic, Topology, VirtualFunction

_ETHERNET = 0x0200
_MAKE = (
    "make some by SR-IOVVirtualFunctions= in a systemd.link file, as shown in:"
    " zless /usr/share/doc/dgx-kvm-sw/README.Debian.gz"
)
_KEEP = (
    "name it in DGX_KVM_KEEP of /etc/default/dgx-kvm, then `dgx-kvm mode kvm` and a reboot:"
    " the host makes VFs only of what it keeps"
)
_FREE = "free one, or make more by SR-IOVVirtualFunctions= in the NIC's systemd.link file"
_APART = "switch on ACS in the firmware setup, or move the NIC to another slot"


class NoVf(Exception):
    """Why a network cannot have its VF, as a sentence part, and what to do."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


@dataclass(frozen=True)
class VfChoice:
    """What one VM chooses from."""

    topology: Topology
    assignable: Assignable
    ledger: Ledger
    holdings: tuple[Holding, ...]
    others: tuple[VmSpec, ...]  # of the file
    own: tuple[tuple[PciAddress | None, ...], ...]  # by network interface, as Holding.vfs

    def choose(self, vm: VmSpec, gpus: list[PciDevice], nodes: list[int]) -> tuple[PciAddress, ...]:
        """Return a VF for each network that asks for one, in order; raises NoVf.

        Networks that name a NIC choose first: `auto` can go anywhere.
        """
        asked = [(n, net.source) for n, net in enumerate(vm.networks) if net.kind is NetworkKind.VF]
        order = {pci.address: far for far, pci in enumerate(self._by_distance(gpus, nodes))}
        own = {address for vfs in self.own for address in vfs}
        spoken_for = self._spoken_for() - own
        chosen: dict[int, PciAddress] = {}
        for number, source in sorted(asked, key=lambda each: each[1] == AUTO):
            taken = frozenset(chosen.values())
            if kept := self._kept(vm, number, source, taken):
                chosen[number] = kept
                continue
            free = ((vf.pci.address, vf) for vf in self._free(vm, source, taken))
            chosen[number] = min(
                (address in spoken_for, address in own, order[vf.nic], vf.index, address)
                for address, vf in free
            )[-1]
        return tuple(chosen[number] for number, _ in asked)

    def _by_distance(self, gpus: list[PciDevice], nodes: list[int]) -> list[PciDevice]:
        nics = [nic.pci for nic in self.topology.nics]
        return nearest(self.topology, gpus, nics, nodes)

    def _kept(
        self, vm: VmSpec, number: int, source: str, taken: frozenset[PciAddress]
    ) -> PciAddress | None:
        """The VF that this network has already, if it still is one that it may have."""
        there = {vf.pci.address: self.topology.nic(vf.nic) for vf in self.topology.vfs}
        for own in (vfs[number] for vfs in self.own if number < len(vfs)):
            if own is None or own not in there or own in taken:
                continue
            asked = source == AUTO or _is_called(there[own], source)
            if asked and not self.assignable.refusal(own, vm.name):
                return own
        return None

    def _free(self, vm: VmSpec, source: str, taken: frozenset[PciAddress]) -> list[VirtualFunction]:
        """VFs that a network may have; raises NoVf where there is none."""
        nics = self._nics(source)
        vfs = [vf for vf in self.topology.vfs if vf.nic in nics]
        refusals = {vf: self.assignable.refusal(vf.pci.address, vm.name) for vf in vfs}
        for vf in (vf for vf in vfs if vf.pci.address in taken):
            refusals[vf] = f"{self.topology.device_name(vf.pci.address)} is for another network"
        free = [vf for vf in vfs if refusals[vf] is None]
        if not free:
            whose = f"NIC {nics[next(iter(nics))].name}" if len(nics) == 1 else "the host"
            first = next(reason for reason in refusals.values() if reason)
            remedy = _APART if "IOMMU group" in first else _FREE
            raise NoVf(f"{whose} has {len(vfs)} VFs and none is free: {first}", remedy)
        return free

    def _nics(self, source: str) -> dict[PciAddress, Nic]:
        """NICs whose VFs a network may have; raises NoVf where there is none."""
        having = {vf.nic for vf in self.topology.vfs}
        asked = [n for n in self.topology.nics if _is_called(n, source)]
        if source == AUTO:
            asked = [n for n in self.topology.nics if n.pci.address in having]
        if not asked and source == AUTO:
            raise NoVf("no NIC of the host has virtual functions", _MAKE)
        if not asked:
            names = ", ".join(nic.name for nic in self.topology.nics if nic.interfaces)
            raise NoVf(f"there is no NIC {source}", f"NICs of the host: {names or 'none'}")
        faults = {nic: self._fault(nic) for nic in asked}
        if all(faults.values()):
            raise NoVf(*next(fault for fault in faults.values() if fault))
        return {nic.pci.address: nic for nic in asked if not faults[nic]}

    def _fault(self, nic: Nic) -> tuple[str, str] | None:
        """Why no VM can have a VF of this NIC, and what to do."""
        name = f"NIC {nic.name}"
        if nic.pci.class_code != _ETHERNET:
            return f"{name} is InfiniBand, whose VFs have no MAC address", "name an Ethernet NIC"
        if nic.pci.driver == VFIO:
            return f"{name} goes to VMs as a whole", _KEEP
        if not nic.pci.sriov_vfs:
            return f"{name} has no SR-IOV", "name another NIC, or switch it on in its firmware"
        if not any(vf.nic == nic.pci.address for vf in self.topology.vfs):
            return f"{name} has no virtual functions", _MAKE
        if not nic.up:  # libvirt sets a VF's MAC through it, and only then
            remedy = f"`ip link set {nic.name} up`, and in the host's network configuration"
            return f"{name} is down, so libvirt cannot set up its VFs", remedy
        return None

    def _spoken_for(self) -> set[PciAddress]:
        """VFs that are better left: other VMs are defined with them, or name a NIC that has no
        more free ones than they ask for.
        """
        defined = {vf for held in self.holdings for vf in held.vfs if vf}
        asked: Counter[PciAddress] = Counter()
        for nic in self.topology.nics:
            for vm in self.others:
                here = [n for n in vm.networks if n.kind is NetworkKind.VF]
                asked[nic.pci.address] += sum(_is_called(nic, n.source) for n in here)
        left: Counter[PciAddress] = Counter()
        for vf in self.topology.vfs:
            holder = self.ledger.devices.get(vf.pci.address)
            left[vf.nic] += holder is None
            asked[vf.nic] -= holder in {vm.name for vm in self.others}
        scarce = {nic for nic, count in asked.items() if 0 < count >= left[nic]}
        return defined | {vf.pci.address for vf in self.topology.vfs if vf.nic in scarce}


def _is_called(nic: Nic, source: str) -> bool:
    """Whether a network's source is this NIC, by interface or PCI address."""
    if source in nic.interfaces:
        return True
    try:
        return PciAddress.parse(source) == nic.pci.address
    except ValueError:
        return False


def with_strays(health: HealthReport, topology: Topology, current: CurrentState) -> HealthReport:
    """Add VFs that are on vfio-pci though no domain has them: some program does."""
    held = {address for d in current.domains for address in d.facts.devices}
    held |= {address for d in current.domains if d.live for address in d.live.devices}
    strays = tuple(
        DeviceHealth(
            vf.pci.address, DeviceState.UNBOUND, "is bound to vfio-pci, but no domain has it"
        )
        for vf in topology.vfs
        if vf.pci.driver == VFIO and vf.pci.address not in held and health.usable(vf.pci.address)
    )
    return replace(health, devices=(*health.devices, *strays)) if strays else health
