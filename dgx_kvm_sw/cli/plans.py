"""Plans as people read them, and as `plan -o` saves them."""

from __future__ import annotations

import contextlib
import json
import os.path
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dgx_kvm_sw.access.files import explained, write_atomically
from dgx_kvm_sw.cli.output import View, counted, listed
from dgx_kvm_sw.decide.plan import Intent
from dgx_kvm_sw.model.actions import Change, Effect, Plan, Verb, VmPlan
from dgx_kvm_sw.model.base import to_json
from dgx_kvm_sw.model.errors import BadFileError, Problem, StalePlanError, UsageError
from dgx_kvm_sw.model.placement import Unplaceable
from dgx_kvm_sw.reconcile import Situation

_VERSION = 1
_MAX_BYTES = 16 << 20
_COLORS = {
    Verb.CREATE: "green",
    Verb.CHANGE: "yellow",
    Verb.REPLACE: "yellow",
    Verb.DELETE: "red",
    Verb.NONE: "dim",
}


# -- for people ---------------------------------------------------------------------------------


def plan_text(plan: Plan, view: View) -> str:
    """Return everything that is to be said about a plan but its summary."""
    lines = [line for row in plan.vms for line in vm_lines(row, view)]
    lines += [line for refused in plan.unplaceable for line in _refused_lines(refused, view)]
    if plan.unmanaged:
        lines.append(f"Left alone, not made by dgx-kvm: {listed(plan.unmanaged)}")
    lines += [f"Note: {note}" for note in plan.notes]
    return "\n".join(lines)


def vm_lines(row: VmPlan, view: View) -> Iterator[str]:
    wide = max((len(str(verb)) for verb in Verb), default=1)
    sign = view.paint(f"{row.verb!s:>{wide}}", _COLORS[row.verb])
    flags = f"  (waits for {' '.join(row.pending)})" if row.pending else ""
    about = f"  {row.summary}" if row.summary else ""
    yield f"{sign} {view.paint(row.vm, 'bold')}{about}{flags}"
    for change in row.changes:
        yield f"{'':{wide + 3}}{_change(change, view, bool(row.pending))}"


def _change(change: Change, view: View, pending: bool) -> str:
    granted = change.effect in (Effect.NEEDS_RESTART, Effect.NEEDS_PRUNE) and not pending
    effect = "" if granted or change.effect is Effect.LIVE else f"  ({change.effect})"
    color = "red" if change.effect is Effect.DESTROYS_DATA else "dim"
    return f"{change.field}: {change.old} -> {change.new}{view.paint(effect, color)}"


def _refused_lines(refused: Unplaceable, view: View) -> Iterator[str]:
    yield f"{view.paint('  !', 'red')} {view.paint(refused.vm, 'bold')}  does not fit"
    for reason in refused.reasons:
        yield f"      {reason}"
    for remedy in refused.remedies:
        yield f"      {view.paint('->', 'cyan')} {remedy}"


def summary(plan: Plan, situation: Situation) -> str:
    """Return the last line: what would be done, what waits for an option, what does not fit."""
    acting = {action.vm for action in plan.actions}
    counts = dict.fromkeys(Verb, 0)
    later = 0
    for row in plan.vms:
        if row.vm in acting:
            counts[row.verb] += 1
            later += bool(row.pending)
    changed = counts[Verb.CHANGE] + counts[Verb.REPLACE]
    if acting:
        at_restart = f" ({later} at next restart)" if later else ""
        text = (
            f"Plan: {counts[Verb.CREATE]} to create, {changed} to change{at_restart},"
            f" {counts[Verb.DELETE]} to delete"
        )
    else:
        text = f"Nothing to do: {_as_declared(plan, situation)}"
    return f"{text}{unfinished(plan)}."


def _as_declared(plan: Plan, situation: Situation) -> str:
    others = {row.vm for row in plan.vms} | {refused.vm for refused in plan.unplaceable}
    names = {vm.name for vm in situation.spec.vms}
    count = len(names - others)
    if not names and not others:
        return "no VM is declared"
    return f"{counted(count, 'VM is', 'VMs are')} as declared"


