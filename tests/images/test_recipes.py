"""The recipes of guest-images/: which images there are, and what is said of a wrong recipe."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dgx_kvm_sw.model.errors import BadFileError, UsageError
from tools.images import recipes
from tools.images.recipes import RECIPES, RecipeError

GOOD = """\
title: Debian 99
os: debian
release: "99"
suite: forky
packages: [linux-image-amd64]
variants: {plain: {}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Recipes with one image, debian-99."""
    for name in ("common.yaml", "recipe.schema.json"):
        shutil.copy(RECIPES / name, tmp_path)
    (tmp_path / "hooks").mkdir()
    (tmp_path / "debian-99").mkdir()
    (tmp_path / "debian-99/recipe.yaml").write_text(GOOD)
    return tmp_path


def test_the_recipes_are_of_three_debians_and_three_ubuntus() -> None:
    images = {image.name: image for image in recipes.every()}
    plain = {name for name, image in images.items() if image.variant == "plain"}
    assert plain == {
        *(f"debian-{release}" for release in ("11", "12", "13")),
        *(f"ubuntu-{release}" for release in ("20.04", "22.04", "24.04")),
    }


def test_older_debians_have_the_branch_of_older_gpus_too() -> None:
    """As many as Debian has in each release: 470 is the last one that knows Kepler."""
    found = {(image.os, image.release, image.driver) for image in recipes.every() if image.driver}
    wanted = {("11", "470"), ("12", "470"), ("12", "535"), ("13", "535"), ("13", "550")}
    assert {(release, driver) for os, release, driver in found if os == "debian"} == wanted


def test_every_release_has_a_variant_with_a_driver() -> None:
    releases = {(image.os, image.release) for image in recipes.every()}
    assert releases == {(each.os, each.release) for each in recipes.every() if each.driver}


def test_a_variant_adds_to_what_the_release_and_all_images_have() -> None:
    plain, cuda = recipes.find("debian-12"), recipes.find("debian-12-cuda-535")
    assert "cloud-init" in plain.packages
    assert set(cuda.packages) > set(plain.packages)
    assert (plain.driver, plain.components) == ("", ())
    assert (cuda.driver, cuda.variant, cuda.package) == (
        "535",
        "cuda-535",
        "dgx-kvm-image-debian-12-cuda-535",
    )
    assert "non-free" in cuda.components


@pytest.mark.parametrize(
    ("name", "known"), [("debain-12", "debian-12"), ("debian-12-cuda-999", "debian-12-cuda-535")]
)
def test_an_unknown_image_is_told_beside_those_there_are(name: str, known: str) -> None:
    with pytest.raises(UsageError, match=f"no recipe for an image {name}") as caught:
        recipes.find(name)
    assert known in caught.value.hint


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        ('"99"', "99", "recipe.yaml:3:10: release: 99 is not a release number as text"),
        ("os: debian", "os: debain", "did you mean `debian`?"),
        ("suite", "siute", "did you mean `suite`?"),
        ("[linux-image-amd64]", "linux-image-amd64", "is not a list of package names"),
        ("[linux-image-amd64]", "[Linux Image]", "'Linux Image' is not a package name"),
        ("plain: {}", "plain: {driver: 535}", "driver: 535 is not a driver branch as text"),
        ("variants: {plain: {}}", "", "`variants` is missing"),
        ("title", "title: {\nx", "recipe.yaml:"),
    ],
)
def test_a_wrong_recipe_is_told_with_its_place(
    folder: Path, good: str, bad: str, said: str
) -> None:
    (folder / "debian-99/recipe.yaml").write_text(GOOD.replace(good, bad, 1))
    with pytest.raises(BadFileError) as caught:
        recipes.every(folder)
    assert said in str(caught.value)


def test_a_wrong_recipe_hinders_no_other_image(folder: Path) -> None:
    shutil.copytree(folder / "debian-99", folder / "debian-98")
    (folder / "debian-98/recipe.yaml").write_text("nothing\n")
    assert recipes.find("debian-99", folder).name == "debian-99"


def test_a_folder_has_the_name_of_its_image(folder: Path) -> None:
    (folder / "debian-99").rename(folder / "debian-98")
    with pytest.raises(RecipeError, match="is about debian 99") as caught:
        recipes.every(folder)
    assert "debian-99" in caught.value.hint


def test_hooks_run_by_name_and_an_image_replaces_a_shared_one(folder: Path) -> None:
    own = folder / "debian-99/hooks"
    own.mkdir()
    for hook in (folder / "hooks/20-b", folder / "hooks/30-c", own / "30-c", own / "10-a"):
        hook.touch(0o755)
    (own / "README").touch()
    assert recipes.find("debian-99", folder).hooks == (
        own / "10-a",
        folder / "hooks/20-b",
        own / "30-c",
    )


def test_a_hook_that_is_not_executable_is_told(folder: Path) -> None:
    (folder / "hooks/20-b").touch(0o644)
    with pytest.raises(RecipeError, match="20-b is not executable"):
        recipes.find("debian-99", folder)
