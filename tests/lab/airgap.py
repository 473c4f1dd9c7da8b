"""The story of a site without a network: all from one folder, three guest systems, a GPU each.

The host has nothing of what the package depends on. The bundle is made from the packages that
`make deb` and `make images` left.
"""

from __future__ import annotations

import base64
import json
import time

from lab import build
from lab.cache import ROOT, say
from lab.machine import Machine, overlay
from lab.packages import LabError
from lab.qemu import Hardware
from lab.shape import named
from lab.story import GUESTS, INSTALL, Story, Tour, expect, told
from lab.tools import tools
from tools import bundle
from tools.repository import built

SHAPE = "dgx2-small"
IMAGES = {"eleven": "debian-11", "twelve": "debian-12", "thirteen": "debian-13"}  # by VM
FIRST_BOOT = 3600.0  # seconds; a whole system in a VM in an emulated machine
PLACE = "/srv/dgx-kvm"
TOUR = """\
# A site without a network

What an operator types, and what is answered, where all comes from one folder.
"""
USER = "lab"
DATA, GROUP = "thirteen", "data"  # the VM with a data disk, and the volume group that is in
VMS = f"""\
version: 1
host: {{cpu_pool: {{cpus: 0, memory: 0%}}}}
defaults:
  user: {USER}
  ssh_keys: [/root/.ssh/id_ed25519.pub]
  networks: [{{nat: true}}]
  firmware: bios
  vcpus: 2
  memory: 1GiB
  os_disk: 8GiB
vms:
"""
SSH = "ssh -o BatchMode=yes -o StrictHostKeyChecking=accept-new -o ConnectTimeout=60"


def airgap(release: str) -> None:
    """Install with no network, and have each image boot and report."""
    kit = tools()
    packages = ["dgx-kvm-sw", *(f"dgx-kvm-image-{image}" for image in IMAGES.values())]
    wanted = " ".join([*packages, "lvm2"])
    _expect_built(packages)
    folder = bundle.make(release, packages, ROOT / "bundles")
    base = build.disk(release, dependencies=False)
    disk = overlay(kit, base, ROOT / "disks" / f"airgap-{release}.qcow2")
    with Machine(kit, Hardware(named(SHAPE), disk), f"airgap-{release}") as host:
        story = Story(host, named(SHAPE), (), tour=Tour(TOUR))
        with told("a host without a network, and a folder"):
            host.boot()
            host.unpack(folder.with_name(f"{folder.name}.tar"), PLACE)
        story.tour.heading("install from the folder")
        with told(f"install.sh {wanted}"):
            story.typed(f"{PLACE}/install.sh {wanted}", INSTALL, only="^dgx-kvm")
            host.reboot()
            expect(host.settled() == "running", "the host is not well in KVM mode")
        story.tour.heading("three guest systems, a GPU each")
        with told("dgx-kvm image list, verify"):
            story.typed("dgx-kvm image list")
            story.typed("dgx-kvm image verify", INSTALL)
        with told("vms.yaml and dgx-kvm apply"):
            _declare(host)
            story.typed("cat /etc/dgx-kvm/vms.yaml")
            story.typed("dgx-kvm apply", INSTALL)
        for name in IMAGES:
            with told(f"{name}: first boot, guest agent, GPU"):
                _check_agent(host, name)
            with told(f"{name}: ssh from the host, cloud-init done"):
                _check_ssh(story, name)
            with told(f"{name}: dgx-kvm console shows its login"):
                _check_console(host, name)
        with told(f"{DATA}: a logical volume of the host, with a file system, at its place"):
            said = _run_in_guest(host, DATA, "/usr/bin/findmnt", "-no", "FSTYPE,SIZE", "/data")
            expect(said.startswith("ext4"), f"/data of {DATA} is {said}")
            expect("dgx-kvm" in host.check(f"lvs -o lv_tags {GROUP}"), "the volume has no tag")
        with told("dgx-kvm status; a second apply does nothing"):
            story.typed("dgx-kvm status")
            host.check("dgx-kvm status --check")
        with told("an image package whose VM is there is not removed"):
            result = host.run("apt-get -y remove dgx-kvm-image-debian-12", INSTALL)
            expect(result.code and "twelve" in result.output, result.output)
        say(f"what was typed and answered: {story.tour.save(host.real / 'tour.md')}")


