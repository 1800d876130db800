"""The steps of a PostgreSQL failover (§8.3): fence, replay, promote, then slots, WAL receiver and application."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from blocks.environment import Environment
from blocks.postgres import nodes
from blocks.postgres.server import Postgres
from blocks.postgres.wal import Wal
from blocks.services.service import DockerServices
from flows.branch import record_branch
from flows.database.waiting_commits import alone_act
from flows.recovery.postgres.findings import feeds_old_wal
from flows.recovery.postgres.gate import PromotionLoss, pass_promotion
from flows.recovery.postgres.pair import Mode, ServerPair
from runbook.errors import OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.guard.permit import Act, Permit
from runbook.kinds import permitted_by
from runbook.next import Next
from runbook.report import Report
from tasks.application.connection_string import SWITCH, switch_target
from tasks.application.health import wait_healthy
from tasks.failover.feeding import FEED, Fed, Feeding, feed
from tasks.failover.fencing import (
    FENCE,
    SIGNAL,
    FenceEvidence,
    Fencing,
    allow_start,
    find_fencing,
    keep_down,
    remove_signal,
)
from tasks.failover.ledger import FailoverLedger
from tasks.failover.marker import FailoverMarker
from tasks.failover.member import MemberControl, ask_member, read_control
from tasks.failover.numbers import write_histories
from tasks.failover.promotion import (
    ATTACH_SECONDS,
    PROMOTE,
    Promoted,
    checkpoint,
    commits_return,
    make_slots,
    promote,
    promotion,
    start_receiver,
    wait_for_stream,
)
from tasks.failover.rejoin import REJOIN
from tasks.host.services import start_services, started_if_cancelled, stop_services
from tasks.postgres.replication.synchronous import ALONE, address, commit_alone, read_synchrony
from tasks.wal.archive.destinations import archive_of

WRITE_SECONDS = 60.0
HEALTH_SECONDS = 120
RETURN_SECONDS = 5.0
"""The standbys have attached by then; the server still has to notice it."""
AGAIN = "run it again: it continues, or shows the next step"


@dataclass
class Phases:
    """Seconds of each finished phase, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure one phase."""
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


def acts(env: Environment, pair: ServerPair) -> list[Act]:
    """The acts of this failover that need a permit."""
    old, new = address(pair.old), address(pair.new)
    needed = [Act(FENCE, old), Act(FEED, new), Act(PROMOTE, promotion(pair.old, pair.new)), Act(ALONE, new)]
    needed.append(Act(REJOIN, old))
    if env.has("application") and env.application.env_file:
        needed.append(Act(SWITCH, env.application.env_file))
    return [*needed, alone_act(env)]


@dataclass(frozen=True)
class Done:
    """A promotion with its proofs. `kept_down`: whether the old primary's files are marked as a standby's; `lost`: by
    the gate."""

    fencing: Fencing
    kept_down: FenceEvidence
    fed: Fed
    lost: PromotionLoss
    promoted: Promoted


def stop_and_promote(
    report: Report,
    permit: Permit,
    env: Environment,
    pair: ServerPair,
    mode: Mode,
    attested: str,
    fence: bool,
    phases: Phases,
    ledger: FailoverLedger,
) -> Done:
    """Fence the old primary, and promote the new one until it takes writes.

    Raises:
        OpsError: it was not promoted. After a planned failover, a cancelled one too, the old primary takes writes
            again.
    """
    planned, receives = pair.course == "hand over", _receives(env, pair)
    if planned:
        ledger.wait_for(address(pair.old), WRITE_SECONDS)
        checkpoint(pair.old)
    FailoverMarker(old=address(pair.old), new=address(pair.new), mode=mode).write(env.reports_directory)
    failpoint("failover: remembered")
    report.state_is(f"{address(pair.old)} is stopped, and no server was promoted: none takes writes", AGAIN)
    try:
        with phases.timed("fencing"):
            control, fencing, kept = _fence(permit, env, pair, attested, stop=planned or fence)
        with phases.timed("replay of the tail"):
            old = pair.old if feeds_old_wal(pair) else None
            clean = control if control and control.shut_down else None
            fed = feed.after(kept)(permit, Feeding(pair.new, pair.wal, clean, old))
            lost = pass_promotion(report, pair, fed)
    except BaseException as error:
        if planned:  # this run stopped a primary that took writes
            _go_back(report, env, pair)
        elif isinstance(error, OpsError):
            _let_go(report, env, pair, receives=receives)
        raise
    if env.has("wal"):
        keep_numbers(env, pair.new, fed)
    promoted = promote.after(lost)(permit, env.services, pair.old, pair.new, attested)
    phases.seconds["promote"] = promoted.seconds
    env.forget_roles()
    return Done(promoted.fencing if promoted.fencing.proven else fencing, kept, fed, lost, promoted)


def keep_numbers(env: Environment, standby: Postgres, fed: Fed) -> None:
    """Give a standby the histories of branches that were left, so that its promotion does not take one's number again.
    Those that it could still follow are left out: it would, instead of being promoted."""
    system = ask_member(standby).system
    with contextlib.suppress(OpsError, OSError):  # the archive does not answer: a failover does not wait for it
        write_histories(standby, archive_of(env, "backups", system), fed.timeline, fed.place)


def _fence(
    permit: Permit, env: Environment, pair: ServerPair, attested: str, *, stop: bool
) -> tuple[MemberControl | None, Fencing, FenceEvidence]:
    """Stop the old primary if the run has to, prove its fence, and mark it as a standby."""
    stopped: object = None
    if stop:
        stopped = stop_services(env.services, [pair.old.service])
        failpoint("failover: old primary stopped")
    if pair.wal and pair.wal.service in env.services.names:  # so that it starts at once later, not after its 5 s
        with contextlib.suppress(Unreachable):  # its host may be down; the run checks later whether it streams
            stopped = stop_services.after(stopped)(env.services, [pair.wal.service])
    control = read_control.after(stopped)(pair.old)
    if pair.course == "hand over" and control and not control.shut_down:
        raise OpsError(
            f"{address(pair.old)} did not shut down cleanly: “{control.state}”",
            "check its log, then run this again, with mode=unplanned if the old primary does not start",
        )
    fencing = find_fencing.after(control)(env.services, pair.old)
    fencing.require(attested, kept_down=False)
    return control, fencing, keep_down.after(fencing)(permit, env.services, pair.old)


def _go_back(report: Report, env: Environment, pair: ServerPair) -> None:
    """Undo a planned failover that cannot continue: the old primary takes writes again."""
    roles = [pair.old.service, *([pair.wal.service] if pair.wal and pair.wal.service in env.services.names else [])]
    try:
        allow_start(env.services, pair.old.service)
        remove_signal(pair.old)
        start_services(env.services, roles)
    except (OpsError, OSError) as error:
        report.fail(
            "the old primary started again", f"start {pair.old.service} by hand, without {SIGNAL}", value=str(error)
        )
        return
    FailoverMarker.remove(env.reports_directory)
    report.state_is(
        f"no server was promoted; {address(pair.old)} was started again, and takes writes",
        "fix the findings above, then run it again",
    )


def _receives(env: Environment, pair: ServerPair) -> bool:
    """Whether the WAL receiver's service runs, or is being started."""
    if not (pair.wal and pair.wal.service in env.services.names):
        return False
    with contextlib.suppress(OpsError):  # its host may be down
        return env.services.state(pair.wal.service).comes_back
    return False


