"""Back to what a restore replaced, and back again."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.redis.persistence import backup_redis, restore_redis
from flows.redis.restore.undo import undo_restore_redis
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Status
from tasks.redis.restore.swap import stop_redis, superseded_redis
from tests.fixtures.killed import exit_code_at
from tests.redis.conftest import Rig
from tests.redis.servers import NAME


def restored(rig: Rig) -> None:
    """`newer` was written since the backup: the restore sets it aside."""
    rig.client().set("old", 1)
    backup_redis.fn(NAME)
    rig.client().set("newer", 1)
    assert restore_redis.fn(NAME, confirm=NAME).status in (Status.OK, Status.WARN)
    assert rig.client().get("newer") is None


@pytest.mark.parametrize("rig", [True, False], indirect=True, ids=["aof", "rdb"])
def test_there_and_back_again(rig: Rig) -> None:
    restored(rig)
    planned = undo_restore_redis.fn(NAME)
    assert planned.status is Status.PLANNED
    assert rig.client().get("newer") is None, "a plan changes nothing"
    rig.client().set("since", 1)
    report = undo_restore_redis.fn(NAME, confirm=NAME)
    assert report.status is Status.OK, report.sentence()
    assert (rig.client().get("newer"), rig.client().get("since")) == (b"1", None)
    assert undo_restore_redis.fn(NAME, confirm=NAME).status is Status.OK
    assert (rig.client().get("newer"), rig.client().get("since")) == (None, b"1")


def spoil(aside: Path) -> None:
    for path in (*(aside / "aof files").glob("*.base.rdb"), aside / "my dump.rdb"):
        path.write_bytes(b"REDIS0011" + b"\xff" * 64)


def test_old_data_that_cannot_be_loaded_stops_nothing(rig: Rig) -> None:
    """The seeded failure: what was set aside went bad."""
    restored(rig)
    spoil(superseded_redis(rig.environment.redis)[0])
    run_id = rig.run_id()
    with pytest.raises(RunbookFailed, match="the server cannot load this data"):
        undo_restore_redis.fn(NAME, confirm=NAME)
    assert rig.run_id() == run_id


def test_old_data_that_goes_bad_is_not_left_live(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """After it was judged."""
    restored(rig)
    aside = superseded_redis(rig.environment.redis)[0]
    monkeypatch.setattr("tasks.redis.restore.swap.SERVE_SECONDS", 8.0)
    meanwhile(monkeypatch, lambda: spoil(aside))
    with pytest.raises(OpsError, match="does not serve .*superseded.*the current data is live"):
        undo_restore_redis.fn(NAME, confirm=NAME)
    assert rig.client().get("old") == b"1"
    assert [path.name for path in superseded_redis(rig.environment.redis)] == [aside.name]


def meanwhile(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """Do this when the service has been stopped."""
    real = stop_redis.after

    def after(*waited: object) -> Callable[..., object]:
        def stop(*given: Any) -> object:
            stopped = real(*waited)(*given)
            work()
            return stopped

        return stop

    monkeypatch.setattr("flows.redis.restore.undo.stop_redis.after", after, raising=False)


@pytest.mark.parametrize(("rig", "aof"), [(False, True), (True, False)], indirect=["rig"], ids=["on", "off"])
def test_the_aof_was_switched_since(rig: Rig, aof: bool) -> None:
    """A server with an AOF starts from that alone, with 0 keys where there is none; one without it from its RDB."""
    if not aof:  # what it holds is in the AOF alone
        rig.client().config_set("save", "")
    restored(rig)
    rig.configure(aof=aof)
    rig.client().config_set("appendonly", "yes" if aof else "no")
    assert "convert" in [step.step for step in undo_restore_redis.fn(NAME).plan_steps]
    report = undo_restore_redis.fn(NAME, confirm=NAME)
    assert report.status is Status.OK, report.sentence()
    assert rig.client().mget("old", "newer") == [b"1", b"1"]
    assert undo_restore_redis.fn(NAME, confirm=NAME).status is Status.OK
    assert rig.client().mget("old", "newer") == [b"1", None]


def test_nothing_was_set_aside(rig: Rig) -> None:
    with pytest.raises(OpsError, match="there is no data that a restore of Redis replaced.*: none"):
        undo_restore_redis.fn(NAME)
    assert rig.answers()


@pytest.mark.parametrize(
    "point",
    [
        "redis: before first rename",
        "redis: between renames",
        "redis: after second rename",
        "after swap_back",
        "before start_redis",
        "after start_redis",
    ],
)
def test_killed_and_launched_again(rig: Rig, point: str) -> None:
    """It goes on with what it was about: the restored data, which it set aside, is newer by then and not meant."""
    restored(rig)
    assert killed(point) == -signal.SIGKILL
    report = undo_restore_redis.fn(NAME, confirm=NAME)
    assert report.status is Status.OK, report.sentence()
    assert rig.client().get("newer") == b"1"
    assert len(superseded_redis(rig.environment.redis)) == 1
    assert undo_restore_redis.fn(NAME, confirm=NAME).status is Status.OK
    assert rig.client().get("newer") is None, "an undo that ended is not gone on with"


def test_a_restore_after_a_killed_undo_is_what_is_undone(rig: Rig) -> None:
    restored(rig)
    assert killed("after swap_back") == -signal.SIGKILL
    rig.services.start("redis")
    rig.wait()
    rig.client().set("last", 1)
    assert restore_redis.fn(NAME, confirm=NAME).status is Status.OK
    assert undo_restore_redis.fn(NAME, confirm=NAME).status is Status.OK
    assert rig.client().get("last") == b"1"


def killed(point: str) -> int:
    """How an undo ended that dies there."""
    return exit_code_at(point, lambda: undo_restore_redis.fn(NAME, confirm=NAME))
