"""Markers of unfinished runs: one class, durable, and able to read what earlier versions wrote."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from flows.ai_providers.fallback import RehearsalMarker
from flows.ai_providers.version import VersionMarker
from flows.recovery.drills.record import UnfinishedDrill
from runbook.errors import OpsError
from runbook.files.marker import Marker
from tasks.failover.marker import FailoverMarker
from tasks.redis.failover.ledger import RedisFailoverMarker

FIRST = FailoverMarker(old="a:1", new="b:1", mode="planned")


def test_a_marker_is_found_until_it_is_removed_and_both_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = tmp_path / "reports"
    assert FailoverMarker.find(reports) is None
    FailoverMarker.remove(reports)  # without a directory
    kernel, synced = os.fsync, []

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        kernel(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    FIRST.write(reports)
    file, directory = synced
    assert (file.parent, file.suffix, directory) == (reports, ".new", reports)
    assert FailoverMarker.find(reports) == FIRST
    assert FIRST.run.startswith(f"process {os.getpid()} on ")
    FailoverMarker.remove(reports)
    assert synced[2:] == [reports]
    assert FailoverMarker.find(reports) is None


def test_a_kill_between_write_and_rename_leaves_the_old_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FIRST.write(tmp_path)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, "replace", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        FailoverMarker(old="b:1", new="a:1", mode="unplanned").write(tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2, "the new content was written"
    assert FailoverMarker.find(tmp_path) == FIRST
    FIRST.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FailoverMarker.FILE], "what the killed run left is deleted"


EARLIER: list[tuple[type[Marker], dict[str, object], dict[str, object]]] = [
    (FailoverMarker, {"old": "a", "new": "b", "mode": "planned", "started": "t", "run": "process 7 on h"}, {}),
    (UnfinishedDrill, {"scenario": "s", "started": "t", "run": "process 7", "ledgers": "/l", "notes": {"a": "1"}}, {}),
    (
        RehearsalMarker,
        {"providers": ["azure"], "since": "t", "process": 7},
        {"providers": ("azure",), "started": "t", "run": "process 7"},
    ),
    (
        VersionMarker,
        {"before": "v1", "after": "v2", "since": "t", "of a later version": 1},
        {"before": "v1", "after": "v2", "started": "t", "run": "process unknown"},
    ),
]


@pytest.mark.parametrize(("shape", "file", "content"), EARLIER)
def test_a_file_of_an_earlier_version_is_read(
    shape: type[Marker], file: dict[str, object], content: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / shape.FILE).write_text(json.dumps(file))
    found = shape.find(tmp_path)
    assert found == shape(**(content or file))  # type: ignore[arg-type]
    assert shape.parse(found.dump()) == found


def test_the_marker_of_an_earlier_version_in_redis_is_read() -> None:
    text = '{"old": "a", "candidate": "b", "started": "t", "run": "process 7 on h", "version": 1, "replid": "5e"}'
    found = RedisFailoverMarker.parse(text)
    assert found == RedisFailoverMarker(old="a", candidate="b", started="t", run="process 7 on h", replid="5e")
    assert json.loads(found.dump()) == json.loads(text)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"old": "a:1", "ne', b'{"old": "\xff"}'])
def test_a_damaged_marker_stops_the_run(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FailoverMarker.FILE).write_bytes(content)
    with pytest.raises(OpsError, match=r"postgres-failover.json cannot be read: \w+ — find out which server"):
        FailoverMarker.find(tmp_path)
