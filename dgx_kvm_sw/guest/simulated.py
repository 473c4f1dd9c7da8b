"""libvirt's test driver with a memory: what it holds is kept in files between commands."""

from __future__ import annotations

import json
from dataclasses import replace
from xml.etree import ElementTree

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.guest.checksums import Progress, unwatched
from dgx_kvm_sw.guest.hypervisor import Hypervisor
from dgx_kvm_sw.model.base import to_json
from dgx_kvm_sw.model.domain import (
    DomainFacts,
    HostNetwork,
    Space,
    Volume,
    VolumeGroup,
)

NODE_FILE = "/libvirt/node.xml"
_DOMAINS = "/libvirt/domains"
_VOLUMES = "/libvirt/volumes"
_POOL = "/libvirt/pool"
_NETWORKS = "/libvirt/networks"
_LOGICAL = "/libvirt/lvm"
_SPACE = "/libvirt/space"  # MiB: all of the pool's file system, and what is free of it

_GROUP = VolumeGroup("data", 4, 4 << 20, ())  # 4 TiB
_SAMPLE_SPACE = Space(28 << 20, 28 << 20)


class SimulatedHypervisor(Hypervisor):
    """The real Hypervisor on `test://`, loaded from a root at the start and saved at each change.

    A file is written after libvirt has done its part, so that a killed command leaves what a
    real libvirtd would hold: each change either happened or did not.
    """

    def __init__(self, root: Root) -> None:
        super().__init__(f"test://{root.path(NODE_FILE).resolve()}")
        self._root = root
        self._load()

    def _load(self) -> None:
        for name in self._saved(_DOMAINS):
            saved = json.loads(self._root.read(f"{_DOMAINS}/{name}"))
            if saved["live"]:
                self._connection.defineXML(saved["live"]).create()
            self._connection.defineXML(saved["inactive"])
        if pool := self._root.read(_POOL, ""):
            super().ensure_pool(pool)
        for name in self._saved(_VOLUMES):
            super()._create_file(Volume(**json.loads(self._root.read(f"{_VOLUMES}/{name}"))))
        for name in self._saved(_NETWORKS):
            saved = json.loads(self._root.read(f"{_NETWORKS}/{name}"))
            network = self._connection.networkDefineXML(saved["xml"])
            if saved["active"]:
                network.create()

    def _saved(self, folder: str) -> list[str]:
        """Names of files that were written whole; a killed command may have left others."""
        return [name for name in self._root.names(folder) if not name.startswith(".")]

    def _save(self, name: str) -> None:
        found = self.domain(name)
        saved = json.dumps({"inactive": found.inactive, "live": found.live})
        self._root.write(f"{_DOMAINS}/{name}.json", saved, sync=False)

    def define(self, name: str, xml: str) -> None:
        super().define(name, xml)
        self._save(name)

    def update_live(self, facts: DomainFacts, metadata: tuple[str, str, str]) -> None:
        # The test driver takes its host for one of 8 CPUs when a pin comes as bits, and drops
        # the others. So the same is done to the XML of the running domain.
        found = self.domain(facts.name)
        live = ElementTree.fromstring(found.live or found.inactive)
        pins = ElementTree.Element("cputune")
        for vcpu, cpus in enumerate(facts.vcpu_pins):
            ElementTree.SubElement(pins, "vcpupin", vcpu=str(vcpu), cpuset=str(cpus))
        ElementTree.SubElement(pins, "emulatorpin", cpuset=str(facts.emulator_pin))
        pins.extend(live.iterfind("cputune/iothreadpin"))
        element, _, namespace = metadata
        ours = ElementTree.Element("metadata")
        ours.append(ElementTree.fromstring(element))
        ours[0].tag = f"{{{namespace}}}{ours[0].tag}"
        for fresh in (pins, ours):
            for old in live.findall(fresh.tag):
                live.remove(old)
            live.append(fresh)
        domain = self._connection.lookupByUUIDString(facts.uuid)
        domain.destroy()
        self._connection.defineXML(ElementTree.tostring(live, encoding="unicode")).create()
        self._connection.defineXML(found.inactive)
        self._save(facts.name)

    def start(self, name: str, uuid: str) -> None:
        super().start(name, uuid)
        self._save(name)

    def shut_down(self, name: str, uuid: str, timeout: float, *, force: bool) -> None:
        super().shut_down(name, uuid, timeout, force=force)
        self._save(name)

    def undefine(self, name: str, uuid: str) -> None:
        super().undefine(name, uuid)
        self._root.remove(f"{_DOMAINS}/{name}.json")

    def ensure_pool(self, path: str) -> None:
        super().ensure_pool(path)
        self._root.write(_POOL, path, sync=False)

    def remove_empty_pool(self) -> None:
        super().remove_empty_pool()
        if self._pool() is None:
            self._root.remove(_POOL)

    def _reserved_mib(self, volume: Volume) -> int:
        return 0  # the test driver's pool has 100 GiB, and no room for what `space` says there is

    def create_volume(self, volume: Volume, progress: Progress = unwatched) -> None:
        if not volume.group:
            super()._create_file(volume)
        self._save_volume(volume)

    def _save_volume(self, volume: Volume) -> None:
        folder = _LOGICAL if volume.group else _VOLUMES
        saved = json.dumps(to_json(volume))
        self._root.write(f"{folder}/{volume.name}", saved, sync=False)

    def grow_volume(self, volume: Volume) -> None:
        super().delete_volume(volume.path)  # the test driver resizes none
        super()._create_file(volume)
        self._save_volume(volume)

    def delete_volume(self, path: str) -> None:
        logical = path.startswith("/dev/")
        if not logical:
            super().delete_volume(path)
        folder = _LOGICAL if logical else _VOLUMES
        self._root.remove(f"{folder}/{path.rpartition('/')[2]}")

    def logical_volumes(self) -> tuple[tuple[VolumeGroup, ...], tuple[Volume, ...]]:
        texts = [self._root.read(f"{_LOGICAL}/{name}") for name in self._saved(_LOGICAL)]
        volumes = tuple(Volume(**json.loads(text)) for text in texts)
        taken = sum(volume.capacity_mib for volume in volumes)
        return (replace(_GROUP, free_mib=_GROUP.free_mib - taken),), volumes

    def copy_mib(self, volume: Volume) -> int:
        return 1024

    def space(self, folder: str) -> Space:
        saved = self._root.read(_SPACE, "").split()
        return Space(int(saved[0]), int(saved[1])) if saved else _SAMPLE_SPACE

    def _save_network(self, name: str) -> None:
        network = self._connection.networkLookupByName(name)
        saved = json.dumps({"xml": network.XMLDesc(), "active": bool(network.isActive())})
        self._root.write(f"{_NETWORKS}/{name}.json", saved, sync=False)

    def ensure_network(self, network: HostNetwork) -> None:
        super().ensure_network(network)
        self._save_network(network.name)

    def remove_network(self, name: str) -> None:
        super().remove_network(name)
        self._root.remove(f"{_NETWORKS}/{name}.json")
