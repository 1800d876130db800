"""check_connections, close_idle_connections, check_pool_settings: what they find on a server with a leaked transaction."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from flows.database.server import connections
from flows.database.server.connections import check_connections, check_pool_settings, close_idle_connections
from runbook import kinds, metrics
from runbook.errors import NotConfirmed, RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.postgres.sessions import closing
from tasks.postgres.sessions.closing import close_sessions
from tasks.postgres.sessions.connections import ClientSession, read_activity
from tasks.postgres.sessions.pool import read_pool
from tests.database.conftest import NAME, Trial
from tests.fixtures.reports import beginning as found
from tests.fixtures.servers import ADMIN, ADMIN_PASSWORD, ROLE_PASSWORD

Open = Callable[..., psycopg.Connection[Any]]


@pytest.fixture
def client(trial: Trial) -> Iterator[Open]:
    """Opens sessions that are closed after the test."""
    opened: list[psycopg.Connection[Any]] = []

    def open_one(
        application: str = "grc_backend", *, user: str = "grc_user", database: str = "", **options: Any
    ) -> psycopg.Connection[Any]:
        password = ADMIN_PASSWORD if user == ADMIN else ROLE_PASSWORD
        if user != ADMIN:
            trial.sql("GRANT CONNECT ON DATABASE " + f'"{trial.database}" TO grc_user')
        connection = psycopg.connect(
            host="127.0.0.1",
            port=trial.server.port,
            user=user,
            password=password,
            dbname=database or trial.database,
            application_name=application,
            **options,
        )
        opened.append(connection)
        return connection

    yield open_one
    for connection in opened:
        connection.close()


def limit(monkeypatch: pytest.MonkeyPatch, metric: metrics.Metric, warn: float, critical: float) -> None:
    monkeypatch.setitem(metrics.CATALOGUE, metric.name, replace(metric, warn=warn, critical=critical))  # type: ignore[arg-type]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions count as forgotten after a moment, and are never so for too long; whoever is ended may take its time."""
    monkeypatch.setattr(connections, "LEAST_SECONDS", 0)
    limit(monkeypatch, metrics.IDLE, 0.05, 86400.0)
    limit(monkeypatch, metrics.BLOCKED, 0.05, 86400.0)
    monkeypatch.setattr(closing, "END_MILLISECONDS", 120_000)


def pid(connection: psycopg.Connection[Any]) -> int:
    return connection.info.backend_pid


def rows(report: Report, name: str) -> tuple[tuple[str, ...], ...]:
    return next((table.rows for table in report.evidence if table.name == name), ())


def session(trial: Trial, process: int) -> ClientSession | None:
    return next((s for s in read_activity(trial.environment.postgres).sessions if s.pid == process), None)


def leak(connection: psycopg.Connection[Any]) -> None:
    """A transaction that took a row's lock and was forgotten."""
    connection.execute("UPDATE people SET t = 'leaked' WHERE id = 1")


def block(trial: Trial, connection: psycopg.Connection[Any]) -> threading.Thread:
    """A session that waits for that row; returns when the server says so."""

    def update() -> None:
        connection.execute("UPDATE people SET t = 'waits' WHERE id = 1")
        connection.commit()

    thread = threading.Thread(target=update)
    thread.start()
    until(
        lambda: (s := session(trial, pid(connection))) and s.blocked_by and s.waited_seconds > 0.1,
        what="the wait",
        seconds=120,
    )
    return thread


def goes_on(thread: threading.Thread) -> None:
    """Who waited has the lock, and ends."""
    thread.join(120)
    assert not thread.is_alive()


def test_a_quiet_server_is_ok(trial: Trial, client: Open) -> None:
    client("a pool").commit()
    report = check_connections.fn(NAME)
    assert report.status is Status.OK, report.sentence()
    counted = {row[:4]: row[4] for row in rows(report, "Connections")}
    assert counted[(trial.database, "grc_user", "a pool", "idle")] == "1"
    assert not rows(report, "Who blocks whom")


