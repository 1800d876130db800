"""The backups of a full restore: the database's, and the Redis and files backups nearest to it in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Literal, TypeVar

from blocks.environment import Environment, Stores
from blocks.redis.server import Redis
from flows.application.files_gate import FilesSource, choose_live_files, planned_loss_since
from flows.database import restore_steps as database
from flows.database.gate import DatabaseGate
from flows.database.waiting_commits import alone_act
from flows.pinned import pin_database, pin_paths, pin_redis
from flows.redis.backup import judge_kept
from flows.redis.restore import capture as redis_capture
from flows.redis.restore import sources as redis_sources
from flows.redis.restore.sources import RedisSource
from flows.redis.restore.steps import judge_redis, living_master
from flows.store import read_files, report_failed, store_for
from runbook import clock, metrics
from runbook.guard.effect import Effect, NoUndo, back_to, seconds_from
from runbook.guard.loss import Loss
from runbook.guard.permit import Act, Permit
from runbook.kinds import permitted_by
from runbook.report import Report, Status
from runbook.units import size
from tasks.application.connection_string import SWITCH
from tasks.application.live_files import LiveFiles
from tasks.application.staged_files import REPLACE_FILES, judge_files_backup
from tasks.backups import catalogue
from tasks.backups.catalogue import Backup
from tasks.migrations.alembic import MIGRATE
from tasks.postgres.dump.fill import DumpSource
from tasks.postgres.restore.staged_copy import dump_in
from tasks.postgres.server.server import Presence, read_identity
from tasks.redis.restore.copy import ACT as REPLACE_REDIS
from tasks.redis.restore.fitness import RedisFitness
from tasks.redis.restore.live import LiveRedis, read_live
from tasks.redis.restore.survivors import SurvivingCopy, Survivors
from tasks.redis.server import answers, live_directory
from tasks.redis.topology.isolation import TAKE_OFF
from tasks.redis.topology.topology import ReplicationTopology, read_topology
from tasks.stores.store import Store

Part = Literal["redis", "files"]
BACKUP_OF: dict[Part, str] = {"redis": "redis backup", "files": "files backup"}


@dataclass(frozen=True)
class OtherParts:
    """The sources of the parts other than the database. A part without a backup is None, and is not restored.
    `redis_topology`: the replicas and Sentinels of Redis. `redis_survivor`: a copy of Redis's data, captured as `redis`
    once the services are stopped. `redis_kept`: the master's data, left as it is. `files_kept`: the live files, left as
    they are. `redis_left`: nothing restores Redis, and it serves: what it has not saved would be lost with its process.
    `redis_live`: the server that is replaced. `files_loss`: the changes of the live files that their backup lacks, as
    far as the plan can tell."""

    redis: Backup | None = None
    files: Backup | None = None
    redis_fitness: RedisFitness | None = None
    redis_topology: ReplicationTopology | None = None
    redis_survivor: SurvivingCopy | None = None
    redis_kept: SurvivingCopy | None = None
    files_kept: LiveFiles | None = None
    redis_live: LiveRedis | None = None
    redis_left: bool = False
    files_loss: Loss | None = None

    @property
    def stops_redis(self) -> bool:
        """Whether the run stops Redis, if the environment has it."""
        return not (self.redis_kept or self.redis_left)

    @property
    def backups(self) -> list[Backup]:
        """Every backup that is restored."""
        return [backup for backup in (self.redis, self.files) if backup]

    def acts(self, env: Environment) -> tuple[Act, ...]:
        """The acts that need a permit."""
        acts = list[Act]()
        if self.redis_topology:
            acts.append(Act(TAKE_OFF, env.redis.data_directory))
        if self.redis or self.redis_survivor:
            acts.append(Act(REPLACE_REDIS, env.redis.data_directory))
        if self.files:
            acts.append(Act(REPLACE_FILES, env.application.directory))
            acts += [Act(SWITCH, env.application.env_file)] * bool(env.application.env_file)
        return tuple(acts)


@dataclass(frozen=True)
class Chosen(OtherParts):
    """The backups of one full restore. `dump`: the database's, without the objects in `accept`."""

    database: Backup = field(kw_only=True)
    dump: DumpSource | None = field(default=None, kw_only=True)

    @property
    def backups(self) -> list[Backup]:
        """Every backup that is restored."""
        return [self.database, *super().backups]

    def acts(self, env: Environment) -> tuple[Act, ...]:
        """The acts that need a permit."""
        own = (database.replace_act(env), Act(MIGRATE, env.postgres.database), alone_act(env))
        return (*own, *super().acts(env))


