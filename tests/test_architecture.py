"""Rules of the whole repository that no type checker sees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from tests.conftest import REPOSITORY

PACKAGES = ("service", "training", "model_store")
LONGEST_FILE, LONGEST_MEDIAN_FILE = 400, 150


def files(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Top-level names of all that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize(
    ("package", "foreign"),
    [
        ("service", "training"),
        ("training", "service"),
        ("model_store", "service"),
        ("model_store", "training"),
        ("service", "torch"),
        ("model_store", "torch"),
    ],
)
def test_package_never_imports(package: str, foreign: str) -> None:
    assert files(package)
    assert [str(path.relative_to(REPOSITORY)) for path in files(package) if foreign in imports(path)] == []


def test_running_service_has_loaded_neither_torch_nor_training() -> None:
    code = "import sys, service.app; print(sorted({'torch', 'training'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def line_counts() -> dict[str, int]:
    return {
        str(path.relative_to(REPOSITORY)): len(path.read_text(encoding="utf-8").splitlines())
        for package in PACKAGES
        for path in files(package)
    }


def test_no_file_is_too_long() -> None:
    assert {name: lines for name, lines in line_counts().items() if lines > LONGEST_FILE} == {}


def test_most_files_are_short() -> None:
    assert median(line_counts().values()) < LONGEST_MEDIAN_FILE


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_prints_unless_it_says_why(package: str) -> None:
    found = []
    for path in files(package):
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            calls_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            if calls_print and "noqa: T201" not in lines[node.lineno - 1]:
                found.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}")
    assert found == []
