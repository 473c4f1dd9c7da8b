"""Power cuts while the package is installed and removed, at random moments of a real machine.

After each the next boot has to be wholly bare metal or wholly KVM mode, and dpkg has to find its
way to the end. What the seed was is printed, so that a run can be repeated.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

from lab import build
from lab.cache import ROOT, say
from lab.hostfacts import functions, modules
from lab.machine import Machine, overlay
from lab.qemu import Hardware
from lab.shape import named
from lab.story import APT, INSTALL, STAND_INS, WORD, Story, expect, stand_ins, told
from lab.tools import tools

SHAPE = "dgx2-small"
ACTIONS = {"install": f"{APT} install dgx-kvm-sw", "remove": f"{APT} remove dgx-kvm-sw"}
MEND = "dpkg --configure -a"


class PowerCuts:
    """Two disks to begin from, one without and one with the package, and how long each way took."""

    def __init__(self, release: str) -> None:
        self.kit = tools()
        self.release = release
        self.base = build.disk(release)
        self.begin: dict[str, Path] = {}
        self.seconds: dict[str, float] = {}
        self.grub_cfg = ""

    def prepare(self, package: Path) -> None:
        """Make both disks; what an action takes, uncut, bounds the moments of the cuts."""
        bare = self._disk(self.base, "powercut-bare")
        with told("power cuts: a host to install on"), self._machine(bare) as host:
            host.boot()
            story = Story(host, named(SHAPE), ())
            story.make_stand_ins()
            story.make_repository(package)
            host.check(f"{APT} update")
            self.grub_cfg = host.check("sha256sum </boot/grub/grub.cfg")
            host.power_off()
        installed = self._disk(bare, "powercut-installed")
        with told("power cuts: one that is installed"), self._machine(installed) as host:
            host.boot()
            self._timed(host, "install")
            host.power_off()
        again = self._disk(installed, "powercut-try")
        with told("power cuts: how long a removal takes"), self._machine(again) as host:
            host.boot()
            self._timed(host, "remove")
        self.begin = {"install": bare, "remove": installed}

    def cut(self, action: str, fraction: float) -> None:
        """Cut the power after this fraction of the action; boot, look, and finish."""
        disk = self._disk(self.begin[action], "powercut-try")
        after = fraction * self.seconds[action]
        with (
            self._machine(disk) as host,
            told(f"power cut {after:.0f} s into {action}, of {self.seconds[action]:.0f}"),
        ):
            host.boot()
            was_kvm = self._is_kvm(host)
            host.check(f"({ACTIONS[action]} >/root/{action}.log 2>&1 &)")
            time.sleep(after)
            host.power_cut()
            host.boot()
            self._expect_one_mode_whole(host)
            host.check(f"{MEND} && {ACTIONS[action]}", INSTALL)
            if action == "install":
                said = host.check("/usr/lib/dgx-kvm/host-mode status")
                expect("configured: kvm" in said and "unfinished" not in said, said)
            else:
                same = host.check("sha256sum </boot/grub/grub.cfg") == self.grub_cfg
                expect(same, "grub.cfg is not as before the installation")
            host.reboot()
            self._expect_one_mode_whole(host)
            expect(self._is_kvm(host) == (action == "install"), f"{action} did not take effect")
            expect(was_kvm == (action == "remove"), "the cut began from the wrong mode")

    def _expect_one_mode_whole(self, host: Machine) -> None:
        found = {one.driver for one in functions(host) if one.is_gpu or one.is_nvswitch}
        services = stand_ins(host)
        if self._is_kvm(host):
            expect(found == {"vfio-pci"}, f"KVM mode with GPUs on {found}")
            expect(services == {"inactive"}, f"KVM mode with {STAND_INS} {services}")
            expect(not modules(host) & {"nouveau"}, "KVM mode with nouveau")
        else:
            expect("vfio-pci" not in found, "bare metal with GPUs on vfio-pci")
            expect(services == {"active"}, f"bare metal with {STAND_INS} {services}")

    def _is_kvm(self, host: Machine) -> bool:
        return WORD in host.check("cat /proc/cmdline").split()

    def _timed(self, host: Machine, action: str) -> None:
        begin = time.monotonic()
        host.check(ACTIONS[action], INSTALL)
        self.seconds[action] = time.monotonic() - begin

    def _disk(self, base: Path, name: str) -> Path:
        return overlay(self.kit, base, ROOT / "disks" / f"{name}-{self.release}.qcow2")

    def _machine(self, disk: Path) -> Machine:
        return Machine(self.kit, Hardware(named(SHAPE), disk), disk.stem)


def power_cuts(package: Path, release: str, count: int, seed: int) -> None:
    """Cut the power `count` times, installing and removing by turns."""
    say(f"power cuts: {count} of them, seed {seed}")
    chance = random.Random(seed)
    cuts = PowerCuts(release)
    cuts.prepare(package)
    for number in range(count):
        cuts.cut(("install", "remove")[number % 2], chance.uniform(0.02, 1.0))