Parts = TypeVar("Parts", bound=OtherParts)


def pin(report: Report, env: Environment, chosen: Chosen, *, up: bool) -> None:
    """Pin what the run replaces: writes after the plan are lost. `up`: whether the database server answers."""
    pin_database(report, env.postgres, replaced=True, up=up)
    pin_others(report, env, chosen)


def pin_others(report: Report, env: Environment, chosen: OtherParts) -> None:
    """Pin what the run replaces besides the database."""
    if source := chosen.redis or chosen.redis_survivor:
        report.pin_state("backup of Redis", source.name)
        pin_redis(report, env.redis, replaced=True)
    if chosen.redis_kept:
        report.pin_state("Redis", f"kept: {chosen.redis_kept.where}")
    if chosen.redis_left:
        report.pin_state("Redis", "neither stopped nor restored")
    if chosen.files_kept:
        report.pin_state("files", "kept")
    if chosen.files:
        report.pin_state("backup of the files", chosen.files.name)
        pin_paths(report, "live files", env.application.directory)


def effect(
    report: Report, env: Environment, chosen: Chosen, presence: Presence, gate: DatabaseGate, lost: Sequence[str] = ()
) -> Effect:
    """The headline of a plan that restores the dump. `presence`: the database server's; `lost`: the other databases
    that were lost with its data directory."""
    taken = chosen.database.manifest.taken
    down = seconds_from(report.plan_steps, "stop services" if presence == "up" else "")
    losses = (gate.plan(), *map(Loss.everything, lost), *losses_of_others(chosen))
    return Effect(whole_system(env, chosen, taken), undo_of(env, chosen, presence), losses, down)


def losses_of_others(chosen: OtherParts) -> tuple[Loss, ...]:
    """The planned losses of Redis and the files, where their live data is replaced."""
    redis = chosen.redis_survivor or chosen.redis
    return tuple(filter(None, (redis_sources.loss_of(redis) if redis else None, chosen.files_loss)))


def whole_system(env: Environment, chosen: Chosen, at: datetime) -> str:
    """What goes back to which moment, for a plan's headline."""
    others = [
        (f"Redis to {clock.short(chosen.redis.manifest.taken)}" if chosen.redis else ""),
        (f"Redis has the data of {chosen.redis_survivor.name}" if chosen.redis_survivor else ""),
        (f"the files to {clock.short(chosen.files.manifest.taken)}" if chosen.files else ""),
        ("the live files are kept" if chosen.files_kept else ""),
    ]
    return ", ".join([back_to(env.postgres.database, at), *filter(None, others)])


def undo_of(env: Environment, chosen: OtherParts, presence: Presence, cluster: str = "") -> str | NoUndo:
    """The runbooks that undo a full restore, by what it will keep. `cluster`: the one for a cluster that is replaced as
    a whole; otherwise the database is replaced alone."""
    others = undo_of_others(chosen)
    nothing = ""
    if presence == "absent":
        nothing = "the data directory is missing, so nothing of PostgreSQL is kept"
    elif presence == "up" and not cluster and not read_identity(env.postgres, env.postgres.database).oid:
        nothing = f"{env.postgres.database} is missing, so nothing of it is kept"
    if not nothing:
        return ", ".join([cluster or "undo-restore", *others])
    return f"{', '.join(others)} ({nothing})" if others else NoUndo(nothing)


def undo_of_others(chosen: OtherParts) -> list[str]:
    """The runbooks that undo the restore of Redis and the files."""
    redis = ["undo-restore-redis"] * bool(chosen.redis or chosen.redis_survivor)
    return redis + ["undo-restore-files"] * bool(chosen.files)


