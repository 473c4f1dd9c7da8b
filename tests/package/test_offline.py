"""An installation at a site without a network, from a bundle alone."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from images.test_package import facts, qcow2

from package import bases
from package.debs import NAME, field
from package.machine import Machine, chroot
from tools import bundle, repository
from tools.images import recipes
from tools.images.package import make_package

pytestmark = pytest.mark.package

PLACE = "/srv/a bundle"  # people do that
IMAGE = "debian-12"
Bundles = Callable[[str], Path]


@pytest.fixture(scope="session")
def bundles(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Bundles by release, of our package and one of a guest image that is small."""
    out, images = tmp_path_factory.mktemp("bundles"), tmp_path_factory.mktemp("images")
    disk = qcow2(images / "image.qcow2")
    image = recipes.find(IMAGE)
    make_package(image, facts(disk, "12.20261122"), disk, images)

    @functools.cache
    def of(suite: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(repository, "BUILT", (str(deb.parent), str(images)))
            return bundle.make(suite, [NAME, image.package], out)

    return of


@pytest.fixture
def site(suite: str, bundles: Bundles, sysfs: Path, tmp_path: Path) -> Iterator[Machine]:
    """A minimal root that has no network but its own, with the bundle."""
    with chroot(bases.bare(suite), tmp_path / "site", sysfs) as started:
        shutil.copytree(bundles(suite), started.path(PLACE))
        yield started


def test_the_bundle_alone_installs_the_package(site: Machine, deb: Path) -> None:
    assert site.run("getent", "hosts", "deb.example").code, "there is a network"
    lists = site.files("/var/lib/apt/lists")
    said = site(f"{PLACE}/install.sh")
    assert site("dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", NAME) == (
        f"installed {field(deb, 'Version')}"
    ), said
    assert "usage" in site("dgx-kvm", "--help").lower()
    assert site("dpkg", "--audit") == ""
    assert "Download is performed unsandboxed" not in said
    # The site's own apt is as it was: its sources, its lists.
    assert site.files("/var/lib/apt/lists") == lists
    assert not [name for name in site.files("/etc/apt") if "dgx-kvm" in name]


def test_guest_images_are_installed_as_the_readme_says(site: Machine) -> None:
    site(f"{PLACE}/install.sh", NAME, f"dgx-kvm-image-{IMAGE}")
    assert "ok, not verified yet" in site("dgx-kvm", "image", "list")
    assert f"{IMAGE}: ok" in site("dgx-kvm", "image", "verify")


def test_what_the_package_merely_suggests_is_there_too(site: Machine) -> None:
    site(f"{PLACE}/install.sh", NAME, "lvm2")
    assert "installed" in site("dpkg-query", "-W", "-f", "${db:Status-Status}", "lvm2")


def test_checksums_fit(site: Machine) -> None:
    site("sh", "-c", f"cd '{PLACE}' && sha256sum --quiet --strict -c SHA256SUMS")
    listed = {line.split("  ")[1] for line in site.read(f"{PLACE}/SHA256SUMS").splitlines()}
    there = {name.removeprefix(f"{PLACE}/") for name in site.files(PLACE)}
    assert there - listed == {"SHA256SUMS"}


def test_the_apt_source_serves_a_bundle_that_stays(site: Machine) -> None:
    site("mv", PLACE, bundle.LASTING)
    site("sh", "-c", "rm -f /etc/apt/sources.list /etc/apt/sources.list.d/*")
    site("cp", f"{bundle.LASTING}/{bundle.SOURCE}", "/etc/apt/sources.list.d/")
    site("apt-get", "-qq", "update")
    site("apt-get", "-qq", "-y", "--no-install-recommends", "install", NAME)
    site("dgx-kvm", "--version")


def test_a_damaged_file_is_named(site: Machine) -> None:
    _refused(site, f"{_change_a_byte(site)}: FAILED")


def test_a_changed_byte_is_refused_where_the_checksums_were_changed_too(site: Machine) -> None:
    _change_a_byte(site)
    _sum_up(site)
    _refused(site, "Unable to fetch some archives")


def test_a_list_that_was_changed_is_refused(site: Machine) -> None:
    release = f"{PLACE}/dists/{site.suite}/InRelease"
    site.write(release, site.read(release).replace("Label: dgx-kvm-sw", "Label: something"))
    _sum_up(site)
    _refused(site, "is not signed")


def test_a_missing_key_is_refused(site: Machine) -> None:
    site.path(f"{PLACE}/{repository.KEYRING}").unlink()
    _refused(site, repository.KEYRING)


def test_another_key_is_refused(site: Machine, tmp_path: Path) -> None:
    home = tmp_path / "keys"
    home.mkdir(mode=0o700)
    gpg = ("gpg", "--homedir", str(home), "--batch", "--quiet")
    repository.run(*gpg, "--passphrase", "", "--quick-generate-key", "somebody", "ed25519")
    site.write(f"{PLACE}/{repository.KEYRING}", repository.run(*gpg, "--armor", "--export"))
    _sum_up(site)
    repository.run("gpgconf", "--homedir", str(home), "--kill", "all")
    _refused(site, "is not signed")


def test_another_release_is_refused(site: Machine) -> None:
    site("sed", "-i", "s/^VERSION_CODENAME=.*/VERSION_CODENAME=forky/", "/etc/os-release")
    _refused(site, f"this is forky, the packages here are for {site.suite}")


def _change_a_byte(site: Machine) -> str:
    """Change one in our package and return the package's name in the bundle."""
    name = next(n for n in site.files(f"{PLACE}/pool") if n.rpartition("/")[2].startswith(NAME))
    data = bytearray(site.path(name).read_bytes())
    data[-100] ^= 1
    site.path(name).write_bytes(data)
    return name.removeprefix(f"{PLACE}/")


def _sum_up(site: Machine) -> None:
    """Make the checksums anew, as somebody could who changes the bundle."""
    site(
        "sh", "-c", f"cd '{PLACE}' && cut -c 67- SHA256SUMS | xargs sha256sum >n && mv n SHA256SUMS"
    )


def _refused(site: Machine, words: str) -> None:
    result = site.run(f"{PLACE}/install.sh")
    assert result.code != 0, result.output
    assert words in result.output
    assert site.run("dpkg-query", "-W", NAME).code, "it was installed all the same"
