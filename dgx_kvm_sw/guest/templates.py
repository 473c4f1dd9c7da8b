"""Templates of domains and seeds: found, checked, and rendered; the one place that uses Jinja.

Search order: the admin's folder, then the pristine set; `dist/NAME` is always pristine, so a
site template can extend it and survive upgrades.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dgx_kvm_sw.access.files import Root, pristine_template_path, template_path
from dgx_kvm_sw.guest.document import Source, Span
from dgx_kvm_sw.model.base import digest
from dgx_kvm_sw.model.errors import BadFileError, HostError, NoTemplateError

API = 1

_API_LINE = re.compile(r"template_api:\s*(\d+)")
_REFERENCE = re.compile(r"""\{%-?\s*(?:extends|include|import|from)\s+["']([^"']+)["']""")
_PRISTINE = "dist/"


class Templates:
    """The templates below one root, each read and compiled once."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._texts: dict[str, str] = {}
        self._environment: Any = None  # a jinja2.Environment, made when something is rendered

    def digest(self, name: str) -> str:
        """Return a digest of a template's text and of all that it extends or includes.

        Found by their quoted names, without Jinja: importing it would double the time of an
        apply that has nothing to do.
        """
        closure = {name: self._text(name)}
        waiting = [name]
        while waiting:
            asking = waiting.pop()
            for match in _REFERENCE.finditer(closure[asking]):
                asked = match.group(1)
                if asked not in closure:
                    closure[asked] = self._referenced(asking, match)
                    waiting.append(asked)
        return digest(closure)

    def _referenced(self, asking: str, match: re.Match[str]) -> str:
        try:
            return self._text(match.group(1))
        except NoTemplateError as error:
            line = match.string.count("\n", 0, match.start()) + 1
            message = f"it needs {match.group(1)}, which is not there"
            raise _problem(self._root, asking, line, message) from error

    def render(self, name: str, **variables: Any) -> str:
        """Render a template; raises BadFileError with the file and line of what is wrong in it."""
        import jinja2

        root = self._root
        _check_api(root, name, self._text(name))
        if self._environment is None:
            self._environment = jinja2.Environment(
                loader=jinja2.FunctionLoader(self._loaded),
                undefined=jinja2.StrictUndefined,
                autoescape=lambda name: bool(name and name.endswith(".xml.j2")),
            )
        try:
            return str(self._environment.get_template(name).render(**variables))
        except jinja2.TemplateSyntaxError as error:
            shown = error.name or name
            raise _problem(root, shown, error.lineno, error.message or "is not valid") from error
        except jinja2.TemplateNotFound as error:
            raise _problem(root, name, 0, f"it needs {error.name}, which is not there") from error
        except RecursionError as error:
            raise _problem(root, name, 0, "it extends or includes itself") from error
        except (
            jinja2.TemplateRuntimeError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
        ) as error:
            file, line = _where(name, error)
            raise _problem(root, file, line, str(error)) from error

    def _loaded(self, name: str) -> tuple[str, str, Callable[[], bool]] | None:
        """A template as Jinja asks for it; None for one that is not there."""
        try:
            return self._text(name), name, lambda: True
        except NoTemplateError:
            return None

    def path(self, name: str) -> Path:
        """Return the file that holds a template."""
        return _path(self._root, name)

    def _text(self, name: str) -> str:
        if name not in self._texts:
            self._texts[name] = _text(self._root, name)
        return self._texts[name]


def _text(root: Root, name: str) -> str:
    path = _path(root, name)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _problem(root, name, 0, "is not UTF-8 text") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise HostError(f"cannot read the template {path}: {reason}") from error


def _path(root: Root, name: str) -> Path:
    if name.startswith(_PRISTINE):
        return pristine_template_path(root, name.removeprefix(_PRISTINE))
    return template_path(root, name)


def _check_api(root: Root, name: str, text: str) -> None:
    first = text.split("\n", 1)[0]
    match = _API_LINE.search(first)
    if not match:
        raise _problem(root, name, 1, f"its first line does not say template_api: {API}")
    if int(match.group(1)) != API:
        raise _problem(
            root, name, 1, f"it is written for template_api {match.group(1)}, this is {API}"
        )


def _where(name: str, error: BaseException) -> tuple[str, int]:
    """Find the innermost template line in a traceback; Jinja rewrites frames to templates."""
    file, line = name, 0
    traceback = error.__traceback__
    while traceback:
        code = traceback.tb_frame.f_code
        if "__jinja_template__" in traceback.tb_frame.f_globals or code.co_filename.endswith(".j2"):
            file, line = code.co_filename, traceback.tb_lineno
        traceback = traceback.tb_next
    return file, line


def _problem(root: Root, name: str, line: int, message: str) -> BadFileError:
    path = _path(root, name)
    text = path.read_text(encoding="utf-8", errors="replace") if line else ""
    source = Source(str(path), text)
    found = source.line(line)
    span = Span(line, len(found) - len(found.lstrip()) + 1, line, len(found) + 1)
    return BadFileError((source.problem(span, message),))
