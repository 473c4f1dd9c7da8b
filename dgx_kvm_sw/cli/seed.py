"""The verb that shows a VM's seed: seed."""

from __future__ import annotations

from argparse import Namespace

from dgx_kvm_sw.cli.output import say, say_json
from dgx_kvm_sw.cli.session import look, pointing_below
from dgx_kvm_sw.guest import images
from dgx_kvm_sw.model.errors import DgxKvmError, ExitCode
from dgx_kvm_sw.reconcile import Situation


def seed(args: Namespace) -> ExitCode:
    situation = look(args)
    with pointing_below(situation.site):
        found = situation.seed(args.name)
    if found is None:
        raise _refusal(situation, args.name)
    if args.json:
        say_json({"vm": args.name, "digest": found.digest, "files": found.files})
    else:
        for name, text in found.files.items():
            say(f"--- {name}\n{text.rstrip()}", quiet=args.quiet)
    return ExitCode.OK


def _refusal(situation: Situation, name: str) -> DgxKvmError:
    """Say why a VM has no seed to show."""
    vm = next((vm for vm in situation.spec.vms if vm.name == name), None)
    message = f"{name} gets no first boot settings"
    if vm is None:
        return DgxKvmError(f"{message}: it is not in the file any more")
    if not vm.image:
        return DgxKvmError(message, "only a VM that is made from an image with cloud-init does")
    if not images.catalogue(situation.site.root).cloud_init(vm.image):
        return DgxKvmError(f"{message}: its image {vm.image} has no cloud-init")
    if not vm.first_boot.complete:
        message = f"a file of {name}'s user data or ssh_keys may not be read by you"
        return DgxKvmError(message, "run the command as root")
    return DgxKvmError(message, f"it does not fit; `dgx-kvm explain {name}` says why")
