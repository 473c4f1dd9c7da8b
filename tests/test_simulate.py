"""build(): a sample machine that nothing but hardware could tell from a real one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from machines import MACHINES, device_path

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.host import simulate
from dgx_kvm_sw.host.platforms import PHYSICAL_IDS
from dgx_kvm_sw.host.topology import discover
from dgx_kvm_sw.model.errors import HostError, UsageError

Machine = Callable[[str], Root]


@pytest.mark.parametrize("name", MACHINES)
def test_links_lead_where_the_kernels_lead(machine: Machine, name: str) -> None:
    root = machine(name)
    for address in root.names("/sys/bus/pci/devices"):
        path = device_path(root, address)
        assert path.name == address
        assert path.is_relative_to(root.path("/sys/devices").resolve())
        driver, group = (path / "driver").resolve(), (path / "iommu_group").resolve()
        assert driver.parent == root.path("/sys/bus/pci/drivers").resolve()
        assert (driver / address).resolve() == path
        assert group.parent == root.path("/sys/kernel/iommu_groups").resolve()
        assert (group / "devices" / address).resolve() == path


@pytest.mark.parametrize("name", MACHINES)
def test_no_link_leaves_the_tree(machine: Machine, name: str) -> None:
    root = machine(name)
    for folder, folders, files in os.walk(root.path("/sys")):
        for entry in (Path(folder, one) for one in (*folders, *files)):
            if entry.is_symlink():
                assert not Path(os.readlink(entry)).is_absolute()
                assert entry.exists()


@pytest.mark.parametrize("name", MACHINES)
def test_buses_only_go_up_on_the_way_down(machine: Machine, name: str) -> None:
    """A bridge hands out higher bus numbers than its own, and no two devices an address."""
    topology = discover(machine(name))
    for pci in topology.devices():
        buses = [address.bus for address in (*pci.upstream, pci.address)]
        assert buses == sorted(set(buses))
    assert len({pci.address for pci in topology.devices()}) == len(topology.devices())


@pytest.mark.parametrize("name", MACHINES)
def test_every_gpu_has_a_physical_id_that_is_not_its_index(machine: Machine, name: str) -> None:
    root = machine(name)
    ids = json.loads(root.read(PHYSICAL_IDS))["ids"]
    assert list(ids) == [str(gpu.pci.address) for gpu in discover(root).gpus]
    assert sorted(ids.values()) == list(range(1, len(ids) + 1))
    assert list(ids.values()) != sorted(ids.values())


def test_machines_have_ids_of_their_own(machine: Machine) -> None:
    ids = {machine(name).read("/etc/machine-id") for name in MACHINES}
    assert len(ids) == len(MACHINES)
    assert all(len(one) == 32 for one in ids)


def test_a_machine_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    simulate.build("dgx2", tmp_path)
    Root(tmp_path).write(PHYSICAL_IDS, "changed", sync=False)
    simulate.build("dgx2", tmp_path)
    assert Root(tmp_path).read(PHYSICAL_IDS) == "changed"


def test_files_beside_the_machine_stay(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    simulate.build("dgx2", tmp_path)
    assert (tmp_path / "notes").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["etc", "notes", "proc", "sys", "var"]


def test_a_build_that_was_killed_is_done_again(tmp_path: Path) -> None:
    simulate.build("dgx2", tmp_path)
    (tmp_path / "sys").rename(tmp_path / ".building-killed")
    simulate.build("dgx2", tmp_path)
    assert len(discover(Root(tmp_path)).gpus) == 16


def test_another_machine_is_not_overwritten(tmp_path: Path) -> None:
    simulate.build("dgx2", tmp_path)
    with pytest.raises(HostError, match="already simulates NVIDIA DGX-2, not dgx-h100"):
        simulate.build("dgx-h100", tmp_path)


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        simulate.build("dgx1", tmp_path)
    assert "dgx2, dgx-a100" in caught.value.hint


def test_a_directory_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="cannot write"):
        simulate.build("dgx2", tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "nodes", "cores", "threads", "memory_gib"),
    [("dgx2", 2, 24, 96, 1536), ("dgx-a100", 8, 16, 256, 1024), ("dgx-h100", 2, 56, 224, 2048)],
)
def test_libvirts_test_driver_takes_the_machine_for_its_host(
    machine: Machine,
    tmp_path: Path,
    name: str,
    nodes: int,
    cores: int,
    threads: int,
    memory_gib: int,
) -> None:
    libvirt = pytest.importorskip("libvirt")
    file = tmp_path / "node.xml"
    file.write_text(simulate.libvirt_node_xml(discover(machine(name))))
    connection = libvirt.open(f"test://{file}")
    _, memory, cpus, _, *shape = connection.getInfo()
    connection.close()
    assert (memory, cpus, shape) == (memory_gib * 1024, threads, [nodes, 1, cores, 2])