def test_a_leaked_transaction_is_found_as_the_root_of_those_that_wait(trial: Trial, client: Open, quick: None) -> None:
    leaked, second, third = client("leaky"), client("waits"), client("waits too")
    leak(leaked)
    threads = [block(trial, second), block(trial, third)]
    report = check_connections.fn(NAME)
    assert report.status is Status.WARN
    tree = rows(report, "Who blocks whom")
    assert [row[0] for row in tree[:2]] == [str(pid(leaked)), f"└ {pid(second)}"]
    assert tree[2][0].endswith(f"└ {pid(third)}")
    assert tree[0][3] == "idle in transaction"
    assert tree[0][-1] == "UPDATE people SET t = '…' WHERE id = 1"
    assert tree[1][-1] == "UPDATE people SET t = '…' WHERE id = 1"
    assert f"process {pid(leaked)}" in found(report, "postgres.sessions.idle_in_transaction_seconds").name
    assert "close-idle-connections" in found(report, "postgres.sessions.blocked_seconds").hint
    leaked.rollback()
    for thread in threads:
        goes_on(thread)


def test_passwords_and_data_in_statements_are_in_no_report(trial: Trial, client: Open, quick: None) -> None:
    leaked = client("leaky", user=ADMIN)
    leaked.execute("ALTER ROLE grc_user VALID UNTIL 'infinity'; UPDATE people SET name = '山田' WHERE id = 1")
    sees = check_connections.fn(NAME), close_idle_connections.fn(NAME, min_seconds=0)
    silent = client("silent")
    silent.execute("SELECT '山田'")
    done = close_idle_connections.fn(NAME, min_seconds=0, confirm=NAME)
    assert pid(leaked) in {int(row[0].split()[0]) for row in rows(done, "Kept")}
    assert "closed" in {row[1] for row in rows(done, "Closed")}
    for report in (*sees, done):
        told = str(report.as_json())
        assert "UPDATE people SET name = '…'" in told
        assert "山田" not in told
        assert "infinity" not in told


def test_a_prepared_transaction_that_blocks_is_named(trial: Trial, client: Open, quick: None) -> None:
    trial.sql("BEGIN; UPDATE people SET t = 'prepared' WHERE id = 1; PREPARE TRANSACTION 'forgotten one'")
    waits = client("waits")
    thread = block(trial, waits)
    try:
        report = check_connections.fn(NAME)
        assert rows(report, "Who blocks whom")[0][0] == "prepared transaction"
        assert "forgotten one" in found(report, "prepared transactions").value
        assert "ROLLBACK PREPARED" in found(report, "postgres.sessions.blocked_seconds").hint
    finally:
        trial.sql("ROLLBACK PREPARED 'forgotten one'")
        goes_on(thread)


