"""check_replication: what it says of a well server, and what it finds: slots, archiver, standbys, xmin, wraparound."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from psycopg.conninfo import make_conninfo
from psycopg.sql import Literal

from flows.database.server.corruption import check_corruption
from flows.database.server.replication import check_replication, judge_mode, judge_slots
from lab.processes import run
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.postgres.replication.rates import Rate, Rates
from tasks.postgres.replication.status import Slot, parse_sync_names, read_replication
from tests.database.conftest import NAME, Trial, write_environment
from tests.fixtures.reports import beginning as finding
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer, has_contrib, running_postgres

DATABASE = "grc_db"
REPLIES = "wal_receiver_status_interval=1s"  # silence is judged in tens of seconds: it must be a dead one's


@contextlib.contextmanager
def server_with(directory: Path, monkeypatch: pytest.MonkeyPatch, *settings: str) -> Iterator[PostgresServer]:
    """A server of its own and the environment over it."""
    with running_postgres(settings=settings) as server:
        server.create_database(DATABASE)
        monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
        monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(write_environment(server, DATABASE, directory)))
        monkeypatch.setenv("TRIAL_PASSWORD", ROLE_PASSWORD)
        monkeypatch.setenv("TRIAL_ADMIN_PASSWORD", ADMIN_PASSWORD)
        yield server


def check(long_seconds: int = 300) -> Report:
    """The report, CRITICAL or not."""
    try:
        return check_replication.fn(NAME, seconds=1, long_seconds=long_seconds)
    except RunbookFailed as error:
        return error.report


def write_wal(server: PostgresServer, megabytes: int) -> None:
    """So many whole segments of 16 MB, at the cost of a few bytes each."""
    for _ in range(megabytes // 16):
        server.sql("SELECT pg_logical_emit_message(true, 'test', 'x'); SELECT pg_switch_wal()")


def test_a_well_server_tells_its_mode_and_that_nothing_carries_its_wal(trial: Trial) -> None:
    report = check()
    assert [found.name for found in report.findings if found.status is not Status.OK] == ["copy of the WAL elsewhere"]
    assert report.outcome == "no standby is connected: nothing is replicated"
    tables = {item.name: item.rows for item in report.evidence}
    assert trial.database in {row[0] for row in tables["Wraparound: databases"]}
    assert tables[f"Wraparound: oldest tables of {trial.database}"]
    assert int(finding(report, "age of the databases").value.split()[2].replace(",", "")) > 0


def test_slots_and_a_failing_archiver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ("max_slot_wal_keep_size=64MB", "max_wal_size=2GB", "checkpoint_timeout=1h")
    with server_with(tmp_path, monkeypatch, *limits, "archive_mode=on", "archive_command=false # %p") as server:
        server.sql("SELECT pg_create_physical_replication_slot('gone_standby', true)")
        report = check()
        slot = finding(report, "slot gone_standby")
        assert slot.status is Status.WARN
        assert "inactive, reserved" in slot.value
        assert "until it is lost" in slot.value
        assert "pg_drop_replication_slot('gone_standby')" in slot.hint
        assert finding(report, "archiver").status is Status.OK

        write_wal(server, 96)
        until(lambda: server.sql("SELECT failed_count > 0 FROM pg_stat_archiver")[0][0], what="a failure", seconds=120)
        report = check()
        archiver = finding(report, "archiver")
        assert archiver.status is Status.CRITICAL
        assert "last archived never" in archiver.value
        assert finding(report, "copy of the WAL elsewhere").status is Status.WARN
        assert "archive_command" in archiver.hint
        slot = finding(report, "slot gone_standby")
        assert slot.status is Status.CRITICAL
        assert "unreserved" in slot.value
        assert "before the next checkpoint" in slot.hint

        server.sql("CHECKPOINT")
        lost = finding(check(), "slot gone_standby")
        assert lost.status is Status.CRITICAL
        assert "its WAL is deleted" in lost.value
        server.sql("SELECT pg_drop_replication_slot('gone_standby')")


def test_an_archive_that_works_is_a_copy_of_the_wal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server_with(tmp_path, monkeypatch, "archive_mode=on", "archive_command=true # %p") as server:
        write_wal(server, 16)
        until(lambda: server.sql("SELECT archived_count > 0 FROM pg_stat_archiver")[0][0], what="a file", seconds=120)
        report = check()
        assert report.status is Status.OK, report.sentence()

        path = Path(os.environ["OPS_ENVIRONMENT_FILE"])
        with path.open("a") as file:
            file.write(
                f'[standby]\nhost = "standby.example.org"\ndatabase = "{DATABASE}"\nuser = "grc_user"\n'
                'password_env = "TRIAL_PASSWORD"\nadmin_password_env = "TRIAL_ADMIN_PASSWORD"\n'
            )
        with receiver(server, "receiver_1", tmp_path):
            report = check()
        named = finding(report, "standby of the environment")
        assert (named.status, named.value) == (Status.WARN, "none connected"), "a receiver of WAL is no standby"


def test_a_logical_subscriber_is_no_copy_of_the_wal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server_with(tmp_path, monkeypatch, "wal_level=logical", REPLIES) as server:
        server.create_database("subscriber")
        server.sql("CREATE TABLE t (x int); CREATE PUBLICATION p FOR TABLE t", database=DATABASE)
        server.sql("SELECT pg_create_logical_replication_slot('s', 'pgoutput')", database=DATABASE)
        server.sql("CREATE TABLE t (x int)", database="subscriber")
        where = {"host": "127.0.0.1", "port": server.port, "user": "postgres", "dbname": DATABASE}
        login = make_conninfo(**where, password=ADMIN_PASSWORD)
        server.sql(
            f"CREATE SUBSCRIPTION s CONNECTION {Literal(login).as_string()} PUBLICATION p "
            "WITH (create_slot = false, enabled = false)",
            database="subscriber",
        )
        streams = "SELECT true FROM pg_stat_replication WHERE application_name = 's' AND state = 'streaming'"
        copies = "SELECT true FROM pg_stat_replication WHERE application_name LIKE '%sync%'"
        with server.connect("subscriber") as other, other.transaction():
            other.execute("LOCK TABLE t")  # who copies the rows that are there waits, connected and without a slot
            server.sql("ALTER SUBSCRIPTION s ENABLE", database="subscriber")
            until(lambda: server.sql(streams) and server.sql(copies), what="it", seconds=120)
            report = check()
        assert report.outcome == "no standby is connected: nothing is replicated"
        assert finding(report, "copy of the WAL elsewhere").status is Status.WARN
        assert finding(report, "standby s").status is Status.OK, "its lag is told all the same"


def test_minutes_left_at_the_present_rate() -> None:
    slot = Slot("s", "physical", "", True, "extended", 10**9, 600 * 10**6, "", False)
    for per_second, status, text in (
        (100e3, Status.OK, "1 h 40 min"),
        (500e3, Status.WARN, "20 min 00 s"),
        (1e6, Status.CRITICAL, "10 min 00 s"),
        (0.0, Status.OK, "unlimited"),
    ):
        rates = Rates(1, Rate(per_second, per_second * 100), Rate(0, 0), 0)
        report = Report("trial", NAME)
        judge_slots(report, (slot,), rates, None, "1GB")
        assert report.findings[0].status is status
        assert text in report.findings[0].value
    report = Report("trial", NAME)
    judge_slots(report, (replace(slot, safe_bytes=None),), Rates(1, Rate(1e6, 0), Rate(0, 0), 0), None, "-1")
    assert report.findings[0].status is Status.WARN
    assert "not measured" in report.findings[0].value
    report = Report("trial", NAME)
    judge_slots(report, (replace(slot, safe_bytes=None),), Rates(1, Rate(1e6, 0), Rate(0, 0), 0), 600 * 10**6, "-1")
    assert "10 min 00 s until the disk is full" in report.findings[0].value
    report = Report("trial", NAME)
    judge_slots(report, (slot,), Rates(1, Rate(100e3, 0), Rate(0, 0), 0), 60 * 10**6, "1GB")
    assert report.findings[0].status is Status.CRITICAL, "the limit is higher than what is free"
    assert "10 min 00 s until the disk is full" in report.findings[0].value
    assert "free disk space for WAL" in report.findings[0].hint
    report = Report("trial", NAME)
    judge_slots(report, (slot,), Rates(1, Rate(1e6, 0), Rate(0, 0), 0), 10**12, "1GB")
    assert "10 min 00 s until it is lost" in report.findings[0].value


@pytest.mark.parametrize(
    ("text", "needed", "names"),
    [
        ("", 0, ()),
        ("a, b", 1, ("a", "b")),
        ("2 (a, b)", 2, ("a", "b")),
        ("FIRST 1 (a)", 1, ("a",)),
        ('any 2 (a, "b c", "d""e")', 2, ("a", "b c", 'd"e')),
        ("*", 1, ("*",)),
    ],
)
def test_synchronous_standby_names(text: str, needed: int, names: tuple[str, ...]) -> None:
    parsed = parse_sync_names(text)
    assert (parsed.needed, parsed.names) == (needed, names)


def test_what_holds_xmin_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server_with(tmp_path, monkeypatch) as server:
        assert finding(check(), "holds xmin back").status is Status.OK
        server.sql("SELECT pg_create_logical_replication_slot('no_consumer', 'pgoutput')", database=DATABASE)
        with server.connect(DATABASE) as leaked, server.connect(DATABASE) as reader:
            leaked.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            leaked.execute("SELECT 1")
            reader.execute("BEGIN")  # idle in transaction as well, and holds nothing
            reader.execute("SELECT 1")
            server.sql("BEGIN; CREATE TABLE t (); PREPARE TRANSACTION 'it''s left'", database=DATABASE)
            server.sql("SELECT pg_current_xact_id()")
            report = check(long_seconds=1)
            pid = leaked.info.backend_pid
            held = {found.value.split(" (")[0]: found for found in report.findings if found.name == "holds xmin back"}
            assert set(held) == {
                f"transaction of process {pid}",
                "prepared transaction it's left",
                "replication slot",
            }, "and none for the reader"
            transaction = held[f"transaction of process {pid}"]
            assert transaction.status is Status.WARN
            assert transaction.hint.startswith(f"end it: SELECT pg_terminate_backend({pid})")
            assert "idle in transaction" in transaction.value
            assert "ROLLBACK PREPARED 'it''s left'" in held["prepared transaction it's left"].hint
            slot = held["replication slot"]
            assert slot.value.startswith("replication slot (catalog) no_consumer (nobody reads it)")
            assert "pg_drop_replication_slot('no_consumer')" in slot.hint
            cells = {cell for item in report.evidence for row in item.rows for cell in row}
            assert str(pid) in cells
            assert str(reader.info.backend_pid) not in cells
        gone = "SELECT 1 FROM pg_stat_activity WHERE pid = %s"
        until(lambda: not server.sql(gone, pid), what="the end of the leaked transaction", seconds=120)
        server.sql("ROLLBACK PREPARED 'it''s left'", database=DATABASE)
        server.sql("SELECT pg_drop_replication_slot('no_consumer')")
        assert finding(check(long_seconds=1), "holds xmin back").status is Status.OK


def test_the_age_to_wraparound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("autovacuum_freeze_max_age=100000", "autovacuum=off")
    with server_with(tmp_path, monkeypatch, *settings) as server, server.connect(DATABASE) as leaked:
        leaked.execute("BEGIN")
        leaked.execute("SELECT pg_current_xact_id()")
        server.sql(BURN, database=DATABASE)
        report = check()
        age = finding(report, f"age of database {DATABASE}")
        assert age.status is Status.WARN
        assert int(age.value.split()[0].replace(",", "")) > 210_000
        assert "VACUUM (FREEZE" in age.hint
        left = report.facts["time until transaction ids run out without freezing"]
        assert left.endswith(("days", "years")) or " h " in left


# 210,000 transaction ids: each subtransaction that writes takes one.
BURN = """
CREATE TABLE burnt (i int);
DO $$ BEGIN
    FOR i IN 1..210000 LOOP
        BEGIN INSERT INTO burnt VALUES (1); EXCEPTION WHEN division_by_zero THEN NULL; END;
    END LOOP;
