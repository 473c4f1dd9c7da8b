"""The verbs that only look: status, explain, fits, topology."""

from __future__ import annotations

import sys
import time
from argparse import Namespace

from dgx_kvm_sw.cli import show
from dgx_kvm_sw.cli.output import is_terminal, say, say_json, view_of
from dgx_kvm_sw.cli.session import look, site_of
from dgx_kvm_sw.decide.plan import Intent
from dgx_kvm_sw.host import health as host_health
from dgx_kvm_sw.host import platforms
from dgx_kvm_sw.model.errors import DgxKvmError, ExitCode, UsageError

_WATCH_SECONDS = 2.0
_CLEAR = "\033[H\033[2J\033[3J"


def status(args: Namespace) -> ExitCode:
    if args.watch:
        return _watch(args)
    situation = look(args)
    if args.json:
        say_json(show.status_json(situation))
    else:
        say(show.status(situation, view_of(sys.stdout, args.no_color)), quiet=args.quiet)
    pending = args.check and situation.plan(Intent()).pending
    return ExitCode.CHANGES if pending else ExitCode.OK


def _watch(args: Namespace) -> ExitCode:
    """Draw again and again; what fails is shown, as it may have passed by the next time."""
    if args.json or args.check or args.quiet:
        raise UsageError("--watch goes on forever", "leave out --json, --check and --quiet")
    while True:
        view = view_of(sys.stdout, args.no_color)  # the window may have changed
        try:
            text = show.status(look(args), view)
        except DgxKvmError as error:
            text = error.message
        print(_CLEAR if is_terminal(sys.stdout) else "", end="")
        print(text, flush=True)
        time.sleep(_WATCH_SECONDS)


def explain(args: Namespace) -> ExitCode:
    situation = look(args)
    if args.json:
        say_json(show.explain_json(situation, args.name))
    else:
        text = show.explain(situation, args.name, view_of(sys.stdout, args.no_color))
        say(text, quiet=args.quiet)
    return ExitCode.OK


def fits(args: Namespace) -> ExitCode:
    situation = look(args)
    if args.json:
        say_json(show.fits_json(situation))
    else:
        say(show.fits(situation, view_of(sys.stdout, args.no_color)), quiet=args.quiet)
    return ExitCode.OK


def topology(args: Namespace) -> ExitCode:
    root = site_of(args).root
    platform, found = platforms.survey(root)
    health = host_health.assess(found, root, platform.fabric_model)
    if args.json:
        say_json(show.topology_json(found, platform, health))
    else:
        text = show.topology(found, platform, health, view_of(sys.stdout, args.no_color))
        say(text, quiet=args.quiet)
    return ExitCode.OK
