"""The services that a recovery stops. They stay stopped until the restored data is live and proven; where the run fails
before it replaced anything, they are started again."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import ParamSpec, TypeVar

from blocks.environment import START_ORDER, STOP_ORDER, Environment
from blocks.redis.server import Redis
from flows.redis.backup import keep_live
from flows.redis.restore.gate import RedisGate
from flows.redis.restore.steps import put_back
from flows.restart import start_again
from runbook.change import Change, State
from runbook.errors import OpsError, ending_the_run
from runbook.guard.permit import Permit
from runbook.kinds import Pending, permitted_by
from runbook.next import Next
from runbook.report import Report
from tasks.host.services import Started, read_services, stop_services
from tasks.redis.restore.live import LiveRedis
from tasks.redis.restore.survivors import SurvivingCopy
from tasks.redis.restore.swap import stop_redis
from tasks.redis.topology.isolation import detach
from tasks.redis.topology.topology import ReplicationTopology

P = ParamSpec("P")
R = TypeVar("R")

STOP_SECONDS = 5
# A point-in-time recovery does not stop Redis.
APPLICATION = tuple(role for role in STOP_ORDER if role not in ("redis", "postgres"))


@dataclass
class StoppedServices(abc.ABC):
    """`running`: the roles that ran when the run began, or were being started. `swapped`: the parts that were replaced;
    `kept`: the names of the replaced data. `last`: the step that precedes the next one in the run's graph."""

    report: Report
    env: Environment
    running: Sequence[str]
    last: object = None
    stopping_at: datetime | None = None
    stopped_at: datetime | None = None
    swapped: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    @ending_the_run()
    def stop(self) -> None:
        """Stop them once, in order, each proven stopped."""
        if self.stopping_at:
            return
        self.stopping_at = datetime.now(UTC)
        self._stop()
        self.stopped_at = datetime.now(UTC)

    def start_again(self) -> None:
        """Start those that were found running, and report which run. A failure here must not hide the error that led
        here."""
        roles = [role for role in self._starting_order() if role in self.running]
        if not start_again(self.report, self.env.services, roles):
            commands = "; ".join(self.env.services.start_command(role) for role in roles)
            self.report.state_is(
                "nothing live was replaced; services were stopped, and not all of them run again",
                f"start them ({commands}), then run this again",
            )

    @abc.abstractmethod
    def _stop(self) -> None:
        """Stop them, in order."""

    @abc.abstractmethod
    def _starting_order(self) -> Sequence[str]:
        """Every role that may have been stopped, in the order of the start."""


def plan_stop(
    services: StoppedServices, stop: Callable[P, R], roles: Sequence[str], *, begun: State | None = None
) -> Change[P, R]:
    """Plan to stop `roles`, in order, by `stop`. If the run fails before it replaced anything, those of `services` that
    were found running are started again."""

    def start() -> None:
        if not services.swapped:  # perhaps by a killed run, or without a word whether it was
            services.start_again()

    return Change(stop, "stop services", ", ".join(roles), seconds=STOP_SECONDS, begun=begun, reverse=start)


@contextlib.contextmanager
def started_on_failure(services: StoppedServices) -> Iterator[None]:
    """If the block fails before it replaced anything, start the services that were found running. For a runbook that
    does not plan the stop by `plan_stop`."""
    try:
        yield
    except BaseException:
        if services.stopping_at and not services.swapped:
            services.start_again()
        raise


@dataclass
class ClusterServices(StoppedServices):
    """Those of a cluster that is replaced as a whole: the application, the standby, PostgreSQL and the WAL receiver.
    `starting`: a start that is not proven yet."""

    starting: Pending[Started] | None = None

    def all_started(self) -> None:
        """Wait for the start that is not proven yet.

        Raises:
            OpsError: the service does not start.
        """
        if self.starting:
            self.starting.result()

    def _stop(self) -> None:
        """Writers first, then the standby, then the primary. The receiver last: it has all WAL then."""
        env = self.env
        receiver = env.wal.service if env.has("wal") else ""
        order = [*env.services_in(APPLICATION), *(role for role in replication_roles(env) if role != receiver)]
        order += [env.postgres.service, *([receiver] if receiver in env.services.names else [])]
        self.last = stop_services.after(self.last)(env.services, order)

    def _starting_order(self) -> Sequence[str]:
        """A WAL receiver without its server tries again as long as it runs, but does not start."""
        env, receiver = self.env, self.env.wal.service if self.env.has("wal") else ""
        order = list(dict.fromkeys([env.postgres.service, *replication_roles(env), *START_ORDER]))
        if receiver in self.running and env.postgres.service not in self.running:
            order.remove(receiver)
            hint = f"start it after the database server: {env.services.start_command(receiver)}"
            self.report.warn("WAL receiver", hint, value="stopped: it does not start while the database server is down")
        return order


