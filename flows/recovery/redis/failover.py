"""Failover of Redis with Sentinels (§8.3): the mastership goes to a replica, and what was lost is known."""

from __future__ import annotations

import time

from prefect import flow

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows.recovery.redis.choice import choose, require_unchanged
from flows.recovery.redis.findings import Mode, judge_dead, judge_living, judge_sentinels, tell_servers
from flows.recovery.redis.loss import Before, tell_interrupted_loss, tell_planned_loss, tell_unplanned_loss
from flows.recovery.redis.progress import settled, tell_phases, verify_after
from runbook.errors import OpsError, RunbookFailed
from runbook.guard.permit import Act
from runbook.report import Report, Status
from runbook.run import runbook
from tasks.redis.failover.group import Group, Member, read_group
from tasks.redis.failover.handover import ACT, hand_over, make_follow, take_over
from tasks.redis.failover.ledger import RedisFailoverMarker
from tasks.redis.failover.pause import LONGEST_SECONDS
from tasks.redis.failover.promotion import Choice, HandOver
from tasks.redis.failover.rights import find_refused_commands
from tasks.redis.topology.topology import find_record

RECENT_SECONDS = 3600.0


@flow(name="redis-failover", flow_run_name="redis-failover {environment} {mode}")
def redis_failover(
    environment: str, mode: Mode = "planned", new_master: str = "", plan: str = "", confirm: str = ""
) -> Report:
    """Redisフェイルオーバー（Redis Sentinel使用時） (§8.3)

    Makes a replica the master. `planned`, while the master lives (before work on its host): no acknowledged write is
    lost, and that is proven. `unplanned`, when it is dead: waits for the Sentinels' own failover, begins one where they
    do not, and says which writes may be lost.

    What it changes: planned, writes stand still (CLIENT PAUSE WRITE, 10 s at most after the death of this run) until
    the replica has every byte; then the Sentinels switch, and the old master follows the new one. With an empty confirm
    it shows the plan and changes nothing. Killed anywhere, launch it again: it goes on, or says who is master now.

    Undo: launch it again with new_master set to the old one. Evidence: offsets, the Sentinels' views before and after,
    seconds of decision, switch and first acknowledged write, and this run's own acknowledged writes, counted.

    Departs from the manual: a plain SENTINEL FAILOVER loses acknowledged writes; all Sentinels are asked, not one.

    Args:
        environment: 対象の環境 (lab, staging, production …)
        mode: planned はマスターが生きている時 (書き込み損失なし)、unplanned はマスターが停止した時
        new_master: 昇格させるレプリカ host:port。空なら Sentinel が選ぶもの
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 実行するには環境名を入力。空なら計画のみ表示
    """
    env = Environment.find(environment)
    with runbook("Redis failover", env, confirm, plan, changes=True, rank="recovery") as report:
        started, block = time.monotonic(), env.redis
        _require_sentinels(block, mode)
        group = read_group(block)
        before = Before.read(block, group)
        group = settled(block, group) if mode == "unplanned" else group
        tell_servers(report, "before", group)
        kept = None if group.watch.master else find_record(env.reports_directory)
        judge_sentinels(report, group, mode, kept.since if kept else "")
        if _is_done(report, block, group, mode, new_master, before):
            return report
        choice = _judge(report, block, group, mode, new_master, before)
        _plan(report, choice, mode)
        if mode == "planned":  # of a dead master's replicas the Sentinels choose
            report.pin("new_master", choice.candidate)
        report.pin_state("master", choice.master)
        permit = report.permit(Act(ACT, choice.target))
        _judge_again(report, block, choice, mode, new_master, before)
        report.state_is(
            f"a failover {choice.target} was begun; writes on {choice.master} that still stand still go on within "
            f"{LONGEST_SECONDS:.0f} s",
            "launch it again: it goes on, or says who is master",
        )
        decision = time.monotonic() - started
        act = hand_over if mode == "planned" else take_over
        done = act(permit, block, choice)
        report.state_is(f"{done.new.address} is the master", "launch it again: it says who follows and who does not")
        tell_phases(report, decision, done)
        _report_results(report, block, group, choice, done, before)
    return report


def _require_sentinels(block: Redis, mode: str) -> None:
    if not (block.sentinels and block.sentinel_master):
        raise OpsError(
            "no Sentinels watch this Redis",
            "name them: [redis] sentinels, sentinel_master; without Sentinels REPLICAOF NO ONE on the replica by hand",
        )
    if mode not in ("planned", "unplanned"):
        raise OpsError(f"mode is “{mode}”", "choose planned or unplanned")


def _judge(report: Report, block: Redis, group: Group, mode: Mode, wanted: str, before: Before) -> Choice:
    (judge_living if mode == "planned" else judge_dead)(report, group)
    choice = choose(report, block, group, mode, wanted, before.seen.version if before.seen else "")
    if mode == "planned":
        _judge_rights(
            report, "the master", find_refused_commands(block.at(choice.master), demotes=not choice.coordinated)
        )
    for address in choice.needed:
        _judge_rights(report, address, find_refused_commands(block.at(address), promoted=True), mode)
    report.fail_if_critical()
    return choice


