"""vacuum_database and check_autovacuum on a real server."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import psycopg
import pytest
from psycopg import errors

from flows.database.server.holders import of_database
from flows.database.upkeep.vacuum import check_autovacuum, vacuum_database
from lab.processes import run, write
from runbook.errors import OpsError, RunbookFailed, Unreachable
from runbook.progress import WorkDone
from runbook.report import Status
from runbook.wait import until
from tasks.postgres.sessions.holders import find_holders
from tasks.postgres.upkeep import session, vacuum
from tasks.postgres.upkeep.vacuum import read_progress, read_tables
from tests.database.conftest import NAME, Trial
from tests.database.server.test_replication import DATABASE as OTHER
from tests.database.server.test_replication import server_with
from tests.fixtures.reports import finding as found
from tests.fixtures.servers import ADMIN, ADMIN_PASSWORD, PostgresServer

GOOD = (Status.OK, Status.WARN)
ROWS = 10_000


@pytest.fixture
def dead(trial: Trial) -> Trial:
    """A table nine tenths of which are dead, with autovacuum off."""
    trial.sql("CREATE TABLE sessions (id bigint PRIMARY KEY, body text) WITH (autovacuum_enabled = false)")
    trial.sql("INSERT INTO sessions SELECT g, repeat('x', 100) FROM generate_series(1, %s) g", ROWS)
    # The inserting session tells its counts when it ends: after ANALYZE they would be added to those once more.
    counted = "SELECT n_live_tup FROM pg_stat_user_tables WHERE relname = 'sessions'"
    until(lambda: trial.sql(counted) == [(ROWS,)], what="the statistics of the insertion", seconds=120)
    trial.sql("ANALYZE sessions")
    return trial


def kill_rows(trial: Trial) -> None:
    trial.sql("DELETE FROM sessions WHERE id % 10 <> 0")
    until(lambda: dead_rows(trial) >= ROWS * 0.9, what="the statistics of the deletion", seconds=120)


def dead_rows(trial: Trial) -> int:
    (only,) = [table for table in read_tables(trial.environment.postgres) if table.name == "public.sessions"]
    return only.dead


@contextlib.contextmanager
def leaked_transaction(trial: Trial) -> Iterator[int]:
    """A client that read something and forgot to end its transaction."""
    with trial.server.connect(trial.database) as client:
        client.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        client.execute("SET LOCAL application_name = 'forgotten report'")
        client.execute("SELECT count(*) FROM people")
        yield client.info.backend_pid


def test_dead_rows_go_and_the_report_counts_them(dead: Trial) -> None:
    kill_rows(dead)
    report = vacuum_database.fn(NAME, "plain_analyze", jobs=2)
    assert report.status is Status.OK, report.sentence()
    assert dead_rows(dead) == 0
    (table,) = [evidence for evidence in report.evidence if evidence.name.startswith("Before and after")]
    assert table.rows[0][:3] == ("public.sessions", "9,000 → 0", "1,000"), "the worst comes first"
    assert len(table.rows) == session.MOST_SHOWN + 1, "the last row counts those left out"
    assert dead.sql("SELECT 1 FROM pg_stats WHERE tablename = 'Über tisch; DROP'"), "odd names are analysed too"
    assert dead.sql("SELECT 1 FROM pg_stats WHERE tablename = 'answers' AND inherited"), "and partitioned tables"


def test_the_age_of_the_database_goes_down_with_those_of_its_tables(dead: Trial) -> None:
    """It is computed once, after the last table."""
    name = f"ALTER DATABASE {dead.database} SET"
    dead.sql(f"{name} vacuum_freeze_min_age = 0")
    dead.sql(f"{name} vacuum_freeze_table_age = 0")
    for _ in range(5):
        dead.sql("INSERT INTO people (name) SELECT 'one more'")
    age = "SELECT age(datfrozenxid) FROM pg_database WHERE datname = current_database()"
    ((before,),) = dead.sql(age)
    assert vacuum_database.fn(NAME).status in GOOD
    assert dead.sql(age) < [(before,)]


def test_only_chosen_tables_are_touched(dead: Trial) -> None:
    kill_rows(dead)
    assert vacuum_database.fn(NAME, tables=['public."Über tisch; DROP"', "people"]).status in GOOD
    assert dead_rows(dead) == 9000
    assert vacuum_database.fn(NAME, "analyze", tables=["public.answers"]).status in GOOD
    assert dead.sql("SELECT 1 FROM pg_stats WHERE tablename = 'answers' AND inherited")
    with pytest.raises(RunbookFailed, match="public.answers is partitioned"):
        vacuum_database.fn(NAME, tables=["answers"])
    with pytest.raises(RunbookFailed, match="there is no table sesions"):
        vacuum_database.fn(NAME, tables=["sesions"])


def test_a_table_that_was_skipped_is_told_and_one_that_was_not_is_done(
    dead: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the right to it PostgreSQL passes over a table; near the wraparound it warns and does its work."""
    (roles,) = [table for table in read_tables(dead.environment.postgres) if table.name == "pg_catalog.pg_authid"]
    with dead.environment.postgres.connect(dead.database, as_application=True) as connection:
        command = vacuum._command(connection.info.server_version, roles, "plain", whole=False)
        skipped = vacuum._vacuum(connection, roles, command)
    assert "pg_authid" in skipped.failed
    assert "skipping" in skipped.failed
    assert (skipped.warned, skipped.hint) == ("", "log in as the table's owner or a superuser")

    settings = ("autovacuum_freeze_max_age=100000", "autovacuum=off")
    with server_with(tmp_path, monkeypatch, *settings) as server, server.connect(OTHER) as holder:
        server.sql("CREATE TABLE sessions AS SELECT 1 AS id", database=OTHER)
        holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        holder.execute("SELECT 1")
        server.sql(BURN, database=OTHER)
        report = vacuum_database.fn(NAME, tables=["sessions"])
    warned = found(report, "table public.sessions")
    assert warned.status is Status.WARN
    assert re.fullmatch("done; warned: (cutoff for .*|oldest xmin) is far in the past.*", warned.value)
    assert "Close open transactions soon" in warned.hint
    assert report.outcome == "1 of 1 tables done"