END $$
"""


def test_standbys_and_the_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server_with(tmp_path, monkeypatch) as server, receiver(server, "receiver_1", tmp_path):
        report = check()
        assert report.outcome.startswith("asynchronous: a standby is up to ")
        assert finding(report, "standby receiver_1").status is Status.OK
        assert finding(report, "slot receiver_1").value.startswith("active, reserved")
        set_sync(server, "FIRST 1 (receiver_1, elsewhere)")
        until_known(server, "sync")
        report = check()
        assert report.outcome.startswith("synchronous (FIRST 1 (receiver_1, elsewhere)): a commit returns when it is")
        assert "receiver_1 at 127.0.0.1" in report.outcome
        assert finding(report, "names without a standby").value == "elsewhere"
        server.sql(f"ALTER ROLE grc_user IN DATABASE {DATABASE} SET synchronous_commit = off")
        assert "for role grc_user in database grc_db" in finding(check(), "synchronous_commit").value
        set_sync(server, "nobody")
        until_known(server, "async")
        report = check()
        nobody = finding(report, "standbys that synchronous_standby_names needs")
        assert nobody.status is Status.CRITICAL
        assert "a cancelled wait is reported" in nobody.hint
        assert "application_name nobody" in nobody.hint
        set_sync(server, "")


def set_sync(server: PostgresServer, names: str) -> None:
    """Reloaded: the walsenders know it within a moment."""
    with server.connect() as connection:
        connection.execute("SET synchronous_commit = local")
        connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'".encode())
        connection.execute("SELECT pg_reload_conf()")
    until(lambda: server.sql("SHOW synchronous_standby_names")[0][0] == names, what="the new names", seconds=120)


def until_known(server: PostgresServer, state: str) -> None:
    """The walsender of the only receiver has read the new names too."""
    states = "SELECT sync_state FROM pg_stat_replication"
    until(lambda: server.sql(states) == [(state,)], what=f"a receiver that is {state}", seconds=120)


@contextlib.contextmanager
def receiver(server: PostgresServer, name: str, directory: Path) -> Iterator[None]:
    """pg_receivewal --synchronous with a slot, connected."""
    wal = directory / "wal"
    wal.mkdir()
    server.sql(f"SELECT pg_create_physical_replication_slot('{name}', true)")
    argv = [server.programs / "pg_receivewal", "-D", wal, "-S", name, "--synchronous", "--no-loop", "-s", "1"]
    login = f"host=127.0.0.1 port={server.port} user=postgres application_name={name}"
    environ = {**os.environ, "PGPASSWORD": ADMIN_PASSWORD}
    with subprocess.Popen([*map(str, argv), "-d", login], env=environ, stderr=subprocess.DEVNULL) as process:
        try:
            until(
                lambda: server.sql(
                    "SELECT true FROM pg_stat_replication WHERE state = 'streaming' AND flush_lsn > '0/0'"
                ),
                what="pg_receivewal",
                seconds=120,
            )
            yield
        finally:
            process.terminate()


def test_a_standby_that_has_replayed_nothing_says_so(trial: Trial) -> None:
    """As this server says of itself, which replays nothing."""
    found = read_replication(trial.environment.postgres)
    assert found.replay_age_seconds is None
    told = Report("Check replication", NAME, "", {})
    judge_mode(told, replace(found, settings=replace(found.settings, in_recovery=True)))
    assert told.facts["last replayed transaction"] == "none"
    judge_mode(told, replace(found, settings=replace(found.settings, in_recovery=True), replay_age_seconds=90.0))
    assert told.facts["last replayed transaction"].endswith(" ago")


def test_a_standby_says_that_it_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server_with(tmp_path, monkeypatch) as primary:
        if has_contrib():
            primary.sql("CREATE EXTENSION amcheck", database=DATABASE)
        standby = PostgresServer(settings=(REPLIES,))
        try:
            copy = ["-D", str(standby.data), "-R", "-c", "fast", "-X", "stream", "--no-sync", "-C", "-S", "standby_1"]
            login = f"host=127.0.0.1 port={primary.port} user=postgres application_name=s_1"
            # On no command line: another test reads all there are.
            environ = {**os.environ, "PGPASSWORD": ADMIN_PASSWORD}
            run(
                [standby.programs / "pg_basebackup", *copy, "-d", login],
                cwd=standby.root,
                account=standby.account,
                environment=environ,
            )
            standby.start()
            until(
                lambda: primary.sql("SELECT true FROM pg_stat_replication WHERE replay_lsn = pg_current_wal_lsn()"),
                what="the standby",
                seconds=120,
            )
            report = check()
            assert finding(report, "standby s_1").status is Status.OK
            assert finding(report, "slot standby_1").value.startswith("active, reserved")
            with standby.connect() as connection:
                connection.execute("SELECT pg_wal_replay_pause()")
            write_wal(primary, 32)
            assert finding(check(), "standby s_1").status is Status.WARN
            rows = next(item.rows for item in check().evidence if item.name == "Standbys and receivers")
            assert rows[0][6].endswith("MB")  # not replayed there
            monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(write_environment(standby, DATABASE, tmp_path)))
            assert check().outcome.startswith("this server is a standby (streaming from 127.0.0.1)")
            status = Status.OK if has_contrib() else Status.WARN
            assert check_corruption.fn(NAME, heapallindexed=True).status is status
        finally:
            standby.remove()
