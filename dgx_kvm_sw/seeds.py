"""The seeds of VMs: compared with what they are to be, rendered where they are to be written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.decide.domain import Surroundings, seed_path
from dgx_kvm_sw.decide.plan import Desired
from dgx_kvm_sw.decide.seed import desired_seed
from dgx_kvm_sw.guest import seed as guest_seed
from dgx_kvm_sw.guest.templates import Templates
from dgx_kvm_sw.model.domain import CurrentState
from dgx_kvm_sw.model.seed import Seed, SeedState
from dgx_kvm_sw.model.spec import HostSpec, VmSpec


def seeded(
    root: Root, templates: Templates, vm: VmSpec, want: Desired, around: Surroundings
) -> tuple[Desired, Seed | None]:
    """Compare the VM's seed with what it is to be, and render one that is to be written."""
    held = guest_seed.held_digest(root, seed_path(vm.name, around.pool_path))
    if vm.image not in around.cloud_init or not vm.first_boot.complete:
        return want, None
    facts = desired_seed(vm, around.machine_id, want.facts.uuid)
    wanted = guest_seed.seed_digest(templates, facts)
    # Who may not read the held one can write none either: what it is to be is all there is to say.
    state = SeedState(wanted if held is None else held, wanted)
    seed = guest_seed.render(templates, facts) if state.stale else None
    return replace(want, seed=state), seed


def notes(
    desired: list[Desired],
    seeds: Mapping[str, Seed],
    current: CurrentState,
    spec: HostSpec,
    around: Surroundings,
) -> Iterator[str]:
    """Say what of first boots nobody will feel, and where nobody could log in."""
    for want in desired:
        name = want.facts.name
        held = current.domain(name)
        if name in seeds and held and held.running:
            yield (
                f"{name}: its first boot settings have changed, which only a guest feels that"
                " boots for the first time; they are written before its next start"
            )
        elif name in seeds and not (seeds[name].facts.ssh_keys or seeds[name].facts.user_data):
            yield f"{name}: nobody can log in; give it ssh_keys in the file"
    for vm in spec.vms:
        asked = [disk.mount for disk in vm.disks if disk.mount]
        asked += [text for each in vm.first_boot.addressing for text in each.addresses]
        if asked and vm.image not in around.cloud_init:
            yield (
                f"{vm.name}: {', '.join(asked)} will not be set up in the guest, as it is not made"
                " from an image with cloud-init"
            )
