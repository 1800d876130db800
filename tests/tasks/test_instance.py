"""What a killed run's private instance leaves is swept."""

from __future__ import annotations

import getpass
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lab.state.base import CHECKOUT
from runbook.errors import Locked
from tasks.cluster import instance
from tasks.cluster.tablespaces import move_out


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


@pytest.mark.parametrize("is_copy", [True, False], ids=["a copy", "run on a kept data directory"])
def test_only_the_tablespaces_of_a_copy_that_never_became_live_are_swept_with_it(tmp_path: Path, is_copy: bool) -> None:
    root, kept = tmp_path / "data.restoring", tmp_path / "data.superseded_20260101_000000"
    root.mkdir()
    data = root / "data" if is_copy else kept
    in_place = data / "pg_tblspc" / "16400"
    in_place.mkdir(parents=True)
    (moved,) = move_out(data, tmp_path / "data").values()
    if not is_copy:
        (root / "data").symlink_to(kept)
    assert instance.sweep_instance.work(root)
    assert moved.exists() != is_copy
    assert kept.exists() != is_copy


STAGING = """
import sys, time
from pathlib import Path
from blocks.postgres.server import Postgres
from tasks.cluster.instance import prepare_instance
prepare_instance.work(Postgres(os_user=sys.argv[2], database="x", user="x", password="", admin_password=""), Path(sys.argv[1]))
print("staged", flush=True)
time.sleep(600)
"""


def test_the_staged_copy_of_a_running_restore_is_not_swept_and_that_of_a_killed_one_is(tmp_path: Path) -> None:
    """By the plan of another environment on the same server."""
    root = tmp_path / "data.restoring"
    argv = [sys.executable, "-c", STAGING, str(root), getpass.getuser()]
    with subprocess.Popen(argv, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as restore:
        assert restore.stdout
        try:
            assert restore.stdout.readline() == "staged\n"
            with pytest.raises(Locked, match=f"data.restoring is being changed by .*process {restore.pid}"):
                instance.sweep_instance.work(root)
            assert root.exists()
        finally:
            restore.kill()
    assert instance.sweep_instance.work(root)
    assert not root.exists()
