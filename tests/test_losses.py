"""A loss is stated by one module: no other code of a recovery says in its own words what is lost, or that nothing is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORDS = ROOT / "runbook" / "guard" / "loss.py"
SOURCES = [path for layer in ("flows", "tasks", "runbook") for path in sorted((ROOT / layer).rglob("*.py"))]
# A claim that no write is lost, in whatever words.
CLAIM = re.compile(
    r"\bnothing\b[^.,;]*\b(is|was|are|be) lost\b|\bloses? (nothing|no )|\blost: no\b|\blost none\b", re.IGNORECASE
)
RECOVERIES = re.compile(r"rank=\"recovery\"")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_code_claims_that_nothing_is_lost(path: Path) -> None:
    if path == WORDS:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = {id(node.body[0].value) for node in ast.walk(tree) if _has_docstring(node)}  # type: ignore[attr-defined]
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in documented]
    claims = [node.value for node in texts if isinstance(node.value, str) and CLAIM.search(node.value)]
    assert not claims, f"state it as a Loss: {claims}"


def _has_docstring(node: ast.AST) -> bool:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
        return False
    first = node.body[0]
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)


def test_a_recoverys_plan_states_its_loss_as_a_value() -> None:
    """`Effect` takes a clause for what a deletion takes away; whoever replaces live data gives a `Loss`."""
    found = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if not RECOVERIES.search(text):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Effect":
                lost = node.args[2] if len(node.args) > 2 else None
                lost = next((one.value for one in node.keywords if one.arg == "lost"), lost)
                if isinstance(lost, ast.JoinedStr) or (isinstance(lost, ast.Constant) and lost.value):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found, f"these say in words what is lost: {found}"
