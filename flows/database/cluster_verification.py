"""What verifying a base backup consists of, called with the open report."""

from __future__ import annotations

from collections.abc import Sequence

from blocks.environment import Environment, Stores
from blocks.wal import Wal
from flows import store
from flows.database.room import judge_room
from flows.database.wal_reading import judge_wal
from flows.store import mark_failed, mark_verified, store_for
from runbook.errors import OTHER_BACKUPS, RunbookFailed, VerificationFailed
from runbook.render import duration
from runbook.report import Report
from tasks.catalogue import Backup, open_all
from tasks.cluster.content import cluster_in, lineage
from tasks.cluster.copy import build_instance, read_whole
from tasks.cluster.instance import (
    VERIFYING,
    prepare_instance,
    put_away,
    root_for,
    running,
    sweep_instance,
)
from tasks.cluster.recovery import wait_recovered
from tasks.cluster.target import Stop
from tasks.postgres.server import program_version


def wal_of(env: Environment) -> Wal | None:
    """How its WAL is kept, where the environment says it."""
    return env.wal if env.has("wal") else None


AT_ONCE = Stop(0, inclusive=False, before=None, after=None)


def choose(report: Report, env: Environment, wanted: str, source: Stores) -> list[Backup]:
    """A base backup and all that it stands on, at hand.

    Raises:
        OpsError: there is none.
        RunbookFailed: one of them is damaged.
    """
    chosen = store.choose_backup(report, env, "cluster", wanted, source)
    return at_hand(report, env, chosen, source)


def at_hand(report: Report, env: Environment, chosen: Backup, source: Stores) -> list[Backup]:
    """What a base backup, which is at hand, stands on, at hand too."""
    whole = lineage(chosen, open_all(store_for(env, "cluster", source), "cluster")[0])
    for backup in whole[:-1]:
        problems = store.read_files(report, backup)
        report.expect(f"files of {backup.name}", not problems, f"{chosen.name} stands on it; {OTHER_BACKUPS}",
                      value="; ".join(problems[:3]) or "whole", expected="as in the manifest (SHA-256)")  # fmt: skip
    report.fact("stands on", " ← ".join(backup.name for backup in reversed(whole)))
    report.fail_if_critical()
    return whole


def judge_version(report: Report, env: Environment, backup: Backup) -> None:
    """A physical copy runs with its own major version only."""
    found, wanted = program_version(env.postgres, "postgres"), cluster_in(backup).major
    report.expect("version of PostgreSQL", found == wanted,
                  f"install PostgreSQL {wanted}'s programs and name them in [postgres] programs",
                  value=found, expected=wanted)  # fmt: skip


def judge_space(report: Report, env: Environment, whole: Sequence[Backup], wal_bytes: int = 0) -> None:
    """The copy stands beside the live data; of several backups, both their parts and the whole."""
    content = cluster_in(whole[-1])
    needed = content.bytes * (2 if len(whole) > 1 else 1) + wal_bytes
    judge_room(report, env, int(needed * 1.05), 0, "the copy stands beside the live data", absent=True)


def verify_cluster(report: Report, env: Environment, wanted: str, source: Stores) -> Backup:
    """Build it beside on a private instance, verify the files as PostgreSQL does, recover it to its own moment, and
    read every row and every index of every database of it.

    Raises:
        RunbookFailed, VerificationFailed: it does not restore.
    """
    whole = choose(report, env, wanted, source)
    chosen = whole[-1]
    judge_version(report, env, chosen)
    judge_space(report, env, whole)
    report.fail_if_critical()
    root = root_for(env.postgres, VERIFYING)
    sweep_instance(root)
    instance = prepare_instance(env.postgres, root)
    try:
        built = build_instance(instance, whole, verify=True, wal=wal_of(env))
        with running(instance, AT_ONCE, cluster_in(chosen).timeline):
            wait_recovered(instance, cluster_in(chosen).system)
            read = read_whole(instance.postgres)
    except (VerificationFailed, RunbookFailed) as error:  # another says nothing of the backup
        mark_failed(report, chosen, str(error))
        raise
    finally:
        put_away(instance)
    report.fact("restored in", duration(built.seconds))
    report.table("Read on the private instance", ("database", "tables", "rows"), read.rows)
    report.expect("every page could be read", not read.problems, "take another backup; look at the live cluster's disk",
                  value="; ".join(read.problems[:3]) or f"{len(read.rows)} databases")  # fmt: skip
    report.fail_if_critical()
    mark_verified(report, chosen)
    judge_wal(report, env, chosen, source)
    return chosen