BURN = """
DO $$ BEGIN
    CREATE TEMPORARY TABLE burnt (x int);
    FOR i IN 1..100100 LOOP
        BEGIN INSERT INTO burnt VALUES (i); EXCEPTION WHEN others THEN END;
    END LOOP;
END $$
"""


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (errors.DiskFull, OpsError, "the disk is full"),
        (errors.IoError, OpsError, "cannot read or write a file"),
        (errors.DeadlockDetected, OpsError, "a deadlock"),
        (errors.ObjectInUse, OpsError, "PostgreSQL refuses"),
        (errors.OutOfMemory, OpsError, "PostgreSQL refuses"),
        (errors.SerializationFailure, Unreachable, "it was cancelled"),
        (errors.CrashShutdown, Unreachable, "the server stopped"),
        (errors.ConnectionFailure, Unreachable, "the server stopped"),
        (psycopg.OperationalError, Unreachable, "the server stopped"),
    ],
)
def test_only_a_server_that_is_gone_is_said_to_be(error: type[psycopg.Error], kind: type[OpsError], said: str) -> None:
    told = session.as_ops_error(error("what it said"))
    assert type(told) is kind
    assert said in told.message


def test_a_server_that_refuses_is_asked_once(trial: Trial) -> None:
    with (
        pytest.raises(OpsError, match="PostgreSQL refuses: lastval is not yet defined") as raised,
        session.upkeep_session(trial.environment.postgres) as connection,
    ):
        connection.execute("SELECT lastval()")  # 55000, an OperationalError
    assert not isinstance(raised.value, Unreachable)


def test_a_leaked_transaction_is_named_before_the_vacuum_that_it_makes_useless(dead: Trial) -> None:
    with leaked_transaction(dead) as pid:
        kill_rows(dead)
        report = vacuum_database.fn(NAME, tables=["sessions"], long_seconds=0)
        assert report.status is Status.WARN
        holder = found(report, "holds dead rows back")
        assert f"of process {pid} (postgres forgotten report idle in transaction)" in holder.value
        assert f"SELECT pg_terminate_backend({pid})" in holder.hint
        left = found(report, "dead rows that vacuum could not remove")
        assert left.value == "public.sessions: 9,000 (90%)"
        assert str(pid) in left.hint
        assert report.findings.index(holder) < report.findings.index(left)
        assert dead_rows(dead) == 9000
        with pytest.raises(RunbookFailed, match="holds dead rows back"):  # a rewrite would keep every dead row
            vacuum_database.fn(NAME, "full", ["sessions"], long_seconds=0, confirm=NAME)
    assert vacuum_database.fn(NAME, tables=["sessions"], long_seconds=0).status is Status.OK
    assert dead_rows(dead) == 0


