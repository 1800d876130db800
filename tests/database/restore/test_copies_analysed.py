"""Statistics of a copy, under the timeouts that its database sets for clients."""

from __future__ import annotations

import pytest

from tasks.migrations.scratch import create_rehearsal, drop_rehearsal, fill_rehearsal
from tasks.postgres.restore.planner_statistics import analyze
from tests.database.conftest import Trial

# Analysing this table evaluates its index's expression, which takes longer than any client may: a setting says so.
SLOW = """
CREATE FUNCTION slow(int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN
    PERFORM pg_sleep(coalesce(current_setting('trial.slow', true), '0')::int); RETURN 1; END $$;
CREATE TABLE sleepy AS SELECT 1 AS x; CREATE INDEX ON sleepy (slow(x));
CREATE TABLE split (x int) PARTITION BY LIST (x); CREATE TABLE split_1 PARTITION OF split DEFAULT;
INSERT INTO split VALUES (1); CREATE INDEX ON split (slow(x))
"""
TIMEOUTS = ("statement_timeout", "transaction_timeout", "idle_session_timeout")


@pytest.fixture
def hasty(trial: Trial) -> Trial:
    trial.sql(SLOW)
    return trial


def alter(trial: Trial, database: str, what: str, timeouts: str) -> None:
    """Of the maintenance database: it has no timeouts."""
    known = [name for (name,) in trial.server.sql("SELECT name FROM pg_settings WHERE name = ANY(%s)", list(TIMEOUTS))]
    trial.server.sql("; ".join(f"ALTER DATABASE {database} {what} {name} {timeouts}" for name in known))


def hurry(trial: Trial, database: str) -> None:
    trial.server.sql(f"ALTER DATABASE {database} SET trial.slow = 3")
    alter(trial, database, "SET", "= '2s'")


def analysed(trial: Trial, database: str) -> set[object]:
    alter(trial, database, "RESET", "")  # this one is a client too
    return {
        row[0] for row in trial.sql("SELECT tablename FROM pg_stats WHERE schemaname = 'public'", database=database)
    }


def test_a_copy_is_analysed(hasty: Trial) -> None:
    hurry(hasty, hasty.database)
    analyze.work(hasty.environment.postgres, hasty.database, 2, everything=True)
    assert {"sleepy", "split", "people"} <= analysed(hasty, hasty.database)


def test_a_rehearsal_s_copy_is_analysed(hasty: Trial) -> None:
    postgres = hasty.environment.postgres
    scratch = create_rehearsal.work(postgres)
    try:
        hurry(hasty, scratch)
        fill_rehearsal.work(postgres, scratch)
        assert {"sleepy", "split", "people"} <= analysed(hasty, scratch)
    finally:
        drop_rehearsal.work(postgres)