def test_scarce_connections_are_critical(trial: Trial, client: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(8):
        client("crowd")
    limit(monkeypatch, metrics.CONNECTIONS, 0.02, 0.05)
    with pytest.raises(RunbookFailed, match="postgres.connections.used_ratio"):
        check_connections.fn(NAME)


def test_the_plan_closes_nothing_and_the_run_what_it_planned(trial: Trial, client: Open, quick: None) -> None:
    leaked, waits, pooled = client(), client("waits"), client()
    pooled.execute("SELECT 1")
    pooled.commit()
    leak(leaked)
    thread = block(trial, waits)
    planned = close_idle_connections.fn(NAME, min_seconds=0)
    assert planned.status is Status.PLANNED
    (step,) = planned.plan_steps
    assert step.detail.startswith(f"{pid(leaked)} (grc_user")
    assert session(trial, pid(leaked))
    report = close_idle_connections.fn(NAME, min_seconds=0, also_idle=True, confirm=NAME)
    assert report.status is Status.OK, report.sentence()
    goes_on(thread)
    assert trial.sql("SELECT t FROM people WHERE id = 1") == [("touched",)]  # the waiting one's, through the trigger
    assert session(trial, pid(leaked)) is None
    assert session(trial, pid(pooled)), "a pool's idle connection was closed"
    assert close_idle_connections.fn(NAME, min_seconds=0, confirm=NAME).outcome == "nothing to close"


def test_what_is_kept(trial: Trial, client: Open, quick: None) -> None:
    kept = {
        "a superuser's": client("psql", user=ADMIN),
        "application pg_dump": client("pg_dump"),
        "application mine": client("mine"),
    }
    for connection in kept.values():
        connection.execute("SELECT 1")
    locked, listens = client("leader"), client("worker", autocommit=True)
    locked.execute("SELECT pg_advisory_lock(4711)")
    locked.commit()
    listens.execute("LISTEN news")
    idle = client("somebody")
    idle.execute("SELECT 1")
    idle.commit()
    report = close_idle_connections.fn(NAME, 0, True, keep_applications=("mine",), confirm=NAME)
    assert report.status is Status.WARN
    assert "pg_terminate_backend" in found(report, "idle in transaction and kept").hint
    told = {row[0].split(" ")[0]: row[1] for row in rows(report, "Kept")}
    for why, connection in (*kept.items(), ("advisory lock", locked), ("listens", listens)):
        assert why in told[str(pid(connection))]
        assert session(trial, pid(connection))
    assert session(trial, pid(idle)) is None


@pytest.fixture
def neighbour(trial: Trial) -> Iterator[str]:
    """The database of another environment on the same server, with a name that begins alike."""
    name = f"{trial.database}_prod"
    trial.server.create_database(name)
    yield name
    trial.server.drop_database(name)


def test_sessions_of_other_databases_are_counted_and_never_ended(
    trial: Trial, client: Open, quick: None, neighbour: str
) -> None:
    forgotten, idle = client("psql-prod", database=neighbour), client("worker", database=neighbour)
    for connection in (forgotten, idle):
        connection.execute("SELECT 1")
    idle.commit()
    report = close_idle_connections.fn(NAME, min_seconds=0, also_idle=True, confirm=NAME)
    assert report.outcome == "nothing to close"
    assert f"2 in {neighbour}" in report.facts["as idle in other databases (kept)"]
    leak(client("mine"))
    assert close_idle_connections.fn(NAME, 0, True, confirm=NAME).outcome == "1 of 1 sessions closed"
    forgotten.execute("SELECT 'still there'")
    idle.execute("SELECT 'still there'")
    until(lambda: (s := session(trial, pid(forgotten))) and s.state_seconds > 0.1, what="its idle time", seconds=120)
    checked = check_connections.fn(NAME)
    others = found(checked, "idle in transaction in other databases")
    assert (others.status, neighbour in others.value) == (Status.WARN, True)
    assert "in the environment of each" in others.hint
    assert found(checked, "postgres.sessions.idle_in_transaction_seconds").status is Status.OK
    assert str(pid(forgotten)) in {row[0] for row in rows(checked, "Idle in transaction")}


def test_the_action_itself_ends_no_session_of_another_database(
    trial: Trial, client: Open, quick: None, neighbour: str
) -> None:
    forgotten = client("psql-prod", database=neighbour)
    forgotten.execute("SELECT 1")
    seen = session(trial, pid(forgotten))
    assert seen
    (left,) = close_sessions.work(trial.environment.postgres, [seen], 0)
    assert (left.closed, left.why) == (False, f"kept: in {neighbour}, of another environment")
    forgotten.execute("SELECT 'still there'")


def test_a_session_that_works_again_is_left_alone(trial: Trial, client: Open, quick: None) -> None:
    awake = client("awake")
    leak(awake)
    now = session(trial, pid(awake))
    assert now
    assert now.is_idle_in_transaction
    seen = replace(now, state_seconds=7200.0)  # as if it had been so for hours, when it was looked at
    awake.execute("SELECT 1")  # its state changed just now
    (left,) = close_sessions.work(trial.environment.postgres, [seen], 3600)
    assert (left.closed, left.why) == (False, "kept: now idle in transaction")
    awake.commit()
    (left,) = close_sessions.work(trial.environment.postgres, [seen], 0)
    assert (left.closed, left.why) == (False, "kept: now idle")
    with pytest.raises(NotConfirmed):
        close_sessions.bind(trial.environment.postgres, [seen], 0)()


def test_a_server_killed_while_sessions_are_closed_is_served_again(
    trial: Trial, client: Open, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for connection in (client("one"), client("two")):
        connection.execute("SELECT 1")
    with monkeypatch.context() as patched:
        patched.setattr(kinds, "RETRY_DELAYS_SECONDS", [0.1, 0.1, 0.1])
        patched.setattr(closing, "failpoint", lambda _: trial.server.crash())
        with pytest.raises(RunbookFailed, match="does not answer"):
            close_idle_connections.fn(NAME, min_seconds=0, confirm=NAME)
    trial.server.start()
    leak(client("three"))
    report = close_idle_connections.fn(NAME, min_seconds=0, confirm=NAME)
    assert report.outcome == "1 of 1 sessions closed"


def test_a_login_that_sees_too_little_says_so(trial: Trial, client: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    client("psql", user=ADMIN)
    monkeypatch.setenv("TRIAL_ADMIN_PASSWORD", ROLE_PASSWORD)
    file = Path(os.environ["OPS_ENVIRONMENT_FILE"])
    file.write_text(file.read_text().replace("[postgres]", '[postgres]\nadmin_user = "grc_user"'))
    report = check_connections.fn(NAME)
    assert report.status is Status.WARN
    assert "pg_read_all_stats" in found(report, "not measured").hint


def test_the_environment_s_thresholds_stand_above_ours(trial: Trial, client: Open) -> None:
    leak(client("leaky"))
    file = Path(os.environ["OPS_ENVIRONMENT_FILE"])
    metric = '"postgres.sessions.idle_in_transaction_seconds" = [0, 0]'
    file.write_text(file.read_text().replace("[thresholds]", f"[thresholds]\n{metric}"))
    with pytest.raises(RunbookFailed, match="idle_in_transaction_seconds"):
        check_connections.fn(NAME)


def test_the_form_takes_no_moment(trial: Trial) -> None:
    with pytest.raises(RunbookFailed, match="min_seconds is 0"):
        close_idle_connections.fn(NAME, min_seconds=0)


MANUAL = """DATABASE_POOL_SIZE=20
DATABASE_MAX_OVERFLOW=10
DATABASE_POOL_TIMEOUT=30
DATABASE_POOL_RECYCLE=3600
DATABASE_ECHO=false
DATABASE_URL=postgresql://u:s3cret@h/d
"""
Configure = Callable[..., None]


@pytest.fixture
def pool(trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Writes the application's `.env` and the environment's TOML."""
    backend = tmp_path / "grc"
    backend.mkdir()
    file = tmp_path / "trial.toml"
    text = file.read_text()

    def configure(env: str = MANUAL, *, tier: str = "production", port: int = 9, **files: str) -> None:
        (backend / ".env").write_text(env)
        for name, content in files.items():
            (backend / f"{name}.py").write_text(content)
        section = f'[application]\nbackend_directory = "{backend}"\nurl = "http://127.0.0.1:{port}"\n'
        file.write_text(f'tier = "{tier}"\n{text}{section}')

    configure()
    return configure


def test_the_manual_s_pool_is_ok(pool: Configure) -> None:
    report = check_pool_settings.fn(NAME, workers=2)
    assert report.status is Status.OK, report.sentence()
    assert "(20 + 10) × 2 workers = 60 of 100" in report.outcome
    assert {row[3] for row in rows(report, "Pool")} == {".env"}
    assert "s3cret" not in str(report.as_json())


def test_pool_times_workers_over_the_limit_is_critical(pool: Configure) -> None:
    with pytest.raises(RunbookFailed, match=r"\(20 \+ 10\) × 4 workers = 120 of 100"):
        check_pool_settings.fn(NAME, workers=4)
    report = check_pool_settings.fn(NAME, workers=3)  # 90 of 97
    assert report.status is Status.WARN


def test_the_role_s_own_limit_counts(trial: Trial, pool: Configure) -> None:
    trial.sql("ALTER ROLE grc_user CONNECTION LIMIT 25")
    try:
        with pytest.raises(RunbookFailed, match=r"\(20 \+ 10\) × 1 workers = 30"):
            check_pool_settings.fn(NAME, workers=1)
    finally:
        trial.sql("ALTER ROLE grc_user CONNECTION LIMIT -1")


def test_echo_in_production_and_other_values(pool: Configure) -> None:
    changed = (
        MANUAL.replace("ECHO=false", "ECHO=True").replace("TIMEOUT=30", "TIMEOUT='5'").replace("SIZE=20", "SIZE=0")
    )
    pool(changed)
    with pytest.raises(RunbookFailed) as failed:
        check_pool_settings.fn(NAME, workers=1)
    report = failed.value.report
    assert found(report, "DATABASE_ECHO").status is Status.CRITICAL
    assert found(report, "DATABASE_POOL_TIMEOUT").status is Status.WARN
    assert (found(report, "connections at most").value, found(report, "DATABASE_POOL_RECYCLE").status) == (
        "no limit",
        "OK",
    )
    pool(MANUAL.replace("ECHO=false", "ECHO=1"), tier="development")
    assert check_pool_settings.fn(NAME, workers=1).status is Status.OK


def test_values_in_code_count_where_no_file_sets_them(pool: Configure) -> None:
    code = "class Settings:\n    database_pool_size: int = 7\nDATABASE_MAX_OVERFLOW = 10\nDATABASE_POOL_TIMEOUT = f()\n"
    pool("DATABASE_MAX_OVERFLOW=3\n", config=code)
    report = check_pool_settings.fn(NAME, workers=1)
    assert report.status is Status.WARN
    told = {row[0]: row[1:] for row in rows(report, "Pool")}
    assert told["DATABASE_POOL_SIZE"] == ("7", "20", "config.py")
    assert told["DATABASE_MAX_OVERFLOW"][::2] == ("3", ".env")
    assert told["DATABASE_POOL_TIMEOUT"][0] == "not found"
    assert found(report, "DATABASE_ECHO not measured").status is Status.WARN


def test_workers_that_are_not_known_are_said(pool: Configure) -> None:
    report = check_pool_settings.fn(NAME)
    assert report.status is Status.WARN
    assert "workers=" in found(report, "workers not measured").hint


SERVER = """
import os, socket, sys, time
listening = socket.socket()
listening.bind(("127.0.0.1", 0))
listening.listen()
for _ in range(3):
    if not os.fork():
        import ctypes
        ctypes.CDLL(None).prctl(1, 15)
        time.sleep(60)
        sys.exit()
print(listening.getsockname()[1], flush=True)
time.sleep(60)
"""


def test_running_workers_are_counted_and_their_environment_counts(trial: Trial, pool: Configure) -> None:
    variables = {"DATABASE_POOL_SIZE": "11", "PATH": "/usr/bin:/bin"}
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, env=variables) as process:
        try:
            assert process.stdout
            pool(port=int(process.stdout.readline()))
            seen = read_pool(trial.environment.application)
            assert seen.workers
            assert seen.workers.text == "3"
            assert seen.values["DATABASE_POOL_SIZE"].text == "11"
            assert seen.values["DATABASE_MAX_OVERFLOW"].text == "10"
        finally:
            process.terminate()


def test_the_lab_s_application_is_read_as_it_reads_itself(pool: Configure, trial: Trial, tmp_path: Path) -> None:
    from lab.application.grc_backend.settings import Settings

    source = Path(__file__).parents[3] / "lab/application/grc_backend/settings.py"
    pool("", settings_of_nobody="")
    (tmp_path / "grc" / "grc_backend").mkdir()
    (tmp_path / "grc" / "grc_backend" / "settings.py").write_text(source.read_text())
    values = read_pool(trial.environment.application).values
    given = dict.fromkeys(("HOST", "DATABASE_URL", "REDIS_URL", "AI_PROVIDERS_URL", "LOG_DIRECTORY"), "x") | {
        "PORT": "1"
    }
    assert len(values) == 5
    own = Settings.from_mapping(given)
    assert {name: float(value.text) for name, value in values.items() if name != "DATABASE_ECHO"} == {
        name: float(getattr(own, name.lower())) for name in values if name != "DATABASE_ECHO"
    }
    assert values["DATABASE_ECHO"].is_on is own.database_echo
