"""discover(): the machine as sysfs shows it, whatever sysfs leaves out."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from machines import (
    MACHINES,
    SAMPLE_VF,
    bind,
    change,
    device_path,
    make_vfs,
    own,
    set_flags,
    unplug,
    without_numa,
)

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.host.topology import discover
from dgx_kvm_sw.model.pci import Link, PciAddress
from dgx_kvm_sw.model.topology import HugepagePool

Machine = Callable[[str], Root]

GPU_0, NVSWITCH_0, IB_0 = "0000:34:00.0", "0000:61:00.0", "0000:35:00.0"  # of the DGX-2
ONBOARD_NIC, DATA_NIC, OS_DRIVE = "0000:06:00.0", "0000:86:00.0", "0000:01:00.0"


@pytest.fixture
def dgx2(tmp_path: Path) -> Root:
    return own("dgx2", tmp_path)


@pytest.mark.parametrize(
    ("name", "gpus", "nvswitches", "nics", "drives", "nodes", "threads"),
    [
        ("dgx2", 16, 12, 11, 10, 2, 96),
        ("dgx-a100", 8, 6, 11, 10, 8, 256),
        ("dgx-h100", 8, 4, 13, 10, 2, 224),
        ("dgx-h200", 8, 4, 13, 10, 2, 224),
        ("dgx-b200", 8, 0, 13, 10, 2, 224),
    ],
)
def test_everything_is_found(
    machine: Machine,
    name: str,
    gpus: int,
    nvswitches: int,
    nics: int,
    drives: int,
    nodes: int,
    threads: int,
) -> None:
    topology = discover(machine(name))
    assert len(topology.gpus) == gpus
    assert len(topology.nvswitches) == nvswitches  # class 0x0680 is not just another bridge
    assert len(topology.nics) == nics
    assert len(topology.drives) == drives
    assert len(topology.numa_nodes) == nodes
    assert sum(len(node.cpus) for node in topology.numa_nodes) == threads
    assert topology.threads_per_core == 2


@pytest.mark.parametrize("name", MACHINES)
def test_indexes_follow_pci_order(machine: Machine, name: str) -> None:
    topology = discover(machine(name))
    gpus = [(gpu.index, gpu.pci.address) for gpu in topology.gpus]
    nvswitches = [(switch.index, switch.pci.address) for switch in topology.nvswitches]
    for devices in (gpus, nvswitches):
        addresses = sorted(address for _, address in devices)
        assert devices == list(enumerate(addresses))


@pytest.mark.parametrize("name", MACHINES)
def test_every_device_has_an_iommu_group_and_no_bridge_has(machine: Machine, name: str) -> None:
    topology = discover(machine(name))
    members = dict(topology.iommu_groups)
    for pci in topology.devices():
        assert pci.iommu_group is not None
        assert pci.address in members[pci.iommu_group]
    bridges = {bridge for pci in topology.devices() for bridge in pci.upstream}
    assert bridges.isdisjoint(address for group in members.values() for address in group)


def test_devices_that_share_a_group_are_in_it_together(machine: Machine) -> None:
    topology = discover(machine("dgx-h200"))
    (group,) = {switch.pci.iommu_group for switch in topology.nvswitches}
    expected = tuple(switch.pci.address for switch in topology.nvswitches)
    assert (group, expected) in topology.iommu_groups


def test_a_gpu_in_full(dgx2: Root) -> None:
    gpu = discover(dgx2, {PciAddress.parse(GPU_0): 1}).gpus[0]
    assert gpu.physical_id == 1
    assert str(gpu.pci.address) == GPU_0
    assert gpu.pci.id == "10de:1db8"
    assert gpu.pci.class_code == 0x0302
    assert gpu.pci.numa_node == 0
    assert gpu.pci.driver == "vfio-pci"
    assert gpu.pci.root == "pci0000:2e"
    assert " ".join(map(str, gpu.pci.upstream)) == (
        "0000:2e:00.0 0000:2f:00.0 0000:30:00.0 0000:32:00.0 0000:33:00.0"
    )
    assert gpu.pci.link == Link(8.0, 16, 8.0, 16)
    assert gpu.pci.bar_bytes == (16 << 20, 32 << 30, 32 << 20)


def test_two_gpus_and_a_nic_share_a_switch_on_the_dgx2(machine: Machine) -> None:
    topology = discover(machine("dgx2"))
    pcis = [gpu.pci for gpu in topology.gpus] + [nic.pci for nic in topology.nics]
    below_a_switch = Counter(pci.upstream[:4] for pci in pcis if len(pci.upstream) == 5)
    assert list(below_a_switch.values()) == [3] * 8


def test_physical_ids_are_told_and_never_guessed(dgx2: Root) -> None:
    assert {gpu.physical_id for gpu in discover(dgx2).gpus} == {None}


def test_what_the_host_uses_shows_by_name(dgx2: Root) -> None:
    topology = discover(dgx2)
    interfaces = {str(nic.pci.address): nic.interfaces for nic in topology.nics}
    assert interfaces[ONBOARD_NIC] == ("enp6s0",)
    assert interfaces[DATA_NIC] == ("enp134s0f0",)
    assert interfaces[IB_0] == ()
    drives = {str(drive.pci.address): drive.block_devices for drive in topology.drives}
    assert drives[OS_DRIVE] == ("nvme0n1",)


def test_an_infiniband_function_without_a_network_interface_shows_its_rdma_device(
    dgx2: Root,
) -> None:
    (device_path(dgx2, IB_0) / "infiniband" / "mlx5_0").mkdir(parents=True)
    nic = next(nic for nic in discover(dgx2).nics if str(nic.pci.address) == IB_0)
    assert nic.interfaces == ("mlx5_0",)


def test_nvme_multipath_shows_the_disk_and_not_its_path(dgx2: Root) -> None:
    controller = device_path(dgx2, OS_DRIVE) / "nvme/nvme0"
    (controller / "nvme0n1").rename(controller / "nvme0c0n1")
    assert discover(dgx2).drives[0].block_devices == ("nvme0n1",)


def test_virtual_functions_are_no_nics_but_their_nics_own(dgx2: Root) -> None:
    addresses = make_vfs(dgx2, IB_0, 3, "ib0")
    topology = discover(dgx2)
    assert not {*addresses, SAMPLE_VF} & {str(nic.pci.address) for nic in topology.nics}
    found = [vf for vf in topology.vfs if str(vf.nic) == IB_0]
    assert [(vf.index, str(vf.pci.address)) for vf in found] == list(enumerate(addresses))
    assert {vf.pci.numa_node for vf in found} == {0}
    assert topology.device_name(found[2].pci.address) == f"VF 2 of NIC {IB_0} ({addresses[2]})"
    assert {vf.pci.link for vf in found} == {None}  # the link is that of the NIC


def test_vfs_are_numbered_as_the_nic_numbers_them(dgx2: Root) -> None:
    make_vfs(dgx2, IB_0, 12, "ib0")
    indexes = [vf.index for vf in discover(dgx2).vfs if str(vf.nic) == IB_0]
    assert indexes == list(range(12))


def test_a_vf_that_is_being_made_is_not_there_yet(dgx2: Root) -> None:
    dgx2.path(f"/sys/bus/pci/devices/{SAMPLE_VF}").unlink()
    assert SAMPLE_VF not in [str(vf.pci.address) for vf in discover(dgx2).vfs]


def test_the_vfs_of_a_gpu_are_nothing_to_us(dgx2: Root) -> None:
    (device_path(dgx2, "0000:36:00.0") / "physfn").symlink_to(f"../{GPU_0}")
    topology = discover(dgx2)
    assert "0000:36:00.0" not in [str(pci.address) for pci in topology.devices()]


@pytest.mark.parametrize(("flags", "up"), [(0x1003, True), (0x1002, False)])
def test_a_nic_is_up_when_its_interface_is(dgx2: Root, flags: int, up: bool) -> None:
    set_flags(dgx2, DATA_NIC, flags)
    assert [nic.up for nic in discover(dgx2).nics if str(nic.pci.address) == DATA_NIC] == [up]


def test_vfs_do_not_make_a_card_the_way_to_hidden_nvswitches(dgx2: Root) -> None:
    """Function 3 of the card is one of its VFs; they have no vital product data."""
    assert device_path(dgx2, "0000:86:00.3").exists()
    assert DATA_NIC in [str(nic.pci.address) for nic in discover(dgx2).nics]


def test_the_way_to_hidden_nvswitches_is_not_a_free_nic(tmp_path: Path) -> None:
    """On a B200 four ConnectX-7 functions command the fabric; their VPD tells them from NICs."""
    root = own("dgx-b200", tmp_path)
    bridges = {f"0000:05:00.{function}" for function in range(4)}
    assert bridges.isdisjoint(str(nic.pci.address) for nic in discover(root).nics)
    for bridge in bridges:
        change(root, bridge, "vpd", "an ordinary card with four ports")
    assert bridges.issubset(str(nic.pci.address) for nic in discover(root).nics)


@pytest.mark.parametrize("speed", ["Unknown", "", "Unknown speed"])
def test_an_unknown_link_is_no_link(dgx2: Root, speed: str) -> None:
    change(dgx2, GPU_0, "current_link_speed", speed)
    assert discover(dgx2).gpus[0].pci.link is None


def test_speeds_are_read_in_old_and_new_notation(dgx2: Root) -> None:
    change(dgx2, GPU_0, "current_link_speed", "2.5 GT/s")
    assert discover(dgx2).gpus[0].pci.link == Link(2.5, 16, 8.0, 16)


def test_a_device_without_a_driver_group_or_node(dgx2: Root) -> None:
    bind(dgx2, GPU_0, None)
    (device_path(dgx2, GPU_0) / "iommu_group").unlink()
    change(dgx2, GPU_0, "numa_node", "-1")
    pci = discover(dgx2).gpus[0].pci
    assert (pci.driver, pci.iommu_group, pci.numa_node) == (None, None, None)


def test_a_gpu_of_another_vendor_is_no_gpu_of_ours(dgx2: Root) -> None:
    change(dgx2, GPU_0, "vendor", "0x1a03")  # ASPEED: the BMC's graphics, class 0x0300
    change(dgx2, GPU_0, "class", "0x030000")
    assert len(discover(dgx2).gpus) == 15


def test_a_bridge_that_is_not_nvidias_is_no_nvswitch(dgx2: Root) -> None:
    change(dgx2, NVSWITCH_0, "vendor", "0x8086")
    assert len(discover(dgx2).nvswitches) == 11


def test_cores_keep_sibling_threads_together(machine: Machine) -> None:
    first, second = discover(machine("dgx2")).numa_nodes
    assert first.cores[0] == (0, 48)
    assert second.cores[-1] == (47, 95)
    assert str(second.cpus) == "24-47,72-95"


def test_an_offline_cpu_leaves_its_sibling_alone(dgx2: Root) -> None:
    """The node's list has online CPUs only, and counts whatever the sibling still says."""
    dgx2.path("/sys/devices/system/node/node0/cpulist").write_text("0-23,49-71\n")
    shutil.rmtree(dgx2.path("/sys/devices/system/cpu/cpu48/topology"))
    node = discover(dgx2).numa_nodes[0]
    assert node.cores[:2] == ((0,), (1, 49))
    assert len(node.cpus) == 47


