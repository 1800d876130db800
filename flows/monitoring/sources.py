"""The source of each metric. If a source does not answer, none of its metrics counts as measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

from blocks.environment import Environment
from blocks.postgres import nodes
from blocks.postgres.refusals import TOO_MANY, LoginRefused
from blocks.postgres.server import Postgres
from flows.monitoring.table import named
from runbook import metrics
from runbook.errors import OpsError
from runbook.units import size
from tasks.application.health import health_checks, wait_healthy
from tasks.host.disk import Disk, disk_of, is_here
from tasks.host.load import read_processors
from tasks.host.services import read_services
from tasks.logs.reading.access import AccessLine, read_access
from tasks.monitoring import scrape
from tasks.postgres.replication.status import Replication, Standby, read_replication
from tasks.postgres.sessions.connections import read_activity
from tasks.redis.memory.info import read_memory
from tasks.redis.sentinels import master_by, read_sentinels

WINDOW = timedelta(minutes=5)
LEAST_REQUESTS = 20
"""The smallest denominator of an error rate: one failed request alone is no rate."""
NO_REQUESTS = "there were no requests"
SILENT_SECONDS = 25.0
DISK, CPU = metrics.DISK.name, metrics.CPU.name
CONNECTIONS, LAG = metrics.CONNECTIONS.name, metrics.REPLICATION_LAG.name
STREAMS = metrics.STREAMS_MISSING.name


@dataclass(frozen=True)
class Reading:
    """A value with its explanation; None with the reason if it could not be measured."""

    value: float | None
    told: str


Readings = Mapping[str, Reading]
Asked = Callable[[], Readings]


def read_application(env: Environment, now: datetime, window: timedelta = WINDOW) -> Readings:
    """Error rate and 95th percentile from the log, and the health check now."""
    health = _health(env)
    found: AccessLine | OpsError = AccessLine(0, 0, 0.0, True)
    if env.has("logs") and env.logs.app and window:
        try:
            found = read_access.work(env.logs, now - window)
        except OpsError as error:
            found = error
    return {metrics.API_RESPONSE.name: _response(health, found), metrics.API_ERRORS.name: _errors(health, found)}


def _is_measurable(env: Environment) -> bool:
    """Whether the application can be measured: by a health check, or its log."""
    return bool(health_checks(env.application)) or (env.has("application") and env.has("logs") and bool(env.logs.app))


def _health(env: Environment) -> float | OpsError | None:
    """Seconds until all checks passed; None: no check is configured."""
    if not health_checks(env.application):
        return None
    try:
        return wait_healthy.work(env.application, seconds=0, in_a_row=1).seconds
    except OpsError as error:
        return error


def _response(health: float | OpsError | None, found: AccessLine | OpsError) -> Reading:
    if isinstance(found, AccessLine) and found.requests:
        return Reading(found.slow_seconds, f"95th percentile of {found.requests} requests{_cut(found)}")
    if isinstance(health, OpsError):
        return Reading(None, health.message)
    return Reading(0.0, NO_REQUESTS) if health is None else Reading(health, f"the health check: {NO_REQUESTS}")


def _errors(health: float | OpsError | None, found: AccessLine | OpsError) -> Reading:
    if isinstance(health, OpsError):
        return Reading(1.0, health.message)
    if isinstance(found, OpsError):
        return Reading(None, found.message)
    ratio = found.errors / max(found.requests, LEAST_REQUESTS)
    return Reading(ratio, f"{found.errors} of {found.requests} requests failed{_cut(found)}")


def _cut(found: AccessLine) -> str:
    return "" if found.whole else " (not all lines of that time were read)"


def read_database(env: Environment) -> Readings:
    """The primary's connections, replication lag, and missing streams."""
    wanted = _followers(env)
    try:
        primary = find_primary(env)
        activity = read_activity.work(primary)
        found = read_replication.work(primary) if wanted else None
    except OpsError as error:
        unknown = dict.fromkeys(_of_database(env), Reading(None, error.message))
        if isinstance(error, LoginRefused) and error.sqlstate == TOO_MANY:
            unknown[CONNECTIONS] = Reading(1.0, error.message)
        return unknown
    of = f"{len(activity.clients) + 1} of {activity.limits.most} connections of {primary.host}:{primary.port}"
    readings = {CONNECTIONS: Reading(activity.used_ratio, of)}
    if found:
        streaming = {one.name for one in found.standbys if one.state == "streaming"}
        missing = sorted(wanted - streaming)
        readings[STREAMS] = Reading(len(missing), f"not streaming: {', '.join(missing)}" if missing else "all stream")
    if found and env.has("standby"):
        standby = next(node for node in env.nodes() if node is not primary)
        readings[LAG] = _lag(standby, found)
    return readings


