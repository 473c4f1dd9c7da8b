"""Fabric: no VM starts on a device that is dead or in other hands."""

from __future__ import annotations

from pathlib import Path

import pytest
from machines import SAMPLE_VF, bind, own, set_flags, silence, unplug

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.host.fabric import Fabric, fabric_for
from dgx_kvm_sw.host.platforms import survey
from dgx_kvm_sw.model.errors import HostError
from dgx_kvm_sw.model.pci import PciAddress
from dgx_kvm_sw.model.platform import Partition

GPU, OTHER_GPU = PciAddress.parse("0000:34:00.0"), PciAddress.parse("0000:36:00.0")
DEVICES = (GPU, OTHER_GPU)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return own("dgx2", tmp_path)


@pytest.fixture
def fabric(root: Root) -> Fabric:
    return fabric_for(survey(root)[0], root)


@pytest.fixture
def pair(root: Root) -> Partition:
    return survey(root)[0].of_size(2)[0]


def test_devices_on_vfio_pci_are_ready(fabric: Fabric, pair: Partition) -> None:
    fabric.prepare(pair, DEVICES)
    fabric.verify(pair, DEVICES)
    fabric.release(DEVICES)


def test_a_vm_without_devices_needs_nothing(fabric: Fabric) -> None:
    fabric.prepare(None, ())
    fabric.verify(None, ())
    fabric.release(())


def test_a_virtual_function_is_ready_at_the_hosts_driver_while_its_nic_is_up(
    root: Root, fabric: Fabric
) -> None:
    vf = PciAddress.parse(SAMPLE_VF)
    fabric.prepare(None, (vf,))
    bind(root, vf, "vfio-pci")  # of the VM's own, when it is to restart
    fabric.verify(None, (vf,))
    set_flags(root, "0000:86:00.0", 0x1002)
    with pytest.raises(HostError, match=r"function of NIC 0000:86:00\.0, which is down"):
        fabric.prepare(None, (vf,))


def test_a_virtual_function_that_the_host_took_is_not_ready(root: Root, fabric: Fabric) -> None:
    set_flags(root, SAMPLE_VF, 0x1003)
    with pytest.raises(HostError, match="is the host's: enp134s0f0v0 is up"):
        fabric.prepare(None, (PciAddress.parse(SAMPLE_VF),))


@pytest.mark.parametrize("moment", ["prepare", "verify"])
def test_what_is_wrong_is_said_of_each_device(
    root: Root, fabric: Fabric, pair: Partition, moment: str
) -> None:
    bind(root, GPU, "nvidia")
    silence(root, OTHER_GPU)
    with pytest.raises(HostError) as caught:
        getattr(fabric, moment)(pair, DEVICES)
    assert caught.value.message == (
        "PCI device 0000:34:00.0 is bound to nvidia, not to vfio-pci; "
        "0000:36:00.0 does not answer on the PCI bus"
    )


def test_a_device_that_is_gone_stops_the_start(root: Root, fabric: Fabric, pair: Partition) -> None:
    unplug(root, GPU)
    with pytest.raises(HostError, match="is gone from the PCI bus"):
        fabric.prepare(pair, DEVICES)


def test_a_device_without_a_driver_stops_the_start(
    root: Root, fabric: Fabric, pair: Partition
) -> None:
    bind(root, GPU, None)
    with pytest.raises(HostError, match="is bound to no driver"):
        fabric.prepare(pair, DEVICES)


def test_devices_can_be_released_in_any_state(root: Root, fabric: Fabric) -> None:
    unplug(root, GPU)
    fabric.release(DEVICES)
