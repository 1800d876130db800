"""A plan that is green is carried out: whatever would refuse the confirmed run refuses the dry run."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.database.backup import backup_database
from flows.recovery.full_restore import full_restore
from flows.redis.persistence import backup_redis
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from tests.stranger.system import NAME, ROLE, Stranger

Seed = Callable[[Stranger, pytest.MonkeyPatch], contextlib.AbstractContextManager[dict[str, object] | None]]
SEEDS: dict[str, tuple[Seed, str]] = {}


def refused_with(words: str) -> Callable[[Callable[..., Iterator[dict[str, object] | None]]], None]:
    """A state of the system, healed when its generator ends, and what the plan says of it."""

    def keep(function: Callable[..., Iterator[dict[str, object] | None]]) -> None:
        SEEDS[function.__name__] = (contextlib.contextmanager(function), words)

    return keep


@pytest.fixture(scope="module")
def backed_up(system: Stranger) -> Stranger:
    """With a backup of each part."""
    with pytest.MonkeyPatch.context() as patch:
        for name, text in system.variables.items():
            patch.setenv(name, text)
        for flow in (backup_database, backup_redis):
            flow.fn(NAME)
    return system


def plan(**parameters: object) -> Report:
    """The dry run's report, whatever it is."""
    try:
        return full_restore.fn(NAME, **parameters)
    except RunbookFailed as error:
        return error.report


def findings(report: Report) -> str:
    """What is critical, as a reader sees it."""
    bad = [finding for finding in report.findings if finding.status is Status.CRITICAL]
    return "\n".join(f"{finding.name}: {finding.value} — {finding.hint}" for finding in bad)


def test_the_system_as_it_is_has_a_green_plan(backed_up: Stranger, stranger: Stranger) -> None:
    report = plan()
    assert report.status is Status.PLANNED, findings(report)


@refused_with("refuses the password of role members_app")
def wrong_password_of_the_application(
    stranger: Stranger, patch: pytest.MonkeyPatch
) -> Iterator[dict[str, object] | None]:
    patch.setenv("STRANGER_PASSWORD", "another")
    yield None


