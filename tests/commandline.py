"""The command line as tests use it: the real main() on a simulated machine of their own."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dgx_kvm_sw.access.files import Root
from dgx_kvm_sw.cli import main

PROJECT = Path(__file__).parents[1]
DGX_KVM = str(PROJECT / "bin/dgx-kvm")
EIGHT = "version: 1\nvms:\n" + "".join(
    f"  - {{name: vm-{n}, gpus: 2, networks: [{{bridge: br0}}]}}\n" for n in range(8)
)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return self.out.rstrip("\n").rpartition("\n")[2]

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class Host:
    """A simulated machine and the way to command it."""

    directory: Path
    capture: pytest.CaptureFixture[str]
    platform: str = "dgx2"

    @property
    def words(self) -> list[str]:
        return ["--simulate", self.platform, "--state", str(self.directory)]

    @property
    def root(self) -> Root:
        return Root(self.directory)

    @property
    def spec(self) -> Path:
        return self.directory / "etc/dgx-kvm/vms.yaml"

    def __call__(self, command: str, *more: str) -> Result:
        """Run a command in this process; `more` are words that may hold spaces."""
        self.capture.readouterr()
        code = main([*self.words, *command.split(), *more])
        out, err = self.capture.readouterr()
        assert "Traceback" not in err
        return Result(code, out, err)

    def outside(self, command: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run a command in a process of its own."""
        words = [DGX_KVM, *self.words, *command.split()]
        settings = {"capture_output": True, **settings}
        return subprocess.run(words, text=True, check=False, env=os.environ, **settings)

    def declare(self, text: str) -> None:
        self.spec.write_text(text)
