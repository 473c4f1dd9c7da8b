"""Kinds of arguments: what a word of the command line may be, or why it may not."""

from __future__ import annotations

SIZES = ("0", "1", "2", "4", "8", "16")


def vm_name(text: str) -> str:
    import re

    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", text):
        raise refused(text, "a VM name: small letters, digits and hyphens, at most 63")
    return text


def path(text: str) -> str:
    """Of a script's unset variable nothing is left, and a verb would take what it takes without."""
    if not text:
        raise refused(text, "a name")
    return text


def seconds(text: str) -> float:
    if not (text.replace(".", "", 1).isdecimal() and text.isascii() and len(text) < 10):
        raise refused(text, "a number of seconds")
    return float(text)


def gpus(text: str) -> int:
    if text not in SIZES:
        raise refused(text, f"a number of GPUs: {', '.join(SIZES)}")
    return int(text)


def pair(text: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not (left and equals and right):
        raise refused(text, "of the form LEFT=RIGHT")
    return left, right


def refused(text: str, wanted: str) -> Exception:
    from argparse import ArgumentTypeError

    return ArgumentTypeError(f"{text[:70]!r} is not {wanted}")
