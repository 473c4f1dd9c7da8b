"""assess(): which devices may be used, and the words that say why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from machines import (
    MACHINES,
    SAMPLE_VF,
    bind,
    change,
    device_path,
    own,
    set_flags,
    silence,
    unplug,
)

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.host.health import QUARANTINE, assess
from dgx_kvm_sw.host.platforms import survey
from dgx_kvm_sw.host.topology import discover
from dgx_kvm_sw.model.errors import HostError
from dgx_kvm_sw.model.health import DeviceHealth, DeviceState, HealthReport
from dgx_kvm_sw.model.pci import PciAddress
from dgx_kvm_sw.model.platform import FabricModel

Machine = Callable[[str], Root]

GPU, NVSWITCH, IB = "0000:34:00.0", "0000:61:00.0", "0000:35:00.0"  # of the DGX-2
MANAGEMENT_NIC, OS_DRIVE = "0000:06:00.0", "0000:01:00.0"
SINCE = "2026-01-31T12:00:00Z"


@pytest.fixture
def dgx2(tmp_path: Path) -> Root:
    return own("dgx2", tmp_path)


def report(root: Root, fabric_model: FabricModel = FabricModel.PASSTHROUGH) -> HealthReport:
    return assess(discover(root), root, fabric_model)


def health(root: Root, address: str) -> DeviceHealth:
    return report(root).of(PciAddress.parse(address))


def quarantine(root: Root, address: str, state: str, reason: str) -> None:
    entry = {"address": address, "state": state, "reason": reason, "since": SINCE}
    root.write(QUARANTINE, json.dumps({"version": 1, "devices": [entry]}), sync=False)


@pytest.mark.parametrize("name", MACHINES)
def test_on_a_sound_machine_only_what_the_host_uses_is_reported(
    machine: Machine, name: str
) -> None:
    root = machine(name)
    platform, topology = survey(root)
    sound = assess(topology, root, platform.fabric_model)
    assert {device.state for device in sound.devices} == {DeviceState.UNBOUND}
    assert all(sound.usable(gpu.pci.address) for gpu in topology.gpus)
    assert all(sound.usable(switch.pci.address) for switch in topology.nvswitches)
    used = [nic.pci.address for nic in topology.nics if nic.interfaces]
    used += [drive.pci.address for drive in topology.drives if drive.block_devices]
    assert [device.address for device in sound.devices] == sorted(used)


def test_a_device_on_another_driver_belongs_to_the_host(dgx2: Root) -> None:
    bind(dgx2, GPU, "nvidia")
    bind(dgx2, IB, None)
    assert health(dgx2, GPU).state is DeviceState.UNBOUND
    assert health(dgx2, GPU).reason == "is bound to nvidia, not to vfio-pci"
    assert health(dgx2, IB).reason == "is bound to no driver, not to vfio-pci"
    assert health(dgx2, MANAGEMENT_NIC).reason == "is bound to igb, not to vfio-pci"
    assert health(dgx2, OS_DRIVE).reason == "is bound to nvme, not to vfio-pci"
    assert not report(dgx2).usable(PciAddress.parse(GPU))


def test_nvswitches_belong_to_nvidia_in_the_shared_model_alone(dgx2: Root) -> None:
    nvswitch = PciAddress.parse(NVSWITCH)
    assert report(dgx2).of(nvswitch).state is DeviceState.OK
    shared = report(dgx2, FabricModel.SHARED).of(nvswitch)
    assert shared.reason == "is bound to vfio-pci, not to nvidia"
    bind(dgx2, NVSWITCH, "nvidia")
    assert report(dgx2).of(nvswitch).state is DeviceState.UNBOUND
    assert report(dgx2, FabricModel.SHARED).of(nvswitch).state is DeviceState.OK


@pytest.mark.parametrize("address", [GPU, NVSWITCH, IB])
def test_a_narrow_link_is_degraded_and_still_usable(dgx2: Root, address: str) -> None:
    change(dgx2, address, "current_link_width", "2")
    assert health(dgx2, address).state is DeviceState.DEGRADED
    assert health(dgx2, address).reason.startswith("runs at x2 of x")
    assert report(dgx2).usable(PciAddress.parse(address))


def test_a_slow_link_is_degraded_but_not_that_of_an_idle_gpu(dgx2: Root) -> None:
    for address in (IB, GPU):
        change(dgx2, address, "current_link_speed", "2.5 GT/s PCIe")
    assert health(dgx2, IB).reason == "runs at 2.5 of 8 GT/s"
    assert health(dgx2, GPU).state is DeviceState.OK


def test_an_unknown_link_is_not_held_against_a_device(dgx2: Root) -> None:
    change(dgx2, IB, "current_link_speed", "Unknown")
    assert health(dgx2, IB).state is DeviceState.OK


def test_a_silent_device_has_failed(dgx2: Root) -> None:
    silence(dgx2, GPU)
    assert health(dgx2, GPU).state is DeviceState.FAILED
    assert health(dgx2, GPU).reason == "does not answer on the PCI bus"


def test_a_virtual_function_has_no_vendor_on_the_bus_and_yet_answers(dgx2: Root) -> None:
    """Its vendor and device read as ones (SR-IOV specification, 3.4.1.1)."""
    config = device_path(dgx2, SAMPLE_VF) / "config"
    assert config.read_bytes()[:4] == b"\xff" * 4
    assert health(dgx2, SAMPLE_VF).state is DeviceState.OK
    silence(dgx2, SAMPLE_VF)
    assert health(dgx2, SAMPLE_VF).state is DeviceState.FAILED


def test_an_idle_virtual_function_is_free_at_any_driver_that_libvirt_can_move_it_from(
    dgx2: Root,
) -> None:
    for driver in ("mlx5_core", "vfio-pci", None):
        bind(dgx2, SAMPLE_VF, driver)
        assert health(dgx2, SAMPLE_VF).state is DeviceState.OK
    bind(dgx2, SAMPLE_VF, "mlx5_core")
    set_flags(dgx2, SAMPLE_VF, 0x1003)
    assert health(dgx2, SAMPLE_VF).state is DeviceState.UNBOUND
    assert health(dgx2, SAMPLE_VF).reason == "is the host's: enp134s0f0v0 is up"


def test_a_device_that_left_after_discovery_is_absent(dgx2: Root) -> None:
    topology = discover(dgx2)
    unplug(dgx2, GPU)
    gone = assess(topology, dgx2, FabricModel.PASSTHROUGH).of(PciAddress.parse(GPU))
    assert gone.state is DeviceState.ABSENT


def test_quarantine_holds_for_a_device_that_looks_well(dgx2: Root) -> None:
    quarantine(dgx2, GPU, "failed", "XID 79")
    expected = DeviceHealth(PciAddress.parse(GPU), DeviceState.FAILED, "XID 79", SINCE)
    assert health(dgx2, GPU) == expected


def test_quarantine_holds_for_a_device_that_is_not_there(dgx2: Root) -> None:
    unplug(dgx2, GPU)
    quarantine(dgx2, GPU, "absent", "is gone from the PCI bus")
    assert health(dgx2, GPU).since == SINCE


def test_the_worse_word_counts(dgx2: Root) -> None:
    quarantine(dgx2, GPU, "failed", "XID 79")
    bind(dgx2, GPU, "nvidia")
    assert health(dgx2, GPU).reason == "XID 79"
    quarantine(dgx2, GPU, "degraded", "is slow at times")
    assert health(dgx2, GPU).state is DeviceState.UNBOUND
    silence(dgx2, GPU)
    assert health(dgx2, GPU).state is DeviceState.FAILED


def test_of_two_failures_the_recorded_one_is_told_as_it_has_a_date(dgx2: Root) -> None:
    quarantine(dgx2, GPU, "failed", "XID 79")
    silence(dgx2, GPU)
    assert health(dgx2, GPU).since == SINCE


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"devices": [{}]}', '{"devices": [{"address": "GPU 1"}]}']
)
def test_a_spoilt_quarantine_is_never_taken_for_an_empty_one(dgx2: Root, text: str) -> None:
    dgx2.write(QUARANTINE, text, sync=False)
    with pytest.raises(HostError, match="cannot be understood"):
        report(dgx2)
