"""Replicas and Sentinels that a restore took off and could not put back (§8.3)."""

from __future__ import annotations

from prefect import flow

from blocks.environment import Environment
from flows.redis.restore.steps import put_back
from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.report import Report
from runbook.run import runbook
from tasks.redis.topology.isolation import TAKE_OFF
from tasks.redis.topology.topology import find_record, read_surroundings


@flow(name="reattach-redis", flow_run_name="reattach-redis {environment}")
def reattach_redis(environment: str, plan: str = "", confirm: str = "") -> Report:
    """Redisフェイルオーバー（Redis Sentinel使用時）: レプリカとSentinelの再登録 (§8.3)

    Puts back what restore-redis or full-restore took off before it replaced the data and could not put back, because it
    was killed or a server did not answer. Run it when their report says so, or when check-redis-persistence finds that
    the Sentinels do not watch the master.

    What it changes: the other servers follow the master again (their data is replaced by the master's), and every
    Sentinel watches it with the settings that it had. The master is this host's server where its data was swapped in,
    else the one before. To undo: nothing; it is the state that the environment describes. Evidence: who follows whom.

    Args:
        environment: 対象の環境
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Reattach Redis", env, confirm, plan, changes=True, rank="recovery") as report:
        if find_record(env.reports_directory) is None:
            report.outcome = "nothing was taken off: there is nothing to put back"
            return report
        around = read_surroundings(env.redis, env.reports_directory)
        lead = around.own if around.swapped or not around.master else around.master
        report.fact("taken off", f"since {around.since}")
        report.fact("master", f"{lead}, whose data {'was restored' if around.swapped else 'is the one from before'}")
        if around.own != lead and lead in around.lost:
            raise OpsError(f"{lead} is to be the master and does not answer", "start it, or launch restore-redis again")
        for address in around.reachable:
            if address != lead:
                report.plan("follow", f"{address} follows {lead}; what it holds is replaced by the master's")
        for watcher in around.watchers:
            report.plan("watch", f"Sentinel {watcher.address} watches {lead} as {env.redis.sentinel_master}")
        report.pin_state("master", lead)
        permit = report.permit(Act(TAKE_OFF, env.redis.data_directory))
        put_back(report, env, permit, around)
        report.outcome = f"{lead} is the master for all"
    return report
