"""Scenario 1 of §8.4: the primary's disk fails. Failover to the standby without loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from blocks.environment import START_ORDER, Environment
from blocks.postgres.server import Postgres, execute
from flows.database.base_backup import backup_cluster
from flows.recovery.drills import control, detection
from flows.recovery.drills.scenario import Drill, Refusal, Scenario, Targets
from flows.recovery.postgres.failover import postgres_failover, rejoin_standby
from runbook.failpoint import failpoint
from runbook.kinds import Bound
from runbook.report import Report
from tasks.drill.foreign import foreign_standby, sweep_foreign
from tasks.failover.marker import FailoverMarker
from tasks.failover.promotion import streams
from tasks.faults.disposable import Fault
from tasks.faults.server import destroy_server, finish_destroying
from tasks.host.services import read_services
from tasks.postgres.replication.synchronous import address, read_synchrony

RTO_SECONDS = 3600.0
PAUSED, FOREIGN = "replay paused on the standby", "a standby of another cluster in its place"


class DatabaseFailure(Scenario):
    """Database failure."""

    name = "database_failure"
    title = "Database failure"
    situation = "A disk of the primary database server fails"
    goal = "Failover to the standby database (RTO: 1 hour)"
    checks = "No data is lost (RPO: 0); every function works"
    backups = ("cluster",)
    needs = ("standby",)
    sensors = ("database",)

    def targets(self, env: Environment) -> Targets:
        """1 hour, and no lost write."""
        return Targets(RTO_SECONDS, 0.0, 0)

    def fault(self, env: Environment) -> Bound[..., Fault]:
        """Return what kills the primary's processes and deletes its data directory."""
        return destroy_server.bind(env, env.postgres)

    def judge(self, report: Report, env: Environment) -> None:
        """Only synchronous replication can promise RPO 0."""
        report.require(
            "steady state: standby",
            env.has("standby"),
            "add [standby] to the environment's TOML",
            value="configured" if env.has("standby") else "not configured",
        )
        found = read_synchrony(env.postgres)
        report.require(
            "steady state: synchronous replication",
            bool(found.names),
            "set synchronous_standby_names: without it a failover loses writes that the standby has not received",
            value=found.names or "asynchronous",
        )

    def decide(self, drill: Drill) -> None:
        """The failover's plan. `fence`: the supervisor keeps trying to start the lost server."""
        plan = drill.run(postgres_failover, mode="unplanned", fence=True)
        drill.done["strategy"] = f"postgres-failover, unplanned: {plan.facts.get('from → to', '')}"

    def restore(self, drill: Drill) -> Report:
        """Promote the standby, and redirect the application."""
        done = drill.run(postgres_failover, mode="unplanned", fence=True, confirm=drill.env.name)
        drill.done["integrity"] = f"by the runbook: {done.facts.get('lost', '')}"
        return done

    def verify(self, drill: Drill) -> None:
        """Every service runs."""
        env = drill.env
        stopped = read_services(env.services, env.services_in(START_ORDER[1:])).stopped
        drill.report.require(
            "every function works",
            not stopped,
            "start them, and check their logs",
            value=", ".join(stopped) or "every service runs",
        )

    def settled_by(self, env: Environment) -> Sequence[str]:
        """Return the standby's runbook, then the backup's."""
        return ("rejoin-standby", "backup-cluster")

    def settle(self, drill: Drill) -> None:
        """The lost server becomes a standby; the new timeline gets a base backup."""
        name = drill.env.name
        drill.env.forget_roles()
        drill.run(rejoin_standby, confirm=name)
        drill.run(backup_cluster)

    def control(self, drill: Drill) -> list[Refusal]:
        """A standby with paused replay: its promotion would lose the WAL that it has received. And a standby of another
        cluster, like a backup of another system: its promotion would lose all of the data. (A failover reads no backup,
        so a changed byte in one proves nothing.)"""
        env = drill.env
        env.forget_roles()
        standby, reports = env.standby, drill.directory / "control" / "reports"
        derived = env.derived({}, reports=reports)
        control.require_accepted(derived, postgres_failover, **_planned(standby))
        with _paused(drill, standby):
            paused = control.try_sabotaged(derived, postgres_failover, PAUSED, **_planned(standby))
        with foreign_standby(standby) as other:
            derived = env.derived({"postgres": env.postgres, "standby": other}, reports=reports)
            return [paused, control.try_sabotaged(derived, postgres_failover, FOREIGN, **_planned(other))]

    def heal(self, drill: Drill) -> None:
        """Complete a half-done fault; then the failover and the standby, if they are missing."""
        env = drill.env
        for node in env.nodes():
            sweep_foreign(node)
        for complete in self.completing(env, drill.half_done.broken):
            complete()
        env.forget_roles()
        if detection.database(env, drill.directory) or FailoverMarker.find(env.reports_directory):
            drill.run(postgres_failover, mode="unplanned", fence=True, confirm=env.name)
            env.forget_roles()
        if paused := drill.half_done.notes.get("paused"):
            _resume(next(node for node in env.nodes() if address(node) == paused))
        if not streams(env.postgres, env.standby.name):
            drill.run(rejoin_standby, confirm=env.name)

    def completing(self, env: Environment, broken: Sequence[str]) -> Sequence[Bound[[], Any]]:
        """Return what ends the processes and deletes the files of the lost server."""
        return [finish_destroying.bind(env, node) for node in env.nodes() if address(node) in broken]


def _planned(standby: Postgres) -> dict[str, str]:
    return {"mode": "planned", "new_primary": address(standby)}


@contextlib.contextmanager
def _paused(drill: Drill, standby: Postgres) -> Iterator[None]:
    """Recorded first: the run after a killed one resumes the replay."""
    drill.note(paused=address(standby))
    with standby.connect() as connection:
        execute(connection, "SELECT pg_wal_replay_pause()")
    failpoint("drill: replay paused")
    try:
        yield
    finally:
        _resume(standby)


def _resume(standby: Postgres) -> None:
    with standby.connect() as connection:
        if execute(connection, "SELECT pg_is_in_recovery() AND pg_is_wal_replay_paused()")[0][0]:
            execute(connection, "SELECT pg_wal_replay_resume()")
