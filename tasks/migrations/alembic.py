"""Alembic: a database's revision, upgrade and downgrade. https://alembic.sqlalchemy.org/"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blocks.places import Application
from blocks.postgres.server import Postgres
from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.migrations.columns import Columns, count_filled
from tasks.migrations.program import HINT, require_reached, revision_of, run_alembic
from tasks.migrations.scripts import BASE, HEAD, MigrationHeads, Script, heads_of
from tasks.postgres.content.content import read_counts

MIGRATE, ROLL_BACK = "migrate", "roll back"


@dataclass(frozen=True)
class MigratedDatabase:
    """A database's revision before and after, and the end of the output (empty if nothing was pending). `live`: what
    happened meanwhile in the live database, where a copy was migrated."""

    before: str
    after: str
    seconds: float
    output: str
    live: str = ""


@dataclass(frozen=True)
class Upgrade:
    """A rehearsed upgrade: its start (empty: no revision yet) and its scripts."""

    before: str
    scripts: tuple[Script, ...]


@dataclass(frozen=True)
class MigrationUndo:
    """A judged downgrade: its start, its target (empty: base), its scripts, and its data loss.

    `tables`: those that lose rows or values; `dropped`: those of them that are dropped; `columns`: the dropped columns;
    `deleted`: rows deleted from tables that remain; `rows`: the most rows that may lose data. Rows of dropped tables
    and columns are counted again before the downgrade.
    """

    before: str
    target: str
    scripts: tuple[Script, ...] = ()
    tables: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    columns: Columns = ()
    deleted: int = 0
    rows: int = 0

    def act(self, database: str) -> Act:
        """The act, with its data loss."""
        losing = f", losing up to {self.rows:,} rows in {len(self.tables)} tables" if self.tables else ""
        dropping = ", ".join(f"{table} ({', '.join(names)})" for table, names in self.columns)
        columns = f", dropping columns of {dropping}" if dropping else ""
        return Act(ROLL_BACK, f"{database} to {self.target or BASE}{losing}{columns}")


@probe
def read_revision(postgres: Postgres, database: str) -> str:
    """The content of `alembic_version`: empty if there is none, several revisions joined with commas.

    Raises:
        Unreachable: the server does not answer.
        OpsError: the table cannot be read.
    """
    return revision_of(postgres, database)


@action(of=lambda postgres: Act(MIGRATE, postgres.database))
def upgrade(
    postgres: Postgres,
    application: Application,
    database: str,
    revision: str = HEAD,
    backend_directory: Path | None = None,
) -> MigratedDatabase:
    """`alembic upgrade` on one database (§8.2, step 5), as the application's role; nothing if nothing is pending.

    Its act names the application's database, even if `database` is a copy that will replace it.

    Raises:
        VerificationFailed: Alembic connects to another database than the copy.
        OpsError: there are several heads, the revision is unknown, or the migration failed; the message has the end of
            its output.
    """
    heads = heads_of(application, backend_directory)
    before = revision_of(postgres, database)
    target = heads.resolve(revision)
    if not heads.pending(before, target):
        return MigratedDatabase(before, before, 0.0, "")
    if database != postgres.database:
        require_reached.work(postgres, application, database, backend_directory)
    return _upgrade(postgres, application, heads, (database, before, target), backend_directory)


@action(of=lambda postgres: Act(MIGRATE, postgres.database))
def upgrade_live(postgres: Postgres, application: Application, rehearsed: Upgrade) -> MigratedDatabase:
    """`alembic upgrade` on the application's database, as its role, exactly as rehearsed.

    Raises:
        OpsError: database or scripts changed since, or it failed; the message has the end of its output.
    """
    database, heads = postgres.database, heads_of(application)
    before = revision_of(postgres, database)
    _require_judged(database, before, heads, rehearsed)
    return _upgrade(postgres, application, heads, (database, before, rehearsed.scripts[-1].revision))


def _upgrade(
    postgres: Postgres,
    application: Application,
    heads: MigrationHeads,
    of: tuple[str, str, str],
    backend_directory: Path | None = None,
) -> MigratedDatabase:
    """`of`: the database, its revision and the target."""
    database, before, target = of
    done = run_alembic(postgres, application, database, ("upgrade", target), backend_directory)
    after = revision_of(postgres, database)
    if heads.pending(after, target):
        where = f"{database} is at {after or 'no revision'} instead of {target}"
        raise OpsError(f"alembic reported no error, but {where}", HINT)
    return MigratedDatabase(before, after, done.seconds, done.stdout)


@action(of=lambda postgres, undo: undo.act(postgres.database))
def downgrade(postgres: Postgres, application: Application, undo: MigrationUndo) -> MigratedDatabase:
    """`alembic downgrade` on the application's database, as its role, exactly as judged.

    Raises:
        OpsError: database or scripts changed since, more data would be lost, or it failed.
    """
    database = postgres.database
    before = revision_of(postgres, database)
    _require_judged(database, before, heads_of(application), undo)
    counts = dict(read_counts.work(postgres, database).rows) if undo.dropped else {}
    filled = count_filled.work(postgres, database, undo.columns) if undo.columns else {}
    rows = sum(counts.get(table, 0) for table in undo.dropped) + sum(filled.values()) + undo.deleted
    if rows > undo.rows:
        raise OpsError(
            f"{rows:,} rows would lose data now, {undo.rows:,} were accepted",
            f"stop the writers (the backend) and run this again with lose_rows={rows}",
        )
    done = run_alembic(postgres, application, database, ("downgrade", undo.target or BASE))
    after = revision_of(postgres, database)
    if after != undo.target:
        where = f"{database} is at {after or BASE} instead of {undo.target or BASE}"
        raise OpsError(f"alembic reported no error, but {where}", HINT)
    return MigratedDatabase(before, after, done.seconds, done.stdout)


def _require_judged(database: str, before: str, heads: MigrationHeads, judged: Upgrade | MigrationUndo) -> None:
    """Refuse if somebody migrated the database or deployed another release since."""
    if before != judged.before:
        then = judged.before or "no revision"
        raise OpsError(f"{database} is at {before or 'no revision'} now, not at {then}", "run this again")
    now = {script.revision: script.digest for script in heads.scripts}
    if other := [script.revision for script in judged.scripts if now.get(script.revision) != script.digest]:
        raise OpsError(
            f"the migrations differ from the rehearsed ones: {', '.join(other)} changed since",
            "run this again when the release is completely deployed: it rehearses the scripts again",
        )