def choose(
    report: Report,
    env: Environment,
    wanted: str,
    source: Stores,
    without: Sequence[Part] = (),
    accept: Sequence[str] = (),
    redis_source: RedisSource = "auto",
    files_source: FilesSource = "auto",
    *,
    latest: bool,
    strict: bool = False,
) -> Chosen:
    """Find all three, read all their files, and judge each against the live part that it replaces. The parts in
    `without` are not restored. `latest`: see `with_others`; `strict`: see `choose_backup`.

    Raises:
        OpsError: there is no such backup of the database, or a store is unreachable.
        RunbookFailed: one of them is damaged; nothing was touched.
    """
    chosen = database.choose_backup(report, env, wanted, source, failed_too=bool(accept), strict=strict)
    dump = database.without_accepted(report, env, dump_in(chosen), accept)
    others = with_others(
        *(report, env, chosen, chosen.manifest.taken, source, without, redis_source, files_source), latest=latest
    )
    if others.redis_kept:
        redis_sources.report_newer(report, others.redis_kept, chosen.manifest.taken)
    return replace(others, dump=dump)


def with_others(
    report: Report,
    env: Environment,
    database: Backup,
    moment: datetime,
    source: Stores,
    without: Sequence[Part] = (),
    redis_source: RedisSource = "backup",
    files_source: FilesSource = "backup",
    *,
    latest: bool = True,
) -> Chosen:
    """Add the Redis and files backups nearest to `moment`, the database's point in time, and judge them. `latest`: no
    earlier point in time was asked for, so a surviving copy of Redis's data can replace its backup, and intact live
    files stay.

    Raises:
        OpsError: a store is unreachable.
        RunbookFailed: one of them is damaged; nothing was touched.
    """
    others = choose_others(
        *(report, env, moment, source, without, redis_source, files_source), latest=latest, database=database
    )
    return Chosen(**vars(others), database=database)


def choose_others(
    report: Report,
    env: Environment,
    moment: datetime,
    source: Stores,
    without: Sequence[Part] = (),
    redis_source: RedisSource = "backup",
    files_source: FilesSource = "backup",
    *,
    latest: bool = True,
    database: Backup | None = None,
) -> OtherParts:
    """The sources of Redis and the files, nearest to `moment`; of Redis the one that loses least, where no earlier
    point in time was asked for (`latest`). `database`: its backup, if the environment has one."""
    found = OtherParts()
    if env.has("redis"):
        found = _choose_redis(report, env, moment, source, redis_source, database, "redis" in without, latest=latest)
    files = None
    if env.has("application") and env.application.directory:
        live = Path(env.application.directory)
        files = _nearest(report, env, source, "files", database, moment, live, "files" in without)
    files_kept = choose_live_files(report, env, files, files_source, latest=latest) if files else None
    if files_kept:
        files = None
    if files:
        _judge_files(report, env, files)
    report.fail_if_critical()
    lost = planned_loss_since(env, files) if files else None
    chosen = replace(found, files=files, files_kept=files_kept, files_loss=lost)
    if other := other_master(env, chosen):
        judge_kept(report, env, other)
        report.fail_if_critical()
    return chosen


def other_master(env: Environment, chosen: OtherParts) -> Redis | None:
    """Another server that is the master of Redis now, and whose data is replaced: it becomes a replica of the restored
    data. A surviving copy that is restored needs no backup besides its capture."""
    if not (chosen.redis_topology and (chosen.redis or chosen.redis_survivor)):
        return None
    found = living_master(env, chosen.redis_topology)
    restored = chosen.redis_survivor.where if chosen.redis_survivor else ""
    return found if found and found.address != restored else None


def _choose_redis(
    report: Report,
    env: Environment,
    moment: datetime,
    source: Stores,
    redis_source: RedisSource,
    database: Backup | None,
    waived: bool,
    *,
    latest: bool,
) -> OtherParts:
    judged = read_live(env.redis)
    around = read_topology(env.redis, env.reports_directory)
    survivors, wants_survivor = Survivors(), redis_source != "backup" and not waived
    if wants_survivor:
        survivors = redis_sources.find(report, env, around)
    newest, live = latest and redis_source == "auto", live_directory(env.redis)
    backup = _nearest(report, env, source, "redis", database, moment, live, waived, survivors, newest=newest)
    damage = read_files(report, backup) if backup else []
    copy = None
    if wants_survivor:
        copy = redis_sources.choose(
            *(report, env, survivors, around, backup, redis_source), latest=latest, damaged=bool(damage)
        )
    if copy and copy.kind == "live":
        return OtherParts(redis_kept=copy)
    if copy:
        fitness = redis_capture.judge(report, env, copy, around)
        if database:
            redis_capture.judge_gap(report, copy, moment)
        return OtherParts(redis_fitness=fitness, redis_topology=around, redis_survivor=copy, redis_live=judged)
    if backup:
        judged_backup = judge_redis(report, env, backup, damage, around)
        return OtherParts(backup, redis_fitness=judged_backup, redis_topology=around, redis_live=judged)
    left = live.is_dir() and answers(env.redis)
    return OtherParts(redis_topology=None if left else around, redis_left=left)


