"""Which way brings the database back with the least loss: a base backup and the WAL after it, or a dump; what fails is
said, and the next one is taken. Called with the open report."""

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
from flows.recovery.point.choice import Origin
from flows.recovery.point.target import Found, find_in_wal
from flows.store import store_for
from runbook.errors import LockLost, NotConfirmed, OpsError, RunbookFailed, Unreachable
from runbook.report import Report, Status
from tasks.backups.catalogue import LATEST, Backup, kind_of, open_all
from tasks.cluster.content import cluster_in
from tasks.cluster.instance import Instance, prepare_instance, put_away, root_for, sweep_instance
from tasks.cluster.target import Stop, Target
from tasks.wal.format.names import lsn_text

NEWEST = Target("latest")
PHYSICAL, LOGICAL = "base backup and WAL", "dump"


@dataclass(frozen=True)
class Replay:
    """The physical half of a way: where its WAL ends, and the private instance in which it is replayed."""

    origin: Origin
    found: Found
    stop: Stop
    instance: Instance


@dataclass(frozen=True)
class Way:
    """One way to bring the database back: every write up to `newest` is there, and none after it."""

    backup: Backup
    newest: datetime
    replay: Replay | None = None

    @property
    def kind(self) -> str:
        """For people."""
        return PHYSICAL if self.replay else LOGICAL

    @property
    def told(self) -> str:
        """For people."""
        more = f" and {len(self.replay.found.links)} segments of WAL" if self.replay else ""
        return f"{self.backup.name}{more}: up to {self.newest:%Y-%m-%d %H:%M:%S.%f UTC}"


@dataclass
class Weighed:
    """Why something that was tried cannot be had; "" where it can."""

    why: str = ""


@contextlib.contextmanager
def weighing(report: Report, what: str) -> Iterator[Weighed]:
    """What fails inside does not end the run: it is told, as a warning, and something else is taken instead. A store
    that is away is not taken for one without backups: that ends it."""
    weighed, begun = Weighed(), len(report.findings)
    try:
        yield weighed
    except (Unreachable, LockLost, NotConfirmed):
        raise
    except OpsError as error:
        bad = [found for found in report.findings[begun:] if found.status is Status.CRITICAL]
        failed = bad[0] if bad and isinstance(error, RunbookFailed) else None
        weighed.why = f"{failed.name}: {failed.value}" if failed else error.message
        report.findings[begun:] = [
            replace(found, status=Status.WARN) if found in bad else found for found in report.findings[begun:]
        ]
        hint = failed.hint if failed else error.hint
        report.warn(f"not taken: {what}", hint or "the next best way was looked for", value=weighed.why)


