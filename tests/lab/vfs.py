"""A NIC that stays with the host and lends VMs its virtual functions, one by one.

It is QEMU's igb, with the driver that any such card has; on a host that has just been installed it
goes to VMs as a whole, like every NIC that nobody uses.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from lab import build
from lab.cache import ROOT, say
from lab.hostfacts import functions
from lab.machine import Machine, overlay
from lab.qemu import Hardware
from lab.shape import named
from lab.story import GUESTS, INSTALL, Story, Tour, expect, told
from lab.tools import tools

SHAPE = "dgx2-small"
NIC, NAME = "0000:86:00.0", "enp134s0"
VF_ID, COUNT, VLAN = "8086:10ca", 2, 100
LINK = f"""\
[Match]
Path=pci-{NIC}
[Link]
NamePolicy=keep kernel database onboard slot path
AlternativeNamesPolicy=database onboard slot path
MACAddressPolicy=persistent
SR-IOVVirtualFunctions={COUNT}
"""
UP = f"""\
[Match]
Name={NAME}
[Link]
RequiredForOnline=no-carrier
[Network]
LinkLocalAddressing=no
"""
FOLDER = "/etc/systemd/network"
VMS = """\
version: 1
host: {{cpu_pool: {{cpus: 0, memory: 0%}}}}
defaults: {{image: lab-guest, firmware: bios, vcpus: 2, memory: 512MiB}}
vms:
{lines}
"""
LAB = f"{{name: lab, gpus: 1, networks: [{{bridge: br0}}, {{vf: auto, vlan: {VLAN}}}]}}"
GREEDY = "{name: greedy, gpus: 1, networks: [{vf: auto}, {vf: auto}]}"
BRIDGE, BRIDGE_VLAN = "br1", 200
TAGGED = f"{{name: tagged, gpus: 1, networks: [{{bridge: {BRIDGE}, vlan: {BRIDGE_VLAN}}}]}}"
TAGGING_LIBVIRT = 11  # the first that puts tags on ports of bridges


def virtual_functions(package: Path, release: str) -> None:
    """Begin on a host in KVM mode that has given the NIC away."""
    kit = tools()
    base = build.installed_disk(release, package)
    disk = overlay(kit, base, ROOT / "disks" / f"vfs-{release}.qcow2")
    with Machine(kit, Hardware(named(SHAPE), disk), f"vfs-{release}") as host:
        story = Story(host, named(SHAPE), (), tour=Tour("# A NIC that lends virtual functions\n"))
        with told("a host in KVM mode: the NIC goes to VMs, so it has no virtual functions"):
            host.boot()
            expect(_driver(host, NIC) == "vfio-pci", f"{NIC} is at {_driver(host, NIC)}")
            _declare(host, LAB)
            said = story.typed("dgx-kvm plan", code=2)
            expect("no NIC of the host has virtual functions" in said, said)
        with told("systemd is to make it some: from the next boot on it stays with the host"):
            _keep(story)
        with told("that boot made them, then the VM with vf: auto; an apply has nothing to do"):
            _check_host(story)
            story.typed("dgx-kvm status")
            story.typed("dgx-kvm explain lab")
            said = story.typed("dgx-kvm apply", GUESTS)
            host.check("dgx-kvm status --check", GUESTS)
            expect("created" not in said and "started" not in said, said)
        with told("the VM reports it; the NIC has its MAC address and VLAN"):
            _check(story)
        with told("a VM that asks for more than there are is refused in a sentence"):
            _declare(host, LAB, GREEDY)
            said = story.typed("dgx-kvm plan", code=2)
            expect(f"NIC {NAME} has {COUNT} VFs and none is free" in said, said)
            _declare(host, LAB)
        with told("a VLAN on a bridge that filters them: tagged by libvirt 11, refused before"):
            _tag_on_bridge(story)
        with told("the VM is off: the host has it back"):
            story.typed("dgx-kvm stop lab", GUESTS)
            _check_given_back(host)
            host.check("dgx-kvm start lab", GUESTS)
            story.report("lab", boots=2)
        say(f"what was typed and answered: {story.tour.save(host.real / 'tour.md')}")


def _keep(story: Story) -> None:
    host = story.host
    for name, text in ((f"10-{NAME}.link", LINK), (f"40-{NAME}.network", UP)):
        host.check(f"cat >{FOLDER}/{name} <<'END'\n{text}END")
    story.typed(f"cat {FOLDER}/10-{NAME}.link")
    story.typed("dgx-kvm mode kvm", INSTALL)
    listed = host.check("cat /var/lib/dgx-kvm/devices")
    expect(NIC not in listed, f"it is still to go to VMs:\n{listed}")
    host.reboot(GUESTS + 600)


def _check_host(story: Story) -> None:
    host = story.host
    state = host.settled(GUESTS + 600)
    journal = host.run("journalctl -b --no-pager -u dgx-kvm.service").output
    expect(state == "running", f"the host is {state}:\n{journal}")
    expect(_driver(host, NIC) == "igb", f"{NIC} is at {_driver(host, NIC)}")
    made = [one.address for one in functions(host) if _is_vf(one.vendor, one.device)]
    expect(len(made) == COUNT, f"virtual functions: {made}")
    groups = {
        host.check(f"ls /sys/bus/pci/devices/{address}/iommu_group/devices").strip()
        for address in made
    }
    expect(groups == set(made), f"they share IOMMU groups: {groups}")
    said = story.typed("dgx-kvm mode", only=NIC)
    expect(f"it has {COUNT} virtual functions" in said, said)
    story.typed("dgx-kvm topology", only=NAME)


def _check(story: Story) -> None:
    host = story.host
    seen = story.report("lab")
    story.tour.typed("dgx-kvm console lab", seen.strip())
    found = re.findall(rf"pci \S+ {VF_ID} class 0200", seen)
    expect(len(found) == 1, f"lab sees {len(found)} virtual functions:\n{seen}")
    xml = host.check("virsh dumpxml lab")
    macs = re.findall(r"<interface type='hostdev'.*?<mac address='(\S+)'", xml, re.DOTALL)
    expect(len(macs) == 1, xml)
    said = story.typed(f"ip link show {NAME}")
    lines = [line for line in said.splitlines() if macs[0] in line and f"vlan {VLAN}" in line]
    expect(len(lines) == 1, f"no VF of {NAME} has {macs[0]} and VLAN {VLAN}:\n{said}")


def _tag_on_bridge(story: Story) -> None:
    host = story.host
    host.check(f"ip link add {BRIDGE} type bridge vlan_filtering 1 && ip link set {BRIDGE} up")
    _declare(host, LAB, TAGGED)
    version = re.search(r"library: libvirt (\d+)", host.check("virsh version"))
    assert version
    if int(version[1]) < TAGGING_LIBVIRT:
        said = story.typed("dgx-kvm plan", code=2)
        expect(f"cannot put VLAN {BRIDGE_VLAN} on bridge {BRIDGE}" in said, said)
    else:
        story.typed("dgx-kvm apply", GUESTS)
        port = host.check("virsh domiflist tagged | awk '$2 == \"bridge\" {print $1}'").strip()
        said = story.typed(f"bridge vlan show dev {port}")
        expect(re.search(rf"\b{BRIDGE_VLAN} PVID Egress Untagged", said), said)
    _declare(host, LAB)
    host.check("dgx-kvm apply --prune --restart", GUESTS)


def _check_given_back(host: Machine) -> None:
    """libvirt may still be at it when the domain is off."""
    deadline, drivers = time.monotonic() + 120, {""}
    while drivers != {"igbvf"}:
        expect(time.monotonic() < deadline, f"virtual functions are at {drivers}")
        drivers = {one.driver for one in functions(host) if _is_vf(one.vendor, one.device)}


def _declare(host: Machine, *vms: str) -> None:
    text = VMS.format(lines="\n".join(f"  - {vm}" for vm in vms))
    host.check(f"cat >/etc/dgx-kvm/vms.yaml <<'END'\n{text}END")


def _driver(host: Machine, address: str) -> str:
    return next((one.driver for one in functions(host) if one.address == address), "not there")


def _is_vf(vendor: str, device: str) -> bool:
    return f"{vendor[2:]}:{device[2:]}" == VF_ID
