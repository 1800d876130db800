"""Applications whose alembic/env.py goes its own way: to another database than it is told, or with a driver that does
not take what libpq's take. The live database is never what a rehearsal runs on."""

# ruff: noqa: F811
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blocks.config import toml
from flows.database.migrations import apply_migrations, check_migrations, create_migration, rollback_migrations
from runbook.errors import OpsError, VerificationFailed
from runbook.report import Status
from runbook.wait import until
from tasks.migrations.alembic import MigratedDatabase, upgrade
from tasks.migrations.rehearsal import migrate_rehearsal
from tests.database.migrations.test_migrations import (  # noqa: F401
    DATABASE,
    NAME,
    add,
    finding,
    found,
    revision,
    tier,
)
from tests.database.migrations.test_migrations_rehearsal import columns, databases, failed
from tests.database.migrations.test_migrations_states import backend, migrate_to, sleeps  # noqa: F401
from tests.fixtures.servers import PostgresServer

ASYNC = """
import asyncio, os
from alembic import context
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

def run(connection):
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()

async def online():
    url = make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url, poolclass=NullPool, connect_args={"server_settings": {}})
    async with engine.connect() as connection:
        await connection.run_sync(run)
        await connection.commit()

asyncio.run(online())
"""


def goes_to_live(server: PostgresServer, backend: Path) -> None:
    """Its address comes from a file of its own (as from alembic.ini), whatever DATABASE_URL says."""
    (backend / "address").write_text(server.block(DATABASE).url(DATABASE))
    path = backend / "alembic" / "env.py"
    text = path.read_text()
    assert 'os.environ.get("DATABASE_URL")' in text
    path.write_text(text.replace('os.environ.get("DATABASE_URL")', 'open("address").read()'))


def refused(call: object, *arguments: object, **named: object) -> None:
    report = failed(call, *arguments, **named)
    assert "connected to another database than migrations_db__rehearsal" in report.sentence()
    assert "DATABASE_URL" in str(report.as_json())


def test_an_application_that_goes_to_the_live_database_is_not_rehearsed_there(
    postgres_server: PostgresServer, backend: Path
) -> None:
    add(
        backend,
        "0006",
        "0005",
        "op.execute('ALTER TABLE people ADD COLUMN x int')",
        "op.execute('ALTER TABLE people DROP COLUMN x')",
    )
    migrate_to(postgres_server, "0006")
    add(backend, "0007", "0006", "op.execute('DROP TABLE people')", "op.execute('CREATE TABLE people (id int)')")
    goes_to_live(postgres_server, backend)
    refused(rollback_migrations)
    refused(rollback_migrations, "base", lose_rows=9, confirm=NAME)
    refused(check_migrations, rehearse=True)
    refused(apply_migrations, confirm=NAME)
    refused(create_migration, "anything")
    assert revision(postgres_server) == "0006"
    assert columns(postgres_server, "people") == ["id", "x"]
    assert databases(postgres_server) == [DATABASE]


def test_one_that_goes_to_an_empty_live_database_is_seen_too(postgres_server: PostgresServer, backend: Path) -> None:
    """There is no revision there to be told."""
    goes_to_live(postgres_server, backend)
    refused(apply_migrations, confirm=NAME)
    assert revision(postgres_server) == ""
    assert columns(postgres_server, "people") == []


def test_a_copy_that_will_be_live_is_migrated_or_nothing_is(postgres_server: PostgresServer, backend: Path) -> None:
    """As full-restore does it: the copy has rows and a revision."""
    migrate_to(postgres_server, "0005")
    env = toml.environment(NAME)
    copy = f"{DATABASE}__new"
    postgres_server.create_database(copy)
    try:
        upgrade.work(env.postgres, env.application, copy, "0005")
        add(backend, "0006", "0005", "op.execute('DROP TABLE people')", "op.execute('SELECT 1')")
        goes_to_live(postgres_server, backend)
        with pytest.raises(VerificationFailed, match="connected to another database"):
            upgrade.work(env.postgres, env.application, copy)
        assert columns(postgres_server, "people") == ["id"]
        kept = "SELECT array_agg(relname::text ORDER BY 1) FROM pg_class WHERE relname LIKE 'alembic%'"
        assert postgres_server.sql(kept, database=copy) == [(["alembic_version", "alembic_version_pkc"],)]
        assert postgres_server.sql("SELECT * FROM alembic_version", database=copy) == [("0005",)]
    finally:
        postgres_server.drop_database(copy)


def test_a_pass_that_does_not_arrive_or_that_moves_the_live_database_is_none(
    postgres_server: PostgresServer, backend: Path
) -> None:
    migrate_to(postgres_server, "0005")
    env = toml.environment(NAME)
    scratch = f"{DATABASE}__rehearsal"
    add(backend, "0006", "0005", "op.execute('SELECT 1')", "op.execute('SELECT 1')")
    postgres_server.create_database(scratch)
    try:
        goes_to_live(postgres_server, backend)
        with pytest.raises(VerificationFailed, match="migrations_db is at 0006 now and was at 0005"):
            migrate_rehearsal.work(env.postgres, env.application, scratch, "up", "0006")
        went = migrate_rehearsal.work(env.postgres, env.application, scratch, "up", "0006")
        assert went.error == "alembic reported no error, but the copy is at base instead of 0006"
    finally:
        postgres_server.drop_database(scratch)


def test_a_driver_without_a_lock_timeout_is_told(postgres_server: PostgresServer, backend: Path) -> None:
    migrate_to(postgres_server, "0005")
    add(
        backend,
        "0006",
        "0005",
        "op.execute('ALTER TABLE people ADD COLUMN x int')",
        "op.execute('ALTER TABLE people DROP COLUMN x')",
    )
    limit = "lock timeout"
    assert finding(check_migrations.fn(NAME, rehearse=True), limit) is Status.OK

    add(backend, "0007", "0006", "op.execute('SET lock_timeout = 0')", "op.execute('SELECT 1')")
    unset = found(check_migrations.fn(NAME, rehearse=True), limit)
    assert (unset.status, unset.value) == (
        Status.WARN,
        "none: 0007 would wait forever, and block all queries behind it",
    )

    (backend / "alembic" / "env.py").write_text(ASYNC)
    without = found(check_migrations.fn(NAME, rehearse=True), limit)
    assert without.status is Status.WARN
    assert without.value == "none: 0006, 0007 would wait forever, and block all queries behind it"
    assert "server_settings" in without.hint
    text = ASYNC.replace('"server_settings": {}', '"server_settings": {"lock_timeout": "10s"}')
    (backend / "alembic" / "env.py").write_text(text)
    (backend / "alembic" / "versions" / "0007_x.py").unlink()
    assert finding(check_migrations.fn(NAME, rehearse=True), limit) is Status.OK


def test_a_migration_whose_program_is_ended_does_not_go_on(
    postgres_server: PostgresServer, backend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate_to(postgres_server, "0005")
    add(backend, "0006", "0005", "op.execute('SELECT pg_sleep(600)')", "op.execute('SELECT 1')")
    monkeypatch.setattr("tasks.migrations.program.TIMEOUT_SECONDS", 5.0)
    env = toml.environment(NAME)

    def migrate() -> MigratedDatabase:
        return upgrade.work(env.postgres, env.application, DATABASE)

    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(migrate)
        until(lambda: running.done() or sleeps(postgres_server), what="a migration that waits", seconds=900)
        with pytest.raises(OpsError, match="did not end within 5 s"):
            running.result()
    until(lambda: not sleeps(postgres_server), what="the end of its session", seconds=120)
    assert revision(postgres_server) == "0005"
