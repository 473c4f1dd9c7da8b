"""The lab from the command line: `python3 -m lab VERB`, see README.md."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from lab import build
from lab.airgap import airgap
from lab.cache import ROOT, say, step
from lab.console import Shell
from lab.image import RELEASES
from lab.machine import Machine, overlay
from lab.negative import negative_hosts
from lab.others import other_machines
from lab.packages import LabError
from lab.powercuts import power_cuts
from lab.qemu import Hardware, Iommu
from lab.shape import named, names
from lab.story import VMS, tell
from lab.terminal import interact
from lab.tools import tools
from lab.vfs import virtual_functions
from tools import bundle
from tools.archive import NoArchiveError
from tools.repository import OfflineError

# "bundle" is the story with all from a bundle.
PARTS = ("story", "bundle", "airgap", "vfs", "negative", "cuts", "shapes")


def main() -> int:
    """Run a verb; problems of the lab are one message, not a traceback."""
    options = _arguments().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return int(options.verb(options))
    except (LabError, NoArchiveError, OfflineError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m lab", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, function: object, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(verb=function)
        added.add_argument("--release", choices=RELEASES, default="bookworm")
        added.add_argument("--bare", action="store_true", help="no libvirt and QEMU in the host")
        return added

    verb("build", _build, "make what a machine needs; minutes, once")
    for name, function, text in (
        ("boot", _boot, "boot a machine and keep it until Ctrl-C; `run` talks to it"),
        ("shell", _shell, "boot a machine and give its root shell"),
    ):
        added = verb(name, function, text)
        added.add_argument("--shape", choices=names(), default="dgx2-small")
        added.add_argument("--iommu", choices=[kind.value for kind in Iommu], default="full")
        added.add_argument("--no-gpus", action="store_true", help="QEMU's own devices only")
        added.add_argument("--keep-disk", action="store_true", help="go on with its last disk")
        added.add_argument("--installed", action="store_true", help="with the built package")
        added.add_argument("--name", default="host")
    added = verb("test", _test, "tell the story of an operator, unattended")
    added.add_argument("--part", choices=PARTS, action="append", help="what to tell; the story")
    added.add_argument("--shape", choices=VMS, default="dgx2-small", help="of the story")
    added.add_argument("--full", action="store_true", help="all parts on all releases; hours")
    added.add_argument("--seed", type=int, default=int(time.time()), help="of the power cuts")
    added.add_argument("--cuts", type=int, default=4, help="how many power cuts a release gets")
    added = verb("run", _run, "run a command in a machine that `boot` keeps")
    added.add_argument("--name", default="host")
    added.add_argument("command")
    return parser


def _build(options: argparse.Namespace) -> int:
    say(f"disk: {build.disk(options.release, not options.bare)}")
    say(f"image for its VMs: {build.guest_image(options.release)}")
    return 0


def _machine(options: argparse.Namespace) -> Machine:
    disk = ROOT / "disks" / f"{options.name}.qcow2"
    if options.keep_disk and not disk.exists():
        raise LabError(f"there is no disk {disk} to go on with")
    kit = tools()
    if not options.keep_disk:
        if options.installed:
            base = build.installed_disk(options.release, build.package())
        else:
            base = build.disk(options.release, not options.bare)
        overlay(kit, base, disk)
    hardware = Hardware(
        named(options.shape), disk, iommu=Iommu(options.iommu), served=not options.no_gpus
    )
    return Machine(kit, hardware, options.name)


def _boot(options: argparse.Namespace) -> int:
    with _machine(options) as machine:
        machine.boot()
        say(machine.hardware.shape.note)
        machine.detach()
        (machine.real / "directory").write_text(str(machine.directory))
        say("ready; Ctrl-C cuts its power")
        with contextlib.suppress(ChildProcessError):
            machine.processes["qemu"].wait()
    return 0


def _shell(options: argparse.Namespace) -> int:
    if not sys.stdin.isatty():
        raise LabError("a root shell needs a terminal; without one: boot, then run")
    with _machine(options) as machine:
        with step(f"{options.name}: root shell"):
            machine.power_on()
            machine.wait_for_shell()
        say(machine.hardware.shape.note)
        interact(machine.directory)
    return 0


def _test(options: argparse.Namespace) -> int:
    if not options.full:
        for part in options.part or ("story",):
            _part(part, options.release, options.shape, options)
        return 0
    for release in RELEASES:
        for part, shape in (("story", "dgx2-small"), ("bundle", "dgx2")):
            _part(part, release, shape, options)
        for part in PARTS[2:]:
            _part(part, release, "", options)
    return 0


def _part(part: str, release: str, shape: str, options: argparse.Namespace) -> None:
    match part:
        case "story":
            tell(build.package(), release, shape)
        case "bundle":
            folder = bundle.make(release, ["dgx-kvm-sw"], ROOT / "bundles")
            tell(folder.with_name(f"{folder.name}.tar"), release, shape)
        case "airgap":
            airgap(release)
        case "vfs":
            virtual_functions(build.package(), release)
        case "negative":
            negative_hosts(build.package(), release)
        case "cuts":
            power_cuts(build.package(), release, options.cuts, options.seed)
        case "shapes":
            other_machines(build.package(), release)


def _run(options: argparse.Namespace) -> int:
    try:
        directory = (ROOT / "runs" / options.name / "directory").read_text()
    except FileNotFoundError as error:
        raise LabError(f"no machine {options.name} is kept; see: boot --name") from error
    with contextlib.closing(Shell(Path(directory) / "shell.sock")) as shell:
        shell.attach()
        result = shell.answer(shell.send(options.command), timeout=3600)
    os.write(1, result.output.encode())
    return result.code


if __name__ == "__main__":
    sys.exit(main())