def captured(report: Report, permit: Permit, env: Environment, chosen: Parts, live: LiveRedis | None) -> Parts:
    """With the surviving copy of Redis's data as a proven backup, if it is the source. The services are stopped.
    `live`: Redis just before its stop.

    Raises:
        LossExceeded: more would be lost than was confirmed. Nothing live was replaced.
        OpsError: it cannot be read. Nothing live was replaced.
    """
    if not (chosen.redis_survivor and live):
        return chosen
    with permitted_by(permit):
        backup, loss = redis_capture.capture(report, env, chosen.redis_survivor, live)
    return replace(chosen, redis=backup, redis_survivor=replace(chosen.redis_survivor, loss=loss))


def _nearest(
    report: Report,
    env: Environment,
    source: Stores,
    kind: Part,
    database: Backup | None,
    moment: datetime,
    live: Path,
    waived: bool,
    survivors: Survivors | None = None,
    *,
    newest: bool = False,
) -> Backup | None:
    """The backup nearest to a point in time, or the `newest`, of the database's environment, and the gap between the
    two. None without a backup, or where it is waived: that part is not restored. Where its live data is missing too,
    and none of the `survivors` is complete, only a waiver lets it start empty."""
    if waived:
        report.fact(BACKUP_OF[kind], f"skipped (without={kind})")
        return None
    store = store_for(env, kind, source)
    name = database.manifest.environment if database else env.name
    backup = catalogue.find_nearest.after(database)(store, kind, clock.now() if newest else moment, name)
    if not backup:
        _report_none(report, store, kind, live, survivors or Survivors())
        return None
    if backup.failed:
        report_failed(report, backup, backup)
    if not database:
        report.fact(BACKUP_OF[kind], f"{backup.name} ({size(backup.manifest.bytes)})")
        return backup
    gap = abs((backup.manifest.taken - moment).total_seconds())
    report.fact(BACKUP_OF[kind], f"{backup.name} ({size(backup.manifest.bytes)}), {gap:.0f} s from the database's")
    hint = f"expect inconsistencies: the database and {kind} are from different times"
    report.judge(metrics.BACKUP_GAP, gap, hint, of=kind, worst=Status.WARN)
    return backup


def _report_none(report: Report, store: Store, kind: Part, live: Path, survivors: Survivors) -> None:
    """There is no backup: nothing to do where the data is there, else it has to be found."""
    if live.exists() or survivors.able:
        hint = f"nothing to do now: {kind} is not restored. Back it up from now on"
        value = f"none in {store.where}" + ("" if live.exists() else f", and {live} is missing")
        report.warn(BACKUP_OF[kind], hint, value=value)
        return
    coming = ", ".join(copy.name for copy in survivors.not_yet)
    wait = f"wait until the data of {coming} is complete, and run this again"
    search = wait if coming else "find one (source=copies)"
    report.fail(
        BACKUP_OF[kind],
        f"{search}. To start with {kind} empty, run this with without={kind}",
        value=f"none in {store.where}, and {live} is missing"
        + "".join(f"; {copy.name}: {copy.problem}" for copy in survivors.copies),
    )


def _judge_files(report: Report, env: Environment, backup: Backup) -> None:
    damage = read_files(report, backup)
    found = judge_files_backup(env.application, backup, damage)
    report.require(
        f"files of {backup.name}",
        not found.problems,
        f"move {backup.name} out of {backup.store.where} and run this again: it uses the next nearest backup",
        value="; ".join(found.problems[:3]) or f"{found.entries:,} entries, {size(backup.manifest.bytes)}",
        expected="as in the manifest (SHA-256), with enough free disk space",
    )
