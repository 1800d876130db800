"""An environment's Great Expectations suites, run in the background and reported when the work is done."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from blocks.environment import Environment
from blocks.postgres.server import Postgres
from runbook.errors import OTHER_BACKUPS, OpsError, Unreachable
from runbook.kinds import Pending
from runbook.report import Report
from runbook.units import first_of
from tasks.backups.catalogue import Backup
from tasks.gx import process
from tasks.gx.suites import read_suites
from tasks.integrity import CheckedFiles, Expectations, Table, render_docs, run_expectations, sentence, tables_in
from tasks.postgres.content.changes import TableStates
from tasks.postgres.restore.staged_copy import content_in

FACT = "expectations"
NONE = "no expectations are configured ([expectations] directory)"
KNOWN = f"correct the rows or the rule (docs/expectations.md): the backup already had this data; {OTHER_BACKUPS}"
YOUNGER = "check the values that the migration wrote: the backup is older than this rule's table or column"
CHANGED = (
    "check the table of expectations, correct the migration, then run this again. The backup's data keeps this "
    "rule: a migration or a client has broken it since"
)
UNREAD = "fix the suites: the data was not checked against its rules"


@dataclass(frozen=True)
class ExpectationsOrigin:
    """The origin of restored data: its snapshot's time, and the tables that it must have."""

    taken: datetime | None = None
    tables: frozenset[Table] = frozenset()


NOW = ExpectationsOrigin()
"""Of live data."""


def origin_of(backup: Backup) -> ExpectationsOrigin:
    """The origin by a backup's manifest; a base backup names no tables."""
    tables = tables_in(content_in(backup).tables) if backup.manifest.kind == "postgres" else ()
    return ExpectationsOrigin(backup.manifest.taken, frozenset(tables))


def prepare(env: Environment, *, routine: bool = False) -> None:
    """Start importing Great Expectations in the background, if the environment has expectations. A recovery waits for
    them; a `routine` check has low priority."""
    if env.suites:
        process.start(routine=routine)


def plan(report: Report, env: Environment) -> None:
    """Report in a plan that there are no expectations, or that their files are unreadable."""
    if not env.suites:
        report.fact(FACT, NONE)
        return
    try:
        read_suites(env.suites)
    except OpsError as error:
        report.warn("suites of expectations", error.hint, value=error.message)


def start(
    report: Report,
    env: Environment,
    database: str,
    *,
    after: object,
    origin: ExpectationsOrigin = NOW,
    since: TableStates | None = None,
    on: Postgres | None = None,
    built: bool = False,
) -> Pending[Expectations] | None:
    """Start validating a database after the step `after`. `since`: the tables' states when all rules were judged last;
    `on`: a private instance that has it; `built`: this run filled it, so its constraints are proof. `render` keeps Data
    Docs with the reports, when nobody waits any more.

    None if the environment has no expectations.
    """
    if not env.suites:
        report.fact(FACT, NONE)
        return None
    return run_expectations.after(after).submit(
        on or env.postgres,
        database,
        _evidence(report, env),
        env.suites,
        contained=origin.tables,
        taken=origin.taken,
        since=since,
        built=built,
        render=False,
    )


def render(report: Report, env: Environment, *, after: object = None) -> None:
    """Render the Data Docs of this run, after the step `after`. They are evidence that nobody waits for: without them
    the results stand."""
    pages = []
    for directory in sorted(_evidence(report, env).glob("expectations-*")):
        if not (page := directory / "index.html").exists():
            try:
                render_docs.after(after)(directory)
            except OpsError as error:
                report.warn("Data Docs", error.hint, value=error.message)
        if page.exists():
            pages.append(str(page))
    if pages:
        report.fact("Data Docs", ", ".join(pages))


def _evidence(report: Report, env: Environment) -> Path:
    return env.reports_directory / "evidence" / f"{report.started:%Y%m%dT%H%M%SZ}"


def report_results(
    report: Report,
    checking: Pending[Expectations] | None,
    where: str,
    *,
    strict: bool = False,
    before: Expectations | None = None,
) -> Expectations | None:
    """Wait for the result and report it; None if nothing was judged.

    `before`: an earlier result on the same data. A rule broken then is not reported again; a rule kept then and broken
    now ends the run. Any other broken rule is CRITICAL and ends the run only if `strict`: the data equals its backup.

    Raises:
        RunbookFailed: a rule kept before is broken now; with `strict`, any rule is broken.
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
    show_not_applicable(report, found, where)
    earlier = {(row.table, row.expectation): row.ok for row in before.rows} if before else {}
    broken = [row for row in found.rows if not row.ok and earlier.get(_rule(row), True)]
    changed = any(earlier.get(_rule(row)) for row in broken)
    hint = CHANGED if changed else KNOWN if before is None else YOUNGER
    report.require(name, not broken, hint, value=_value(found, broken), expected="all hold", stops=strict or changed)
    report.fail_if_critical()
    return found


def _rule(row: CheckedFiles) -> tuple[str, str]:
    return row.table, row.expectation


def _value(found: Expectations, broken: list[CheckedFiles]) -> str:
    if not found.rows and found.unchanged:
        return "no table has changed since they were judged"
    if broken:
        return "; ".join(map(sentence, broken[:3])) + f" (and {len(broken) - 3} more)" * (len(broken) > 3)
    old, kept = len(found.failed), len(found.unchanged)
    text = f"{len(found.rows) - old} hold" + f", {old} broken as before" * bool(old)
    return text + f"; nothing that {kept} other suites read has changed since they were judged" * bool(kept)


def show_not_applicable(report: Report, found: Expectations, where: str) -> None:
    """List suites and expectations whose table or column this database lacks."""
    if found.not_applicable:
        report.fact(f"expectations not applicable {where}", first_of(found.not_applicable, between="; "))
