"""Whether this host can be switched to KVM mode: one check for each condition."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from dgx_kvm_sw.access.files import Root, explained
from dgx_kvm_sw.host import mode
from dgx_kvm_sw.model.errors import HostError
from dgx_kvm_sw.model.mode import NVSWITCH_STAYS, Assignable, Check, Function, Mode, Verdict

_TABLES = "/sys/firmware/acpi/tables"
_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin")
_CONF = "/etc/initramfs-tools/update-initramfs.conf"
_SWITCHED_OFF = re.compile(r"^\s*update_initramfs=[\"']?no", re.MULTILINE)
_FLAGS = re.compile(r"^flags\s*:(.*)$", re.MULTILINE)
_DMAR_FLAGS = 37  # bytes: a header of 36, the width of host addresses, then this one
_INTR_REMAP, _X2APIC_OPT_OUT = 1, 2
_LEAST_ROOM_MIB = 100
_FIRMWARE = "switch on {} in the firmware setup, then boot and repeat this command"
_GROUPS = "IOMMU groups"


@dataclass(frozen=True)
class _Vendor:
    """What a maker of CPUs calls the things to switch on."""

    flag: str
    virtualization: str
    setting: str
    table: str
    iommu: str
    iommu_setting: str


_INTEL = _Vendor(
    "vmx", "VT-x", '"Intel Virtualization Technology (VT-x)"', "DMAR", "VT-d", '"Intel VT-d"'
)
_AMD = _Vendor("svm", "SVM", '"SVM Mode"', "IVRS", "AMD-Vi", '"IOMMU (AMD-Vi)"')


def preflight(root: Root) -> tuple[Check, ...]:
    """Make every check; nothing is changed."""
    cpuinfo = root.read("/proc/cpuinfo", "")
    vendor = _AMD if "AuthenticAMD" in cpuinfo else _INTEL
    functions = mode.functions(root)
    words, options_check = _options(root)
    assignable = mode.assignable(root)
    nvswitches_stay = NVSWITCH_STAYS in words.split()
    # An emulated host may have one vendor's CPU and the other's IOMMU.
    iommu = next((one for one in (_INTEL, _AMD) if root.exists(f"{_TABLES}/{one.table}")), vendor)
    return (
        _virtualization(cpuinfo, vendor),
        _iommu(root, iommu),
        remapping(root) if mode.booted(root) is Mode.KVM else _can_remap(root, iommu),
        _grub(root),
        _initramfs(root),
        _room(root),
        _vfio(root),
        options_check,
        _gpus(functions),
        *_devices(functions, assignable, nvswitches_stay),
    )


def failures(checks: Iterable[Check]) -> list[Check]:
    return [check for check in checks if check.verdict is Verdict.FAIL]


# -- firmware -------------------------------------------------------------------------------------


def _virtualization(cpuinfo: str, vendor: _Vendor) -> Check:
    name = "virtualization"
    flags = _FLAGS.search(cpuinfo)
    if flags and vendor.flag in flags.group(1).split():
        return Check(name, Verdict.OK, f"the CPU offers {vendor.virtualization}")
    message = f"the CPU does not offer {vendor.virtualization}"
    return Check(name, Verdict.FAIL, message, _FIRMWARE.format(vendor.setting))


def _iommu(root: Root, vendor: _Vendor) -> Check:
    if root.exists(f"{_TABLES}/{vendor.table}"):
        return Check("IOMMU", Verdict.OK, f"the firmware offers {vendor.iommu}")
    message = f"{vendor.iommu} is off: the firmware has no ACPI table {vendor.table}"
    return Check("IOMMU", Verdict.FAIL, message, _FIRMWARE.format(vendor.iommu_setting))


def _can_remap(root: Root, vendor: _Vendor) -> Check:
    """Before a boot in KVM mode only the firmware's word is there."""
    name = "interrupt remapping"
    hint = _FIRMWARE.format(f'"Interrupt Remapping" beside {vendor.iommu_setting}')
    if not root.exists(f"{_TABLES}/{vendor.table}"):
        return Check(name, Verdict.FAIL, f"there is none without {vendor.iommu}", hint)
    if vendor is _AMD:
        return Check(name, Verdict.OK, "AMD-Vi brings it")
    try:
        table = root.path(f"{_TABLES}/{vendor.table}").read_bytes()
    except OSError:
        message = f"not known: {_TABLES}/{vendor.table} cannot be read"
        return Check(name, Verdict.WARN, message, "run this command as root")
    flags = table[_DMAR_FLAGS] if len(table) > _DMAR_FLAGS else 0
    if not flags & _INTR_REMAP:
        message = "the firmware does not offer it, and a VM could disturb the host without it"
        return Check(name, Verdict.FAIL, message, hint)
    if flags & _X2APIC_OPT_OUT:
        message = "the firmware offers it, but asks Linux not to use x2APIC"
        hint = "switch on x2APIC in the firmware setup if it has that setting"
        return Check(name, Verdict.WARN, message, hint)
    return Check(name, Verdict.OK, "the firmware offers it")


