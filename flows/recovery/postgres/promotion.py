"""The changes of a PostgreSQL failover (§8.3): fence, replay, promote, then slots and the WAL receiver."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from blocks.environment import Environment
from blocks.postgres import nodes
from blocks.postgres.server import Postgres
from blocks.postgres.wal import Wal
from flows.branch import record_branch
from flows.recovery.postgres.findings import feeds_old_wal
from flows.recovery.postgres.gate import PromotionLoss, pass_promotion
from flows.recovery.postgres.pair import Mode, ServerPair
from runbook.change import Change, State
from runbook.errors import OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.guard.permit import PlannedStep
from runbook.kinds import Bound
from runbook.next import Next
from runbook.report import Report
from tasks.failover.feeding import Fed, feed
from tasks.failover.fencing import (
    SIGNAL,
    FenceEvidence,
    Fencing,
    allow_start,
    find_fencing,
    keep_down,
    remove_signal,
)
from tasks.failover.marker import FailoverMarker
from tasks.failover.member import MemberControl, ask_member, read_control
from tasks.failover.numbers import write_histories
from tasks.failover.promotion import (
    ATTACH_SECONDS,
    Promoted,
    checkpoint,
    commits_return,
    make_slots,
    promote,
    start_receiver,
    wait_for_stream,
)
from tasks.host.services import start_services, stop_services
from tasks.postgres.replication.synchronous import Synchrony, address, commit_alone, read_synchrony
from tasks.wal.archive.destinations import archive_of

RETURN_SECONDS = 5.0
"""The standbys have attached by then; the server still has to notice it."""
AGAIN = "run it again: it continues, or shows the next step"
FENCED = "port closed, no restart, no process left; service disabled at boot; marked as a standby in its data directory"


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


@dataclass
class Failover:
    """The changes of a failover from `pair.old` to `pair.new`. `attested`: by whom the fence is, where it is not fully
    proven; `fence`: whether an unplanned one stops the old primary. `receives`: whether the WAL receiver ran before
    them; `is_promoting`: whether `pg_promote` may have run."""

    report: Report
    env: Environment
    pair: ServerPair
    mode: Mode
    attested: str = ""
    fence: bool = False
    phases: Phases = field(default_factory=Phases)
    receives: bool = False
    is_promoting: bool = False

    @property
    def is_planned(self) -> bool:
        """Whether this run stops a primary that takes writes."""
        return self.pair.course == "hand over"

    def checkpointing(self) -> Change[[], float]:
        """Return the change that makes the stop of the old primary short."""
        return _checkpoint(self.pair.old, "it then stops quickly")

    def fencing(self) -> Change[[], Fenced]:
        """Return the change that stops the old primary and keeps it down, or puts it back if no server is promoted."""
        pair, keeps_down = self.pair, keep_down.bind(self.env.services, self.pair.old)
        steps = []
        if self.is_planned:
            steps.append(PlannedStep("stop", f"{address(pair.old)} cleanly (fast shutdown): writes pause", seconds=1.0))
        elif self.fence:
            stop = f"{address(pair.old)} through its supervisor, if that would restart it"
            steps.append(PlannedStep("stop", stop, seconds=1.0))
        if self._has_receiver:
            steps.append(PlannedStep("stop", f"the WAL receiver, until {address(pair.new)} takes writes"))
        first, *more = [*steps, PlannedStep("fence", FENCED)]
        return Change(
            lambda: self._fence(keeps_down),
            first.step,
            first.detail,
            seconds=first.seconds,
            more=more,
            by=[keeps_down],
            begun=State(f"{address(pair.old)} is stopped, and no server was promoted: none takes writes", AGAIN),
            reverse=self._put_back,
        )

    def replaying(self) -> Change[[Fenced], Replayed]:
        """Return the change that replays all received WAL on the standby, up to the gate before its promotion."""
        pair = self.pair
        feeding = feed.bind(pair.new, pair.wal)

        def replay(fenced: Fenced) -> Replayed:
            with self.phases.timed("replay of the tail"):
                clean = fenced.control if fenced.control and fenced.control.shut_down else None
                fed = feeding(clean, pair.old if feeds_old_wal(pair) else None)
                return Replayed(fed, pass_promotion(self.report, pair, fed))

        more = ", and the old primary's own WAL" if feeds_old_wal(pair) else ""
        detail = f"on {address(pair.new)} all WAL that it and the WAL receiver have{more}"
        return Change(replay, "replay", detail, seconds=1.0, by=[feeding])

    def promoting(self) -> Change[[Fed], Promoted]:
        """Return the change that makes the standby the primary."""
        env, pair = self.env, self.pair
        action = promote.bind(env.services, pair.old, pair.new, self.attested)

        def promoted(fed: Fed) -> Promoted:
            if env.has("wal"):
                keep_numbers(env, pair.new, fed)
            self.is_promoting = True  # from here on the old primary must not be put back
            done = action()
            self.phases.seconds["promote"] = done.seconds
            env.forget_roles()
            return done

        return Change(
            promoted,
            "promote",
            f"{address(pair.new)}: pg_promote",
            seconds=1.0,
            by=[action],
            begun=State(f"{address(pair.old)} is stopped, and {address(pair.new)} may have been promoted", AGAIN),
            done=lambda done: State(f"{address(pair.new)} is the primary, on timeline {done.timeline}", AGAIN),
            is_final=True,
        )

    def fencing_again(self, begun: State) -> Change[[], None]:
        """Return the change that keeps the old primary of a finished promotion down."""
        keeps_down = keep_down.bind(self.env.services, self.pair.old)
        return Change(lambda: self._fence_again(keeps_down), "fence", FENCED, by=[keeps_down], begun=begun)

    def attaching(self, begun: State | None = None) -> Change[[], None]:
        """Return the change that gives the new primary its slots and the WAL receiver. Idempotent."""
        alone = commit_alone.bind(self.pair.new)
        detail = (
            f"the slots and the WAL receiver of {address(self.pair.new)}; without them, commits wait for no standby"
        )
        return Change(lambda: self._attach(alone), "attach", detail, by=[alone], begun=begun)

    def noting_timeline(self) -> Change[[], float]:
        """Return the change after which pg_rewind reads the new timeline."""
        return _checkpoint(self.pair.new, f"pg_rewind of {address(self.pair.old)} then reads the new timeline")

    @property
    def _has_receiver(self) -> bool:
        return bool(self.pair.wal and self.pair.wal.service in self.env.services.names)

    def _fence(self, keeps_down: Bound[[], FenceEvidence]) -> Fenced:
        """Stop the old primary if the run has to, prove its fence, and mark it as a standby."""
        env, pair, stopped = self.env, self.pair, None
        self.receives = self._receives()
        FailoverMarker(old=address(pair.old), new=address(pair.new), mode=self.mode).write(env.reports_directory)
        failpoint("failover: remembered")
        with self.phases.timed("fencing"):
            if self.is_planned or self.fence:
                stopped = stop_services(env.services, [pair.old.service])
                failpoint("failover: old primary stopped")
            if pair.wal and self._has_receiver:  # so that it starts at once later, not after its 5 s
                with contextlib.suppress(Unreachable):  # its host may be down; the run checks later whether it streams
                    stopped = stop_services.after(stopped)(env.services, [pair.wal.service])
            control = read_control.after(stopped)(pair.old)
            if self.is_planned and control and not control.shut_down:
                raise OpsError(
                    f"{address(pair.old)} did not shut down cleanly: “{control.state}”",
                    "check its log, then run this again, with mode=unplanned if the old primary does not start",
                )
            fencing = find_fencing.after(control)(env.services, pair.old)
            fencing.require(self.attested, kept_down=False)
            return Fenced(control, fencing, keeps_down())

    def _receives(self) -> bool:
        """Whether the WAL receiver's service runs, or is being started."""
        if self.pair.wal and self._has_receiver:
            with contextlib.suppress(OpsError):  # its host may be down
                return self.env.services.state(self.pair.wal.service).comes_back
        return False

    def _put_back(self) -> None:
        if self.is_promoting:
            return
        if self.is_planned:  # this run stopped a primary that took writes
            self._go_back()
        else:
            self._let_go()

    def _go_back(self) -> None:
        """Undo a planned failover that cannot continue: the old primary takes writes again."""
        report, services, pair = self.report, self.env.services, self.pair
        roles = [pair.old.service, *([pair.wal.service] if pair.wal and self._has_receiver else [])]
        try:
            allow_start(services, pair.old.service)
            remove_signal(pair.old)
            start_services(services, roles)
        except (OpsError, OSError) as error:
            report.fail(
                "the old primary started again", f"start {pair.old.service} by hand, without {SIGNAL}", value=str(error)
            )
            return
        FailoverMarker.remove(self.env.reports_directory)
        report.state_is(
            f"no server was promoted; {address(pair.old)} was started again, and takes writes",
            "fix the findings above, then run it again",
        )

    def _let_go(self) -> None:
        """Undo an unplanned failover that cannot continue: the old primary must take writes again when it is started.
        A server that was a standby stays one."""
        services, pair = self.env.services, self.pair
        if self.receives and pair.wal:
            start_receiver(services, pair.wal.service)
        control = read_control(pair.old)
        if control and control.was_standby:
            return
        with contextlib.suppress(OpsError):  # the run reports the error that led here
            allow_start(services, pair.old.service)
        remove_signal(pair.old)
        FailoverMarker.remove(self.env.reports_directory)
        self.report.state_is(
            f"no server was promoted; {address(pair.old)} is stopped, and is the primary when it is started",
            "fix the finding above, then run it again; or start the old primary",
        )

    def _fence_again(self, keeps_down: Bound[[], FenceEvidence]) -> None:
        fencing = find_fencing(self.env.services, self.pair.old)
        for row in fencing.against:
            self.report.warn(
                f"the old primary: {row.what}",
                f"stop its service {self.pair.old.service}, then rejoin-standby",
                value=row.seen,
            )
        if not fencing.against:
            keeps_down()

    def _attach(self, alone: Bound[[], Synchrony]) -> None:
        """Record the timeline in use, create the slots, start the WAL receiver, and make commits return."""
        report, env, pair = self.report, self.env, self.pair
        if state := nodes.ask(pair.new):
            record_branch(report, env, state.system, state.timeline)
        made = make_slots(pair.new, [pair.wal.slot if pair.wal else "", pair.old.slot])
        if pair.wal and self._has_receiver:
            refused = start_receiver.after(made)(env.services, pair.wal.service)
            judge_receiver(report, pair.new, pair.wal, 0 if refused else ATTACH_SECONDS)
        if not commits_return(pair.new, RETURN_SECONDS):
            found = read_synchrony.after(made)(pair.new)
            alone()
            report.warn(
                "commits wait for no standby",
                "rejoin the other server: until then a failure of this one loses acknowledged writes",
                value=f"no synchronous standby is connected ({found.names}): the setting was overridden",
                expected=found.names,
                follow=[Next("rejoin-standby", "rejoin the other server")],
            )


