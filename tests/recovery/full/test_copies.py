"""The first place of all backups is gone with the rest: everything comes back from the second."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.database.copies import replicate_backups
from runbook.report import Status
from tests.recovery.conftest import System, restore


@pytest.fixture
def burnt(system: System) -> Iterator[list[Path]]:
    """The first stores, moved where nobody finds them; back again after the test."""
    stores = [system.store(kind) for kind in ("postgres", "redis", "files")]
    assert replicate_backups.fn(system.name).status in (Status.OK, Status.WARN)
    for store in stores:
        store.rename(store.with_name(store.name + ".burnt"))
    yield stores
    for store in stores:
        store.with_name(store.name + ".burnt").rename(store)


def test_everything_comes_back_from_the_copies(system: System, burnt: list[Path]) -> None:
    users, keys = system.sql("SELECT count(*) FROM users"), system.keys(1)
    system.drop()
    system.redis(1).flushdb()
    refused = restore(system)
    assert refused.returncode == 1
    assert "there is no postgres backup “latest”" in refused.stderr
    done = restore(system, "--source", "copies", "--redis-source", "auto")
    assert done.returncode == 0, done.stderr
    assert system.sql("SELECT count(*) FROM users") == users
    assert system.keys(1) == keys
    assert system.healthy()
    assert not any(store.exists() for store in burnt)
