"""A virtual function as a network, as a real libvirt takes it and gives it back.

The VM is only defined: the NIC is in the files that the tool is shown, and not on this machine.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from machines import SAMPLE_VF, device_path, own

from integration.claimed_host import ClaimedHost

pytestmark = pytest.mark.integration

VM = "name: vf, firmware: %s, state: stopped, networks: [{vf: auto, vlan: 100}, {bridge: br-test}]"


@pytest.fixture(autouse=True)
def _nic(claimed: ClaimedHost, tmp_path: Path) -> None:
    """Show the tool the DGX-2's NIC with its virtual functions, on the only NUMA node."""
    root = claimed.site.root
    if root.exists("/sys/bus/pci"):
        return
    sample = own("dgx2", tmp_path)
    port = device_path(sample, SAMPLE_VF).parent
    target = root.path(f"/{port.relative_to(sample.path('/'))}")
    shutil.copytree(port, target, symlinks=True)
    for folder in [target, *target.glob("0000:86:*")]:
        (folder / "numa_node").write_text("0\n")
        link = root.path(f"/sys/bus/pci/devices/{folder.name}")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("../../..", folder.relative_to(root.path("/sys"))))


def defined(claimed: ClaimedHost) -> ElementTree.Element:
    xml = claimed.libvirtd.virsh("dumpxml", "vf")
    found = ElementTree.fromstring(xml).find("devices/interface[@type='hostdev']")
    assert found is not None, xml
    return found


@pytest.mark.parametrize("firmware", ["bios", "uefi"])
def test_libvirt_keeps_all_that_is_said_of_it(claimed: ClaimedHost, firmware: str) -> None:
    claimed.reach()
    claimed.reach(VM % firmware)  # a second plan has nothing to do
    interface = defined(claimed)
    assert interface.get("managed") == "yes"
    source, tag = interface.find("source/address"), interface.find("vlan/tag")
    assert source is not None and tag is not None
    assert [source.get(key) for key in ("bus", "slot", "function")] == ["0x86", "0x00", "0x2"]
    assert tag.get("id") == "100"


def test_a_definition_by_somebody_else_holds_it(claimed: ClaimedHost) -> None:
    claimed.reach()
    source = "<source><address type='pci' domain='0' bus='0x86' slot='0' function='2'/></source>"
    xml = (
        "<domain type='qemu'><name>theirs</name><memory>65536</memory>"
        "<os><type machine='q35'>hvm</type></os><devices>"
        f"<interface type='hostdev' managed='yes'>{source}</interface></devices></domain>"
    )
    claimed.site.root.write("/run/dgx-kvm/theirs.xml", xml)
    claimed.libvirtd.virsh("define", str(claimed.site.root.path("/run/dgx-kvm/theirs.xml")))
    claimed.reach(VM % "bios")
    source_of_ours = defined(claimed).find("source/address")
    assert source_of_ours is not None and source_of_ours.get("function") == "0x3"
    claimed.libvirtd.virsh("undefine", "theirs")
