"""The verification of a database's backup: restored, compared with its manifest, then judged by the expectations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import islice

from blocks.environment import Environment, Stores
from blocks.postgres.server import Postgres
from blocks.services.service import DockerServices
from flows.database import expectations, restore_steps
from flows.store import mark_failed, mark_verified
from runbook.errors import OpsError, RunbookFailed, VerificationFailed
from runbook.page import render
from runbook.report import Report
from runbook.units import duration
from tasks.backups.catalogue import PREFIX, Backup
from tasks.backups.manifest import Kind
from tasks.cluster.verification_server import verification_server
from tasks.postgres.dump.fill import DumpSource
from tasks.postgres.restore.planner_statistics import analyze
from tasks.postgres.restore.staged_copy import (
    Copy,
    content_in,
    create_scratch,
    drop_scratch,
    dump_in,
    fill_scratch,
)
from tasks.postgres.server.server import read_server
from tasks.reports.past import filed

MOST_SHOWN = 20
PLACE = "restored on"
PRIVATE = "a private server on the worker's host: nothing was written to the live server"


def verify_database(
    report: Report, env: Environment, kind: Kind, wanted: str, source: Stores, jobs: int, accept: Sequence[str] = ()
) -> Backup:
    """Choose a backup of the database, judge the live server, and verify the backup.

    Raises:
        OpsError: there is no such backup.
        RunbookFailed: it is damaged, or differs from its manifest.
    """
    chosen = restore_steps.choose_backup(report, env, wanted, source, kind)
    server = read_server(env.postgres)
    restore_steps.judge_server(report, env, chosen, server)
    restore_steps.judge_login(report, env, server)
    dump = restore_steps.without_accepted(report, env, dump_in(chosen), accept)
    report.fail_if_critical()
    verify(report, env, chosen, dump, jobs)
    return chosen


def verify(report: Report, env: Environment, backup: Backup, dump: DumpSource, jobs: int) -> None:
    """Restore it into a scratch database, compare, run the expectations, mark it verified.

    Data that breaks a rule is CRITICAL, but the backup then counts as neither verified nor failed: it is a true copy.

    Raises:
        VerificationFailed: it does not restore.
        RunbookFailed: the restored data differs from the manifest.
    """
    try:
        with _restored(report, env, backup, dump, jobs) as (place, scratch):
            analyzing = analyze.after(scratch).submit(place.postgres, scratch.database, jobs)
            # The expectations apply to the application's rows: partial backups and Prefect's database have none.
            whole = content_in(backup).part == "full" and backup.manifest.kind == "postgres"
            origin = expectations.origin_of(backup)
            checking = (
                expectations.start(report, place, scratch.database, after=scratch, origin=origin) if whole else None
            )
            proven = restore_steps.prove_database(report, place, backup, scratch)
            restore_steps.judge_statistics(report, analyzing.result())
            expectations.report_results(report, checking, "on the scratch database")
            restore_steps.try_application_login(report, place, scratch, after=proven)
            expectations.render(report, env)
            report.fail_if_critical()
    except (VerificationFailed, RunbookFailed) as error:  # other errors do not prove that the backup is bad
        mark_failed(report, backup, str(error))
        raise
    report.fact("restored in", duration(scratch.seconds))
    mark_verified(report, backup)


@contextlib.contextmanager
def _restored(
    report: Report, env: Environment, backup: Backup, dump: DumpSource, jobs: int
) -> Iterator[tuple[Environment, Copy]]:
    """The scratch database, and the environment with the server that has it: a private one on this host, or the live
    one where this host cannot run one or the backup does not restore there. Only the live server's refusal counts."""
    drop_scratch(env.postgres)  # of a killed run
    with contextlib.ExitStack() as stack:
        why, place = "", env
        try:
            place = env.derived(
                {"postgres": stack.enter_context(_private(env, backup, jobs))},
                without=("standby",),
                reports=env.reports_directory,
            )
        except OpsError as error:
            why = error.message
        else:
            try:
                scratch = _fill(place, backup, dump, jobs)
            except VerificationFailed as error:
                why = error.message
                stack.close()
        report.fact(PLACE, f"the live server, not a private one: {why}" if why else PRIVATE)
        if why:
            restore_steps.judge_space(report, env, content_in(backup).bytes, backup=backup)
            report.fail_if_critical()
            stack.callback(drop_scratch, env.postgres)
            place, scratch = env, _fill(env, backup, dump, jobs)
        yield place, scratch


def _private(env: Environment, backup: Backup, jobs: int) -> contextlib.AbstractContextManager[Postgres]:
    if env.has("services") and isinstance(env.services, DockerServices):
        raise OpsError("the live server runs in a container, whose locales and extensions this host may lack")
    return verification_server(env.postgres, backup, content_in(backup), jobs)


def _fill(env: Environment, backup: Backup, dump: DumpSource, jobs: int) -> Copy:
    properties = content_in(backup).properties
    empty = create_scratch(env.postgres, properties)
    return fill_scratch(env.postgres, dump, properties, empty, jobs)


def restored_privately(report: Report) -> bool:
    """Whether the run restored on a private server, which is faster than the live one: no standby, no archive."""
    return report.facts.get(PLACE) == PRIVATE


def show_trend(report: Report, env: Environment, kind: Kind) -> None:
    """The last verifications of one kind, newest first: a restore that slows down each week will miss the RTO."""
    rows = []
    for one in islice(filed(env.reports_directory, env.name, render.key(report)), MOST_SHOWN):
        backup, took = one.facts.get("backup", ""), one.facts.get("restored in")
        if backup.startswith(f"{PREFIX[kind]}_") and took:
            rows.append((str(one.content["started"])[:16], backup, took, one.status))
    report.table("Verifications before this one", ("when", "backup", "restored in", "status"), rows)
