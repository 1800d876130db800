"""What a full restore brings back: the database's backup, and the Redis and files backups nearest to it."""

from __future__ import annotations

from dataclasses import dataclass

from blocks.environment import Environment, Stores
from flows.database import steps as database
from flows.redis.steps import judge_redis
from flows.store import read_files, store_for
from runbook.errors import OpsError
from runbook.permit import Act
from runbook.render import size
from runbook.report import Report, Status
from tasks import catalogue
from tasks.catalogue import Backup
from tasks.files import REPLACE_FILES, judge_files_backup
from tasks.manifest import Kind
from tasks.migrations.alembic import MIGRATE
from tasks.redis.copy import ACT as REPLACE_REDIS
from tasks.redis.fitness import RedisFitness
from tasks.stores.store import Store


@dataclass(frozen=True)
class Chosen:
    """The backups of one full restore; None where there is none, and that part is left as it is."""

    database: Backup
    redis: Backup | None
    files: Backup | None
    redis_fitness: RedisFitness | None = None

    def acts(self, env: Environment) -> tuple[Act, ...]:
        """What the run needs a permit for."""
        acts = [database.replace_act(env), Act(MIGRATE, env.postgres.database)]
        if self.redis:
            acts.append(Act(REPLACE_REDIS, env.redis.data_directory))
        if self.files:
            acts.append(Act(REPLACE_FILES, env.application.directory))
        return tuple(acts)


def choose(report: Report, env: Environment, wanted: str, source: Stores) -> Chosen:
    """Find all three, read all their files, and judge each against what it is to replace.

    Raises:
        OpsError: there is no such backup of the database.
        RunbookFailed: one of them is damaged; nothing was touched.
    """
    chosen = database.choose_backup(report, env, wanted, source)
    redis = _nearest(report, store_for(env, "redis", source), "redis", chosen) if env.has("redis") else None
    wants_files = env.has("application") and env.application.directory
    files = _nearest(report, store_for(env, "files", source), "files", chosen) if wants_files else None
    fitness = judge_redis(report, env, redis, read_files(report, redis)) if redis else None
    if files:
        _judge_files(report, env, files)
    report.fail_if_critical()
    return Chosen(chosen, redis, files, fitness)


def _nearest(report: Report, store: Store, kind: Kind, database: Backup) -> Backup | None:
    """The backup nearest to the database's, of the same environment, and the gap between the two."""
    taken = database.manifest.taken
    try:
        backup = catalogue.find_nearest.after(database)(store, kind, taken, database.manifest.environment)
    except OpsError as error:
        report.warn(f"{kind} backup", f"{kind} is left as it is; take backups of it too", value=error.message)
        return None
    gap = abs((backup.manifest.taken - taken).total_seconds())
    report.fact(f"{kind} backup", f"{backup.name} ({size(backup.manifest.bytes)}), {gap:.0f} s from the database's")
    hint = f"database and {kind} are of different times: expect rows without keys"
    report.judge("backup.gap_seconds", gap, hint, of=kind, worst=Status.WARN)
    return backup


def _judge_files(report: Report, env: Environment, backup: Backup) -> None:
    damage = read_files(report, backup)
    found = judge_files_backup(env.application, backup, damage)
    report.expect(
        f"files of {backup.name}",
        not found.problems,
        f"move {backup.name} out of {backup.store.where} and launch again: the next nearest is taken",
        value="; ".join(found.problems[:3]) or f"{found.entries:,} entries, {size(backup.manifest.bytes)}",
        expected="as in the manifest (SHA-256), and there is room",
    )
