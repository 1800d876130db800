"""No data of Redis is replaced before it is fenced and read: the loss is what the plan said, or the run ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
import redis

from flows.recovery.full_restore import full_restore
from flows.redis.persistence import backup_redis, restore_redis
from flows.redis.restore.undo import undo_restore_redis
from runbook.errors import RunbookFailed
from runbook.report import Report
from runbook.wait import until
from tasks.backups import manifest
from tasks.redis.position import POSITION
from tasks.redis.restore.swap import stop_redis, superseded_redis
from tests.redis.conftest import Rig
from tests.redis.restore.test_survivors import newest
from tests.redis.servers import NAME

KEY = "ledger"


class Ledger:
    """A client's record: which numbers were acknowledged, and when."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.acknowledged: dict[int, datetime] = {}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write until the end of the block. A server that does not answer is tried again."""
        ended = threading.Event()

        def write() -> None:
            number = max(self.acknowledged, default=0)
            while not ended.wait(0.002):
                number += 1
                try:
                    self._rig.client().sadd(KEY, number)
                except redis.RedisError:
                    continue
                self.acknowledged[number] = datetime.now(UTC)

        thread = threading.Thread(target=write)
        thread.start()
        try:
            until(lambda: len(self.acknowledged) > 50, what="acknowledged writes", seconds=60)
            yield
        finally:
            ended.set()
            thread.join()

    def lost(self) -> set[int]:
        """The acknowledged writes that the server does not have."""
        return set(self.acknowledged) - {int(number) for number in self._rig.client().smembers(KEY)}  # type: ignore[union-attr]


def before_stop(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """Do this once, after the last look at the running server and before its stop."""
    real, todo = stop_redis.after, [work]

    def after(*waited: object) -> Callable[..., object]:
        def stop(*given: Any) -> object:
            while todo:
                todo.pop()()
            return real(*waited)(*given)

        return stop

    monkeypatch.setattr(stop_redis, "after", after, raising=False)


def restarted(rig: Rig) -> None:
    rig.crash()
    rig.services.start("redis")
    rig.wait()


def restored(rig: Rig) -> None:
    rig.client().set("old", 1)
    backup_redis.fn(NAME)
    rig.client().set("newer", 1)
    restore_redis.fn(NAME, confirm=NAME)


@pytest.mark.parametrize("rig", [False], indirect=True, ids=["rdb"])
def test_a_server_that_restarts_before_its_stop_has_lost_what_it_had_not_saved(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run had judged that its files will have every write: they have none since the last save."""
    rig.client().set("old", 1)
    backup_redis.fn(NAME)
    rig.client().set("newer", 1)
    before_stop(monkeypatch, lambda: restarted(rig))
    with pytest.raises(RunbookFailed, match="has restarted since this run judged it"):
        restore_redis.fn(NAME, redis_source="files", confirm=NAME)
    assert not superseded_redis(rig.environment.redis)
    assert rig.client().get("old") == b"1"


@pytest.mark.parametrize("rig", [False], indirect=True, ids=["rdb"])
def test_a_server_that_dies_before_its_stop_is_judged_by_its_files(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody starts it again. The plan said that nothing is lost."""
    rig.client().set("old", 1)
    backup_redis.fn(NAME)
    rig.client().set("newer", 1)
    before_stop(monkeypatch, rig.crash)
    with pytest.raises(RunbookFailed, match="writes of Redis of the last .* are lost, but the plan said: nothing"):
        restore_redis.fn(NAME, redis_source="files", confirm=NAME)
    assert not superseded_redis(rig.environment.redis)


def full(_: str, **given: str) -> Report:
    """Of an environment that has nothing but Redis."""
    return full_restore.fn(NAME, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("restore", [restore_redis.fn, full], ids=["restore-redis", "full-restore"])
def test_a_server_that_was_down_and_starts_before_the_stop_is_not_replaced(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, restore: Callable[..., Report]
) -> None:
    rig.client().set("old", 1)
    backup_redis.fn(NAME)
    rig.crash()

    def start() -> None:
        rig.services.start("redis")
        rig.wait()
        rig.client().set("newer", 1)

    before_stop(monkeypatch, start)
    with pytest.raises(RunbookFailed, match="answers, although it was down when judged"):
        restore(NAME, backup=newest(rig).name, confirm=NAME)
    assert not superseded_redis(rig.environment.redis)
    rig.services.start("redis")
    rig.wait()
    assert rig.client().get("newer") == b"1"


def test_the_loss_of_a_restore_bounds_what_a_client_lost(rig: Rig) -> None:
    """It writes until the server stops, between plan and stop too."""
    ledger = Ledger(rig)
    rig.client().set("old", 1)
    backup_redis.fn(NAME)
    with ledger.writing():
        report = restore_redis.fn(NAME, confirm=NAME)
    lost, since = ledger.lost(), report.losses["Redis"].since
    assert lost
    assert since
    assert all(ledger.acknowledged[number] >= since for number in lost)
    assert "more than the backup's" in report.facts["replication offset since the backup"]


def test_a_backup_without_an_offset_leaves_the_distance_unknown(rig: Rig) -> None:
    """Those of earlier versions have none."""
    rig.client().set("old", 1)
    backup_redis.fn(NAME)
    path = newest(rig).path
    sealed = manifest.read(path)
    content = {name: value for name, value in sealed.content.items() if name != POSITION}
    assert content != sealed.content
    manifest.write(path, sealed.model_copy(update={"content": content}))
    report = restore_redis.fn(NAME, confirm=NAME)
    assert report.facts["replication offset since the backup"] == "unknown, because the backup has none"
    assert not report.losses["Redis"].is_none


def test_an_undo_counts_what_a_client_wrote_until_the_stop(rig: Rig) -> None:
    """Also between its plan and the stop: those are reported too."""
    restored(rig)
    ledger = Ledger(rig)
    with ledger.writing():
        plan = undo_restore_redis.fn(NAME)
        report = undo_restore_redis.fn(NAME, confirm=NAME)
    assert "writes of Redis are lost as of " in plan.headline
    assert "later writes are added" in plan.headline
    lost, loss = ledger.lost(), report.losses["Redis"]
    assert loss.count is not None
    assert loss.later > 0
    assert len(lost) <= loss.count <= len(lost) + 1, "the last one may not have been acknowledged"


@pytest.mark.parametrize("how", ["restart", "reset"])
def test_an_undo_ends_where_it_can_no_longer_count_what_its_plan_counted(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The seeded failure: between plan and stop the counters begin again."""
    restored(rig)

    def harm() -> None:
        rig.client().set("since", 1)
        rig.client().config_resetstat() if how == "reset" else restarted(rig)

    before_stop(monkeypatch, harm)
    match = "has restarted since" if how == "restart" else "writes of Redis of the last .* but the plan said: 0 writes"
    with pytest.raises(RunbookFailed, match=match):
        undo_restore_redis.fn(NAME, confirm=NAME)
    assert len(superseded_redis(rig.environment.redis)) == 1
    assert rig.client().mget("since", "newer") == [b"1", None]
