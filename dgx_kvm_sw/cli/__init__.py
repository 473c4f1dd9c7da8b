"""The command line: parse, run the verb, and turn every error into words in one place.

Modules are imported when a verb needs them, so that `--help` is there at once.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_INTERRUPTED = 130  # 128 + SIGINT, as shells count
_NO_READER = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal lacks is no error
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(words)
    except SystemExit as done:  # argparse has printed help or the version
        code = done.code if isinstance(done.code, int) else 1
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough: `dgx-kvm plan | head -1`
        code = _NO_READER
    except Exception as error:
        code = _report(error, words)
    return _flush(code)


def _run(words: Sequence[str]) -> int:
    if words[:1] in (["-h"], ["--help"]):
        from dgx_kvm_sw.cli.overview import overview

        print(overview())
        return 0
    import importlib

    from dgx_kvm_sw.cli.arguments import parse
    from dgx_kvm_sw.cli.verbs import VERBS

    args = parse(words)
    verb = next(verb for verb in VERBS if verb.name == args.verb)
    module = importlib.import_module(f"dgx_kvm_sw.cli.{verb.module}")
    return int(getattr(module, verb.name)(args))


def _report(error: Exception, words: Sequence[str]) -> int:
    """Say what went wrong; where in the program it did only with --debug."""
    from dgx_kvm_sw.cli.output import complain, say_error_json
    from dgx_kvm_sw.model.errors import BadFileError, DgxKvmError

    if "--debug" in words:
        import traceback

        traceback.print_exc()
    if isinstance(error, DgxKvmError):
        if isinstance(error, BadFileError):
            print(error.message, file=sys.stderr)
        else:
            complain(error.message, error.hint)
        if "--json" in words:
            say_error_json(error)
        return int(error.exit_code)
    if isinstance(error, OSError):
        name = f" {error.filename}" if error.filename else ""
        complain(f"the system refused: {(error.strerror or str(error)).lower()}{name}")
    else:
        complain(
            f"this should not have happened: {type(error).__name__}: {error}",
            "please report it, with what the same command prints with --debug",
        )
    return 1


def _flush(code: int) -> int:
    """Write out what is still buffered; a full disk behind stdout is a failure of the command."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
    except OSError as error:
        _discard_output()
        print(f"dgx-kvm: cannot write the output: {error.strerror}", file=sys.stderr)
        return code or 1
    return code


def _discard_output() -> None:
    """Else Python tries once more at its end and complains in words of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
