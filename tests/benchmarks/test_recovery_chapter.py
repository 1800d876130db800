"""What the recovery chapter's benchmark measures on: environments that are the lab's but for what they say they are not;
and what a drill calls its own seconds."""

from __future__ import annotations

import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from benchmarks.recovery.estimate import smaller
from benchmarks.s3 import with_copies
from flows.recovery.drills.summary import _covered
from lab.state.base import CHECKOUT

LAB = (CHECKOUT / "deployments" / "environments" / "lab.toml").read_text(encoding="utf-8")


def test_a_smaller_database_is_restored_beside_the_lab_s_own() -> None:
    before, after = tomllib.loads(LAB), tomllib.loads(smaller(LAB, Path("/kept"), "/suites"))
    assert before["postgres"]["database"] == "grc_db"
    assert after["postgres"].pop("database") == after["standby"].pop("database") == "grc_small"
    assert (after.pop("reports"), after["backups"].pop("postgres")) == ("/kept/reports", "/kept/postgresql")
    for place, key in (("postgres", "database"), ("standby", "database"), ("backups", "postgres")):
        before[place].pop(key)
    before.pop("reports")
    assert before.pop("expectations") == {"directory": "expectations/interview"}
    assert after.pop("expectations") == {"directory": "/suites"}, (
        "a relative one would be looked for beside the new file"
    )
    assert after == before, "nothing else is another's"


def test_copies_in_s3_are_the_only_other_thing() -> None:
    before, after = tomllib.loads(LAB), tomllib.loads(with_copies(LAB, "s3://bucket/grc", "http://127.0.0.1:1"))
    copies = after.pop("copies")
    assert copies["postgres"] == "s3://bucket/grc/postgres"
    assert copies["endpoint"] == "http://127.0.0.1:1"
    assert before.pop("copies")["postgres"].startswith("$")
    assert after == before


def test_seconds_that_two_things_took_at_once_count_once() -> None:
    start = datetime(2026, 11, 26, tzinfo=UTC)
    spans = [(start + timedelta(seconds=at), took) for at, took in ((10, 5.0), (12, 1.0), (14, 3.0), (30, 2.0))]
    assert _covered(spans) == pytest.approx(9.0)
    assert _covered([]) == 0.0
