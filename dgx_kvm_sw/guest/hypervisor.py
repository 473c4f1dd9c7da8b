"""libvirt: the only module that talks to it, with its errors turned into sentences."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape  # of xml.sax.saxutils it costs 20 ms: that imports an HTTP client
from typing import Any
from xml.etree import ElementTree

import libvirt

from dgx_kvm_sw.guest import copies, domainxml, lvm, networkxml
from dgx_kvm_sw.guest.checksums import Progress, unwatched
from dgx_kvm_sw.model.domain import DomainFacts, HostNetwork, Space, Volume, VolumeGroup
from dgx_kvm_sw.model.errors import HypervisorError
from dgx_kvm_sw.model.pci import CpuSet

POOL = "dgx-kvm"
_POLL_SECONDS = 0.2
_ASK_AGAIN_SECONDS = 15.0
_HEARS_OR_ENDS = (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_SHUTDOWN)
_REFRESH_TRIES = 50


@dataclass(frozen=True)
class DomainXml:
    """A domain as libvirt holds it: its inactive XML, and the live one while it runs."""

    name: str
    uuid: str
    inactive: str
    live: str | None
    persistent: bool  # False: undefined while it runs


class Hypervisor:
    """One connection to libvirt, safe to use from several threads."""

    def __init__(self, uri: str, *, read_only: bool = False) -> None:
        libvirt.registerErrorHandler(lambda _context, _error: None, None)  # we print them
        opener = libvirt.openReadOnly if read_only else libvirt.open
        try:
            self._connection: Any = opener(uri)
        except libvirt.libvirtError as error:
            raise HypervisorError(
                f"libvirt does not answer at {uri}: {_reason(error)}",
                "start it with `systemctl start libvirtd`, and run this as root",
            ) from error

    def close(self) -> None:
        with contextlib.suppress(libvirt.libvirtError):
            self._connection.close()

    @property
    def version(self) -> int:
        """The library's version as libvirt counts it: 9.0.0 is 9_000_000."""
        return int(self._connection.getLibVersion())

    # -- domains ----------------------------------------------------------------------------

    def domains(self) -> tuple[DomainXml, ...]:
        """Return all domains, by name; one that vanishes while we look is left out."""
        found = []
        with explained("list the domains"):
            domains = self._connection.listAllDomains()
        for domain in domains:
            try:
                found.append(_domain_xml(domain))
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                    raise HypervisorError(
                        f"libvirt could not describe a domain: {_reason(error)}"
                    ) from error
        return tuple(sorted(found, key=lambda domain: domain.name))

    def domain(self, name: str) -> DomainXml:
        """Return one domain; raises HypervisorError when there is no such domain."""
        with explained(f"find {name}"):
            return _domain_xml(self._connection.lookupByName(name))

    def define(self, name: str, xml: str) -> None:
        """Define or redefine, always validated: libvirt drops misspelt elements silently."""
        with explained(f"define {name}"):
            self._connection.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)

    def update_live(self, facts: DomainFacts, metadata: tuple[str, str, str]) -> None:
        """Move a running domain's threads to the pins of `facts` and refresh its metadata.

        `metadata` is (element as XML, prefix, namespace).
        """
        with explained(f"change {facts.name} while it runs"):
            domain = self._connection.lookupByUUIDString(facts.uuid)
            for vcpu, cpus in enumerate(facts.vcpu_pins):
                domain.pinVcpu(vcpu, _cpu_map(cpus))
            if facts.emulator_pin.cpus:
                helpers = _cpu_map(facts.emulator_pin)
                domain.pinEmulator(helpers, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            domain.setMetadata(
                libvirt.VIR_DOMAIN_METADATA_ELEMENT, *metadata, libvirt.VIR_DOMAIN_AFFECT_LIVE
            )

    def start(self, name: str, uuid: str) -> None:
        with explained(f"start {name}"):
            self._connection.lookupByUUIDString(uuid).create()

    def shut_down(self, name: str, uuid: str, timeout: float, *, force: bool) -> None:
        """Ask the guest to shut down and wait; with `force`, then pull the plug.

        Asked more than once: one that is still booting hears nothing yet. One that has powered
        off is waited for: QEMU gives back its devices and memory, and libvirt refuses to ask it.
        Raises HypervisorError when the domain still runs after `timeout` seconds, and at once
        when it is paused: such a guest hears nothing.
        """
        with explained(f"shut down {name}"):
            domain = self._connection.lookupByUUIDString(uuid)
            asked, end, is_paused = 0.0, time.monotonic() + timeout, False
            while _runs(domain) and (now := time.monotonic()) < end:
                is_paused = (state := _state(domain)) not in _HEARS_OR_ENDS
                if is_paused and not asked:
                    break
                due = now - asked >= _ASK_AGAIN_SECONDS or not asked
                if due and state == libvirt.VIR_DOMAIN_RUNNING:
                    asked = now
                    with _unless_off(domain):
                        domain.shutdown()
                time.sleep(_POLL_SECONDS)
            if _runs(domain) and force:
                with _unless_off(domain):
                    domain.destroy()
            if not _runs(domain):
                return
        if is_paused:
            raise HypervisorError(
                f"{name} is paused, so its guest cannot shut down",
                f"see why (its disk may have no room), then `virsh resume {name}`; or pull its"
                f" plug: dgx-kvm stop {name} --force",
            )
        raise HypervisorError(
            f"{name} did not shut down within {timeout:g} s",
            f"look at `dgx-kvm console {name}`, or pull its plug: dgx-kvm stop {name} --force",
        )

    def undefine(self, name: str, uuid: str) -> None:
        with explained(f"undefine {name}"), _ignored(libvirt.VIR_ERR_NO_DOMAIN):
            domain = self._connection.lookupByUUIDString(uuid)
            if self._connection.getType() == "TEST":
                domain.undefine()  # the test driver knows no flags
            else:
                domain.undefineFlags(
                    libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
                    | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                )

    # -- volumes ----------------------------------------------------------------------------

    def volumes(self, *, fresh: bool = False) -> tuple[Volume, ...]:
        """Return the volumes of our pool, by name; none where there is no such pool.

        With `fresh` libvirt looks at the folder first: it does not see what others put there.
        Raises HypervisorError when the pool is off: what it holds is unknown then, not nothing.
        """
        pool = self._pool()
        if pool is None:
            return ()
        if not pool.isActive():
            raise HypervisorError(
                f"the storage pool {POOL} is not active, so which disks there are is not known",
                f"virsh pool-start {POOL}",
            )
        found = []
        with explained(f"list the volumes of the pool {POOL}"):
            if fresh:
                _refresh(pool)
            for volume in pool.listAllVolumes():
                # libvirt lists one whose file it is still making, or that somebody has removed.
                with _ignored(libvirt.VIR_ERR_NO_STORAGE_VOL):
                    if not volume.name().endswith(copies.UNFINISHED):
                        found.append(_volume(volume))
        return tuple(sorted(found, key=lambda volume: volume.name))

    def ensure_pool(self, path: str) -> None:
        """Define and start our storage pool where it is missing or stopped."""
        pool = self._pool()
        with explained(f"make the storage pool {POOL} at {path}"):
            if pool is None:
                target = f"<target><path>{escape(path)}</path></target>"
                pool = self._connection.storagePoolDefineXML(
                    f"<pool type='dir'><name>{POOL}</name>{target}</pool>"
                )
                pool.setAutostart(True)
            if not pool.isActive():
                pool.build()
                pool.create()

    def remove_empty_pool(self) -> None:
        """Take our storage pool out of libvirt once nothing is in its folder, which stays."""
        pool = self._pool()
        if pool is not None and pool.isActive():
            with explained(f"remove the storage pool {POOL}"):
                _refresh(pool)
                if not pool.listVolumes():
                    pool.destroy()
                    pool.undefine()

    def create_volume(self, volume: Volume, progress: Progress = unwatched) -> None:
        if volume.group:
            lvm.create(volume, progress)
        elif volume.source:
            copies.make(volume, progress)
            with explained(f"find the disk {volume.name}"):
                _refresh(self._connection.storagePoolLookupByName(POOL))
        else:
            self._create_file(volume)

    def _reserved_mib(self, volume: Volume) -> int:
        return volume.capacity_mib if volume.format == "raw" else 0

    def _create_file(self, volume: Volume) -> None:
        backing = ""
        if volume.backing:
            backing = (
                f"<backingStore><path>{escape(volume.backing)}</path>"
                f"<format type='{volume.backing_format}'/></backingStore>"
            )
        with explained(f"create the disk {volume.name}"):
            pool = self._connection.storagePoolLookupByName(POOL)
            xml = (
                f"<volume><name>{escape(volume.name)}</name>"
                f"<capacity unit='MiB'>{volume.capacity_mib}</capacity>"
                f"<allocation unit='MiB'>{self._reserved_mib(volume)}</allocation>"
                f"<target><format type='{volume.format}'/></target>{backing}</volume>"
            )
            with _ignored(libvirt.VIR_ERR_STORAGE_VOL_EXIST):
                pool.createXML(xml)
                return
            # An apply that was killed had it made just now, or its file is gone and libvirt
            # does not know yet.
            _refresh(pool)
            if volume.name not in pool.listVolumes():
                pool.createXML(xml)

    def grow_volume(self, volume: Volume) -> None:
        """Make a disk larger that no running domain has; a raw one takes the space at once."""
        flags = libvirt.VIR_STORAGE_VOL_RESIZE_ALLOCATE if volume.format == "raw" else 0
        with explained(f"grow the disk {volume.name}"):
            held = self._connection.storageVolLookupByPath(volume.path)
            held.resize(volume.capacity_mib << 20, flags)

    def delete_volume(self, path: str) -> None:
        if path.startswith("/dev/"):
            lvm.remove(path)
            return
        with explained(f"delete the disk {path}"):
            self._connection.storageVolLookupByPath(path).delete()

    def logical_volumes(self) -> tuple[tuple[VolumeGroup, ...], tuple[Volume, ...]]:
        """Return LVM's volume groups, and our disks in them."""
        return lvm.read()

    def copy_mib(self, volume: Volume) -> int:
        """How much of the pool the copy of an image will take at first."""
        return copies.needed_mib(volume)

    def space(self, folder: str) -> Space:
        """The file system that a folder is on, or will be."""
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        found = os.statvfs(folder)
        block = found.f_frsize
        return Space(found.f_blocks * block >> 20, found.f_bavail * block >> 20)

    # -- networks ---------------------------------------------------------------------------

    def networks(self) -> tuple[HostNetwork, ...]:
        """Return all virtual networks, by name; none where libvirt is built without."""
        found = []
        with explained("list the networks"), _ignored(libvirt.VIR_ERR_NO_SUPPORT):
            for network in self._connection.listAllNetworks():
                with _ignored(libvirt.VIR_ERR_NO_NETWORK):
                    active = bool(network.isActive())
                    found.append(networkxml.parse(network.XMLDesc(), active=active))
        return tuple(sorted(found, key=lambda network: network.name))

    def ensure_network(self, network: HostNetwork) -> None:
        """Define and start a network of ours where it is missing or stopped."""
        with explained(f"make the network {network.name}"):
            there = {each.name(): each for each in self._connection.listAllNetworks()}
            held = there.get(network.name)
            if held is None:
                held = self._connection.networkDefineXML(networkxml.render(network))
            _check_ours(held)
            held.setAutostart(True)
            if not held.isActive():
                held.create()

    def remove_network(self, name: str) -> None:
        """Remove a network of ours, unless a domain has come to use it."""
        with explained(f"remove the network {name}"), _ignored(libvirt.VIR_ERR_NO_NETWORK):
            held = self._connection.networkLookupByName(name)
            _check_ours(held)
            for domain in self.domains():
                for xml in filter(None, (domain.inactive, domain.live)):
                    if name in domainxml.parse(xml).networks:
                        raise HypervisorError(
                            f"{domain.name} is on the network {name}", "run `dgx-kvm plan` again"
                        )
            if held.isActive():
                held.destroy()
            held.undefine()

    def _pool(self) -> Any:
        try:
            return self._connection.storagePoolLookupByName(POOL)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_STORAGE_POOL:
                return None
            raise HypervisorError(
                f"libvirt could not find its storage pools: {_reason(error)}"
            ) from error


def _domain_xml(domain: Any) -> DomainXml:
    inactive = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    live = domain.XMLDesc() if domain.isActive() else None
    persistent = bool(domain.isPersistent())
    return DomainXml(domain.name(), domain.UUIDString(), inactive, live, persistent)


def _runs(domain: Any) -> bool:
    """Whether a domain runs; one that was undefined while it ran is gone when it ends."""
    with _ignored(libvirt.VIR_ERR_NO_DOMAIN):
        return bool(domain.isActive())
    return False


def _state(domain: Any) -> int:
    """Return one of libvirt's VIR_DOMAIN_*."""
    with _ignored(libvirt.VIR_ERR_NO_DOMAIN):
        return int(domain.state()[0])
    return int(libvirt.VIR_DOMAIN_SHUTOFF)


@contextlib.contextmanager
def _unless_off(domain: Any) -> Iterator[None]:
    """Pass over the refusal to turn off a domain that has gone off by itself just now."""
    try:
        yield
    except libvirt.libvirtError:
        if _runs(domain):
            raise


def _volume(volume: Any) -> Volume:
    tree = ElementTree.fromstring(volume.XMLDesc())
    target_format = tree.find("target/format")
    backing_format = tree.find("backingStore/format")
    return Volume(
        name=volume.name(),
        path=volume.path(),
        capacity_mib=int(tree.findtext("capacity") or 0) >> 20,
        format=target_format.get("type", "raw") if target_format is not None else "raw",
        backing=(tree.findtext("backingStore/path") or "").strip(),
        backing_format=backing_format.get("type", "") if backing_format is not None else "",
    )


def _check_ours(network: Any) -> None:
    if not networkxml.parse(network.XMLDesc(), active=True).ours:
        raise HypervisorError(
            f"dgx-kvm did not make the network {network.name()}", "rename or undefine it"
        )


def _refresh(pool: Any) -> None:
    """Let libvirt look at the pool's folder; it refuses while it makes a volume there."""
    for _ in range(_REFRESH_TRIES):
        with _ignored(libvirt.VIR_ERR_INTERNAL_ERROR):
            pool.refresh()
            return
        time.sleep(_POLL_SECONDS)
    pool.refresh()


def _cpu_map(cpus: CpuSet) -> tuple[bool, ...]:
    return tuple(cpu in cpus.cpus for cpu in range(max(cpus, default=0) + 1))


def _reason(error: libvirt.libvirtError) -> str:
    """libvirt's own words, on one line, without the driver's name before them."""
    return " ".join((error.get_error_message() or str(error)).split())


@contextlib.contextmanager
def _ignored(code: int) -> Iterator[None]:
    try:
        yield
    except libvirt.libvirtError as error:
        if error.get_error_code() != code:
            raise


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    try:
        yield
    except libvirt.libvirtError as error:
        raise HypervisorError(f"libvirt could not {doing}: {_reason(error)}") from error
