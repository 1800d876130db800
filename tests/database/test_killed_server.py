"""The server is killed in the middle of every flow: one clear sentence, nothing half-done, and the next run ends well."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from flows.database.backup import backup_database, verify_backup
from flows.database.restore import restore_database
from flows.database.server import connections
from flows.database.server.connections import check_connections, check_pool_settings, close_idle_connections
from flows.database.server.corruption import check_corruption
from flows.database.server.replication import check_replication
from flows.database.server.settings import apply_postgres_settings, check_postgres_settings, undo_postgres_settings
from flows.database.undo_restore import undo_restore
from flows.database.upkeep.indexes import check_indexes, rebuild_indexes
from flows.database.upkeep.vacuum import check_autovacuum, vacuum_database
from runbook import kinds
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.postgres.restore import swap
from tasks.postgres.server.recommended import MANUAL
from tasks.postgres.sessions import closing
from tests.database.conftest import NAME, write_environment
from tests.database.proxy import Kill, Proxy, When
from tests.fixtures.postgres.client_programs import leave_client_programs
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer, has_contrib, running_postgres

DATABASE = "grc_db"
PRISTINE = "pristine"
GOOD = (Status.OK, Status.WARN)
# Names of exceptions, of Python's modules and of libpq's lines are for developers.
CRYPTIC = re.compile(r"Traceback|psycopg|Error\b|PQ\w+\(|\n|consuming input|This probably means", re.MULTILINE)
GONE = re.compile(
    "does not answer|ended (?:the|pg_dump's) session|went away|terminating connection|closed the connection|refused|"
    "no connection to the server|connection not open"
)
APPLICATION = """
[application]
backend_directory = "{backend}"
url = "http://127.0.0.1:9"
"""
# Few tables: every statement of pg_dump and pg_restore goes through the proxy.
SMALL = """
SET ROLE grc_user;
CREATE TABLE people (id bigserial PRIMARY KEY, name text NOT NULL);
CREATE INDEX people_name ON people (name);
INSERT INTO people (name) SELECT '候補者 ' || g FROM generate_series(1, 2000) g;
CREATE TABLE answers (person bigint REFERENCES people, body text);
INSERT INTO answers SELECT g, 'b' || g FROM generate_series(1, 500) g;
"""
Call = Callable[[], Report]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server that may be killed, with a database and a copy of it to begin anew from."""
    with running_postgres() as own:
        own.create_database(PRISTINE)
        own.sql(SMALL, database=PRISTINE)
        if has_contrib():
            own.sql("CREATE EXTENSION amcheck", database=PRISTINE)
        yield own


@pytest.fixture
def proxy(server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way to that server: the environment knows the proxy's port only. Retries wait for moments."""
    between = Proxy(server)
    server.copy_database(DATABASE, PRISTINE)
    backend = tmp_path / "application"
    backend.mkdir()
    (backend / ".env").write_text("DATABASE_POOL_SIZE=20\nDATABASE_MAX_OVERFLOW=10\nDATABASE_POOL_TIMEOUT=30\n")
    path = write_environment(server, DATABASE, tmp_path)
    text = path.read_text().replace(f"port = {server.port}", f"port = {between.port}")
    path.write_text(text + APPLICATION.format(backend=backend))
    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(path))
    monkeypatch.setenv("TRIAL_PASSWORD", ROLE_PASSWORD)
    monkeypatch.setenv("TRIAL_ADMIN_PASSWORD", ADMIN_PASSWORD)
    monkeypatch.setattr(kinds, "RETRY_DELAYS_SECONDS", [0.05, 0.05, 0.05])
    monkeypatch.setattr(connections, "LEAST_SECONDS", 0)
    monkeypatch.setattr(closing, "END_MILLISECONDS", 120_000)
    monkeypatch.setattr(swap, "RESULT_SECONDS", 1.0)
    yield between
    between.close()
    if not server.is_running:
        server.start()
    server.sql("ALTER SYSTEM RESET ALL")
    server.restart()
    for name in databases(server) - {"postgres", PRISTINE}:
        server.drop_database(name)


def databases(server: PostgresServer) -> set[str]:
    return {row[0] for row in server.sql("SELECT datname FROM pg_database WHERE NOT datistemplate")}


def ended(call: Call) -> Report:
    """The run's report, however it ended; anything else than RunbookFailed is a bug."""
    try:
        return call()
    except RunbookFailed as error:
        return error.report