def _let_go(report: Report, env: Environment, pair: ServerPair, *, receives: bool) -> None:
    """Undo an unplanned failover that cannot continue: the old primary must take writes again when it is started. A
    server that was a standby stays one. `receives`: the WAL receiver ran before."""
    if receives and pair.wal:
        start_receiver(env.services, pair.wal.service)
    control = read_control(pair.old)
    if control and control.was_standby:
        return
    with contextlib.suppress(OpsError):  # the run reports the error that led here
        allow_start(env.services, pair.old.service)
    remove_signal(pair.old)
    FailoverMarker.remove(env.reports_directory)
    report.state_is(
        f"no server was promoted; {address(pair.old)} is stopped, and is the primary when it is started",
        "fix the finding above, then run it again; or start the old primary",
    )


def fence_again(report: Report, permit: Permit, env: Environment, pair: ServerPair) -> None:
    """Fence the old primary of a finished promotion, unless it already follows the new one."""
    if pair.was.follows:
        return
    fencing = find_fencing(env.services, pair.old)
    for row in fencing.against:
        report.warn(
            f"the old primary: {row.what}", f"stop its service {pair.old.service}, then rejoin-standby", value=row.seen
        )
    if not fencing.against:
        keep_down.after(fencing)(permit, env.services, pair.old)


