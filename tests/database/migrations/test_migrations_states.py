"""Migrations cut off: by a server that dies, by a run that is killed, half-way through a migration that commits in
between. The report says in which state the database is, nothing is half done, and the next run ends well."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from blocks.config import toml
from flows.database.migration import live
from flows.database.migrations import apply_migrations, check_migrations, rollback_migrations
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.migrations.alembic import upgrade
from tasks.migrations.scratch import scratch_name
from tests.database.backup.test_backup import run
from tests.database.migrations.test_migrations import (  # noqa: F401
    BACKEND,
    DATABASE,
    NAME,
    add,
    finding,
    found,
    revision,
    tier,
)
from tests.fixtures.servers import PostgresServer, running_postgres

GOOD = (Status.OK, Status.WARN)
SCRATCH = scratch_name(DATABASE)


def apply() -> Report:
    return apply_migrations.fn(NAME, confirm=NAME)


def roll_back() -> Report:
    return rollback_migrations.fn(NAME, confirm=NAME)


def tables(server: PostgresServer, name: str) -> int:
    return len(server.sql("SELECT 1 FROM pg_class WHERE relname = %s AND relkind = 'r'", name, database=DATABASE))


def scratch_is_there(server: PostgresServer) -> bool:
    return bool(server.sql("SELECT 1 FROM pg_database WHERE datname = %s", SCRATCH))


@pytest.fixture(scope="module")
def postgres_server() -> Iterator[PostgresServer]:
    """A server of its own, to be killed."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def backend(tmp_path: Path) -> Path:
    """One table and one migration: quick to copy and to judge."""
    root = tmp_path / "grc"
    (root / "alembic" / "versions").mkdir(parents=True)
    shutil.copy(BACKEND / "alembic.ini", root)
    shutil.copy(BACKEND / "alembic" / "env.py", root / "alembic")
    add(root, "0005", "", "op.execute('CREATE TABLE people (id int)')", "op.execute('DROP TABLE people')")
    return root


def migrate_to(server: PostgresServer, target: str) -> None:
    env = toml.environment(NAME)
    upgrade.work(env.postgres, env.application, DATABASE, target)
    server.sql("SET ROLE grc_user; INSERT INTO people VALUES (1)", database=DATABASE)


def waits_once(tmp_path: Path, where: str) -> str:
    """A migration that makes a table, and then waits on one database until it is ended: the first time only."""
    marker = tmp_path / "waited"
    sleep = "op.execute('SELECT pg_sleep(600)')"
    here = f"op.get_bind().engine.url.database == {where!r} and not pathlib.Path({str(marker)!r}).exists()"
    return (
        f"import pathlib\n    op.execute('CREATE TABLE half (x int)')\n"
        f"    if {here}:\n        pathlib.Path({str(marker)!r}).touch()\n        {sleep}"
    )


def sleeps(server: PostgresServer) -> bool:
    try:
        return bool(server.sql("SELECT 1 FROM pg_stat_activity WHERE query ~ '^SELECT pg_sleep' AND state = 'active'"))
    except psycopg.OperationalError:
        return False


def cut(server: PostgresServer, call: Callable[[], Report], how: signal.Signals, *, again: bool) -> Report:
    """Run it, end the server while a migration waits, start it `again` or leave it; returns the report of the failure.

    The server is started here: it ends with the thread that started it.
    """
    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(call)
        until(lambda: running.done() or sleeps(server), what="a migration that waits", seconds=900)
        server.stop(how)
        if again:
            server.start()
        with pytest.raises(RunbookFailed) as raised:
            running.result()
    return raised.value.report


