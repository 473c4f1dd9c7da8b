"""The devices that the lab can emulate: what they say they are, and their registers.

Ids of PCI devices are from pci.ids. BAR1 (BAR2 since H100) is scaled to 256 MiB, as 16 GPUs with
their real 32 GiB would need more address space than an emulated CPU has. Subsystem ids are
invented. Values of registers after power-on: nouveau (which chip), NVIDIA gpu-admin-tools (memory
cleared).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lab.pci import Bar, Identity, Link

NVIDIA = 0x10DE
THREE_D = 0x030200
BRIDGE = 0x068000
MIB = 1 << 20

CHIP = 0x000000
MEMORY_CLEARED = 0x100B20


@dataclass(frozen=True)
class LinkClosing:
    """How NVLinks are closed: these registers first, then a bit for each link, until a reset.

    Linux patch "powerpc/powernv: Isolate NVLinks between GV100GL on Witherspoon" (2019). That the
    closing register takes nothing before the others are written is our own strictness: the
    sequence is only known to work whole.
    """

    prepare: Mapping[int, int]
    prepare_bits: Mapping[int, int]
    register: int
    first_bit: int
    links: int

    @property
    def mask(self) -> int:
        return (1 << self.links) - 1 << self.first_bit


@dataclass(frozen=True)
class Model:
    """A kind of device, as it leaves the factory."""

    identity: Identity
    link: Link
    bars: tuple[Bar, ...]
    registers: Mapping[int, int] = field(default_factory=dict)
    flr: bool = False
    closing: LinkClosing | None = None


def _gpu(
    device: int,
    chip: int,
    link: Link,
    bars: tuple[Bar, ...],
    flr: bool = False,
    closing: LinkClosing | None = None,
) -> Model:
    identity = Identity(NVIDIA, device, 0x1249, THREE_D)
    return Model(identity, link, bars, {CHIP: chip, MEMORY_CLEARED: 1}, flr, closing)


def _nvswitch(device: int, link: Link) -> Model:
    bar = Bar(0, 32 * MIB, wide=True, prefetchable=False)
    return Model(Identity(NVIDIA, device, 0x1249, BRIDGE), link, (bar,))


V100_CLOSING = LinkClosing(
    prepare={0x12004C: 0x4, 0x122204: 0x2},
    prepare_bits={0x000200: 0x02000000},
    register=0xA00148,
    first_bit=16,
    links=6,
)
VOLTA_BARS = (
    Bar(0, 16 * MIB, wide=False, prefetchable=False),
    Bar(1, 256 * MIB, wide=True, prefetchable=True),
    Bar(3, 32 * MIB, wide=True, prefetchable=True),
)
HOPPER_BARS = (
    Bar(0, 16 * MIB, wide=True, prefetchable=True),
    Bar(2, 256 * MIB, wide=True, prefetchable=True),
    Bar(4, 32 * MIB, wide=True, prefetchable=True),
)

MODELS: Mapping[str, Model] = {
    "v100-sxm3": _gpu(0x1DB8, 0x140000A1, Link(3, 16), VOLTA_BARS, closing=V100_CLOSING),
    "a100-sxm4": _gpu(0x20B0, 0x170000A1, Link(4, 16), VOLTA_BARS, flr=True),
    "h100-sxm5": _gpu(0x2330, 0x180000A1, Link(5, 16), HOPPER_BARS, flr=True),
    "nvswitch-v100": _nvswitch(0x1AC2, Link(3, 4)),
    "nvswitch-a100": _nvswitch(0x1AF1, Link(3, 2)),
    "nvswitch-h100": _nvswitch(0x22A3, Link(4, 2)),
}
