"""The server that a restore over the network replaces the data of (§2.3)."""

from __future__ import annotations

from dataclasses import dataclass

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows.redis.master import judge_master
from runbook.errors import OpsError
from runbook.report import Report
from tasks.redis.restore.live import LiveRedis, read_live
from tasks.redis.restore.network import RedisLeftover, find_leftover, still_follows
from tasks.redis.restore.route import Route, find_route
from tasks.redis.sentinels import Watch, read_sentinels
from tasks.redis.server import answers
from tasks.redis.topology.topology import ReplicationTopology, find_record, read_topology


@dataclass(frozen=True)
class RestoreTarget:
    """The live server, its replication topology, the route for the data, and what a killed restore left. `dead`: the
    server of a killed restore that no longer answers, if another server replaced it."""

    block: Redis
    around: ReplicationTopology
    route: Route
    left: RedisLeftover | None
    follows: bool
    judged: LiveRedis
    dead: str = ""


def find_target(report: Report, env: Environment, needed_bytes: int) -> RestoreTarget:
    """Find the server, and the route for a backup of `needed_bytes`.

    Raises:
        OpsError, Unreachable: it refuses, or does not answer. After a killed restore the hint names the next step.
    """
    left, record = find_leftover(env.reports_directory), find_record(env.reports_directory)
    # Sentinels that a killed run detached know no master; its record does.
    known = left.server if left else record.own if record else ""
    watch = read_sentinels(env.redis)
    dead = known if known and not answers(env.redis.at(known)) else ""
    if dead:
        _require_successor(env, dead, watch, left, record)
        left = None
    block = (
        env.redis.at(known) if known and not dead else judge_master(report, env.redis, watch, changes=True, waiver=None)
    )
    judged = read_live(block)
    report.fact("server", block.address)
    if dead:
        host, _, port = block.address.rpartition(":")
        report.warn(
            "an earlier restore was killed",
            f"when {dead} answers again: REPLICAOF {host} {port} on it",
            value=f"its server {dead} does not answer; this run restores {block.address}",
        )
    around = read_topology(block, env.reports_directory, of_dead=bool(dead))
    route = find_route(block, needed_bytes)
    return RestoreTarget(block, around, route, left, bool(left and still_follows(block, left)), judged, dead)


def _require_successor(
    env: Environment, dead: str, watch: Watch, left: RedisLeftover | None, record: ReplicationTopology | None
) -> None:
    """The Sentinels or the environment name another master now.

    Raises:
        OpsError: they do not; the hint names the next step.
    """
    if any(master not in ("", dead) for master in watch.masters) or (not watch.views and env.redis.address != dead):
        return
    kept = f" (its earlier data is kept as {left.kept})" if left else ""
    what = f"{dead}, the server of a killed restore, does not answer{kept}"
    again = f"start it and run this again: it continues. If {dead} is lost for good"
    if not watch.views:
        raise OpsError(
            what,
            f"{again}: name the server that replaces it as host and port in [redis], register the blocks, and run this "
            "again",
        )
    others = [address for address in (record.others if record else ()) if answers(env.redis.at(address))]
    quorum = max((watcher.quorum for watcher in record.watchers), default=2) if record else 2
    new, name = others[0] if len(others) == 1 else "<host>:<port>", env.redis.sentinel_master
    sentinels = ", ".join(view.address for view in watch.views)
    raise OpsError(
        what,
        f"{again}: REPLICAOF NO ONE on {' or '.join(others) or 'the server that replaces it'}, then on each Sentinel "
        f"({sentinels}) SENTINEL MONITOR {name} {' '.join(new.rsplit(':', 1))} {quorum} and SENTINEL SET {name} "
        "auth-pass <password>, and run this again",
    )


def require_same_servers(env: Environment, target: RestoreTarget) -> None:
    """Master, replicas and Sentinels are still those of the plan: the backup of the live data takes time.

    Raises:
        OpsError: they changed.
    """
    now = read_topology(target.block, env.reports_directory, of_dead=bool(target.dead))
    planned = target.around
    if now.master != planned.master:
        what = now.disagreement or (f"{now.master} was promoted" if now.master else "there was no master")
        raise OpsError(f"{what} during the backup of the live data", "run it again: it finds the new master")
    changed = [now.others, now.lost, now.watchers] != [planned.others, planned.lost, planned.watchers]
    if changed and target.route.way == "replication":
        raise OpsError("replicas or Sentinels changed during the backup of the live data", "run it again")
