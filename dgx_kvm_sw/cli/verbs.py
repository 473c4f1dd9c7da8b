"""The verbs: what each is for, its options, its examples, and where its function is.

`dgx-kvm --help` needs this module only, so it imports next to nothing.
"""

from __future__ import annotations

from dgx_kvm_sw.cli.kinds import gpus as _gpus
from dgx_kvm_sw.cli.kinds import pair as _pair
from dgx_kvm_sw.cli.kinds import path as _path
from dgx_kvm_sw.cli.kinds import seconds as _seconds
from dgx_kvm_sw.cli.kinds import vm_name as _vm_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser as Parser
    from collections.abc import Callable

MODES = ("kvm", "bare-metal")
PLATFORMS = ("dgx2", "dgx-a100", "dgx-h100", "dgx-h200", "dgx-b200")
EVERYWHERE = (
    (("-f", "--file"), "FILE", "another file than /etc/dgx-kvm/vms.yaml"),
    (("--simulate",), "PLATFORM", f"work on a simulated machine: {', '.join(PLATFORMS)}"),
    (("--state",), "DIR", "where it lives; default ~/.local/state/dgx-kvm/PLATFORM"),
    (("--root",), "DIR", "take all files from another root than /"),
    (("--connect",), "URI", "another libvirt than qemu:///system"),
    (("--json",), "", "print JSON, for programs; verbs that only look have it"),
    (("-q", "--quiet"), "", "print only what went wrong"),
    (("--debug",), "", "show where an unexpected error comes from"),
    (("--no-color",), "", "print without colours, as NO_COLOR=1 does"),
)


class Verb:
    """`run` is the function of the verb's name in dgx_kvm_sw.cli.`module`."""

    def __init__(
        self,
        name: str,
        module: str,
        title: str,
        about: str,
        examples: tuple[str, ...],
        add_options: Callable[[Parser], None],
        *,
        reads: bool,
    ) -> None:
        self.name = name
        self.module = module
        self.title = title
        self.about = about
        self.examples = examples
        self.add_options = add_options
        self.reads = reads  # changes nothing; has --json


def add_everywhere(parser: Parser, *, reads: bool) -> None:
    """Add the options that stand before or after the verb."""
    from argparse import SUPPRESS  # no default, which would undo what stands before the verb

    group = parser.add_argument_group("options of every verb")
    for names, metavar, text in EVERYWHERE:
        if names == ("--json",) and not reads:
            continue
        if metavar:
            choices = PLATFORMS if metavar == "PLATFORM" else None
            group.add_argument(
                *names, metavar=metavar, type=_path, help=text, choices=choices, default=SUPPRESS
            )
        else:
            group.add_argument(*names, action="store_true", help=text, default=SUPPRESS)


# -- options of each verb -----------------------------------------------------------------------


def _validate(parser: Parser) -> None:
    parser.add_argument(
        "spec", metavar="FILE", nargs="?", type=_path, help="the file to check, instead of -f"
    )


def _intent(parser: Parser) -> None:
    parser.add_argument(
        "--restart", action="store_true", help="stop or restart running VMs where that is declared"
    )
    parser.add_argument(
        "--prune", action="store_true", help="delete VMs that are no longer in the file"
    )
    parser.add_argument(
        "--delete-disks", action="store_true", help="with --prune: delete their disks too"
    )


def _plan(parser: Parser) -> None:
    _intent(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=_path,
        help="save the plan, for `dgx-kvm apply FILE`; of files that are there, only an older plan"
        " is replaced",
    )


def _diff(parser: Parser) -> None:
    parser.add_argument("--xml", action="store_true", help="compare libvirt's XML instead")


def _apply(parser: Parser) -> None:
    parser.add_argument(
        "plan",
        metavar="FILE",
        nargs="?",
        type=_path,
        help="a plan saved by `dgx-kvm plan -o`: do exactly that, or nothing if anything has"
        " changed since",
    )
    _intent(parser)
    _power(parser)
    _wait(parser)


def _power(parser: Parser) -> None:
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=120.0,
        help="how long a guest may take to shut down (default: 120)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="pull the plug of a guest that is still up after the timeout",
    )


def _wait(parser: Parser, seconds: float = 0.0) -> None:
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=_seconds,
        default=seconds,
        help=f"how long to wait for another dgx-kvm to end (default: {seconds:g})",
    )


