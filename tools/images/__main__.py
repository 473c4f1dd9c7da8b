"""`python3 -m tools.images`: the images there are, or packages of some; `make images` calls it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dgx_kvm_sw.model.errors import DgxKvmError
from tools.images import recipes
from tools.images.build import TREE, build


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        if args.verb == "list":
            for image in recipes.every():
                print(f"{image.name:22} {image.title}")
            return 0
        # All names first: a typing error is not for after the first build.
        for image in [recipes.find(name) for name in args.images]:
            deb = build(image, args.output, args.fresh)
            print(f"{deb} ({deb.stat().st_size >> 20} MiB)")
    except DgxKvmError as error:
        hint = f"; {error.hint}" if error.hint else ""
        print(f"error: {error.message}{hint}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; what was not finished is gone", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m tools.images", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="print the images there are recipes for")
    builder = verbs.add_parser("build", help="build packages of images")
    builder.add_argument("images", nargs="+", metavar="IMAGE")
    builder.add_argument("--fresh", action="store_true", help="anew, with the archive's updates")
    builder.add_argument("--output", type=Path, default=TREE / "build/images", metavar="FOLDER")
    return parser


if __name__ == "__main__":
    sys.exit(main())
