"""Other programs: the only module that starts any."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import NoReturn

from dgx_kvm_sw.model.errors import HostError


def become(argv: Sequence[str], package: str) -> NoReturn:
    """Replace this process by another program, which has the terminal then."""
    program = shutil.which(argv[0])
    if not program:
        raise HostError(f"there is no program {argv[0]}", f"install it: apt install {package}")
    sys.stdout.flush()  # what is buffered would be lost
    sys.stderr.flush()
    try:
        os.execv(program, list(argv))
    except OSError as error:
        raise HostError(f"cannot run {program}: {(error.strerror or '').lower()}") from error
