"""Reattach replicas and Sentinels that a restore detached (§8.3)."""

from __future__ import annotations

from functools import partial

from blocks.environment import Environment
from flows.redis.restore.steps import DETACHED, attach_all
from runbook.change import Change, State, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.guard.permit import PlannedStep
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.redis.topology.isolation import attach, wait_for_followers
from tasks.redis.topology.topology import ReplicationTopology, find_record, read_topology


@flow(name="reattach-redis", flow_run_name=RunName("reattach-redis {environment}"))
def reattach_redis(environment: str, plan: str = "", confirm: str = "") -> Report:
    """Redisフェイルオーバー（Redis Sentinel使用時）: レプリカとSentinelの再登録 (§8.3)

    Reattaches the replicas and Sentinels that restore-redis or full-restore detached and could not reattach, because
    it was killed or a server did not answer. Run it if their report says so, or if check-redis-persistence finds
    Sentinels that do not watch the master.

    What it changes: the other servers follow the master again (its data replaces theirs), and every Sentinel watches it
    with its earlier settings. The master is this host's server if its data was swapped, otherwise the earlier master.
    Undo: nothing to undo; this is the state that the environment describes. Evidence: which server follows which.

    Args:
        environment: Environment (lab, staging, production …)
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Reattach Redis", env, confirm, plan, changes=True, rank="recovery") as report:
        if find_record(env.reports_directory) is None:
            report.outcome = "nothing was detached: there is nothing to reattach"
            return report
        around = read_topology(env.redis, env.reports_directory)
        lead = around.own if around.swapped or not around.master else around.master
        report.fact("detached", f"since {around.since}" if around.since else ", ".join(around.others) or "a Sentinel")
        report.fact("master", f"{lead}, with {'restored' if around.swapped else 'its earlier'} data")
        if around.own != lead and lead in around.lost:
            raise OpsError(f"the master {lead} does not answer", "start it, or run restore-redis again")
        what = f"the other servers follow {lead} again"
        effect = Effect(what, "", "" if around.swapped else "keys that only they have are lost")
        pins = [lambda report: report.pin_state("master", lead)]
        line = _attaching(report, env, around, lead)
        with carrying_out(report, line, effect=effect, pins=pins) as carry:
            problems = carry(line)
        report.outcome = f"{lead} is the master of {'the others' if problems else 'all servers'}"
    return report


def _attaching(report: Report, env: Environment, around: ReplicationTopology, lead: str) -> Change[[], tuple[str, ...]]:
    """One line for each server and Sentinel."""
    followers = [address for address in around.reachable if address != lead]
    steps = [
        PlannedStep("follow", f"{address} follows {lead}; the master's data replaces its data") for address in followers
    ]
    steps += [
        PlannedStep("watch", f"Sentinel {watcher.address} watches {lead} as {env.redis.sentinel_master}")
        for watcher in around.watchers
    ]
    first, *others = steps or [PlannedStep("promote", f"{lead} is a master; no other server answers")]
    return Change(
        partial(attach_all, report, env, around),
        first.step,
        first.detail,
        more=others,
        by=[attach.bind(env.redis), wait_for_followers.bind(env.redis)],
        begun=DETACHED,
        done=State(f"{lead} is the master; the others are attached, or the report names them", "check the report"),
    )
