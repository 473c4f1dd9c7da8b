"""A running QEMU as the kernel shows it: its arguments and where its threads may run."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Qemu:
    """The process of one domain."""

    pid: int

    @property
    def arguments(self) -> str:
        """The command line, one option with its value on each line."""
        words = Path(f"/proc/{self.pid}/cmdline").read_text().rstrip("\0").split("\0")
        return " ".join(words).replace(" -", "\n-")

    def vcpu_affinity(self) -> dict[int, str]:
        """The CPUs that each vCPU's thread may run on, as the kernel lists them."""
        threads = self._threads()
        names = ((re.fullmatch(r"CPU (\d+)/\w+", name), cpus) for name, cpus in threads)
        return {int(name[1]): cpus for name, cpus in names if name}

    def helper_affinity(self) -> set[str]:
        """The same of all its other threads."""
        return {cpus for name, cpus in self._threads() if not name.startswith("CPU ")}

    def _threads(self) -> list[tuple[str, str]]:
        found = []
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(OSError):  # a worker thread that has ended
                status = (task / "status").read_text()
                allowed = re.search(r"^Cpus_allowed_list:\t(.*)$", status, re.MULTILINE)
                found.append(((task / "comm").read_text().strip(), allowed[1] if allowed else ""))
        return found
