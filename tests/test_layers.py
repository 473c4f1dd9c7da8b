"""The layers of DESIGN.md as a table: who may import whom, one door per outside world, sizes."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dgx_kvm_sw"
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

# Each part of the package, and the others that it may import; modules of a folder see each other.
MAY_IMPORT: dict[str, set[str]] = {
    "model": set(),
    "decide": {"model"},
    "access": {"model"},
    "host": {"model", "access"},
    "guest": {"model", "access"},
    "disks": {"model", "decide", "access", "guest"},
    "seeds": {"model", "decide", "access", "guest"},
    "reconcile": {"model", "decide", "access", "host", "guest", "disks", "seeds"},
    "execute": {"model", "decide", "access", "host", "guest", "reconcile"},
    "cli": {"model", "decide", "access", "host", "guest", "reconcile", "execute"},
    "__main__": {"cli"},
    "__init__": set(),
}

# Each outside world, and the only modules that may open its door.
DOORS: dict[str, set[str]] = {
    "subprocess": {"access/run.py"},
    "libvirt": {"guest/hypervisor.py", "guest/listener.py"},
    "libvirt_qemu": {"guest/listener.py"},
    "jinja2": {"guest/templates.py"},
    "jsonschema": {"guest/schema.py"},
    "argparse": {"cli/"},
    "ctypes": set(),
    "socket": set(),
    "urllib": set(),
    "requests": set(),
}

PURE = ("model/", "decide/")
IMPURE = {"os", "os.path", "pathlib", "shutil", "io", "glob", "tempfile", "time", "random", "sys"}

MOST_LINES = 450
MOST_LINES_OF_A_FUNCTION = 50
P90_OF_FUNCTIONS = 25


def part(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def tree(module: Path) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text(encoding="utf-8"))


def imports(module: Path) -> Iterator[str]:
    """Every module that is imported, wherever in the file."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            yield str(node.module)
            if node.module == PACKAGE.name:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions(module: Path) -> dict[str, int]:
    """Lines of every function, by where it is."""
    return {
        f"{module}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_downwards(module: Path) -> None:
    used = {name.split(".")[1] for name in imports(module) if name.startswith(f"{PACKAGE.name}.")}
    assert used - {part(module)} <= MAY_IMPORT[part(module)]


def test_the_table_has_no_cycle() -> None:
    ranks: dict[str, int] = {}
    while len(ranks) < len(MAY_IMPORT):
        ready = [n for n, uses in MAY_IMPORT.items() if n not in ranks and uses <= ranks.keys()]
        assert ready
        ranks |= dict.fromkeys(ready, len(ranks))


def test_modules_of_a_folder_import_each_other_in_one_direction() -> None:
    edges = {
        str(module): {name.replace(".", "/").removeprefix("dgx_kvm_sw/") + ".py" for name in used}
        for module in MODULES
        if (used := {name for name in imports(module) if name.startswith("dgx_kvm_sw.")})
    }
    done: set[str] = set()
    while waiting := {name for name in edges if name not in done}:
        leaves = {name for name in waiting if not (edges[name] & waiting)}
        assert leaves, f"these import each other in a circle: {sorted(waiting)}"
        done |= leaves


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_each_outside_world_has_one_door(module: Path) -> None:
    for name in imports(module):
        doors = DOORS.get(name.split(".")[0])
        assert doors is None or any(str(module).startswith(door) for door in doors), name


@pytest.mark.parametrize("module", [m for m in MODULES if str(m).startswith(PURE)], ids=str)
def test_values_and_decisions_touch_no_machine(module: Path) -> None:
    assert not IMPURE & set(imports(module))
    calls = {node.func.id for node in ast.walk(tree(module)) if named_call(node)}  # type: ignore[attr-defined]
    assert not calls & {"open", "print", "input", "exec", "eval"}


def named_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) == "model"], ids=str)
def test_values_are_frozen(module: Path) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ClassDef):
            for decorator in map(ast.unparse, node.decorator_list):
                if "dataclass" in decorator:
                    assert "frozen=True" in decorator, f"{module}:{node.lineno} {node.name}"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_modules_and_functions_are_small(module: Path) -> None:
    assert len((PACKAGE / module).read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    assert {w: n for w, n in functions(module).items() if n > MOST_LINES_OF_A_FUNCTION} == {}


def test_most_functions_are_short() -> None:
    lengths = [length for module in MODULES for length in functions(module).values()]
    assert statistics.quantiles(lengths, n=10)[-1] <= P90_OF_FUNCTIONS


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_module_says_in_one_line_what_it_is(module: Path) -> None:
    assert (ast.get_docstring(tree(module)) or "").splitlines()[0].endswith((".", ":", "?"))


def test_every_domain_is_defined_with_validation() -> None:
    """libvirt drops a misspelt element without it. The simulation loads what has passed before."""
    calls = [
        (str(module), node.func.attr)
        for module in MODULES
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    assert ("guest/hypervisor.py", "defineXMLFlags") in calls
    assert {module for module, name in calls if name == "defineXML"} == {"guest/simulated.py"}
    text = (PACKAGE / "guest/hypervisor.py").read_text(encoding="utf-8")
    assert "defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)" in text