@dataclass(frozen=True)
class Fenced:
    """The old primary's fence. `kept_down`: whether its files are marked as a standby's."""

    control: MemberControl | None
    fencing: Fencing
    kept_down: FenceEvidence


@dataclass(frozen=True)
class Replayed:
    """The replay, and the loss by the gate."""

    fed: Fed
    lost: PromotionLoss


@dataclass(frozen=True)
class Done:
    """A promotion with its proofs."""

    fenced: Fenced
    replayed: Replayed
    promoted: Promoted


def _checkpoint(postgres: Postgres, why: str) -> Change[[], float]:
    return Change(partial(checkpoint, postgres), "checkpoint", f"{address(postgres)}: {why}")


def keep_numbers(env: Environment, standby: Postgres, fed: Fed) -> None:
    """Give a standby the histories of branches that were left, so that its promotion does not take one's number again.
    Those that it could still follow are left out: it would, instead of being promoted."""
    system = ask_member(standby).system
    with contextlib.suppress(OpsError, OSError):  # the archive does not answer: a failover does not wait for it
        write_histories(standby, archive_of(env, "backups", system), fed.timeline, fed.place)


def judge_receiver(report: Report, primary: Postgres, wal: Wal, seconds: float = ATTACH_SECONDS) -> None:
    """Judge whether it streams from the primary within `seconds`."""
    attached = wait_for_stream(primary, wal.name, seconds)
    value = f"{wal.name} {'streams' if attached else 'does not stream'} from {address(primary)}"
    hint = "check its log; its connection string must name both servers, with target_session_attrs=primary"
    report.prefer("WAL receiver", attached, hint, value=value, expected="streaming")