def test_a_server_that_dies_while_migrations_are_applied(
    postgres_server: PostgresServer, backend: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9, and it stays down: what is unknown is said to be. Then an immediate shutdown and a start."""
    monkeypatch.setattr(live, "ANSWER_SECONDS", 1.0)
    migrate_to(postgres_server, "0005")
    add(backend, "0006", "0005", waits_once(tmp_path, DATABASE), "op.execute('DROP TABLE half')")
    report = cut(postgres_server, apply, signal.SIGKILL, again=False)
    state = found(report, "state of the system")
    assert "the server does not answer, so the revision of migrations_db is unknown" in state.value
    assert "check-migrations" in state.hint
    postgres_server.start()
    assert revision(postgres_server) == "0005"

    (tmp_path / "waited").unlink()
    monkeypatch.setattr(live, "ANSWER_SECONDS", 120.0)
    report = cut(postgres_server, apply, signal.SIGQUIT, again=True)
    state = found(report, "state of the system")
    assert "nothing was changed: migrations_db is at 0005, with the same definitions as before" in state.value
    assert tables(postgres_server, "half") == 0

    assert apply().status in GOOD
    assert (revision(postgres_server), tables(postgres_server, "half")) == ("0006", 1)


def test_a_server_that_dies_during_a_rehearsal(postgres_server: PostgresServer, backend: Path, tmp_path: Path) -> None:
    migrate_to(postgres_server, "0005")
    add(backend, "0006", "0005", waits_once(tmp_path, SCRATCH), "op.execute('DROP TABLE half')")
    report = cut(postgres_server, apply, signal.SIGQUIT, again=True)
    assert "migrations_db is unchanged, at 0005" in found(report, "state of the system").value
    assert not [step for step in report.steps if step.name == "upgrade_live"]
    assert revision(postgres_server) == "0005"

    assert apply().status in GOOD
    assert revision(postgres_server) == "0006"
    assert not scratch_is_there(postgres_server)


def test_a_server_that_dies_during_a_rollback(postgres_server: PostgresServer, backend: Path, tmp_path: Path) -> None:
    back = waits_once(tmp_path, DATABASE).replace("CREATE TABLE half (x int)", "DROP TABLE half")
    add(backend, "0006", "0005", "op.execute('CREATE TABLE half (x int)')", back)
    migrate_to(postgres_server, "0006")
    report = cut(postgres_server, roll_back, signal.SIGQUIT, again=True)
    assert "nothing was changed: migrations_db is at 0006" in found(report, "state of the system").value
    assert (revision(postgres_server), tables(postgres_server, "half")) == ("0006", 1)

    assert roll_back().status is Status.OK
    assert (revision(postgres_server), tables(postgres_server, "half")) == ("0005", 0)


def test_a_migration_that_commits_in_between_and_fails_is_told_as_half_done(
    postgres_server: PostgresServer, backend: Path
) -> None:
    migrate_to(postgres_server, "0005")
    up = (
        "with op.get_context().autocommit_block():\n        op.execute('CREATE INDEX CONCURRENTLY ix ON people (id)')\n"
    )
    up += f"    if op.get_bind().engine.url.database == {DATABASE!r}: raise RuntimeError('only here')"
    add(backend, "0006", "0005", up, "op.execute('DROP INDEX ix')")
    with pytest.raises(RunbookFailed, match="only here") as raised:
        apply()
    state = found(raised.value.report, "state of the system")
    assert "is at 0005, but part of a migration is committed (0006 commits in between)" in state.value
    assert "INDEX public.ix (owner grc_user) is new" in state.value
    assert "run this again" in state.hint
    assert finding(raised.value.report, "locks on large tables") is Status.OK


@pytest.mark.parametrize("point", ["rehearsal: went up", "after upgrade_live"])
def test_a_run_that_is_killed_is_launched_again(postgres_server: PostgresServer, backend: Path, point: str) -> None:
    migrate_to(postgres_server, "0005")
    add(backend, "0006", "0005", "op.execute('CREATE TABLE half (x int)')", "op.execute('DROP TABLE half')")
    call = f"flows.database.migrations.apply_migrations dict(environment={NAME!r},confirm={NAME!r})"
    assert run(call, OPS_FAILPOINT=point).returncode == -9
    assert (revision(postgres_server) == "0006") is (point == "after upgrade_live")
    assert apply().status in GOOD
    assert (revision(postgres_server), tables(postgres_server, "half")) == ("0006", 1)
    assert finding(check_migrations.fn(NAME), "pending migrations") is Status.OK
    assert not scratch_is_there(postgres_server)
