"""Failover of Redis with Sentinels (§8.3): a replica becomes the master, and the loss is known."""

from __future__ import annotations

import time
from dataclasses import replace

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows.loss import require_confirmed
from flows.recovery.redis.choice import choose, require_unchanged
from flows.recovery.redis.findings import Mode, judge_dead, judge_living, judge_sentinels, report_servers
from flows.recovery.redis.loss import (
    Before,
    FailoverGate,
    interrupted_loss,
    report_interrupted_loss,
    report_planned_loss,
    report_unplanned_loss,
)
from flows.recovery.redis.progress import report_phases, settled, verify_after
from runbook import clock
from runbook.change import Change, Check, State, carrying_out
from runbook.errors import OpsError, RunbookFailed
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.guard.loss import Loss
from runbook.guard.permit import PlannedStep
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.redis.failover.group import Group, GroupMember, read_group, read_member
from tasks.redis.failover.handover import hand_over, make_follow, take_over
from tasks.redis.failover.ledger import RedisFailoverMarker
from tasks.redis.failover.pause import LONGEST_SECONDS
from tasks.redis.failover.promotion import HandOver, PromotionChoice
from tasks.redis.failover.rights import find_refused_commands
from tasks.redis.restore.survivors import PART
from tasks.redis.topology.topology import find_record

RECENT_SECONDS = 3600.0
CONTINUE = "run it again: it continues, or reports the present master"


