"""The recovery of a database with the least loss: from a base backup and WAL, or from a dump. Where one fails, the
report says why, and the next one is tried. full-restore uses it in place, region-failover in another region."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from blocks.environment import Environment, Stores
from blocks.postgres import nodes
from flows.database import restore_steps as database
from flows.database.base_backup import judge_space, judge_version
from flows.database.free_space import WAL_RATIO, judge_room
from flows.database.wal_reading import mend
from flows.loss import planned_loss_of
from flows.recovery.destruction import (
    BackupTables,
    DatabaseAtEnd,
    find_target,
    newest_dump,
    read_live_end,
    report_target,
    tables_of,
)
from flows.recovery.full.start import other_databases_in
from flows.recovery.point import choice
from flows.recovery.point.choice import PointOrigin
from flows.recovery.point.target import FoundTarget, find_in_wal, report_prepared
from flows.recovery.restore_option import (
    DUMP_RATIO,
    LOGICAL,
    PHYSICAL,
    Replay,
    RestoreOption,
)
from flows.store import judge_drops, report_failed, store_for
from runbook.errors import OpsError, RunbookFailed
from runbook.guard.loss import Loss
from runbook.kinds import Pending
from runbook.report import Report, Status
from runbook.units import duration, size
from tasks.backups.catalogue import LATEST, Backup, kind_of, open_all
from tasks.cluster.content import cluster_in
from tasks.cluster.copy import BuiltCluster
from tasks.cluster.instance import PrivateInstance, prepare_instance, put_away, root_for, sweep_instance
from tasks.cluster.target import RecoveryTarget, Stop
from tasks.host.disk import disk_on
from tasks.postgres.restore.staged_copy import content_in
from tasks.postgres.server.server import presence, read_database_bytes
from tasks.recovery_points.wal import LEAST_COMMIT_BYTES
from tasks.wal.format.names import lsn_of, lsn_text
from tasks.wal.reading.supply import system_here

NEWEST = RecoveryTarget("latest")
COLUMNS = ("kind", "backup", "newest point", "lost", "takes", "disk space: needed / free", "")
OPTIONS = "Recovery options for the database, the least loss first"
ASKED = "backup asked for"


@dataclass
class RestoreAttempt:
    """Why an attempt failed; "" where it succeeded."""

    failure: str = ""


@contextlib.contextmanager
def attempting(report: Report, what: str) -> Iterator[RestoreAttempt]:
    """A failure inside does not end the run: it becomes a WARN, and the run tries the next option, unless the error
    `ends_run`."""
    attempt, first = RestoreAttempt(), len(report.findings)
    try:
        yield attempt
    except OpsError as error:
        if error.ends_run:
            raise
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
    to try first, whatever it loses; `used`: the one that is live now.

    `kinds`: those that may be used; `stores`: where the backups are. `before`: a transaction ID, or `none`, by which a
    person chose the target; `end`: the database at the end of its WAL, once a staged copy has shown it; `rejected`: the
    transactions that a copy showed not to be the ones that destroyed data. `others`: databases of the cluster that must
    not be set back: the application's is taken out of the recovered cluster. `loss`: by the chosen one. `live_end`: the
    live database, when its server answered last. `timeline`: the one that WAL follows; 0: the one in use.
    `acknowledged`: the LSN that the archive must reach (`choice.ship`)."""

    report: Report
    env: Environment
    source: str
    wanted: str
    kinds: Sequence[str] = (PHYSICAL, LOGICAL)
    stores: Stores = "backups"
    before: str = ""
    tried: set[str] = field(default_factory=set)
    used: RestoreOption | None = None
    end: DatabaseAtEnd | None = None
    rejected: set[int] = field(default_factory=set)
    loss: Loss = field(default_factory=Loss)
    live_end: DatabaseAtEnd | None = None
    others: Sequence[str] = ()
    timeline: int = 0
    acknowledged: int = 0

    @property
    def asked(self) -> str:
        """The backup that a person asked for. `wanted` has a name also where the confirmed plan was made for latest."""
        return self.report.pin_question(ASKED, self.wanted)

    @property
    def in_place(self) -> bool:
        """Whether the environment restores its own backups."""
        return self.source == self.env.name

    @functools.cached_property
    def newest_dump(self) -> Backup | None:
        """The newest dump, which shows what the tables should have."""
        return newest_dump(self.env, self.source, self.stores)

    @functools.cached_property
    def tables(self) -> BackupTables:
        """The tables that the newest dump has rows of."""
        return tables_of(self.newest_dump)

    @functools.cached_property
    def database_bytes(self) -> int:
        """The size of the application's database: the live one's or the newest dump's. The live one may be emptied."""
        known = [content_in(self.newest_dump).bytes] if self.newest_dump else []
        with contextlib.suppress(OpsError):
            known.append(read_database_bytes(self.env.postgres, self.env.postgres.database))
        return max(known, default=0)

    def choose(self) -> RestoreOption:
        """The option with the least loss whose files match their manifests.

        Raises:
            OpsError: none is left.
            Unreachable: a store does not answer.
        """
        while True:
            found, reasons = self._ranked()
            option = found[0]
            with attempting(self.report, option.backup.name) as attempt:
                if option.replay:
                    choice.fetch_files(self.report, option.replay.origin)
                elif not self.in_place:  # there the dump is judged with the rest of its restore
                    database.choose_backup(self.report, self.env, option.backup.name, of=self.source)
            if not attempt.failure:
                self._show(found, reasons, option)
                self.report.fact("database from", f"{option.kind}: {option.text}")
                self.report.pin("backup", option.backup.name)
                self.report.pin_state("backup", option.backup.name)
                self._judge_gap(option)
                if option.replay:
                    report_target(self.report, option.replay.target, option.replay.found.newest)
                    self.report.pin("timeline", option.replay.origin.chain.timeline.number)
                    report_prepared(self.report, option.replay.found, option.replay.stop)
                return option
            self.tried.add(option.backup.name)

    def again(self, option: RestoreOption, building: Pending[BuiltCluster] | None = None) -> RestoreOption:
        """The same base backup with the WAL that the archive has now, up to the target by what is known now (`end`).
        `building`: its data directory, which is kept.

        Raises:
            OpsError: the WAL cannot be read.
        """
        assert option.replay
        if not building:
            put_away(option.replay.instance)
        found = self._replayed(option.backup.name, option.replay.instance, building)
        assert found.replay
        report_target(self.report, found.replay.target, found.replay.found.newest)
        return found

    def _judge_gap(self, option: RestoreOption) -> None:
        """The option loses what follows a gap in the WAL: the operator must accept that by naming the backup."""
        if not option.replay or not (behind := option.replay.found.behind):
            return
        why = option.replay.found.damage or option.replay.origin.chain.end_reason
        where = "the WAL receiver and pg_wal" if self.in_place else "the old region's WAL receiver and pg_wal"
        self.report.fail(
            "WAL without a gap",
            f"find an intact copy of that segment ({where}, another bucket) and copy it into the store. Without one, "
            f"run this again with backup={option.backup.name}, which accepts that loss",
            value=f"{why}; after it: {behind.text}",
            expected="no gap",
            worst=Status.WARN if option.backup.name == self.asked else Status.CRITICAL,
        )

    def _ranked(self) -> tuple[list[RestoreOption], dict[str, str]]:
        """The options, the least loss first; and why a kind has none."""
        reasons, found = dict[str, str](), list[RestoreOption]()
        for kind, find in ((PHYSICAL, self._physical), (LOGICAL, self._logical)):
            if kind not in self.kinds:
                continue
            with attempting(self.report, kind) as attempt:
                found += find()
            if attempt.failure:
                reasons[kind] = attempt.failure
        found.sort(key=lambda one: self._rank(one, found), reverse=True)
        if not found:
            failures = "; ".join(f"{kind}: {why}" for kind, why in reasons.items())
            where = "the servers' disks" if self.in_place else "the old region's disks"
            raise OpsError(
                f"nothing in the stores of {self.env.name} restores {self.source}'s database: {failures}",
                f"find another copy of what is damaged: on {where}, in another bucket",
            )
        return found, reasons

    def _rank(self, option: RestoreOption, others: Sequence[RestoreOption]) -> tuple[bool, bool, datetime, bool]:
        """The wanted one first, then one that restores other lost databases, then the newest. On an idle database a
        dump is younger than the last commit, which the WAL has too: then neither loses anything, and the cluster is
        restored exactly. To take one database out of the cluster takes longer than to restore the dump."""
        restores = bool(option.replay) and self._restores_others(option.backup)
        newest = min([option.newest, *(one.newest for one in others if self._covers(one, option))])
        return option.backup.name == self.wanted, restores, newest, option.kind == PHYSICAL

    def _restores_others(self, backup: Backup) -> bool:
        """Return True if a base backup has other databases of a cluster that is lost."""
        is_lost = not self.in_place or presence(self.env.postgres) == "absent"
        return is_lost and bool(other_databases_in(self.env, backup))

    def _covers(self, cluster: RestoreOption, dump: RestoreOption) -> bool:
        """Whether the WAL up to the target has everything that the dump has. Positions of two clusters do not
        compare."""
        if not cluster.replay or dump.replay or not self.in_place:
            return False
        replay, origin = cluster.replay, cluster.replay.origin
        live = nodes.ask(self.env.postgres)
        if (live.system if live else system_here(self.env)) != origin.content.system:
            return False
        stop = replay.stop.lsn if replay.target.destruction or replay.found.damage else origin.chain.end
        # The end of an unfinished segment is its last byte that is not zero.
        return lsn_of(content_in(dump.backup).lsn) < stop + LEAST_COMMIT_BYTES

    def _show(self, found: Sequence[RestoreOption], reasons: Mapping[str, str], chosen: RestoreOption) -> None:
        """The options with their losses, and the chosen one."""
        confirmed = planned_loss_of(self.report, self.env.postgres.database)
        losses = [one.planned_loss(self.env, in_place=self.in_place, confirmed=confirmed) for one in found]
        self.loss = losses[found.index(chosen)]
        disk = disk_on(self.env.postgres.host, Path(self.env.postgres.data_directory).parent)
        free = size(disk.free_bytes) if disk else "not measured"
        rows = [
            (
                *(one.kind, one.backup.name, one.newest.astimezone(self.env.zone).isoformat(" ")),
                *(loss.text, f"about {duration(one.expected_seconds(self.env))}"),
                *(f"{size(one.needs)} / {free}", "chosen" if one is chosen else ""),
            )
            for one, loss in zip(found, losses, strict=True)
        ]
        self.report.table(OPTIONS, COLUMNS, [*rows, *((kind, why, "none", *[""] * 4) for kind, why in reasons.items())])

    def _physical(self) -> list[RestoreOption]:
        """The newest usable base backup, with all WAL after it. A table that was emptied before the newest dump is not
        known to be emptied by a statement: it is named."""
        if self.newest_dump:
            judge_drops(self.report, self.newest_dump)
        store = store_for(self.env, "cluster", self.stores)
        for backup in self.base_backups():
            if backup.name in self.tried:
                continue
            with attempting(self.report, backup.name) as attempt:
                option = self._replayed(backup.name)
            if not attempt.failure:
                return [option]
            self.tried.add(backup.name)
        tried = ", ".join(sorted(name for name in self.tried if kind_of(name, "postgres") == "cluster"))
        raise OpsError(
            f"no other base backup of {self.source} is in {store.where}: {tried} was tried"
            if tried
            else f"there is no base backup of {self.source} in {store.where}",
            "run backup-cluster"
            if self.in_place
            else "take them with backup-cluster there, and copy them with replicate-backups",
        )

    def base_backups(self) -> list[Backup]:
        """Those to try, in order: the wanted one, then the newest. In place, only those of the live cluster, if its
        server answers."""
        store = store_for(self.env, "cluster", self.stores)
        known = [one for one in open_all(store, "cluster")[0] if one.manifest.environment == self.source]
        live = nodes.ask(self.env.postgres) if self.in_place and known else None
        left = [
            one
            for one in known
            if (one.name == self.asked or not one.failed) and (not live or cluster_in(one).system == live.system)
        ]
        return sorted(left, key=lambda one: (one.name == self.wanted, one.manifest.taken), reverse=True)

    def _replayed(
        self, name: str, built: PrivateInstance | None = None, building: Pending[BuiltCluster] | None = None
    ) -> RestoreOption:
        """The base backup with its WAL, in a new instance, or in the one that is `built` already."""
        report, env = self.report, self.env
        of = "" if self.in_place else self.source
        origin = choice.choose_origin(
            *(report, env, NEWEST, name, self.timeline, self.stores), of=of, acknowledged=self.acknowledged
        )
        judge_version(report, env, origin.backup)
        extracted_bytes = (self.database_bytes or origin.content.bytes) if self.others else 0
        if not building:  # it uses that space already
            judge_space(report, env, origin.whole, len(origin.chain.links) * origin.content.segment_bytes)
            self._judge_extraction_space(extracted_bytes)
        report.fail_if_critical()
        root = root_for(env.postgres)
        if built and building:
            instance = built
            shutil.rmtree(root / "wal", ignore_errors=True)  # the newest segment has grown
        else:
            sweep_instance(root)
            instance = prepare_instance(env.postgres, root)
            report.at_end(lambda: put_away(instance))
        found = find_in_wal(env, origin, NEWEST, root / "wal")
        mend(report, origin.archive, found.replaced, found.undecodable, root / "wal")
        latest = self._end_of(origin, found)
        end = self.end
        if end is None and self.in_place:
            live_end = read_live_end(env, origin.content.system, self.tables.rows)
            end = self.live_end = live_end or self.live_end  # behind the fence no server answers
        target = find_target(
            *(report, env, origin, found, latest, root / "wal", self.tables, end, self.before), self.rejected
        )
        before = target.stop.before
        newest = before.at if before else cluster_in(origin.backup).stopped
        newest = target.destruction.end.at if target.destruction else newest
        replay = Replay(origin, found, target, instance, building)
        return RestoreOption(origin.backup, newest, replay, extracted_bytes)

    def _judge_extraction_space(self, size_bytes: int) -> None:
        """Free disk space for the dump of the database, and for the staged copy that is restored from it."""
        if not size_bytes:
            return
        dump = {store_for(self.env, "postgres").hands: int(size_bytes * DUMP_RATIO)}
        why = "the dump of the database, and its staged copy"
        judge_room(self.report, self.env, size_bytes, int(size_bytes * WAL_RATIO), why, absent=True, here=dump)

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
        if found.links:
            self.report.fact("readable WAL", f"{len(found.links)} segments up to {lsn_text(found.links[-1].end)}")
        elif origin.chain.links and not found.damage:  # nobody wrote
            self.report.fact("readable WAL", f"{len(origin.chain.links)} segments, no commit after the base backup")
        else:
            hint = f"check that the archiver of {self.source} ships to this store; only the base backup can be restored"
            self.report.warn("WAL in the store", hint, value="none after the base backup")
        return stop

    def _logical(self) -> list[RestoreOption]:
        """The newest dump that did not fail."""
        store = store_for(self.env, "postgres", self.stores)
        known, unreadable = open_all(store, "postgres")
        if unreadable:
            hint = f"check them in {store.where}"
            self.report.warn("unreadable manifests", hint, value=", ".join(unreadable[-5:]))
        own = [one for one in known if one.manifest.environment == self.source and one.name not in self.tried]
        usable = [one for one in own if one.name == self.asked or not one.failed]
        chosen = [one for one in usable if one.name == self.wanted] or usable
        if not chosen:
            raise OpsError(
                f"there is no dump of {self.source}'s database in {store.where}", "copy them with replicate-backups"
            )
        newest = max(chosen, key=lambda one: one.manifest.taken)
        report_failed(self.report, max(own, key=lambda one: one.manifest.taken), newest)
        judge_drops(self.report, newest)
        return [RestoreOption(newest, newest.manifest.taken)]


def require_known(
    env: Environment,
    source: str,
    wanted: str,
    kinds: Collection[str] = ("postgres", "cluster"),
    stores: Stores = "backups",
) -> None:
    """Check that the named backup exists, and is of the environment `source`.

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
    store = store_for(env, kind, stores)
    own = [one.name for one in open_all(store, kind)[0] if one.manifest.environment == source]
    if wanted not in own:
        newest = ", ".join(reversed(own[-3:])) or "none"
        raise OpsError(f"there is no backup “{wanted[:80]}” of {source} in {store.where}", f"the newest: {newest}")
