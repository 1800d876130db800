"""The main job on a system that nobody here has seen: green in the plan, and carried out in the disaster."""

from __future__ import annotations

import sys
from urllib.parse import quote

from flows.database.backup import backup_database
from flows.recovery.full_restore import full_restore
from runbook.report import Status
from runbook.wait import until
from tests.stranger.system import NAME, ROLE, ROLE_PASSWORD, Stranger, running_stranger

GOOD = ("OK", "WARN")


def back_up(stranger: Stranger, *runbooks: str) -> None:
    for runbook in ("backup-database", "backup-redis", *runbooks):
        done = stranger.run(runbook)
        assert done.code == 0, done.text


def test_everything_comes_back_without_a_prefect_server(stranger: Stranger) -> None:
    """By the minimal description; its schema has what PostgreSQL prints otherwise after a round trip."""
    back_up(stranger)
    before = stranger.content()
    stranger.destroy()
    planned = stranger.restore()
    assert planned.code == 0, planned.text
    done = stranger.restore("--confirm", NAME)
    assert done.code == 0, done.text
    assert stranger.content() == before
    assert stranger.ready()
    assert stranger.report()["status"] in GOOD
    hints = " ".join(finding["hint"] for finding in stranger.report()["findings"])
    assert "undo-restore" not in hints, "DROP DATABASE left nothing that could be put back"


def test_postgresql_alone_is_a_complete_environment(stranger: Stranger) -> None:
    """Neither Redis nor an application nor a service manager is described; the application goes on asking meanwhile."""
    text = stranger.toml.read_text()
    parts = text.split("\n\n")
    kept = [part for part in parts if not part.startswith(("[redis]", "[application]", "[services]"))]
    stranger.toml.write_text("\n\n".join(kept).replace(f'redis = "{stranger.root}/backups/redis"', ""))
    assert backup_database.fn(NAME).status.value in GOOD
    before = stranger.content()
    stranger.sql("DROP DATABASE members WITH (FORCE)", database="postgres")
    assert full_restore.fn(NAME).status is Status.PLANNED
    report = full_restore.fn(NAME, confirm=NAME)
    assert report.status.value in GOOD
    assert stranger.content() == before
    assert until(stranger.ready, what="the application, which opens new connections", seconds=120)


def test_a_release_with_alembic_is_migrated_on_the_copy() -> None:
    """The release that is live is newer than the backup of the database, older than none of the files."""
    with running_stranger(alembic=True) as stranger:
        back_up(stranger)
        stranger.add_revision("second", "first", "ALTER TABLE users ADD COLUMN nickname text")
        done = stranger.run("backup-files")
        assert done.code == 0, done.text
        stranger.destroy()
        done = stranger.restore("--confirm", NAME)
        assert done.code == 0, done.text
        assert stranger.sql("SELECT count(nickname), count(*) FROM users") == [(0, 500)]
        assert stranger.sql("SELECT version_num FROM alembic_version") == [("second",)]
        assert stranger.ready()
        stranger.add_revision("third", "first", "SELECT 1")
        back_up(stranger, "backup-files")  # the files backup that a restore takes is the one nearest to the database's
        planned = stranger.restore()
        assert planned.code == 1
        assert "the migrations have 2 heads" in planned.text


MIGRATION = """\
import os, sys, psycopg, redis
redis.Redis(port={redis}, password="r3d:pass").incr("migrated")
dsn = {dsn}
with psycopg.connect(dsn) as connection:
    connection.execute("ALTER TABLE users ADD COLUMN nickname text")
print("one migration")
"""


def describe_migration(stranger: Stranger, dsn: str) -> None:
    script = stranger.root / "migrate.py"
    script.write_text(MIGRATION.format(redis=stranger.ports["redis"], dsn=dsn))
    stranger.describe(more=f'migrate_command = ["{sys.executable}", "{script}"]\n')


def test_a_migration_that_needs_redis_runs_while_it_serves(stranger: Stranger) -> None:
    """It failed, since the restore had stopped Redis before."""
    back_up(stranger)
    describe_migration(stranger, 'os.environ["DATABASE_URL"]')
    done = stranger.restore("--confirm", NAME, "--redis-source", "backup")
    assert done.code == 0, done.text
    assert stranger.sql("SELECT count(nickname), count(*) FROM users") == [(0, 500)]
    assert stranger.ready()
    facts = stranger.report()["facts"]
    assert facts["live database during the migration"].startswith("members is unchanged")
    assert "one migration" in str(stranger.report()["evidence"])


def test_a_migration_that_reads_its_own_configuration_ends_the_restore(stranger: Stranger) -> None:
    """As Django does: it migrated the live database."""
    back_up(stranger)
    before = stranger.content()[:3]
    login = f"{ROLE}:{quote(ROLE_PASSWORD, safe='')}"
    describe_migration(stranger, repr(f"postgresql://{login}@127.0.0.1:{stranger.ports['postgres']}/members"))
    done = stranger.restore("--confirm", NAME)
    assert done.code == 1
    assert "connected to the live database instead of members__new" in done.text
    assert stranger.content()[:3] == before
    assert stranger.ready(), "the services run again"
