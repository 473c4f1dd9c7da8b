"""What a verb works on: the site that the options name, looked at or held under the lock."""

from __future__ import annotations

import contextlib
import os.path
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.cli.output import complain
from dgx_kvm_sw.decide.fit import Inputs
from dgx_kvm_sw.decide.plan import Intent
from dgx_kvm_sw.host import platforms
from dgx_kvm_sw.model.errors import BadFileError, HostError, UsageError
from dgx_kvm_sw.model.health import HealthReport
from dgx_kvm_sw.model.placement import Placements
from dgx_kvm_sw.model.spec import NO_SPEC
from dgx_kvm_sw.reconcile import SPEC_FILE, Site, Situation, gather, read_current

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dgx_kvm_sw.guest.hypervisor import Hypervisor

_URI = "qemu:///system"


@dataclass(frozen=True)
class Session:
    """A site, libvirt on it, and all that is known; under the lock where it is to be changed."""

    site: Site
    hypervisor: Hypervisor
    situation: Situation


def site_of(args: Namespace, spec: str | None = None) -> Site:
    """Return the site that the options name; `spec` is used instead of --file."""
    if args.state and not args.simulate:
        raise UsageError("--state is for --simulate", "say which machine: --simulate dgx2")
    if args.simulate and (args.root or args.connect):
        raise UsageError(
            "--simulate brings its own files and its own libvirt",
            "leave out --root and --connect",
        )
    file = spec or args.file
    return Site(
        root=_root(args),
        spec_file=os.path.abspath(file) if file else SPEC_FILE,
        spec_root=Root() if file else None,
        uri=args.connect or _URI,
        simulated=bool(args.simulate),
    )


def _root(args: Namespace) -> Root:
    if args.simulate:
        from dgx_kvm_sw.cli import simulation

        return simulation.machine(args.simulate, args.state)
    if not args.root:
        return Root()
    directory = Path(args.root).absolute()
    if not directory.is_dir():
        raise HostError(f"--root: {directory} is not a directory")
    return Root(directory)


def look(args: Namespace, intent: Intent = Intent()) -> Situation:  # noqa: B008 - a frozen value
    """Gather, changing nothing; enough for an ordinary user who may read from libvirt."""
    site = site_of(args)
    with site.hypervisor(read_only=True) as hypervisor:
        return gathered(site, hypervisor, intent)


def gathered(site: Site, hypervisor: Hypervisor, intent: Intent) -> Situation:
    with pointing_below(site):
        return gather(site, hypervisor, intent)


@contextlib.contextmanager
def hold(
    site: Site, args: Namespace, intent: Intent, *, needs_file: bool = True
) -> Iterator[Session]:
    """Gather under the lock, which is held to the end, so that what is known stays true.

    Without `needs_file` a file of ours that cannot be used is only complained about: nothing
    about stopping a VM is written there.
    """
    from dgx_kvm_sw.execute import locked_site

    with locked_site(site, args.verb, args.wait), site.hypervisor() as hypervisor:
        try:
            situation = gathered(site, hypervisor, intent)
        except (BadFileError, HostError) as error:
            if needs_file:
                raise
            if isinstance(error, BadFileError):
                complain("a file has mistakes", "`dgx-kvm validate` shows them")
            else:
                complain(error.message, error.hint)
            situation = _without_files(site, hypervisor)
        yield Session(site, hypervisor, situation)


def _without_files(site: Site, hypervisor: Hypervisor) -> Situation:
    """What libvirt holds, with nothing declared and nothing known of any device's health."""
    platform, topology = platforms.survey(site.root)
    inputs = Inputs(NO_SPEC, topology, platform, HealthReport(()))
    current = read_current(hypervisor)
    return Situation(inputs, current, Placements((), ()), (), {}, (), site)


@contextlib.contextmanager
def pointing_below(site: Site) -> Iterator[None]:
    """Let problems name files as they lie below the root, so that an editor finds them."""
    try:
        yield
    except BadFileError as error:
        if site.spec_root:  # then their names are real ones
            raise
        problems = (replace(each, file=_below(site.root, each.file)) for each in error.problems)
        raise BadFileError(tuple(problems)) from error


def _below(root: Root, file: str) -> str:
    path = root.path(file)
    return str(path) if file.startswith("/") and path.exists() else file
