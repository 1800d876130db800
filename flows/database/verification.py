"""The verification of a database's backup: restored, compared with its manifest, then judged by the expectations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

from blocks.environment import Environment, Stores
from blocks.services.service import DockerServices
from flows.database import expectations, restore_steps
from flows.store import mark_failed, mark_verified
from runbook.errors import OpsError, RunbookFailed, VerificationFailed
from runbook.page import render
from runbook.report import Report
from runbook.units import duration
from tasks.backups.catalogue import PREFIX, Backup
from tasks.backups.manifest import Kind
from tasks.cluster.verification_server import NewCluster, new_cluster, verification_server
from tasks.postgres.dump.compression import readable
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
    chosen = restore_steps.choose_backup(report, env, wanted, source, kind, failed_too=True)
    drop_scratch(env.postgres)  # of a killed run
    with _prepared(env, chosen, jobs) as private:
        server = read_server(env.postgres)
        restore_steps.judge_server(report, env, chosen, server)
        restore_steps.judge_login(report, env, server)
        dump = restore_steps.without_accepted(report, env, dump_in(chosen), accept)
        report.fail_if_critical()
        verify(report, env, chosen, dump, jobs, private)
    return chosen


@dataclass(frozen=True)
class PrivateServer:
    """A verification's own server, made in the background while the live one is judged.

    `unpacked`: the dump as pg_restore reads it; None: a text.
    """

    cluster: NewCluster
    unpacked: Future[Path] | None

    def filled_from(self, dump: DumpSource) -> DumpSource:
        """The dump with its unpacked form, which is waited for."""
        return replace(dump, unpacked=self.unpacked.result()) if self.unpacked else dump


@contextlib.contextmanager
def _prepared(env: Environment, backup: Backup, jobs: int) -> Iterator[PrivateServer | str]:
    """Begin to make a private server and to unpack the dump; or the reason why this host cannot run a server."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        try:
            cluster = stack.enter_context(_private_cluster(env, backup))
        except OpsError as error:
            begun: PrivateServer | str = error.message
        else:
            dump, unpacked = dump_in(backup), None
            if dump.form != "plain":
                form = readable(env.postgres, dump.path, dump.unpacking, jobs, dump.text_bytes)
                unpacked = pool.submit(stack.enter_context, form)
            begun = PrivateServer(cluster, unpacked)
        yield begun


def _private_cluster(env: Environment, backup: Backup) -> contextlib.AbstractContextManager[NewCluster]:
    if env.has("services") and isinstance(env.services, DockerServices):
        raise OpsError("the live server runs in a container, whose locales and extensions this host may lack")
    return new_cluster(env.postgres, backup, content_in(backup))


def verify(
    report: Report, env: Environment, backup: Backup, dump: DumpSource, jobs: int, private: PrivateServer | str
) -> None:
    """Restore it into a scratch database, compare, run the expectations, mark it verified.

    Data that breaks a rule is CRITICAL, but the backup then counts as neither verified nor failed: it is a true copy.

    Raises:
        VerificationFailed: it does not restore.
        RunbookFailed: the restored data differs from the manifest.
    """
    try:
        with _restored(report, env, backup, dump, jobs, private) as (place, scratch):
            analyzing = analyze.after(scratch).submit(place.postgres, scratch.database, jobs)
            # The expectations apply to the application's rows: partial backups and Prefect's database have none.
            whole = content_in(backup).part == "full" and backup.manifest.kind == "postgres"
            start = partial(expectations.start, report, place, scratch.database, after=scratch, built=True)
            checking = start(origin=expectations.origin_of(backup)) if whole else None
            proven = restore_steps.prove_database(report, place, backup, scratch)
            restore_steps.judge_statistics(report, analyzing.result())
            expectations.report_results(report, checking, "on the scratch database")
            restore_steps.try_application_login(report, place, scratch, after=proven)
        expectations.render(report, env)  # while the private server's files are deleted
        report.fail_if_critical()
    except (VerificationFailed, RunbookFailed) as error:  # other errors do not prove that the backup is bad
        mark_failed(report, backup, str(error))
        raise
    report.fact("restored in", duration(scratch.seconds))
    mark_verified(report, backup)


@contextlib.contextmanager
def _restored(
    report: Report, env: Environment, backup: Backup, dump: DumpSource, jobs: int, private: PrivateServer | str
) -> Iterator[tuple[Environment, Copy]]:
    """The scratch database, and the environment with the server that has it: a private one on this host, or the live
    one where this host cannot run one or the backup does not restore there. Only the live server's refusal counts."""
    with contextlib.ExitStack() as stack:
        why, place = private if isinstance(private, str) else "", env
        if isinstance(private, PrivateServer):
            try:
                server = verification_server(private.cluster, env.postgres, backup, content_in(backup), jobs)
                place = env.derived(
                    {"postgres": stack.enter_context(server)}, without=("standby",), reports=env.reports_directory
                )
            except OpsError as error:
                why = error.message
            else:
                try:
                    scratch = _fill(place, backup, dump, jobs, private)
                except VerificationFailed as error:
                    why = error.message
                    stack.close()
        report.fact(PLACE, f"the live server, not a private one: {why}" if why else PRIVATE)
        if why:
            restore_steps.judge_space(report, env, content_in(backup).bytes, backup=backup)
            report.fail_if_critical()
            stack.callback(drop_scratch, env.postgres)
            place, scratch = env, _fill(env, backup, dump, jobs, private)
        yield place, scratch


def _fill(env: Environment, backup: Backup, dump: DumpSource, jobs: int, private: PrivateServer | str) -> Copy:
    properties = content_in(backup).properties
    empty = create_scratch(env.postgres, properties)
    if isinstance(private, PrivateServer):
        dump = private.filled_from(dump)
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
