"""The systemd generator: which units do not start in KVM mode."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.commands

GENERATOR = Path(__file__).parents[1] / "debian/host/generator"
CONDITION = "[Unit]\nConditionKernelCommandLine=!dgx_kvm.mode=kvm\n"
KVM = "ro dgx_kvm.mode=kvm"


def write(root: Path, name: str, text: str = "") -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def gated(root: Path, words: str) -> tuple[set[str], str]:
    """Return the units with a drop-in, each in its place and with its text, and stderr."""
    write(root, "proc/cmdline", f"{words}\n")
    outputs = [root / name for name in ("normal", "early", "late")]
    for output in outputs:
        output.mkdir()
    done = subprocess.run(
        ["sh", GENERATOR, *outputs],
        env={"DGX_KVM_ROOT": str(root), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    files = [path for output in outputs for path in output.rglob("*") if path.is_file()]
    for path in files:
        assert path.parent.parent == outputs[1]  # wins over /etc, which "normal" does not
        assert path.name == "zz-dgx-kvm.conf"  # last, as an empty assignment resets conditions
        assert path.read_text() == CONDITION
    return {path.parent.name.removesuffix(".d") for path in files}, done.stderr


def test_services_of_the_gpus_are_gated(tmp_path: Path) -> None:
    units, words = gated(tmp_path, KVM)
    assert not words
    assert units >= {
        "nvidia-fabricmanager.service",
        "nvidia-persistenced.service",
        "nvidia-dcgm.service",
        "nvidia-mig-manager.service",
        "nvidia-acs-disable.service",
    }
    assert "docker.service" not in units


@pytest.mark.parametrize("words", ["ro quiet", "dgx_kvm.mode=kvm2", "a.dgx_kvm.mode=kvm"])
def test_bare_metal_gets_no_file(tmp_path: Path, words: str) -> None:
    write(tmp_path, "etc/dgx-kvm/gated-services", "docker.service\n")
    assert gated(tmp_path, words) == (set(), "")


def test_shared_fabric_needs_its_fabric_manager(tmp_path: Path) -> None:
    units, _ = gated(tmp_path, f"{KVM} dgx_kvm.nvswitch=host")
    assert "nvidia-fabricmanager.service" not in units
    assert "nvidia-persistenced.service" in units


@pytest.mark.parametrize("folder", ["usr/lib", "lib", "etc"])
def test_installed_nvsm_services_are_found(tmp_path: Path, folder: str) -> None:
    write(tmp_path, f"{folder}/systemd/system/nvsm-core.service")
    write(tmp_path, f"{folder}/systemd/system/other.service")
    units, _ = gated(tmp_path, KVM)
    assert "nvsm-core.service" in units
    assert "other.service" not in units


def test_administrator_adds_units(tmp_path: Path) -> None:
    text = "# mine\n\ndocker.service  # and more\nraid.mount\nbackup@gpu.timer"
    write(tmp_path, "etc/dgx-kvm/gated-services", text)
    units, words = gated(tmp_path, KVM)
    assert not words
    added = {unit for unit in units if "nvidia" not in unit and "dcgm" not in unit}
    assert added == {"cachefilesd.service", "docker.service", "raid.mount", "backup@gpu.timer"}


@pytest.mark.parametrize("name", ["docker", "a/x.service", ".service"])
def test_names_that_are_no_units_are_reported(tmp_path: Path, name: str) -> None:
    write(tmp_path, "etc/dgx-kvm/gated-services", f"{name}\ndocker.service\n")
    units, words = gated(tmp_path, KVM)
    assert "docker.service" in units
    assert f"gated-services: {name} " in words
    assert len(words.splitlines()) == 1


def test_list_says_what_would_be_gated_and_writes_nothing(tmp_path: Path) -> None:
    write(tmp_path, "proc/cmdline", "ro quiet\n")
    write(tmp_path, "etc/dgx-kvm/gated-services", "docker.service\n")
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        ["sh", GENERATOR, "--list"],
        env={"DGX_KVM_ROOT": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    units = done.stdout.splitlines()
    assert {"docker.service", "nvidia-fabricmanager.service"} <= set(units)
    assert sorted(tmp_path.rglob("*")) == before
