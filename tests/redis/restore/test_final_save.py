"""Data that only a server's memory has, when a run stops that server: it is saved for the undo, or nothing stops."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from flows.recovery.full_restore import full_restore
from flows.redis.persistence import backup_redis, restore_redis
from flows.redis.restore.methods import RedisReplacement
from flows.redis.restore.undo import undo_restore_redis
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.redis.persistence.state import ask
from tasks.redis.restore.copy import RedisCopy
from tasks.redis.restore.final_save import has_whole_aof
from tasks.redis.server import live_directory
from tests.fixtures.reports import finding
from tests.redis.conftest import Rig
from tests.redis.data import account, fill
from tests.redis.servers import NAME

SAVED = "Redis: the live data can be saved for the undo"


def full(**given: str) -> Report:
    """Of an environment that has nothing but Redis."""
    return full_restore.fn(NAME, **given)


def backed_up(rig: Rig) -> str:
    rig.client().set("old", 1)
    backup_redis.fn(NAME)
    return next(path.parent.name for path in rig.store.glob("*/manifest.json"))


def is_saved_nowhere(rig: Rig) -> None:
    """From now on the server saves neither by itself nor at its stop."""
    rig.client().config_set("save", "")
    rig.client().config_set("appendonly", "no")


@pytest.mark.parametrize("rig", [True, False], indirect=True, ids=["aof in the file", "rdb"])
@pytest.mark.parametrize("restore", [restore_redis.fn, full], ids=["restore-redis", "full-restore"])
def test_what_was_never_saved_comes_back(rig: Rig, restore: Callable[..., Report]) -> None:
    """With AOF off and `save ""` at run time, whatever the file says: every key, TTL and database."""
    backup = backed_up(rig)
    is_saved_nowhere(rig)
    fill({number: rig.client(number) for number in range(3)})
    before = account(rig.client())
    rig.client().set("newer", 1)
    kwargs = {"environment": NAME} if restore is restore_redis.fn else {}
    report = restore(backup=backup, confirm=NAME, **kwargs)
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert rig.client().get("newer") is None
    assert undo_restore_redis.fn(NAME, confirm=NAME).status in (Status.OK, Status.WARN)
    assert rig.client().getdel("newer") == b"1"
    assert account(rig.client()) == before


@pytest.mark.parametrize("rig", [False], indirect=True, ids=["rdb"])
def test_writes_since_the_restore_survive_the_undo(rig: Rig) -> None:
    backed_up(rig)
    rig.client().set("newer", 1)
    restore_redis.fn(NAME, confirm=NAME)
    is_saved_nowhere(rig)
    for number in range(7):
        rig.client().set(f"since:{number}", 1)
    planned = undo_restore_redis.fn(NAME)
    assert "7 writes of Redis are lost as of " in planned.sentence(), planned.sentence()
    report = undo_restore_redis.fn(NAME, confirm=NAME)
    assert report.losses["Redis"].count == 7
    assert rig.client().get("newer") == b"1"
    assert undo_restore_redis.fn(NAME, confirm=NAME).status in (Status.OK, Status.WARN)
    assert len(rig.client().keys("since:*")) == 7


@pytest.mark.parametrize("how", ["restart", "reset"])
def test_an_undo_does_not_count_what_it_cannot_know(rig: Rig, how: str) -> None:
    """The counters begin again with the process, and with CONFIG RESETSTAT."""
    backed_up(rig)
    rig.client().set("newer", 1)
    restore_redis.fn(NAME, confirm=NAME)
    rig.client().set("since", 1)
    if how == "reset":
        rig.client().config_resetstat()
    else:
        rig.services.stop("redis")
        rig.services.start("redis")
        rig.wait()
    planned = undo_restore_redis.fn(NAME)
    assert "writes of Redis of the last" in planned.sentence(), planned.sentence()
    assert "write)" not in planned.sentence()


@pytest.mark.parametrize("rig", [False], indirect=True, ids=["rdb"])
def test_nothing_stops_where_it_cannot_be_saved(rig: Rig) -> None:
    """The seeded failure. The plan finds it; a run in which it happens later leaves the live data alone."""
    backed_up(rig)
    is_saved_nowhere(rig)
    rig.client().set("newer", 1)
    (rig.data / "my dump.rdb").unlink()
    (rig.data / "my dump.rdb").mkdir()
    run_id = rig.run_id()
    with pytest.raises(RunbookFailed) as caught:
        restore_redis.fn(NAME, confirm=NAME)
    assert "is a directory" in finding(caught.value.report, SAVED).value
    assert (rig.run_id(), rig.client().get("newer")) == (run_id, b"1")


@pytest.mark.parametrize("restore", [restore_redis.fn, full], ids=["restore-redis", "full-restore"])
def test_data_whose_directory_was_deleted_is_kept_as_a_backup(rig: Rig, restore: Callable[..., Report]) -> None:
    """The server serves from its memory, and can save nowhere (also not in a new directory of that name): its data is
    read over the network."""
    backup = backed_up(rig)
    rig.client().set("newer", 1)
    shutil.rmtree(rig.data)
    if restore is full:
        rig.account.directory(rig.data, 0o700)
    kwargs = {"environment": NAME} if restore is restore_redis.fn else {}
    report = restore(backup=backup, confirm=NAME, **kwargs)
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert rig.client().mget("old", "newer") == [b"1", None]
    kept = report.facts["live data kept as"]
    assert kept in " ".join(value for name, value in report.facts.items() if name.startswith("undo"))
    assert restore_redis.fn(NAME, backup=kept, confirm=NAME).status in (Status.OK, Status.WARN)
    assert rig.client().mget("old", "newer") == [b"1", b"1"]


def test_a_directory_that_is_deleted_since_the_plan_stops_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan did not say that its data is backed up first: its stop would lose it."""
    backed_up(rig)
    rig.client().set("newer", 1)
    build = RedisReplacement.build

    def built(*given: Any) -> RedisCopy:
        copy = build(*given)
        shutil.rmtree(rig.data)
        return copy

    monkeypatch.setattr(RedisReplacement, "build", built)
    with pytest.raises(RunbookFailed, match="Redis data that no directory keeps"):
        restore_redis.fn(NAME, confirm=NAME)
    assert rig.client().get("newer") == b"1"
    monkeypatch.setattr(RedisReplacement, "build", build)
    report = restore_redis.fn(NAME, confirm=NAME)
    assert report.facts["live data kept as"] in report.facts["undo"]


def test_an_aof_that_was_just_switched_on_is_not_whole(rig: Rig) -> None:
    """Its first rewrite runs, and the files are those of the time before it was switched off."""
    block = rig.environment.redis

    def is_whole() -> bool:
        return has_whole_aof(ask(block), live_directory(block))

    rig.client().set("old", 1)
    assert is_whole()
    rig.client().config_set("appendonly", "no")
    rig.client().set("newer", 1)
    rig.client().config_set("rdb-key-save-delay", 1_000_000)
    rig.client().config_set("appendonly", "yes")
    assert not is_whole()
    rig.client().config_set("rdb-key-save-delay", 0)
    until(is_whole, what="the end of the rewrite", seconds=60)
