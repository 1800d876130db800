"""An environment's great-expectations suites, run beside other work and reported when it is done."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from blocks.environment import Environment
from runbook.errors import OTHER_BACKUPS, OpsError, Unreachable
from runbook.kinds import Pending
from runbook.report import Report
from tasks.backups.catalogue import Backup
from tasks.gx import process
from tasks.gx.suites import read_suites
from tasks.integrity import Checked, Expectations, Table, run_expectations, sentence, tables_in
from tasks.postgres.restore.staged_copy import content_in

FACT = "expectations"
NONE = "no expectations are configured ([expectations] directory)"
KNOWN = "the data is as it was backed up; this rule was already broken"
AND_NOW = f". Correct the rows or the rule (docs/expectations.md); {OTHER_BACKUPS}"
YOUNGER = "the backup is older than this rule's table or column: check what the migration filled it with"
CHANGED = (
    "the backup's data keeps this rule: a migration or a client broke it since. Check the table of expectations, "
    "correct the migration, then launch this again"
)
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


def report_results(
    report: Report,
    checking: Pending[Expectations] | None,
    where: str,
    *,
    strict: bool = False,
    before: Expectations | None = None,
) -> Expectations | None:
    """Wait, and put the result into the report. `before` is the result on the same data earlier: what was broken then
    is not reported again, what held then and is broken now ends the run. Any other broken rule is CRITICAL and ends it
    only if `strict`: the data is equal to its backup, or is older than the rule. None where nothing was judged.

    Raises:
        RunbookFailed: a rule that the data kept before is broken now; with `strict`, any rule is broken.
        Unreachable: the server does not answer.
    """
    if checking is None:
        return None
    name = f"expectations {where}"
    try:
        found = checking.result()
    except Unreachable:
        raise
    except OpsError as error:
        report.fail(name, error.hint or UNREAD, value=error.message, expected="all hold", stops=strict)
        report.fail_if_critical()
        return None
    report.table(f"Expectations {where}", ("table", "expectation", "holds", "observed"), found.rows)
    tell_not_applicable(report, found, where)
    earlier = {(row.table, row.expectation): row.ok for row in before.rows} if before else {}
    broken = [row for row in found.rows if not row.ok and earlier.get(_rule(row), True)]
    changed = any(earlier.get(_rule(row)) for row in broken)
    hint = CHANGED if changed else KNOWN + AND_NOW if before is None else YOUNGER
    report.require(name, not broken, hint, value=_value(found, broken), expected="all hold", stops=strict or changed)
    report.fail_if_critical()
    return found


def _rule(row: Checked) -> tuple[str, str]:
    return row.table, row.expectation


def _value(found: Expectations, broken: list[Checked]) -> str:
    if broken:
        return "; ".join(map(sentence, broken[:3])) + f" (and {len(broken) - 3} more)" * (len(broken) > 3)
    old = len(found.failed)
    return f"{len(found.rows) - old} hold" + f", {old} broken as before" * bool(old)


def tell_not_applicable(report: Report, found: Expectations, where: str) -> None:
    """Suites and expectations whose table or column this database does not have: a fact, no fault."""
    if found.not_applicable:
        more = f" and {len(found.not_applicable) - 3} more" if len(found.not_applicable) > 3 else ""
        report.fact(f"expectations not applicable {where}", "; ".join(found.not_applicable[:3]) + more)
