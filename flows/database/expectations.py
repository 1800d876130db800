"""An environment's great-expectations suites, run beside other work and reported when it is done."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from blocks.environment import Environment
from runbook.errors import OpsError, Unreachable
from runbook.kinds import Pending
from runbook.report import Report
from tasks.catalogue import Backup
from tasks.gx import process
from tasks.gx.suites import read_suites
from tasks.integrity import Checked, Expectations, Table, run_expectations, sentence, tables_in
from tasks.postgres.copy import content_in

FACT = "expectations"
NONE = "no expectations are configured ([expectations] directory)"
KNOWN = "the data is as it was backed up; this rule was already broken"
UNREAD = "fix the suites; the data was not checked against its rules"


@dataclass(frozen=True)
class Origin:
    """What restored data comes from: the moment that it is of, and the tables that it must have."""

    taken: datetime | None = None
    tables: frozenset[Table] = frozenset()


NOW = Origin()
"""Of live data."""


def origin_of(backup: Backup) -> Origin:
    """By its manifest; a base backup's does not name tables."""
    tables = tables_in(content_in(backup).tables) if backup.manifest.kind == "postgres" else ()
    return Origin(backup.manifest.taken, frozenset(tables))


def prepare(env: Environment) -> None:
    """Begin to import Great Expectations beside other work, where the environment has expectations."""
    if env.suites:
        process.start()


def plan(report: Report, env: Environment) -> None:
    """Report in a plan that there are no expectations, or that they cannot be read."""
    if not env.suites:
        report.fact(FACT, NONE)
        return
    try:
        read_suites(env.suites)
    except OpsError as error:
        report.warn("suites of expectations", error.hint, value=error.message)


def start(
    report: Report, env: Environment, database: str, *, after: object, origin: Origin = NOW
) -> Pending[Expectations] | None:
    """Begin to validate a database, behind the step that made it so; Data Docs are kept under the reports. None where
    the environment has no expectations."""
    if not env.suites:
        report.fact(FACT, NONE)
        return None
    evidence = env.reports_directory / "evidence" / f"{report.started:%Y%m%dT%H%M%SZ}"
    return run_expectations.after(after).submit(
        env.postgres, database, evidence, env.suites, contained=origin.tables, taken=origin.taken
    )


def tell(
    report: Report,
    checking: Pending[Expectations] | None,
    where: str,
    *,
    strict: bool = False,
    before: Expectations | None = None,
) -> Expectations | None:
    """Wait, and put the result into the report. `before` is the result on the same data earlier: what was broken then
    is not reported again. Without it, the data is equal to its backup: a rule that it breaks is CRITICAL and does not
    stop the run, unless `strict`. None where nothing was judged.

    Raises:
        RunbookFailed: a rule that the data kept before is broken now; with `strict`, any rule is broken.
        Unreachable: the server does not answer.
    """
    if checking is None:
        return None
    try:
        found = checking.result()
    except Unreachable:
        raise
    except OpsError as error:
        report.expect(f"expectations {where}", False, error.hint or UNREAD, value=error.message, expected="all hold",
                      stops=strict)  # fmt: skip
        report.fail_if_critical()
        return None
    report.table(f"Expectations {where}", ("table", "expectation", "holds", "observed"), found.rows)
    tell_not_applicable(report, found, where)
    old = {(row.table, row.expectation) for row in before.rows if not row.ok} if before else set()
    broken = [row for row in found.rows if not row.ok]
    new = [row for row in broken if (row.table, row.expectation) not in old]
    _judge(report, found, new, where, known=before is None, strict=strict)
    report.fail_if_critical()
    return found


def tell_not_applicable(report: Report, found: Expectations, where: str) -> None:
    """Suites and expectations whose table or column this database does not have: a fact, no fault."""
    if found.not_applicable:
        more = f" and {len(found.not_applicable) - 3} more" if len(found.not_applicable) > 3 else ""
        report.fact(f"expectations not applicable {where}", "; ".join(found.not_applicable[:3]) + more)


def _judge(report: Report, found: Expectations, new: list[Checked], where: str, *, known: bool, strict: bool) -> None:
    held = sum(row.ok for row in found.rows)
    old = len(found.rows) - held - len(new)
    value = f"{held} hold" + f", {old} broken as before" * bool(old)
    if new:
        value = "; ".join(map(sentence, new[:3])) + f" (and {len(new) - 3} more)" * (len(new) > 3)
    if not known:
        hint = (
            "the backup's data keeps this rule: a migration or a client broke it since. Check the table of "
            "expectations, correct the migration, or restore an earlier backup"
        )
    elif strict:
        hint = f"{KNOWN}: restore an earlier backup, or run this again with strict=false to go live with it"
    else:
        hint = f"{KNOWN}. Correct the rows or the rule (docs/expectations.md); an earlier backup may keep it"
    report.expect(f"expectations {where}", not new, hint, value=value, expected="all hold",
                  stops=strict or not known)  # fmt: skip
