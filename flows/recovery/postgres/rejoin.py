"""Rejoin of a server as the standby of the primary (§8.3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocks.environment import Environment
from blocks.postgres.server import Postgres, execute
from flows.loss import require_confirmed
from flows.recovery.postgres.promotion import AGAIN, judge_receiver
from flows.recovery.postgres.rejoin_checks import Joining, Method, diverged_loss, judge_joining, read_joining
from runbook.change import Carrier, Change, State
from runbook.errors import CommandFailed, LossExceeded, OpsError
from runbook.guard.permit import PlannedStep
from runbook.next import Next
from runbook.report import Report
from tasks.failover.fencing import SIGNAL, allow_start, mark_standby, remove_signal
from tasks.failover.promotion import (
    ATTACH_SECONDS,
    commits_return,
    make_slots,
    start_receiver,
    streams,
    wait_for_stream,
)
from tasks.failover.rejoin import Rejoined, configure, copy_anew, rewind, save_diverged
from tasks.host.services import start_services, stop_services
from tasks.postgres.replication.synchronous import address, commit_alone, commit_together, synchrony

STREAM_SECONDS = 60.0
START_SECONDS = 45.0
"""A standby that cannot follow fails within seconds. A busy host is no reason for a base backup."""


@dataclass
class Rejoin:
    """The changes that make the server `node` a standby of `primary`. `was_running`, `was_marked`: whether its service
    ran, and whether it was to start as a standby, before them; `state`: of the system now."""

    report: Report
    env: Environment
    primary: Postgres
    node: Postgres
    method: Method
    was_running: bool = False
    was_marked: bool = True
    is_replacing: bool = False

    def __post_init__(self) -> None:
        primary, node = self.primary, self.node
        behind, ahead = address(node), address(primary)
        self.stopped = State(
            f"{address(primary)} takes writes; {address(node)} is stopped and is no standby yet", AGAIN
        )
        self.untouched = State(f"{address(primary)} takes writes; nothing of {address(node)} was replaced", AGAIN)
        self.starting = State(f"{behind} was made a standby of {ahead}, and does not stream yet", AGAIN)
        unchecked = "the WAL receiver, the archiver and synchronous_standby_names were not checked"
        self.streaming = State(f"{behind} streams from {ahead}; {unchecked}", AGAIN)
        self.state = self.stopped
        self._mark, self._saves = mark_standby.bind(node), save_diverged.bind(node)
        self._configures, self._rewinds = configure.bind(primary, node), rewind.bind(primary, node)
        self._copies, self._lets_commit = copy_anew.bind(primary, node), commit_alone.bind(primary)

    def lines(self, joining: Joining) -> RejoinLines:
        """Return the changes that make `joining` a standby, each with its own line."""
        node, slot = self.node, self.node.slot
        stop = Change(
            self._stop,
            "stop",
            f"{node.service}, if it runs",
            by=[self._mark],
            needs=[self._judge],
            begun=self.stopped,
            reverse=self._put_back,
        )
        save = Change(
            self._save,
            "save",
            f"its WAL beyond the start of the new timeline, next to {node.data_directory}",
            by=[self._saves],
            more=[PlannedStep("slot", f"{slot} on {address(self.primary)}, if it is missing")] if slot else (),
        )
        join = Change(self._join, "join", self._how(joining), by=[self._configures, self._rewinds, self._copies])
        start = Change(
            self._start,
            "start",
            f"{node.service}, until it streams from {address(self.primary)}",
            by=[self._copies],
            begun=self.starting,
            done=self.streaming,
        )
        return RejoinLines(stop, save, join, start, self.reattaching())

    def in_one_line(self) -> Change[[], None]:
        """Return the same as one line of a failover. It is skipped where the server streams already."""

        def rejoin() -> None:
            joining = self._stop()
            self._save(joining)
            self._start(joining, self._join(joining))

        return Change(
            rejoin,
            "rejoin",
            f"{address(self.node)} as standby of {address(self.primary)}",
            seconds=5.0,
            by=[self._mark, self._saves, self._configures, self._rewinds, self._copies],
            begun=self.stopped,
            failed=lambda _: self.state,
            done=self.streaming,
            reverse=self._put_back,
            is_optional=True,
        )

    def reattaching(self) -> Change[[], None]:
        """Return the change that starts the WAL receiver and the archiver, and lets commits wait again for the
        connected standbys of the configuration."""
        return Change(
            self._reattach,
            "reattach",
            "the WAL receiver and the archiver run; commits wait for the standbys of the configuration that are "
            "connected",
            by=[self._lets_commit],
            begun=self.streaming,
            done=State(f"{address(self.node)} is a standby of {address(self.primary)}", AGAIN),
        )

    def _judge(self, report: Report) -> None:
        judge_joining(report, self.env, read_joining(self.primary, self.node), self.method)

    def _how(self, joining: Joining) -> str:
        first = joining.method if self.method == "auto" else self.method
        hows = {
            "start": "set the primary in its configuration: it is already a standby",
            "rewind": "pg_rewind",
            "base_backup": "pg_basebackup into a new directory; the old files are kept",
        }
        how = hows[first]
        return f"{how}; if that fails, a base backup" if self.method == "auto" and first != "base_backup" else how

    def _stop(self) -> Joining:
        """Stop it, and let it pass the gate: it may have run since the plan. Returns what was read.

        Raises:
            LossExceeded: it has more commits than were confirmed. Nothing is replaced.
        """
        node = self.node
        self.state = self.untouched
        self.was_running = self.env.services.state(node.service).comes_back
        self.was_marked = Path(node.data_directory, SIGNAL).exists()
        signal = self._mark()  # first: its host may reboot at any time
        stop_services.after(signal)(self.env.services, [node.service])
        found = read_joining(self.primary, node)
        loss = diverged_loss(found)
        try:
            require_confirmed(self.report, loss)
        except LossExceeded:
            check = "check the commits that only it has, then run this again for a new plan"
            self.state = State(self.untouched.what, check)
            raise
        self.report.loses(loss)
        return found

    def _put_back(self) -> None:
        """Leave its service as it was, unless its files are being replaced."""
        if self.is_replacing:
            return
        if self.was_running and self.was_marked:
            start_services(self.env.services, [self.node.service])
        elif not self.was_running and not self.was_marked:
            remove_signal(self.node)  # one that ran as a second primary stays stopped
        self.report.state_is(self.state.what, self.state.hint)

    def _save(self, joining: Joining) -> None:
        report = self.report
        make_slots(self.primary, [self.node.slot])
        if not (joining.control and joining.parted_at):
            return
        try:
            saved = self._saves(joining.control.timeline, joining.parted_at)
        except OpsError as error:
            report.warn("diverged WAL", error.hint, value=f"not saved: {error.message}")
            return
        if saved.kept:
            kept = f"{saved.files} files with {saved.beyond.commits:,} transactions in {saved.kept}"
            report.fact("diverged WAL", kept)

    def _join(self, joining: Joining) -> Rejoined:
        """Make its files a standby's, and let its service manager start it."""
        self.is_replacing, self.state = True, self.stopped
        done = self._try_first(joining.method if self.method == "auto" else self.method) or self._copies()
        service = self.node.service
        if left := allow_start.after(done)(self.env.services, service):
            self.report.warn(f"{service} at boot", left, value="its service manager does not start it at boot")
        return done

    def _try_first(self, first: str) -> Rejoined | None:
        """Rejoin by the method `first`; None where it needs a base backup."""
        if first == "start":
            return self._configures()
        if first == "base_backup":
            return None
        try:
            return self._rewinds()
        except CommandFailed as error:
            if self.method == "rewind":
                raise
            self.report.warn("pg_rewind", "nothing to do: the run took a base backup instead", value=error.message)
            return None

    def _start(self, joining: Joining, done: Rejoined) -> None:
        """Start it until it streams.

        Raises:
            OpsError: it does not stream.
        """
        self.state = self.starting
        if not self._starts(done, last=self.method != "auto" or done.method == "base_backup"):
            done = self._copy_after_failure(joining)
        report, old = self.report, f"; old files: {done.kept}" if done.kept else ""
        report.fact("joined by", f"{done.method}, {done.seconds:.1f} s{old}")
        report.passed("standby", value=f"{address(self.node)} streams from {address(self.primary)}")

    def _starts(self, done: Rejoined, *, last: bool) -> bool:
        """Whether it starts and streams. With `last` there is no other method, and an error is raised."""
        try:
            start_services.after(done)(self.env.services, [self.node.service])
        except OpsError:
            if last:
                raise
            return False
        return wait_for_stream(self.primary, self.node.name, STREAM_SECONDS if last else START_SECONDS)

    def _copy_after_failure(self, joining: Joining) -> Rejoined:
        """It does not stream: with `auto` take a base backup, otherwise fail."""
        node, services = self.node, self.env.services
        failure = f"{address(node)} does not stream from {address(self.primary)}"
        if self.method != "auto" or joining.method == "base_backup":
            raise OpsError(failure, f"check the log of {node.service}, then run it again with method=base_backup")
        self.report.warn("first method", "nothing to do: the run took a base backup instead", value=failure)
        stop_services(services, [node.service])
        self.state = self.stopped
        done = self._copies()
        self.state = self.starting
        start_services.after(done)(services, [node.service])
        if not wait_for_stream(self.primary, node.name, STREAM_SECONDS):
            raise OpsError(failure, f"check the log of {node.service}, then run it again")
        return done

    def _reattach(self) -> None:
        report, env, primary = self.report, self.env, self.primary
        if _lacks_receiver(env, primary):
            make_slots(primary, [env.wal.slot])
            start_receiver(env.services, env.wal.service)
            judge_receiver(report, primary, env.wal)
        if _has_archiver(env):  # after a full restore it is stopped
            start_services(env.services, [env.wal.archiver])
        if _is_overridden(primary):
            commit_together(primary)
        if not commits_return(primary, ATTACH_SECONDS):
            found = self._lets_commit()
            report.warn(
                "commits wait for no standby",
                "connect the missing standbys of synchronous_standby_names, then run this again",
                value=found.names or "overridden",
                follow=[Next("check-replication", "see which standby is missing")],
            )