@flow(name="redis-failover", flow_run_name=RunName("redis-failover {environment} {mode}"))
def redis_failover(
    environment: str, mode: Mode = "planned", new_master: str = "", plan: str = "", confirm: str = ""
) -> Report:
    """Redisフェイルオーバー（Redis Sentinel使用時） (§8.3)

    Makes a replica the master. Use `planned` while the master runs (before work on its host): it proves that no
    acknowledged write is lost. Use `unplanned` when the master is dead: it waits for the Sentinels' failover, starts
    one if they do not, and reports which writes may be lost. It starts none if the replica lacks more than the plan
    said.

    What it changes: a planned failover pauses writes (CLIENT PAUSE WRITE; it ends 10 s after a killed run) until the
    replica has every byte. Then the Sentinels switch, and the old master follows the new one. With an empty confirm it
    shows the plan and changes nothing. If it is killed, run it again: it continues, or reports the present master.

    Undo: run it again with new_master set to the old master. Evidence: offsets, the Sentinels' views before and after,
    seconds of decision, switch and first acknowledged write, and the count of this run's acknowledged test writes.

    Departs from the manual: a plain SENTINEL FAILOVER loses acknowledged writes; it queries all Sentinels, not one.

    Args:
        environment: Environment (lab, staging, production …)
        mode: planned: the master is alive (no write is lost); unplanned: the master is down
        new_master: Replica to promote, host:port. Empty: Sentinel chooses
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Redis failover", env, confirm, plan, changes=True, rank="recovery") as report:
        started, block = time.monotonic(), env.redis
        _require_sentinels(block, mode)
        group = read_group(block)
        before = Before.read(block, group, env.reports_directory)
        group = settled(block, group) if mode == "unplanned" else group
        report_servers(report, "before", group)
        kept = None if group.watch.master else find_record(env.reports_directory)
        judge_sentinels(report, group, mode, kept.since if kept else "")
        if _is_done(report, block, group, mode, new_master, before):
            return report
        choice = _judge(report, block, group, mode, new_master, before)
        report.fact("from → to", choice.target)
        switching, proving = _plan(block, choice, mode, FailoverGate(report, block, before))
        with carrying_out(report, switching, proving, effect=_effect(block, choice, mode, before)) as carry:
            _judge_again(report, block, choice, mode, new_master, before)
            decision = time.monotonic() - started
            done = carry(switching)
            report_phases(report, decision, done)
            carry(proving, report, block, group, choice, done, before)
    return report


def _require_sentinels(block: Redis, mode: str) -> None:
    if not (block.sentinels and block.sentinel_master):
        raise OpsError(
            "no Sentinels monitor this Redis",
            "set [redis] sentinels and sentinel_master; without Sentinels run REPLICAOF NO ONE on the replica",
        )
    if mode not in ("planned", "unplanned"):
        raise OpsError(f"mode is “{mode}”", "choose planned or unplanned")


def _judge(report: Report, block: Redis, group: Group, mode: Mode, wanted: str, before: Before) -> PromotionChoice:
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
    worst = Status.CRITICAL if mode == "planned" else Status.WARN  # a dead master is replaced anyway
    for error in refused:
        report.fail(f"rights on {where}", error.hint, value=error.message, worst=worst)
    if not refused:
        report.passed(f"rights on {where}", value="every command of the failover is allowed")


def _judge_again(
    report: Report, block: Redis, choice: PromotionChoice, mode: Mode, wanted: str, before: Before
) -> None:
    again = Report(report.runbook, report.environment)
    try:
        group = read_group(block)
        if mode == "unplanned" and any(
            group.members[name].is_master for name in choice.replicas if name in group.members
        ):
            return  # the Sentinels were faster, as usual: the run only waits until they agree
        judge_sentinels(again, group, mode)
        require_unchanged(choice, _judge(again, block, group, mode, wanted, before))
    except RunbookFailed as error:
        raise OpsError(f"changed since the plan: {error.message}", "run it again for a new plan") from None


def _effect(block: Redis, choice: PromotionChoice, mode: Mode, before: Before) -> Effect:
    what = f"{choice.candidate} becomes the master instead of {choice.master}"
    back = f"redis-failover with mode=planned, new_master={choice.master}"
    if mode == "planned":
        return Effect(what, back, (Loss(PART),), "writes pause for about 1 s")
    return Effect(what, back, (before.loss_with(read_member(block, choice.candidate)),), 3.0)


def _plan(
    block: Redis, choice: PromotionChoice, mode: Mode, gate: FailoverGate
) -> tuple[Change[[], HandOver], Check[[Report, Redis, Group, PromotionChoice, HandOver, Before], None]]:
    """The failover, and the proof of it."""
    sentinel = choice.sentinels[0]
    pins = [lambda report: report.pin_state("master", choice.master)]
    if mode == "unplanned":
        switching = Change(
            take_over.bind(block, choice, gate),
            "wait",
            "for a failover by the Sentinels",
            seconds=3.0,
            more=[PlannedStep("fail over", f"{choice.target}, if they start none: SENTINEL FAILOVER, at {sentinel}")],
            pins=pins,
            begun=State(f"a failover {choice.target} may have begun", CONTINUE),
            done=_is_switched,
        )
        proof = "all Sentinels name one master; a Sentinel client writes; possible loss"
        return switching, Check(_report_results, "verify", proof)
    how = "SENTINEL FAILOVER … COORDINATED" if choice.coordinated else "SENTINEL FAILOVER, then REPLICAOF"
    switching = Change(
        hand_over.bind(block, choice),
        "pause writes",
        f"on {choice.master}, until {', '.join(choice.needed)} has every byte",
        seconds=0.1,
        more=[PlannedStep("fail over", f"{choice.target}: {how}, at {sentinel}", seconds=1.0)],
        pins=[*pins, lambda report: report.pin("new_master", choice.candidate)],
        begun=State(
            f"a failover {choice.target} has begun; paused writes on {choice.master} resume within "
            f"{LONGEST_SECONDS:.0f} s",
            CONTINUE,
        ),
        done=_is_switched,
    )
    proof = "all Sentinels name one master; a Sentinel client writes"
    follow = PlannedStep("follow", f"{choice.master} becomes a replica and synchronises", seconds=2.0)
    return switching, Check(_report_results, "verify", proof, seconds=0.5, more=[follow])


def _is_switched(done: HandOver) -> State:
    return State(f"{done.new.address} is the master", "run it again: it reports which replicas follow")


def _is_done(report: Report, block: Redis, group: Group, mode: Mode, wanted: str, before: Before) -> bool:
    """Whether nothing is left to do: an earlier run, or the Sentinels, did it."""
    master = group.master
    if master is None or not master.is_master:
        return False
    marker = RedisFailoverMarker.find_in(block.at(master.address))
    interrupted = marker if marker and marker.old != master.address else None
    why = ""
    if interrupted and wanted in ("", master.address):
        why = f"the failover from {interrupted.old} that {interrupted.run} began at {interrupted.started} is done"
    elif wanted == master.address:
        why = "it is the requested one"
    elif mode == "unplanned" and (dead := _former(group)):
        why = f"the Sentinels have already failed over from {dead}"
    if not why:
        return False
    report.fact("master", f"{master.address}: {why}")
    report.outcome = f"nothing to do: {master.address} is the master; {why}"
    stray = _finish(report, block, group, interrupted, master) if interrupted else None
    if mode == "unplanned":
        report_unplanned_loss(report, None, master, before)
    down = [member.address for member in group.others if member.problem]
    verify_after(report, block, master.address, [m.address for m in group.others if not m.problem], down)
    if interrupted:  # once it follows, the old master reports how much it had
        left = stray or read_group(block).members.get(interrupted.old)
        report_interrupted_loss(report, interrupted, left, master)
    return True


def _finish(
    report: Report, block: Redis, group: Group, marker: RedisFailoverMarker, new: GroupMember
) -> GroupMember | None:
    """Clean up after a killed run: its marker, and the old master if it still is one (returned as it was)."""
    left = group.members.get(marker.old)
    if left and left.is_master:
        planned = interrupted_loss(marker, left, new)
        shown = planned if planned.unknown else replace(planned, as_of=clock.now())

        def gate(now: GroupMember) -> None:
            require_confirmed(report, interrupted_loss(marker, now, new, planned))

        following = Change(
            make_follow.bind(block, left.address, new.address, gate),
            "make it follow",
            f"{left.address} still is a master: REPLICAOF {new.address}",
        )
        effect = Effect(f"{left.address} follows {new.address}", "", (shown,))
        with carrying_out(report, following, effect=effect) as carry:
            left = carry(following)
    if report.confirm == report.environment:
        RedisFailoverMarker.remove_from(block.at(new.address))
    return left if left and left.is_master else None


def _former(group: Group) -> str:
    """The likely previous master: a server that is down while the present master was promoted recently."""
    master = group.master
    recent = all(view.master_since_seconds < RECENT_SECONDS for view in group.watch.answering)
    down = [member.address for member in group.others if member.dead]
    return down[0] if master and master.promoted_at >= 0 and recent and down else ""


def _report_results(
    report: Report, block: Redis, group: Group, choice: PromotionChoice, done: HandOver, before: Before
) -> None:
    if done.stood >= 0:
        report_planned_loss(report, done)
    else:
        report_unplanned_loss(report, done, done.new, before)
    if done.new.address not in choice.needed:
        hint = "check the Sentinels' logs; the counts above are those of the promoted one"
        report.warn("another replica was promoted", hint, value=done.new.address, expected=choice.candidate)
    down = [member.address for member in group.others if member.problem]
    old = [] if done.stood >= 0 else [choice.master]
    living = [address for address in group.members if address not in (*down, *old, done.new.address)]
    verify_after(report, block, done.new.address, living, [*down, *old])
    report.measure("redis replica")
    report.outcome = f"{done.new.address} is the master; {done.old} was"
