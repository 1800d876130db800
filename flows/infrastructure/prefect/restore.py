"""The lines of a restore of Prefect's own database: a staged copy is built, proven and settled, then swapped in while
Prefect's services are stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from blocks.environment import Environment
from blocks.postgres.server import Connection
from flows.database import restore_steps
from flows.database.gate import DatabaseGate
from flows.database.staged_restore import (
    RestorableDatabase,
    plan_analysis,
    plan_creation,
    plan_filling,
    plan_swap,
)
from flows.database.waiting_commits import let_commits_return, plan_commits
from flows.infrastructure.prefect.recovery import refuse_holders
from flows.restart import start_again
from runbook.change import Carrier, Change, Check, Line, State
from runbook.errors import OpsError
from runbook.report import Report
from tasks.backups.catalogue import Backup
from tasks.host.services import start_services, stop_services
from tasks.postgres.content.content import DatabaseContent
from tasks.postgres.replication.synchronous import Synchrony
from tasks.postgres.restore.staged_copy import Copy, content_in, dump_in
from tasks.postgres.restore.swap import Swapped, SwapUnknown, advisory_lock
from tasks.postgres.server.roles import create_roles
from tasks.postgres.server.server import Identity, Server
from tasks.prefect.server import Settled, answers, end_lost_runs, missing_in, read_api, settle_copy, wait_for_api

UNCHANGED = State("Prefect's database is unchanged", "fix the findings above, then run this again")


@dataclass(frozen=True)
class PrefectRestore:
    """The lines of a restore. `own`: the environment with Prefect's database as its own. `jobs`: of pg_restore and
    vacuumdb."""

    report: Report
    own: Environment
    gate: DatabaseGate
    jobs: int
    commits: Sequence[Change[[], Synchrony]]
    roles: Sequence[Change[[], None]]
    creation: Change[[], Copy]
    filling: Change[[Copy, int], Copy]
    proof: Check[[Copy], DatabaseContent]
    settling: Change[[Copy], Settled]
    analysis: Change[[Copy, object], str]
    stop: Change[[], None]
    swap: Change[[Connection, Copy], Swapped]
    start: Change[[object], Sequence[str]]
    check: Check[[Mapping[str, int], Sequence[str]], None]

    @classmethod
    def plan(
        cls,
        report: Report,
        env: Environment,
        own: Environment,
        chosen: Backup,
        jobs: int,
        server: Server,
        live: Identity,
        stopped: StoppedPrefect,
        gate: DatabaseGate,
    ) -> PrefectRestore:
        """Plan the restore of a backup. `server`, `live`: the database server, and Prefect's database there."""
        content = content_in(chosen)
        source = RestorableDatabase(chosen.name, dump_in(chosen), content.properties, content.bytes, chosen)
        return cls(
            *(report, own, gate, jobs),
            plan_commits(report, own, UNCHANGED),
            _plan_roles(report, own, chosen, server),
            plan_creation(report, own, source, "", UNCHANGED),
            plan_filling(own, source, ""),
            _plan_proof(report, own, chosen),
            Change(
                settle_copy.bind(env.prefect_server),
                "settle the copy",
                "remove overdue scheduled runs, free the slots of locks",
                seconds=0.1,
            ),
            plan_analysis(report, own, jobs, ""),
            _plan_stop(stopped),
            stopped.guarding(plan_swap(report, own, source, live, gate, partial(_swapped, chosen))),
            _plan_start(env),
            Check(partial(_check, report, env), "check", "deployments, automations, every block in clear"),
        )

    @property
    def lines(self) -> Sequence[Line[..., Any]]:
        """Return them in order."""
        build: Sequence[Line[..., Any]] = [self.creation, self.filling, self.proof, self.settling, self.analysis]
        return [*self.commits, *self.roles, *build, *self._outage]

    @property
    def _outage(self) -> Sequence[Line[..., Any]]:
        return [self.stop, self.swap, self.start, self.check]

    @property
    def down(self) -> float:
        """Return the estimate of the seconds for which Prefect is stopped."""
        return sum(line.seconds for line in self._outage)

    def carry_out(self, carry: Carrier) -> None:
        """Build the copy, prove and settle it, swap it in, and start Prefect.

        Raises:
            RunbookFailed: the copy differs from the backup. Nothing live was changed.
            LossExceeded: more would be lost than was confirmed. Nothing was replaced.
            OpsError: a run holds a lock. Nothing was replaced.
        """
        for one in self.commits:
            let_commits_return(self.report, self.own, carry, one)
        for making in self.roles:
            carry(making)
        with advisory_lock(self.own.postgres) as guard:
            copy = carry(self.filling, carry(self.creation), self.jobs)
            proven = carry(self.proof, copy)
            settled = carry(self.settling, copy)
            carry(self.analysis, copy, settled)
            self.gate.look_ahead()  # before Prefect stops: most of the WAL is read then
            carry(self.stop)
            swapped = carry(self.swap, guard, copy)
        removed = f"{settled.overdue} overdue scheduled runs removed, {settled.slots} slots freed"
        self.report.fact("old database", f"kept as {swapped.kept}" if swapped.kept else "none")
        self.report.fact("changed in the copy", removed)
        lost = carry(self.start, swapped)
        carry(self.check, {table: one.rows for table, one in proven.tables.items()}, lost)


