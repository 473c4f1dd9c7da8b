"""A platform matched to a machine: its fabric model and its legal GPU partitions."""

from __future__ import annotations

from dataclasses import dataclass

from dgx_kvm_sw.model.base import StrEnum


class FabricModel(StrEnum):
    """Who owns the NVSwitches while VMs run (Fabric Manager User Guide, virtualization models)."""

    NONE = "none"  # no NVSwitches
    PASSTHROUGH = "passthrough"  # NVSwitches go to the guest, Fabric Manager runs there
    SHARED = "shared"  # NVSwitches stay with the host, Fabric Manager runs there


@dataclass(frozen=True)
class Partition:
    """A set of GPUs that may form one VM."""

    id: int  # Fabric Manager's number for it, or our own count where the table has none
    gpus: tuple[int, ...]  # GPU indexes (PCI order), ascending
    physical_ids: tuple[int, ...]  # the same GPUs as the fabric numbers them; () if unknown
    links: int  # NVLinks each GPU has inside this set
    nvswitches: int  # NVSwitches that go to the VM with it (passthrough only)

    @property
    def size(self) -> int:
        return len(self.gpus)


@dataclass(frozen=True)
class Platform:
    """What this machine was recognised as, and which GPU sets are legal on it."""

    name: str  # "dgx2"; "generic" where the machine is not in the table
    title: str
    fabric_model: FabricModel
    boards: int
    partitions: tuple[Partition, ...]
    gpus: int  # that it has when it is whole
    notes: tuple[str, ...]  # what the operator should know: table against machine, guesses made

    def of_size(self, size: int) -> tuple[Partition, ...]:
        return tuple(partition for partition in self.partitions if partition.size == size)

    def with_gpus(self, gpus: tuple[int, ...]) -> Partition | None:
        """The partition of exactly these GPU indexes, ascending, if it is a legal one."""
        return next((partition for partition in self.partitions if partition.gpus == gpus), None)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted({partition.size for partition in self.partitions}))
