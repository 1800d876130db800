"""Failover of PostgreSQL (§8.3): the standby becomes the primary, the loss is known, the old primary follows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from blocks.environment import Environment
from flows.recovery.postgres.application import names_another, plan_application
from flows.recovery.postgres.findings import MIB, judge
from flows.recovery.postgres.gate import planned_loss
from flows.recovery.postgres.pair import Mode, ServerPair, read_pair, report_pair
from flows.recovery.postgres.promotion import AGAIN, Done, Failover, Fenced, Replayed
from flows.recovery.postgres.rejoin import Rejoin, find_unattached
from flows.recovery.postgres.rejoin_checks import Method, diverged_loss, is_joined, judge_joining, read_joining
from flows.recovery.postgres.summary import report_follow_up, report_loss, report_phases, report_promotion
from runbook.change import Carrier, Change, Line, State, carrying_out
from runbook.errors import OpsError, RunbookFailed
from runbook.flow import flow
from runbook.guard.effect import Effect, NoUndo
from runbook.guard.loss import Loss
from runbook.next import Next
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.failover.feeding import Fed
from tasks.failover.fencing import named_person
from tasks.failover.ledger import FailoverLedger
from tasks.failover.marker import FailoverMarker
from tasks.failover.promotion import Promoted, streams
from tasks.host.disk import is_here
from tasks.postgres.replication.synchronous import address, read_synchrony

WRITE_SECONDS = 60.0


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
        started = time.monotonic()
        fenced_by = named_person(fenced_by, env)
        pair = read_pair(env, mode, new_primary)
        report_pair(report, "before", pair)
        failover = Failover(report, env, pair, mode, fenced_by, fence)
        if pair.course == "finish":
            _finish(failover)
            return report
        judge(report, env, pair, mode, fenced_by, fence, max_lag_megabytes * MIB)
        report.fact("from → to", pair.target)
        lines, loss = FailoverLines.of(failover), planned_loss(pair)
        pins = [lambda report: _pin(report, pair, loss)]
        with carrying_out(report, *lines.all(), effect=_effect(pair, loss, lines), pins=pins) as carry:
            _judge_again(report, env, pair, mode, fenced_by, fence, max_lag_megabytes * MIB)
            failover.phases.seconds["decision"] = time.monotonic() - started
            _fail_over(failover, lines, carry)
    return report


@dataclass(frozen=True)
class SettlingLines:
    """What follows a promotion, in order. `application` is None without one, `rejoin` and `reattach` are None where the
    old primary does not rejoin in this run."""

    attach: Change[[], None]
    application: Line[[], None] | None
    checkpoint: Change[[], float]
    rejoin: Change[[], None] | None = None
    reattach: Change[[], None] | None = None

    @staticmethod
    def of(failover: Failover, mode: str, *, restart: bool, begun: State | None = None) -> SettlingLines:
        """Plan them. `mode`: of the promotion; `restart`: whether the application needs it in any case."""
        report, env, pair = failover.report, failover.env, failover.pair
        application = plan_application(report, env, pair.new, failover.phases, restart=restart)
        attach, checkpoint = failover.attaching(begun), failover.noting_timeline()
        if mode != "planned" or not is_here(pair.old.host):
            return SettlingLines(attach, application, checkpoint)
        rejoin = Rejoin(report, env, pair.new, pair.old, "auto")
        return SettlingLines(attach, application, checkpoint, rejoin.in_one_line(), rejoin.reattaching())

    def all(self) -> list[Line[..., Any]]:
        """Return the lines of the plan."""
        lines: list[Line[..., Any] | None] = [self.attach, self.application, self.checkpoint, self.rejoin]
        return [line for line in (*lines, self.reattach) if line]


@dataclass(frozen=True)
class FailoverLines:
    """The lines of a failover, in order. `checkpoint`: before a running primary is stopped."""

    checkpoint: Change[[], float] | None
    fence: Change[[], Fenced]
    replay: Change[[Fenced], Replayed]
    promote: Change[[Fed], Promoted]
    settling: SettlingLines

    @staticmethod
    def of(failover: Failover) -> FailoverLines:
        """Plan them."""
        return FailoverLines(
            failover.checkpointing() if failover.is_planned else None,
            failover.fencing(),
            failover.replaying(),
            failover.promoting(),
            SettlingLines.of(failover, failover.mode, restart=True),
        )

    def all(self) -> list[Line[..., Any]]:
        """Return the lines of the plan."""
        first: list[Line[..., Any]] = [self.checkpoint] if self.checkpoint else []
        return [*first, self.fence, self.replay, self.promote, *self.settling.all()]


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


def _pin(report: Report, pair: ServerPair, loss: Loss) -> None:
    report.pin("new_primary", address(pair.new))
    report.pin_state("timeline", pair.old_timeline)
    report.pin_state("commits lost", "unknown" if loss.unknown else loss.count)


def _effect(pair: ServerPair, loss: Loss, lines: FailoverLines) -> Effect:
    steps = [step for line in lines.all() for step in line.planned]
    return Effect(
        f"{address(pair.new)} becomes the primary instead of {address(pair.old)}",
        "rejoin-standby, then a planned failover back",
        (loss,),
        sum(step.seconds for step in steps if step.step != "rejoin"),
    )


def _fail_over(failover: Failover, lines: FailoverLines, carry: Carrier) -> None:
    report, pair, phases = failover.report, failover.pair, failover.phases
    servers = [pair.old, pair.new] if failover.is_planned else [pair.new]
    with FailoverLedger(servers) as ledger:
        if lines.checkpoint:
            ledger.wait_for(address(pair.old), WRITE_SECONDS)
            carry(lines.checkpoint)
        fenced = carry(lines.fence)
        replayed = carry(lines.replay, fenced)
        done = Done(fenced, replayed, carry(lines.promote, replayed.fed))
        report_promotion(report, pair, done, failover.attested)
        carry(lines.settling.attach)
        first = ledger.wait_for(address(pair.new), WRITE_SECONDS)
        phases.seconds["first acknowledged write"] = first.at - done.promoted.began
        account = ledger.account(pair.new)
    report_loss(report, pair, done, account)
    _settle(failover, lines.settling, carry)
    report.measure("database standby")


def _settle(failover: Failover, lines: SettlingLines, carry: Carrier) -> None:
    """End every course: the application, a checkpoint, the rejoin of the old primary where possible, the report."""
    report, env, pair, phases = failover.report, failover.env, failover.pair, failover.phases
    if lines.application:
        carry(lines.application)
    carry(lines.checkpoint)
    if lines.rejoin and lines.reattach:
        with phases.timed("rejoin"):
            joining = read_joining(pair.new, pair.old)
            if is_joined(joining):
                carry.skip(lines.rejoin, f"{address(pair.old)} streams from {address(pair.new)}")
            else:
                judge_joining(report, env, joining, "auto")
                carry(lines.rejoin)
            carry(lines.reattach)
    rejoined = lines.rejoin is not None
    report_phases(report, phases)
    report_follow_up(report, env, pair, rejoined=rejoined)
    back = Next("postgres-failover", "", {"mode": "planned", "new_primary": address(pair.old)})
    report.undo_is(*([] if rejoined else [Next("rejoin-standby", "first")]), back)
    FailoverMarker.remove(env.reports_directory)
    report.outcome = f"{address(pair.new)} is the primary; {address(pair.old)} was"


def _finish(failover: Failover) -> None:
    """The new primary already takes writes: finish what a killed run left, if anything."""
    report, env, pair = failover.report, failover.env, failover.pair
    new = address(pair.new)
    why = f"{new} already takes writes, on timeline {pair.will.timeline}"
    report.fact("primary", why)
    left = _unfinished(env, pair)
    if not left:
        report.outcome = f"nothing to do: {why}"
        return
    report.table("Unfinished", ("what",), [(what,) for what in left])
    begun = State(f"{new} is the primary, on timeline {pair.will.timeline}", AGAIN)
    mode = pair.marker.mode if pair.marker else "unplanned"
    fence = [] if pair.was.follows else [failover.fencing_again(begun)]
    lines = SettlingLines.of(failover, mode, restart=pair.marker is not None, begun=begun)
    lost = (diverged_loss(read_joining(pair.new, pair.old)),) if lines.rejoin else ()
    effect = Effect(f"the failover to {new} is finished", "rejoin-standby, then a planned failover back", lost)
    with carrying_out(report, *fence, *lines.all(), effect=effect) as carry:
        for line in fence:
            carry(line)
        carry(lines.attach)
        with FailoverLedger([pair.new]) as ledger:
            ledger.wait_for(new, WRITE_SECONDS)
            ledger.account(pair.new)
        _settle(failover, lines, carry)
    report.outcome = f"nothing to promote: {why}; the unfinished steps are done"


def _unfinished(env: Environment, pair: ServerPair) -> list[str]:
    """The unfinished steps for a primary that takes writes."""
    found, wal = [], pair.wal
    if pair.marker:
        found.append(f"the failover from {pair.marker.old} that {pair.marker.run} began at {pair.marker.started}")
    if wal and wal.service in env.services.names and not streams(pair.new, wal.name):
        found.append(f"the WAL receiver does not stream from {address(pair.new)}")
    if read_synchrony(pair.new).hangs:
        found.append("commits hang: none of their standbys is connected")
    if target := names_another(env, pair.new):
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
        joining = read_joining(env.postgres, env.standby)
        report.fact("primary", address(joining.primary))
        rejoin = Rejoin(report, env, joining.primary, joining.node, method)
        roles = f"{address(joining.node)} behind {address(joining.primary)}"
        if is_joined(joining):
            _reattach(rejoin, [lambda report: report.pin_state("roles", roles)])
            return report
        lines, loss = rejoin.lines(joining), diverged_loss(joining)
        lost = "unknown" if loss.unknown else loss.count
        pins = [lambda report: report.pin_state("roles", roles), lambda report: report.pin_state("commits lost", lost)]
        effect = Effect(f"{address(joining.node)} becomes a standby of {address(joining.primary)}", "", (loss,))
        with carrying_out(report, *lines.all(), effect=effect, pins=pins) as carry:
            lines.carry_out(carry)
        report.outcome = f"{address(joining.node)} is a standby of {address(joining.primary)}"
    return report


def _reattach(rejoin: Rejoin, pins: list[Callable[[Report], object]]) -> None:
    """The server already streams: finish what a killed run left, if anything."""
    report, node, primary = rejoin.report, rejoin.node, rejoin.primary
    left = find_unattached(rejoin.env, primary)
    if not left:
        report.outcome = f"nothing to do: {address(node)} streams from {address(primary)}"
        return
    report.table("Unfinished", ("what",), [(what,) for what in left])
    line, effect = rejoin.reattaching(), Effect(f"the rejoin of {address(node)} is finished", NoUndo(NO_DATA))
    with carrying_out(report, line, effect=effect, pins=pins) as carry:
        carry(line)
    report.outcome = f"{address(node)} streams from {address(primary)}; the unfinished steps are done"


NO_DATA = "no data is replaced"
