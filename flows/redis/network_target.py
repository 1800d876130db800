"""The live server that a restore over the network is for; also where one that was killed left it, and where that server
is dead by now (§2.3)."""

from __future__ import annotations

from dataclasses import dataclass

from blocks.environment import Environment
from blocks.redis import Redis
from flows.redis.master import judge_master
from runbook.errors import OpsError
from runbook.report import Report
from tasks.redis.restore.network import Leftover, find_leftover, still_follows
from tasks.redis.restore.route import Route, find_route
from tasks.redis.restore.surroundings import Surroundings, find_record, read_surroundings
from tasks.redis.sentinels import Watch, read_sentinels
from tasks.redis.server import answers


@dataclass(frozen=True)
class Target:
    """The live server, what stands around it, how data gets into it, and what a killed restore left there. `dead` is
    the server of a killed restore that does not answer any more, where another has taken its place."""

    block: Redis
    around: Surroundings
    route: Route
    left: Leftover | None
    follows: bool
    dead: str = ""


def find_target(report: Report, env: Environment, needed_bytes: int) -> Target:
    """Find the server, and how a backup of `needed_bytes` gets into it.

    Raises:
        OpsError, Unreachable: it refuses, or does not answer; where a killed restore was for it, what to do then.
    """
    left, record = find_leftover(env.reports_directory), find_record(env.reports_directory)
    # Sentinels that a killed run took off know no master: what it wrote down does.
    known = left.server if left else record.own if record else ""
    watch = read_sentinels(env.redis)
    dead = known if known and not answers(env.redis.at(known)) else ""
    if dead:
        _require_successor(env, dead, watch, left, record)
        left = None
    block = (
        env.redis.at(known) if known and not dead else judge_master(report, env.redis, watch, changes=True, waiver=None)
    )
    report.fact("server", block.address)
    if dead:
        host, _, port = block.address.rpartition(":")
        report.warn("an earlier restore was killed", f"when {dead} is back: REPLICAOF {host} {port} on it",
                    value=f"{dead}, for which it was, does not answer: this run is for {block.address}")  # fmt: skip
    around = read_surroundings(block, env.reports_directory, of_dead=bool(dead))
    route = find_route(block, needed_bytes)
    return Target(block, around, route, left, bool(left and still_follows(block, left)), dead)


def _require_successor(
    env: Environment, dead: str, watch: Watch, left: Leftover | None, record: Surroundings | None
) -> None:
    """Somebody else is the master by now, by the Sentinels' word or by the environment's.

    Raises:
        OpsError: nobody is; what to do.
    """
    if any(master not in ("", dead) for master in watch.masters) or (not watch.views and env.redis.address != dead):
        return
    kept = f" (what was live before is kept as {left.kept})" if left else ""
    what = f"{dead}, for which a restore was killed, does not answer{kept}"
    again = f"start it and launch this again: it goes on there. If {dead} is gone for good"
    if not watch.views:
        raise OpsError(what, f"{again}: name the server that takes its place as host and port in [redis], register the "
                       "blocks, and launch this again: it goes on there")  # fmt: skip
    others = [address for address in (record.others if record else ()) if answers(env.redis.at(address))]
    quorum = max((watcher.quorum for watcher in record.watchers), default=2) if record else 2
    new, name = others[0] if len(others) == 1 else "<host>:<port>", env.redis.sentinel_master
    sentinels = ", ".join(view.address for view in watch.views)
    raise OpsError(
        what,
        f"{again}: REPLICAOF NO ONE on {' or '.join(others) or 'the server in its place'}, then on each Sentinel "
        f"({sentinels}) SENTINEL MONITOR {name} {' '.join(new.rsplit(':', 1))} {quorum} and SENTINEL SET {name} "
        "auth-pass <password>, and launch this again: it goes on there",
    )
