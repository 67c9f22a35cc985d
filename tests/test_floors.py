"""Imports point down only (design §7), floor 0 and the commands stay light, and floor 1 knows no other process."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "anchor_cli"
FLOORS = {"words": 0, "data": 1, "model": 2, "engine": 3, "commands": 4}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def imports(tree: ast.AST) -> set[str]:
    """Every module named by an import, wherever it stands."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    floor = path.relative_to(PACKAGE).parts[0]
    names = imports(ast.parse(path.read_text(encoding="utf-8")))
    ours = {name: name.split(".")[1] for name in names if name.startswith("anchor_cli.")}
    above = {name for name, of in ours.items() if FLOORS.get(of, 0) > FLOORS[floor]}
    assert not above, f"{floor} imports from above"
    roots = {name.split(".")[0] for name in names}
    if floor == "words":
        assert not roots & {"torch", "transformers", "numpy", "deepspeed", "datasets", "pyarrow"}
    if floor == "data":
        assert not {name for name in names if name.startswith("torch.distributed")} and "deepspeed" not in roots


def test_there_is_something_to_look_at() -> None:
    assert {path.relative_to(PACKAGE).parts[0] for path in MODULES} == set(FLOORS)
