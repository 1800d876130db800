"""An environment without servers."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from tests.routine.checklist.waiting import TOML


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Its name."""
    name = f"t{uuid.uuid4().hex[:12]}"
    path = tmp_path / "environment.toml"
    path.write_text(TOML.format(name=name, directory=tmp_path, more=""))
    monkeypatch.setenv("OPS_ENVIRONMENT", name)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(path))
    return name
