"""The guard against a hand-typed `virsh start`, run by sh with a root of its own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from dgx_kvm_sw.execute import PREPARED

pytestmark = pytest.mark.commands

HOOK = Path(__file__).parents[1] / "debian/host/qemu-hook"
UUID = "89c48e1b-1507-55e1-aa4d-1a9d7a8ad8ad"
METADATA = '<dgx-kvm:vm xmlns:dgx-kvm="urn:dgx-kvm:vm:1" tenant="" template="domain.xml.j2"/>'
OURS = f"""\
<domain type='kvm'>
  <name>rapids</name>
  <uuid>{UUID}</uuid>
  <metadata>
    {METADATA}
  </metadata>
</domain>
"""
FOREIGN = OURS.replace(METADATA, "")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    program = tmp_path / "usr/bin/dgx-kvm"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    (tmp_path / PREPARED.lstrip("/")).mkdir(parents=True)
    return tmp_path


def run(root: Path, operation: str, xml: str) -> tuple[int, str]:
    done = subprocess.run(
        ["sh", HOOK, "rapids", operation, "begin", "-"],
        input=xml,
        env={"DGX_KVM_ROOT": str(root), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stdout  # libvirt takes what a hook prints for the new XML
    return done.returncode, done.stderr


REFUSED = (1, "rapids is started by dgx-kvm only: run dgx-kvm start rapids\n")
ALLOWED = (0, "")


def test_unprepared_vm_is_refused(root: Path) -> None:
    assert run(root, "prepare", OURS) == REFUSED
    assert run(root, "prepare", OURS.replace('"', "'")) == REFUSED


def test_prepared_vm_starts(root: Path) -> None:
    (root / PREPARED.lstrip("/") / UUID).touch()
    assert run(root, "prepare", OURS) == ALLOWED


def test_mark_of_another_vm_does_not_count(root: Path) -> None:
    (root / PREPARED.lstrip("/") / UUID.replace("8", "9")).touch()
    assert run(root, "prepare", OURS) == REFUSED
    assert run(root, "prepare", OURS.replace(UUID, "")) == REFUSED


@pytest.mark.parametrize("operation", ["start", "started", "stopped", "release", "reconnect"])
def test_other_operations_pass(root: Path, operation: str) -> None:
    assert run(root, operation, OURS) == ALLOWED


def test_foreign_domains_start_freely(root: Path) -> None:
    assert run(root, "prepare", FOREIGN) == ALLOWED


def test_without_the_package_it_does_nothing(root: Path) -> None:
    (root / "usr/bin/dgx-kvm").unlink()
    assert run(root, "prepare", OURS) == ALLOWED


def test_shellcheck() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", HOOK], capture_output=True, text=True, check=False)
    assert not done.stdout
