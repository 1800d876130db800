"""Failover of PostgreSQL (§8.3): the standby becomes the primary, the loss is known, the old primary follows."""

from __future__ import annotations

import time
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.recovery.postgres import rejoin
from flows.recovery.postgres.findings import MIB, feeds_old_wal, judge
from flows.recovery.postgres.gate import planned_loss
from flows.recovery.postgres.pair import Mode, ServerPair, read_pair, report_pair
from flows.recovery.postgres.promotion import (
    AGAIN,
    WRITE_SECONDS,
    Phases,
    acts,
    fence_again,
    redirect,
    settle,
    stop_and_promote,
)
from flows.recovery.postgres.rejoin import Method
from flows.recovery.postgres.summary import report_follow_up, report_loss, report_phases, report_promotion
from runbook.errors import OpsError, RunbookFailed
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.guard.loss import Loss
from runbook.guard.permit import Permit
from runbook.next import Next
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.application.connection_string import read_target, switch_target
from tasks.application.health import wait_healthy
from tasks.failover.feeding import feed
from tasks.failover.fencing import find_fencing, keep_down, mark_standby, named_person
from tasks.failover.ledger import FailoverLedger
from tasks.failover.marker import FailoverMarker
from tasks.failover.promotion import checkpoint, make_slots, promote, streams
from tasks.host.disk import is_here
from tasks.host.services import start_services, stop_services
from tasks.postgres.replication.synchronous import address, read_synchrony


