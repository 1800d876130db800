"""Settings and users that only run: a restore starts the server with those of its files, and its plan says which."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flows.recovery.full_restore import full_restore
from flows.redis.persistence import backup_redis, restore_redis
from flows.redis.restore.undo import undo_restore_redis
from runbook.report import Report, Status
from tasks.redis.server import setting
from tests.fixtures.reports import finding
from tests.redis.conftest import Rig
from tests.redis.servers import NAME

SETTINGS, USERS = "Redis: settings after the start", "Redis: users after the start"
RUNNING = {"maxmemory": "524288000", "maxmemory-policy": "allkeys-lru", "appendonly": "no", "save": "60 1000"}
WRITTEN = {"maxmemory": "0", "maxmemory-policy": "noeviction", "appendonly": "yes", "save": "3600 1"}


def backed_up(rig: Rig) -> str:
    rig.client().set("a", 1)
    backup_redis.fn(NAME)
    return next(path.parent.name for path in rig.store.glob("*/manifest.json"))


def full(backup: str, confirm: str = "") -> Report:
    return full_restore.fn(NAME, backup=backup, confirm=confirm)


def alone(backup: str, confirm: str = "") -> Report:
    return restore_redis.fn(NAME, backup=backup, confirm=confirm)


def undone(backup: str, confirm: str = "") -> Report:
    return undo_restore_redis.fn(NAME, confirm=confirm)


@pytest.mark.parametrize("restore", [alone, full, undone], ids=["restore-redis", "full-restore", "undo"])
def test_what_a_start_reverts_is_in_the_plan(rig: Rig, restore: Callable[..., Report]) -> None:
    """Each with the value that is in force afterwards, which is then in force."""
    backup = backed_up(rig)
    if restore is undone:
        alone(backup, NAME)
    for name, value in RUNNING.items():
        rig.client().config_set(name, value)
    rig.client().acl_setuser("deploy", enabled=True, passwords=["+secret"], commands=["+@all"], keys=["*"])
    planned = restore(backup)
    assert planned.status is Status.PLANNED, planned.sentence()
    told = finding(planned, SETTINGS)
    assert told.status is Status.WARN
    assert set(told.value.split("; ")) == {
        "maxmemory 500mb runs, 0 is written",
        "maxmemory-policy allkeys-lru runs, noeviction is written",
        "appendonly no runs, yes is written",
        "save 60 1000 runs, 3600 1 is written",
    }
    assert finding(planned, USERS).value == "deploy is missing then"
    assert "secret" not in str(planned)
    assert restore(backup, NAME).status is Status.WARN
    assert {name: setting(rig.client(), name) for name in WRITTEN} == WRITTEN
    assert rig.client().acl_users() == ["default"]


def test_nothing_is_reverted(rig: Rig) -> None:
    """No false alarm."""
    backup = backed_up(rig)
    planned = alone(backup)
    assert [finding(planned, name).status for name in (SETTINGS, USERS)] == [Status.OK, Status.OK]
