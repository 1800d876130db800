"""Scenario 2 of §8.4: the main region is lost. Failover to the other region, and back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blocks.environment import START_ORDER, Environment
from blocks.postgres.server import Postgres
from flows.application.files import backup_files
from flows.database.base_backup import backup_cluster
from flows.database.copies import replicate_backups
from flows.recovery.drills import control, detection
from flows.recovery.drills.scenario import Drill, Refusal, Scenario, Targets, launch
from flows.recovery.postgres.failover import rejoin_standby
from flows.recovery.region.failover import region_failover
from flows.redis.persistence import backup_redis
from flows.store import store_for
from runbook.change import Change
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.guard.permit import PlannedStep
from runbook.kinds import Bound
from runbook.report import Report
from tasks.application.endpoint import read_endpoint
from tasks.application.health import wait_healthy
from tasks.backups.catalogue import open_all
from tasks.drill.sabotage import copy_of, flip
from tasks.failover.fencing import DRILL
from tasks.failover.promotion import streams
from tasks.faults.disposable import Fault
from tasks.faults.region import empty_region, lose_region
from tasks.host.services import read_services, start_services, stop_services

RTO_SECONDS, RPO_SECONDS = 4 * 3600.0, 3600.0
HEALTH_SECONDS = 120.0
ATTESTED = f"{DRILL}: it has killed every process of the region itself"


class RegionOutage(Scenario):
    """Region outage."""

    name = "region_outage"
    title = "Region outage"
    situation = "A network failure of the whole main region"
    goal = "Switch to the DR region (RTO: 4 hours)"
    checks = "Data is recovered to within one hour (RPO: 1 hour)"
    backups = ("cluster", "redis", "files")
    needs = ("endpoint",)
    sensors = ("application", "database")

    def targets(self, env: Environment) -> Targets:
        """4 hours, and an hour of data."""
        return Targets(RTO_SECONDS, RPO_SECONDS)

    def fault(self, env: Environment) -> Bound[..., Fault]:
        """Return what kills every process of the region at once."""
        return lose_region.bind(env)

    def judge(self, report: Report, env: Environment) -> None:
        """The other region is empty and has replicated backups; users are sent to this one."""
        other = _other(env)
        states = read_services(other.services, list(other.services.names)).running
        running = ", ".join(role for role, runs in states.items() if runs)
        report.require(
            "steady state: the other region is empty",
            not running and other.disposable,
            "stop these services; the other region must be disposable too",
            value=running or other.name,
        )
        for kind in self.backups:
            known = open_all(store_for(other, kind), kind)[0]
            own = [one.name for one in known if one.manifest.environment == env.name and not one.failed]
            report.require(
                f"steady state: {kind} in the other region",
                bool(own),
                "run replicate-backups",
                value=own[-1] if own else "none",
            )
        sent = read_endpoint(env.endpoint)
        report.require(
            "steady state: users are sent to this region",
            sent == env.application.url,
            "send them back with region-failover first",
            value=sent,
            expected=env.application.url,
        )

    def address(self, env: Environment) -> str | Callable[[], str]:
        """From the endpoint file that the proxy in front of the regions reads."""
        return lambda: read_endpoint.work(env.endpoint)

    def servers(self, env: Environment) -> list[Postgres]:
        """Of both regions."""
        return [*env.nodes(), *_other(env).nodes()]

    def decide(self, drill: Drill) -> None:
        """The failover's plan."""
        plan = drill.keep(self._fail_over(drill, ""))
        drill.done["strategy"] = f"region-failover: {plan.facts.get('database from', '')}"

    def restore(self, drill: Drill) -> Report:
        """The failover: everything in the other region, then the users."""
        done = drill.keep(self._fail_over(drill, _other(drill.env).name))
        facts = done.facts
        drill.done |= {
            "database": facts.get("database from", ""),
            "redis": facts.get("redis backup", ""),
            "files": facts.get("files backup", ""),
            "integrity": "the last transaction in the WAL is restored" + detection.expectations_text(_other(drill.env)),
            "deployed": "with the files",
            "migrations": facts.get("Alembic revision", ""),
        }
        return done

    def live(self, env: Environment) -> Environment:
        """The region to which users are sent."""
        other = _other(env)
        return other if read_endpoint.work(env.endpoint) == other.application.url else env

    def verify(self, drill: Drill) -> None:
        """Every service of the other region except its standby runs; users are sent there."""
        other = _other(drill.env)
        stopped = read_services(other.services, other.services_in(START_ORDER)).stopped
        drill.report.require(
            "every function works",
            not stopped,
            "start them, and check their logs",
            value=", ".join(stopped) or "every service runs",
        )
        sent = read_endpoint(drill.env.endpoint)
        drill.report.require(
            "users are sent to the other region",
            sent == other.application.url,
            "check the endpoint file",
            value=sent,
            expected=other.application.url,
        )

    def settled_by(self, env: Environment) -> Sequence[str]:
        """Return the backups of the other region, the way back, and what completes this region."""
        there = ("backup-cluster", "backup-redis", "backup-files", "replicate-backups")
        standby = ("rejoin-standby",) if env.has("standby") else ()
        return (*there, "region-failover", *standby, "backup-cluster", "replicate-backups")

    def settle(self, drill: Drill) -> None:
        """The first region is available again: users and their writes go back to it."""
        self._send_back(drill)
        self._rejoin(drill)

    def control(self, drill: Drill) -> list[Refusal]:
        """The way back again, planned, with one bit changed in the only base backup."""
        env, other, scratch = drill.env, _other(drill.env), drill.directory / "control"
        known = open_all(store_for(env, "cluster"), "cluster")[0]
        newest = [one for one in known if one.manifest.environment == other.name][-1].name
        copy = copy_of(Path(env.backups.cluster) / newest, scratch / "cluster" / newest)
        (scratch / "postgresql").mkdir()
        stores = {"cluster": str(scratch / "cluster"), "postgres": str(scratch / "postgresql")}
        endpoint = env.endpoint.model_copy(update={"file": str(scratch / "endpoint")})
        (scratch / "endpoint").write_text(other.application.url, encoding="utf-8")
        derived = env.derived(
            {"backups": env.backups.model_copy(update=stores), "endpoint": endpoint}, reports=scratch / "reports"
        )
        control.require_accepted(derived, region_failover, source=other.name)
        refused = control.try_sabotaged(derived, region_failover, flip(copy), source=other.name)
        self._emptying(env)()
        return [refused]

    def controlling(self, drill: Drill) -> Change[[], list[Refusal]]:
        """Plan to delete what the drill leaves in the other region, too."""
        empty = PlannedStep("empty the other region", f"stop the services of {_other(drill.env).name}, delete its data")
        return replace(super().controlling(drill), more=[empty], by=[self._emptying(drill.env)])

    def heal(self, drill: Drill) -> None:
        """Complete a half-done fault; then back from the region to which users are sent."""
        env, other = drill.env, _other(drill.env)
        if drill.half_done.notes.get("step") == "the fault":
            lose_region.bind(env)()
        if self.live(env).name == other.name:
            _start(other, [role for role in _all(other) if role != other.standby.service])
            self._send_back(drill)
        else:
            _start(env, _all(env))
            env.forget_roles()
            wait_healthy(env.application, seconds=HEALTH_SECONDS)
        self._rejoin(drill)
        self._emptying(env)()

    def completing(self, env: Environment, broken: Sequence[str]) -> Sequence[Bound[[], Any]]:
        """Return what kills the rest of this region, and what empties the other one."""
        return [lose_region.bind(env), self._emptying(env)]

    def _emptying(self, env: Environment) -> Bound[[], list[str]]:
        return empty_region.bind(env, _other(env))

    def _fail_over(self, drill: Drill, confirm: str) -> Report:
        other = _other(drill.env).name
        return launch(region_failover, environment=other, source=drill.env.name, fenced_by=ATTESTED, confirm=confirm)

    def _send_back(self, drill: Drill) -> None:
        """The way back of docs/region-failover.md: stop writes, copy everything, send users back."""
        env, other = drill.env, _other(drill.env)
        drill.note(step="the way back")
        wait_healthy(other.application, seconds=HEALTH_SECONDS)
        drill.keep(launch(backup_cluster, environment=other.name))
        stop_services(other.services, other.services_in(("backend", "frontend")))
        for flow in (backup_redis, backup_files, replicate_backups):
            drill.keep(launch(flow, environment=other.name))
        failpoint("drill: ready for the way back")
        # The receiver gets the last WAL when the primary stops; the archiver archives it when it stops itself.
        last = ("postgres", *((other.wal.service, other.wal.archiver) if other.has("wal") else ()), "redis")
        stop_services(other.services, other.services_in(last))
        _start(env, [role for role in env.services.names if role.startswith(("redis", "sentinel"))])
        done = launch(region_failover, environment=env.name, source=other.name, confirm=env.name)
        drill.keep(done)
        drill.note(step="the standby")
        env.forget_roles()

    def _rejoin(self, drill: Drill) -> None:
        """A standby, and a base backup of the live timeline in both stores."""
        env = drill.env
        env.forget_roles()
        if env.has("standby") and not streams(env.postgres, env.standby.name):
            drill.run(rejoin_standby, confirm=env.name)
        drill.run(backup_cluster)
        drill.run(replicate_backups)


def _other(env: Environment) -> Environment:
    return Environment.find(env.endpoint.other)


def _all(env: Environment) -> list[str]:
    """Every service in the order of their start."""
    first = [*(node.service for node in env.nodes()), *([env.wal.service] if env.has("wal") else []), *START_ORDER]
    return [role for role in dict.fromkeys([*first, *env.services.names]) if role in env.services.names]


def _start(env: Environment, roles: list[str]) -> None:
    """The sensors report one that does not start."""
    for role in roles:
        with contextlib.suppress(OpsError):
            start_services(env.services, [role])
