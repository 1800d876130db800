"""The great-expectations suites of the interview schema, run beside other work and told when it is done."""

from __future__ import annotations

from blocks.environment import Environment
from runbook.kinds import Pending
from runbook.report import Report
from tasks.integrity import Expectations, run_expectations


def start(report: Report, env: Environment, database: str, *, after: object) -> Pending[Expectations]:
    """Begin to validate a database, behind the step that made it so; Data Docs are kept under the reports."""
    evidence = env.reports_directory / "evidence" / f"{report.started:%Y%m%dT%H%M%SZ}"
    return run_expectations.after(after).submit(env.postgres, database, evidence)


def tell(report: Report, checking: Pending[Expectations], where: str, *, migrated: bool) -> None:
    """Wait, and put the result into the report. Data that is still to be migrated may lack tables and columns.

    Raises:
        RunbookFailed: an expectation does not hold.
    """
    found = checking.result()
    problems = found.failed if migrated else found.broken
    report.table(f"Expectations {where}", ("table", "expectation", "holds", "observed"), found.rows)
    report.expect(
        f"expectations {where}",
        not problems,
        "the data breaks the application's rules: look at the table of expectations, choose an earlier backup",
        value="; ".join(problems[:3]) or f"{len(found.rows)} hold",
        expected="all hold",
    )
    report.fail_if_critical()
