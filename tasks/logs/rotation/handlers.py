"""Rotating handlers in an application: together with logrotate they lose lines (§6.2)."""

from __future__ import annotations

import re
from pathlib import Path

_ROTATES = re.compile(r"\b(?:Timed)?RotatingFileHandler\s*\(")
_ELSEWHERE = {"node_modules", "site-packages", ".venv", "venv", "tests", ".git"}


def find_handlers(directory: Path) -> list[str]:
    """`main.py:12` of every such handler in an application's Python files."""
    found = []
    for path in sorted(directory.rglob("*.py")):
        if _ELSEWHERE & set(path.relative_to(directory).parts):
            continue
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        found += [
            f"{path.relative_to(directory)}:{number}"
            for number, line in enumerate(lines, 1)
            if _ROTATES.search(line.partition("#")[0])
        ]
    return found
