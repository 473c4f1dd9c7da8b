"""What may follow `dgx-kvm image`: its actions and their options."""

from __future__ import annotations

from dgx_kvm_sw.cli.kinds import path, seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser as Parser
    from collections.abc import Callable

READING = ("list", "show")  # those that have --json

_LIST = "List the guest images, and which of them cannot be used."
_SHOW = "Show all that is known of an image, and which VMs lie on it."
_VERIFY = (
    "Read the files of images, and what disks lie on, and compare them with their checksums;\n"
    "exit with 1 when one is not as it has to be."
)
_IMPORT = (
    "Make an image of a file: qcow2 or raw, such as the cloud images of distributions. It is\n"
    "copied, so the file is not needed afterwards; nothing stays behind when anything is wrong."
)
_REMOVE = (
    "Remove an imported image, unless a VM's disk lies on it or vms.yaml names it. An image\n"
    "that a package brought goes with its package."
)
_RESCAN = (
    "Run the hooks for images that have come and gone since the last time. Installing or\n"
    "removing an image package does this."
)


def add_image_options(parser: Parser, add_everywhere: Callable[..., None]) -> None:
    actions = parser.add_subparsers(
        title="actions",
        dest="action",
        metavar="ACTION",
        required=True,
        prog="dgx-kvm image",
        parser_class=type(parser),
    )

    def add(name: str, about: str) -> Parser:
        title = about.replace("; ", ". ").replace(": ", ". ").partition(". ")[0].rstrip(".")
        action = actions.add_parser(
            name, help=title[0].lower() + title[1:].replace("\n", " "), description=about
        )
        add_everywhere(action, reads=name in READING)
        return action

    add("list", _LIST)
    add("show", _SHOW).add_argument("name", metavar="IMAGE", help="the image")
    add("verify", _VERIFY).add_argument(
        "names", metavar="IMAGE", nargs="*", help="the images; without any, all"
    )
    _add_import(add("import", _IMPORT))
    remove = add("remove", _REMOVE)
    remove.add_argument("name", metavar="IMAGE", help="the image")
    remove.add_argument(
        "--wait",
        metavar="SECONDS",
        type=seconds,
        default=0.0,
        help="how long to wait for another dgx-kvm to end (default: 0)",
    )
    add("rescan", _RESCAN)


def _add_import(parser: Parser) -> None:
    def option(
        name: str,
        metavar: str,
        text: str,
        kind: Callable[[str], str] = str,
        required: bool = False,
    ) -> None:
        parser.add_argument(name, metavar=metavar, type=kind, help=text, required=required)

    parser.add_argument("image_file", metavar="FILE", type=path, help="the disk image")
    option("--name", "NAME", "what vms.yaml is to call it", required=True)
    option("--sha256", "HEX", "its SHA-256, from a source you trust", required=True)
    option("--version", "VERSION", "like 12.20261122; higher ones replace lower (default: today)")
    option("--title", "TEXT", "a name for people")
    option("--os", "NAME", "the operating system, like debian")
    option("--release", "NAME", "its release, like 12")
    option("--driver", "VERSION", "of the NVIDIA driver in it")
    option("--signature", "FILE", "a detached OpenPGP signature of the disk image", path)
    option("--keyring", "FILE", "the keys that may have signed it", path)
