"""Imports point one way: a module imports only modules that stand before it in the flow."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "influence"
LAYERS = [
    ["errors", "quiet"],
    ["keys", "progress", "devices", "triton_sketch", "spreadsheet", "executors"],
    ["spec", "diffusion", "projection", "curvature", "significance"],
    ["royalties", "verdicts"],
    ["gradients", "scoring", "metrics", "similarity"],
    ["features", "commit", "memory", "adapters"],
    ["allocation", "datasets", "models", "shards", "exclusions", "training"],
    ["items", "finetuning"],
    ["store", "typefaces", "horizon", "taking"],
    ["verification", "figure", "contactsheet", "loading", "retraining"],
    ["waypoints", "halving", "solo"],
    ["building"],
    ["pipeline"],
    ["inspection", "queries", "planning", "nearcopies", "holdout"],
    ["scored", "repair", "readahead"],
    ["ensemble", "wholeway", "scanning"],
    ["derived"],
    ["attribution"],
    ["demo", "doctor", "evaluation", "extraction"],
    ["tables"],
    ["answers"],
    ["export"],
]
_FIRST = ["spec", "diffusion", "projection", "curvature", "significance", "royalties", "verdicts"]
MIDDLE = {*_FIRST, "gradients", "scoring", "metrics", "similarity", "features", "allocation"}
ORDER = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "influence":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("influence."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("influence."))


MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def test_every_module_has_its_place():
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_stands_before_it(name):
    for other in imported(PACKAGE / f"{name}.py"):
        assert ORDER[other] < ORDER[name], f"{name} must not import {other}"


@pytest.mark.parametrize("name", sorted(MIDDLE))
def test_the_middle_layer_opens_no_file_and_prints_nothing(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not called & {"open", "print", "input"}
    assert not modules & {"os", "pathlib", "h5py", "diffusers"}


def test_the_command_line_uses_public_names_only():
    source = (PACKAGE.parent / "cli" / "main.py").read_text(encoding="utf-8")
    assert list(imported(PACKAGE.parent / "cli" / "main.py")) == []
    import influence

    used = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "influence"
    }
    assert used <= set(influence.__all__)


def test_randomness_lives_in_keys_alone():
    for path in PACKAGE.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        for word in ("manual_seed", "torch.rand", "np.random", "default_rng", "random_"):
            assert word not in source or path.stem == "keys", f"{path.name} uses {word}"