def killed(proxy: Proxy, call: Call, kill: Kill) -> Report:
    """The report of a run whose server is killed meanwhile; it says so in one clear sentence, and what to do next."""
    proxy.arm(kill)
    report = ended(call)
    assert proxy.killed.is_set(), f"no statement {kill.at} in {proxy.statements}"
    proxy.back()
    sentence = report.sentence()
    assert report.status is Status.CRITICAL, sentence
    assert GONE.search(sentence), sentence
    assert "Next: " in sentence
    told = [text for found in report.findings for text in (found.name, found.value, found.hint)]
    assert [text for text in told if CRYPTIC.search(text)] == []
    assert report.path, "the report is on disk"
    assert sentence.partition(": ")[2].split(".")[0] in report.path.with_suffix(".md").read_text().replace("\\", "")
    return report


def good(call: Call) -> Report:
    report = ended(call)
    assert report.status in GOOD, report.sentence()
    return report


def names(report: Report) -> list[str]:
    """Of its findings; how many sessions there are, which some of them say, is another number a moment later."""
    return [re.sub(r"\d+", "N", found.name) for found in report.findings]


CHECKS: dict[str, Call] = {
    "check-autovacuum": lambda: check_autovacuum.fn(NAME),
    "check-indexes": lambda: check_indexes.fn(NAME),
    "check-connections": lambda: check_connections.fn(NAME),
    "check-pool-settings": lambda: check_pool_settings.fn(NAME),
    "check-postgres-settings": lambda: check_postgres_settings.fn(NAME),
    "check-replication": lambda: check_replication.fn(NAME, seconds=1),
    "check-corruption": lambda: check_corruption.fn(NAME, tables=["people"]),
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_fails_clearly_and_works_when_the_server_is_back(name: str, proxy: Proxy) -> None:
    call = CHECKS[name]
    proxy.arm(None)
    before = good(call)
    last = len(proxy.statements) - 1
    for kill in (Kill(0), Kill(last // 2, "answered"), Kill(last)):
        killed(proxy, call, kill)
    proxy.arm(Kill(0, comes_back=True))
    again = good(call)
    assert proxy.killed.is_set()
    assert names(again) == names(before), "it asked once more"


UPKEEP: dict[str, tuple[Call, Kill]] = {
    "vacuum before": (
        lambda: vacuum_database.fn(NAME, "plain_analyze"),
        Kill('VACUUM (SKIP_DATABASE_STATS, ANALYZE) "public"."people"'),
    ),
    "vacuum answered": (
        lambda: vacuum_database.fn(NAME, "plain"),
        Kill('VACUUM (SKIP_DATABASE_STATS) "public"."people"', "answered"),
    ),
    "full before": (lambda: vacuum_database.fn(NAME, "full", ["people"], confirm=NAME), Kill("VACUUM (FULL")),
    "full answered": (
        lambda: vacuum_database.fn(NAME, "full", ["people"], confirm=NAME),
        Kill("VACUUM (FULL", "answered"),
    ),
    "rebuild before": (lambda: rebuild_indexes.fn(NAME, everything=True, confirm=NAME), Kill("REINDEX INDEX", skip=1)),
    "rebuild answered": (
        lambda: rebuild_indexes.fn(NAME, everything=True, confirm=NAME),
        Kill("REINDEX INDEX", "answered"),
    ),
}


@pytest.mark.parametrize("name", UPKEEP)
def test_upkeep_leaves_nothing_half_done(name: str, proxy: Proxy, server: PostgresServer) -> None:
    call, kill = UPKEEP[name]
    killed(proxy, call, kill)
    assert counts(server) == (2000, 500)
    good(call)
    assert invalid(server) == []


def test_an_index_that_was_being_built_is_dropped_by_the_next_run(proxy: Proxy, server: PostgresServer) -> None:
    def call() -> Report:
        return rebuild_indexes.fn(NAME, ["people_name"], lock_seconds=30, confirm=NAME)

    def being_built() -> None:
        until(lambda: "people_name_ccnew" in invalid(server), what="an index that is being built", seconds=120)

    with contextlib.suppress(psycopg.OperationalError), server.connect(DATABASE) as writer, writer.transaction():
        writer.execute("LOCK TABLE people IN ROW EXCLUSIVE MODE")  # REINDEX CONCURRENTLY waits for its end
        report = killed(proxy, call, Kill("REINDEX INDEX", "running", until=being_built))
    assert report.state
    assert "run this again" in report.state.hint
    assert invalid(server) == ["people_name_ccnew"]
    good(call)
    assert invalid(server) == []
    assert server.sql("SELECT indisvalid FROM pg_index WHERE indexrelid = 'people_name'::regclass", database=DATABASE)


@pytest.mark.parametrize("when", ["before", "answered"])
def test_closing_sessions_begins_anew(when: When, proxy: Proxy, server: PostgresServer) -> None:
    def call() -> Report:
        return close_idle_connections.fn(NAME, min_seconds=0, also_idle=True, confirm=NAME)

    def idle() -> psycopg.Connection[Any]:
        connection = server.connect(DATABASE, "grc_user")
        connection.execute("SELECT 1")
        return connection

    with contextlib.closing(idle()):
        killed(proxy, call, Kill("pg_terminate_backend", when))
    with contextlib.closing(idle()):
        assert good(call).outcome == "1 of 1 sessions closed"


SETTINGS = {
    "between two": Kill("ALTER SYSTEM", skip=3),
    "answered": Kill("ALTER SYSTEM", "answered", skip=3),
    "before the reload": Kill("pg_reload_conf"),
    "after the reload": Kill("pg_reload_conf", "answered"),
}


def apply() -> Report:
    return apply_postgres_settings.fn(NAME, confirm=NAME)


def undo() -> Report:
    return undo_postgres_settings.fn(NAME, confirm=NAME)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_old_or_new_and_the_old_ones_recorded(name: str, proxy: Proxy, server: PostgresServer) -> None:
    """Every one that was written is in a record from before, so that undo brings all back."""
    killed(proxy, apply, SETTINGS[name])
    written = filed(server)
    assert written
    assert {setting: MANUAL[setting] for setting in written} == written
    good(apply)
    assert (set(filed(server)) > set(written)) == ("reload" not in name), "what was missing is written"
    for _ in range(2 if "reload" not in name else 1):  # each run that wrote something left a record
        good(undo)
    assert filed(server) == {}


@pytest.mark.parametrize("name", SETTINGS)
def test_undoing_settings_goes_on_where_it_was(name: str, proxy: Proxy, server: PostgresServer) -> None:
    good(apply)
    every = filed(server)
    killed(proxy, undo, SETTINGS[name])
    assert len(filed(server)) < len(every)
    assert filed(server).items() <= every.items()
    good(undo)
    assert filed(server) == {}


def filed(server: PostgresServer) -> dict[str, str]:
    """What ALTER SYSTEM wrote."""
    lines = (server.data / "postgresql.auto.conf").read_text().splitlines()
    pairs = [line.split(" = ") for line in lines if line and not line.startswith("#")]
    return {name: value.strip("'") for name, value in pairs}


def counts(server: PostgresServer) -> tuple[int, ...]:
    """Rows of both tables."""
    statement = "SELECT (SELECT count(*) FROM people), (SELECT count(*) FROM answers)"
    return tuple(server.sql(statement, database=DATABASE)[0])


def invalid(server: PostgresServer) -> list[str]:
    statement = "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid ORDER BY 1"
    return [row[0] for row in server.sql(statement, database=DATABASE)]


def store() -> Path:
    return Path(os.environ["OPS_ENVIRONMENT_FILE"]).parent / "backups" / "postgresql"


def published() -> list[str]:
    """Backups that a restore would find: those with a manifest."""
    return sorted(path.parent.name for path in store().glob("[!.]*/manifest.json"))


def test_a_backup_is_published_whole_or_not_at_all(proxy: Proxy) -> None:
    def call() -> Report:
        return backup_database.fn(NAME)

    for kill in (
        Kill("pg_export_snapshot", "answered"),
        Kill("set client_encoding"),
        Kill("COPY public."),
        Kill("COPY public.people", "streaming"),
        Kill("COMMIT"),
    ):
        killed(proxy, call, kill)
        assert published() == []
    good(call)
    assert len(published()) == 1
    assert [path.name for path in store().iterdir() if path.is_dir() and not path.name.startswith(".")] == published()


@pytest.fixture(scope="module")
def taken(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one backup of the pristine database, to be copied."""
    directory = tmp_path_factory.mktemp("taken")
    with pytest.MonkeyPatch.context() as patched:
        server.copy_database(DATABASE, PRISTINE)
        patched.setenv("OPS_ENVIRONMENT", NAME)
        patched.setenv("OPS_ENVIRONMENT_FILE", str(write_environment(server, DATABASE, directory)))
        patched.setenv("TRIAL_PASSWORD", ROLE_PASSWORD)
        patched.setenv("TRIAL_ADMIN_PASSWORD", ADMIN_PASSWORD)
        backup_database.fn(NAME)
        server.drop_database(DATABASE)
    return directory / "backups"


def test_verifying_leaves_no_scratch_database(
    taken: Path, proxy: Proxy, server: PostgresServer, tmp_path: Path
) -> None:
    """On the live server, where this host cannot run a private one."""
    leave_client_programs(Path(os.environ["OPS_ENVIRONMENT_FILE"]), server.programs, tmp_path / "bin")

    def call() -> Report:
        return verify_backup.fn(NAME)

    shutil.copytree(taken, store().parent)
    for kill in (Kill("CREATE DATABASE", "answered"), Kill("COPY public."), Kill("DROP DATABASE", skip=1)):
        killed(proxy, call, kill)
        assert counts(server) == (2000, 500)
        assert not list(store().parent.rglob(".verified/*.json"))
    good(call)
    assert databases(server) == {"postgres", PRISTINE, DATABASE}


RESTORE = {
    "scratch": Kill("CREATE DATABASE", "answered"),
    "rows": Kill("COPY public."),
    "first rename": Kill("RENAME TO", "answered"),
    "second rename": Kill("RENAME TO", "answered", skip=1),
    "commit": Kill("COMMIT", behind="RENAME TO"),
    "committed": Kill("COMMIT", "answered", behind="RENAME TO"),
}


@pytest.mark.parametrize("name", RESTORE)
def test_a_restore_leaves_the_old_database_or_the_new_one(
    name: str, taken: Path, proxy: Proxy, server: PostgresServer
) -> None:
    shutil.copytree(taken, store().parent)
    server.sql("DELETE FROM answers WHERE person > 100", database=DATABASE)
    report = killed(proxy, lambda: restore_database.fn(NAME, confirm=NAME), RESTORE[name])
    assert report.state or name in ("scratch", "rows"), report.sentence()
    if report.state and name in ("commit", "committed"):
        assert "it is unknown whether grc_db was replaced" in report.state.value
        assert re.search(
            r"If it is \d+, the swap is done: do not run this again. Otherwise .*: run this again",
            report.state.hint,
        )
    assert counts(server) == ((2000, 500) if name == "committed" else (2000, 100))
    good(lambda: restore_database.fn(NAME, confirm=NAME))
    assert counts(server) == (2000, 500)
    kept = databases(server) - {"postgres", PRISTINE, DATABASE}
    assert all("__old_" in one for one in kept), "no scratch database is left"
    assert len(kept) == (2 if name == "committed" else 1)


@pytest.mark.parametrize("name", ["first rename", "commit", "committed"])
def test_undoing_a_restore_leaves_one_or_the_other(
    name: str, taken: Path, proxy: Proxy, server: PostgresServer
) -> None:
    shutil.copytree(taken, store().parent)
    server.sql("DELETE FROM answers WHERE person > 100", database=DATABASE)
    good(lambda: restore_database.fn(NAME, confirm=NAME))
    report = killed(proxy, lambda: undo_restore.fn(NAME, confirm=NAME), RESTORE[name])
    assert report.state
    assert ("it is unknown" in report.state.value) is (name != "first rename")
    assert counts(server) == ((2000, 100) if name == "committed" else (2000, 500))
    good(lambda: undo_restore.fn(NAME, confirm=NAME))
    assert counts(server) == ((2000, 500) if name == "committed" else (2000, 100)), "the other one"
    assert len(databases(server)) == 4


@pytest.mark.parametrize("name", ["commit", "committed"])
def test_a_session_that_is_lost_at_the_commit_of_a_swap_is_no_guess(
    name: str, taken: Path, proxy: Proxy, server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is there again at once: what became of the swap is seen, and the run goes on with that."""
    monkeypatch.setattr(swap, "RESULT_SECONDS", 120.0)
    shutil.copytree(taken, store().parent)
    server.sql(f"COMMENT ON DATABASE {DATABASE} IS 'ours'")
    server.sql("DELETE FROM answers WHERE person > 100", database=DATABASE)
    at_commit = replace(RESTORE[name], comes_back=True)

    def swapped(call: Call) -> Report:
        proxy.arm(at_commit)
        report = ended(call)
        assert proxy.killed.is_set()
        proxy.arm(None)
        if name == "committed":
            assert report.status in GOOD, report.sentence()
        else:
            assert "Nothing was swapped" in report.sentence()
            assert report.state
            assert report.state.value.endswith(" is unchanged")
            good(call)
        return report

    swapped(lambda: restore_database.fn(NAME, confirm=NAME))
    assert counts(server) == (2000, 500)
    swapped(lambda: undo_restore.fn(NAME, confirm=NAME))
    assert counts(server) == (2000, 100), "swapped back once, not twice"
    [(comment,)] = server.sql(
        "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s", DATABASE
    )
    assert comment == "ours"
