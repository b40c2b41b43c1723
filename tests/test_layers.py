"""Imports go downwards only, and importing starts nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qwenvl_app"
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)
LAYERS = [
    (7, ("qwenvl_app.cli", "qwenvl_app.testing")),
    (6, ("qwenvl_app.server",)),
    (5, ("qwenvl_app.web",)),
    (4, ("qwenvl_app.backends",)),
    (3, ("qwenvl_app.loading", "qwenvl_app.service")),
    (2, ("qwenvl_app.engine",)),
    (
        1,
        (
            "qwenvl_app.grammar",
            "qwenvl_app.hub",
            "qwenvl_app.images",
            "qwenvl_app.prompts",
        ),
    ),
    (
        0,
        (
            "qwenvl_app.settings",
            "qwenvl_app.errors",
            "qwenvl_app.generation",
            "qwenvl_app.logs",
            "qwenvl_app.process",
            "qwenvl_app.sharing",
            "qwenvl_app.version",
        ),
    ),
]


def layer(module: str) -> int:
    if module == "qwenvl_app":
        return 7
    for number, names in LAYERS:
        if any(module == name or module.startswith(name + ".") for name in names):
            return number
    raise AssertionError(f"{module} is in no layer: add it to tests/test_layers.py")


def imports(module: str) -> set[str]:
    """Everything that a module imports, inside functions too."""
    path = ROOT / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(
                name if (name := f"{node.module}.{alias.name}") in MODULES else node.module
                for alias in node.names
            )
    return found


def package(module: str) -> str:
    """``qwenvl_app.web`` of all that is in it; of modules at the top ``qwenvl_app``."""
    parts = module.split(".")
    return ".".join(parts[: 2 if len(parts) > 2 else 1])


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str):
    for imported in imports(module):
        if imported.startswith("qwenvl_app"):
            same_package = package(imported) == package(module) or (
                imported.startswith(module + ".") or module.startswith(imported + ".")
            )
            assert layer(imported) < layer(module) or (
                layer(imported) == layer(module) and same_package
            ), f"{module} imports {imported}"
        top = imported.split(".")[0]
        if layer(module) == 5:
            assert top not in ("torch", "transformers")
            assert not imported.startswith(("qwenvl_app.engine", "qwenvl_app.loading"))
        if layer(module) <= 4:
            assert top not in ("flask", "gunicorn")


def test_importing_starts_nothing():
    """No thread, no model, no file: only wsgi.py makes an application."""
    heavy = tuple(f"qwenvl_app.{name}" for name in ("engine", "grammar", "loading", "cli.doctor"))
    names = [name for name in MODULES if not name.startswith(heavy)]
    code = (
        "import importlib, sys, threading\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_are_small(module: str):
    path = ROOT / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    lines = {each.name: (each.end_lineno or 0) - each.lineno + 1 for each in functions}
    assert not {name: count for name, count in lines.items() if count > 40}
