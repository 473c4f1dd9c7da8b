"""The argument tree: what a command line may say. Help, man page and completion come from it."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Sequence

from dgx_kvm_sw.cli.overview import DESCRIPTION, USAGE, overview
from dgx_kvm_sw.cli.verbs import VERBS, add_everywhere

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_DEFAULTS = {
    "file": None,
    "simulate": None,
    "state": None,
    "root": None,
    "connect": None,
    "json": False,
    "quiet": False,
    "debug": False,
    "no_color": False,
}
_CHOICE = re.compile(r"invalid choice: (\S+) \(choose from (.*)\)")
_TYPE = re.compile(r"invalid (.+) value: (.*)")


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are ours to print, as sentences."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        from dgx_kvm_sw.model.errors import UsageError

        raise UsageError(*_sentence(message, self.prog))


class _Main(Parser):
    def format_help(self) -> str:
        return f"{overview()}\n"


class _Version(argparse.Action):
    """Looks the version up when it is asked for: that takes as long as all of `--help`."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from dgx_kvm_sw.cli.version import version

        print(f"dgx-kvm {version()}")
        parser.exit()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """As wide as the terminal, up to 100 columns. Without a width argparse imports shutil."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(_columns(), 100))


def _columns() -> int:
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal():
        return max(60, int(columns))
    try:
        return max(60, os.get_terminal_size(1).columns)
    except OSError:
        return 100


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read a command line; raises UsageError, or SystemExit after --help and --version."""
    parser, parsers = tree(needed=words)
    args, rest = parser.parse_known_args(words, argparse.Namespace(**_DEFAULTS))
    if rest:
        words_of_verb = " ".join(filter(None, (args.verb, getattr(args, "action", ""))))
        known = re.findall(r"--[a-z0-9-]+", parsers[words_of_verb].format_help())
        _raise_unknown(rest[0], f"dgx-kvm {words_of_verb}", known)
    if args.json and not any(verb.name == args.verb and verb.reads for verb in VERBS):
        parser.error(f"`{args.verb}` has no --json; verbs that only look have")
    return args


def tree(needed: Iterable[str] | None = None) -> tuple[Parser, dict[str, Parser]]:
    """Return the parser and those of its verbs, by name; an action of a verb is "image list".

    Only the verbs among the words `needed` get their options; None means all.
    """
    parser = _Main(prog="dgx-kvm", usage=USAGE, description=DESCRIPTION)
    verbs = parser.add_subparsers(
        title="verbs",
        dest="verb",
        metavar="VERB",
        required=True,
        prog="dgx-kvm",
        parser_class=Parser,
    )
    add_everywhere(parser, reads=True)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    parsers = {}
    for verb in VERBS:
        sub = verbs.add_parser(
            verb.name,
            help=verb.title,
            description=f"{verb.title[0].upper()}{verb.title[1:]}.\n{verb.about}".rstrip(),
            epilog=f"examples:\n{_indented(verb.examples)}",
        )
        if needed is None or verb.name in needed:
            verb.add_options(sub)
            add_everywhere(sub, reads=verb.reads)
        parsers[verb.name] = sub
        parsers |= {f"{verb.name} {name}": nested for name, nested in actions_of(sub)}
    return parser, parsers


def actions_of(parser: argparse.ArgumentParser) -> list[tuple[str, Parser]]:
    """The actions of a verb, such as `list` of `image`; most verbs have none."""
    return [
        (name, nested)
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, nested in action.choices.items()
    ]


def _indented(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


# -- mistakes ---------------------------------------------------------------------------------


def _sentence(message: str, prog: str) -> tuple[str, str]:
    """Turn argparse's words into a sentence and a hint."""
    help_hint = f"`{prog} --help` shows how it is used"
    subject, _, rest = message.partition(": ")
    subject = subject.removeprefix("argument ").split("/")[-1]
    if choice := _CHOICE.search(message):
        word = choice[1].strip("'")
        options = choice[2].replace("'", "").split(", ")
        hint = _nearest(word, options, f"choose from {', '.join(options)}")
        kind = {"VERB": "verb", "MODE": "mode", "ACTION": "action"}.get(subject, "platform")
        return f"there is no {kind} {word!r}", hint
    if rest == "VERB":
        return "a verb is missing: what is to be done?", "`dgx-kvm --help` lists the verbs"
    if message.startswith("the following arguments are required: "):
        return f"{rest} is missing", help_hint
    if wrong := _TYPE.search(message):
        return f"{subject}: {wrong[2]} is not {wrong[1]}", help_hint
    if message.startswith("argument ") and rest.startswith("expected"):
        return f"{subject} needs {rest.removeprefix('expected ')}", help_hint
    return message.removeprefix("argument "), help_hint


def _raise_unknown(word: str, prog: str, known: Sequence[str]) -> NoReturn:
    from dgx_kvm_sw.model.errors import UsageError

    what = "option" if word.startswith("-") else "use for"
    shown = word.split("=")[0]
    hint = _nearest(shown, known, f"`{prog} --help` lists its options")
    raise UsageError(f"`{prog}` has no {what} {shown!r}", hint)


def _nearest(word: str, options: Sequence[str], otherwise: str) -> str:
    import difflib

    close = difflib.get_close_matches(word, options, 1)
    return f"did you mean {close[0]}?" if close else otherwise
