"""Time dgx-kvm against its floors, side by side in one run: python3 -m bench.speed.

The floor of `apply` is one python process that connects to libvirt and defines the same sixteen
ready XML texts, validated as ours are. The floor of `--help` is `python3 -c pass`. Each pair is
run in turn; a ratio is taken pair by pair, and the median of the ratios counts, so that a slow
moment of the machine hits both. Exit code 1 when a gate is missed.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parents[1]
DGX_KVM = str(PROJECT / "bin/dgx-kvm")
PYTHON = "/usr/bin/python3"
RUNS = 15
VMS = 16

FLOOR = """
import pathlib, sys, libvirt
connection = libvirt.open(sys.argv[1])
for file in sorted(pathlib.Path(sys.argv[2]).iterdir()):
    connection.defineXMLFlags(file.read_text(), libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
"""


@dataclass(frozen=True)
class Gate:
    what: str
    bound: float
    ratios: tuple[float, ...]
    ours: float  # median seconds
    floor: float

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def __str__(self) -> str:
        verdict = "kept  " if self.ratio <= self.bound else "MISSED"
        spread = f"{min(self.ratios):.2f} to {max(self.ratios):.2f}"
        figures = f"{self.ours * 1e3:6.0f} ms against {self.floor * 1e3:4.0f} ms"
        return (
            f"  {verdict}  {self.what:30} {figures}  ratio {self.ratio:.2f} ({spread}),"
            f" at most {self.bound:g}"
        )


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="dgx-kvm-bench-") as folder:
        machine = Path(folder) / "machine"
        gates = [help_gate(), *apply_gates(machine, Path(folder))]
    print(f"Medians of {RUNS} runs in turn; {VMS} VMs with a GPU each on a simulated DGX-2.")
    for gate in gates:
        print(gate)
    return 0 if all(gate.ratio <= gate.bound for gate in gates) else 1


def help_gate() -> Gate:
    floor = [PYTHON, "-c", "pass"]
    return _compare("--help", 2.0, [DGX_KVM, "--help"], floor, runs=4 * RUNS)


def apply_gates(machine: Path, folder: Path) -> list[Gate]:
    """Fresh: no domain yet, disks made. No-op: all as declared."""
    apply = [DGX_KVM, "--simulate", "dgx2", "--state", str(machine), "apply"]
    _run([*apply[:-1], "fits"])
    rows = [f"  - {{name: vm-{n}, gpus: 1, networks: [{{bridge: br0}}]}}" for n in range(VMS)]
    text = "\n".join(["version: 1", "defaults: {state: stopped}", "vms:", *rows, ""])
    (machine / "etc/dgx-kvm/vms.yaml").write_text(text)
    _run(apply)
    ready = folder / "xml"
    ready.mkdir()
    domains = machine / "libvirt/domains"
    for saved in domains.iterdir():
        xml = json.loads(saved.read_text())["inactive"]
        (ready / f"{saved.stem}.xml").write_text(xml)
    floor = [PYTHON, "-c", FLOOR, f"test://{machine}/libvirt/node.xml", str(ready)]

    def forget_domains() -> None:
        shutil.rmtree(domains)

    return [
        _compare("no-op apply", 2.0, apply, floor),
        _compare("fresh apply", 2.5, apply, floor, before=forget_domains),
    ]


def _compare(
    what: str,
    bound: float,
    ours: list[str],
    floor: list[str],
    runs: int = RUNS,
    before: Callable[[], None] = lambda: None,
) -> Gate:
    pairs = []
    for _ in range(runs + 1):
        before()
        pairs.append((_run(ours), _run(floor)))
    pairs = pairs[1:]  # the first pair warms the caches
    mine, theirs = zip(*pairs, strict=True)
    ratios = tuple(a / b for a, b in pairs)
    return Gate(what, bound, ratios, statistics.median(mine), statistics.median(theirs))


def _run(command: list[str]) -> float:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:6])} failed with {done.returncode}: {done.stderr}")
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
