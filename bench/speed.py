"""Time dgx-kvm against its floors, side by side in one run: `make bench`.

The floor of `apply` is one python process that connects to libvirt and defines the same sixteen
ready XML texts, validated as ours are; once on libvirt's test driver, once on a real libvirtd of
our own. The floor of `--help` is `python3 -c pass`. Each pair is run in turn and a ratio taken
pair by pair; the median of the ratios counts, so that a slow moment of the machine hits both.
Exit code 1 when a gate is missed.
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

import libvirt
from integration.private_libvirtd import missing, private_libvirtd

from dgx_kvm_sw.host import simulate

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
            f"  {verdict}  {self.what:27} {figures}  ratio {self.ratio:.2f} ({spread}),"
            f" at most {self.bound:g}"
        )


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="dgx-kvm-bench-") as folder:
        gates = [help_gate(), *test_driver_gates(Path(folder))]
    with tempfile.TemporaryDirectory(prefix="dgx-kvm-bench-") as folder:
        if reason := missing(Path(folder)):
            print(f"Not measured on a real libvirtd: it {reason}.")
        else:
            gates += real_gates(Path(folder))
    print(f"Medians of {RUNS} runs in turn; {VMS} VMs with a GPU each on the DGX-2 sample machine.")
    for gate in gates:
        print(gate)
    return 0 if all(gate.ratio <= gate.bound for gate in gates) else 1


def help_gate() -> Gate:
    floor = [PYTHON, "-c", "pass"]
    return _compare("--help", 2.0, [DGX_KVM, "--help"], floor, runs=4 * RUNS)


def test_driver_gates(folder: Path) -> list[Gate]:
    machine, ready = folder / "machine", folder / "xml"
    apply = [DGX_KVM, "--simulate", "dgx2", "--state", str(machine), "apply"]
    _run([*apply[:-1], "fits"])  # makes the machine
    _declare(machine)
    _run(apply)
    ready.mkdir()
    domains = machine / "libvirt/domains"
    for saved in domains.iterdir():
        xml = json.loads(saved.read_text())["inactive"]
        (ready / f"{saved.stem}.xml").write_text(xml)
    floor = [PYTHON, "-c", FLOOR, f"test://{machine}/libvirt/node.xml", str(ready)]
    return _gates("test driver", apply, floor, lambda: shutil.rmtree(domains, ignore_errors=True))


def real_gates(folder: Path) -> list[Gate]:
    root, ready = folder / "root", folder / "xml"
    root.mkdir()
    ready.mkdir()
    with private_libvirtd(root) as libvirtd:
        simulate.build("dgx2", root)
        _declare(root)
        apply = [DGX_KVM, "--root", str(root), "--connect", libvirtd.uri, "apply"]
        _run(apply)
        connection = libvirt.open(libvirtd.uri)
        for domain in connection.listAllDomains():
            xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
            (ready / f"{domain.name()}.xml").write_text(xml)

        def forget_domains() -> None:
            for domain in connection.listAllDomains():
                domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)

        floor = [PYTHON, "-c", FLOOR, libvirtd.uri, str(ready)]
        gates = _gates("real libvirtd", apply, floor, forget_domains)
        connection.close()
    return gates


def _declare(machine: Path) -> None:
    rows = [f"  - {{name: vm-{n}, gpus: 1, networks: [{{bridge: br0}}]}}" for n in range(VMS)]
    text = "\n".join(["version: 1", "defaults: {state: stopped}", "vms:", *rows, ""])
    (machine / "etc/dgx-kvm").mkdir(parents=True, exist_ok=True)
    (machine / "etc/dgx-kvm/vms.yaml").write_text(text)


def _gates(
    where: str, apply: list[str], floor: list[str], forget_domains: Callable[[], None]
) -> list[Gate]:
    """No-op: all is as declared. Fresh: no domain yet, but the disks, which the floor has not."""
    return [
        _compare(f"no-op apply, {where}", 2.0, apply, floor),
        _compare(f"fresh apply, {where}", 2.5, apply, floor, before=forget_domains),
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
        mine = _run(ours)
        before()
        pairs.append((mine, _run(floor)))
    pairs = pairs[1:]  # the first pair warms the caches
    ratios = tuple(a / b for a, b in pairs)
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return Gate(what, bound, ratios, *medians)


def _run(command: list[str]) -> float:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:6])} failed with {done.returncode}: {done.stderr}")
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
