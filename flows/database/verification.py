"""What verifying a backup consists of, called with the open report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from blocks.environment import Environment, Stores
from flows.database import expectations, steps
from flows.store import mark_failed, mark_verified
from runbook import render
from runbook.errors import RunbookFailed, VerificationFailed
from runbook.render import duration
from runbook.report import Report
from tasks.catalogue import PREFIX, Backup
from tasks.manifest import Kind
from tasks.postgres.copy import content_in, create_scratch, drop_scratch, dump_in, fill_scratch
from tasks.postgres.fill import Source
from tasks.postgres.planner_statistics import analyze
from tasks.postgres.server import read_server
from tasks.reports import filed

MOST_SHOWN = 20


def verify_database(
    report: Report, env: Environment, kind: Kind, wanted: str, source: Stores, jobs: int, accept: Sequence[str] = ()
) -> Backup:
    """Choose a backup of the database, judge whether there is room and a server for it, and verify it.

    Raises:
        OpsError: there is none.
        RunbookFailed: it is damaged, or is not what the manifest says.
    """
    chosen = steps.choose_backup(report, env, wanted, source, kind)
    steps.judge_server(report, env, chosen, read_server(env.postgres))
    steps.judge_space(report, env, content_in(chosen).bytes)
    dump = steps.without_accepted(report, env, dump_in(chosen), accept)
    report.fail_if_critical()
    verify(report, env, chosen, dump, jobs)
    return chosen


def verify(report: Report, env: Environment, backup: Backup, dump: Source, jobs: int) -> None:
    """Restore it into a scratch database, compare, run the expectations, drop the scratch, note that it is verified.
    Data that breaks a rule is CRITICAL; the backup counts as neither verified nor failed: it has what the database had.

    Raises:
        VerificationFailed: it does not restore.
        RunbookFailed: what was restored is not what the manifest says.
    """
    try:
        content = content_in(backup)
        empty = create_scratch(env.postgres, content.properties)
        scratch = fill_scratch(env.postgres, dump, content.properties, empty, jobs)
        analyzing = analyze.after(scratch).submit(env.postgres, scratch.database, jobs)
        # The rules are about the application's rows: other backups, and Prefect's own database, do not have them.
        whole = content.part == "full" and backup.manifest.kind == "postgres"
        origin = expectations.origin_of(backup)
        checking = expectations.start(report, env, scratch.database, after=scratch, origin=origin) if whole else None
        proven = steps.prove_database(report, env, backup, scratch)
        steps.tell_statistics(report, analyzing.result())
        expectations.tell(report, checking, "on the scratch database")
        steps.try_application_login(report, env, scratch, after=proven)
        report.fail_if_critical()
    except (VerificationFailed, RunbookFailed) as error:  # another says nothing of the backup
        mark_failed(report, backup, str(error))
        raise
    finally:
        drop_scratch(env.postgres)
    report.fact("restored in", duration(scratch.seconds))
    mark_verified(report, backup)


def tell_trend(report: Report, env: Environment, kind: Kind) -> None:
    """The last verifications of one kind in this environment, newest first: a restore that takes longer each week
    misses the RTO one day."""
    rows = []
    for one in islice(filed(env.reports_directory, env.name, render.key(report)), MOST_SHOWN):
        backup, took = one.facts.get("backup", ""), one.facts.get("restored in")
        if backup.startswith(f"{PREFIX[kind]}_") and took:
            rows.append((str(one.content["started"])[:16], backup, took, one.status))
    report.table("Verifications before this one", ("when", "backup", "restored in", "status"), rows)