def remapping(root: Root) -> Check:
    """In KVM mode the interrupts themselves tell: those that are remapped have chips IR-..."""
    name = "interrupt remapping"
    interrupts = root.names("/sys/kernel/irq")
    chips = (root.read(f"/sys/kernel/irq/{number}/chip_name", "") for number in interrupts)
    if any(chip.startswith("IR-") for chip in chips):
        return Check(name, Verdict.OK, "it is in use")
    return Check(
        name,
        Verdict.FAIL,
        "interrupt remapping is not in use, so VFIO refuses to start VMs",
        _FIRMWARE.format('"Interrupt Remapping"'),
    )


# -- what boots this host -------------------------------------------------------------------------


def _program(root: Root, name: str) -> bool:
    return any(root.exists(f"{folder}/{name}") for folder in _FOLDERS)


def _grub(root: Root) -> Check:
    missing = [] if _program(root, "update-grub") else ["no update-grub"]
    missing += [] if root.exists(mode.GRUB_CFG) else [f"no {mode.GRUB_CFG}"]
    if not missing:
        return Check("GRUB", Verdict.OK, "it starts this host")
    message = f"GRUB does not start this host: there is {' and '.join(missing)}"
    return Check(
        "GRUB",
        Verdict.FAIL,
        message,
        "KVM mode can be armed only where it does: make GRUB the boot loader",
    )


def _initramfs(root: Root) -> Check:
    name = "initramfs"
    if not _program(root, "update-initramfs"):
        message = "there is no update-initramfs on this host"
        return Check(name, Verdict.FAIL, message, "install it: apt install initramfs-tools")
    if _SWITCHED_OFF.search(root.read(_CONF, "")):
        message = f"{root.path(_CONF)} says update_initramfs=no, so no boot image can be rebuilt"
        return Check(name, Verdict.FAIL, message, "set it to yes, then repeat this command")
    return Check(name, Verdict.OK, "update-initramfs makes the boot images")


def _room(root: Root) -> Check:
    """A new image is written beside the old one, so the largest must fit once more."""
    name, boot = "room in /boot", root.path("/boot")
    try:
        state = os.statvfs(boot)
        images = [path.stat().st_size >> 20 for path in boot.glob("initrd.img*") if path.exists()]
    except OSError as error:
        found = explained(error, "look at", boot)
        return Check(name, Verdict.FAIL, found.message, found.hint)
    free = state.f_bavail * state.f_frsize >> 20
    needed = max(_LEAST_ROOM_MIB, *images, 0)
    if free >= needed:
        return Check(name, Verdict.OK, f"{free} MiB free")
    message = f"{free} MiB free; building a boot image may take {needed} MiB"
    return Check(name, Verdict.WARN, message, "remove old kernels: apt autoremove --purge")


