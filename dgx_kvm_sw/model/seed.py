"""The seed: what a guest is told at its first boot, on a small CD that cloud-init reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from dgx_kvm_sw.model.spec import Addressing


@dataclass(frozen=True)
class SeedNetwork:
    """A virtual network interface, as the guest is told of it."""

    name: str  # what the guest calls it
    mac: str
    addressing: Addressing


@dataclass(frozen=True)
class SeedMount:
    """A data disk that the guest formats if there is nothing on it, and mounts."""

    disk: str  # its serial number: /dev/disk/by-id/virtio-DISK
    path: str


@dataclass(frozen=True)
class SeedFacts:
    """All that a seed is made from. The template gets exactly this, without `user_data`."""

    name: str
    uuid: str
    tenant: str
    gpus: int
    image: str
    user: str
    ssh_keys: tuple[str, ...]
    mounts: tuple[SeedMount, ...]
    networks: tuple[SeedNetwork, ...]
    user_data: str = field(repr=False)  # may hold secrets


@dataclass(frozen=True)
class SeedState:
    """Digests of what a VM's seed was made from and is to be made from."""

    held: str  # "" where there is no seed
    wanted: str

    @property
    def stale(self) -> bool:
        return self.held != self.wanted


@dataclass(frozen=True)
class Seed:
    """A seed ready to be written: its files by name, in the order of their names."""

    facts: SeedFacts
    digest: str
    files: dict[str, str] = field(repr=False)
