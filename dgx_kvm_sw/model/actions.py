"""A plan as data: what will be done, in which order, and what it means for each VM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dgx_kvm_sw.model.base import StrEnum
from dgx_kvm_sw.model.domain import CurrentState, DomainFacts, HostNetwork, Volume
from dgx_kvm_sw.model.pci import PciAddress
from dgx_kvm_sw.model.placement import Unplaceable
from dgx_kvm_sw.model.platform import Partition


@dataclass(frozen=True)
class ShutDownDomain:
    phase: ClassVar[int] = 1
    vm: str
    uuid: str

    def describe(self) -> str:
        return f"shut down {self.vm}"


@dataclass(frozen=True)
class ReleasePartition:
    phase: ClassVar[int] = 2
    vm: str
    uuid: str
    devices: tuple[PciAddress, ...]

    def describe(self) -> str:
        return f"release the {len(self.devices)} devices of {self.vm}"


@dataclass(frozen=True)
class UndefineDomain:
    phase: ClassVar[int] = 2
    vm: str
    uuid: str
    delete_volumes: tuple[str, ...]  # paths; () keeps all disks

    def describe(self) -> str:
        disks = f" and delete {len(self.delete_volumes)} disks" if self.delete_volumes else ""
        return f"undefine {self.vm}{disks}"


@dataclass(frozen=True)
class CreateVolume:
    phase: ClassVar[int] = 3
    vm: str
    volume: Volume

    def describe(self) -> str:
        return f"create disk {self.volume.name} ({self.volume.capacity_mib / 1024:g} GiB)"


@dataclass(frozen=True)
class GrowVolume:
    """Make the disk of a VM that is off as large as the file says."""

    phase: ClassVar[int] = 3
    vm: str
    volume: Volume

    def describe(self) -> str:
        return f"grow disk {self.volume.name} to {self.volume.capacity_mib / 1024:g} GiB"


@dataclass(frozen=True)
class EnsureNetwork:
    """Make or start a network of ours that this VM needs; others may need it too."""

    phase: ClassVar[int] = 3
    vm: str
    network: HostNetwork

    def describe(self) -> str:
        address = f" ({self.network.address})" if self.network.address else ""
        return f"make network {self.network.name}{address}"


@dataclass(frozen=True)
class WriteSeed:
    """Write the VM's seed; what is in it stays out of plans, for it may be secret."""

    phase: ClassVar[int] = 3
    vm: str
    uuid: str

    def describe(self) -> str:
        return f"write the first boot settings of {self.vm}"


@dataclass(frozen=True)
class DefineDomain:
    """Define or redefine. `live`: also move the pins of the running domain to the new ones."""

    phase: ClassVar[int] = 4
    vm: str
    facts: DomainFacts
    live: bool

    def describe(self) -> str:
        return f"define {self.vm}"


@dataclass(frozen=True)
class PreparePartition:
    phase: ClassVar[int] = 5
    vm: str
    uuid: str
    partition: Partition | None
    devices: tuple[PciAddress, ...]

    def describe(self) -> str:
        return f"prepare the {len(self.devices)} devices of {self.vm}"


@dataclass(frozen=True)
class StartDomain:
    phase: ClassVar[int] = 5
    vm: str
    uuid: str

    def describe(self) -> str:
        return f"start {self.vm}"


@dataclass(frozen=True)
class MarkRestartNeeded:
    phase: ClassVar[int] = 6
    vm: str
    uuid: str

    def describe(self) -> str:
        return f"{self.vm} runs on with its old definition until it is restarted"


@dataclass(frozen=True)
class RemoveNetwork:
    """Remove a network of ours that no VM has any more; `vm` is what a row of the plan calls it."""

    phase: ClassVar[int] = 7
    vm: str
    network: HostNetwork
    users: tuple[str, ...]  # VMs that are to leave it before

    @classmethod
    def of(cls, network: HostNetwork, current: CurrentState) -> RemoveNetwork:
        users = (domain.name for domain in current.domains if network.name in domain.networks)
        return cls(f"network {network.name}", network, tuple(users))

    def describe(self) -> str:
        return f"remove network {self.network.name}"


Action = (
    ShutDownDomain
    | ReleasePartition
    | UndefineDomain
    | CreateVolume
    | GrowVolume
    | EnsureNetwork
    | WriteSeed
    | DefineDomain
    | PreparePartition
    | StartDomain
    | MarkRestartNeeded
    | RemoveNetwork
)


class Verb(StrEnum):
    """What happens to a VM, as plan prints it."""

    CREATE = "+"
    CHANGE = "~"
    DELETE = "-"
    REPLACE = "-/+"  # stopped, changed and started again
    NONE = " "


class Effect(StrEnum):
    """When a change is felt, and what it costs."""

    LIVE = "live"
    NEXT_RESTART = "at next restart"
    NEEDS_RESTART = "needs --restart"
    NEEDS_PRUNE = "needs --prune"
    DESTROYS_DATA = "destroys data"


@dataclass(frozen=True)
class Change:
    """One difference in the words of vms.yaml; `old` is what libvirt holds."""

    field: str  # "memory", "gpus", "cpu pins"
    old: str
    new: str
    effect: Effect


@dataclass(frozen=True)
class VmPlan:
    """What the plan does to one VM, and what it leaves undone for want of a flag."""

    vm: str
    verb: Verb
    changes: tuple[Change, ...]
    summary: str = ""  # one line for a new VM: "2 GPUs (8, 9), 10 threads, 172 GiB on node 1"
    pending: tuple[str, ...] = ()  # flags that would let the rest happen: ("--restart",)


@dataclass(frozen=True)
class Plan:
    """Everything `apply` will do; empty `actions` means nothing."""

    vms: tuple[VmPlan, ...]  # those with something to say, in file order, orphans last
    actions: tuple[Action, ...]  # in the order they run
    unplaceable: tuple[Unplaceable, ...]
    unmanaged: tuple[str, ...]  # domains that are not ours
    notes: tuple[str, ...] = ()  # sentences about what apply will not do, and other news

    @property
    def pending(self) -> bool:
        """Whether the declared state is not reached: something to do, refused, or for a flag."""
        return bool(self.vms or self.unplaceable)
