"""Which devices may be used now: what sysfs shows, merged with what has been quarantined."""

from __future__ import annotations

import json

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.host.topology import is_up
from dgx_kvm_sw.model.errors import HostError
from dgx_kvm_sw.model.health import DeviceHealth, DeviceState, HealthReport
from dgx_kvm_sw.model.mode import VFIO
from dgx_kvm_sw.model.pci import Link, PciAddress, PciDevice
from dgx_kvm_sw.model.platform import FabricModel
from dgx_kvm_sw.model.topology import Topology

QUARANTINE = "/var/lib/dgx-kvm/health.json"
NO_ANSWER = b"\xff"  # what all bytes of a read are when no device completes it
_HEAD = 12  # bytes of the configuration: vendor, device, command, status, revision, class
SEVERITY = (
    DeviceState.OK,
    DeviceState.DEGRADED,
    DeviceState.UNBOUND,
    DeviceState.ABSENT,
    DeviceState.FAILED,
)


def assess(topology: Topology, root: Root, fabric_model: FabricModel) -> HealthReport:
    """Look at every device a VM could get; of observation and quarantine the worse word counts."""
    worst: dict[PciAddress, DeviceHealth] = {}
    # Quarantine first: it knows since when, so it stays where both say the same.
    for health in (*_quarantined(root), *_observed(topology, root, fabric_model)):
        known = worst.get(health.address)
        if not known or SEVERITY.index(health.state) > SEVERITY.index(known.state):
            worst[health.address] = health
    ordered = sorted(worst.values(), key=lambda health: health.address)
    return HealthReport(tuple(one for one in ordered if one.state is not DeviceState.OK))


def trouble_on_bus(address: PciAddress, root: Root) -> DeviceHealth | None:
    """Say whether a device is gone or silent; this asks the device itself.

    sysfs remembers `vendor` from boot; only a read of `config` reaches the bus. There a virtual
    function has no vendor of its own, so its class is looked at too.
    """
    try:
        with open(root.path(f"/sys/bus/pci/devices/{address}/config"), "rb", buffering=0) as config:
            head = config.read(_HEAD)
    except OSError:
        return DeviceHealth(address, DeviceState.ABSENT, "is gone from the PCI bus")
    if head and not head.strip(NO_ANSWER):
        return DeviceHealth(address, DeviceState.FAILED, "does not answer on the PCI bus")
    return None


def _observed(topology: Topology, root: Root, fabric_model: FabricModel) -> list[DeviceHealth]:
    gpus = {gpu.pci.address for gpu in topology.gpus}
    nvswitches = {switch.pci.address for switch in topology.nvswitches}
    vfs = {vf.pci.address for vf in topology.vfs}
    found: list[DeviceHealth] = []
    for pci in topology.devices():
        if pci.address in vfs:
            used = host_use(pci.address, root)
            own = DeviceHealth(pci.address, DeviceState.UNBOUND, used) if used else None
            found += filter(None, (trouble_on_bus(pci.address, root), own))
            continue
        shared = pci.address in nvswitches and fabric_model is FabricModel.SHARED
        trouble = trouble_on_bus(pci.address, root)
        driver = _wrong_driver(pci, "nvidia" if shared else "vfio-pci")
        link = _slow_link(pci, width_only=pci.address in gpus)
        found += filter(None, (trouble, driver, link))
    return found


def host_use(address: PciAddress, root: Root) -> str:
    """Say how the host uses a virtual function; "" where it does not.

    One that a VM may have is at its network driver, idle, as libvirt moves it, or already on
    vfio-pci. A driver may take seconds to make its interface; where the kernel has one that we do
    not see, it is in another network namespace.
    """
    folder = f"/sys/bus/pci/devices/{address}"
    driver = root.link_name(f"{folder}/driver")
    if driver is None or driver == VFIO:
        return ""
    if "uio" in driver or "vfio" in driver:
        return f"is bound to {driver}, so some program has it"
    names = root.names(f"{folder}/net")
    if not names and root.exists(f"{folder}/net"):
        return "has its interface in another network namespace, so a container has it"
    if is_up(str(root.path(folder))):
        return f"is the host's: {names[0]} is up"
    for name in names:
        for link in root.names(f"{folder}/net/{name}"):
            if link == "master" or link.startswith("upper_"):
                return f"is the host's: {name} carries another link"
    return ""


def _wrong_driver(pci: PciDevice, right: str) -> DeviceHealth | None:
    if pci.driver == right:
        return None
    reason = f"is bound to {pci.driver or 'no driver'}, not to {right}"
    return DeviceHealth(pci.address, DeviceState.UNBOUND, reason)


def _slow_link(pci: PciDevice, width_only: bool) -> DeviceHealth | None:
    link = pci.link or Link(0, 0, 0, 0)
    if link.width < link.max_width:
        reason = f"runs at x{link.width} of x{link.max_width}"
    # An idle GPU lowers its link to 2.5 GT/s to save power and raises it under load, so its
    # speed says nothing; its width never changes in service.
    elif link.speed < link.max_speed and not width_only:
        reason = f"runs at {link.speed:g} of {link.max_speed:g} GT/s"
    else:
        return None
    return DeviceHealth(pci.address, DeviceState.DEGRADED, reason)


def _quarantined(root: Root) -> list[DeviceHealth]:
    """Read the quarantine; raises HostError when it is there and cannot be understood.

    Taking such a file for an empty one would give fenced devices to VMs again.
    """
    if not root.exists(QUARANTINE):
        return []
    try:
        return [
            DeviceHealth(
                PciAddress.parse(entry["address"]),
                DeviceState(entry["state"]),
                str(entry["reason"]),
                str(entry["since"]),
            )
            for entry in json.loads(root.read(QUARANTINE))["devices"]
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise HostError(
            f"the quarantine list {root.path(QUARANTINE)} cannot be understood",
            "repair it, or remove it if no device is to stay out of use",
        ) from error
