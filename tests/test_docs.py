import re
from pathlib import Path

import influence

ROOT = Path(__file__).parent.parent


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_ci_calls_exactly_the_test_command_of_the_readme():
    commands = re.findall(r"^pip install .*$", text("README.md"), re.MULTILINE)
    assert len(commands) == 2
    assert text(".ci/run").splitlines()[-1] == commands[1]


def test_every_method_and_command_is_documented():
    for method in influence.METHODS:
        assert f"`{method}`" in text("README.md") or f"`{method}`" in text("CHANGELOG.md")
    for command in ("build", "attribute", "inspect", "verify", "exclude", "demo", "extract"):
        assert f"influence {command}" in text("README.md")


def test_the_architecture_names_every_module_and_no_other():
    modules = {path.name for path in (ROOT / "influence").glob("*.py")} - {"__init__.py"}
    assert (
        set(re.findall(r"`(\w+\.py)`", text("ARCHITECTURE.md").split("## The estimator")[0])) - {"tests/test_layers.py"}
        == modules
    )


def test_every_test_that_the_promises_name_exists():
    named = set(re.findall(r"`(test_\w+)`", text("PROMISES.md")))
    there = {name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", text(path))}
    assert len(named) > 30 and named <= there, named - there


def test_every_public_name_has_a_docstring():
    for name in influence.__all__:
        value = getattr(influence, name)
        assert not callable(value) or value.__doc__


def test_lines_are_short_and_files_are_utf8():
    for path in ROOT.rglob("*"):
        inside = path.relative_to(ROOT).parts[0] in ("influence", "cli", "data", "tests", "benchmarks", "paper")
        if path.suffix in (".py", ".md", ".toml") and (inside or path.parent == ROOT):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                assert len(line) <= 120, f"{path}:{number}"
