"""Carrying out actions with somebody watching: one line of progress, Ctrl-C, what came of it."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType

from dgx_kvm_sw.cli.bar import cells_of, drawn
from dgx_kvm_sw.cli.output import complain, counted, is_terminal, listed, view_of
from dgx_kvm_sw.cli.session import Session
from dgx_kvm_sw.execute import Event, Part, Power, Stage, execute
from dgx_kvm_sw.model.actions import (
    Action,
    CreateVolume,
    DefineDomain,
    EnsureNetwork,
    GrowVolume,
    RemoveNetwork,
    ShutDownDomain,
    StartDomain,
    UndefineDomain,
    WriteSeed,
)
from dgx_kvm_sw.model.errors import DgxKvmError, ExitCode

_CHANGES = (DefineDomain, CreateVolume, EnsureNetwork, GrowVolume, WriteSeed)  # of a VM
_CLEAR_LINE = "\r\033[K"


class Interrupted(Exception):
    """Raised between two actions after Ctrl-C."""


@dataclass
class Report:
    """Follows the actions of one run, from any thread."""

    actions: tuple[Action, ...]
    width: int  # of the line of progress; 0 = nobody watches
    cells: str = "#-"  # what a bar is drawn of
    done: list[Action] = field(default_factory=list)
    failures: list[tuple[Action, DgxKvmError]] = field(default_factory=list)
    skipped: list[Action] = field(default_factory=list)
    signal: int = 0  # the one that asked us to stop; 0 = none
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, event: Event) -> None:
        with self.lock:
            if event.stage is Stage.BEGIN:
                if self.signal:
                    raise Interrupted
                self._show(self._position(event.action.describe()))
            elif event.part:
                if self.signal:  # nothing is lost: what is read or copied now is so again
                    raise Interrupted
                self._show(self._bar(event.part))
            elif event.stage is Stage.DONE:
                self.done.append(event.action)
            elif event.stage is Stage.SKIPPED:
                self.skipped.append(event.action)
            elif event.error:
                self.failures.append((event.action, event.error))
                self._show("")
                complain(f"could not {event.action.describe()}: {event.error.message}",
                         event.error.hint)  # fmt: skip

    def _position(self, words: str) -> str:
        return f"{len(self.done) + 1}/{len(self.actions)} {words}"

    def _bar(self, part: Part) -> str:
        return drawn(self._position(part.label), part.done, part.total, self.cells, self.width)

    def _show(self, text: str) -> None:
        if self.width:
            print(f"{_CLEAR_LINE}{text[: self.width]}", end="", file=sys.stderr, flush=True)

    @property
    def left(self) -> tuple[Action, ...]:
        """What was not tried, or not reached, because of an interruption."""
        failed = {action.vm for action, _ in self.failures}
        return tuple(a for a in self.actions if a not in self.done and a.vm not in failed)

    def names(self, *kinds: type[Action]) -> set[str]:
        return {action.vm for action in self.done if isinstance(action, kinds)}

    def counts(self, created: set[str]) -> str:
        """Return "8 created, 8 started" of what was done; `created` were not there before."""
        started, stopped = self.names(StartDomain), self.names(ShutDownDomain)
        defined, deleted = self.names(DefineDomain), self.names(UndefineDomain)
        networks = self.names(RemoveNetwork)
        counts = (
            (defined & created, "created"),
            (self.names(*_CHANGES) - created, "changed"),
            (deleted, "deleted"),
            (started & stopped, "restarted"),
            (started - stopped, "started"),
            (stopped - started - deleted, "stopped"),
            (networks, "network removed" if len(networks) == 1 else "networks removed"),
        )
        return ", ".join(f"{len(names)} {word}" for names, word in counts if names)


def carry_out(
    session: Session,
    actions: tuple[Action, ...],
    power: Power | None = None,
    *,
    quiet: bool = False,
) -> Report:
    """Execute actions; failures are printed as they happen.

    After Ctrl-C the actions under way are finished and no further one begins.
    """
    watched = not quiet and is_terminal(sys.stderr)
    view = view_of(sys.stderr)
    report = Report(actions, view.width - 1 if watched else 0, cells_of(view))
    with _listening(report), contextlib.suppress(Interrupted):
        execute(
            session.site,
            session.hypervisor,
            session.situation.platform,
            actions,
            session.situation.definitions,
            session.situation.seeds,
            report,
            power or Power(),
        )
    if report.width:
        print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)
    return report


@contextlib.contextmanager
def _listening(report: Report) -> Iterator[None]:
    """Note the first signal to stop; a second one ends the process at once, as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        report.signal = number
        signal.signal(number, signal.SIG_DFL)
        text = "finishing what is under way; once more to stop at once"
        print(f"\ndgx-kvm: {text}", file=sys.stderr, flush=True)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def result(report: Report, created: set[str]) -> str:
    """Return the beginning of the last line: what became of the actions."""
    counts = report.counts(created) or "nothing visible changed"
    if report.signal:
        names = list(dict.fromkeys(action.vm for action in report.left))
        undone = (
            f"left undone: {listed(names)}; the same command goes on"
            if names
            else "nothing was left undone"
        )
        return f"Interrupted: {counts}; {undone}"
    if report.failures:
        names = list(dict.fromkeys(action.vm for action, _ in report.failures))
        return f"Failed for {counted(len(names), 'VM')}: {listed(names)}; done: {counts}"
    return f"Done: {counts}"


def exit_code(report: Report) -> int:
    """0, 1 after a failure, 128 + the signal after an interruption."""
    if report.signal:
        return 128 + report.signal
    return int(ExitCode.FAILED if report.failures else ExitCode.OK)