@refused_with("pg_hba.conf")
def closed_to_the_copy(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[dict[str, object] | None]:
    file = stranger.root / "pg/data/pg_hba.conf"
    text = file.read_text()
    file.write_text(f"host members all 127.0.0.1/32 scram-sha-256\nhost all {ROLE} 127.0.0.1/32 reject\n{text}")
    stranger.sql("SELECT pg_reload_conf()")
    yield None
    file.write_text(text)
    stranger.sql("SELECT pg_reload_conf()")


@refused_with("not permitted to log in")
def role_without_login(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[dict[str, object] | None]:
    stranger.sql(f"ALTER ROLE {ROLE} NOLOGIN")
    yield None
    stranger.sql(f"ALTER ROLE {ROLE} LOGIN")


@refused_with("rights of the administrator: CREATEDB: False; not a member of: members_app")
def administrator_without_rights(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[dict[str, object] | None]:
    stranger.sql("CREATE ROLE limited LOGIN BYPASSRLS PASSWORD 'adm1n:/p@ss'")
    stranger.describe(("admin_password_env", 'admin_user = "limited"\nadmin_password_env'))
    yield None
    stranger.sql("DROP ROLE limited")


@refused_with("transactions of the administrator: read-only by default")
def read_only_by_default(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[dict[str, object] | None]:
    stranger.sql("ALTER ROLE postgres SET default_transaction_read_only = on")
    yield None
    stranger.sql("BEGIN READ WRITE; ALTER ROLE postgres RESET default_transaction_read_only; COMMIT")


@refused_with("max_connections: 100 — launch it with jobs=")
def more_jobs_than_connections(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[dict[str, object] | None]:
    patch.setattr("tasks.postgres.requirements.OTHER_SESSIONS", 80)
    yield {"jobs": 32}


@refused_with("extensions: not installed: members_only")
def extension_that_is_not_installed(
    stranger: Stranger, patch: pytest.MonkeyPatch
) -> Iterator[dict[str, object] | None]:
    """It was there when the backup was taken."""
    directory = stranger.root / "pg/extension"
    directory.mkdir()
    (directory / "members_only.control").write_text("default_version = '1'\nrelocatable = true\n")
    (directory / "members_only--1.sql").write_text("SELECT 1;")
    stranger.sql(f"ALTER SYSTEM SET extension_control_path = '{directory.parent}:$system'")
    stranger.sql("SELECT pg_reload_conf()")
    stranger.sql("CREATE EXTENSION members_only")
    taken = backup_database.fn(NAME)
    stranger.sql("DROP EXTENSION members_only")
    shutil.rmtree(directory)
    yield None
    shutil.rmtree(stranger.root / "backups/postgres" / str(taken.facts["backup"]).split()[0])
    stranger.sql("ALTER SYSTEM RESET extension_control_path")
    stranger.sql("SELECT pg_reload_conf()")


@refused_with("tablespace: missing")
def tablespace_that_is_gone(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[dict[str, object] | None]:
    place = stranger.root / "pg/space"
    stranger.account.directory(place, 0o700)
    stranger.sql(f"CREATE TABLESPACE aside LOCATION '{place}'", database="postgres")
    move = "ALTER DATABASE members SET TABLESPACE "
    stranger.supervisor.stop("members")
    stranger.sql("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = 'members'",
                 database="postgres")  # fmt: skip
    stranger.sql(move + "aside", database="postgres")
    taken = backup_database.fn(NAME)
    stranger.sql(move + "pg_default", database="postgres")
    stranger.sql("DROP TABLESPACE aside", database="postgres")
    stranger.supervisor.start("members")
    yield None
    shutil.rmtree(stranger.root / "backups/postgres" / str(taken.facts["backup"]).split()[0])


@refused_with("services: not named: redis")
def service_without_a_name(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[dict[str, object] | None]:
    stranger.describe((' redis = "keys",', ""))
    yield None


@refused_with("BAD_NAME: membrs")
def service_of_another_name(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[dict[str, object] | None]:
    stranger.describe(('backend = "members"', 'backend = "membrs"'))
    yield None


@refused_with("answers 401")
def wrong_password_of_the_manager(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[dict[str, object] | None]:
    patch.setenv("STRANGER_SUPERVISOR_PASSWORD", "another")
    yield None


@refused_with("[redis] server_program")
def redis_without_its_program(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[dict[str, object] | None]:
    stranger.describe((f'server_program = "{stranger.redis_program}"', 'server_program = "/nowhere/redis-server"'))
    yield None


@refused_with("pg_dump is not there")
def programs_that_are_not_there(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[dict[str, object] | None]:
    stranger.describe((f'programs = "{stranger.programs}"', 'programs = "/nowhere"'))
    yield None


@refused_with("program of [application] migrate_command: no-such-tool")
def migration_tool_that_is_missing(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[dict[str, object] | None]:
    stranger.describe(more='migrate_command = ["no-such-tool", "up"]\n')
    yield None


@refused_with("the migrations have 2 heads")
def migrations_with_two_heads(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[dict[str, object] | None]:
    versions = stranger.root / "backend/versions"
    versions.mkdir(parents=True)
    (versions.parent / "alembic.ini").write_text("[alembic]\nscript_location = %(here)s\n")
    for name in ("one", "two"):
        text = f"revision = '{name}'\ndown_revision = None\ndef upgrade(): pass\ndef downgrade(): pass\n"
        (versions / f"{name}.py").write_text(text)
    stranger.describe(more=f'backend_directory = "{versions.parent}"\npython = "python3"\n')
    yield None
    shutil.rmtree(versions.parent)


def gone(stranger: Stranger) -> tuple[tuple[str, str], ...]:
    """The server does not answer, and its data directory is not there."""
    data, port = f'data_directory = "{stranger.root}/pg/', f"port = {stranger.ports['postgres']}"
    return (f'{data}data"', f'{data}gone"'), (port, "port = 1")


@refused_with("owner of a new data directory: there is no user nobody-here")
def cluster_gone_and_no_such_user(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[dict[str, object] | None]:
    user = f'os_user = "{stranger.account.name}"\n\n[redis]'
    stranger.describe(*gone(stranger), (user, 'os_user = "nobody-here"\n\n[redis]'))
    yield None


@refused_with("locale of the database: not installed: xx_XX.UTF-8")
def cluster_gone_and_no_such_locale(
    stranger: Stranger, patch: pytest.MonkeyPatch
) -> Iterator[dict[str, object] | None]:
    patch.setattr("tasks.postgres.requirements.NEW_CLUSTER_LOCALE", "xx_XX.UTF-8")
    stranger.describe(*gone(stranger))
    yield None


@refused_with("version of the stopped server: 9.6")
def stopped_server_of_another_version(
    stranger: Stranger, patch: pytest.MonkeyPatch
) -> Iterator[dict[str, object] | None]:
    other = stranger.root / "pg/other"
    other.mkdir()
    (other / "PG_VERSION").write_text("9.6\n")
    stranger.describe((f'data_directory = "{stranger.root}/pg/data"', f'data_directory = "{other}"'),
                      (f"port = {stranger.ports['postgres']}", "port = 1"))  # fmt: skip
    yield None
    shutil.rmtree(other)


@refused_with("files of backup_")
def damaged_backup(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[dict[str, object] | None]:
    newest = max((stranger.root / "backups/postgres").glob("backup_*"))
    copy = stranger.root / "copy"
    shutil.copytree(newest, copy)
    largest = max(newest.rglob("*.dat*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    yield None
    shutil.rmtree(newest)
    shutil.copytree(copy, newest)
    shutil.rmtree(copy)


@pytest.mark.parametrize("name", SEEDS)
def test_what_would_refuse_later_refuses_now(
    backed_up: Stranger, stranger: Stranger, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seed, words = SEEDS[name]
    with seed(stranger, monkeypatch) as parameters:
        try:
            report = plan(**(parameters or {}))
        except OpsError as error:
            pytest.fail(f"not a report: {error}")
        assert report.status is Status.CRITICAL
        assert words in findings(report)
    assert not list(Path(stranger.root).glob("pg/data.new"))
