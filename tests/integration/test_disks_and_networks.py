"""Kinds of disks and networks on a real libvirt, with its dnsmasq and packet filter."""

from __future__ import annotations

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from catalogues import describe

from dgx_kvm_sw.decide.plan import Intent
from dgx_kvm_sw.model.actions import CreateVolume
from dgx_kvm_sw.model.errors import HostError
from dgx_kvm_sw.reconcile import POOL_PATH, SPEC_FILE, gather
from integration.claimed_host import ClaimedHost

pytestmark = pytest.mark.integration

IMAGE = "/var/lib/dgx-kvm/base/tiny.qcow2"


@pytest.fixture(autouse=True)
def _image(claimed: ClaimedHost) -> None:
    root = claimed.site.root
    if not root.exists(IMAGE):
        root.path(IMAGE).parent.mkdir(parents=True)
        claimed.libvirtd.inside("qemu-img", "create", "-q", "-f", "qcow2", IMAGE, "64M")
        claimed.libvirtd.inside("qemu-io", "-c", "write -P 7 0 8M", IMAGE)
    describe(root, "tiny", IMAGE, virtual_size_bytes=64 << 20)


def info(claimed: ClaimedHost, name: str) -> dict[str, object]:
    path = f"{POOL_PATH}/{name}"
    said = claimed.libvirtd.inside("qemu-img", "info", "-U", "--output=json", path)
    found: dict[str, object] = json.loads(said)
    return found


def declare_tenants(claimed: ClaimedHost, *vms: str) -> None:
    claimed.declare(vms)
    text = claimed.site.root.read(SPEC_FILE) + "\ntenants: {hr: {}, it: {}}\n"
    claimed.site.root.write(SPEC_FILE, text)


def networks(claimed: ClaimedHost) -> set[str]:
    return set(claimed.libvirtd.virsh("net-list", "--all", "--name").split())


def test_raw_disks_have_their_space_and_grow_while_off(claimed: ClaimedHost) -> None:
    vm = "name: raw, firmware: bios, disks: [{name: data, size: %s, format: raw}]"
    claimed.reach(vm % "16MiB")
    file = claimed.site.root.path(f"{POOL_PATH}/raw.data.raw")
    assert file.stat().st_blocks * 512 >= 16 << 20
    claimed.declare([vm % "32MiB"])
    assert not claimed.plan().actions
    claimed.apply("--restart")
    assert file.stat().st_size == 32 << 20
    assert file.stat().st_blocks * 512 >= 32 << 20
    assert claimed.libvirtd.virsh("domstate", "raw").strip() == "running"


def test_networks_come_and_go_with_their_vms(claimed: ClaimedHost) -> None:
    claimed.reach()
    before = networks(claimed)
    vm = "name: %s, tenant: %s, firmware: bios, networks: [{nat: true}, {isolated: lab}]"
    declare_tenants(claimed, vm % ("one", "hr"), vm % ("two", "it"))
    claimed.apply()
    made = {f"dgx-kvm-{what}" for t in ("hr", "it") for what in (f"nat.{t}", f"isolated.{t}.lab")}
    assert networks(claimed) == before | made
    nat, other = (
        ElementTree.fromstring(claimed.libvirtd.virsh("net-dumpxml", f"dgx-kvm-nat.{tenant}"))
        for tenant in ("hr", "it")
    )
    assert nat.find("ip").attrib != other.find("ip").attrib  # type: ignore[union-attr]
    isolated = claimed.libvirtd.virsh("net-dumpxml", "dgx-kvm-isolated.hr.lab")
    assert "<ip" not in isolated and "<forward" not in isolated
    bridge = ElementTree.fromstring(isolated).find("bridge")
    assert bridge is not None
    address = claimed.libvirtd.inside("ip", "-o", "address", "show", "dev", bridge.get("name", ""))
    assert address == ""  # the host is not on it
    assert not claimed.plan().pending
    claimed.reach()
    assert networks(claimed) == before


def test_a_foreign_network_of_the_name_is_left_alone(claimed: ClaimedHost) -> None:
    claimed.reach()
    xml = "<network><name>dgx-kvm-nat</name><bridge name='foreign0'/></network>"
    claimed.site.root.write("/run/dgx-kvm/net.xml", xml)
    claimed.libvirtd.virsh("net-define", str(claimed.site.root.path("/run/dgx-kvm/net.xml")))
    claimed.declare(["name: n, firmware: bios, networks: [{nat: true}]"])
    (refused,) = claimed.plan().unplaceable
    assert "dgx-kvm did not make" in refused.reasons[0]
    claimed.declare([])
    claimed.apply("--prune")
    assert "dgx-kvm-nat" in networks(claimed)
    claimed.libvirtd.virsh("net-undefine", "dgx-kvm-nat")


def test_a_copy_is_whole_or_not_there(
    claimed: ClaimedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made through qemu-img, where libvirtd's /var is our own."""
    claimed.reach()
    root = claimed.site.root
    pool = root.path(POOL_PATH)
    monkeypatch.setattr("dgx_kvm_sw.reconcile.POOL_PATH", str(pool))
    monkeypatch.setattr("dgx_kvm_sw.execute.POOL_PATH", str(pool))
    claimed.declare(["name: c, state: stopped, image: tiny, os_disk: {size: 128MiB, from: copy}"])
    with claimed.site.hypervisor() as hypervisor:
        plan = gather(claimed.site, hypervisor, Intent()).plan(Intent())
        (make,) = [a for a in plan.actions if isinstance(a, CreateVolume)]
        volume = replace(make.volume, source=str(root.path(IMAGE)))
        monkeypatch.setattr("dgx_kvm_sw.guest.copies._COPY_SECONDS", 0.0)
        hypervisor.ensure_pool(POOL_PATH)
        with pytest.raises(HostError, match="qemu-img was ended"):
            hypervisor.create_volume(volume)
        assert not list(pool.glob("c.*"))
        (pool / "c.os.qcow2.part").write_text("of an apply that was killed")
        monkeypatch.undo()
        hypervisor.create_volume(volume)
    assert [each.name for each in pool.glob("c.*")] == ["c.os.qcow2"]
    found = info(claimed, "c.os.qcow2")
    assert found["virtual-size"] == 128 << 20 and "backing-filename" not in found
    assert (pool / "c.os.qcow2").stat().st_mode & 0o777 == 0o600
    read = ("qemu-io", "-r", "-c", "read -P 7 0 8M", f"{POOL_PATH}/c.os.qcow2")
    assert "Pattern verification failed" not in claimed.libvirtd.inside(*read)
    (pool / "c.os.qcow2").unlink()