def settle(report: Report, permit: Permit, env: Environment, pair: ServerPair, after: object) -> None:
    """Record the timeline in use, create the slots, start the WAL receiver, and make commits return. Idempotent."""
    wal = pair.wal
    if state := nodes.ask(pair.new):
        record_branch(report, env, state.system, state.timeline, after=after)
    made = make_slots.after(after)(pair.new, [wal.slot if wal else "", pair.old.slot])
    if wal and wal.service in env.services.names:
        refused = start_receiver.after(made)(env.services, wal.service)
        judge_receiver(report, pair.new, wal, 0 if refused else ATTACH_SECONDS)
    if not commits_return(pair.new, RETURN_SECONDS):
        found = read_synchrony.after(made)(pair.new)
        with permitted_by(permit):
            commit_alone.bind(pair.new)()
        report.warn(
            "commits wait for no standby",
            "rejoin the other server: until then a failure of this one loses acknowledged writes",
            value=f"no synchronous standby is connected ({found.names}): the setting was overridden",
            expected=found.names,
            follow=[Next("rejoin-standby", "rejoin the other server")],
        )


def judge_receiver(report: Report, primary: Postgres, wal: Wal, seconds: float = ATTACH_SECONDS) -> None:
    """Judge whether it streams from the primary within `seconds`."""
    attached = wait_for_stream(primary, wal.name, seconds)
    value = f"{wal.name} {'streams' if attached else 'does not stream'} from {address(primary)}"
    hint = "check its log; its connection string must name both servers, with target_session_attrs=primary"
    report.prefer("WAL receiver", attached, hint, value=value, expected="streaming")


def redirect(
    report: Report, permit: Permit, env: Environment, pair: ServerPair, phases: Phases, *, restart: bool
) -> None:
    """Change the application's connection string, restart it, and wait until it is healthy.

    Raises:
        OpsError: it does not become healthy.
    """
    if not env.has("application"):
        return
    changed = False
    last: object = None
    with phases.timed("application"):
        if env.application.env_file:
            switched = switch_target(permit, env.application, pair.new)
            changed, last = switched.changed, switched
            report.fact("connection string", f"{switched.before} → {switched.after}" if changed else switched.after)
        else:
            report.warn(
                "connection string of the application",
                "change it by hand and restart the application; set its file in [application] env_file",
                value="[application] env_file is not set",
            )
        roles = env.services_in(("backend",))
        if not roles:
            report.fact("application", "not restarted: the environment has no service for it")
            return
        _report_fixed_variable(report, env, roles[0])
        if changed or restart:
            with started_if_cancelled(env.services, roles):
                stopped = stop_services.after(last)(env.services, roles)
                failpoint("failover: application stopped")
                last = start_services.after(stopped)(env.services, roles)
        health = wait_healthy.after(last)(env.application, seconds=HEALTH_SECONDS, services=env.services)
    if health.configured:
        report.passed("application", value=health.answer)
    else:
        report.fact("application", health.answer)


def _report_fixed_variable(report: Report, env: Environment, role: str) -> None:
    """A container keeps the variables that it was created with: a restart does not read the file again."""
    if not isinstance(env.services, DockerServices):
        return
    with contextlib.suppress(OpsError):  # the restart that follows reports a missing container
        if env.application.dsn_variable in env.services.environment(role):
            report.warn(
                "connection string of the container",
                "recreate the container: a restart does not read the file again",
                value="set in the container",
                follow=[Next("deploy-application", "recreate it", {"recreate": True})],
            )
