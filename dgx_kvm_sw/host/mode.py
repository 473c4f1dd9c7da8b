"""The switch between bare metal and KVM mode, as the script host-mode shows and does it.

The script alone decides and writes; here is what asks it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.access.run import Completed, run
from dgx_kvm_sw.model.errors import HostError
from dgx_kvm_sw.model.mode import WORD, Assignable, Function, Mode, ModeStatus, Stays

DEVICES = "/var/lib/dgx-kvm/devices"  # lines of `assignable`, as they were when KVM mode was armed
GRUB_CFG = "/boot/grub/grub.cfg"

_SCRIPTS = "/usr/lib/dgx-kvm"
_GENERATOR = "/usr/lib/systemd/system-generators/dgx-kvm"
_SOURCE_TREE = Path(__file__).parents[2] / "debian/host"
_UNIT_FOLDERS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
_PCI = "/sys/bus/pci/devices"
_LOOK_SECONDS = 60.0
_SWITCH_SECONDS = 3600.0  # it builds an initramfs for every kernel
_STAYS = re.compile(r"^(\S+) stays with the host: (.*)$", re.MULTILINE)
_SAID_BY = re.compile(r"^(dgx-kvm|host-mode|assignable): ")


# -- what is --------------------------------------------------------------------------------------


def command_line(root: Root) -> tuple[str, ...]:
    """The words of the kernel command line of this boot."""
    return tuple(root.read("/proc/cmdline", "").split())


def booted(root: Root) -> Mode:
    return Mode.KVM if WORD in command_line(root) else Mode.BARE_METAL


def status(root: Root) -> ModeStatus:
    """Return the mode of this boot and of the next; a user who may not read grub.cfg is not told
    whether a switch is unfinished.
    """
    found = dict(
        line.split(": ", 1)
        for line in _ask(root, "host-mode", "status").out.splitlines()
        if ": " in line
    )
    readable = os.access(root.path(GRUB_CFG), os.R_OK)
    try:
        return ModeStatus(
            booted=Mode(found["booted"]),
            configured=Mode(found["configured"]),
            reboot_needed=found["reboot"] == "needed",
            unfinished=found.get("unfinished", "") if readable else "",
        )
    except (KeyError, ValueError) as error:
        raise HostError(
            f"host-mode status says something unknown: {found}",
            "reinstall the package dgx-kvm-sw",
        ) from error


def options(root: Root) -> str:
    """Return the words that KVM mode adds to the kernel command line."""
    return _ask(root, "host-mode", "options").out.strip()


def assignable(root: Root) -> Assignable:
    """Ask which NICs and NVMe drives VMs may get now."""
    done = _run(root, "assignable")
    kept = tuple(Stays(address, reason) for address, reason in _STAYS.findall(done.err))
    if done.code:
        return Assignable((), kept, _sentence(done.err))
    return Assignable(_lines(done.out), kept)


def armed_devices(root: Root) -> tuple[Function, ...]:
    """Return the NICs and drives that go to VMs at a boot in KVM mode, as armed."""
    return _lines(root.read(DEVICES, ""))


def _lines(text: str) -> tuple[Function, ...]:
    rows = (line.split() for line in text.splitlines())
    return tuple(Function(*row) for row in rows if len(row) == 4)


def functions(root: Root) -> tuple[Function, ...]:
    """Return every PCI function."""
    return tuple(function(root, address) for address in root.names(_PCI))


def function(root: Root, address: str) -> Function:
    """Return one PCI function; with empty texts when there is none at this address."""
    path = f"{_PCI}/{address}"
    return Function(
        address=address,
        vendor=root.read(f"{path}/vendor", ""),
        device=root.read(f"{path}/device", ""),
        class_code=root.read(f"{path}/class", ""),
        driver=root.link_name(f"{path}/driver"),
        iommu_group=root.link_name(f"{path}/iommu_group"),
    )


def gated_units(root: Root) -> tuple[str, ...]:
    """Return the installed units that do not start in KVM mode."""
    program = _found(root, _GENERATOR, "generator")
    done = run([program, "--list"], timeout=_LOOK_SECONDS, env=_environment(root))
    if done.code:
        raise HostError(
            f"{program} --list failed: {_sentence(done.err)[0]}", "reinstall dgx-kvm-sw"
        )
    return tuple(
        unit
        for unit in dict.fromkeys(done.out.split())
        if any(root.exists(f"{folder}/{unit}") for folder in _UNIT_FOLDERS)
    )


# -- what is changed ------------------------------------------------------------------------------


def switch(root: Root, verb: str, *, quiet: bool) -> None:
    """Run host-mode arm, disarm or refresh; what it says on its way goes to stderr."""
    program = _found(root, f"{_SCRIPTS}/host-mode", "host-mode")
    env = _environment(root)
    done = run([program, verb], timeout=_SWITCH_SECONDS, env=env, show_errors=not quiet)
    if done.code:
        said = done.err.strip().splitlines()
        raise HostError(
            f"host-mode {verb} failed{': ' if said else ''}{' / '.join(said[-5:])}",
            f"{'' if said else 'see its messages above; '}`dgx-kvm mode` shows what is configured",
        )


def reboot(root: Root) -> None:
    done = run([str(root.path("/usr/bin/systemctl")), "reboot"], timeout=_LOOK_SECONDS)
    if done.code:
        raise HostError(
            f"the mode is switched, but systemctl reboot failed: {done.err.strip()}",
            "run `reboot`",
        )


# -- the scripts ----------------------------------------------------------------------------------


def _ask(root: Root, script: str, *words: str) -> Completed:
    done = _run(root, script, *words)
    if done.code:
        raise HostError(*_sentence(done.err))
    return done


def _run(root: Root, script: str, *words: str) -> Completed:
    program = _found(root, f"{_SCRIPTS}/{script}", script)
    return run([program, *words], timeout=_LOOK_SECONDS, env=_environment(root))


def _environment(root: Root) -> dict[str, str]:
    """Of `/` too: what another program exported must not lead a script elsewhere."""
    below = "" if root.directory == Path("/") else str(root.directory)
    return {"DPKG_ROOT": below, "DGX_KVM_ROOT": below}


def _sentence(text: str) -> tuple[str, str]:
    """Split the last line that a script said, "dgx-kvm: what is wrong: what to do"."""
    last = _SAID_BY.sub("", (text.strip().splitlines() or ["a script failed without a word"])[-1])
    message, _, hint = last.rpartition(": ")
    return (message, hint) if message else (hint, "")


def _found(root: Root, installed: str, shipped: str) -> str:
    """Find a script: below the root, in the source tree, or installed on this machine."""
    for path in (root.path(installed), _SOURCE_TREE / shipped, Path(installed)):
        if path.exists():
            return str(path)
    raise HostError(f"there is no {installed}", "reinstall the package dgx-kvm-sw")