def _judge_rights(report: Report, where: str, refused: list[OpsError], mode: Mode = "planned") -> None:
    otherwise = Status.CRITICAL if mode == "planned" else Status.WARN  # a dead master is taken over all the same
    for error in refused:
        report.fail(f"rights on {where}", error.hint, value=error.message, worst=otherwise)
    if not refused:
        report.passed(f"rights on {where}", value="every command of the failover, tried and discarded")


def _judge_again(report: Report, block: Redis, choice: Choice, mode: Mode, wanted: str, before: Before) -> None:
    again = Report(report.runbook, report.environment)
    try:
        group = read_group(block)
        if mode == "unplanned" and any(
            group.members[name].is_master for name in choice.replicas if name in group.members
        ):
            return  # the Sentinels were quicker, as is usual: to take over is to wait until they agree
        judge_sentinels(again, group, mode)
        require_unchanged(choice, _judge(again, block, group, mode, wanted, before))
    except RunbookFailed as error:
        raise OpsError(f"changed since it was judged: {error.message}", "launch it again: a new plan") from None


def _plan(report: Report, choice: Choice, mode: Mode) -> None:
    report.fact("from → to", choice.target)
    if mode == "planned":
        how = "SENTINEL FAILOVER … COORDINATED" if choice.coordinated else "SENTINEL FAILOVER, then REPLICAOF"
        report.plan("pause writes", f"on {choice.master}, until {', '.join(choice.needed)} has every byte", seconds=0.1)
        report.plan("fail over", f"{choice.target}: {how}, at {choice.sentinels[0]}", seconds=1.0)
        report.plan("verify", "one master by all Sentinels; a client that follows them writes", seconds=0.5)
        report.plan("follow", f"{choice.master} becomes a replica and comes into sync", seconds=2.0)
    else:
        report.plan("wait", "for the Sentinels' own failover, if they begin one", seconds=3.0)
        report.plan("fail over", f"{choice.target}, where they do not: SENTINEL FAILOVER, at {choice.sentinels[0]}")
        report.plan("verify", "one master by all Sentinels; a client that follows them writes; what may be lost")


def _is_done(report: Report, block: Redis, group: Group, mode: Mode, wanted: str, before: Before) -> bool:
    """Whether there is nothing to do: an earlier run, or the Sentinels, have already done it."""
    master = group.master
    if master is None or not master.is_master:
        return False
    marker = RedisFailoverMarker.find_in(block.at(master.address))
    interrupted = marker if marker and marker.old != master.address else None
    why = ""
    if interrupted and wanted in ("", master.address):
        why = f"the failover from {interrupted.old} that {interrupted.run} began at {interrupted.started} has happened"
    elif wanted == master.address:
        why = "it is the one that was asked for"
    elif mode == "unplanned" and (dead := _former(group)):
        why = f"the Sentinels have failed over from {dead} already"
    if not why:
        return False
    report.fact("master", f"{master.address}: {why}")
    report.outcome = f"nothing to do: {master.address} is the master; {why}"
    stray = _finish(report, block, group, interrupted, master) if interrupted else None
    if mode == "unplanned":
        tell_unplanned_loss(report, None, master, before)
    down = [member.address for member in group.others if member.problem]
    verify_after(report, block, master.address, [m.address for m in group.others if not m.problem], down)
    if interrupted:  # only one that follows by now knows how much it had
        left = stray or read_group(block).members.get(interrupted.old)
        tell_interrupted_loss(report, interrupted, left, master)
    return True


def _finish(report: Report, block: Redis, group: Group, marker: RedisFailoverMarker, new: Member) -> Member | None:
    """What a killed run has left: an old master that is none for the Sentinels (returned as it was), and its note."""
    left = group.members.get(marker.old)
    if left and left.is_master:
        report.plan("make it follow", f"{left.address} still says that it is a master: REPLICAOF {new.address}")
        left = make_follow(report.permit(Act(ACT, f"{left.address} → {new.address}")), block, left.address, new.address)
    if report.confirm == report.environment:
        RedisFailoverMarker.remove_from(block.at(new.address))
    return left if left and left.is_master else None


def _former(group: Group) -> str:
    """A server that is down, where the master was promoted lately: it was the master before, as far as one can see."""
    master = group.master
    lately = all(view.master_since_seconds < RECENT_SECONDS for view in group.watch.answering)
    down = [member.address for member in group.others if member.dead]
    return down[0] if master and master.promoted_at >= 0 and lately and down else ""


def _report_results(report: Report, block: Redis, group: Group, choice: Choice, done: HandOver, before: Before) -> None:
    if done.stood >= 0:
        tell_planned_loss(report, done)
    else:
        tell_unplanned_loss(report, done, done.new, before)
    if done.new.address not in choice.needed:
        hint = "look at the Sentinels' logs; the account above is of the one that was promoted"
        report.warn("another replica was promoted", hint, value=done.new.address, expected=choice.candidate)
    down = [member.address for member in group.others if member.problem]
    old = [] if done.stood >= 0 else [choice.master]
    living = [address for address in group.members if address not in (*down, *old, done.new.address)]
    verify_after(report, block, done.new.address, living, [*down, *old])
    report.measure("redis replica")
    report.outcome = f"{done.new.address} is the master; {done.old} was"