@flow(name="postgres-failover", flow_run_name=RunName("postgres-failover {environment} {mode}"))
def postgres_failover(
    environment: str,
    mode: Mode = "planned",
    new_primary: str = "",
    fence: bool = False,
    fenced_by: str = "",
    max_lag_megabytes: Annotated[int, Field(ge=0, le=1_000_000)] = 16,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """フェイルオーバー手順: データベースフェイルオーバー（PostgreSQL） (§8.3)

    Makes the standby the primary. Use `planned` while the primary runs (before work on its host): it stops the primary
    cleanly and loses no acknowledged write. Use `unplanned` when the primary is dead: it proves that, lets the standby
    replay all WAL that was received anywhere, and reports which writes may be lost and why.

    What it changes: the old primary stays stopped, and starts only as a standby. The new primary takes writes on a new
    timeline, with its slots and the WAL receiver. The application's connection string names it, and the application is
    restarted. A planned failover also rejoins the old primary; after an unplanned one, run rejoin-standby. With an
    empty confirm it shows the plan and changes nothing. If it is killed, run it again: it continues, or shows the next
    step.

    Undo: a planned failover in the other direction. Evidence: the fence, the positions, seconds of decision, fencing,
    promotion and first acknowledged write, and the count of this run's acknowledged test writes.

    Departs from the manual: `pg_ctl promote` alone makes two primaries if the old one runs or is restarted by its
    supervisor, and loses what the standby has not replayed.

    Args:
        environment: Environment (lab, staging, production …)
        mode: planned: the primary is alive (no write is lost); unplanned: the primary is down
        new_primary: Server to promote, host:port. Empty: the other one. The plan's form has it filled in
        fence: Stop an unresponsive old primary by its service manager before the promotion (e.g. when it keeps
            restarting)
        fenced_by: Required if the old host cannot be reached: the person who stopped or isolated it, by the name in
            [alerts] or [approval], and how (e.g. Yamada, power off by iDRAC)
        max_lag_megabytes: Largest allowed lag of the standby, in MB. Beyond it, the promotion is refused
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook(
        "PostgreSQL failover", env, confirm, plan, changes=True, rank="recovery", name="postgres-failover"
    ) as report:
        started, phases = time.monotonic(), Phases()
        fenced_by = named_person(fenced_by, env)
        pair = read_pair(env, mode, new_primary)
        report_pair(report, "before", pair)
        if pair.course == "finish":
            return _finish(report, env, pair, phases)
        judge(report, env, pair, mode, fenced_by, fence, max_lag_megabytes * MIB)
        _plan(report, env, pair, fence)
        report.pin("new_primary", address(pair.new))
        report.pin_state("timeline", pair.old_timeline)
        permit = report.permit(*acts(env, pair), effect=_effect(report, pair))
        _judge_again(report, env, pair, mode, fenced_by, fence, max_lag_megabytes * MIB)
        phases.seconds["decision"] = time.monotonic() - started
        _fail_over(report, permit, env, pair, mode, fenced_by, fence, phases)
    return report


def _judge_again(
    report: Report, env: Environment, pair: ServerPair, mode: Mode, attested: str, fence: bool, limit: int
) -> None:
    """Judge everything again after the confirmation: nothing may have changed."""
    again = Report(report.runbook, report.environment)
    try:
        found = read_pair(env, mode, address(pair.new))
        if (found.course, found.target) != (pair.course, pair.target):
            raise OpsError(
                f"changed since the plan: it was {pair.target}, it is {found.target}",
                "run it again for a new plan",
            )
        if found.course == "take over" and found.will.received > pair.will.received:
            raise OpsError(
                f"{found.will.address} received more WAL since the plan: the old primary is running",
                "check the old primary",
            )
        judge(again, env, found, mode, attested, fence, limit)
    except RunbookFailed as error:
        raise OpsError(f"changed since the plan: {error.message}", "run it again for a new plan") from None


def _effect(report: Report, pair: ServerPair) -> Effect:
    loss = planned_loss(pair)
    report.pin_state("commits lost", "unknown" if loss.unknown else loss.count)
    return Effect(
        f"{address(pair.new)} becomes the primary instead of {address(pair.old)}",
        "rejoin-standby, then a planned failover back",
        (loss,),
        sum(step.seconds for step in report.plan_steps if step.step != "rejoin"),
    )


def _plan(report: Report, env: Environment, pair: ServerPair, fence: bool) -> None:
    report.fact("from → to", pair.target)
    if pair.course == "hand over":
        report.plan(
            "stop", f"{address(pair.old)} cleanly (fast shutdown): writes pause", seconds=1.0, by=[stop_services]
        )
    elif fence:
        stop = f"{address(pair.old)} through its supervisor, if that would restart it"
        report.plan("stop", stop, seconds=1.0, by=[stop_services])
    report.plan(
        "fence",
        "port closed, no restart, no process left; service disabled at boot; marked as a standby in its data directory",
        by=[find_fencing, keep_down],
    )
    more = ", and the old primary's own WAL" if feeds_old_wal(pair) else ""
    replay = f"on {address(pair.new)} all WAL that it and the WAL receiver have{more}"
    report.plan("replay", replay, seconds=1.0, by=[feed])
    promoted = f"{address(pair.new)}: pg_promote, then slots and the WAL receiver"
    report.plan("promote", promoted, seconds=1.0, by=[promote, make_slots])
    if env.has("application") and env.application.env_file:
        redirected = f"the application: {env.application.env_file}, then restart it"
        report.plan("redirect", redirected, seconds=10.0, by=[switch_target, wait_healthy])
    if pair.course == "hand over" and is_here(pair.old.host):
        rejoined = f"{address(pair.old)} as standby of {address(pair.new)}"
        report.plan("rejoin", rejoined, seconds=5.0, by=[mark_standby, start_services])


def _fail_over(
    report: Report,
    permit: Permit,
    env: Environment,
    pair: ServerPair,
    mode: Mode,
    attested: str,
    fence: bool,
    phases: Phases,
) -> None:
    servers = [pair.old, pair.new] if pair.course == "hand over" else [pair.new]
    with FailoverLedger(servers) as ledger:
        done = stop_and_promote(report, permit, env, pair, mode, attested, fence, phases, ledger)
        report.state_is(f"{address(pair.new)} is the primary, on timeline {done.promoted.timeline}", AGAIN)
        report_promotion(report, pair, done, attested)
        settle(report, permit, env, pair, done.promoted)
        first = ledger.wait_for(address(pair.new), WRITE_SECONDS)
        phases.seconds["first acknowledged write"] = first.at - done.promoted.began
        account = ledger.account(pair.new)
    report_loss(report, pair, done, account)
    redirect(report, permit, env, pair, phases, restart=True)
    _end(report, permit, env, pair, mode, phases)
    report.measure("database standby")


def _end(report: Report, permit: Permit, env: Environment, pair: ServerPair, mode: str, phases: Phases) -> None:
    """End every course: checkpoint, rejoin the old primary where possible, report."""
    checkpoint(pair.new)
    rejoined = False
    if mode == "planned" and is_here(pair.old.host):
        with phases.timed("rejoin"):
            joining = rejoin.read_joining(pair.new, pair.old)
            if not rejoin.is_joined(joining):
                rejoin.judge_joining(report, env, joining, "auto")
                rejoin.join(report, permit, env, joining, "auto")
        rejoined = True
    report_phases(report, phases)
    report_follow_up(report, env, pair, rejoined=rejoined)
    back = Next("postgres-failover", "", {"mode": "planned", "new_primary": address(pair.old)})
    report.undo_is(*([] if rejoined else [Next("rejoin-standby", "first")]), back)
    FailoverMarker.remove(env.reports_directory)
    report.outcome = f"{address(pair.new)} is the primary; {address(pair.old)} was"


def _finish(report: Report, env: Environment, pair: ServerPair, phases: Phases) -> Report:
    """The new primary already takes writes: finish what a killed run left, if anything."""
    new = address(pair.new)
    why = f"{new} already takes writes, on timeline {pair.will.timeline}"
    report.fact("primary", why)
    left = _unfinished(env, pair)
    if not left:
        report.outcome = f"nothing to do: {why}"
        return report
    for what in left:
        report.plan("finish", what)
    lost: tuple[Loss, ...] = ()
    if pair.marker and pair.marker.mode == "planned" and is_here(pair.old.host):
        lost = (rejoin.diverged_loss(rejoin.read_joining(pair.new, pair.old)),)
    effect = Effect(f"the failover to {new} is finished", "rejoin-standby, then a planned failover back", lost)
    permit = report.permit(*acts(env, pair), effect=effect)
    report.state_is(f"{new} is the primary, on timeline {pair.will.timeline}", AGAIN)
    fence_again(report, permit, env, pair)
    settle(report, permit, env, pair, None)
    with FailoverLedger([pair.new]) as ledger:
        ledger.wait_for(new, WRITE_SECONDS)
        ledger.account(pair.new)
    redirect(report, permit, env, pair, phases, restart=pair.marker is not None)
    _end(report, permit, env, pair, pair.marker.mode if pair.marker else "unplanned", phases)
    report.outcome = f"nothing to promote: {why}; the unfinished steps are done"
    return report


def _unfinished(env: Environment, pair: ServerPair) -> list[str]:
    """The unfinished steps for a primary that takes writes."""
    found, wal = [], pair.wal
    if pair.marker:
        found.append(f"the failover from {pair.marker.old} that {pair.marker.run} began at {pair.marker.started}")
    if wal and wal.service in env.services.names and not streams(pair.new, wal.name):
        found.append(f"the WAL receiver does not stream from {address(pair.new)}")
    if read_synchrony(pair.new).hangs:
        found.append("commits hang: none of their standbys is connected")
    if env.has("application") and env.application.env_file:
        target = read_target(env.application)
        if address(pair.new) not in target.split(","):
            found.append(f"the application's connection string names {target}")
    return found


@flow(name="rejoin-standby", flow_run_name=RunName("rejoin-standby {environment} {method}"))
def rejoin_standby(environment: str, method: Method = "auto", plan: str = "", confirm: str = "") -> Report:
    """旧プライマリのスタンバイとしての再参加 (§8.3)

    Makes the other server a standby of the primary: the old primary after a failover, or a standby that is too far
    behind. It uses pg_rewind if possible, otherwise a new base backup. It first saves the WAL that only this server
    has.

    What it changes: that server's data directory. Commits wait for it again if the configuration requires that. With an
    empty confirm it shows the plan and changes nothing. If it is killed, run it again.

    Undo: a base backup keeps the old files; a rewind cannot be undone, but the diverged WAL is kept. Evidence: the
    method, its seconds, the WAL that only this server had, and that it streams.

    Args:
        environment: Environment (lab, staging, production …)
        method: auto: pg_rewind, else a base backup. rewind, base_backup: only that
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Rejoin standby", env, confirm, plan, changes=True, rank="recovery") as report:
        if not env.has("standby"):
            raise OpsError("the environment has no standby", "add [standby] to its TOML")
        joining = rejoin.read_joining(env.postgres, env.standby)
        report.fact("primary", address(joining.primary))
        if rejoin.is_joined(joining):
            report.outcome = f"nothing to do: {address(joining.node)} streams from {address(joining.primary)}"
            return report
        rejoin.judge_joining(report, env, joining, method)
        rejoin.plan_joining(report, joining, method)
        report.pin_state("roles", f"{address(joining.node)} behind {address(joining.primary)}")
        loss = rejoin.diverged_loss(joining)
        report.pin_state("commits lost", "unknown" if loss.unknown else loss.count)
        effect = Effect(f"{address(joining.node)} becomes a standby of {address(joining.primary)}", "", (loss,))
        permit = report.permit(*rejoin.rejoin_acts(joining), effect=effect)
        rejoin.join(report, permit, env, joining, method)
        report.outcome = f"{address(joining.node)} is a standby of {address(joining.primary)}"
    return report