def _of_database(env: Environment) -> tuple[str, ...]:
    return (CONNECTIONS, *([LAG] if env.has("standby") else []), *([STREAMS] if _followers(env) else []))


def find_primary(env: Environment) -> Postgres:
    """The server that accepts writes and has the application's database.

    Raises:
        OpsError: there is none, or two accept writes.
    """
    standing = [(node, nodes.ask(node)) for node in env.nodes()]
    takes = [node for node, said in standing if said and not said.in_recovery]
    if not takes:
        if len(standing) == 1 and not standing[0][1]:  # the only one: its error says why
            with standing[0][0].connect(seconds=nodes.ASK_SECONDS):
                pass
        raise OpsError("no database server accepts writes", "run diagnose-database, then show-recovery-options")
    primary = nodes.primary_first(takes)[0]  # raises if two accept writes
    with primary.connect(primary.database, seconds=nodes.ASK_SECONDS):
        return primary


def _followers(env: Environment) -> set[str]:
    """The names of the standby and the WAL receiver that must stream from the primary."""
    wanted = {env.nodes()[-1].name} if env.has("standby") else set()
    if env.has("wal") and env.wal.service in env.services.names:
        wanted.add(env.wal.name)
    return wanted


def _lag(node: Postgres, found: Replication) -> Reading:
    """The standby's lag: 0 if it has replayed everything; otherwise the longest of three: the lag that the primary
    measured (it does not grow while replay is paused), the age of the last replayed commit, the standby's silence."""
    standby = next((one for one in found.physical if one.name == node.name and one.replay_bytes is not None), None)
    if standby is None:
        return Reading(None, f"{node.name or 'the standby'} is not connected")
    behind = standby.replay_bytes or 0
    if behind == 0:
        return Reading(0.0, f"{standby.name} has replayed everything")
    return Reading(_seconds(node, standby), f"{standby.name} is {size(behind)} behind")


def _seconds(node: Postgres, standby: Standby) -> float:
    known = [one for one in (standby.lag_seconds,) if not math.isnan(one)]
    if standby.silent_seconds > SILENT_SECONDS:
        known.append(standby.silent_seconds)
    try:
        age = read_replication.work(node).replay_age_seconds
    except OpsError:
        age = None
    return max([*known, age or 0.0])


def read_redis(env: Environment) -> Readings:
    """The master's memory against maxmemory, or against the host's memory if there is no limit."""
    memory = read_memory.work(master_by(env.redis, read_sentinels.work(env.redis)))
    used, limit = memory.used - memory.not_counted, memory.limit
    of = f"{size(used)} of maxmemory {size(limit)}" if limit else f"no maxmemory: {size(used)} of the host's memory"
    return {metrics.REDIS_MEMORY.name: Reading(used / (limit or memory.host), of)}


def read_service_states(env: Environment) -> Readings:
    """Stopped services."""
    stopped = read_services.work(env.services, list(env.services.names)).stopped
    told = f"stopped: {', '.join(stopped)}" if stopped else f"all {len(env.services.names)} run"
    return {metrics.SERVICES_STOPPED.name: Reading(len(stopped), told)}