def unfinished(plan: Plan) -> str:
    """Return what apply leaves undone: "; 1 waits for --restart: hr-train; 1 does not fit: big"."""
    waiting: dict[str, list[str]] = {}
    for row in plan.vms:
        if row.pending:
            waiting.setdefault(" ".join(row.pending), []).append(row.vm)
    parts = [
        f"; {counted(len(names), 'waits', 'wait')} for {flags}: {listed(names)}"
        for flags, names in waiting.items()
    ]
    if plan.unplaceable:
        names = [refused.vm for refused in plan.unplaceable]
        verb = "does" if len(names) == 1 else "do"
        parts.append(f"; {len(names)} {verb} not fit: {listed(names)}")
    return "".join(parts)


# -- for programs -------------------------------------------------------------------------------


def plan_json(plan: Plan, situation: Situation, intent: Intent) -> dict[str, Any]:
    """Return a plan as plain JSON types, with the fingerprint of what it was made from."""
    actions = [
        {"type": type(action).__name__, "text": action.describe(), **to_json(action)}
        for action in plan.actions
    ]
    document: dict[str, Any] = to_json(plan)
    return {
        "fingerprint": situation.fingerprint,
        "intent": asdict(intent),
        "summary": summary(plan, situation),
        "pending": plan.pending,
        **document,
        "actions": actions,
    }


def save(
    path: str, plan: Plan, situation: Situation, intent: Intent, spec_file: str | None
) -> None:
    """Write a plan for `apply`; it names tenants and disks, so it is for its owner only."""
    real = os.path.realpath(path)
    _check_replaceable(path, real)
    document = {
        "version": _VERSION,
        "file": os.path.abspath(spec_file) if spec_file else None,
        **plan_json(plan, situation, intent),
    }
    write_atomically(Path(real), json.dumps(document, indent=1) + "\n", 0o600)


def _check_replaceable(path: str, real: str) -> None:
    """Raise unless a plan may be written there: only an older plan is ever replaced."""
    if not os.path.exists(real):
        if not os.path.isdir(folder := os.path.dirname(real)):
            raise UsageError(f"there is no directory {folder}", "make it, or name another file")
        return
    if os.path.isfile(real):
        with contextlib.suppress(BadFileError):
            load(real)
            return
    raise UsageError(
        f"{path} is there and is no saved plan, so it is not replaced", "name another file"
    )


@dataclass(frozen=True)
class SavedPlan:
    """A plan that was saved: what it was made from, and what it would do."""

    path: str
    spec_file: str | None  # as given with -f
    intent: Intent
    fingerprint: str
    actions: list[Any]

    def check(self, plan: Plan, situation: Situation) -> None:
        """Raise StalePlanError unless `plan`, made now, is the saved one."""
        now = plan_json(plan, situation, self.intent)
        if (self.fingerprint, self.actions) != (now["fingerprint"], now["actions"]):
            raise StalePlanError(
                f"{self.path} is stale: the files, the machine or libvirt have changed since;"
                " nothing was done",
                "make a new one with `dgx-kvm plan -o`",
            )


def load(path: str) -> SavedPlan:
    """Read a saved plan; raises BadFileError for a file that is none."""
    try:
        with open(path, "rb") as stream:
            text = stream.read(_MAX_BYTES)
    except OSError as error:
        raise explained(error, "read", Path(path)) from error
    try:
        document = json.loads(text)
        file = document["file"]
        if document["version"] != _VERSION or not isinstance(file, str | None):
            raise ValueError
        return SavedPlan(
            path,
            file,
            Intent(**document["intent"]),
            document["fingerprint"],
            document["actions"],
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        hint = "make one with `dgx-kvm plan -o FILE`; another vms.yaml is named with -f"
        problem = Problem(path, 0, 0, 0, 0, "", "this is not a saved plan", hint)
        raise BadFileError((problem,)) from None


def intent_of(restart: bool, prune: bool, delete_disks: bool) -> Intent:
    if delete_disks and not prune:
        raise UsageError("--delete-disks works on what --prune deletes", "give both, or neither")
    return Intent(restart, prune, delete_disks)
