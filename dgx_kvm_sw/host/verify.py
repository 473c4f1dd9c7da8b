"""After a boot in KVM mode: whether every device is where VMs need it, and what is not."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.access.run import run
from dgx_kvm_sw.host import mode, preflight
from dgx_kvm_sw.model.errors import HostError
from dgx_kvm_sw.model.mode import NVSWITCH_STAYS, VFIO, Function, Trouble, Verdict

PROBLEMS = "/run/dgx-kvm/problems"  # one a line; not there when all is well
MOTD = "/run/motd.d/dgx-kvm"

_PCI = "/sys/bus/pci"
_KVM = "/dev/kvm"
_VFIO_IOMMU = "/sys/module/vfio_iommu_type1"
_NR_HUGEPAGES = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"
_OLD_IMAGE = (
    "the boot image lacks dgx-kvm or is older than the list of devices:"
    " run `update-initramfs -u -k all`, then reboot"
)
_NEW_LIST = "run `dgx-kvm mode kvm`, which makes the list of devices anew, then reboot"
_MODPROBE_SECONDS = 60.0


def verify(root: Root) -> tuple[Trouble, ...]:
    """Look at all that a boot in KVM mode promises, and give devices without a driver to vfio-pci.

    A device that another driver has is left alone: it may be in use.
    """
    return (
        *_kvm(root),
        *_iommu(root),
        *_listed(root),
        *_drivers(root),
        *_modules(root),
        *_hugepages(root),
    )


def record(root: Root, found: tuple[Trouble, ...]) -> None:
    """Keep what was found for `dgx-kvm mode` and for whoever logs in; nothing when all is well."""
    if not found:
        root.remove(PROBLEMS)
        root.remove(MOTD)
        return
    root.write(PROBLEMS, "".join(f"{each}\n" for each in found), sync=False)
    count = f"{len(found)} problem{'s' * (len(found) != 1)}"
    text = f"dgx-kvm: {count} after boot in KVM mode; see: dgx-kvm mode\n"
    root.write(MOTD, text, sync=False)


def recorded(root: Root) -> tuple[str, ...]:
    """Return what the last look found."""
    return tuple(root.read(PROBLEMS, "").splitlines())


def _kvm(root: Root) -> Iterator[Trouble]:
    """udev loads KVM too, at its own pace; libvirtd, which starts after this, looks for it once."""
    module = "kvm_amd" if "AuthenticAMD" in root.read("/proc/cpuinfo", "") else "kvm_intel"
    if not root.exists(_KVM):
        run(["modprobe", module], timeout=_MODPROBE_SECONDS)
    if not root.exists(_KVM):
        yield Trouble(
            f"there is no {_KVM}, so no VM can start", f"see what `modprobe {module}` says"
        )


def _iommu(root: Root) -> Iterator[Trouble]:
    if not root.names("/sys/kernel/iommu_groups"):
        yield Trouble(
            "there are no IOMMU groups, so no device can be given to a VM",
            "`dgx-kvm mode --check` names the firmware setting",
        )
        return
    remapping = preflight.remapping(root)
    if remapping.verdict is Verdict.FAIL:
        yield Trouble(remapping.message, remapping.hint)
    stays = NVSWITCH_STAYS in mode.command_line(root)
    for check in preflight.groups(mode.functions(root), mode.armed_devices(root), stays):
        if check.verdict is Verdict.FAIL:
            yield Trouble(check.message, check.hint)


# -- devices --------------------------------------------------------------------------------------


def _listed(root: Root) -> Iterator[Trouble]:
    """Name devices of the list that are gone, or at whose address another one is now."""
    for wanted in mode.armed_devices(root):
        found = mode.function(root, wanted.address)
        if not root.exists(f"{_PCI}/devices/{wanted.address}"):
            yield Trouble(f"{wanted.kind} {wanted.address} is gone from the PCI bus", _NEW_LIST)
        elif found.ids != wanted.ids:
            yield Trouble(
                f"{wanted.address} is another device now: {found.ids}, not {wanted.ids}", _NEW_LIST
            )


def _drivers(root: Root) -> Iterator[Trouble]:
    """See that VMs' devices are on vfio-pci."""
    for device in _for_vms(root):
        try:
            driver = device.driver or _finish(root, device)
        except HostError as error:
            yield Trouble(error.message, error.hint or "see what the kernel says: dmesg")
            continue
        if driver == VFIO:
            continue
        name = f"{device.kind} {device.address}"
        if driver:
            yield Trouble(f"{name} is held by the driver {driver}, not {VFIO}", _OLD_IMAGE)
        else:
            hint = f"see what the kernel says of it: dmesg | grep {device.address}"
            yield Trouble(f"{name} has no driver, and {VFIO} did not take it", hint)


def _for_vms(root: Root) -> list[Function]:
    listed = {each.line for each in mode.armed_devices(root)}
    switches_stay = NVSWITCH_STAYS in mode.command_line(root)
    return [
        each
        for each in mode.functions(root)
        if each.is_gpu or each.is_nvswitch and not switches_stay or each.line in listed
    ]


def _finish(root: Root, device: Function) -> str | None:
    """Do for a device without a driver what the initramfs should have done."""
    if not root.exists(f"{_PCI}/drivers/{VFIO}"):
        run(["modprobe", VFIO], timeout=_MODPROBE_SECONDS)  # whether it helped is seen below
    root.put(f"{_PCI}/devices/{device.address}/driver_override", VFIO)
    root.put(f"{_PCI}/drivers_probe", device.address)
    return mode.function(root, device.address).driver


# -- the kernel -----------------------------------------------------------------------------------


def _modules(root: Root) -> Iterator[Trouble]:
    if not root.exists(_VFIO_IOMMU):
        run(["modprobe", "vfio_iommu_type1"], timeout=_MODPROBE_SECONDS)
    if not root.exists(_VFIO_IOMMU):
        yield Trouble(
            "the module vfio_iommu_type1 is not loaded, so no VM with a device can start",
            "see what `modprobe vfio_iommu_type1` says",
        )
    if NVSWITCH_STAYS in mode.command_line(root):
        return
    loaded = {line.split()[0] for line in root.read("/proc/modules", "").splitlines()}
    for name in sorted(loaded & {"nvidia", "nouveau"}):
        yield Trouble(
            f"the module {name} is loaded, though the host keeps no GPU",
            f"run `modprobe -r {name}`; see that module_blacklist= is on the kernel command line",
        )


def _hugepages(root: Root) -> Iterator[Trouble]:
    wanted = _wanted_hugepages(mode.command_line(root))
    found = int(root.read(_NR_HUGEPAGES, "") or 0)
    if found < wanted:
        yield Trouble(
            f"{found} of {wanted} huge pages of 1 GiB are there",
            "lower DGX_KVM_HUGEPAGES_1G in /etc/default/dgx-kvm, run `dgx-kvm mode kvm`, reboot",
        )


def _wanted_hugepages(words: tuple[str, ...]) -> int:
    """Read hugepagesz= and hugepages= as the kernel does: a number is of the size before it."""
    size, wanted = "", 0
    for word in words:
        name, _, value = word.partition("=")
        if name == "default_hugepagesz" and not size or name == "hugepagesz":
            size = value
        elif name == "hugepages" and size.upper() == "1G":
            # Either a number, or NODE:NUMBER,NODE:NUMBER.
            wanted = sum(int(n) for n in re.findall(r"(?:^|:)(\d+)(?=,|$)", value))
    return wanted