def read_disks(env: Environment, host: str = "") -> Readings:
    """The fullest file system of the environment on this host; `host`: this host's name in the TOML. If one cannot be
    measured, the metric is not measured."""
    disks, closed = dict[int, Disk](), list[str]()
    paths = {path for where, path in _places(env) if is_here(where) or where == host} | {env.reports_directory}
    for path in sorted(paths):
        try:
            found = disk_of(path)
            disks.setdefault(found.device, found)
        except OpsError as error:
            closed.append(error.message)
    if closed or not disks:
        return {DISK: Reading(None, "; ".join(closed))}
    full = max(disks.values(), key=lambda one: one.bytes_ratio)
    of = f"{size(full.free_bytes)} free at {full.path}; {len(disks)} file systems"
    return {DISK: Reading(full.bytes_ratio, of)}


def other_hosts(env: Environment) -> list[str]:
    """Other hosts of the environment, whose disks and processors cannot be measured from here."""
    return sorted({host for host, _ in _places(env) if not is_here(host)})


def _places(env: Environment) -> list[tuple[str, Path]]:
    found = [(node.host, node.data_directory) for node in env.nodes()]
    if env.has("redis"):
        found.append((env.redis.host, env.redis.data_directory))
    if env.has("wal"):
        found.append(("", env.wal.directory))
    if env.has("logs"):
        found += [("", str(Path(log).parent)) for log in (env.logs.app, env.logs.audit, env.logs.backup) if log]
    if env.has("application"):
        found.append(("", env.application.directory))
    if env.has("backups"):
        stores = env.backups
        found += [("", one) for one in (stores.postgres, stores.redis, stores.files, stores.cluster, stores.wal)]
    return [(host, Path(path)) for host, path in found if path and "://" not in path]


def read_host(before: tuple[str, float, float], since: str) -> tuple[Reading, tuple[str, float, float]]:
    """Processor use of this host since the last round, and the counters for the next one."""
    found = read_processors.work(before)
    return Reading(found.used_ratio, f"{found.count} processors{since}"), found.counters


def sources(env: Environment, now: datetime, window: timedelta = WINDOW) -> dict[str, tuple[Asked, tuple[str, ...]]]:
    """The sources of an environment, and the metrics of each."""
    known: dict[str, tuple[Asked, tuple[str, ...], bool]] = {
        "application": (
            lambda: read_application(env, now, window),
            (metrics.API_RESPONSE.name, metrics.API_ERRORS.name),
            _is_measurable(env),
        ),
        "database": (lambda: read_database(env), _of_database(env) if env.has("postgres") else (), env.has("postgres")),
        "redis": (lambda: read_redis(env), (metrics.REDIS_MEMORY.name,), env.has("redis")),
        "services": (lambda: read_service_states(env), (metrics.SERVICES_STOPPED.name,), bool(env.services.names)),
        "disks": (lambda: read_disks(env), (DISK,), True),
    }
    asked = {name: (ask, names) for name, (ask, names, there) in known.items() if there}
    for host in other_hosts(env):
        names = (named(DISK, host), named(CPU, host))
        asked[f"host {host}"] = (partial(read_other_host, env, host, now), names)
    return asked


def read_other_host(env: Environment, host: str, now: datetime) -> Readings:
    """The metrics that the watcher on that host serves (`[monitoring.hosts]`).

    Raises:
        OpsError: there is none, or it does not answer.
    """
    address = env.monitoring.hosts.get(host, "") if env.has("monitoring") else ""
    if not address:
        raise OpsError(f"no watcher measures {host}", f"run a watcher there and name it in [monitoring.hosts] {host}")
    found = scrape.read_host_values(address, env.name, host, now)
    return {
        named(metric, host): Reading(value, f"measured by the watcher on {host}") for metric, value in found.items()
    }
