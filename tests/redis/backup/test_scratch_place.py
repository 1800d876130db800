"""Scratch directories of runs that were killed are swept; those of the living, and others', never."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tasks.redis.scratch_place import OWNER, PREFIX, scratch_place


def left_by_a_killed_run(where: Path) -> Path:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with scratch_place(str(where)) as place:
            os.write(writing, place.name.encode())
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as told:
        return where / told.read()


def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    others = tmp_path / f"{PREFIX}somebody"
    others.mkdir()
    dead = left_by_a_killed_run(tmp_path)
    assert (dead / OWNER).exists(), "it was killed in the middle"
    elsewhere = tmp_path / f"{PREFIX}elsewhere"
    elsewhere.mkdir()
    (elsewhere / OWNER).write_text("another-host 1 1")
    with scratch_place(str(tmp_path)) as living:
        assert not dead.exists()
        with scratch_place(str(tmp_path)):
            assert living.exists()
        assert others.exists()
        assert elsewhere.exists()
    assert not living.exists()
