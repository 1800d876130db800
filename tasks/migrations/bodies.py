"""Whether upgrade and downgrade of a migration script do anything, read from the source without running them."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# "empty": it does nothing; "raises": it only raises; "missing": the script has no such function.
Body = Literal["written", "empty", "raises", "missing"]


@dataclass(frozen=True)
class Bodies:
    """Both functions of a script. `transactional` is False if it commits in between (`autocommit_block`)."""

    upgrade: Body = "written"
    downgrade: Body = "written"
    transactional: bool = True


def read_bodies(path: Path) -> Bodies:
    """Read both functions; a script without source counts as written."""
    if path.suffix != ".py":
        return Bodies()
    tree = ast.parse(path.read_bytes())
    commits = any(isinstance(node, ast.Attribute) and node.attr == "autocommit_block" for node in ast.walk(tree))
    return Bodies(_body(tree, "upgrade"), _body(tree, "downgrade"), not commits)


def _body(tree: ast.Module, name: str) -> Body:
    for node in reversed(tree.body):
        match node:
            case ast.FunctionDef(name=found, body=body) if found == name:
                does = [statement for statement in body if not _does_nothing(statement)]
                return "empty" if not does else "raises" if isinstance(does[0], ast.Raise) else "written"
            case ast.Assign(targets=targets) if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                return "written"
            case ast.ImportFrom(names=names) if any((n.asname or n.name) == name for n in names):
                return "written"
    return "missing"


def _does_nothing(statement: ast.stmt) -> bool:
    match statement:
        case ast.Pass() | ast.Expr(value=ast.Constant() | ast.Call(func=ast.Name(id="print"))):
            return True
        case ast.Return(value=None | ast.Constant(value=None)):
            return True
    return False
