"""The faults that the tests of §3 seed, in one place and one of each in either language: a package that is outdated, one
that is vulnerable, and a file that is ill-typed (and sloppy)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.advisories import GHSA, Registry, node_advisory, vulnerable
from tests.checkouts import Checkout

PYTHON, NODE = "interviewkit", "chatkit"
"""Both are there as 1.0.0."""
SAFE, NODE_SAFE = "1.0.3", "1.0.4"
SERIOUS = {GHSA: {"database_specific": {"severity": "CRITICAL"}}}

PYTHON_FILE = "backend/grc_backend/wrong.py"
PYTHON_TEXT = """import os
import sys


def first(items = []):
    return sys.argv , items


port: int = 'eighty'
"""
WEB_FILE = "web/packages/ui/src/wrong.ts"
WEB_TEXT = """export function f(x: any) {
  var y = x == 1;
  return y;
}
export const port: number = "eighty";
"""


def outdate(registry: Registry) -> None:
    """Newer versions of both packages: patch, minor and major."""
    for version in ("1.0.3", "1.2.0", "2.0.0"):
        registry.wheel(PYTHON, version)
    for version in ("1.0.0", "1.0.4", "1.1.0", "2.0.0"):
        registry.tarball(NODE, version)


def endanger(
    registry: Registry, fixed: str = SAFE, package: str = PYTHON, also: Sequence[dict[str, Any]] = (), **record: Any
) -> None:
    """An advisory of the Python package, critical; with `fixed` "" no version is safe."""
    registry.knows(package, vulnerable(package, fixed, **record), *also, severities=SERIOUS)


def endanger_node(registry: Registry, below: str = NODE_SAFE, package: str = NODE) -> None:
    """An advisory of the node package, high."""
    registry.node.append(node_advisory(package, below))


def ill_type(made: Checkout) -> None:
    """Commit both files."""
    made.add(PYTHON_FILE, PYTHON_TEXT)
    made.add(WEB_FILE, WEB_TEXT)