def _vfio(root: Root) -> Check:
    release = root.read("/proc/sys/kernel/osrelease", "")
    folder = f"/lib/modules/{release}"
    lists = (root.read(f"{folder}/{name}", "") for name in ("modules.builtin", "modules.dep"))
    if release and any("/vfio-pci.ko" in text for text in lists):
        return Check("vfio-pci", Verdict.OK, f"kernel {release} has it")
    message = f"kernel {release or '(unknown)'} has no module vfio-pci"
    hint = f"install it: apt install linux-modules-extra-{release}, or boot Debian's own kernel"
    return Check("vfio-pci", Verdict.FAIL, message, hint)


def _options(root: Root) -> tuple[str, Check]:
    try:
        words = mode.options(root)
    except HostError as error:
        return "", Check("kernel options", Verdict.FAIL, error.message, error.hint)
    return words, Check("kernel options", Verdict.OK, words)


# -- devices --------------------------------------------------------------------------------------


def _gpus(functions: Collection[Function]) -> Check:
    gpus = sum(each.is_gpu for each in functions)
    switches = sum(each.is_nvswitch for each in functions)
    if not gpus:
        hint = "see whether `lspci -d 10de:` shows any; one that is missing may have lost power"
        return Check("GPUs", Verdict.FAIL, "there is no NVIDIA GPU on the PCI bus", hint)
    message = f"{gpus} GPU{'s' * (gpus != 1)} and {switches} NVSwitch{'es' * (switches != 1)}"
    return Check("GPUs", Verdict.OK, message)


def groups(
    functions: Collection[Function], given: Iterable[Function], nvswitches_stay: bool
) -> list[Check]:
    """Refuse each GPU and NVSwitch that shares its IOMMU group with what stays with the host."""
    if not any(each.iommu_group for each in functions):
        message = "there are none before the first boot in KVM mode; they are looked at then"
        return [Check(_GROUPS, Verdict.OK, message)]
    to_vms = {each.address for each in given}

    def goes(each: Function) -> bool:
        return each.is_gpu or each.is_nvswitch and not nvswitches_stay or each.address in to_vms

    staying: dict[str, list[Function]] = {}
    for each in functions:
        if each.iommu_group and not goes(each) and not each.is_bridge:
            staying.setdefault(each.iommu_group, []).append(each)
    found = [
        _shared(each, staying[each.iommu_group])
        for each in functions
        if each.iommu_group in staying and goes(each) and (each.is_gpu or each.is_nvswitch)
    ]
    alone = "no GPU or NVSwitch shares a group with a device that stays with the host"
    return found or [Check(_GROUPS, Verdict.OK, alone)]


def _shared(device: Function, others: list[Function]) -> Check:
    names = ", ".join(f"{other.kind} {other.address}" for other in others)
    return Check(
        _GROUPS,
        Verdict.FAIL,
        f"{device.kind} {device.address} shares IOMMU group {device.iommu_group} with {names},"
        f" which stay{'s' * (len(others) == 1)} with the host",
        "switch on ACS in the firmware setup, or move one of them to another slot",
    )


def _devices(
    functions: Collection[Function], assignable: Assignable, nvswitches_stay: bool
) -> list[Check]:
    """Check the groups, and the NICs and drives, which are refused as a whole for a bad group."""
    name = "NICs and drives"
    kept = {each.address for each in assignable.kept}
    if assignable.refusal:
        free = [each for each in functions if each.is_assignable and each.address not in kept]
        shared = groups(functions, free, nvswitches_stay)
        refused = [] if failures(shared) else [Check(name, Verdict.FAIL, *assignable.refusal)]
        return [*shared, *refused]
    given = len(assignable.given)
    go = f"{given} go{'es' * (given == 1)} to VMs"
    stay = f"{len(kept)} stay{'s' * (len(kept) == 1)} with the host"
    hint = "to free it, switch on ACS in the firmware setup"
    return [
        *groups(functions, assignable.given, nvswitches_stay),
        Check(name, Verdict.OK, f"{go}, {stay}; `dgx-kvm mode` names them"),
        *(
            Check(name, Verdict.WARN, f"{each.address} stays: {each.reason}", hint)
            for each in assignable.kept
            if each.for_its_group
        ),
    ]
