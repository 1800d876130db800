"""A run that is cancelled between a stop and the start behind it leaves no service stopped."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_STARTED = {"_copy_after_failure"}
"""A standby whose data directory is half copied must not start."""


def _calls(node: ast.AST, name: str) -> bool:
    return any(isinstance(one, ast.Name) and one.id == name for one in ast.walk(node))


def _restarts(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Functions that stop services and start them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = ast.Module([one for one in node.body if not isinstance(one, ast.FunctionDef)], [])
            called = {
                one.func.id if isinstance(one.func, ast.Name) else _first(one.func)
                for one in ast.walk(body)
                if isinstance(one, ast.Call)
            }
            if {"stop_services", "start_services"} <= called:
                yield node


def _first(node: ast.AST) -> str:
    """`stop_services` of `stop_services.after(…)`."""
    while isinstance(node, ast.Attribute | ast.Call):
        node = node.value if isinstance(node, ast.Attribute) else node.func
    return node.id if isinstance(node, ast.Name) else ""


def test_a_restart_is_completed_when_its_run_is_cancelled() -> None:
    found, unguarded = 0, []
    for path in sorted((ROOT / "flows").rglob("*.py")):
        for function in _restarts(ast.parse(path.read_text(encoding="utf-8"))):
            found += 1
            if not _calls(function, "started_if_cancelled") and function.name not in NOT_STARTED:
                unguarded.append(f"{path.relative_to(ROOT)}:{function.lineno} {function.name}")
    assert found > 3
    assert not unguarded, f"use `with started_if_cancelled(…)`: {unguarded}"
