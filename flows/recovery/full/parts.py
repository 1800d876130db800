"""The lines of Redis and the application's files in a full restore: copies of them are built and proven, then swapped
in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from blocks.environment import Environment
from flows.application.files_gate import changes_since, measured_loss, pass_files
from flows.application.files_swap import plan_connection_string
from flows.database import expectations as check
from flows.recovery.full.choose import OtherParts
from flows.recovery.stopped_services import SystemServices
from flows.redis.restore import capture
from flows.redis.restore.sources import loss_of as redis_loss
from flows.redis.restore.steps import detach_steps, judge_detaching, report_redis_proof
from flows.store import mark_failed
from runbook.change import BegunLine, Carrier, Change, Line, State
from runbook.errors import OTHER_BACKUPS, ending_the_run
from runbook.guard.loss import Loss
from runbook.next import Next
from runbook.report import Report
from runbook.units import size
from tasks.application.files import directory_of
from tasks.application.staged_files import FilesCopy, build_files_copy, swap_files
from tasks.backups.catalogue import Backup
from tasks.integrity import Expectations
from tasks.postgres.content.changes import TableStates
from tasks.redis.restore.copy import RedisCopy, build_redis_copy
from tasks.redis.restore.live import LiveRedis
from tasks.redis.restore.swap import swap_redis
from tasks.redis.topology.isolation import detach, note_swapped

UNTOUCHED = State(
    "nothing live was replaced; services are as they were found", "fix the findings above, then run this again"
)
Parts = TypeVar("Parts", bound=OtherParts)


@dataclass
class StagedCopies:
    """The copies next to the live data. `rows`: those of the database's copy per table; `login`: the last step of its
    proof; `rules`: the expectations on it; `states`: of its tables, when they were judged; `strict`: whether a broken
    rule ends the run."""

    redis: RedisCopy | None
    files: FilesCopy | None
    rows: dict[str, int] = field(default_factory=dict)
    login: object = None
    origin: check.ExpectationsOrigin = check.NOW
    rules: Expectations | None = None
    states: TableStates | None = None
    strict: bool = False

    @property
    def others(self) -> list[str]:
        """The names of the parts other than the database."""
        return [*(["Redis"] if self.redis else []), *(["files"] if self.files else [])]


@dataclass(frozen=True)
class PartLines:
    """The lines. `stop`: of Redis, just before the swap; a surviving copy of its data is captured (`capturing`) behind
    that, and then it stops first. Each is empty where the run does not need it."""

    report: Report
    env: Environment
    services: SystemServices
    stop: Sequence[Change[[], None]]
    capturing: Sequence[Change[[LiveRedis], tuple[Backup, Loss]]]
    redis: Sequence[Change[[Backup], RedisCopy]]
    files: Sequence[Change[[Backup], FilesCopy]]
    redis_swap: Sequence[Change[[RedisCopy, OtherParts, Sequence[str]], None]]
    files_swap: Sequence[Change[[FilesCopy, Backup], None]]
    redirect: Sequence[Change[[], None]]

    @classmethod
    def plan(cls, report: Report, env: Environment, chosen: OtherParts, services: SystemServices) -> PartLines:
        """Plan the lines for the chosen sources."""
        survivor, files = chosen.redis_survivor, chosen.files
        replaces_redis = bool(chosen.redis or survivor)
        return cls(
            *(report, env, services),
            _plan_stop(report, env, services),
            [capture.capturing(report, env, survivor, UNTOUCHED)] if survivor else [],
            _plan_redis(env, chosen),
            _plan_files(env, files) if files else [],
            [_plan_redis_swap(report, env, services)] if replaces_redis else [],
            [_plan_files_swap(report, env, services)] if files else [],
            plan_connection_string(report, env) if files else [],
        )

    @property
    def early(self) -> list[Line[..., Any]]:
        """Return the lines before the copies are built."""
        return [*self.stop, *self.capturing] if self.capturing else []

    @property
    def builds(self) -> list[Line[..., Any]]:
        """Return the lines that build the copies."""
        return [*self.redis, *self.files]

    @property
    def late(self) -> list[Line[..., Any]]:
        """Return the lines just before the swap."""
        return [] if self.capturing else [*self.stop]

    @property
    def swaps(self) -> list[Line[..., Any]]:
        """Return the lines that make the copies live."""
        return [*self.redis_swap, *self.files_swap, *self.redirect]

    def capture(self, carry: Carrier, chosen: Parts) -> Parts:
        """Capture the surviving copy of Redis's data as a proven backup, if it is the source. The services are stopped.

        Raises:
            LossExceeded: more would be lost than was confirmed. Nothing live was replaced.
            OpsError: it cannot be read. Nothing live was replaced.
        """
        for capturing in self.capturing:
            self._stop_redis(carry)
            assert chosen.redis_survivor
            assert self.services.redis_live
            backup, loss = carry(capturing, self.services.redis_live)
            survivor = replace(chosen.redis_survivor, loss=loss)
            chosen = replace(chosen, redis=backup, redis_survivor=survivor)
        return chosen

    def begin(self, carry: Carrier, chosen: OtherParts) -> Callable[[], StagedCopies]:
        """Begin to build Redis and the files at the same time. The returned function waits for them."""
        redis: list[BegunLine[RedisCopy]] = [carry.begin(one, _given(chosen.redis)) for one in self.redis]
        files: list[BegunLine[FilesCopy]] = [carry.begin(one, _given(chosen.files)) for one in self.files]

        @ending_the_run()
        def wait() -> StagedCopies:
            redis_copy = next((one.result() for one in redis), None)
            return StagedCopies(redis_copy, next((one.result() for one in files), None))

        return wait

    def stop_late(self, carry: Carrier) -> None:
        """Stop Redis, unless it stopped before the capture."""
        if not self.capturing:
            self._stop_redis(carry)

    def pass_gates(self, copies: StagedCopies, chosen: OtherParts) -> None:
        """Pass the gates of Redis and the files, before the first part is replaced. The services are stopped.

        Raises:
            LossExceeded: more would be lost than was confirmed. Nothing live was replaced.
        """
        if copies.redis:
            self.services.last = _pass_redis(self.services, chosen)
        if copies.files and chosen.files:
            pass_files(self.report, self.env, directory_of(self.env.application), changes_since(chosen.files))

    def swap(self, carry: Carrier, copies: StagedCopies, chosen: OtherParts) -> None:
        """Swap Redis and the files, where copies of them were built. Each passes its gate again: the swap of the
        database took time.

        Raises:
            LossExceeded: a part was written to meanwhile, and is not replaced.
        """
        for one in self.redis_swap:
            assert copies.redis
            carry(one, copies.redis, chosen, copies.others[1:])
        for other in self.files_swap:
            assert copies.files
            carry(other, copies.files, _given(chosen.files))
        for line in self.redirect:
            carry(line)

    def _stop_redis(self, carry: Carrier) -> None:
        for one in self.stop:
            carry(one)


def _given(backup: Backup | None) -> Backup:
    assert backup
    return backup


def _plan_stop(report: Report, env: Environment, services: SystemServices) -> list[Change[[], None]]:
    """Plan to stop Redis, with its replicas and Sentinels detached. Clients are stopped before it."""
    if not services.stops_redis:
        return []
    lines: list[Change[[], None]] = []
    if other := services.other_master:
        detail = f"Redis's data of {other.address} as a backup: it is in no directory that is kept"
        lines.append(Change(services.keep_other, "keep", detail))
    around = services.topology
    if around and (steps := detach_steps(env, around)):
        first, *more = steps
        lines.append(
            Change(
                services.detach,
                first.step,
                first.detail,
                seconds=first.seconds,
                more=more,
                by=[detach.bind(env.redis)],
                needs=[partial(judge_detaching, env=env, around=around)],
                reverse=services.attach_again,
            )
        )
    name, back = env.services.name_of("redis"), services.start_redis_again
    lines.append(Change(services.stop_redis, "stop Redis", f"the service {name}", seconds=1, reverse=back))
    return lines


def _plan_redis(env: Environment, chosen: OtherParts) -> list[Change[[Backup], RedisCopy]]:
    if chosen.redis_survivor:
        return [capture.building(env, chosen.redis_survivor)]
    if not chosen.redis:
        return []
    return [
        Change(
            build_redis_copy.bind(env.redis),
            "restore a staged copy of Redis",
            f"{chosen.redis.name} into {env.redis.data_directory}.restoring, then prove it",
            size=chosen.redis.manifest.bytes,
            seconds=1,
        )
    ]


def _plan_files(env: Environment, backup: Backup) -> list[Change[[Backup], FilesCopy]]:
    return [
        Change(
            build_files_copy.bind(env.application),
            "restore a staged copy of application files",
            f"{backup.name} into {env.application.directory}.restoring, then prove it",
            size=backup.manifest.bytes,
            seconds=1,
        )
    ]


def _plan_redis_swap(
    report: Report, env: Environment, services: SystemServices
) -> Change[[RedisCopy, OtherParts, Sequence[str]], None]:
    action = swap_redis.bind(env.redis)

    def swap(copy: RedisCopy, chosen: OtherParts, left: Sequence[str]) -> None:
        _pass_redis(services, chosen)
        services.last = redis = action(copy)
        services.topology = note_swapped(env.reports_directory, services.topology) if services.topology else None
        services.redis_replaced = redis.kept
        services.has_swapped("Redis", redis.kept, left, _directory("undo-restore-redis", redis.kept))
        report.loses(redis_loss(chosen.redis_survivor or chosen.redis))

    return Change(
        swap,
        "swap Redis",
        f"{env.redis.data_directory}: the old data is kept next to it as .superseded_…",
        seconds=0.1,
        by=[action],
        is_final=True,
    )


def _plan_files_swap(report: Report, env: Environment, services: SystemServices) -> Change[[FilesCopy, Backup], None]:
    action, live = swap_files.bind(env.application), env.application.directory

    def swap(copy: FilesCopy, backup: Backup) -> None:
        changes = changes_since(backup)
        pass_files(report, env, directory_of(env.application), changes)
        services.last = files = action(copy)
        services.has_swapped("files", files.kept, [], _directory("undo-restore-files", files.kept))
        report.loses(measured_loss(report, files.kept, changes))

    detail = f"{live} is kept as {live}.superseded_<time>; {live}.restoring becomes {live}"
    return Change(swap, "swap the files", detail, seconds=0.1, by=[action], is_final=True)


def _pass_redis(services: SystemServices, chosen: OtherParts) -> LiveRedis:
    assert services.redis_gate
    backup = None if chosen.redis_survivor else chosen.redis
    return services.redis_gate.judge(redis_loss(chosen.redis_survivor or backup), backup)


def _directory(undo: str, kept: Path | None) -> Next | None:
    return Next(undo, "", {"kept": kept.name}) if kept else None


@ending_the_run()
def prove_others(report: Report, env: Environment, chosen: OtherParts, copies: StagedCopies) -> None:
    """Compare the copies of Redis and of the files with their manifests.

    Raises:
        RunbookFailed: one differs from its manifest. Nothing live was touched.
    """
    if chosen.redis and copies.redis:
        report_redis_proof(report, env, chosen.redis, copies.redis)
    if not (copy := copies.files):
        return
    report.require(
        "files equal to the backup",
        not copy.differences,
        f"nothing live was touched; {OTHER_BACKUPS}",
        value="; ".join(copy.differences[:3]) or f"{copy.entries:,} entries, {size(copy.bytes)}",
        expected="content, mode and owner of every entry as in the backup",
    )
    if copy.differences and chosen.files:
        mark_failed(report, chosen.files, copy.differences[0])
    report.fail_if_critical()
