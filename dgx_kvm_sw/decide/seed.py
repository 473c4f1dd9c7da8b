"""What a VM's guest is told at its first boot."""

from __future__ import annotations

from dgx_kvm_sw.decide.domain import interface_macs
from dgx_kvm_sw.model.seed import SeedFacts, SeedMount, SeedNetwork
from dgx_kvm_sw.model.spec import VmSpec


def desired_seed(vm: VmSpec, machine_id: str, uuid: str) -> SeedFacts:
    """Return what the seed of a VM is made from.

    `uuid` is that of its domain. It is the instance id, by which cloud-init knows a first boot;
    nothing else may be, or a change of the file would run first boots again.
    """
    macs = interface_macs(vm, machine_id)
    return SeedFacts(
        name=vm.name,
        uuid=uuid,
        tenant=vm.tenant,
        gpus=vm.gpus,
        image=vm.image,
        user=vm.first_boot.user,
        ssh_keys=vm.first_boot.ssh_keys,
        mounts=tuple(SeedMount(disk.name, disk.mount) for disk in vm.disks if disk.mount),
        networks=tuple(
            SeedNetwork(f"net{number}", mac, addressing)
            for number, (mac, addressing) in enumerate(
                zip(macs, vm.first_boot.addressing, strict=True)
            )
        ),
        user_data=vm.first_boot.user_data,
    )
