"""Judge, plan, prove, tell: what a restore of single tables and its undoing do alike, called with the open report."""

from __future__ import annotations

from collections.abc import Sequence

from blocks.environment import Environment
from flows.database.choosing import NEWEST
from flows.database.room import WAL_RATIO, judge_room
from runbook.errors import OTHER_BACKUPS, OpsError
from runbook.permit import Act
from runbook.report import Report, Status
from tasks.catalogue import Backup
from tasks.postgres.content import TableSum
from tasks.postgres.copy import content_in
from tasks.postgres.table_kept import SupersededTable, kept_name
from tasks.postgres.table_pairs import Pair, unequal_columns
from tasks.postgres.table_scratch import REPLACE_ROWS
from tasks.postgres.table_swap import Exchange, tidy_tables
from tasks.postgres.table_ties import Ties

MOST_TABLES = 50
# Measured for an estimate in the plan: restored beside, brought over, put in place; bytes of the table per second.
ROWS_BYTES_PER_SECOND = 40e6
Wanted = Sequence[tuple[Pair, TableSum]]


def require_names(tables: Sequence[str]) -> None:
    """Before a backup is read for nothing.

    Raises:
        OpsError: there is none, or there are too many.
    """
    if not any(name.strip() for name in tables):
        raise OpsError("no table was named", "name the tables to restore, as schema.table")
    if len(tables) > MOST_TABLES:
        raise OpsError(f"{len(tables)} tables were named", f"at most {MOST_TABLES}; for more run restore-database")


def choose_kept(found: Sequence[SupersededTable], kept: str) -> list[SupersededTable]:
    """The tables that were replaced together.

    Raises:
        OpsError: there are none of that time, or some of them are gone.
    """
    stamps = list(dict.fromkeys(table.stamp for table in found))
    stamp = stamps[0] if stamps and kept == NEWEST else kept
    if stamp not in stamps:
        there = ", ".join(stamps[:5]) or "none at all"
        raise OpsError(f"there are no kept rows of “{kept[:40]}”", f"those that are there, newest first: {there}")
    chosen = [table for table in found if table.stamp == stamp]
    gone = sorted({name for table in chosen for name in table.together} - {table.table for table in chosen})
    if gone:
        raise OpsError(
            f"what was replaced together at {stamp} is not whole: the rows of {', '.join(gone[:5])} are gone",
            f"a part of it would leave tables of two times: copy by hand what is wanted from {chosen[0].name} …",
        )
    return chosen


def acts(pairs: Sequence[Pair]) -> list[Act]:
    """What a permit is needed for."""
    return [Act(REPLACE_ROWS, pair.live.name) for pair in pairs]


def judge_definitions(report: Report, pairs: Sequence[Pair], ties: Ties, backup: Backup) -> None:
    """Whether the backup's rows fit the live tables, and what would go wrong silently."""
    judge_columns(report, pairs)
    judge_ties(report, ties)
    texts = content_in(backup).definitions
    newer = [
        name
        for name, definition in ties.deferrable
        if not any(f" {name} (owner " in key.replace(".", " ") and definition in text for key, text in texts.items())
    ]
    report.expect(
        "deferrable constraints",
        not newer,
        "they are not checked while rows are replaced: make them NOT DEFERRABLE meanwhile, or restore-database",
        value=f"newer than the backup: {', '.join(newer)}" if newer else f"{len(ties.deferrable)}, all in the backup",
    )


def judge_columns(report: Report, pairs: Sequence[Pair], *, kept: bool = False) -> None:
    """Rows go back into the columns that they came from, or not at all."""
    for pair in pairs:
        unequal = unequal_columns(pair.wanted, pair.live, kept=kept)
        report.expect(
            f"columns of {pair.live.name}",
            not unequal,
            "restore into another database (restore-database into=…) and copy by hand what is wanted",
            value="; ".join(unequal[:5]) or f"{len(pair.live.columns)} as in the backup",
            expected="names and types of the backup",
        )


