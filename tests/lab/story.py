"""The story of an operator in the emulated DGX: install, VMs of two tenants, remove, as it was.

Each step says what it shows and how long it took; the first that fails ends the story and leaves
the console log and the disk below `.cache/lab` for a look. What the operator typed, and what was
answered, becomes `tour.md` beside the console log; TOUR.md of the project is one of these.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from lab import build, report
from lab.cache import ROOT, hint, say
from lab.hostfacts import Facts, Function, differences, facts, functions, modules
from lab.machine import Machine, overlay
from lab.packages import LabError
from lab.qemu import Hardware
from lab.shape import Shape, named
from lab.tools import tools
from tools.bundle import LASTING

WORD = "dgx_kvm.mode=kvm"
STAND_INS = ("nvidia-persistenced.service", "nvidia-fabricmanager.service")
REPOSITORY = LASTING
SOURCE = "/etc/apt/sources.list.d/dgx-kvm.sources"
APT = f"apt-get -y -o Dir::Etc::sourcelist={SOURCE} -o Dir::Etc::sourceparts=- "
TOUR = """\
# A tour

What an operator types, and what is answered, from a bare host to VMs of two tenants and back. The
host is an emulated machine: a quarter of a DGX-2, with four V100 and two NVSwitches, Debian's own
kernel, GRUB, libvirt and QEMU. `make lab-test PART=story` tells this story on every change, and
wrote this page; its checks are in `tests/lab/story.py`. VMs have 512 MiB and a small system that
says on its console what it sees; its bridges are left out here.
"""
INSTALL, GUESTS = 1800.0, 1200.0  # seconds; several times what TCG needs alone


class StoryError(LabError):
    """The machine is not as the story tells."""


@dataclass(frozen=True)
class Vm:
    """A VM of the story. Its NICs and drives are said, as the shares of so small a machine are
    less than one; so are its CPUs and memory, in `defaults` below.
    """

    name: str
    tenant: str
    gpus: int
    nics: int = 0
    drives: int = 0
    memory: str = ""  # if not that of `defaults`

    @property
    def line(self) -> str:
        memory = f", memory: {self.memory}" if self.memory else ""
        counts = f"gpus: {self.gpus}, nics: {self.nics}, drives: {self.drives}{memory}"
        return f"{{name: {self.name}, tenant: {self.tenant}, {counts}}}"


VMS = {
    "dgx2-small": (
        Vm("hr-one", "hr", 1, nics=1),
        Vm("it-one", "it", 1),
        Vm("it-two", "it", 2, 1, 1),
    ),
    "dgx2": (
        Vm("hr-one", "hr", 1, nics=1),
        Vm("it-two", "it", 2, 1, 1),
        Vm("it-four", "it", 4, 2, 1),
    ),
}
# UEFI takes minutes in a VM inside an emulated machine.
DEFAULTS = "{image: lab-guest, networks: [{bridge: br0}], firmware: bios, vcpus: 2, memory: 512MiB}"


@contextmanager
def told(text: str) -> Iterator[None]:
    """A step of the story: a line when it is done."""
    begin = time.monotonic()
    hint(text)
    try:
        yield
    except BaseException:
        say(f"FAILED: {text}")
        raise
    say(f"{text} ({time.monotonic() - begin:.0f} s)")


def expect(truth: object, otherwise: str) -> None:
    if not truth:
        raise StoryError(otherwise)


def tell(package: Path, release: str, shape: str) -> None:
    """The whole story on a new disk: with `package` as the .deb, on a host that has what it depends
    on already; as the .tar of a bundle, on one that has none of it.
    """
    kit = tools()
    name = f"story-{release}-{shape}{package.suffix.replace('.', '-')}"
    base = build.disk(release, dependencies=package.suffix == ".deb")
    disk = overlay(kit, base, ROOT / "disks" / f"{name}.qcow2")
    guest = build.guest_image(release)
    with Machine(kit, Hardware(named(shape), disk), name) as host:
        story = Story(host, named(shape), VMS[shape])
        try:
            story.bare_metal(package)
            story.install()
            story.kvm_mode()
            story.vms(guest)
            story.guest_reboot()
            story.host_reboot()
            story.change()
            story.remove()
        finally:
            tour = story.tour.save(host.real / "tour.md")
    say(f"the story is told; what was typed and answered: {tour}")


@dataclass
class Tour:
    """What an operator sees of the story, in Markdown."""

    head: str
    parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.parts.append(f"## {text}\n")

    def typed(self, command: str, answer: str) -> None:
        shown = f"# {command}\n{answer}".rstrip()
        self.parts.append(f"```console\n{shown}\n```\n")

    def save(self, file: Path) -> Path:
        file.write_text("\n".join([self.head, *self.parts]))
        return file


@dataclass
class Story:
    host: Machine
    shape: Shape
    vms_wanted: tuple[Vm, ...]
    beginning: Facts | None = None
    bundled: bool = False  # what the package depends on came with it
    tour: Tour = field(default_factory=lambda: Tour(TOUR))

    @contextmanager
    def _step(self, text: str) -> Iterator[None]:
        self.tour.heading(text)
        with told(text):
            yield

    def typed(self, command: str, timeout: float = 300, code: int = 0, only: str = "") -> str:
        """Run what an operator types. Of a long answer the tour shows the lines with `only`."""
        result = self.host.run(command, timeout)
        expect(result.code == code, f"`{command}` ended with {result.code}:\n{result.output}")
        lines = [line for line in result.output.splitlines() if re.search(only, line)]
        self.tour.typed(command, "\n".join(lines))
        return result.output

    # --- bare metal

    def bare_metal(self, package: Path) -> None:
        with self._step("the DGX boots bare metal"):
            self.host.boot()
        with self._step("everything that can be seen of it is recorded"):
            self.make_stand_ins()
            self.make_repository(package)
            self.beginning = facts(self.host)
            gpus = [one for one in self.beginning.functions if one.is_gpu]
            expect(len(gpus) == len(self.shape.gpus), f"{len(gpus)} GPUs are there")
            expect("nouveau" in modules(self.host), "nouveau, to be kept off, does not come")

    def make_stand_ins(self) -> None:
        """Services of the names of some that need the GPUs; there is no NVIDIA driver here."""
        for unit in STAND_INS:
            self.host.check(
                "printf '[Service]\\nExecStart=/bin/sleep infinity\\n[Install]\\n"
                f"WantedBy=multi-user.target\\n' >/etc/systemd/system/{unit}; "
                f"systemctl enable --now {unit}"
            )

    def make_repository(self, package: Path) -> None:
        """A folder that apt takes packages from, since there is no network.

        Of a bundle, which has all that the package depends on, or of the package alone.
        """
        host = self.host
        self.bundled = package.suffix == ".tar"
        if self.bundled:
            host.unpack(package, LASTING)
            host.check(f"cp {LASTING}/dgx-kvm.sources {SOURCE}")
            return
        host.check(f"mkdir -p {REPOSITORY} && chmod 755 /srv {REPOSITORY}")
        host.put(package, f"{REPOSITORY}/{package.name}")
        host.check(
            f"cd {REPOSITORY} && {{ dpkg-deb -f {package.name}; echo Filename: ./{package.name};"
            f" echo Size: $(stat -c %s {package.name});"
            f" echo SHA256: $(sha256sum <{package.name} | cut -d' ' -f1); }} >Packages;"
            "printf 'Types: deb\\nURIs: file:%s\\nSuites: ./\\nTrusted: yes\\n'"
            f" {REPOSITORY} >{SOURCE}"
        )

    def install(self) -> None:
        host = self.host
        with self._step("apt install dgx-kvm-sw, from a folder, without a network"):
            host.check(f"{APT} update", INSTALL)
            said = self.typed("apt-get -y install dgx-kvm-sw", INSTALL, only="^dgx-kvm")
            expect("from its next boot on, this host gives" in said, f"install said:\n{said}")
        with self._step("still bare metal until the reboot"):
            assert self.beginning
            changed = set(functions(host)) ^ set(self.beginning.functions)
            expect(not changed, f"a driver changed at once: {changed}")
            expect(stand_ins(host) == {"active"}, f"of {STAND_INS} one was stopped")
            expect("reboot" in self.typed("dgx-kvm mode"), "dgx-kvm mode asks for no reboot")
            host.check("test -e /run/reboot-required")

    # --- KVM mode

    def kvm_mode(self) -> None:
        host = self.host
        with self._step("reboot"):
            host.reboot()
            state = host.settled()
            failed = host.check("systemctl --failed --no-legend --plain")
            expect(state == "running", f"the host is {state}: {failed}")
            expect(WORD in host.check("cat /proc/cmdline"), "the word is not on the command line")
        with self._step(
            "GPUs, NVSwitches, free NICs and drives are on vfio-pci; the rest untouched"
        ):
            self._check_drivers()
            expect(not modules(host) & {"nouveau", "nvidia"}, "nouveau is loaded")
            expect(stand_ins(host) == {"inactive"}, f"of {STAND_INS} one runs in KVM mode")
            enabled = stand_ins(host, "is-enabled")
            expect(enabled == {"enabled"}, f"of {STAND_INS} one is {enabled}")
            self.typed("dgx-kvm mode")
            self.typed("dgx-kvm mode --check")
            host.check("dgx-kvm mode --verify")

    def _check_drivers(self) -> None:
        assert self.beginning
        listed = set(self.host.check("cut -d' ' -f1 /var/lib/dgx-kvm/devices").split())
        now = {one.address: one for one in functions(self.host)}
        for before in self.beginning.functions:
            given = before.is_gpu or before.is_nvswitch or before.address in listed
            wanted = "vfio-pci" if given else before.driver
            found = now[before.address].driver
            expect(found == wanted, f"{before.address} has the driver {found}, not {wanted}")
        # All that the shape has; the host's own drive and management NIC are not of it.
        free = {one.address for one in self.shape.devices if not one.model}
        expect(listed == free, f"{sorted(listed)} go to VMs, not {sorted(free)}")

    # --- VMs

    def vms(self, guest: Path) -> None:
        host = self.host
        with self._step("an image and vms.yaml: VMs of two tenants"):
            build.add_guest_image(host, guest)
            self._write_vms(self.vms_wanted)
            self.typed("cat /etc/dgx-kvm/vms.yaml")
            self.typed("dgx-kvm plan", code=2)
        with self._step("dgx-kvm apply"):
            self.typed("dgx-kvm apply", GUESTS)
            self.typed("dgx-kvm status")
        for vm in self.vms_wanted:
            with self._step(f"{vm.name} reports its {vm.gpus} GPU(s), CPUs and NUMA layout"):
                self._check_guest(vm)
        with self._step("CPUs are pinned as the definition says"):
            for vm in self.vms_wanted:
                self._check_pins(vm)
        with self._step("a second apply does nothing"):
            said = self.typed("dgx-kvm apply", GUESTS)
            host.check("dgx-kvm status --check", GUESTS)
            expect("created" not in said and "started" not in said, said)

    def _write_vms(self, vms: Iterable[Vm]) -> None:
        lines = "".join(f"\n  - {vm.line}" for vm in vms) or " []"
        text = (
            "version: 1\ntenants: {hr: {}, it: {}}\n"
            "host: {cpu_pool: {cpus: 0, memory: 0%}}\n"
            f"defaults: {DEFAULTS}\n"
            f"vms:{lines}\n"
        )
        self.host.check(f"cat >/etc/dgx-kvm/vms.yaml <<'END'\n{text}END")

    def _check_guest(self, vm: Vm) -> None:
        seen = self.report(vm.name)
        lines = [line.strip() for line in seen.splitlines() if "class 060" not in line]
        self.tour.typed(f"dgx-kvm console {vm.name}", "\n".join(filter(None, lines)))
        xml = self.host.check(f"virsh dumpxml {vm.name}")
        self._check_devices(vm, seen, xml)
        cpus = re.search(r"<vcpu placement='static'>(\d+)", xml)
        expect(cpus and f"cpus {cpus[1]}," in seen, f"{vm.name} sees other CPUs than {cpus}")
        expect("hypervisor KVM" in seen, f"{vm.name} does not run on KVM")
        cells = len(re.findall(r"<cell id=", xml))
        nodes = len(re.findall(r"lab-guest: node ", seen))
        expect(cells == nodes, f"{vm.name} sees {nodes} NUMA nodes, not {cells}")

    def _check_devices(self, vm: Vm, seen: str, xml: str) -> None:
        """What the VM sees of the host's devices is what its domain says and its declaration."""
        given = _given(xml)
        on_host = {one.address: one for one in functions(self.host)}
        wanted = sorted(_id(on_host[address]) for address in given)
        ours = {_id(one) for one in on_host.values() if one.driver == "vfio-pci"}
        devices = [one for one in report.devices(seen) if one.id in ours]
        found = sorted(one.id for one in devices)
        expect(found == wanted, f"{vm.name} sees {found}, not {wanted}")
        kinds = [one.kind for one in devices]
        counts = [kinds.count(kind) for kind in (report.GPU, report.NIC, report.DRIVE)]
        expect(counts == [vm.gpus, vm.nics, vm.drives], f"{vm.name}: GPUs, NICs, drives {counts}")
        switches = kinds.count(report.NVSWITCH)
        expect(bool(switches) == (vm.gpus > 1), f"{vm.name} sees {switches} NVSwitches")
        far = report.far_nics(devices)
        expect(not far, f"{vm.name} sees no GPU on the PCIe switch of NIC {far}")
        nodes = {
            self.host.check(f"cat /sys/bus/pci/devices/{address}/numa_node").strip()
            for address in given
        }
        expect(len(nodes) == 1, f"{vm.name} has devices of NUMA nodes {nodes}")

    def report(self, name: str, boots: int = 1) -> str:
        """What the VM said at its latest boot, on its console."""
        deadline = time.monotonic() + GUESTS
        while time.monotonic() < deadline:
            reports = self.host.run(f"cat {_console(name)}").output.split("lab-guest: ready")
            if len(reports) > boots:
                return reports[-2]
            time.sleep(5)
        raise StoryError(f"{name} did not report its boot {boots}")

    def _check_pins(self, vm: Vm) -> None:
        xml = self.host.check(f"virsh dumpxml {vm.name}")
        pins = {int(cpu): mask for cpu, mask in re.findall(r"vcpu='(\d+)' cpuset='(\S+)'", xml)}
        seen = self.host.check(
            f"for t in /proc/$(cat /run/libvirt/qemu/{vm.name}.pid)/task/*; do"
            ' echo "$(cat $t/comm) $(sed -n "s/^Cpus_allowed_list:\\s*//p" $t/status)"; done'
        )
        threads = dict(re.findall(r"CPU (\d+)/KVM (\S+)", seen))
        found = {int(cpu): mask for cpu, mask in threads.items()}
        expect(pins and found == pins, f"{vm.name} runs on {found}, not {pins}")
        given = _given(xml)
        (node,) = {device.node for device in self.shape.gpus if device.address in given}
        near = set(map(str, self.shape.node_cpus(node)))
        expect(set(pins.values()) <= near, f"{vm.name} runs on {pins}, its GPUs are on {node}")

    def guest_reboot(self) -> None:
        vm = self.vms_wanted[0]
        with self._step(f"{vm.name} reboots itself and is back"):
            boots = self._boots(vm)
            # QEMU looks once a second whether somebody has opened the console.
            self.host.check(f"(sleep 2; echo reboot; sleep 3) >$(virsh ttyconsole {vm.name})")
            self.report(vm.name, boots + 1)
            expect(self._running() == self._names(), "not all VMs run after a guest's reboot")

    def host_reboot(self) -> None:
        with self._step("the host reboots: its VMs shut down in order and come back"):
            boots = {vm.name: self._boots(vm) for vm in self.vms_wanted}
            had = {vm.name: report.hardware(self.report(vm.name)) for vm in self.vms_wanted}
            self.host.reboot()
            state = self.host.settled(GUESTS + 600)
            expect(state == "running", f"the host is {state}")
            expect(self._running() == self._names(), f"{self._running()} run after the reboot")
            for vm in self.vms_wanted:
                now = report.hardware(self.report(vm.name, boots[vm.name] + 1))
                expect(now == had[vm.name], f"{vm.name} had {had[vm.name]}\nand has {now}")
                log = self.host.check(f"cat {_console(vm.name)}")
                expect("lab-guest: power button" in log, f"{vm.name} was not shut down in order")

    def _boots(self, vm: Vm) -> int:
        """How often the VM has come up."""
        return self.host.check(f"cat {_console(vm.name)}").count("lab-guest: ready")

    def change(self) -> None:
        gone, small, *others = self.vms_wanted
        large = replace(small, memory="768MiB")
        boots, before = self._boots(small), report.memory_kib(self.report(small.name))
        with self._step(f"{gone.name} leaves vms.yaml, {small.name} gets memory: both run on"):
            self._write_vms((large, *others))
            self.typed("dgx-kvm apply", GUESTS)
            expect(self._running() == self._names(), "a VM was stopped unasked")
            expect(self._boots(small) == boots, f"{small.name} was started again unasked")
        with self._step("until apply --prune --restart"):
            self.typed("dgx-kvm apply --prune --restart --delete-disks", GUESTS)
            self.vms_wanted = (large, *others)
            expect(self._running() == self._names(), f"{self._running()} run")
            now = report.memory_kib(self.report(small.name, boots + 1))
            more = (now - before) // 1024
            expect(192 < more <= 256, f"{small.name} has {more} MiB more")

    # --- the way back

    def remove(self) -> None:
        host = self.host
        with self._step("apt remove is refused while VMs run"):
            said = self.typed("apt-get -y remove dgx-kvm-sw", INSTALL, code=100, only="^dgx-kvm")
            names = all(vm.name in said for vm in self.vms_wanted)
            expect(names and "dgx-kvm stop --all" in said, said)
            expect(self._running() == self._names(), "refusing the removal stopped a VM")
        with self._step("dgx-kvm stop --all, as it was told"):
            self.typed("dgx-kvm stop --all", GUESTS)
            expect(not self._running(), f"{self._running()} still run")
        with self._step("no VM is declared: prune them all, with their disks"):
            self._write_vms(())
            host.check("dgx-kvm apply --prune --delete-disks", GUESTS)
            host.check(f"rm -r {build.CATALOGUE} {build.GUEST_IMAGE}")
        with self._step("apt remove dgx-kvm-sw"):
            said = self.typed("apt-get -y remove dgx-kvm-sw", INSTALL, only="^dgx-kvm")
            expect("from its next boot on this host is as it was before" in said, said)
        with self._step("reboot"):
            host.reboot()
            expect(host.settled() == "running", "the host is not well after the removal")
        with self._step(
            "purge; everything is as recorded at the beginning, grub.cfg byte for byte"
        ):
            host.check("dpkg --purge dgx-kvm-sw")
            if self.bundled:
                host.check(f"{APT} autoremove --purge", INSTALL)
            found = self._left_or_lost()
            expect(not found, "\n".join(["left or lost:", *found]))
            expect(stand_ins(host) == {"active"}, f"of {STAND_INS} one does not run")

    def _left_or_lost(self) -> list[str]:
        assert self.beginning
        found = differences(self.beginning, facts(self.host))
        if not self.bundled:
            return found
        # What the distribution's packages leave behind is theirs: accounts, folders, what others
        # recommend. It drives no device, and is in no boot image.
        theirs = ("tree:", "units:")
        return [line for line in found if not line[2:].startswith(theirs) or "dgx-kvm" in line]

    # ---

    def _names(self) -> set[str]:
        return {vm.name for vm in self.vms_wanted}

    def _running(self) -> set[str]:
        return set(self.host.check("virsh list --name").split())


def stand_ins(host: Machine, verb: str = "is-active") -> set[str]:
    """What systemctl says of the stand-in services, all together."""
    return set(host.run(f"systemctl {verb} {' '.join(STAND_INS)}").output.split())


def _given(xml: str) -> set[str]:
    """The addresses of the host's devices that a domain has."""
    addresses = re.findall(
        r"<source>\s*<address domain='0x(\w+)' bus='0x(\w+)' slot='0x(\w+)' function='0x(\w+)'",
        xml,
    )
    return {f"{d}:{b}:{s}.{f}" for d, b, s, f in addresses}


def _console(vm: str) -> str:
    return f"/var/log/libvirt/qemu/{vm}.console.log"


def _id(function: Function) -> str:
    return f"{function.vendor[2:]}:{function.device[2:]}"