def read_cluster_services(report: Report, env: Environment) -> ClusterServices:
    """Those of the environment, and which of them run."""
    roles = dict.fromkeys([*env.services_in(START_ORDER), env.postgres.service, *replication_roles(env)])
    return ClusterServices(report, env, read_services(env.services, list(roles)).wanted)


def replication_roles(env: Environment) -> list[str]:
    """The standby and the WAL receiver, as far as they are services of the environment."""
    found = [env.standby.service] if env.has("standby") else []
    found += [env.wal.service] if env.has("wal") else []
    return [role for role in found if role in env.services.names]


@dataclass
class SystemServices(StoppedServices):
    """Those of a full restore. `topology`: the replicas and Sentinels of Redis. `redis_kept`: the master goes on
    serving. `stops_redis`: it is stopped and started. `other_master`: the server whose data the restored data replaces.
    `redis_replaced`: the data of Redis that was replaced. `redis_stopping`: it is stopped, or half way there.
    `redis_gate`: what a replacement of its data must pass; None: its data is not replaced. `undo`: the runbooks that
    return to the replaced data."""

    permit: Permit = field(kw_only=True)
    topology: ReplicationTopology | None = None
    redis_kept: SurvivingCopy | None = None
    stops_redis: bool = True
    other_master: Redis | None = None
    redis_replaced: Path | None = None
    redis_stopping: bool = False
    redis_gate: RedisGate | None = None
    undo: list[Next] = field(default_factory=list)

    @property
    def redis_live(self) -> LiveRedis | None:
        """The server whose data is replaced, at its stop."""
        return self.redis_gate.fenced if self.redis_gate else None

    def _stop(self) -> None:
        """In the manual's order."""
        roles = [role for role in self.env.services_in(STOP_ORDER) if role != "redis"]
        self.last = stop_services.after(self.last)(self.env.services, roles)

    @ending_the_run()
    def stop_redis(self) -> None:
        """Stop Redis once, proven stopped: later than its clients, because a migration may need it.

        Raises:
            LossExceeded: it is not the server that was judged. Nothing of it was replaced.
        """
        if self.redis_stopping or not self.stops_redis:
            return
        if self.other_master:
            kept = keep_live(self.report, self.env, self.other_master).name
            name = f"undo for the data of {self.other_master.address}"
            self.report.fact(name, f"restore-redis with backup={kept}")
        self.redis_stopping = True
        if self.redis_gate:
            try:
                with permitted_by(self.permit):
                    self.last = self.redis_gate.fence(after=self.last)
            finally:
                self.topology = self.redis_gate.around
            return
        if self.topology:  # before Redis stops: a Sentinel would promote another server
            reports = self.env.reports_directory
            with permitted_by(self.permit):
                self.topology = detach.bind(self.env.redis, self.topology, reports)()
        self.last = stop_redis.after(self.last)(self.env.redis, self.env.services)

    def _starting_order(self) -> Sequence[str]:
        return START_ORDER

    def start_again(self) -> None:
        """Start those that were found running, and reattach Redis's replicas and Sentinels."""
        super().start_again()
        # If another server is the master, it has been detached, and serves nobody until it is attached again.
        others = self.topology and self.topology.master not in ("", self.topology.own)
        if self.redis_stopping and self.topology and ("redis" in self.running or others):
            try:
                with permitted_by(self.permit):
                    put_back(self.report, self.env, self.topology)
            except OpsError as error:
                self.report.fail("replicas and Sentinels reattached", error.hint, value=error.message)

    def may_have_swapped(self, part: str, left: Sequence[str]) -> None:
        """It is unknown whether `part` was swapped: the services stay stopped, and the next run restores everything."""
        self.swapped.append(f"perhaps the {part}")
        self.report.state_is(
            f"whether the {part} was swapped is unknown; not swapped: {', '.join(left) or 'nothing else'}; services "
            "are stopped",
            f"run it again with confirm={self.env.name}: it restores everything from the start",
        )

    def has_swapped(self, part: str, kept: object, left: Sequence[str], undo: Next | None = None) -> None:
        """Note what is live now, should the run fail after this. `left`: the parts that are still to be swapped;
        `undo`: the runbook that returns to `kept`."""
        self.swapped.append(part)
        self.undo += [undo] if kept and undo else []
        self.kept += [str(kept)] if kept else []
        kept_data = f"the replaced data is kept: {', '.join(self.kept) or 'there was none'}"
        if left:
            self.report.state_is(
                f"swapped: {', '.join(self.swapped)}; not swapped: {', '.join(left)}; services are stopped; "
                f"{kept_data}",
                f"run it again with confirm={self.env.name}: it restores everything from the start",
            )
        else:
            self.report.state_is(
                f"the backups' data is live, proven; {kept_data}",
                "fix the findings above and start the services. Restoring again would lose what was written since. "
                + (f"To go back, run {', '.join(map(str, self.undo))}" if self.undo else "Nothing is kept: no undo"),
            )
