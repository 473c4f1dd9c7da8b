"""What `dgx-kvm --help` prints. It needs no argparse, which takes longer to load than Python."""

from __future__ import annotations

from dgx_kvm_sw.cli.verbs import EVERYWHERE, VERBS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

USAGE = "dgx-kvm [OPTION]... VERB [OPTION]... [ARGUMENT]..."
DESCRIPTION = (
    "GPU virtual machines on NVIDIA DGX servers. Edit /etc/dgx-kvm/vms.yaml, then run\n"
    "`dgx-kvm apply`: libvirt is made to hold what the file declares, each VM with\n"
    "whole GPUs and all that belongs to them. No running VM is stopped unasked."
)
EXIT_CODES = (
    (0, "done, or nothing to do"),
    (1, "something could not be done, or does not fit"),
    (2, "changes are pending (plan, diff, status --check)"),
    (64, "the command line is wrong"),
    (65, "a file you wrote is wrong"),
    (75, "another command is changing the VMs; try again later"),
    (130, "interrupted with Ctrl-C"),
)
EXAMPLES = (
    "dgx-kvm plan",
    "dgx-kvm --simulate dgx2 status",
)
_LEFT = 24  # columns of what is explained


def overview() -> str:
    options = [("-h, --help", "this text; `dgx-kvm VERB --help` explains a verb")]
    options += [(_invocation(names, metavar), text) for names, metavar, text in EVERYWHERE]
    options += [("--version", "print the version")]
    return "\n".join(
        (
            f"usage: {USAGE}",
            "",
            DESCRIPTION,
            *_section("verbs", ((verb.name, verb.title) for verb in VERBS)),
            *_section("options, before or after the verb", options),
            *_section("exit codes", ((str(code), text) for code, text in EXIT_CODES)),
            "",
            "examples:",
            *(f"  {example}" for example in EXAMPLES),
            "",
            "See also dgx-kvm(1) and vms.yaml(5).",
        )
    )


def _invocation(names: tuple[str, ...], metavar: str) -> str:
    return f"{', '.join(names)} {metavar}".rstrip()


def _section(title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    return ["", f"{title}:", *(f"  {left:<{_LEFT}}{text}" for left, text in rows)]
