"""Against Debian's PostgreSQL 17: zstd, ICU, another major version; and a disk that is really full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocks.config import toml
from flows.database import backup
from flows.database.backup import backup_database
from flows.database.restore import restore_database
from runbook.errors import RunbookFailed
from runbook.report import Status
from tasks.backups import catalogue
from tasks.stores.directory import DirectoryStore
from tests.database.conftest import HARD, NAME, write_environment
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer, running_postgres

pytestmark = pytest.mark.system
DEBIAN = Path("/usr/lib/postgresql/17/bin")
DATABASE = "system_trial"


@pytest.fixture(scope="module")
def debian_server() -> Iterator[PostgresServer]:
    with running_postgres(programs=DEBIAN) as server:
        yield server


@pytest.fixture
def point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Point the environment at a server: the stores stay the same."""

    def at(server: PostgresServer) -> Path:
        monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
        monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(write_environment(server, DATABASE, tmp_path)))
        monkeypatch.setenv("TRIAL_PASSWORD", ROLE_PASSWORD)
        monkeypatch.setenv("TRIAL_ADMIN_PASSWORD", ADMIN_PASSWORD)
        return tmp_path / "backups" / "postgresql"

    return at


@pytest.fixture
def database(debian_server: PostgresServer) -> Iterator[PostgresServer]:
    debian_server.create_database(DATABASE)
    debian_server.sql(HARD, database=DATABASE)
    yield debian_server
    for (name,) in debian_server.sql("SELECT datname FROM pg_database WHERE starts_with(datname, %s)", DATABASE):
        debian_server.drop_database(name)


def test_round_trip_with_zstd(database: PostgresServer, point) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    store = point(database)
    report = backup_database.fn(NAME)
    assert "zstd" in report.facts["size"]
    assert list((store / catalogue.names(DirectoryStore(store), "postgres")[-1]).rglob("*.zst"))
    database.sql("TRUNCATE answers", database=DATABASE)
    assert not [step for step in restore_database.fn(NAME).plan_steps if step.step.startswith("unpack")]
    assert restore_database.fn(NAME, confirm=NAME).status in (Status.OK, Status.WARN)
    assert database.sql("SELECT count(*) FROM answers", database=DATABASE) == [(500,)]


def test_icu_locale_comes_back(debian_server: PostgresServer, point) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    point(debian_server)
    debian_server.create_database("just_for_the_role")
    debian_server.sql(
        f"CREATE DATABASE {DATABASE} OWNER grc_user TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'ja-JP' LOCALE 'C.UTF-8'"
    )
    try:
        backup_database.fn(NAME)
        debian_server.drop_database(DATABASE)
        restore_database.fn(NAME, confirm=NAME)
        rows = debian_server.sql("SELECT datlocprovider, datlocale FROM pg_database WHERE datname = %s", DATABASE)
        assert rows == [("i", "ja-JP")]
    finally:
        debian_server.drop_database(DATABASE)


def test_older_backup_restores_into_a_newer_server_and_not_the_reverse(
    database: PostgresServer,
    postgres_server: PostgresServer,
    point,  # type: ignore[no-untyped-def]  # noqa: ANN001
) -> None:
    """The newer server's programs were built without zstd: for them the dump is unpacked first."""
    store = point(database)
    backup_database.fn(NAME)
    of_17 = catalogue.names(DirectoryStore(store), "postgres")[-1]
    point(postgres_server)
    postgres_server.create_database(DATABASE)
    try:
        report = restore_database.fn(NAME, backup=of_17, confirm=NAME)
        assert report.status is Status.OK, report.sentence()
        assert postgres_server.sql("SELECT count(*) FROM people", database=DATABASE) == [(2000,)]
        backup_database.fn(NAME)
        point(database)
        with pytest.raises(RunbookFailed, match="restore to PostgreSQL 18 or newer"):
            restore_database.fn(NAME, confirm=NAME)
    finally:
        for (name,) in postgres_server.sql("SELECT datname FROM pg_database WHERE starts_with(datname, %s)", DATABASE):
            postgres_server.drop_database(name)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB where the store is."""
    store = tmp_path / "backups" / "postgresql"
    store.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", store], check=True)
    yield store
    subprocess.run(["umount", store], check=True)


def test_full_disk(database: PostgresServer, point, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    point(database)
    with pytest.raises(RunbookFailed, match="free space in the store"):
        backup_database.fn(NAME)
    assert not list(small_disk.iterdir())
    monkeypatch.setattr(backup, "SPACE_RATIO", 0.0)  # the check is passed: the disk fills in the middle
    with pytest.raises(RunbookFailed, match="the store is full.*free disk space at"):
        backup_database.fn(NAME)
    assert catalogue.names(DirectoryStore(small_disk), "postgres") == []
    assert toml.environment(NAME).name == NAME
