"""apply_migrations: what is pending, the confirmation, the backup that production needs, and data that is unsound."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blocks.config import toml
from flows.database.backup import backup_database
from flows.database.migrations import apply_migrations, check_migrations, rollback_migrations
from runbook.errors import NotConfirmed, RunbookFailed
from runbook.report import Report, Status
from tasks.backups import catalogue
from tasks.migrations.alembic import read_revision, upgrade
from tasks.stores.directory import DirectoryStore
from tests.database.conftest import with_expectations, write_environment
from tests.fixtures.reports import finding as found
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer

BACKEND = Path(__file__).parents[3] / "lab" / "application"
NAME, DATABASE = "trial", "migrations_db"
USER = "INSERT INTO users (username, display_name, password_hash) VALUES ('u', 'U', '!')"
Use = Callable[[str], None]


@pytest.fixture
def backend(tmp_path: Path) -> Path:
    shutil.copytree(BACKEND / "alembic", tmp_path / "grc" / "alembic", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(BACKEND / "alembic.ini", tmp_path / "grc")
    return tmp_path / "grc"


@pytest.fixture(autouse=True)
def tier(
    postgres_server: PostgresServer, tmp_path: Path, backend: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Use]:
    """An environment over an empty database; call the fixture to change its tier."""
    path = write_environment(postgres_server, DATABASE, tmp_path)
    text = path.read_text() + f'[application]\nbackend_directory = "{backend}"\npython = "{sys.executable}"\n'

    def use(name: str) -> None:
        path.write_text(f'tier = "{name}"\n' + text)

    use("development")
    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(path))
    monkeypatch.setenv("TRIAL_PASSWORD", ROLE_PASSWORD)
    monkeypatch.setenv("TRIAL_ADMIN_PASSWORD", ADMIN_PASSWORD)
    postgres_server.create_database(DATABASE)
    yield use
    postgres_server.drop_database(DATABASE)


def revision(server: PostgresServer) -> str:
    return read_revision(server.block(DATABASE), DATABASE)


def migrate_to(server: PostgresServer, target: str) -> None:
    """The schema of an older release, with a user, so that its data is sound."""
    env = toml.environment(NAME)
    upgrade.work(env.postgres, env.application, DATABASE, target)
    server.sql("SET ROLE grc_user; " + USER, database=DATABASE)


def add(backend: Path, name: str, down: str, up: str, back: str = "") -> None:
    """A migration more; without `back` it has no downgrade."""
    text = f'"""Title of {name}."""\nfrom alembic import op\nrevision = {name!r}\ndown_revision = {down or None!r}\n'
    text += f"branch_labels = depends_on = None\ndef upgrade():\n    {up}\n"
    text += f"def downgrade():\n    {back}\n" if back else ""
    (backend / "alembic" / "versions" / f"{name}_x.py").write_text(text)


def finding(report: Report, name: str) -> Status:
    return found(report, name).status


def test_a_plan_then_the_migration_then_nothing_is_pending(postgres_server: PostgresServer) -> None:
    migrate_to(postgres_server, "0003")

    planned = apply_migrations.fn(NAME)
    assert planned.status is Status.PLANNED
    assert [step.detail.split(":")[0] for step in planned.plan_steps if step.step == "migrate"] == [
        "0003 → 0004",
        "0004 → 0005",
    ]
    assert revision(postgres_server) == "0003"

    with pytest.raises(NotConfirmed):
        apply_migrations.fn(NAME, confirm="production")
    assert revision(postgres_server) == "0003"

    done = apply_migrations.fn(NAME, confirm=NAME)
    assert done.status is Status.OK, done.sentence()
    assert done.facts["Alembic revision"] == "0003 → 0005"
    assert revision(postgres_server) == "0005"

    again = apply_migrations.fn(NAME)
    assert again.status is Status.OK, "nothing is pending: nothing to confirm"
    assert "nothing is pending" in again.sentence()
    assert apply_migrations.fn(NAME, "0002").status is Status.OK, "an older revision is no upgrade"


def test_a_check_shows_the_history_and_finds_downgrades_that_do_nothing(
    postgres_server: PostgresServer, backend: Path
) -> None:
    migrate_to(postgres_server, "0004")
    clean = check_migrations.fn(NAME)
    assert finding(clean, "downgrades") is Status.OK
    assert found(clean, "pending migrations").value == "0005"
    assert clean.status is Status.WARN, "the code is newer than the schema"

    add(backend, "0006", "0005", "op.execute('CREATE TABLE a (x int)')", "pass")
    add(backend, "0007", "0006", "op.execute('CREATE TABLE b (x int)')")
    add(backend, "0008", "0007", "op.execute('CREATE TABLE c (x int)')", "raise NotImplementedError")
    report = check_migrations.fn(NAME)
    bad = found(report, "downgrades")
    assert bad.status is Status.WARN
    assert bad.value == "0008 (0008_x.py): raises; 0007 (0007_x.py): missing; 0006 (0006_x.py): empty"
    rows = {row[0]: row for evidence in report.evidence if evidence.name.startswith("History") for row in evidence.rows}
    assert [rows[name][3] for name in ("0008", "0005", "0004", "0003")] == ["pending", "pending", "current", "applied"]
    assert rows["0006"][1:5] == ("Title of 0006.", "0005", "pending", "🛑 empty")
    planned = apply_migrations.fn(NAME)
    assert planned.status is Status.PLANNED
    assert finding(planned, "downgrades") is Status.WARN


def test_a_check_finds_two_heads_and_a_schema_newer_than_the_code(
    postgres_server: PostgresServer, backend: Path
) -> None:
    migrate_to(postgres_server, "0005")
    assert check_migrations.fn(NAME).status is Status.OK
    (backend / "alembic" / "versions" / "0005_users_updated_at.py").unlink()
    with pytest.raises(RunbookFailed, match="revision 0005, which this application does not know"):
        check_migrations.fn(NAME)
    add(backend, "0005", "0004", "pass")
    add(backend, "0005b", "0004", "pass")
    with pytest.raises(RunbookFailed, match="one head: 0005"):
        check_migrations.fn(NAME, rehearse=True)


def test_a_rollback_has_the_same_condition_on_backups(
    postgres_server: PostgresServer, tmp_path: Path, tier: Use
) -> None:
    store = DirectoryStore(tmp_path / "backups" / "postgresql")
    migrate_to(postgres_server, "0005")
    tier("production")
    planned = rollback_migrations.fn(NAME)
    assert "take a backup" in [step.step for step in planned.plan_steps]
    assert catalogue.names(store, "postgres") == [], "a plan changes nothing"
    done = rollback_migrations.fn(NAME, confirm=NAME)
    [taken] = catalogue.names(store, "postgres")
    assert done.facts["backup taken first"] == taken
    assert catalogue.open_backup(store, taken).manifest.content["revision"] == "0005", "taken before the rollback"
    assert revision(postgres_server) == "0004"


def test_two_heads_are_critical_even_when_confirmed(postgres_server: PostgresServer, backend: Path) -> None:
    migrate_to(postgres_server, "0004")
    for name in ("0005a", "0005b"):
        add(backend, name, "0004", "pass")
    with pytest.raises(RunbookFailed) as raised:
        apply_migrations.fn(NAME, confirm=NAME)
    assert finding(raised.value.report, "one head") is Status.CRITICAL
    assert "0005a" in str(raised.value)
    assert "merge" in str(raised.value)
    assert revision(postgres_server) == "0004"


def test_a_failing_migration_is_critical_and_keeps_the_revision(postgres_server: PostgresServer, backend: Path) -> None:
    migrate_to(postgres_server, "0004")
    add(backend, "0006", "0005", "op.execute('ALTER TABLE nowhere ADD x int')")
    with pytest.raises(RunbookFailed, match='relation "nowhere" does not exist'):
        apply_migrations.fn(NAME, confirm=NAME)
    assert revision(postgres_server) == "0004"


def test_unsound_data_after_a_migration_is_critical(postgres_server: PostgresServer, backend: Path, tier: Use) -> None:
    with_expectations(backend.parents[0])
    migrate_to(postgres_server, "0005")
    add(backend, "0006", "0005", "op.execute(\"UPDATE users SET username = ' '\")", "op.execute('SELECT 1')")
    with pytest.raises(RunbookFailed) as raised:
        apply_migrations.fn(NAME, confirm=NAME)
    assert finding(raised.value.report, "expectations on the copy") is Status.CRITICAL
    assert "every user has a name" in str(raised.value)
    assert revision(postgres_server) == "0005", "it was seen on the copy"


def test_production_takes_a_backup_first_unless_a_verified_one_is_young(
    postgres_server: PostgresServer, tmp_path: Path, tier: Use
) -> None:
    store = tmp_path / "backups" / "postgresql"
    migrate_to(postgres_server, "0003")
    tier("production")

    planned = apply_migrations.fn(NAME)
    assert [step.step for step in planned.plan_steps][:2] == ["rehearse up, down, up", "take a backup"]
    assert catalogue.names(DirectoryStore(store), "postgres") == [], "a plan changes nothing"

    done = apply_migrations.fn(NAME, "0004", confirm=NAME)
    assert done.status in (Status.OK, Status.WARN)
    [taken] = catalogue.names(DirectoryStore(store), "postgres")
    assert done.facts["backup taken first"] == taken
    assert catalogue.open_backup(DirectoryStore(store), taken).manifest.content["revision"] == "0003", (
        "taken before the migration"
    )

    catalogue.mark_verified(DirectoryStore(store), taken, {"by": "test"})
    steps = apply_migrations.fn(NAME).plan_steps
    assert [step.step for step in steps] == ["rehearse up, down, up", "take a backup", "migrate", "check"]
    unless = f"of {DATABASE}, if {taken} is older than the RPO by then"
    assert steps[1].detail == unless
    backup_database.fn(NAME)
    two = catalogue.names(DirectoryStore(store), "postgres")
    assert apply_migrations.fn(NAME).plan_steps[1].detail == unless, "the newest that is verified, not the newest"
    migrated = apply_migrations.fn(NAME, confirm=NAME)
    assert "backup taken first" not in migrated.facts
    assert catalogue.names(DirectoryStore(store), "postgres") == two
