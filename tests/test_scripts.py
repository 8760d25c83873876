"""The scripts of papers, benchmarks and data use names that exist: they are run by hand, so nothing else would tell."""

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path for folder in ("benchmarks", "data", "paper") for path in (ROOT / folder).glob("*.py"))
NOTHING = object()


def of_package(module, name=None):
    """A module of the package, or a name that `from module import name` would give; NOTHING if there is none."""
    try:
        found = importlib.import_module(module)
        return found if name is None else getattr(found, name)
    except AttributeError:
        return of_package(f"{module}.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("influence"):
            raise
        return NOTHING


def of_script(path):
    """The names that other scripts can import from this one."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        else:
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names


def imports(tree, folder):
    """What a script imports of the package and of its neighbours: name in the script, name elsewhere, what it is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "influence":
                    there = of_package(alias.name)
                    bound = there if alias.asname or there is NOTHING else of_package("influence")
                    yield alias.asname or "influence", alias.name, bound
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "influence":
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}", of_package(node.module, alias.name)
        elif isinstance(node, ast.ImportFrom) and (folder / f"{node.module}.py").exists():
            for alias in node.names:
                found = None if alias.name in of_script(folder / f"{node.module}.py") else NOTHING
                yield alias.asname or alias.name, f"{node.module}.{alias.name}", found


def uses(tree, bound):
    """What a script reads of the modules that it imported, as `keys.normal`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, (ast.Name, ast.Attribute)):
            holder = bound.get(ast.unparse(node.value))
            if isinstance(holder, ModuleType):
                yield ast.unparse(node), getattr(holder, node.attr, NOTHING)


def missing(source, folder):
    """The names of the package and of neighbouring scripts that a script uses and that are not there."""
    tree = ast.parse(source)
    found = list(imports(tree, folder))
    bound = {name: there for name, _, there in found}
    bound |= dict(uses(tree, bound))  # modules of the package by their full name: influence.keys
    gone = {name for _, name, there in found if there is NOTHING}
    return sorted(gone | {name for name, there in uses(tree, bound) if there is NOTHING})


def test_there_are_scripts_in_each_folder():
    assert len(SCRIPTS) > 20 and {path.parent.name for path in SCRIPTS} == {"benchmarks", "data", "paper"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_name_that_a_script_takes_from_the_package_or_its_neighbours_exists(path):
    assert missing(path.read_text(encoding="utf-8"), path.parent) == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from influence.keys import nothing", "influence.keys.nothing"),
        ("from influence.nowhere import normal", "influence.nowhere.normal"),
        ("from influence import keys, nowhere", "influence.nowhere"),
        ("import influence.nowhere", "influence.nowhere"),
        ("import influence\ninfluence.nothing()", "influence.nothing"),
        ("import influence\ninfluence.keys.nothing()", "influence.keys.nothing"),
        ("import influence.keys as k\nk.nothing()", "k.nothing"),
        ("def f():\n    from influence import keys\n    return keys.nothing(1)", "keys.nothing"),
        ("from ground_truth import PAPER, nothing", "ground_truth.nothing"),
    ],
)
def test_a_name_that_is_not_there_is_told(source, name):
    assert missing(source, ROOT / "paper") == [name]


def test_names_that_are_there_are_not_told():
    right = "import influence.keys as k\nimport influence\ninfluence.keys.normal\ninfluence.build\nk.normal"
    assert missing(f"{right}\nfrom ground_truth import PAPER\nfrom influence import pipeline", ROOT / "paper") == []
