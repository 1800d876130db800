"""create_migration: a real Alembic project with models; what it writes, what it refuses to call done, what it leaves."""

# ruff: noqa: F811
from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from blocks.config import toml
from flows.database.migrations import check_migrations, create_migration
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from tasks.migrations.alembic import upgrade
from tests.database.migrations.test_migrations import (  # noqa: F401
    BACKEND,
    DATABASE,
    NAME,
    Use,
    finding,
    found,
    revision,
    tier,
)
from tests.fixtures.servers import PostgresServer

MODELS = """
import sqlalchemy as sa
metadata = sa.MetaData()
people = sa.Table("people", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.Text))
"""
MAKO = '''"""${message}

Revises: ${down_revision | comma,n}
"""
from alembic import op
import sqlalchemy as sa
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
'''


@pytest.fixture
def backend(tmp_path: Path) -> Path:
    """An application with models and no migration yet."""
    root = tmp_path / "grc"
    (root / "alembic" / "versions").mkdir(parents=True)
    shutil.copy(BACKEND / "alembic.ini", root)
    text = (BACKEND / "alembic" / "env.py").read_text()
    text = text.replace("connection=connection,", "connection=connection, target_metadata=models.metadata,")
    (root / "alembic" / "env.py").write_text(
        text.replace("import logging\n", "import logging\nimport sys; sys.path.insert(0, '.'); import models\n", 1)
    )
    (root / "alembic" / "script.py.mako").write_text(MAKO)
    (root / "models.py").write_text(MODELS)
    return root


def scripts(backend: Path) -> list[Path]:
    return sorted((backend / "alembic" / "versions").glob("*.py"))


def refused(*arguments: object, **named: object) -> Report:
    with pytest.raises(RunbookFailed) as raised:
        create_migration.fn(NAME, *arguments, **named)  # type: ignore[arg-type]
    return raised.value.report


def databases(server: PostgresServer) -> list[str]:
    return [row[0] for row in server.sql("SELECT datname FROM pg_database WHERE datname LIKE 'migrations_db%'")]


def test_a_migration_is_generated_rehearsed_reviewed_and_then_agrees(
    postgres_server: PostgresServer, backend: Path
) -> None:
    first = create_migration.fn(NAME, "people に氏名")
    [path] = scripts(backend)
    assert "op.create_table('people'" in path.read_text()
    assert first.facts["file"] == str(path)
    assert finding(first, "rehearsal: 3. up") is Status.OK
    assert finding(first, "schema after up and down") is Status.OK
    review = found(first, "review")
    assert review.status is Status.WARN
    assert str(path) in review.hint
    items = {
        row[0]: row[2] for evidence in first.evidence if "Review checklist" in evidence.name for row in evidence.rows
    }
    assert len(items) == 12
    assert items["downgrade of everything"].startswith("1 lines: ")
    assert items["values of an ENUM"] == "—"
    assert revision(postgres_server) == "", "nothing live was touched"
    assert databases(postgres_server) == [DATABASE]

    again = create_migration.fn(NAME, "people に氏名")
    assert again.status is Status.OK, again.sentence()
    assert scripts(backend) == [path], "the same message judges the file that is there"

    env = toml.environment(NAME)
    upgrade.work(env.postgres, env.application, DATABASE)
    same = create_migration.fn(NAME, "何もない")
    assert same.status is Status.OK
    assert "nothing was created" in same.sentence()
    assert scripts(backend) == [path]


def test_an_empty_migration_is_not_done_before_both_ways_are_written(
    postgres_server: PostgresServer, backend: Path
) -> None:
    report = refused("by hand", autogenerate=False)
    [path] = scripts(backend)
    assert finding(report, "downgrade") is Status.CRITICAL
    assert str(path) in found(report, "downgrade").hint

    body = "op.execute('CREATE VIEW v AS SELECT 1')"
    path.write_text(path.read_text().replace("upgrade() -> None:\n    pass", f"upgrade() -> None:\n    {body}", 1))
    half = refused("by hand", autogenerate=False)
    assert finding(half, "upgrade") is Status.OK
    assert finding(half, "downgrade") is Status.CRITICAL
    assert finding(check_migrations.fn(NAME), "downgrades") is Status.WARN

    wrong = "op.execute('SELECT 1')"
    path.write_text(path.read_text().replace("downgrade() -> None:\n    pass", f"downgrade() -> None:\n    {wrong}"))
    elsewhere = refused("by hand", autogenerate=False)
    assert finding(elsewhere, "downgrade") is Status.OK
    assert "VIEW public.v (owner grc_user) is new" in found(elsewhere, "schema after up and down").value

    path.write_text(path.read_text().replace(wrong, "op.execute('DROP VIEW v')"))
    done = create_migration.fn(NAME, "by hand", autogenerate=False)
    assert done.status is Status.OK, done.sentence()
    assert scripts(backend) == [path]
    assert databases(postgres_server) == [DATABASE]


@pytest.mark.parametrize("message", ["", "  ", "two\nlines", "x" * 101, 'a"""b', "back\\slash", "zero\x00"])
def test_a_message_is_one_line(backend: Path, message: str) -> None:
    assert "one line of 1 to 100 characters" in refused(message).sentence()
    assert scripts(backend) == []


def test_a_message_that_looks_like_an_option_is_a_message(backend: Path) -> None:
    refused("--sql", autogenerate=False)
    assert len(scripts(backend)) == 1
    assert scripts(backend)[0].read_text().startswith('"""--sql')


def test_production_makes_no_migrations(backend: Path, tier: Use) -> None:
    tier("production")
    assert "is production: migrations are created in the repository" in refused("x").sentence()
    assert scripts(backend) == []


def test_an_application_without_models_is_told_so(postgres_server: PostgresServer, backend: Path) -> None:
    shutil.copy(BACKEND / "alembic" / "env.py", backend / "alembic")
    report = refused("x")
    assert "target_metadata is None" in report.sentence()
    assert "autogenerate=false" in report.sentence()
    assert scripts(backend) == []
    assert databases(postgres_server) == [DATABASE]


def test_migrations_that_do_not_run_from_nothing_are_told(backend: Path) -> None:
    text = "from alembic import op\nrevision = '0001'\ndown_revision = branch_labels = depends_on = None\n"
    text += "def upgrade(): op.execute('ALTER TABLE made_by_hand ADD x int')\ndef downgrade(): op.execute('SELECT 1')\n"
    (backend / "alembic" / "versions" / "0001_a.py").write_text(text)
    report = refused("x")
    assert 'relation "made_by_hand" does not exist' in found(report, "migrations of an empty database").value
    assert len(scripts(backend)) == 1