@dataclass
class Ways:
    """The ways from the backups of the environment `source`, in the stores of this one. `tried` did not stand their
    proof; `wanted` is taken first, whatever it loses; `taken` is the one that came to be live."""

    report: Report
    env: Environment
    source: str
    wanted: str
    tried: set[str] = field(default_factory=set)
    taken: Way | None = None

    def choose(self) -> Way:
        """The one with the least loss whose files are what their manifests say.

        Raises:
            OpsError: there is none (left).
            Unreachable: a store is away.
        """
        while True:
            way = self._ranked()[0]
            with weighing(self.report, way.backup.name) as weighed:
                if way.replay:
                    choice.bring_files(self.report, way.replay.origin)
                else:
                    database.choose_backup(self.report, self.env, way.backup.name, of=self.source)
            if not weighed.why:
                self.report.fact("database from", f"{way.kind}: {way.told}")
                self.report.pin("backup", way.backup.name)
                self._judge_gap(way)
                return way
            self.tried.add(way.backup.name)

    def _judge_gap(self, way: Way) -> None:
        """What lies behind a gap is lost by this way: whoever wants it names the backup."""
        if not way.replay or not (behind := way.replay.found.behind):
            return
        why = way.replay.found.damage or way.replay.origin.chain.end_reason
        self.report.fail(
            "WAL without a gap",
            "look for an intact copy of that segment: the old region's receiver and pg_wal, another bucket; put it "
            f"into the store. Without one, launch this again with backup={way.backup.name}, which accepts that loss",
            value=f"{why}; behind it: {behind.told}",
            expected="whole",
            worst=Status.WARN if way.backup.name == self.wanted else Status.CRITICAL,
        )

    def _ranked(self) -> list[Way]:
        report, reasons = self.report, dict[str, str]()
        found = list[Way]()
        for kind, find in ((PHYSICAL, self._physical), (LOGICAL, self._logical)):
            with weighing(report, kind) as weighed:
                found += find()
            if weighed.why:
                reasons[kind] = weighed.why
        found.sort(key=lambda way: (way.backup.name == self.wanted, way.newest), reverse=True)
        report.table(
            "Ways to bring the database back, the least loss first",
            ("way", "from", "newest point", "lost before now"),
            [(one.kind, one.backup.name, one.newest.isoformat(), _before(report, one)) for one in found]
            + [(kind, why, "none", "") for kind, why in reasons.items()],
        )
        if not found:
            told = "; ".join(f"{kind}: {why}" for kind, why in reasons.items())
            raise OpsError(
                f"nothing in the stores of {self.env.name} brings {self.source}'s database back: {told}",
                "look for another copy of what is damaged: the old region's disks, another bucket",
            )
        return found

    def _physical(self) -> list[Way]:
        """Of the newest base backup that is left and can be used: by all the WAL that goes on from it."""
        store = store_for(self.env, "cluster")
        known = [one for one in open_all(store, "cluster")[0] if one.manifest.environment == self.source]
        left = [one for one in known if one.name == self.wanted or not one.failed]
        left.sort(key=lambda one: (one.name == self.wanted, one.manifest.taken), reverse=True)
        for backup in left:
            if backup.name in self.tried:
                continue
            with weighing(self.report, backup.name) as weighed:
                way = self._replayed(backup.name)
            if not weighed.why:
                return [way]
            self.tried.add(backup.name)
        raise OpsError(
            f"there is no base backup of {self.source} in {store.where}",
            "backup-cluster takes them, replicate-backups copies them",
        )

    def _replayed(self, name: str) -> Way:
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
        return Way(origin.backup, newest, Replay(origin, found, stop, instance))

    def _end_of(self, origin: Origin, found: Found) -> Stop:
        """Where WAL that can be read ends."""
        newest = found.newest
        stop = found.stop or (Stop(newest.lsn, True, newest, None) if newest else Stop(0, False, None, None))
        reachable = stop.before.told if stop.before else f"the backup's own moment, LSN {origin.content.stop_lsn}"
        self.report.fact("newest reachable point by WAL", reachable)
        if found.damage:
            self.report.warn(
                "WAL in the store",
                f"from here everything up to {reachable} can be had; look for that segment elsewhere before anything "
                "is written here",
                value=found.damage,
                expected="whole",
            )
        if not found.links:
            hint = f"only the base backup's own moment can be had; the archiver of {self.source} ships to this place"
            self.report.warn("WAL in the store", hint, value="there is none after the base backup")
        else:
            self.report.fact(
                "WAL that can be read", f"{len(found.links)} segments up to {lsn_text(found.links[-1].end)}"
            )
        return stop

    def _logical(self) -> list[Way]:
        """The newest dump that is left."""
        store = store_for(self.env, "postgres")
        known, unreadable = open_all(store, "postgres")
        if unreadable:
            hint = f"look at them in {store.where}"
            self.report.warn("manifests that cannot be read", hint, value=", ".join(unreadable[-5:]))
        own = [one for one in known if one.manifest.environment == self.source and one.name not in self.tried]
        chosen = [one for one in own if one.name == self.wanted] or [one for one in own if not one.failed]
        if not chosen:
            raise OpsError(
                f"there is no backup of {self.source}'s database in {store.where}", "replicate-backups copies them"
            )
        newest = max(chosen, key=lambda one: one.manifest.taken)
        return [Way(newest, newest.manifest.taken)]


def require_known(env: Environment, source: str, wanted: str, kinds: Collection[str] = ("postgres", "cluster")) -> None:
    """That a backup which was named is there, and the other region's.

    Raises:
        OpsError: it is not.
    """
    if wanted == LATEST:
        return
    kind = kind_of(wanted, "postgres")
    if kind not in kinds:
        raise OpsError(
            f"{wanted} is no backup of a database", "name a dump (backup_…), a base backup (base_…), or latest"
        )
    known = open_all(store_for(env, kind), kind)[0]
    own = [one.name for one in known if one.manifest.environment == source]
    if wanted not in own:
        newest = ", ".join(reversed(own[-3:])) or "none at all"
        raise OpsError(
            f"there is no backup “{wanted[:80]}” of {source} in {store_for(env, kind).where}", f"the newest: {newest}"
        )


def _before(report: Report, way: Way) -> str:
    return f"{(report.started - way.newest).total_seconds():,.1f} s"
