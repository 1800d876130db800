"""What a killed run's private instance leaves is swept."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
import pytest

from tasks.cluster import instance


def test_a_server_that_ends_by_itself_meanwhile_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The postmaster gets the signal first, and its children are gone before it is their turn."""
    with subprocess.Popen(["sleep", "600"]) as child:
        ended = psutil.Process(child.pid)
        child.kill()
    found = iter([[ended], []])
    monkeypatch.setattr(instance, "servers_in", lambda _: next(found))
    root = tmp_path / "data.restoring"
    (root / "data").mkdir(parents=True)
    assert instance.sweep_instance.work(root)
    assert not root.exists()
