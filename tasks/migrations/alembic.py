"""Alembic's own program: a database's revision, and the way up and down. https://alembic.sqlalchemy.org/"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blocks.places import Application
from blocks.postgres.server import Postgres
from runbook.errors import OpsError
from runbook.guard.permit import Act, Permit
from runbook.kinds import action, probe
from tasks.migrations.columns import Columns, count_filled
from tasks.migrations.program import HINT, require_reached, revision_of, run_alembic
from tasks.migrations.scripts import BASE, HEAD, Heads, Script, heads_of
from tasks.postgres.content.content import read_counts

MIGRATE, ROLL_BACK = "migrate", "roll back"


@dataclass(frozen=True)
class Migrated:
    """A database's revision before and after, and the end of what Alembic said (empty where nothing was pending)."""

    before: str
    after: str
    seconds: float
    output: str


@dataclass(frozen=True)
class Upgrade:
    """An upgrade as it was rehearsed: from where (empty: nothing yet), and through which scripts."""

    before: str
    scripts: tuple[Script, ...]


@dataclass(frozen=True)
class Undo:
    """A downgrade as it was judged: from where to where (empty: base), through which scripts, the tables that lose rows
    or what is in columns, which of them are dropped, which columns are, and the rows whose data goes: those deleted
    from tables that stay, and altogether at most. Dropped tables' and columns' are counted again before anything is
    touched."""

    before: str
    target: str
    scripts: tuple[Script, ...] = ()
    tables: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    columns: Columns = ()
    deleted: int = 0
    rows: int = 0

    def act(self, database: str) -> Act:
        """What a permit must say."""
        losing = f", losing up to {self.rows:,} rows in {len(self.tables)} tables" if self.tables else ""
        dropping = ", ".join(f"{table} ({', '.join(names)})" for table, names in self.columns)
        columns = f", dropping columns of {dropping}" if dropping else ""
        return Act(ROLL_BACK, f"{database} to {self.target or BASE}{losing}{columns}")


@probe
def read_revision(postgres: Postgres, database: str) -> str:
    """What `alembic_version` says: empty when there is none, several joined with commas.

    Raises:
        Unreachable: the server does not answer.
        OpsError: it refuses, or the table is not Alembic's.
    """
    return revision_of(postgres, database)


@action
def upgrade(
    permit: Permit,
    postgres: Postgres,
    application: Application,
    database: str,
    revision: str = HEAD,
    backend_directory: Path | None = None,
    *,
    rehearsed: Upgrade | None = None,
) -> Migrated:
    """`alembic upgrade` on one database (§8.2, step 5), as the application's role. Nothing is run where nothing is
    pending. Where Alembic runs them in one transaction, what fails leaves the schema as it was.

    The permit names the application's database, also where `database` is a copy that will take its place. What was
    `rehearsed` is what runs: another revision or other scripts are refused.

    Raises:
        NotConfirmed: not permitted.
        VerificationFailed: Alembic does not come to the copy.
        OpsError: it is not what was rehearsed, several heads, an unknown revision, or the migration failed; the end of
            its output is in the message.
    """
    permit.require(MIGRATE, postgres.database)
    heads = heads_of(application, backend_directory)
    before = revision_of(postgres, database)
    target = heads.resolve(revision)
    if rehearsed:
        _require_judged(database, before, heads, rehearsed)
    if not heads.pending(before, target):
        return Migrated(before, before, 0.0, "")
    if database != postgres.database:
        require_reached.work(postgres, application, database, backend_directory)
    done = run_alembic(postgres, application, database, ("upgrade", target), backend_directory)
    after = revision_of(postgres, database)
    if heads.pending(after, target):
        raise OpsError(f"alembic said nothing, yet {database} is at {after or 'no revision'} instead of {target}", HINT)
    return Migrated(before, after, done.seconds, done.stdout)


@action
def downgrade(permit: Permit, postgres: Postgres, application: Application, undo: Undo) -> Migrated:
    """`alembic downgrade` on the application's database, as its role, exactly as it was judged.

    Raises:
        NotConfirmed: not permitted.
        OpsError: database or scripts are no longer what was judged (or more data would go), or it failed.
    """
    database = postgres.database
    permit.require(ROLL_BACK, undo.act(database).target)
    before = revision_of(postgres, database)
    _require_judged(database, before, heads_of(application), undo)
    counts = dict(read_counts.work(postgres, database).rows) if undo.dropped else {}
    filled = count_filled.work(postgres, database, undo.columns) if undo.columns else {}
    rows = sum(counts.get(table, 0) for table in undo.dropped) + sum(filled.values()) + undo.deleted
    if rows > undo.rows:
        raise OpsError(
            f"{rows:,} rows would lose data by now, {undo.rows:,} were accepted",
            f"stop what is writing (the backend) and launch this again with lose_rows={rows}",
        )
    done = run_alembic(postgres, application, database, ("downgrade", undo.target or BASE))
    after = revision_of(postgres, database)
    if after != undo.target:
        raise OpsError(
            f"alembic said nothing, yet {database} is at {after or BASE} instead of {undo.target or BASE}", HINT
        )
    return Migrated(before, after, done.seconds, done.stdout)


def _require_judged(database: str, before: str, heads: Heads, judged: Upgrade | Undo) -> None:
    """Somebody may have migrated, or deployed another release, since."""
    if before != judged.before:
        then = judged.before or "no revision"
        raise OpsError(f"{database} is at {before or 'no revision'} now, not at {then}", "launch this again")
    now = {script.revision: script.digest for script in heads.scripts}
    if other := [script.revision for script in judged.scripts if now.get(script.revision) != script.digest]:
        raise OpsError(
            f"the migrations are not those that were rehearsed: {', '.join(other)} changed since",
            "launch this again when the release is deployed as a whole: it rehearses what is there then",
        )