@dataclass(frozen=True)
class RejoinLines:
    """The changes of a rejoin, in order."""

    stop: Change[[], Joining]
    save: Change[[Joining], None]
    join: Change[[Joining], Rejoined]
    start: Change[[Joining, Rejoined], None]
    reattach: Change[[], None]

    def all(self) -> tuple[Change[..., Any], ...]:
        """Return the lines of the plan."""
        return (self.stop, self.save, self.join, self.start, self.reattach)

    def carry_out(self, carry: Carrier) -> None:
        """Carry all of them out.

        Raises:
            OpsError: the server does not stream.
        """
        joining = carry(self.stop)
        carry(self.save, joining)
        carry(self.start, joining, carry(self.join, joining))
        carry(self.reattach)


def find_unattached(env: Environment, primary: Postgres) -> list[str]:
    """Find what a killed rejoin left, though its standby streams: the WAL receiver, the archiver, waiting commits.

    Raises:
        Unreachable: the primary or the service manager does not answer.
    """
    found = []
    if _lacks_receiver(env, primary):
        found.append(f"the WAL receiver does not stream from {address(primary)}")
    if _has_archiver(env) and not env.services.state(env.wal.archiver).comes_back:
        found.append(f"the archiver ({env.wal.archiver}) is stopped")
    if _is_overridden(primary):
        found.append("commits wait for no standby: ALTER SYSTEM has overridden synchronous_standby_names")
    if synchrony(primary).hangs:
        found.append("commits hang: none of their standbys is connected")
    return found


def _lacks_receiver(env: Environment, primary: Postgres) -> bool:
    return env.has("wal") and env.wal.service in env.services.names and not streams(primary, env.wal.name)


def _has_archiver(env: Environment) -> bool:
    return env.has("wal") and env.wal.archiver in env.services.names


def _is_overridden(primary: Postgres) -> bool:
    with primary.connect() as connection:
        return bool(execute(connection, _OVERRIDDEN))


_OVERRIDDEN = """
SELECT 1 FROM pg_settings
WHERE name = 'synchronous_standby_names' AND setting = '' AND sourcefile LIKE '%postgresql.auto.conf'
"""
