"""A new migration: a scratch database to generate it, its rehearsal, and its review (§1.1)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from blocks.environment import Environment
from flows.database.migration.rehearsal import CHECK_SERVER, drop_scratch
from runbook.errors import OpsError
from runbook.page.markdown import fenced
from runbook.report import Evidence, Report
from tasks.migrations.program import require_reached
from tasks.migrations.rehearsal import Direction, compare_schemas, migrate_rehearsal, read_state
from tasks.migrations.scratch import create_rehearsal
from tasks.migrations.scripts import MigrationHeads, Script

MOST_LINES = 200
# Changes that autogenerate misses or gets wrong, and a pattern for the lines of a script that may have them.
# https://alembic.sqlalchemy.org/en/latest/autogenerate.html#what-does-autogenerate-detect-and-what-does-it-not-detect
CHECKLIST = (
    (
        "renamed tables and columns",
        "a rename becomes drop + add: use op.rename_table or alter_column(new_column_name=) instead",
        r"op\.(drop_table|drop_column|batch_alter)|\bDROP (TABLE|COLUMN)\b",
    ),
    (
        "types and server defaults",
        "detected only as compare_type and compare_server_default are set; check whether USING is needed",
        r"type_=|server_default|postgresql_using|\bTYPE\b",
    ),
    (
        "values of an ENUM",
        "changed values are not detected; does the downgrade drop the type? a transaction cannot use a value it adds",
        r"Enum\(|\bENUM\b|ADD VALUE",
    ),
    (
        "CHECK and EXCLUDE constraints",
        "not detected: write them by hand; a downgrade cannot drop a constraint without a name",
        r"check_constraint|CheckConstraint|\bCHECK\b|\bEXCLUDE\b|constraint\(None",
    ),
    (
        "partial and expression indexes",
        "changes of the condition (WHERE) or the expression may not be detected",
        r"postgresql_where|sa\.text\(|literal_column",
    ),
    (
        "views, functions, triggers, privileges",
        "not detected; a column that a view depends on cannot be changed",
        r"\b(VIEW|FUNCTION|TRIGGER|GRANT|POLICY|SEQUENCE)\b",
    ),
    (
        "changes of data",
        "not detected; split a large UPDATE into batches; is the result the same if it runs again?",
        r"\b(UPDATE|INSERT|DELETE)\b|bulk_insert",
    ),
    (
        "a column becomes NOT NULL",
        "it fails if a row has NULL; in a large table: CHECK NOT VALID, then VALIDATE, then SET NOT NULL",
        r"nullable=False|NOT NULL",
    ),
    (
        "new indexes",
        "building an index blocks writes; in a large table: CONCURRENTLY within autocommit_block",
        r"create_index|CREATE (UNIQUE )?INDEX",
    ),
    (
        "new foreign keys and constraints",
        "they lock both tables; add them NOT VALID, and VALIDATE in the next migration",
        r"create_foreign_key|ForeignKey|ADD CONSTRAINT",
    ),
    (
        "effect of its locks",
        "the table of check-migrations (rehearse=true): which tables are locked, and for how long",
        r"op\.alter|ALTER TABLE",
    ),
    (
        "downgrade of everything",
        "does it undo all of the upgrade, in reverse order? which data is lost?",
        r"def downgrade",
    ),
)


@contextmanager
def scratch_at(report: Report, env: Environment, revision: str) -> Iterator[str]:
    """An empty database, migrated to a revision, to compare the models with.

    Raises:
        RunbookFailed: the migrations do not run on an empty database.
    """
    try:
        name = create_rehearsal(env.postgres)
        require_reached(env.postgres, env.application, name)
        if revision:
            came = migrate_rehearsal(env.postgres, env.application, name, "up", revision)
            report.require(
                "migrations of an empty database",
                not came.error,
                "correct the migration that fails: an empty database cannot be migrated to head",
                value=came.error or f"up to {revision}",
                expected="they run on an empty database",
            )
            report.fail_if_critical()
        yield name
    except psycopg.Error as error:
        what = str(error).splitlines()[0]
        raise OpsError(f"connection to the scratch database lost: {what}", CHECK_SERVER) from None
    finally:
        drop_scratch(report, env)


def find_unfinished(heads: MigrationHeads, applied: set[str], message: str) -> Script | None:
    """The script that an earlier run created for the same message and that is not applied here."""
    for script in heads.scripts:
        if script.revision in heads.names and script.revision not in applied and script.title.strip() == message:
            return script
    return None


def rehearse_new(report: Report, env: Environment, scratch: str, script: Script) -> None:
    """Up, down, up on the empty scratch database: the downgrade must restore the schema."""
    before = next(iter(script.down), "")
    start = read_state(env.postgres, scratch)
    steps: tuple[tuple[Direction, str], ...] = (("up", script.revision), ("down", before), ("up", script.revision))
    for number, (direction, target) in enumerate(steps, 1):
        done = migrate_rehearsal(env.postgres, env.application, scratch, direction, target)
        _require(report, f"rehearsal: {number}. {direction}", not done.error, script, done.error or "done")
        if done.error:
            return
        if direction == "down":
            now = read_state.after(done)(env.postgres, scratch)
            other = compare_schemas.after(now)(env.postgres, scratch, start.definitions, now.definitions)
            _require(report, "schema after up and down", not other, script, "; ".join(other[:3]) or "as before")


def judge_new(report: Report, script: Script, *, generated: bool) -> None:
    """The review: the script, and a checklist of what autogenerate may have missed."""
    text = script.path.read_text(encoding="utf-8", errors="replace")
    report.fact("file", script.path)
    report.fact("revision", f"{script.revision}, after {', '.join(script.down) or 'nothing'}")
    _require(report, "upgrade", script.upgrade == "written", script, script.upgrade)
    _require(report, "downgrade", script.downgrade == "written", script, script.downgrade)
    report.table(
        "Review checklist (what autogenerate misses)",
        ("item", "what to check", "in this file"),
        [(item, what, _places(pattern, text)) for item, what, pattern in CHECKLIST],
    )
    lines = text.splitlines()
    more = f"\n… {len(lines) - MOST_LINES} more lines" if lines[MOST_LINES:] else ""
    shown = "\n".join(lines[:MOST_LINES]) + more
    report.attach(Evidence(script.path.name, text=fenced(shown, "python")))
    if generated:
        report.warn(
            "review",
            f"review {script.path} by the checklist, correct it, run this again with the same message, commit it",
            value="generated, not yet reviewed",
        )


def _require(report: Report, name: str, ok: bool, script: Script, value: str) -> None:
    report.require(
        name,
        ok,
        f"write upgrade() and downgrade() in {script.path}, then run this again with the same message",
        value=value,
        expected="written, and undone by the downgrade",
    )


def _places(pattern: str, text: str) -> str:
    lines = [number for number, line in enumerate(text.splitlines(), 1) if re.search(pattern, line)]
    shown = ", ".join(map(str, lines[:6])) + (" …" if lines[6:] else "")
    return f"{len(lines)} lines: {shown}" if lines else "—"
