"""The recovery of a region's database with the least loss: from a base backup and WAL, or from a dump. Where one fails,
the report says why, and the next one is tried."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime

from blocks.environment import Environment
from flows.database import restore_steps as database
from flows.database.base_backup import judge_space, judge_version
from flows.database.wal_reading import mend
from flows.recovery.point import choice
from flows.recovery.point.choice import PointOrigin
from flows.recovery.point.target import FoundTarget, find_in_wal
from flows.store import store_for
from runbook import clock
from runbook.errors import LockLost, NotConfirmed, NotRestorable, OpsError, RunbookFailed, Unreachable
from runbook.report import Report, Status
from tasks.backups.catalogue import LATEST, Backup, kind_of, open_all
from tasks.cluster.content import cluster_in
from tasks.cluster.instance import PrivateInstance, prepare_instance, put_away, root_for, sweep_instance
from tasks.cluster.target import RecoveryTarget, Stop
from tasks.wal.format.names import lsn_text

NEWEST = RecoveryTarget("latest")
PHYSICAL, LOGICAL = "base backup and WAL", "dump"


@dataclass(frozen=True)
class Replay:
    """The replay of an option: where its WAL ends, and the private instance that replays it."""

    origin: PointOrigin
    found: FoundTarget
    stop: Stop
    instance: PrivateInstance


@dataclass(frozen=True)
class RestoreOption:
    """One backup to restore the database from, with the WAL after it where `replay` is set. It has every write up to
    `newest`, and none after it."""

    backup: Backup
    newest: datetime
    replay: Replay | None = None

    @property
    def kind(self) -> str:
        """Base backup and WAL, or dump."""
        return PHYSICAL if self.replay else LOGICAL

    @property
    def text(self) -> str:
        """The backup, and the newest write that it has."""
        more = f" and {len(self.replay.found.links)} segments of WAL" if self.replay else ""
        return f"{self.backup.name}{more}: up to {clock.text(self.newest, 'microseconds')}"


@dataclass
class RestoreAttempt:
    """Why an attempt failed; "" where it succeeded."""

    failure: str = ""


@contextlib.contextmanager
def attempting(report: Report, what: str) -> Iterator[RestoreAttempt]:
    """A failure inside does not end the run: it becomes a WARN, and the run tries the next option. An unreachable store
    ends the run: it may hold backups. So does an object that does not restore: to restore without it may lose less than
    the next option."""
    attempt, first = RestoreAttempt(), len(report.findings)
    try:
        yield attempt
    except (Unreachable, LockLost, NotConfirmed, NotRestorable):
        raise
    except OpsError as error:
        bad = [found for found in report.findings[first:] if found.status is Status.CRITICAL]
        failed = bad[0] if bad and isinstance(error, RunbookFailed) else None
        attempt.failure = f"{failed.name}: {failed.value}" if failed else error.message
        report.findings[first:] = [
            replace(found, status=Status.WARN) if found in bad else found for found in report.findings[first:]
        ]
        hint = failed.hint if failed else error.hint
        report.warn(f"not used: {what}", hint or "nothing to do: the run tries the next option", value=attempt.failure)


@dataclass
class RestoreOptions:
    """The backups of the environment `source` in the stores of this one. `tried`: those that failed; `wanted`: the one
    to try first, whatever it loses; `used`: the one that is live now."""

    report: Report
    env: Environment
    source: str
    wanted: str
    tried: set[str] = field(default_factory=set)
    used: RestoreOption | None = None

    def choose(self) -> RestoreOption:
        """The option with the least loss whose files match their manifests.

        Raises:
            OpsError: none is left.
            Unreachable: a store does not answer.
        """
        while True:
            option = self._ranked()[0]
            with attempting(self.report, option.backup.name) as attempt:
                if option.replay:
                    choice.fetch_files(self.report, option.replay.origin)
                else:
                    database.choose_backup(self.report, self.env, option.backup.name, of=self.source)
            if not attempt.failure:
                self.report.fact("database from", f"{option.kind}: {option.text}")
                self.report.pin("backup", option.backup.name)
                self._judge_gap(option)
                return option
            self.tried.add(option.backup.name)

    def _judge_gap(self, option: RestoreOption) -> None:
        """The option loses what follows a gap in the WAL: the operator must accept that by naming the backup."""
        if not option.replay or not (behind := option.replay.found.behind):
            return
        why = option.replay.found.damage or option.replay.origin.chain.end_reason
        self.report.fail(
            "WAL without a gap",
            "find an intact copy of that segment (the old region's WAL receiver and pg_wal, another bucket) and copy "
            f"it into the store. Without one, run this again with backup={option.backup.name}, which accepts that loss",
            value=f"{why}; after it: {behind.text}",
            expected="no gap",
            worst=Status.WARN if option.backup.name == self.wanted else Status.CRITICAL,
        )

    def _ranked(self) -> list[RestoreOption]:
        report, reasons = self.report, dict[str, str]()
        found = list[RestoreOption]()
        for kind, find in ((PHYSICAL, self._physical), (LOGICAL, self._logical)):
            with attempting(report, kind) as attempt:
                found += find()
            if attempt.failure:
                reasons[kind] = attempt.failure
        found.sort(key=lambda one: (one.backup.name == self.wanted, one.newest), reverse=True)
        report.table(
            "Recovery options for the database, the least loss first",
            ("kind", "from", "newest point", "lost up to now"),
            [(one.kind, one.backup.name, one.newest.isoformat(), _before(report, one)) for one in found]
            + [(kind, why, "none", "") for kind, why in reasons.items()],
        )
        if not found:
            failures = "; ".join(f"{kind}: {why}" for kind, why in reasons.items())
            raise OpsError(
                f"nothing in the stores of {self.env.name} restores {self.source}'s database: {failures}",
                "find another copy of what is damaged: on the old region's disks, in another bucket",
            )
        return found

    def _physical(self) -> list[RestoreOption]:
        """The newest usable base backup, with all WAL after it."""
        store = store_for(self.env, "cluster")
        known = [one for one in open_all(store, "cluster")[0] if one.manifest.environment == self.source]
        left = [one for one in known if one.name == self.wanted or not one.failed]
        left.sort(key=lambda one: (one.name == self.wanted, one.manifest.taken), reverse=True)
        for backup in left:
            if backup.name in self.tried:
                continue
            with attempting(self.report, backup.name) as attempt:
                option = self._replayed(backup.name)
            if not attempt.failure:
                return [option]
            self.tried.add(backup.name)
        raise OpsError(
            f"there is no base backup of {self.source} in {store.where}",
            "take them with backup-cluster there, and copy them with replicate-backups",
        )

    def _replayed(self, name: str) -> RestoreOption:
        report, env = self.report, self.env
        origin = choice.choose_origin(report, env, NEWEST, name, 0, "backups", of=self.source)
        judge_version(report, env, origin.backup)
        judge_space(report, env, origin.whole, len(origin.chain.links) * origin.content.segment_bytes)
        report.fail_if_critical()
        sweep_instance(root := root_for(env.postgres))
        instance = prepare_instance(env.postgres, root)
        report.at_end(lambda: put_away(instance))
        found = find_in_wal(env, origin, NEWEST, root / "wal")
        mend(report, origin.archive, found.replaced, found.undecodable, root / "wal")
        stop = self._end_of(origin, found)
        newest = stop.before.at if stop.before else cluster_in(origin.backup).stopped
        return RestoreOption(origin.backup, newest, Replay(origin, found, stop, instance))

    def _end_of(self, origin: PointOrigin, found: FoundTarget) -> Stop:
        """Where the readable WAL ends."""
        newest = found.newest
        stop = found.stop or (Stop(newest.lsn, True, newest, None) if newest else Stop(0, False, None, None))
        reachable = stop.before.text if stop.before else f"the end of the base backup, LSN {origin.content.stop_lsn}"
        self.report.fact("newest point of the WAL", reachable)
        if found.damage:
            self.report.warn(
                "WAL in the store",
                "find that segment elsewhere before anything is written here: without it, everything up to "
                f"{reachable} can be restored",
                value=found.damage,
                expected="no gap",
            )
        if not found.links:
            hint = f"check that the archiver of {self.source} ships to this store; only the base backup can be restored"
            self.report.warn("WAL in the store", hint, value="none after the base backup")
        else:
            self.report.fact("readable WAL", f"{len(found.links)} segments up to {lsn_text(found.links[-1].end)}")
        return stop

    def _logical(self) -> list[RestoreOption]:
        """The newest dump that did not fail."""
        store = store_for(self.env, "postgres")
        known, unreadable = open_all(store, "postgres")
        if unreadable:
            hint = f"check them in {store.where}"
            self.report.warn("unreadable manifests", hint, value=", ".join(unreadable[-5:]))
        own = [one for one in known if one.manifest.environment == self.source and one.name not in self.tried]
        chosen = [one for one in own if one.name == self.wanted] or [one for one in own if not one.failed]
        if not chosen:
            raise OpsError(
                f"there is no dump of {self.source}'s database in {store.where}", "copy them with replicate-backups"
            )
        newest = max(chosen, key=lambda one: one.manifest.taken)
        return [RestoreOption(newest, newest.manifest.taken)]


def require_known(env: Environment, source: str, wanted: str, kinds: Collection[str] = ("postgres", "cluster")) -> None:
    """Check that the named backup exists, and is from the other region.

    Raises:
        OpsError: it does not, or is not.
    """
    if wanted == LATEST:
        return
    kind = kind_of(wanted, "postgres")
    if kind not in kinds:
        raise OpsError(
            f"{wanted} is no backup of a database", "give a dump (backup_…), a base backup (base_…), or latest"
        )
    known = open_all(store_for(env, kind), kind)[0]
    own = [one.name for one in known if one.manifest.environment == source]
    if wanted not in own:
        newest = ", ".join(reversed(own[-3:])) or "none"
        raise OpsError(
            f"there is no backup “{wanted[:80]}” of {source} in {store_for(env, kind).where}", f"the newest: {newest}"
        )


def _before(report: Report, option: RestoreOption) -> str:
    return f"{(report.started - option.newest).total_seconds():,.1f} s"
