"""The budget of CONTRIBUTING.md: 300 lines a module, 50 a function, and where it is exceeded a written reason."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "anchor_cli").rglob("*.py"))
LINES_OF_A_MODULE, LINES_OF_A_FUNCTION = 300, 50
REASON = "Long because"


def too_long(path: Path, text: str) -> list[str]:
    """What exceeds its budget without a reason in its docstring. A command's options, its signature, do not count."""
    tree = ast.parse(text)
    found = []
    if text.count("\n") > LINES_OF_A_MODULE and REASON not in (ast.get_docstring(tree) or ""):
        found.append(f"{path.name}: {text.count(chr(10))} lines")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and REASON not in (docstring := ast.get_docstring(node) or ""):
            body = node.body[1:] if docstring else node.body
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            if length > LINES_OF_A_FUNCTION:
                found.append(f"{path.name}: {node.name}: {length} lines")
    return found


def test_what_is_long_says_why() -> None:
    assert [line for path in MODULES for line in too_long(path, path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(("docstring", "want"), [("Does much.", 2), ("Long because it lists every key.", 0)])
def test_the_budget_itself(docstring: str, want: int) -> None:
    body = "\n".join(f"    x{number} = 0" for number in range(301))
    text = f'"""{docstring}"""\n\n\ndef long() -> None:\n    """{docstring}"""\n{body}\n'
    assert len(too_long(Path("a.py"), text)) == want
