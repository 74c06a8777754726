"""Dependencies point one way: cli -> eval -> mlpmem_rag <- integrations."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "mlpmem_rag": ("typer", "rich", "llama_index", "mlpmem_cli", "mlpmem_eval"),
    "integrations": ("mlpmem_cli", "mlpmem_eval"),
    "eval": ("mlpmem_cli",),
    "cli": (),
}
MODULES = [
    path.relative_to(ROOT)
    for package in FORBIDDEN
    for path in sorted((ROOT / package).rglob("*.py"))
]


def imported_packages(source: str) -> Iterator[str]:
    """Top-level names of everything a module imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_imports_only_what_its_package_may(module: Path) -> None:
    imported = set(imported_packages((ROOT / module).read_text(encoding="utf-8")))
    assert not imported & set(FORBIDDEN[module.parts[0]])


def test_the_library_and_the_command_line_are_looked_at() -> None:
    assert {"mlpmem_rag", "cli"} <= {module.parts[0] for module in MODULES}


def test_imports_are_found_in_functions_too() -> None:
    source = "import a.b, c\nfrom d.e import f\nfrom . import g\ndef h():\n    import typer\n"
    assert list(imported_packages(source)) == ["a", "c", "d", "typer"]
