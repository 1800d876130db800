"""Judgements of the live tables whose rows a restore replaces, called with the open report."""

from __future__ import annotations

from collections.abc import Sequence

from blocks.environment import Environment
from runbook.report import Report
from tasks.backups.catalogue import Backup
from tasks.postgres.dump.accepted import restore_without
from tasks.postgres.dump.generated import COLUMN
from tasks.postgres.restore.staged_copy import content_in
from tasks.postgres.tables.pairs import TablePair, find_live, unequal_columns
from tasks.postgres.tables.ties import Ties, read_ties


def judge_live(report: Report, env: Environment, tables: Sequence[str]) -> None:
    """Judge the live tables as restore-tables does, before a copy is built for it."""
    judge_ties(report, read_ties(env.postgres, find_live(env.postgres, tables)))


def judge_definitions(report: Report, pairs: Sequence[TablePair], ties: Ties, backup: Backup) -> None:
    """Whether the backup's rows fit the live tables, and whether every constraint would be checked."""
    judge_columns(report, pairs)
    judge_ties(report, ties)
    texts = content_in(backup).definitions
    newer = [
        name
        for name, definition in ties.deferrable
        if not any(f" {name} (owner " in key.replace(".", " ") and definition in text for key, text in texts.items())
    ]
    report.require(
        "deferrable constraints",
        not newer,
        "make them NOT DEFERRABLE for the restore, or run restore-database: this run could not check them",
        value=f"newer than the backup: {', '.join(newer)}" if newer else f"{len(ties.deferrable)}, all in the backup",
    )


def judge_generated(report: Report, pairs: Sequence[TablePair], backup: Backup, accepted: Sequence[str]) -> None:
    """The live table computes its generated columns: values that it would compute otherwise are accepted by name."""
    chosen = {(pair.live.schema, pair.live.relation) for pair in pairs}
    found = [one for one in content_in(backup).uncomputable if (one.schema_name, one.table) in chosen]
    refused = [one for one in found if f"{COLUMN} {one.name}" not in accepted]
    report.require(
        "generated columns",
        not refused,
        restore_without(accepted, [f"{COLUMN} {one.name}" for one in refused])
        + "the live table then computes them anew; restore-database into=… has the values of the backup",
        value="; ".join(f"{one.name}: {one.why}" for one in refused[:5]) or f"{len(found)} accepted as computed anew",
        expected="values that the live table computes again",
    )


def judge_columns(report: Report, pairs: Sequence[TablePair], *, kept: bool = False) -> None:
    """Whether the live tables have the columns of the rows to restore."""
    for pair in pairs:
        unequal = unequal_columns(pair.wanted, pair.live, kept=kept)
        report.require(
            f"columns of {pair.live.name}",
            not unequal,
            "restore to another database (restore-database with into=…) and copy the rows that you need by hand",
            value="; ".join(unequal[:5]) or f"{len(pair.live.columns)} as in the backup",
            expected="names and types of the backup",
        )


def judge_ties(report: Report, ties: Ties) -> None:
    """Rules, keys and subscriptions that act on the rows: refusals, and facts for the operator."""
    report.require(
        "rules and keys that act on the rows",
        not ties.refusals,
        "follow the instruction in each, then run this again",
        value="; ".join(ties.refusals[:5]) or "none that would act during the restore",
    )
    report.fact("foreign keys checked before the commit", ", ".join(key.name for key in ties.keys) or "none")
    if ties.triggers:
        report.fact("triggers that do not fire", ", ".join(ties.triggers))
    if ties.publications:
        names = ", ".join(ties.publications)
        report.fact("publications", f"{names} publish these tables: subscribers receive the restored rows")
    if ties.subscriptions:
        report.warn(
            "subscriptions",
            "copy the rows that this restore undoes by hand: ALTER SUBSCRIPTION … REFRESH PUBLICATION sends none again",
            value=f"{', '.join(ties.subscriptions)} fill these tables",
        )
