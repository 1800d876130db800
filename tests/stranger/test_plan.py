"""A plan that is green is carried out: whatever would refuse the confirmed run refuses the dry run."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from blocks.environment import Environment
from blocks.postgres.refusals import Starting
from flows.database.backup import backup_database
from flows.recovery.full import start as start_server
from flows.recovery.full.start import FILES
from flows.recovery.full_restore import full_restore
from flows.redis.persistence import backup_redis
from lab.processes import run
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tests.stranger.system import NAME, ROLE, Stranger

Found = dict[str, object] | None
Seed = Callable[[Stranger, pytest.MonkeyPatch], contextlib.AbstractContextManager[Found]]
SEEDS: dict[str, tuple[Seed, str]] = {}
# Those that the plan must also find while the database server is down; and those of a server that is down.
DOWN: list[str] = []
STOPPED: dict[str, tuple[Seed, str]] = {}


def refused_with(
    words: str, seeds: dict[str, tuple[Seed, str]] = SEEDS, *, down: bool = False
) -> Callable[[Callable[..., Iterator[Found]]], None]:
    """A state of the system, healed when its generator ends, and what the plan says of it."""

    def keep(function: Callable[..., Iterator[Found]]) -> None:
        seeds[function.__name__] = (contextlib.contextmanager(function), words)
        DOWN.extend([function.__name__] * down)

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


def critical(report: Report) -> set[str]:
    """The names of what is critical."""
    return {finding.name for finding in report.findings if finding.status is Status.CRITICAL}


def findings(report: Report) -> str:
    """What is critical, as a reader sees it."""
    bad = [finding for finding in report.findings if finding.status is Status.CRITICAL]
    return "\n".join(f"{finding.name}: {finding.value} — {finding.hint}" for finding in bad)


def test_the_system_as_it_is_has_a_green_plan(backed_up: Stranger, stranger: Stranger) -> None:
    report = plan()
    assert report.status is Status.PLANNED, findings(report)


@refused_with("refuses the password of role members_app", down=True)
def wrong_password_of_the_application(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    patch.setenv("STRANGER_PASSWORD", "another")
    yield None


@refused_with("pg_hba.conf", down=True)
def closed_to_the_copy(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    file = stranger.root / "pg/data/pg_hba.conf"
    text = file.read_text()
    file.write_text(f"host members all 127.0.0.1/32 scram-sha-256\nhost all {ROLE} 127.0.0.1/32 reject\n{text}")
    stranger.sql("SELECT pg_reload_conf()")
    yield None
    file.write_text(text)
    stranger.sql("SELECT pg_reload_conf()")


@refused_with("not permitted to log in", down=True)
def role_without_login(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    stranger.sql(f"ALTER ROLE {ROLE} NOLOGIN")
    yield None
    stranger.sql(f"ALTER ROLE {ROLE} LOGIN")


@refused_with("rights of the administrator: CREATEDB: False; not a member of: members_app", down=True)
def administrator_without_rights(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    stranger.sql("CREATE ROLE limited LOGIN BYPASSRLS PASSWORD 'adm1n:/p@ss'")
    stranger.describe(("admin_password_env", 'admin_user = "limited"\nadmin_password_env'))
    yield None
    stranger.sql("DROP ROLE limited")


@refused_with("transactions of the administrator: read-only by default", down=True)
def read_only_by_default(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    stranger.sql("ALTER ROLE postgres SET default_transaction_read_only = on")
    yield None
    stranger.sql("BEGIN READ WRITE; ALTER ROLE postgres RESET default_transaction_read_only; COMMIT")


@refused_with("max_connections: 100 — run this with jobs=", down=True)
def more_jobs_than_connections(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    patch.setattr("tasks.postgres.server.requirements.OTHER_SESSIONS", 80)
    yield {"jobs": 32}


@refused_with("extensions: not installed: members_only", down=True)
def extension_that_is_not_installed(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
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


@refused_with("tablespace: missing", down=True)
def tablespace_that_is_gone(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    place = stranger.root / "pg/space"
    stranger.account.directory(place, 0o700)
    stranger.sql(f"CREATE TABLESPACE aside LOCATION '{place}'", database="postgres")
    move = "ALTER DATABASE members SET TABLESPACE "
    stranger.supervisor.stop("members")
    stranger.sql(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = 'members'", database="postgres"
    )
    stranger.sql(move + "aside", database="postgres")
    taken = backup_database.fn(NAME)
    stranger.sql(move + "pg_default", database="postgres")
    stranger.sql("DROP TABLESPACE aside", database="postgres")
    stranger.supervisor.start("members")
    yield None
    shutil.rmtree(stranger.root / "backups/postgres" / str(taken.facts["backup"]).split()[0])


@refused_with("services: missing: redis")
def service_without_a_name(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    stranger.describe((' redis = "keys",', ""))
    yield None


@refused_with("BAD_NAME: membrs")
def service_of_another_name(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    stranger.describe(('backend = "members"', 'backend = "membrs"'))
    yield None


@refused_with("answers 401")
def wrong_password_of_the_manager(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    patch.setenv("STRANGER_SUPERVISOR_PASSWORD", "another")
    yield None


@refused_with("[redis] server_program")
def redis_without_its_program(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    stranger.describe((f'server_program = "{stranger.redis_program}"', 'server_program = "/nowhere/redis-server"'))
    yield {"redis_source": "backup"}


@refused_with("pg_dump is not there")
def programs_that_are_not_there(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    stranger.describe((f'programs = "{stranger.programs}"', 'programs = "/nowhere"'))
    yield None


@refused_with("program of [application] migrate_command: no-such-tool")
def migration_tool_that_is_missing(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    stranger.describe(more='migrate_command = ["no-such-tool", "up"]\n')
    yield None


@refused_with("the migrations have 2 heads")
def migrations_with_two_heads(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
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
def cluster_gone_and_no_such_user(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    user = f'os_user = "{stranger.account.name}"\n\n[redis]'
    stranger.describe(*gone(stranger), (user, 'os_user = "nobody-here"\n\n[redis]'))
    yield None


@refused_with('new data directory: initdb exited 1: initdb: error: invalid locale name "xx_XX.UTF-8"')
def cluster_gone_and_no_such_locale(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    patch.setattr("tasks.postgres.server.new_cluster.LOCALE", "xx_XX.UTF-8")
    stranger.describe(*gone(stranger))
    yield None


@refused_with("log-in of the application's role: the role does not exist", down=True)
def role_that_no_backup_has(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    stranger.describe(('user = "members_app"', 'user = "members_web"'))
    yield None


@refused_with("tied to the live database: subscription members_feed", down=True)
def subscription_of_the_live_database(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    stranger.sql(
        "CREATE SUBSCRIPTION members_feed CONNECTION 'host=127.0.0.1 port=1' PUBLICATION p WITH (connect = false)"
    )
    yield None
    stranger.sql("ALTER SUBSCRIPTION members_feed SET (slot_name = NONE)")
    stranger.sql("DROP SUBSCRIPTION members_feed")


@refused_with("version of the stopped server: 9.6")
def stopped_server_of_another_version(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    other = stranger.root / "pg/other"
    other.mkdir()
    (other / "PG_VERSION").write_text("9.6\n")
    stranger.describe(
        (f'data_directory = "{stranger.root}/pg/data"', f'data_directory = "{other}"'),
        (f"port = {stranger.ports['postgres']}", "port = 1"),
    )
    yield None
    shutil.rmtree(other)


@refused_with("files of backup_")
def damaged_backup(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
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


def edited(path: Path, content: bytes | None) -> Iterator[Found]:
    """A file with another content, or without one: missing."""
    was, mode = path.read_bytes(), path.stat()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    yield None
    path.write_bytes(was)
    os.chown(path, mode.st_uid, mode.st_gid)
    path.chmod(mode.st_mode & 0o777)


@refused_with("start of the stopped server: syntax error in file", STOPPED)
def configuration_that_cannot_be_read(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    file = stranger.root / "pg/data/postgresql.conf"
    yield from edited(file, file.read_bytes() + b"\nshared_buffers = (\n")


@refused_with("start of the stopped server: invalid authentication method", STOPPED)
def pg_hba_that_cannot_be_read(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    yield from edited(stranger.root / "pg/data/pg_hba.conf", b"host all all 127.0.0.1/32 nonsense\n")


@refused_with("control file of the stopped server: global/pg_control is damaged", STOPPED)
def damaged_control_file(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    file = stranger.root / "pg/data/global/pg_control"
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    yield from edited(file, bytes(content))


@refused_with("WAL that the stopped server starts from: missing: 0000000", STOPPED)
def first_segment_of_wal_that_is_missing(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    for path in (directory := stranger.root / "pg/data/pg_wal").glob("0000*"):
        path.rename(directory.parent / path.name)
    yield None
    for path in directory.parent.glob("0000*"):
        path.rename(directory / path.name)


@refused_with("server accepts writes: standby.signal: a standby", STOPPED)
def data_of_a_standby(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    (mark := stranger.root / "pg/data/standby.signal").touch()
    yield None
    mark.unlink()


@refused_with("log-in of the administrator: PostgreSQL at 127.0.0.1:", STOPPED)
def wrong_password_of_the_administrator(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    patch.setenv("STRANGER_ADMIN_PASSWORD", "another")
    yield None


@refused_with("maintenance database: missing", STOPPED)
def maintenance_database_that_is_missing(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    stranger.describe(('database = "members"', 'maintenance_database = "upkeep"\ndatabase = "members"'))
    yield None


@refused_with("shared_preload_libraries: not installed: no_such_library", STOPPED)
def preloaded_library_that_is_missing(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    file = stranger.root / "pg/data/postgresql.auto.conf"
    yield from edited(file, file.read_bytes() + b"shared_preload_libraries = 'no_such_library'\n")


@refused_with("its data directory is on another host: db.invalid — start it (database), then plan again", STOPPED)
def server_of_another_host(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    """The service manager could start it, but nothing here shows whether it would start, and what it has."""
    stranger.describe(("[postgres]", '[postgres]\nhost = "db.invalid"'))
    yield None


@refused_with("start of the stopped server: could not map anonymous shared memory", STOPPED)
def shared_memory_that_the_host_cannot_give(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    file = stranger.root / "pg/data/postgresql.auto.conf"
    yield from edited(file, file.read_bytes() + b"shared_buffers = '1TB'\nhuge_pages = on\n")


@refused_with("above 1 B — start it (database), then plan again", STOPPED)
def catalogs_that_are_too_large_to_copy(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    patch.setattr("tasks.cluster.trial.MOST_BYTES", 1)
    yield None


@refused_with("recovery.signal is in its data directory", STOPPED)
def data_that_starts_with_a_recovery(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    (mark := stranger.root / "pg/data/recovery.signal").touch()
    yield None
    mark.unlink()


@contextlib.contextmanager
def down(stranger: Stranger) -> Iterator[None]:
    """Its database server is stopped, and running again behind it."""
    stranger.supervisor.stop("database")
    try:
        yield
    finally:
        stranger.start_database()


def refused_twice(words: str, **parameters: object) -> set[str]:
    """By the plan and by the confirmed run, for the same findings, whose names are returned."""
    report = plan(**parameters)
    assert report.status is Status.CRITICAL
    assert words in findings(report)
    assert critical(plan(**parameters, confirm=NAME)) == critical(report)
    return critical(report)


@pytest.mark.parametrize("name", SEEDS)
def test_what_would_refuse_later_refuses_now(
    backed_up: Stranger, stranger: Stranger, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of a database server that is down the plan finds what it finds of a running one."""
    seed, words = SEEDS[name]
    with seed(stranger, monkeypatch) as parameters:
        try:
            report = plan(**(parameters or {}))
        except OpsError as error:
            pytest.fail(f"not a report: {error}")
        assert report.status is Status.CRITICAL
        assert words in findings(report)
        if name in DOWN:
            with down(stranger):
                assert refused_twice(words, **(parameters or {})) == critical(report)
    assert not left_behind(stranger)