def _expect_built(packages: list[str]) -> None:
    known = {file.name.split("_")[0] for file in built()}
    if missing := sorted(set(packages) - known):
        raise LabError(f"not built: {', '.join(missing)}; make deb, make images")


def _declare(host: Machine) -> None:
    disks = {DATA: f", disks: [{{name: data, size: 256MiB, lvm: {GROUP}, mount: /data}}]"}
    lines = [
        f"  - {{name: {name}, gpus: 1, image: {image}{disks.get(name, '')}}}"
        for name, image in IMAGES.items()
    ]
    text = VMS + "\n".join(lines)
    host.check(
        f"truncate -s 1G /srv/drive && losetup /dev/loop0 /srv/drive && vgcreate {GROUP} /dev/loop0"
    )
    host.check(
        "mkdir -p -m 700 /root/.ssh && ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519 &&"
        f" cat >/etc/dgx-kvm/vms.yaml <<'END'\n{text}\nEND"
    )


def _agent(host: Machine, name: str, command: str, **arguments: object) -> object:
    """Ask the guest agent; None while it does not answer."""
    question = json.dumps({"execute": command, "arguments": arguments})
    result = host.run(f"virsh qemu-agent-command --timeout 60 {name} '{question}'")
    return json.loads(result.output)["return"] if result.code == 0 else None


def _run_in_guest(host: Machine, name: str, *words: str) -> str:
    """The output of a command that the guest agent runs."""
    started = _agent(
        host, name, "guest-exec", path=words[0], arg=words[1:], **{"capture-output": True}
    )
    expect(isinstance(started, dict), f"{name} runs no {words[0]}: {started}")
    assert isinstance(started, dict)
    deadline = time.monotonic() + FIRST_BOOT
    while time.monotonic() < deadline:
        state = _agent(host, name, "guest-exec-status", pid=started["pid"])
        if isinstance(state, dict) and state["exited"]:
            expect(state["exitcode"] == 0, f"{name}: {words} ended with {state}")
            return base64.b64decode(state.get("out-data", "")).decode(errors="replace")
        time.sleep(3)
    raise LabError(f"{name}: {words} did not end")


def _check_agent(host: Machine, name: str) -> None:
    deadline = time.monotonic() + FIRST_BOOT
    while _agent(host, name, "guest-ping") is None:
        expect(time.monotonic() < deadline, f"the guest agent of {name} does not answer")
        time.sleep(20)
    system = _agent(host, name, "guest-get-osinfo")
    version = IMAGES[name].removeprefix("debian-")
    expect(isinstance(system, dict) and system["version-id"] == version, f"{name} runs {system}")
    script = "for d in /sys/bus/pci/devices/*; do echo $(cat $d/vendor $d/class); done"
    seen = _run_in_guest(host, name, "/bin/sh", "-c", script)
    gpus = [line for line in seen.splitlines() if line.startswith("0x10de 0x0302")]
    expect(len(gpus) == 1, f"{name} sees {len(gpus)} GPUs")


def _check_ssh(story: Story, name: str) -> None:
    host = story.host
    addresses = host.check(f"virsh domifaddr {name} --source lease").split()
    address = next((word.split("/")[0] for word in addresses if "/" in word), "")
    expect(address, f"{name} has no address: {addresses}")
    # Before ssh: it ends when the first boot has done all it was told.
    _run_in_guest(host, name, "/usr/bin/cloud-init", "status", "--wait")
    said = story.typed(
        f"{SSH} {USER}@{address} 'hostname; cloud-init status; lspci -n -d 10de:'", 300
    )
    for words in (name, "status: done", "10de:1db8"):
        expect(words in said, f"{name} said: {said}")


def _check_console(host: Machine, name: str) -> None:
    """Its getty is started last of all."""
    deadline, shown = time.monotonic() + GUESTS, ""
    while f"{name} login:" not in shown:
        expect(time.monotonic() < deadline, f"the console of {name} shows: {shown[-500:]}")
        shown = host.check(
            f"timeout 60 script -qec 'dgx-kvm console {name}' /dev/null"
            " < <(sleep 10; echo; sleep 30; printf '\\035') || true"
        )
