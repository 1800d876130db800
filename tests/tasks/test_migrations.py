"""Migrations: revisions, heads, what is pending, and an upgrade of exactly one database."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from blocks.postgres import Postgres
from runbook.errors import NotConfirmed, OpsError
from runbook.permit import Permit
from tasks.migrations import read_heads, read_revision, upgrade
from tests.servers import ROLE_PASSWORD, PostgresServer
from tests.tasks.conftest import BACKEND, application_at, permit_for


@pytest.fixture
def backend(tmp_path: Path) -> Path:
    """A copy of the application's Alembic environment, to be changed."""
    shutil.copytree(BACKEND / "alembic", tmp_path / "alembic", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(BACKEND / "alembic.ini", tmp_path)
    return tmp_path


def add(backend: Path, revision: str, down: str, body: str = "pass", imports: str = "") -> None:
    text = f'"""Title of {revision}."""\n{imports}\nfrom alembic import op\nrevision = {revision!r}\ndown_revision = {down!r}\n'
    text += f"branch_labels = depends_on = None\ndef upgrade():\n    {body}\ndef downgrade():\n    pass\n"
    (backend / "alembic" / "versions" / f"{revision}_x.py").write_text(text)


def test_an_empty_database_is_brought_to_the_head_and_then_nothing_is_pending(
    empty: Postgres, postgres_server: PostgresServer
) -> None:
    application = application_at()
    assert read_revision(empty, empty.database) == ""
    heads = read_heads(application)
    assert [script.revision for script in heads.pending("")] == ["0001", "0002", "0003", "0004", "0005"]

    done = upgrade(permit_for(empty), empty, application, empty.database)

    assert (done.before, done.after) == ("", heads.one())
    assert "Running upgrade" in done.output
    assert read_revision(empty, empty.database) == "0005"
    owner = "SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'"
    assert postgres_server.sql(owner, database=empty.database) == [("grc_user",)], "as the application's role"
    again = upgrade(permit_for(empty), empty, application, empty.database)
    assert (again.before, again.after, again.seconds) == ("0005", "0005", 0.0)


def test_only_the_named_database_is_migrated(
    empty: Postgres, interview: Postgres, postgres_server: PostgresServer
) -> None:
    """A copy beside is migrated under the live database's permit; `.env` and the block name the live one."""
    copy = f"{empty.database}_restoring"
    postgres_server.create_database(copy)
    try:
        upgrade(permit_for(empty), empty, application_at(), copy, "0002")
        assert read_revision(empty, copy) == "0002"
        assert read_revision(empty, empty.database) == ""
    finally:
        postgres_server.drop_database(copy)


def test_without_its_act_in_the_permit_nothing_happens(empty: Postgres) -> None:
    with pytest.raises(NotConfirmed):
        upgrade(Permit("test", ()), empty, application_at(), empty.database)
    assert read_revision(empty, empty.database) == ""


def test_two_heads_are_an_error_that_names_both(empty: Postgres, backend: Path) -> None:
    add(backend, "0006a", "0005")
    add(backend, "0006b", "0005")
    application = application_at(backend)
    assert set(read_heads(application).names) == {"0006a", "0006b"}
    with pytest.raises(OpsError, match="2 heads.*0006"):
        upgrade(permit_for(empty), empty, application, empty.database)
    assert read_revision(empty, empty.database) == ""


def test_a_revision_by_its_beginning_and_none_that_is_an_option(empty: Postgres) -> None:
    heads = read_heads(application_at())
    assert heads.resolve("0003") == "0003"
    for wrong in ("9999", "--sql", "", "000"):
        with pytest.raises(OpsError, match="of this application"):
            heads.resolve(wrong)


def test_a_schema_newer_than_the_code_is_refused(empty: Postgres, postgres_server: PostgresServer) -> None:
    application = application_at()
    upgrade(permit_for(empty), empty, application, empty.database)
    postgres_server.sql("UPDATE alembic_version SET version_num = '0099'", database=empty.database)
    with pytest.raises(OpsError, match="0099, which this application does not know"):
        upgrade(permit_for(empty), empty, application, empty.database)


def test_a_failing_migration_names_its_cause_keeps_the_revision_and_no_secret(empty: Postgres, backend: Path) -> None:
    add(backend, "0006", "0005", "op.execute('CREATE TABLE half (x int)'); op.execute('SELECT * FROM nowhere')")
    with pytest.raises(OpsError, match='relation "nowhere" does not exist') as raised:
        upgrade(permit_for(empty), empty, application_at(backend), empty.database)
    assert ROLE_PASSWORD not in str(raised.value)
    assert read_revision(empty, empty.database) == "", "one transaction"


def test_a_migration_that_prints_its_address_shows_no_password(empty: Postgres, backend: Path) -> None:
    body = "import os; raise RuntimeError('cannot use ' + os.environ['DATABASE_URL'].replace('grc_user', 'x'))"
    add(backend, "0006", "0005", body)
    with pytest.raises(OpsError, match=r"cannot use postgresql://x:\*\*\*\*") as raised:
        upgrade(permit_for(empty), empty, application_at(backend), empty.database)
    assert "4712" not in str(raised.value)


def test_a_migration_that_waits_for_a_lock_gives_up(
    interview: Postgres, postgres_server: PostgresServer, backend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.migrations.LOCK_TIMEOUT", "-c lock_timeout=300ms")
    add(backend, "0006", "0005", "op.execute('ALTER TABLE users ADD COLUMN x int')")
    with postgres_server.connect(interview.database) as other, other.transaction():
        other.execute("SELECT count(*) FROM users")
        with pytest.raises(OpsError, match="lock timeout"):
            upgrade(permit_for(interview), interview, application_at(backend), interview.database)


def test_scripts_that_import_the_application_are_read_with_its_python(backend: Path) -> None:
    (backend / "models.py").write_text("NAME = 'x'\n")
    add(backend, "0006", "0005", imports="import models")
    assert read_heads(application_at(backend)).one() == "0006"
    assert list(backend.rglob("__pycache__")) == [], "nothing of ours in the application's directory"


def test_what_cannot_be_read_is_said(
    interview: Postgres, postgres_server: PostgresServer, tmp_path: Path, backend: Path
) -> None:
    with pytest.raises(OpsError, match=r"there is no .*alembic\.ini"):
        read_heads(application_at(tmp_path / "nowhere"))
    add(backend, "0006", "0005", imports="import no_such_module")
    with pytest.raises(OpsError, match="cannot be read.*no_such_module"):
        read_heads(application_at(backend))
    postgres_server.sql("ALTER TABLE alembic_version RENAME version_num TO other", database=interview.database)
    with pytest.raises(OpsError, match="revision .* cannot be read"):
        read_revision(interview, interview.database)