def _status(parser: Parser) -> None:
    parser.add_argument(
        "--check", action="store_true", help="exit with 2 when the machine is not as declared"
    )
    parser.add_argument(
        "--watch", action="store_true", help="draw it again every two seconds until Ctrl-C"
    )


def _create(parser: Parser) -> None:
    def add(name: str, metavar: str, text: str) -> None:
        parser.add_argument(name, metavar=metavar, help=text)

    def add_each(name: str, metavar: str, text: str, dest: str) -> None:
        parser.add_argument(
            name, metavar=metavar, type=_pair, action="append", default=[], help=text, dest=dest
        )

    parser.add_argument("name", metavar="NAME", type=_vm_name, help="its name")
    parser.add_argument(
        "--gpus", metavar="N", type=_gpus, required=True, help="how many GPUs: 0, 1, 2, 4, 8, 16"
    )
    add("--vcpus", "N", "CPU threads, instead of what its size brings")
    add("--memory", "SIZE", "memory, like 160GiB, instead of what its size brings")
    add("--image", "IMAGE", "the guest image of its OS disk; without it the disk is empty")
    add("--tenant", "TENANT", "the tenant it belongs to")
    add_each("--disk", "NAME=SIZE", "a data disk, like data=500GiB; may be repeated", "disks")
    add_each(
        "--network",
        "KIND=NAME",
        "a network, like bridge=br0 or nat=true; may be repeated",
        "networks",
    )
    add("--pin", "GPUS", "these very GPUs: indexes like 8,9, or PCI addresses")
    parser.add_argument("--stopped", action="store_true", help="do not start it")
    _wait(parser)