@dataclass
class StoppedPrefect:
    """Prefect's services during the swap. `has_database`: there is a live one, in which runs can hold a lock; `wanted`:
    the services that ran before. `is_swapping`: the swap has begun, and has not failed; `is_unknown`: whether the
    database was replaced."""

    report: Report
    env: Environment
    has_database: bool
    wanted: Sequence[str]
    is_swapping: bool = False
    is_unknown: bool = False

    def stop(self) -> None:
        """Stop the services, each proven stopped.

        Raises:
            OpsError: a run holds a lock.
        """
        server = self.env.prefect_server
        was_answering = self.has_database and answers(server)
        if was_answering:
            refuse_holders(self.env)
        stop_services(server.manager(self.env.services), list(reversed(server.roles)))
        if was_answering:  # from here on no run can acquire one
            refuse_holders(self.env)

    def guarding(self, planned: Change[[Connection, Copy], Swapped]) -> Change[[Connection, Copy], Swapped]:
        """Return the swap, after which the services are not started again as they were."""

        def swap(guard: Connection, copy: Copy) -> Swapped:
            self.is_swapping = True
            return planned.work(guard, copy)

        return replace(planned, work=swap, failed=self.has_failed, is_final=True)

    def has_failed(self, error: OpsError) -> None:
        """Note that the swap failed, and whether its result is known."""
        self.is_swapping, self.is_unknown = False, isinstance(error, SwapUnknown)

    def start_again(self) -> None:
        """Start the services that ran before. If it is unknown whether the database was replaced, they stay stopped."""
        if self.is_unknown:
            return
        server = self.env.prefect_server
        again = start_again(
            self.report,
            server.manager(self.env.services),
            [role for role in server.roles if role in self.wanted],
        )
        if self.is_swapping:  # cancelled: the server commits the transaction, or rolls it back
            self.report.state_is(
                "the swap was interrupted: Prefect's restored database is live, or nothing was changed",
                f"list the databases: the swap was made if {server.database}__old_… is from this run. Otherwise run "
                "this again",
            )
        elif again:
            self.report.state_is("Prefect's database was not replaced; its services run again", "run this again")
        else:
            what = "Prefect's database was not replaced; its services do not all run again"
            self.report.state_is(what, "start them by hand, then run this again")


def _plan_roles(report: Report, own: Environment, chosen: Backup, server: Server) -> Sequence[Change[[], None]]:
    """Plan to create the backup's roles and tablespaces on a new cluster; nothing on an existing one."""
    if not server.is_bare:
        return []
    action = create_roles.bind(own.postgres, chosen, server.roles)

    def make() -> None:
        if made := action().names:
            report.fact("roles created from the backup", ", ".join(made))

    missing = [role for role in content_in(chosen).roles if role not in server.roles]
    detail = ", ".join(missing) or "none is missing; tablespaces, if any is missing"
    return [Change(make, "create roles", detail, by=[action], begun=UNCHANGED)]


def _plan_proof(report: Report, own: Environment, chosen: Backup) -> Check[[Copy], DatabaseContent]:
    planned = restore_steps.proof_step(chosen)
    prove: Callable[[Copy], DatabaseContent] = partial(restore_steps.prove_database, report, own, chosen)
    return Check(prove, planned.step, planned.detail, seconds=planned.seconds)


def _plan_stop(stopped: StoppedPrefect) -> Change[[], None]:
    roles = ", ".join(reversed(stopped.env.prefect_server.roles))
    return Change(stopped.stop, "stop Prefect", roles, seconds=5, reverse=stopped.start_again)


def _swapped(chosen: Backup, swapped: Swapped) -> State:
    return State(
        f"{chosen.name} is live, proven; the database it replaced is kept as {swapped.kept or 'nothing'}",
        "do not restore again: start Prefect's services by hand and check their logs",
    )


def _plan_start(env: Environment) -> Change[[object], Sequence[str]]:
    """Plan to start the API, then the background services. The runs that are not running any more are marked in
    between."""
    server = env.prefect_server
    manager = server.manager(env.services)

    def start(swapped: object) -> Sequence[str]:
        started = start_services.after(swapped)(manager, server.roles[:1])
        ready = wait_for_api.after(started)(server)
        lost = end_lost_runs.after(ready)(server)
        if server.roles[1:]:
            start_services.after(lost)(manager, server.roles[1:])
        return lost

    detail = f"{', '.join(server.roles)}; wait for {server.api_url}; mark runs that ended since as cancelled"
    return Change(start, "start Prefect", detail, seconds=15)


def _check(report: Report, env: Environment, rows: Mapping[str, int], lost: Sequence[str]) -> None:
    """Judge whether everything is restored. `rows` of each table; `lost`: the runs that were marked."""
    answer = read_api(env.prefect_server)
    missing = missing_in(rows, answer)
    report.require(
        "content of the API",
        not missing,
        "check its log",
        value="; ".join(missing) or "everything",
        expected="every deployment and automation of the backup",
    )
    report.passed("secrets", value=f"{answer.blocks} blocks read in clear")
    report.fact("Prefect", f"{answer.version}; {', '.join(f'{n} {what}' for what, n in answer.counts.items())}")
    if lost:
        report.table(
            "Runs that ended after the backup (marked cancelled; their reports have the results)",
            ("run",),
            [(name,) for name in lost],
        )