def test_a_node_of_memory_only(dgx2: Root) -> None:
    dgx2.path("/sys/devices/system/node/node1/cpulist").write_text("\n")
    node = discover(dgx2).numa_nodes[1]
    assert node.cores == ()
    assert node.memory_mib == 768 * 1024


def test_memory_pages_and_distances(machine: Machine) -> None:
    first, second = discover(machine("dgx2")).numa_nodes
    assert first.memory_mib == 768 * 1024
    assert first.hugepages == (HugepagePool(1048576, 720, 720),)
    assert first.distance(1) == second.distance(0) == 21
    a100 = discover(machine("dgx-a100")).numa_nodes
    assert (a100[0].distance(0), a100[0].distance(3), a100[0].distance(4)) == (10, 12, 32)


def test_pages_of_all_sizes_smallest_first(dgx2: Root) -> None:
    folder = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB"
    dgx2.write(f"{folder}/nr_hugepages", "512\n", sync=False)
    dgx2.write(f"{folder}/free_hugepages", "500\n", sync=False)
    assert discover(dgx2).numa_nodes[0].hugepages == (
        HugepagePool(2048, 512, 500),
        HugepagePool(1048576, 720, 720),
    )


def test_nodes_need_not_be_numbered_without_gaps(dgx2: Root) -> None:
    nodes = dgx2.path("/sys/devices/system/node")
    (nodes / "node1").rename(nodes / "node8")
    first, second = discover(dgx2).numa_nodes
    assert (first.id, second.id) == (0, 8)
    assert first.distance(8) == 21


def test_a_kernel_without_numa_is_one_node_of_everything(dgx2: Root) -> None:
    without_numa(dgx2)
    (node,) = discover(dgx2).numa_nodes
    assert len(node.cpus) == 96
    assert len(node.cores) == 48
    assert node.memory_mib == 1536 * 1024
    assert node.distance(0) == 10
    assert {gpu.pci.numa_node for gpu in discover(dgx2).gpus} == {None}


def test_a_machine_without_gpus(dgx2: Root) -> None:
    unplug(dgx2, *(gpu.pci.address for gpu in discover(dgx2).gpus))
    topology = discover(dgx2)
    assert topology.gpus == ()
    assert len(topology.drives) == 10


def test_an_empty_root_is_a_machine_with_nothing(tmp_path: Path) -> None:
    topology = discover(Root(tmp_path))
    assert topology.devices() == ()
    assert len(topology.numa_nodes) == 1
    assert topology.product_name == topology.cpu_model == ""


def test_names_of_machine_and_cpu(machine: Machine) -> None:
    topology = discover(machine("dgx2"))
    assert topology.product_name == "NVIDIA DGX-2"
    assert topology.cpu_model == "Intel(R) Xeon(R) Platinum 8168 CPU @ 2.70GHz"