def _delete(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", type=_vm_name, help="the VM")
    parser.add_argument("--stop", action="store_true", help="shut it down first if it runs")
    parser.add_argument("--delete-disks", action="store_true", help="delete its disks too")
    _power(parser)
    _wait(parser)


def _names(parser: Parser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="+", type=_vm_name, help="the VMs")


def _start(parser: Parser) -> None:
    _names(parser)
    _wait(parser)


def _stop(parser: Parser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="*", type=_vm_name, help="the VMs")
    parser.add_argument("--all", action="store_true", help="every VM that runs")
    _power(parser)
    _wait(parser)


def _restart(parser: Parser) -> None:
    _names(parser)
    _power(parser)
    _wait(parser)


def _watch(parser: Parser) -> None:
    _wait(parser, 3600.0)  # an apply may start many large VMs


def _mode(parser: Parser) -> None:
    parser.add_argument(
        "mode",
        metavar="MODE",
        nargs="?",
        choices=MODES,
        help="kvm or bare-metal: what the next boot is to be; without it, show the mode",
    )
    parser.add_argument(
        "--reboot", action="store_true", help="reboot at once, unless VMs run that it would end"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="say what KVM mode needs and whether it is there; exit with 1 when something is not",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="after a boot in KVM mode: see that every device is where VMs need it",
    )


def _image(parser: Parser) -> None:
    from dgx_kvm_sw.cli.imageoptions import add_image_options

    add_image_options(parser, add_everywhere)


def _one_name(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", type=_vm_name, help="the VM")


def _nothing(parser: Parser) -> None:
    """For verbs without options of their own."""


VERBS = (
    Verb(
        "validate",
        "declare",
        "check vms.yaml and name every mistake in it",
        "Reads the file, the vms.d beside it and the templates of the sizes. Touches nothing.",
        ("dgx-kvm validate", "dgx-kvm validate new-vms.yaml --json"),
        _validate,
        reads=True,
    ),
    Verb(
        "plan",
        "declare",
        "show what apply would do, and do nothing",
        "One line for each VM: + made, ~ changed, -/+ stopped, changed and started, - deleted.\n"
        "The last line sums it up.",
        ("dgx-kvm plan", "dgx-kvm plan --restart -o tonight.json"),
        _plan,
        reads=True,
    ),
    Verb(
        "diff",
        "declare",
        "show where vms.yaml and libvirt differ",
        "In the words of the file: - is what libvirt has, + is what is declared.",
        ("dgx-kvm diff", "dgx-kvm diff --xml"),
        _diff,
        reads=True,
    ),
    Verb(
        "apply",
        "declare",
        "make libvirt hold what vms.yaml declares",
        "Without options no running VM is stopped and nothing is deleted; what would need that is\n"
        "listed with the option it waits for.",
        ("dgx-kvm apply", "dgx-kvm apply --restart", "dgx-kvm apply tonight.json"),
        _apply,
        reads=False,
    ),
    Verb(
        "status",
        "look",
        "draw which VM holds what, what is free, what is broken",
        "Works for every user who may read from libvirt.",
        ("dgx-kvm status", "dgx-kvm status --watch", "dgx-kvm status --check --quiet"),
        _status,
        reads=True,
    ),
    Verb(
        "create",
        "dropins",
        "declare one more VM and make it",
        "Writes vms.d/NAME.yaml beside vms.yaml, then makes this VM and changes nothing else.\n"
        "If it does not fit, nothing stays behind.",
        (
            "dgx-kvm create notebook --gpus 1",
            "dgx-kvm create lab --gpus 2 --image debian-12 --disk data=500GiB --network bridge=br0",
        ),
        _create,
        reads=False,
    ),
    Verb(
        "delete",
        "dropins",
        "delete a VM that create has made",
        "Its disks stay, unless --delete-disks is given.",
        ("dgx-kvm delete notebook", "dgx-kvm delete notebook --stop --delete-disks"),
        _delete,
        reads=False,
    ),
    Verb(
        "start",
        "vms",
        "make the GPUs of VMs ready and start them",
        "They start with the definition that libvirt holds; apply brings it up to date.",
        ("dgx-kvm start hr-train it-lab",),
        _start,
        reads=False,
    ),
    Verb(
        "stop",
        "vms",
        "shut VMs down and release their GPUs",
        "The guest is asked to shut down, and waited for.",
        (
            "dgx-kvm stop hr-train",
            "dgx-kvm stop hr-train --timeout 30 --force",
            "dgx-kvm stop --all",
        ),
        _stop,
        reads=False,
    ),
    Verb(
        "restart",
        "vms",
        "stop and start VMs; changes that waited for it take effect",
        "They start with the definition that libvirt holds; apply brings it up to date.",
        ("dgx-kvm restart hr-train",),
        _restart,
        reads=False,
    ),
    Verb(
        "watch",
        "watch",
        "start VMs again whose guests have rebooted, until it is stopped",
        "A reboot turns a VM off, as its devices must be made ready again. One that reboots too\n"
        "often is left off. In KVM mode dgx-kvm-watch.service runs this.",
        ("dgx-kvm watch",),
        _watch,
        reads=False,
    ),
    Verb(
        "console",
        "vms",
        "open the serial console of a VM",
        "Ctrl+] leaves it.",
        ("dgx-kvm console hr-train",),
        _one_name,
        reads=False,
    ),
    Verb(
        "explain",
        "look",
        "say why a VM has these GPUs, or why it does not fit",
        "Names every set of GPUs that was looked at, with a verdict.",
        ("dgx-kvm explain hr-train",),
        _one_name,
        reads=True,
    ),
    Verb(
        "seed",
        "seed",
        "show what the guest of a VM is told at its first boot",
        "User, keys, addresses, mounts and user data, as cloud-init gets them. Hooks of the stage\n"
        "vm-seed are not run.",
        ("dgx-kvm seed hr-train",),
        _one_name,
        reads=True,
    ),
    Verb(
        "fits",
        "look",
        "say how many more VMs of each size would fit",
        "",
        ("dgx-kvm fits", "dgx-kvm fits --json"),
        _nothing,
        reads=True,
    ),
    Verb(
        "topology",
        "look",
        "draw the machine: NUMA nodes, GPUs, NVSwitches, NICs, drives",
        "Needs neither vms.yaml nor libvirt.",
        ("dgx-kvm topology", "dgx-kvm --simulate dgx-h100 topology"),
        _nothing,
        reads=True,
    ),
    Verb(
        "image",
        "image",
        "list, verify, import and remove guest images",
        "Most images come as packages, dgx-kvm-image-NAME. An upgrade of such a package is for\n"
        "new VMs: disks that are there stay what they were made from.",
        (
            "dgx-kvm image list",
            "dgx-kvm image verify debian-12",
            "dgx-kvm image import noble.img --name ubuntu-24.04 --sha256 0f1e...",
        ),
        _image,
        reads=True,
    ),
    Verb(
        "mode",
        "mode",
        "show whether this host boots bare metal or for VMs, or switch it",
        "In KVM mode the GPUs are the VMs', in bare metal they are the host's. A switch takes\n"
        "effect at the next boot; until then nothing changes, and it can be taken back.",
        (
            "dgx-kvm mode",
            "dgx-kvm mode --check",
            "dgx-kvm mode kvm --reboot",
            "dgx-kvm mode bare-metal",
        ),
        _mode,
        reads=True,
    ),
)
