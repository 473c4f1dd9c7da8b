"""Runs a command until its n-th change of the machine, and then not a step further.

A change is a system call that starts a program or a process, or makes, renames or removes a
file. Counted are those of the command and of all processes it starts, in the order in which they
happen. Either all of them die before the n-th, as in a power cut, or the one that is about to
make it, as when the kernel runs out of memory. (strace counts for each process by itself, so it
would never reach the small programs that do the work.)
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
from pathlib import Path

# x86-64 numbers: open with O_CREAT is left out, as what matters is renamed into place.
_CHANGES = {
    "clone": 56,
    "fork": 57,
    "vfork": 58,
    "execve": 59,
    "ftruncate": 77,
    "rename": 82,
    "mkdir": 83,
    "rmdir": 84,
    "link": 86,
    "unlink": 87,
    "symlink": 88,
    "unlinkat": 263,
    "renameat": 264,
    "renameat2": 316,
    "clone3": 435,
}

SUPPORTED = platform.machine() == "x86_64"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long
_CONT, _SEIZE, _LISTEN = 7, 0x4206, 0x4208
_EVENT_STOP, _EVENT_SECCOMP = 128, 7
# Follow fork, vfork, clone and exec, stop for the filter, and kill all if this process ends.
_OPTIONS = 0x2 | 0x4 | 0x8 | 0x10 | 0x80 | 0x100000
_STOPS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)


def changes(command: tuple[str, ...]) -> list[str]:
    """Run the command to its end and name the program that made each change."""
    return _in_child(command, 0, everything=True)


def cut(command: tuple[str, ...], at: int, *, everything: bool) -> bool:
    """Run the command with a kill before change `at`, from 1; say whether there was one."""
    return len(_in_child(command, at, everything=everything)) >= at


def _in_child(command: tuple[str, ...], at: int, *, everything: bool) -> list[str]:
    """Trace in a process of its own: with it end all it traces."""
    read, write = os.pipe()
    tracer = os.fork()
    if tracer == 0:
        os.close(read)
        with os.fdopen(write, "w") as pipe:
            pipe.write("\n".join(_trace(command, at, everything=everything)))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(tracer, 0)
    return answer.splitlines()


def _trace(command: tuple[str, ...], at: int, *, everything: bool) -> list[str]:
    go_read, go_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(go_read, 1)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        _stop_at_changes()
        os.execvp(command[0], command)
    _ptrace(_SEIZE, child, _OPTIONS)
    os.write(go_write, b"x")
    seen: list[str] = []
    alive = {child}
    over = False
    while True:
        try:
            pid, status = os.waitpid(-1, 0x40000000)  # __WALL
        except ChildProcessError:
            return seen
        if not os.WIFSTOPPED(status):
            alive.discard(pid)
            continue
        alive.add(pid)
        event, number = status >> 16, os.WSTOPSIG(status)
        if event == _EVENT_SECCOMP and not over:
            seen.append(_program(pid))
            if len(seen) == at:
                over = everything
                os.kill(pid, signal.SIGKILL)
        if over:
            for other in alive:
                os.kill(other, signal.SIGKILL)
        elif event == _EVENT_STOP and number in _STOPS:
            _ptrace(_LISTEN, pid, 0)
        else:
            _ptrace(_CONT, pid, 0 if event else number)


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"  # it has been killed by somebody else


def _ptrace(request: int, pid: int, data: int) -> None:
    _libc.ptrace(request, pid, None, data)  # ESRCH: killed meanwhile, and waitpid will say so


def _stop_at_changes() -> None:
    """Have the kernel stop this process and its children at the calls above, and only there."""
    load, jump_if_equal, ret = 0x20, 0x15, 0x06
    allow, trace = 0x7FFF0000, 0x7FF00000
    numbers = sorted(_CHANGES.values())
    program = [(load, 0, 0, 0)]  # the number of the system call
    for index, call in enumerate(numbers):
        program.append((jump_if_equal, len(numbers) - index, 0, call))
    program += [(ret, 0, 0, allow), (ret, 0, 0, trace)]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    text = ctypes.create_string_buffer(code)
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(text))
    assert _libc.prctl(22, 2, header, 0, 0) == 0, "no seccomp filter"  # PR_SET_SECCOMP, FILTER
