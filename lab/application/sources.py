"""The application as its developers have it in their checkout: `backend/`, `frontend/` and `web/`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from lab.application.install import BACKEND_PARTS, FRONTEND_PARTS, SOURCE, requirements

TREE: Mapping[str, tuple[str, ...]] = {"backend": (*BACKEND_PARTS, "tests"), "frontend": FRONTEND_PARTS, "": ("web",)}
PYPROJECT = """[tool.mypy]
files = ["grc_backend"]

[tool.ruff]
line-length = 120
extend-exclude = ["alembic"]

[tool.ruff.lint]
select = ["E", "F", "I", "B", "UP"]
"""
LEFT_OUT = shutil.ignore_patterns("__pycache__", "node_modules", "dist", ".turbo")
IGNORED = "node_modules/\nvenv*\n__pycache__/\n.env\n"


def write_sources(target: Path) -> None:
    """Copy the sources below `target`, with the files that only a checkout has: the tools' settings, and
    `requirements.txt`.

    Raises:
        OSError: they cannot be written.
    """
    for folder, parts in TREE.items():
        (target / folder).mkdir(parents=True, exist_ok=True)
        for part in parts:
            if (source := SOURCE / part).is_dir():
                shutil.copytree(source, target / folder / part, ignore=LEFT_OUT, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, target / folder / part)
    (target / "backend" / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (target / "backend" / "requirements.txt").write_text(requirements(), encoding="utf-8")
    (target / ".gitignore").write_text(IGNORED, encoding="utf-8")
