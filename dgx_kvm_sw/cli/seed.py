"""The verb that shows a VM's seed: seed."""

from __future__ import annotations

from argparse import Namespace

from dgx_kvm_sw.cli.output import say, say_json
from dgx_kvm_sw.cli.session import look, pointing_below
from dgx_kvm_sw.model.errors import DgxKvmError, ExitCode


def seed(args: Namespace) -> ExitCode:
    situation = look(args)
    with pointing_below(situation.site):
        found = situation.seed(args.name)
    if found is None:
        raise DgxKvmError(
            f"{args.name} gets no first boot settings",
            "only a VM that fits and is made from an image with cloud-init does",
        )
    if args.json:
        say_json({"vm": args.name, "digest": found.digest, "files": found.files})
    else:
        for name, text in found.files.items():
            say(f"--- {name}\n{text.rstrip()}", quiet=args.quiet)
    return ExitCode.OK
