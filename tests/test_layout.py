"""The layout holds: arrows point one way, files stay readable, nothing names a machine or a registry."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

LEVELS = [
    {"pipeline.errors", "pipeline.words", "pipeline.locks", "pipeline"},
    {"pipeline.core"},
    {"pipeline.training", "pipeline.progress", "pipeline.storage", "pipeline.database"},
    {"pipeline.study_file", "pipeline.user_code", "pipeline.objective", "pipeline.study_template"},
    {"pipeline.search"},
    {"pipeline.report"},
    {"pipeline.cli", "pipeline.api"},
    {"pipeline.__main__", "pipeline.reference"},
]
"""What may import what: a level imports only its own and those before it."""

MODULES = sorted((ROOT / "pipeline").rglob("*.py"))


def level(module: str) -> int:
    """Return the level of a module by its longest known prefix."""
    for number, names in reversed(list(enumerate(LEVELS))):
        if any(module == name or (name != "pipeline" and module.startswith(f"{name}.")) for name in names):
            return number
    raise AssertionError(f"{module} has no level; add it to LEVELS")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path):
    """A module imports nothing of a level above its own, not even inside a function."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for node in ast.walk(ast.parse(path.read_text())):
        targets = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        targets += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for target in targets:
            if target.split(".")[0] == "pipeline":
                assert level(target) <= level(name), f"{name} imports {target}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_tensorflow_is_imported_in_one_place(path: Path):
    """No module imports TensorFlow or Keras when it is itself imported."""
    for node in ast.parse(path.read_text()).body:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not {name.split(".")[0] for name in names} & {"tensorflow", "keras"}


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline" / "core").glob("*.py")), ids=lambda p: p.name)
def test_the_pure_cores_know_numbers_alone(path: Path):
    """Nothing in core/ imports TensorFlow, Optuna, files or storage, not even inside a function."""
    allowed = {"__future__", "collections", "dataclasses", "math", "types", "typing", "numpy", "pipeline"}
    for node in ast.walk(ast.parse(path.read_text())):
        targets = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        targets += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for target in targets:
            assert target.split(".")[0] in allowed, target
            assert not target.startswith("pipeline.") or target.split(".")[1] in ("core", "errors", "words"), target


def test_every_module_says_what_lives_there():
    """A docstring of at least a sentence opens every module."""
    for path in MODULES:
        assert len(ast.get_docstring(ast.parse(path.read_text())) or "") > 20, path


def test_readme_names_every_command(lrtune):
    """The README has every command, and every make target that it quotes exists."""
    import re

    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    listed = re.findall(r"^  ([a-z-]+)  ", lrtune("--help").stdout.partition("Commands:")[2], re.MULTILINE)
    assert len(listed) >= 6
    for command in listed:
        assert f"lrtune {command}" in readme, command
    for target in set(re.findall(r"`make ([a-z-]+)", readme)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_studies_that_ship_are_sound():
    """Every study file of the repository is read without a mistake."""
    from pipeline.study_file import read_study

    studies = sorted((ROOT / "studies").glob("*.toml"))
    assert studies
    for path in studies:
        assert read_study(path).config.objective


def test_pinned_versions_satisfy_the_package():
    """requirements.txt pins every dependency of pyproject.toml inside its range."""
    import tomllib

    from packaging.requirements import Requirement

    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        requirement = Requirement(text)
        names = {name.lower().replace("_", "-"): version for name, version in pins.items()}
        assert requirement.specifier.contains(names[requirement.name]), text


def test_git_ignores_results_and_storage():
    """A study leaves nothing that git would pick up."""
    for path in ("studies/x/report.html", "studies/studies.db", "studies/studies.db-wal", "studies/.studies.db-x.lock"):
        done = subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False)
        assert done.returncode == 0, path