def test_a_transaction_of_another_database_keeps_no_row_of_this_one(dead: Trial) -> None:
    with dead.server.connect("postgres") as other:
        other.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        other.execute("SELECT count(*) FROM pg_class")
        (holder,) = [h for h in find_holders(dead.environment.postgres) if h.name == str(other.info.backend_pid)]
        assert (holder.database, holder.idle, holder.holds_xmin) == ("postgres", True, True)
        kill_rows(dead)
        report = vacuum_database.fn(NAME, tables=["sessions"], long_seconds=0)
        assert report.status is Status.OK, report.sentence()
        assert dead_rows(dead) == 0


def test_a_prepared_transaction_is_named_too(dead: Trial) -> None:
    with dead.server.connect(dead.database) as client:
        client.execute("BEGIN")
        client.execute("INSERT INTO notes VALUES (1)")
        client.execute("PREPARE TRANSACTION 'order 66'")
    try:
        kill_rows(dead)
        report = vacuum_database.fn(NAME, tables=["sessions"], long_seconds=0)
        assert "prepared transaction order 66" in found(report, "holds dead rows back").value
        assert "ROLLBACK PREPARED 'order 66'" in found(report, "holds dead rows back").hint
        assert dead_rows(dead) == 9000
    finally:
        dead.sql("ROLLBACK PREPARED 'order 66'")


def test_the_slot_of_a_standby_that_went_away_is_named(dead: Trial) -> None:
    """It keeps the horizon of that standby's last feedback for ever."""
    settings = ("hot_standby_feedback=on", "wal_receiver_status_interval=1s", "primary_slot_name=away")
    standby = PostgresServer(settings=settings)
    try:
        copy_to(dead.server, standby)
        standby.start()
        feedback = "SELECT 1 FROM pg_replication_slots WHERE slot_name = 'away' AND xmin IS NOT NULL"
        until(lambda: dead.sql(feedback), what="its feedback", seconds=120)
        holders = find_holders(dead.environment.postgres)
        assert [(h.kind, h.idle) for h in holders if h.name == "away"] == [("replication slot", False)]
        assert [h for h in of_database(holders, dead.database, 0) if h.kind != "transaction"] == [], "it is in use"
        standby.stop()
        until_unused(dead, "away")
        kill_rows(dead)
        report = vacuum_database.fn(NAME, tables=["sessions"])
        holder = found(report, "holds dead rows back")
        assert holder.value.startswith("replication slot away (nobody reads it), holds xmin")
        assert "SELECT pg_drop_replication_slot('away')" in holder.hint
        assert dead_rows(dead) == 9000
        dead.sql("SELECT pg_drop_replication_slot('away')")
        assert vacuum_database.fn(NAME, tables=["sessions"]).status is Status.OK
    finally:
        standby.remove()
        until_unused(dead, "away")
        dead.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = 'away'")


def until_unused(trial: Trial, slot: str) -> None:
    """The server learns some time after its standby's end that it is gone."""
    question = "SELECT 1 FROM pg_replication_slots WHERE slot_name = %s AND active"
    until(lambda: not trial.sql(question, slot), what="the end of the standby's session", seconds=120)


def copy_to(primary: PostgresServer, standby: PostgresServer) -> None:
    where = f"host=127.0.0.1 port={primary.port} user={ADMIN} passfile={standby.root / 'pgpass'}"
    escaped = ADMIN_PASSWORD.replace("\\", "\\\\").replace(":", "\\:")
    write(standby.root / "pgpass", f"127.0.0.1:*:*:{ADMIN}:{escaped}\n", 0o600, standby.account)
    argv: list[str | Path] = ["-D", standby.data, "-d", where, "-R", "-C", "-S", "away", "-c", "fast", "-X", "stream"]
    run([primary.programs / "pg_basebackup", *argv], cwd=standby.root, account=standby.account)


