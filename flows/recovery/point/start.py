"""The start of a cluster that was swapped in: the server with its WAL receiver and archiver, then the application."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from blocks.environment import Environment
from flows.application.health_checks import report_health, report_smoke
from flows.database.waiting_commits import let_commits_return, plan_override
from flows.recovery.stopped_services import ClusterServices
from runbook.change import Carrier, Change, Line
from runbook.errors import Unreachable
from runbook.report import Report
from runbook.units import duration
from runbook.wait import until
from tasks.application.health import answers, smoke_check, wait_healthy
from tasks.cluster.swap import ensure_wal_directory
from tasks.host.services import start_services
from tasks.postgres.replication.synchronous import Synchrony
from tasks.postgres.restore.planner_statistics import PlannerStatistics, analyze

START_SECONDS, ATTACH_SECONDS, HEALTH_SECONDS = 300.0, 30.0, 120


@dataclass(frozen=True)
class ClusterStart:
    """The lines that start a cluster that was swapped in, and the application. `analysis`: empty where the cluster has
    the planner's statistics; `application`: empty without one."""

    report: Report
    env: Environment
    services: ClusterServices
    server: Change[[], None]
    override: Change[[], Synchrony]
    analysis: Sequence[Change[[], PlannerStatistics]]
    application: Sequence[Change[[], None]]

    @classmethod
    def plan(
        cls, report: Report, env: Environment, services: ClusterServices, detail: str, *, has_statistics: bool = False
    ) -> ClusterStart:
        """Plan the lines. `detail`: of the server's."""
        roles = env.services_in(("backend", "frontend"))
        start, name = partial(start_server, report, env, services), env.postgres.database
        analysis = Change(lambda: analyze.after(services.last)(env.postgres, name, 2), "ANALYZE", name)
        application = Change(
            partial(_start_application, report, env, services, roles), "start services", ", ".join(roles), seconds=8
        )
        return cls(
            *(report, env, services),
            Change(start, "start the database server", detail, seconds=2),
            plan_override(env),
            [] if has_statistics else [analysis],
            [application] if roles else [],
        )

    @property
    def lines(self) -> Sequence[Line[..., Any]]:
        """Return them in order."""
        return self.server, self.override, *self.analysis, *self.application

    def carry_out(self, carry: Carrier) -> None:
        """Start the server and the WAL receiver, then the application.

        Raises:
            OpsError: one of them does not start, or is not healthy.
        """
        carry(self.server)
        let_commits_return(self.report, self.env, carry, self.override)
        for one in self.analysis:
            carry(one)
        self.services.all_started()
        for line in self.application:
            carry(line)
        if self.services.stopping_at:
            outage = (datetime.now(UTC) - self.services.stopping_at).total_seconds()
            self.report.fact("outage", duration(outage))


def start_server(report: Report, env: Environment, services: ClusterServices) -> None:
    """Start the server, the WAL receiver and the archiver."""
    primary = env.postgres
    services.last = start_services.after(services.last)(
        env.services, [primary.service], answers=lambda _: takes_writes(env)
    )
    until(lambda: takes_writes(env), what="an answer of the server on the live port", seconds=START_SECONDS)
    if env.has("wal"):
        ensure_wal_directory(primary, Path(env.wal.directory))
        if env.wal.service in env.services.names:
            services.last = start_services.after(services.last)(
                env.services, [env.wal.service], answers=lambda _: _streams(env)
            )
            _judge_receiver(report, env)
        if env.wal.archiver in env.services.names:  # nothing waits for it
            services.starting = start_services.after(services.last).submit(env.services, [env.wal.archiver])
    env.forget_roles()


def _start_application(report: Report, env: Environment, services: ClusterServices, roles: Sequence[str]) -> None:
    healthy = partial(answers, env.application)
    services.last = start_services.after(services.last)(env.services, roles, answers=healthy)
    health = wait_healthy.after(services.last)(env.application, seconds=HEALTH_SECONDS, services=env.services)
    report_health(report, health)
    report_smoke(report, smoke_check.after(health)(env.application))


def takes_writes(env: Environment) -> bool:
    """Return True if the server answers, and is no standby.

    Raises:
        Unreachable: it does not answer.
    """
    with env.postgres.connect(seconds=2) as connection:
        row = connection.execute("SELECT NOT pg_is_in_recovery()").fetchone()
    return bool(row and row[0])


def _streams(env: Environment) -> bool:
    with env.postgres.connect(seconds=2) as connection:
        query = "SELECT 1 FROM pg_stat_replication WHERE application_name = %s AND state = 'streaming'"
        return connection.execute(query, [env.wal.name]).fetchone() is not None


def _judge_receiver(report: Report, env: Environment) -> None:
    try:
        until(lambda: _streams(env), what=f"the stream to {env.wal.name}", seconds=ATTACH_SECONDS)
    except Unreachable as error:
        hint = f"check the log of {env.wal.service}, and that the slot {env.wal.slot} exists"
        report.warn("WAL receiver", hint, value=error.message)
    else:
        report.passed("WAL receiver", value="streams the new timeline")
