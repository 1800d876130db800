"""The account of a drill's ledger: what is lost, what came through unanswered, what nobody expected."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from blocks.config import toml
from lab.client import Lab
from runbook.wait import until
from tasks.drill import direct
from tasks.drill.clients import first_success
from tasks.drill.direct import DirectWriter, drop_table
from tasks.drill.ledger import Outcome, WriteAttempt, WriteLedger, text_of
from tasks.drill.lost_writes import LedgerResult, find_lost_in

T0 = datetime(2026, 1, 25, tzinfo=UTC)


@pytest.fixture
def written(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteLedger]:
    """Some rounds of puts and deletes of every key, each answered, however busy the machine is; the table goes with the
    test."""
    monkeypatch.setattr(direct, "END_SECONDS", 120.0)
    env, ledger = toml.environment(lab.name), WriteLedger(tmp_path / "direct.jsonl", "t-")
    drop_table(env.postgres, env.postgres.database)
    try:
        with DirectWriter(env.nodes, env.postgres.database, ledger, per_second=500):
            until(lambda: len(ledger.acknowledged()) > 60, what="writes", seconds=120)
        assert {attempt.kind for attempt in ledger.attempts()} == {"put", "delete"}
        yield ledger
    finally:
        drop_table(env.postgres, env.postgres.database)


def account(lab: Lab, ledger: WriteLedger, *statements: str) -> LedgerResult:
    """After some statements that are rolled back again."""
    with psycopg.connect(lab.status()["postgres"]["admin_dsn"], dbname="grc_db") as connection:
        for statement in statements:
            connection.execute(statement.encode())
        found = find_lost_in(ledger, connection, toml.environment(lab.name).application)
        connection.rollback()
    return found


def last_of_each(ledger: WriteLedger) -> dict[str, WriteAttempt]:
    return {attempt.key: attempt for attempt in ledger.acknowledged()}


def test_what_is_there_is_not_lost(lab: Lab, written: WriteLedger) -> None:
    found = account(lab, written)
    assert (found.lost, found.unexpected, found.unknown) == ((), (), 0)
    assert found.acknowledged == len(written.acknowledged())


def test_a_row_that_is_gone_an_older_version_and_a_deleted_row_that_is_back_are_lost(
    lab: Lab, written: WriteLedger
) -> None:
    histories = [[one for one in written.acknowledged() if one.key == key] for key in last_of_each(written)]
    earlier, put = next(ends for ends in (h[-2:] for h in histories) if [e.kind for e in ends] == ["put", "put"])
    gone = account(lab, written, f"DELETE FROM interview_ops_drill WHERE key = '{put.key}'")
    assert put in gone.lost
    older = account(
        lab,
        written,
        f"UPDATE interview_ops_drill SET version = {earlier.version}, attempt = '{earlier.id}' WHERE key = '{put.key}'",
    )
    assert older.lost == (put,)
    deleted = next(one for one in written.acknowledged() if one.kind == "delete")
    before = next(one for one in written.acknowledged() if (one.key, one.version) == (deleted.key, deleted.version - 1))
    back = account(
        lab,
        written,
        f"INSERT INTO interview_ops_drill VALUES ('{before.key}', {before.version}, '{before.id}')"
        f" ON CONFLICT (key) DO UPDATE SET version = {before.version}, attempt = '{before.id}'",
    )
    assert deleted in back.lost


def test_a_table_that_is_gone_loses_everything_that_was_not_deleted(lab: Lab, written: WriteLedger) -> None:
    found = account(lab, written, "DROP TABLE interview_ops_drill")
    assert {one.key for one in found.lost} >= {k for k, one in last_of_each(written).items() if one.kind == "put"}


def test_who_wrote_through_the_application_only_needs_no_right_on_the_drills_table(
    lab: Lab, written: WriteLedger, tmp_path: Path
) -> None:
    """It may have come back with a backup; the application's own role cannot read it."""
    assert written.acknowledged()
    described = toml.environment(lab.name).application
    with psycopg.connect(lab.status()["postgres"]["dsn"]) as connection:
        assert find_lost_in(WriteLedger(tmp_path / "none.jsonl"), connection, described).lost == ()
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            find_lost_in(written, connection, described)


def test_a_row_of_nobody_is_unexpected(lab: Lab, written: WriteLedger) -> None:
    key = next(iter(last_of_each(written)))
    found = account(
        lab,
        written,
        f"INSERT INTO interview_ops_drill VALUES ('{key}', 99, 'somebody')"
        " ON CONFLICT (key) DO UPDATE SET version = 99, attempt = 'somebody'",
        f"INSERT INTO interview_sessions (user_id, position) SELECT min(id), '{text_of('t-stranger')}' FROM users",
    )
    assert set(found.unexpected) == {"t-stranger: no client wrote it", f"{key}: no client wrote version 99"}


def test_an_unanswered_write_that_is_there_is_recovered_and_one_that_is_not_is_unknown(
    lab: Lab, written: WriteLedger
) -> None:
    there, gone = written.intend("put", key="t-x", version=1), written.intend("put", key="t-y", version=1)
    found = account(lab, written, f"INSERT INTO interview_ops_drill VALUES ('t-x', 1, '{there}')")
    assert (found.indeterminate, found.recovered, found.unknown, found.lost) == (2, 1, 1, ())
    assert gone


def attempts(outcomes: dict[int, Outcome]) -> list[WriteAttempt]:
    return [
        WriteAttempt(
            str(second), "session", T0 + timedelta(seconds=second), outcome, T0 + timedelta(seconds=second + 0.5)
        )
        for second, outcome in outcomes.items()
    ]


def test_users_are_served_again_behind_the_last_request_that_failed() -> None:
    done = attempts({0: "acknowledged", 2: "refused", 3: "acknowledged", 4: "indeterminate", 5: "acknowledged"})
    moment = T0 + timedelta(seconds=1)
    assert first_success(done, moment, T0 + timedelta(seconds=4.5)) == T0 + timedelta(seconds=5.5)
    assert first_success(done, moment, T0 + timedelta(seconds=2.5)) == T0 + timedelta(seconds=3.5)
    assert first_success(done[:4], moment, T0 + timedelta(seconds=4.5)) is None