def left_behind(stranger: Stranger) -> list[str]:
    """What a plan must not leave beside the data directory."""
    return [path.name for path in (stranger.root / "pg").iterdir() if path.name.startswith("data.")]


class TestStopped:
    """What keeps a server from its start, or the run from logging in to it."""

    @pytest.fixture(scope="class", autouse=True)
    @staticmethod
    def stopped(backed_up: Stranger) -> Iterator[None]:
        with down(backed_up):
            yield

    @pytest.mark.parametrize("name", STOPPED)
    def test_what_would_refuse_later_refuses_now(
        self, stranger: Stranger, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        seed, words = STOPPED[name]
        with seed(stranger, monkeypatch):
            before = content_of(stranger.root / "pg/data")
            refused_twice(words)
            assert content_of(stranger.root / "pg/data") == before
        assert not left_behind(stranger)


def test_a_server_that_hangs_is_not_taken_for_a_stopped_one(
    backed_up: Stranger, stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its service runs, so a start would change nothing."""
    monkeypatch.setattr("blocks.postgres.server.CONNECT_SECONDS", 2)
    server = int((stranger.root / "pg/data/postmaster.pid").read_text().split()[0])
    os.kill(server, signal.SIGSTOP)
    try:
        names = refused_twice(f"suspended by a signal: process {server} — if [postgres] host and port are right")
    finally:
        os.kill(server, signal.SIGCONT)
    assert names == {"answer of the database server"}


def test_a_server_that_recovers_for_long_is_waited_for(
    backed_up: Stranger, stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A standby that admits nobody answers as a server that recovers from its WAL."""
    rounds, standby = list[int](), stranger.root / "pg/data/standby.signal"

    def counted(*words: Any, **named: Any) -> object:
        rounds.append(1)
        return until(*words, **named)

    monkeypatch.setattr(start_server, "until", counted)
    monkeypatch.setattr(start_server, "START_SECONDS", 0.1)
    stranger.sql("ALTER SYSTEM SET hot_standby = off")
    with ThreadPoolExecutor(1) as pool, down(stranger):
        standby.touch()
        stranger.supervisor.start("database")
        env = Environment.find(NAME)
        until(lambda: isinstance(refusal_of(env), Starting), what="its recovery", seconds=120)
        assert refused_twice("wait until it answers") == {"answer of the database server"}
        waiting = pool.submit(start_server.wait_started, env)
        until(lambda: len(rounds) > 3 or waiting.done(), what="some rounds", seconds=120)
        assert not waiting.done()
        monkeypatch.setattr(start_server, "RECOVERY_SECONDS", 0.0)
        with pytest.raises(OpsError, match="the start of PostgreSQL did not happen"):
            start_server.wait_started(env)
        monkeypatch.setattr(start_server, "START_SECONDS", 120.0)
        begun = len(rounds)
        until(lambda: len(rounds) > begun, what="a long round", seconds=120)
        stranger.supervisor.stop("database")
        standby.unlink()
        stranger.supervisor.start("database")
        waiting.result(120)
    stranger.sql("ALTER SYSTEM RESET hot_standby")


def refusal_of(env: Environment) -> OpsError | None:
    """Why the administrator cannot log in."""
    try:
        env.postgres.connect().close()
    except OpsError as error:
        return error
    return None


def content_of(*directories: Path) -> dict[Path, tuple[int, bytes]]:
    """When each entry was changed, and what is in it."""
    found = sorted(path for directory in directories for path in directory.rglob("*"))
    return {path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in found}


def test_the_plan_of_a_crashed_server_is_green_and_carried_out(
    backed_up: Stranger, stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its WAL has the log-in right of the application's role. The plan reads that WAL without writing a table's
    page, a tablespace's directory or an archive; what a killed plan left is removed."""
    archived, space = stranger.root / "pg/archived", stranger.root / "pg/space-of-the-crashed"
    data, dead = stranger.root / "pg/data", stranger.root / "pg/data.trial.unknown-1-1-0123456789abcdef"
    stranger.account.directory(space, 0o700)
    stranger.sql("ALTER SYSTEM SET archive_mode = on")
    stranger.sql(f"ALTER SYSTEM SET archive_command = 'touch {archived}; false'")
    stranger.sql(f"ALTER ROLE {ROLE} NOLOGIN")
    stranger.sql("CHECKPOINT")
    stranger.sql(f"ALTER ROLE {ROLE} LOGIN")
    stranger.sql(f"CREATE TABLESPACE later LOCATION '{space}'")
    stranger.sql("CREATE TABLE bulk TABLESPACE later AS SELECT n, repeat('x', 500) FROM generate_series(1, 20000) n")
    stranger.sql("UPDATE bulk SET n = n + 1 WHERE n % 10 = 0")
    stranger.sql("DROP TABLE bulk")
    stranger.sql("DROP TABLESPACE later")
    shutil.copytree(data, crashed := data.with_name("crashed"), symlinks=True)
    with down(stranger):
        data.rename(data.with_name("clean"))
        crashed.rename(data)
        run(["chown", "-R", f"{stranger.account.name}:", data])
        dead.mkdir()
        os.utime(dead, (0, 0))
        before = content_of(data, space)
        report = plan()
        assert report.status is Status.PLANNED, findings(report)
        assert files_of(report) == "every page that the recovery at the start reads is valid"
        assert content_of(data, space) == before
        assert not left_behind(stranger)
        assert not archived.exists()
        done = plan(confirm=NAME)
        assert done.status in (Status.OK, Status.WARN), findings(done)
        assert "in production" in str(next(f.value for f in done.findings if f.name.startswith("control file")))
    stranger.sql("ALTER SYSTEM RESET archive_mode")
    stranger.sql("ALTER SYSTEM RESET archive_command")
    assert stranger.ready()


def damaged_beyond_recovery(stranger: Stranger) -> Path:
    """What `kill -9` leaves, with a damaged page that crash recovery must read. Returns the data directory."""
    data = stranger.root / "pg/data"
    stranger.sql("ALTER SYSTEM SET full_page_writes = off")
    stranger.sql("SELECT pg_reload_conf()")
    stranger.sql("CREATE TABLE bulk AS SELECT n, repeat('x', 500) FROM generate_series(1, 2000) n")
    stranger.sql("VACUUM (FREEZE) bulk")  # later hint bits would write full pages to the WAL
    stranger.sql("CHECKPOINT")
    path = str(stranger.sql("SELECT pg_relation_filepath('bulk')")[0][0])
    stranger.sql("UPDATE bulk SET n = n + 1 WHERE n % 10 = 0")
    shutil.copytree(data, crashed := data.with_name("crashed"), symlinks=True)
    stranger.sql("ALTER SYSTEM RESET full_page_writes")
    with (crashed / path).open("r+b") as file:
        file.seek(5000)
        file.write(b"\0damaged\0")
    stranger.supervisor.stop("database")
    shutil.rmtree(data)
    crashed.rename(data)
    run(["chown", "-R", f"{stranger.account.name}:", data])
    return data


def files_of(report: Report) -> str:
    """What it says of the files of a stopped server."""
    return next(one.value for one in report.findings if one.name == FILES)


def test_files_that_crash_recovery_cannot_read_are_kept_and_replaced_by_a_new_cluster(
    backed_up: Stranger, stranger: Stranger
) -> None:
    """The plan reads the pages that the recovery will read, and names what the run does then."""
    data = damaged_beyond_recovery(stranger)
    report = plan()
    assert report.status is Status.PLANNED, findings(report)
    assert "invalid page in block 0 of base/" in files_of(report)
    steps = {step.step: step.detail for step in report.plan_steps}
    assert "keep them under another name and create a new cluster" in steps["start the database server"]
    done = plan(confirm=NAME)
    assert done.status is Status.WARN, findings(done)
    assert "invalid page in block 0" in files_of(done)
    (kept,) = data.parent.glob("data.superseded_*")
    shutil.rmtree(kept)
    assert stranger.ready()


def test_they_are_not_replaced_where_the_server_has_another_database(backed_up: Stranger, stranger: Stranger) -> None:
    stranger.sql("CREATE DATABASE payroll")
    data = damaged_beyond_recovery(stranger)
    kept = data.with_name("kept")
    names = refused_twice(f"save its other databases (payroll), then mv {data} {data}.damaged and run this again")
    assert names == {FILES}
    data.rename(kept)
    assert plan(confirm=NAME).status in (Status.OK, Status.WARN)
    assert stranger.ready()


def test_the_plan_of_a_cluster_that_is_gone_is_judged_on_a_new_one_and_carried_out(
    backed_up: Stranger, stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, place = stranger.root / "pg/data", stranger.root / "pg/space-of-the-lost"
    stranger.account.directory(place, 0o700)
    stranger.sql(f"CREATE TABLESPACE lost LOCATION '{place}'")
    with SEEDS["extension_that_is_not_installed"][0](stranger, monkeypatch), down(stranger):
        data.rename(data.with_name("lost"))
        stranger.describe(('user = "members_app"', 'user = "members_web"'))
        try:
            names = refused_twice(f"lost: {place} is in use by another cluster")
        finally:
            data.with_name("lost").rename(data)
            stranger.describe()
        assert names == {"directories of tablespaces", "roles of the backup", "extensions"}
    stranger.sql("DROP TABLESPACE lost")
    stranger.supervisor.stop("database")
    data.rename(data.with_name("lost"))
    report = plan()
    assert report.status is Status.PLANNED, findings(report)
    assert not data.exists()
    assert not left_behind(stranger)
    done = plan(confirm=NAME)
    assert done.status in (Status.OK, Status.WARN), findings(done)
    assert stranger.ready()
