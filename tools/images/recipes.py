"""Reads the recipes of guest-images/: one file per release, one image per variant of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgx_kvm_sw.guest import yamlsource
from dgx_kvm_sw.guest.schema import violations
from dgx_kvm_sw.model.errors import BadFileError, DgxKvmError, UsageError

RECIPES = Path(__file__).parents[2] / "guest-images"
PLAIN = "plain"


@dataclass(frozen=True)
class Image:
    """One image to build: a release in one of its variants."""

    name: str  # "debian-12", "debian-12-cuda-535"
    title: str
    os: str
    release: str
    suite: str
    variant: str
    driver: str  # branch of the NVIDIA driver, or empty
    components: tuple[str, ...]
    packages: tuple[str, ...]
    optional: tuple[str, ...]
    hooks: tuple[Path, ...]
    overlay: Path

    @property
    def package(self) -> str:
        return f"dgx-kvm-image-{self.name}"


class RecipeError(DgxKvmError):
    """A recipe's folder is not as it has to be."""


def find(name: str, folder: Path = RECIPES) -> Image:
    """Return the image of a name; only its own recipe is read."""
    known = [recipe.name for recipe in _folders(folder)]
    recipe = max((each for each in known if f"{name}-".startswith(f"{each}-")), default="")
    images = {image.name: image for image in load(folder / recipe)} if recipe else {}
    if name not in images:
        choice = ", ".join(images or known)
        raise UsageError(f"there is no recipe for an image {name}", f"there are: {choice}")
    return images[name]


def every(folder: Path = RECIPES) -> tuple[Image, ...]:
    """Return all images of all recipes."""
    return tuple(image for recipe in _folders(folder) for image in load(recipe))


def load(recipe: Path) -> tuple[Image, ...]:
    """Read a folder with a recipe.yaml; what the images of all recipes share lies beside it."""
    shared = _checked(recipe.parent / "common.yaml", _COMMON_SCHEMA)
    schema = (recipe.parent / "recipe.schema.json").read_text(encoding="utf-8")
    text = _checked(recipe / "recipe.yaml", schema)
    if recipe.name != f"{text['os']}-{text['release']}":
        raise RecipeError(
            f"{recipe}/recipe.yaml is about {text['os']} {text['release']}",
            f"name its folder {text['os']}-{text['release']}",
        )
    hooks = _hooks(recipe)
    return tuple(
        Image(
            name=recipe.name if variant == PLAIN else f"{recipe.name}-{variant}",
            title=text["title"] + (f", NVIDIA driver {more['driver']}" if "driver" in more else ""),
            os=text["os"],
            release=text["release"],
            suite=text["suite"],
            variant=variant,
            driver=more.get("driver", ""),
            components=tuple(more.get("components", ())),
            packages=(*shared["packages"], *text["packages"], *more.get("packages", ())),
            optional=tuple(more.get("optional", ())),
            hooks=hooks,
            overlay=recipe.parent / "overlay",
        )
        for variant, more in text["variants"].items()
    )


_COMMON_SCHEMA = """{
    "title": "a mapping of what all images share",
    "type": "object", "additionalProperties": false, "required": ["packages"],
    "properties": {"packages": {
        "title": "a list of package names", "type": "array",
        "items": {"title": "a package name", "type": "string", "pattern": "^[a-z0-9+.-]+$"}
    }}
}"""


def _folders(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/recipe.yaml"))


def _checked(file: Path, schema: str) -> Any:
    try:
        document = yamlsource.parse(str(file), file.read_bytes())
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error.strerror}") from error
    problems = document.problems
    if document.complete:
        problems = (*problems, *violations(document, schema))
    if problems:
        raise BadFileError(tuple(dict.fromkeys(problems)))
    return document.value


def _hooks(recipe: Path) -> tuple[Path, ...]:
    """All hooks in the order of their names; a recipe's own stands in for a shared one's."""
    found = {
        path.name: path
        for folder in (recipe.parent / "hooks", recipe / "hooks")
        for path in sorted(folder.glob("[0-9]*"))
    }
    for path in found.values():
        if not os.access(path, os.X_OK):
            raise RecipeError(f"the hook {path} is not executable", f"run chmod +x {path}")
    return tuple(found[name] for name in sorted(found))
