"""What runs keep for themselves on disk is removed after their death, and never while they may live."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tasks.application.worktree import worktree
from tasks.backups import fetched_files
from tasks.redis.scratch_place import scratch_place
from tasks.wal.archive.place import DirectoryPlace
from tests.runbook.processes import CONTAINER, ROOT

KINDS = 4
PROGRAM = """
import os, sys, types
from pathlib import Path
from tasks.backups import catalogue
from tasks.redis.scratch_place import scratch_place
from tasks.wal.archive import place
from tasks.application.worktree import worktree
root, how = Path(sys.argv[1]), sys.argv[2]
def written(name):
    with scratch_place(str(root)), worktree(root / "repository", "ops/try"):
        catalogue.hand_of(types.SimpleNamespace(hands=root), "lab").mkdir()
        print("there", flush=True)
        os.kill(os.getpid(), 9) if how == "dies" else input()
place.failpoint = written
place.DirectoryPlace(root).put("000000010000000000000001", b"WAL")
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y", "-C", str(tmp_path / "repository")]
    subprocess.run(["git", "init", "-q", tmp_path / "repository"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    return tmp_path


def owned(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != "repository")


def sweep_all(root: Path) -> None:
    """As the next run of each kind."""
    fetched_files.sweep(SimpleNamespace(hands=root))  # type: ignore[arg-type]
    with scratch_place(str(root)):
        pass
    DirectoryPlace(root).sweep()
    with worktree(root / "repository", "ops/next"):
        pass


def test_what_a_dead_process_left_is_removed(root: Path) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, str(root), "dies"], cwd=ROOT, check=False)
    assert len(owned(root)) == KINDS
    sweep_all(root)
    assert owned(root) == []


def test_what_a_process_of_another_namespace_uses_stays(root: Path) -> None:
    """Its process id is dead or another's here. Once nothing changed for two days it goes."""
    with subprocess.Popen(
        [*CONTAINER, sys.executable, "-c", PROGRAM, str(root), "lives"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout
        assert child.stdout.readline() == b"there\n"
        before = owned(root)
        assert len(before) == KINDS
        sweep_all(root)
        assert owned(root) == before
        child.kill()
    old = time.time() - 3 * 86400
    for path in root.iterdir():
        for one in (path, *path.rglob("*")):
            os.utime(one, (old, old), follow_symlinks=False)
    sweep_all(root)
    assert owned(root) == []
