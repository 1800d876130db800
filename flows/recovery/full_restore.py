"""The main job (§8.2): restore the whole system from backups, and prove it before it goes live.

It also runs without a Prefect server, which may have died with the rest:

    python -m flows.recovery.full_restore --environment production --confirm production
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Annotated, Literal, get_args

from pydantic import Field

from blocks.environment import Environment, Stores
from flows.application.files_gate import FilesSource
from flows.database import expectations
from flows.database.superseded import discard_surplus
from flows.launch import add_confirmation, launch
from flows.recovery.full import choose
from flows.recovery.full.dump import DumpRestore
from flows.recovery.full.method import ClusterParameters, ClusterPlan, Method, acts, decide, find_options
from flows.recovery.full.without_database import restore as restore_others
from flows.recovery.objectives import board
from flows.recovery.options import ASKED
from flows.redis.restore.sources import RedisSource
from runbook.change import carrying_out
from runbook.drivers import exit_code
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.backups.catalogue import LATEST
from tasks.postgres.restore.staged_copy import check_jobs

WhenToStop = Literal["first", "at_swap"]


@flow(name="full-restore", flow_run_name=RunName("full-restore {environment} {backup}"))
def full_restore(
    environment: str,
    backup: str = "latest",
    source: Stores = "backups",
    method: Method = "auto",
    stop_services: WhenToStop = "first",
    jobs: Annotated[int, Field(ge=0, le=32)] = 0,
    advance: bool = False,
    without: tuple[choose.Part, ...] = (),
    redis_source: RedisSource = "auto",
    files_source: FilesSource = "auto",
    strict: bool = False,
    accept: list[str] = [],  # noqa: B006 (Prefect's form wants a value; nobody changes it)
    databases: list[str] = [],  # noqa: B006 (likewise)
    before: str = "",
    timeline: Annotated[int, Field(ge=0, le=1_000_000)] = 0,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """完全システムリストア (§8.2)

    Restores the whole system from backups: database, Redis and application files. Run it after a disaster, or when data
    is corrupt in more than one place. It works with the database or Redis down, and with their data missing. Parts that
    the environment does not have are skipped.

    The database is restored with the least loss (method=auto): from the newest base backup and all WAL after it, from
    the archive and the WAL receiver; or from the newest dump. The plan lists the options. If one fails its proof, the
    report says why, and the run takes the next. If a statement in the WAL dropped the database or emptied a table, the
    recovery stops just before it, and the plan names the transaction and what is given up after it. If the cluster has
    other databases, only the application's is taken out of the recovered cluster. `databases` names those that may be
    set back with it.

    Three phases. Build: it restores staged copies of all three, compares them with their manifests, checks the
    expectations and migrates. Nothing live is touched; a copy that fails its proof ends the run. Swap: it replaces all
    three by rename, and keeps the replaced data (its report names the undo; discard-superseded deletes it). Start: it
    starts the services in order, then runs the health check, the expectations and the smoke checks of [application].

    The plan judges everything that the confirmed run needs: privileges, locale, extensions, log-ins, service names, the
    migrations' scripts. What would fail later fails in the plan.

    An expectation that the backup already broke is CRITICAL in the report, but the data still goes live. With `strict`
    the run ends before the swap.

    A Redis master that serves all of its data is kept as it serves: it is neither stopped nor restored. If it is dead,
    its own files, a replica or the backup restores it, by the least known loss (the plan lists them). If nothing shows
    that a surviving copy has less than that source, the plan ends and names the copy: `redis_source` decides. A copy
    from which a command deleted most keys, and a master that restarted without its data, are taken only if
    `redis_source` names them. `redis_source=backup` sets Redis back to its backup. A Redis that serves and that nothing
    restores is not stopped. Clients find the restored master at once; a replica that does not follow is named
    (reattach-redis).

    Live files are kept too, unless one was altered without being written, a directory has lost all its files, or more
    than `backup.shrunk_ratio` of the backup's paths are missing. `files_source=backup` sets them back to their backup.

    An unreachable store ends the run: it may hold backups. If Redis or the files have neither a backup nor live data,
    `without` must name them, and they start empty.

    If it is killed, run it again. Evidence: what was proven, seconds per step, RTO and RPO, the lost writes.

    Departs from the manual: nothing is dropped; the database is verified before it is migrated and before it is live.

    Args:
        environment: Environment (lab, staging, production …)
        backup: latest, a date (YYYYMMDD) or the name of a database backup; without a database, of a Redis or files
            backup
        source: Store. copies: the replica store
        method: auto: the option with the least loss; cluster: base backup and WAL; dump: from a dump
        stop_services: first: stop them at the beginning (as in the manual); at_swap: at the swap (shortest downtime)
        jobs: Parallel jobs. 0: number of CPUs
        advance: Advance sequences to the numbers that the old database already used
        without: Parts to leave out. A part with neither backup nor live data starts empty only if it is named here
        redis_source: Source of Redis: auto: the one with the least loss; live: keep the running master; files: its
            files
        files_source: Source of the files: auto: the live ones if they are intact; backup: their backup; live: the live
            ones in any case
        strict: Stop before the swap if the backup already violated expectations when it was taken
        accept: Objects to leave unrestored (a refused restore's report names them). Empty: restore everything
        databases: Other databases of the same cluster that may go back too. Empty: restore only the application's
            database
        before: Restore to just before this transaction or LSN (none: to the end of the WAL). Empty: decided
            automatically
        timeline: Timeline to follow. 0: the one in use
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    expectations.prepare(env)
    with (
        board.rebuilt(env),
        runbook("Full restore", env, confirm, plan, changes=True, without_confirm="stages", rank="recovery") as report,
    ):
        workers = check_jobs(jobs)
        if stop_services not in ("first", "at_swap"):
            raise OpsError(f"stop_services is “{stop_services}”", "choose first or at_swap")
        if unknown := set(without) - set(get_args(choose.Part)):
            raise OpsError(f"without is {', '.join(sorted(unknown))}", "choose redis, files or both")
        if not env.has("postgres"):
            if method != "auto" or before or databases or accept:
                raise OpsError(f"{env.name} has no database", "leave out method, before, databases and accept")
            restore_others(report, env, backup, source, without, redis_source, files_source, stop_services)
            discard_surplus(report, env)
            return report
        latest = report.pin_question(ASKED, backup) == LATEST
        given = ClusterParameters(
            *(method, backup, latest, source, without, stop_services, strict, databases, before, redis_source),
            *(files_source, workers, advance, accept, timeline),
        )
        options = find_options(report, env, given)
        if options and (restore := decide(report, env, given, options)):
            planned = ClusterPlan.plan(report, env, restore, given)
            following, pins = acts(env, restore.chosen), [planned.pin]
            with carrying_out(report, *planned.lines, effect=planned.effect, pins=pins, may_follow=following) as carry:
                if not planned.carry_out(carry):
                    dump = _plan_dump(report, env, replace(given, backup=LATEST))
                    carry.instead(*dump.lines, why="no base backup passes its proof")
                    dump.carry_out(carry)
        else:
            dump = _plan_dump(report, env, given)
            up = dump.found.presence == "up"
            pins = [lambda report: choose.pin(report, env, dump.chosen, up=up)]
            with carrying_out(report, *dump.lines, effect=dump.effect, pins=pins) as carry:
                dump.carry_out(carry)
        discard_surplus(report, env)
    return report


def _plan_dump(report: Report, env: Environment, given: ClusterParameters) -> DumpRestore:
    chosen = choose.choose(
        *(report, env, given.backup, given.source, given.without, given.accept, given.redis_source, given.files_source),
        latest=given.latest,
        strict=given.strict,
    )
    return DumpRestore.plan(
        *(report, env, chosen),
        jobs=given.jobs,
        stop_services=given.stop_services,
        advance=given.advance,
        strict=given.strict,
    )


def main() -> int:
    """The command line: it runs through Prefect if that answers, otherwise without it."""
    parser = argparse.ArgumentParser(prog="python -m flows.recovery.full_restore", description="full restore (§8.2)")
    parser.add_argument("--environment", required=True, help="its TOML is in deployments/environments")
    parser.add_argument("--backup", default="latest", help="latest, YYYYMMDD, or a backup's name")
    parser.add_argument("--source", choices=["backups", "copies"], default="backups", help="which stores to read")
    parser.add_argument("--method", choices=get_args(Method), default="auto", help="auto: whatever loses least")
    parser.add_argument("--stop-services", choices=["first", "at_swap"], default="first")
    parser.add_argument("--jobs", type=int, default=0, help="workers; 0 is one per core")
    parser.add_argument("--advance", action="store_true", help="advance sequences past the replaced database's")
    parser.add_argument("--without", nargs="*", default=[], choices=get_args(choose.Part), help="parts not to restore")
    parser.add_argument("--redis-source", default="auto", choices=get_args(RedisSource), help="where Redis's data is")
    parser.add_argument("--files-source", default="auto", choices=get_args(FilesSource), help="which files")
    parser.add_argument("--strict", action="store_true", help="refuse data that broke an expectation at its backup")
    parser.add_argument("--accept", nargs="*", default=[], help="objects to skip, as listed by a refused restore")
    parser.add_argument("--databases", nargs="*", default=[], help="other databases that may be set back too")
    parser.add_argument("--before", default="", help="a transaction ID to stop before, or none: the end of the WAL")
    parser.add_argument("--timeline", type=int, default=0, help="the timeline to follow; 0 is the one in use")
    add_confirmation(parser)
    return launch(full_restore, vars(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(exit_code(main))
