"""Machines to install the package on, one for each test; roots are made once."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from package import bases, debs, machine
from package.bases import SUITES, Base
from package.machine import Machine

Start = Callable[[Base], AbstractContextManager[Machine]]
Hosts = Callable[[str, bool], Base]  # by release, and whether the slow tools are stand-ins

_LENT = [Path("/etc") / name for name in ("hosts", "resolv.conf", "ssl/certs/ca-certificates.crt")]
_PROGRAMS = ("mmdebstrap", "dpkg-deb", "unshare", "nsenter", "ip")


@pytest.fixture(autouse=True)
def _no_commands() -> None:
    """Here every test runs commands, so the guard of the unit tests is off."""


@pytest.fixture(scope="session", autouse=True)
def _able() -> None:
    lacking = [name for name in _PROGRAMS if not shutil.which(name, path=machine.PATH)]
    reason = "needs root" if os.geteuid() else f"needs {', '.join(lacking)}" if lacking else ""
    if reason:
        if os.environ.get("CI"):
            pytest.fail(f"{reason}; in CI this test must run")
        pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def _this_machine_stays_as_it_is() -> Iterator[None]:
    """What roots get of it for downloads, packages in them may change: in their copies only."""
    files = [file for file in _LENT if file.exists()]
    before = [file.read_bytes() for file in files]
    yield
    assert [file.read_bytes() for file in files] == before


@pytest.fixture(scope="session")
def deb() -> Path:
    return debs.built()


@pytest.fixture(scope="session")
def newer(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same package with a higher version."""
    version = f"{debs.field(deb, 'Version')}+next"
    return debs.with_version(deb, version, tmp_path_factory.mktemp("newer"))


@pytest.fixture(params=SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def sysfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return machine.lay_out_sysfs(tmp_path_factory.mktemp("dgx2"))


@pytest.fixture(scope="session")
def closure(deb: Path) -> Callable[[str], Base]:
    """Roots by release that have all the package needs, and all a host needs to start."""

    def of(suite: str) -> Base:
        relations = f"{debs.field(deb, 'Depends')}, {bases.BOOTABLE}"
        return bases.with_packages(bases.bare(suite), "host", relations)

    return of


@pytest.fixture(scope="session")
def ready(
    closure: Callable[[str], Base], sysfs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Hosts:
    """Hosts by release with kernels, images and a boot menu, without the package."""

    @functools.cache
    def of(suite: str, quick: bool) -> Base:
        folder = tmp_path_factory.mktemp(f"ready-{suite}")
        with machine.live(closure(suite), folder / "mount", sysfs) as host:
            machine.prepare(host, quick=quick)
            return machine.checkpoint(host, closure(suite), folder / "layer")

    return of


@pytest.fixture(scope="session")
def installed(
    ready: Hosts, deb: Path, sysfs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Hosts:
    """The same with the package installed, so KVM mode armed."""

    @functools.cache
    def of(suite: str, quick: bool) -> Base:
        folder = tmp_path_factory.mktemp(f"installed-{suite}")
        with machine.live(ready(suite, quick), folder / "mount", sysfs) as host:
            host("dpkg", "--install", host.copy_in(deb))
            host("rm", f"/tmp/{deb.name}")
            return machine.checkpoint(host, ready(suite, quick), folder / "layer")

    return of


@pytest.fixture
def start(sysfs: Path, tmp_path: Path) -> Start:
    """Start live machines; each is gone at the end of its `with`."""
    numbers = iter(range(1000))
    return lambda base: machine.live(base, tmp_path / f"machine-{next(numbers)}", sysfs)


@pytest.fixture
def quick() -> bool:
    """Whether update-grub and update-initramfs are stand-ins; tests with the real ones say no."""
    return True


@pytest.fixture
def host(ready: Hosts, suite: str, quick: bool, start: Start) -> Iterator[Machine]:
    """A live host without the package."""
    with start(ready(suite, quick)) as started:
        yield started


@pytest.fixture
def armed(installed: Hosts, suite: str, quick: bool, start: Start) -> Iterator[Machine]:
    """A live host that will boot in KVM mode."""
    with start(installed(suite, quick)) as started:
        yield started


@pytest.fixture
def image(
    closure: Callable[[str], Base], suite: str, sysfs: Path, tmp_path: Path
) -> Iterator[Machine]:
    """A root that somebody builds in a chroot."""
    with machine.chroot(closure(suite), tmp_path / "image", sysfs) as started:
        yield started