def test_a_full_vacuum_needs_chosen_tables_and_a_permit(dead: Trial) -> None:
    kill_rows(dead)
    node = dead.sql("SELECT pg_relation_filenode('sessions')")
    with pytest.raises(RunbookFailed, match="VACUUM FULL of all tables is refused"):
        vacuum_database.fn(NAME, "full", confirm=NAME)
    planned = vacuum_database.fn(NAME, "full", ["sessions"])
    assert planned.status is Status.PLANNED
    assert "blocks all reads and writes meanwhile (90% of its rows are dead)" in planned.plan_steps[0].detail
    assert dead.sql("SELECT pg_relation_filenode('sessions')") == node
    before = dead.sql("SELECT pg_table_size('sessions')")[0][0]
    report = vacuum_database.fn(NAME, "full", ["sessions"], confirm=NAME)
    assert report.status in GOOD
    assert dead.sql("SELECT pg_table_size('sessions') * 5 < %s", before) == [(True,)]
    assert dead.sql("SELECT count(*) FROM sessions") == [(1000,)]


def test_a_full_vacuum_does_not_wait_for_ever_and_not_without_space(
    dead: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "LOCK_SECONDS", 0.3)
    with dead.server.connect(dead.database) as client, client.transaction():
        client.execute("LOCK TABLE sessions IN ROW EXCLUSIVE MODE")
        with pytest.raises(RunbookFailed, match="the lock was not available") as failed:
            vacuum_database.fn(NAME, "full", ["sessions"], confirm=NAME)
        assert "pg_locks" in str(failed.value)
    monkeypatch.setattr(session, "disk_on", lambda *_: type("Disk", (), {"free_bytes": 1000}))
    with pytest.raises(RunbookFailed, match="free space at"):
        vacuum_database.fn(NAME, "full", ["sessions"], confirm=NAME)


@pytest.mark.parametrize(("end", "told"), [("terminated", "somebody cancelled it"), ("killed", "the server stopped")])
@pytest.mark.parametrize("mode", ["plain", "full"])
def test_a_vacuum_whose_backend_dies_leaves_nothing_half_done(
    dead: Trial, monkeypatch: pytest.MonkeyPatch, mode: Literal["plain", "full"], end: str, told: str
) -> None:
    monkeypatch.setattr(session, "LOCK_SECONDS", 600)
    kill_rows(dead)
    with ended_when_it_waits(dead, "VACUUM%sessions%", end), pytest.raises(RunbookFailed, match=told):
        vacuum_database.fn(NAME, mode, tables=["sessions"], confirm=NAME)
    until(lambda: answers(dead), what="the server's recovery", seconds=120)
    assert vacuum_database.fn(NAME, mode, tables=["sessions"], confirm=NAME).status in GOOD
    assert dead.sql("SELECT count(*) FROM sessions") == [(1000,)]
    assert dead_rows(dead) == 0


@contextlib.contextmanager
def ended_when_it_waits(trial: Trial, statement: str, how: str) -> Iterator[None]:
    """A lock keeps the statement waiting; its backend is ended then."""

    def end() -> None:
        question = "SELECT pid FROM pg_stat_activity WHERE query LIKE %s AND wait_event_type = 'Lock'"
        pid = until(lambda: trial.sql(question, statement), what="a statement that waits", seconds=120)[0][0]
        if how == "killed":
            os.kill(int(str(pid)), signal.SIGKILL)  # the server recovers from that as from a crash
        else:
            trial.sql("SELECT pg_terminate_backend(%s)", pid)

    killer = threading.Thread(target=end)
    with contextlib.suppress(psycopg.OperationalError), trial.server.connect(trial.database) as client:
        client.execute("BEGIN")
        client.execute("LOCK TABLE sessions IN SHARE UPDATE EXCLUSIVE MODE")
        killer.start()
        yield
    killer.join()


def answers(trial: Trial) -> bool:
    try:
        return trial.sql("SELECT 1") == [(1,)]
    except psycopg.OperationalError as error:
        raise Unreachable(str(error)) from None


