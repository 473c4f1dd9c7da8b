"""A host with the files of its admin, to load and to be told what is wrong with them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.guest import spec
from dgx_kvm_sw.model.errors import BadFileError, Problem
from dgx_kvm_sw.model.spec import HostSpec, VmSpec

MAIN = "/etc/dgx-kvm/vms.yaml"
SHIPPED = Path(__file__).parents[1] / "etc/dgx-kvm"


class Host:
    """A root folder with the files of an admin in it."""

    def __init__(self, directory: Path) -> None:
        self.root = Root(directory)
        self.images: Collection[str] | None = None
        self.write("vms.yaml", "version: 1\n")

    def write(self, name: str, text: str | bytes) -> None:
        path = self.root.path(f"/etc/dgx-kvm/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    def load(self, text: str | bytes | None = None, validated: str = "") -> HostSpec:
        if text is not None:
            self.write("vms.yaml", text)
        return spec.load(self.root, MAIN, self.images, validated)

    def vm(self, keys: str) -> VmSpec:
        """Load a file with one VM, given as the inside of a YAML flow mapping."""
        (vm,) = self.load(f"version: 1\nvms: [{{name: a, {keys}}}]\n").vms
        return vm

    def problems(self, text: str | bytes | None = None) -> tuple[Problem, ...]:
        with pytest.raises(BadFileError) as caught:
            self.load(text)
        return caught.value.problems

    def problem(self, text: str | bytes | None = None) -> Problem:
        (problem,) = self.problems(text)
        return problem

    def vm_problem(self, keys: str) -> Problem:
        """Return the only problem of a file with one VM, given as in `vm`."""
        return self.problem(f"version: 1\nvms:\n- {{name: a, {keys}}}\n")


def marked(problem: Problem) -> str:
    """Return the part of the source line that a one-line problem points at."""
    assert problem.line == problem.end_line
    return problem.snippet[problem.column - 1 : problem.end_column - 1]
