"""What libvirt tells of a domain while it happens."""

from __future__ import annotations

from dataclasses import dataclass

from dgx_kvm_sw.model.base import StrEnum


class EventKind(StrEnum):
    STARTED = "started"
    ENDING = "ending"  # QEMU ends its guest; the domain is still there
    OFF = "off"


@dataclass(frozen=True)
class DomainEvent:
    """`reason` is QEMU's word for ENDING ("guest-reset"); "shutdown" for OFF when nobody but the
    guest or its monitor turned it off.
    """

    kind: EventKind
    name: str
    uuid: str
    reason: str = ""