def test_its_progress_is_told(dead: Trial) -> None:
    def slowly() -> None:
        with dead.server.connect(dead.database) as client:
            client.execute("SET vacuum_cost_limit = 1")
            client.execute("SET vacuum_cost_delay = 100")  # a minute in all: nobody waits for its end
            with contextlib.suppress(psycopg.errors.QueryCanceled):
                client.execute("VACUUM sessions")

    worker = threading.Thread(target=slowly)
    worker.start()
    told = until(lambda: _told(dead), what="progress", seconds=120, every_seconds=0.02)
    assert told
    dead.sql("SELECT pg_cancel_backend(pid) FROM pg_stat_progress_vacuum")
    worker.join()
    assert re.fullmatch(r"2 of 4 tables done; sessions: [a-z ]+, [\d.]+ k?B of 1\.\d MB", told.text)
    assert 0.5 <= told.ratio < 0.75


def _told(trial: Trial) -> WorkDone | None:
    told = read_progress(trial.environment.postgres, 2, 4)
    return told if "of 1." in told.text else None


def test_autovacuum_s_settings_are_compared(trial: Trial) -> None:
    report = check_autovacuum.fn(NAME)
    assert found(report, "autovacuum").status is Status.OK
    assert found(report, "autovacuum_vacuum_threshold").status is Status.OK
    factor = found(report, "autovacuum_vacuum_scale_factor")
    assert (factor.status, factor.value, factor.expected) == (Status.WARN, "0.2", "0.1 or less")
    assert "apply-postgres-settings with names=autovacuum_vacuum_scale_factor" in factor.hint
    assert report.status is Status.WARN


def test_more_eager_than_the_manual_is_well_and_off_is_critical(trial: Trial) -> None:
    changed = {"autovacuum_vacuum_scale_factor": "0.05", "autovacuum_naptime": "30s", "autovacuum": "off"}
    try:
        for name, value in changed.items():
            trial.sql(f"ALTER SYSTEM SET {name} = '{value}'")
        trial.sql("SELECT pg_reload_conf()")
        until(lambda: trial.sql("SHOW autovacuum") == [("off",)], what="the reload", seconds=120)
        with pytest.raises(RunbookFailed) as failed:
            check_autovacuum.fn(NAME)
        report: Any = failed.value.report
        assert found(report, "autovacuum").status is Status.CRITICAL
        assert found(report, "autovacuum_vacuum_scale_factor").status is Status.OK
        assert found(report, "autovacuum_naptime").status is Status.OK
    finally:
        for name in changed:
            trial.sql(f"ALTER SYSTEM RESET {name}")
        trial.sql("SELECT pg_reload_conf()")
        until(lambda: trial.sql("SHOW autovacuum") == [("on",)], what="the reload", seconds=120)


def test_a_table_that_autovacuum_does_not_keep_up_with_is_named_with_its_remedy(dead: Trial) -> None:
    kill_rows(dead)
    with pytest.raises(RunbookFailed, match="keeps up with public.sessions") as failed:
        check_autovacuum.fn(NAME)
    behind = found(failed.value.report, "autovacuum keeps up with public.sessions")
    assert behind.value == "9,000 dead rows, 90% of all, autovacuum is off for it"
    remedy = behind.hint.split(" Then ")[0]
    assert "RESET (autovacuum_enabled)" in remedy
    dead.sql(remedy)  # it is SQL that runs
    assert dead.sql("SELECT reloptions FROM pg_class WHERE relname = 'sessions'") == [
        (["autovacuum_vacuum_scale_factor=0.05"],)
    ]
    vacuum_database.fn(NAME, "plain_analyze", ["sessions"])
    assert "autovacuum keeps up with every table" in [f.name for f in check_autovacuum.fn(NAME).findings]


def test_counters_that_were_lost_are_not_well(dead: Trial) -> None:
    kill_rows(dead)
    dead.sql("SELECT pg_stat_reset()")
    report = check_autovacuum.fn(NAME)
    assert report.status is Status.WARN
    assert "not measured: public." in found(report, "tables whose rows are not counted").value
    assert "public.sessions" in found(report, "tables whose rows are not counted").value
    vacuum_database.fn(NAME, "analyze")
    with pytest.raises(RunbookFailed, match="keeps up with public.sessions"):
        check_autovacuum.fn(NAME)


def test_a_server_that_is_down_is_said_to_be(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runbook.kinds.RETRY_DELAYS_SECONDS", [])
    trial.server.stop()
    try:
        for flow in (vacuum_database, check_autovacuum):
            with pytest.raises(RunbookFailed, match="does not answer"):
                flow.fn(NAME)
    finally:
        trial.server.start()
        with contextlib.suppress(psycopg.Error):
            trial.sql("SELECT 1")