def judge_ties(report: Report, ties: Ties) -> None:
    """Refusals, and what somebody should know."""
    report.expect(
        "what acts on the rows by itself",
        not ties.refusals,
        "do what is said there, then launch this again",
        value="; ".join(ties.refusals[:5]) or "nothing that cannot be held still",
    )
    report.fact("foreign keys asked before the commit", ", ".join(key.name for key in ties.keys) or "none")
    if ties.triggers:
        report.fact("triggers that do not fire", ", ".join(ties.triggers))
    if ties.publications:
        report.warn(
            "publications",
            "nothing to do: subscribers get the deletions and the restored rows",
            value=f"{', '.join(ties.publications)} publish these tables",
        )
    if ties.subscriptions:
        report.warn(
            "subscriptions",
            "ALTER SUBSCRIPTION … REFRESH PUBLICATION does not send again what is undone here: copy it by hand",
            value=f"{', '.join(ties.subscriptions)} fill these tables",
        )


def judge_space(report: Report, env: Environment, wanted: Wanted) -> None:
    """Beside: the scratch copy and the brought rows. In place: the kept rows, and the new beside the dead ones."""
    new, old = sum(one.bytes for _, one in wanted), sum(pair.live.bytes for pair, _ in wanted)
    data, wal = 2 * new + 2 * max(new, old), int(WAL_RATIO * (new + 2 * max(new, old)))
    judge_room(report, env, data, wal, "the old rows are kept, and the new stand beside them")


def plan(report: Report, wanted: Wanted, source: str) -> None:
    """One line for each table."""
    for pair, expected in wanted:
        bytes_now = max(expected.bytes, pair.live.bytes)
        report.plan(
            "replace rows",
            f"{pair.live.name}: {pair.live_rows:,} live rows → {expected.rows:,} rows of {source}; the old are kept",
            size=bytes_now,
            seconds=max(0.1, bytes_now / ROWS_BYTES_PER_SECOND),
        )


def prove(report: Report, wanted: Wanted, found: Sequence[TableSum]) -> None:
    """The rows beside against the manifest.

    Raises:
        RunbookFailed: they differ. The live tables were not touched.
    """
    rows = [(pair.live.name, one, two) for (pair, one), two in zip(wanted, found, strict=True)]
    unequal = [name for name, one, two in rows if (one.rows, one.hash) != (two.rows, two.hash)]
    report.table(
        "Proven equal to the backup",
        ("table", "expected", "found", "equal"),
        [(n, f"{a.rows:,} rows", f"{b.rows:,} rows", "🛑" if n in unequal else "✅") for n, a, b in rows],
    )
    report.expect(
        "rows equal to the backup",
        not unequal,
        f"the live tables were not touched; {OTHER_BACKUPS}",
        value=f"not equal: {', '.join(unequal)}" if unequal else f"{sum(one.rows for one in found):,} rows",
        expected="every row",
    )
    report.fail_if_critical()


def tell_state(report: Report, pairs: Sequence[Pair], stamp: str) -> None:
    """From here to the commit: all or nothing."""
    mark = kept_name(pairs[0].live.relation, pairs[0].live.oid, stamp)
    report.state_is(
        f"the live tables were not touched, unless there is a table {mark}: then all were replaced, proven",
        "look for that table. If it is there do not restore again: what was written since would go, and "
        "undo-restore-tables goes back. If not, launch this again",
    )


def tell_done(report: Report, env: Environment, pairs: Sequence[Pair], ties: Ties, done: Exchange) -> None:
    """What was replaced, what it cost, and what is left to do."""
    report.state_is(
        f"the rows of {', '.join(one.table for one in done.tables)} were replaced, proven; the old ones are kept",
        "do not restore again: that would lose what was written since. undo-restore-tables goes back",
    )
    report.table(
        "Rows replaced",
        ("table", "rows before", "rows now", "the old rows are in"),
        [(one.table, f"{one.before:,}", f"{one.after:,}", one.kept) for one in done.tables],
    )
    report.fact("waiting", f"writers at most {done.writers_seconds:.2f} s; readers not at all")
    if done.sequences:
        report.fact("sequences advanced", ", ".join(done.sequences))
    for one in done.dangling:
        report.warn(f"{one.key.name}, which is not validated", "correct those rows, then VALIDATE CONSTRAINT",
                    value=f"{one.rows:,} rows reference what is not there")  # fmt: skip
    if ties.materialised:
        report.warn(
            "materialised views over these tables",
            "; ".join(f"REFRESH MATERIALIZED VIEW {name}" for name in ties.materialised),
            value="they show what they showed",
        )
    failed = tidy_tables.after(done)(env.postgres, [pair.live for pair in pairs])
    report.expect(
        "vacuum and statistics of these tables",
        not failed,
        "vacuum-database with mode=plain_analyze and these tables",
        value="; ".join(failed) or "done",
        otherwise=Status.WARN,
    )
