"""Faults of devices in words, apart from what merely is the host's own."""

from __future__ import annotations

from collections.abc import Callable

from dgx_kvm_sw.cli.picture import Line, Span, line, wrapped
from dgx_kvm_sw.model.health import DeviceHealth, DeviceState, HealthReport
from dgx_kvm_sw.model.pci import PciAddress, PciDevice
from dgx_kvm_sw.model.platform import FabricModel, Platform
from dgx_kvm_sw.model.topology import Topology


def kept_by_host(
    topology: Topology, platform: Platform, health: HealthReport, pci: PciDevice
) -> bool:
    """Whether the host uses this device as it should: its own NICs and drives, a shared fabric."""
    if any(pci.address == switch.pci.address for switch in topology.nvswitches):
        return platform.fabric_model is FabricModel.SHARED and health.usable(pci.address)
    if any(pci.address == gpu.pci.address for gpu in topology.gpus):
        return False
    return pci.driver is not None and health.of(pci.address).state is DeviceState.UNBOUND


def faults(topology: Topology, platform: Platform, health: HealthReport) -> list[DeviceHealth]:
    """What is wrong with devices; that the host uses its own is not."""
    own = {
        pci.address for pci in topology.devices() if kept_by_host(topology, platform, health, pci)
    }
    return [
        device
        for device in health.devices
        if device.state is not DeviceState.UNBOUND or device.address not in own
    ]


def fault_lines(
    topology: Topology,
    platform: Platform,
    health: HealthReport,
    width: int,
    victim: Callable[[PciAddress], str] = lambda address: "",
) -> list[Line]:
    """A line or two for each fault; `victim` says who suffers from it."""
    lines: list[Line] = []
    for device in faults(topology, platform, health):
        name = topology.device_name(device.address)
        text = device.reason or f"is {device.state}"
        if device.since:
            text += f", since {device.since}"
        if who := victim(device.address):
            text += f"; {who}"
        style = "warn" if device.state is DeviceState.DEGRADED else "bad"
        lines += wrapped(text, width, first=line("  ", Span(name, style), "  "), indent=6)
    return lines
