"""Errors a user may see: what is wrong with which object, and what to do; and the exit codes."""

from __future__ import annotations

import dataclasses
import enum
import unicodedata


class ExitCode(enum.IntEnum):
    """Exit codes of every command; the same number means the same everywhere."""

    OK = 0  # done, or nothing to do
    FAILED = 1  # something could not be done
    CHANGES = 2  # plan, diff, status --check: changes are pending
    USAGE = 64  # the command line is wrong
    BAD_FILE = 65  # a file the user wrote is wrong
    BUSY = 75  # another apply is running; try again later


class DgxKvmError(Exception):
    """Base of all errors with a sentence for the user: `message` says what, `hint` what to do."""

    exit_code = ExitCode.FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(DgxKvmError):
    """The command line asks for something that does not exist or does not fit together."""

    exit_code = ExitCode.USAGE


class HostError(DgxKvmError):
    """The machine is not as it has to be (a file unreadable, a disk full, no such device)."""


class NoTemplateError(HostError):
    """No template has this name."""


class HypervisorError(DgxKvmError):
    """libvirt could not be reached or refused a request."""


class BusyError(DgxKvmError):
    """Another process holds the lock."""

    exit_code = ExitCode.BUSY


class StalePlanError(DgxKvmError):
    """A saved plan no longer matches the host or the files it was made from."""


WITHHELD = "(line not shown, it may hold a secret)"


@dataclasses.dataclass(frozen=True)
class Problem:
    """One mistake in a file. Lines and columns count from 1; 0 means the whole file."""

    file: str
    line: int
    column: int
    end_line: int
    end_column: int
    path: str  # "vms[2].gpus"; empty for the document itself
    message: str
    hint: str = ""
    snippet: str = ""  # the source line, without its newline, or WITHHELD

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        subject = f"{self.path}: " if self.path else ""
        hint = f" ({self.hint})" if self.hint else ""
        text = f"{where}: {subject}{self.message}{hint}"
        if self.snippet.strip():
            text += f"\n    {self.snippet}"
            text += f"\n    {self._carets()}" if self.snippet != WITHHELD else ""
        return text

    def _carets(self) -> str:
        """Point at the columns of the snippet; a wide character of East Asia takes two places."""
        start = self.column - 1
        end = max(start + 1, self.end_column - 1 if self.end_line == self.line else 0)
        before, marked = self.snippet[:start].ljust(start), self.snippet[start:end] or " "
        blank = "".join("\t" if char == "\t" else " " * _places(char) for char in before)
        return blank + "^" * max(1, sum(map(_places, marked)))


def _places(char: str) -> int:
    """How many places of a terminal a character takes."""
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


class BadFileError(DgxKvmError):
    """A file the user wrote is wrong; `problems` holds every mistake found, in file order."""

    exit_code = ExitCode.BAD_FILE

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems
