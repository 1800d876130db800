"""Persistence of Redis: check, snapshot, backup and restore (§2.3)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from blocks.environment import Environment, Stores
from flows import store as stores
from flows.pinned import pin_redis
from flows.redis import persistence_files as files
from flows.redis import persistence_findings as findings
from flows.redis import snapshot
from flows.redis.backup import Form, report_results, take
from flows.redis.master import judge_master
from flows.redis.restore import choice, methods, survivor
from flows.redis.restore.survivor import NamedSource
from flows.redis.snapshot import Kind
from runbook.change import carrying_out
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.report import Report
from runbook.run import WithoutConfirm, runbook
from runbook.run_name import RunName
from runbook.units import about, size
from tasks.redis.persistence.place import read_place
from tasks.redis.persistence.saving import rewrite_aof, save_in_background
from tasks.redis.persistence.state import read_persistence
from tasks.redis.persistence.written import read_written
from tasks.redis.restore.prefixes import Extra
from tasks.redis.sentinels import read_sentinels
from tasks.redis.topology.topology import find_record


@flow(name="check-redis-persistence", flow_run_name=RunName("check-redis-persistence {environment}"))
def check_redis_persistence(environment: str) -> Report:
    """永続化設定（RDB/AOF）・保存状態確認 (§2.3)

    Checks whether the data would survive a crash: the RDB and AOF settings, the last save and rewrite, disk, fork and
    kernel, the files that the next start would load, and the writes that a kill would lose now, against the RPO. Run it
    daily, and first if clients get MISCONF.

    It changes nothing. Undo: nothing to undo. Evidence: each setting next to the manual's, and the table of files.

    Departs from the manual: settings are compared by effect (saving more often is accepted), and the running ones also
    with the configuration file. Since version 7 the AOF has several files: there is no appendonly.aof in
    /var/lib/redis.

    Args:
        environment: Environment (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Check Redis persistence", env) as report:
        watch = read_sentinels(env.redis)
        server = read_persistence(judge_master(report, env.redis, watch, changes=False))
        place = read_place(server)
        written, problem = read_written(server)
        findings.judge_server(report, server)
        findings.judge_failures(report, server, place, watched=bool(watch.views))
        findings.judge_loss(report, server, place, env.rpo_seconds)
        findings.judge_settings(report, server)
        findings.judge_last(report, server)
        findings.judge_cost(report, server)
        files.judge_place(report, server, place)
        files.judge_files(report, server, place, written)
        files.judge_written(report, server, written, problem)
        files.judge_sentinels(report, env.redis.sentinel_master, watch)
        files.judge_detached(report, find_record(env.reports_directory))
        report.outcome = f"a kill now would lose {report.facts['a kill now would lose']}"
    return report


@flow(name="snapshot-redis", flow_run_name=RunName("snapshot-redis {environment} {kind}"))
def snapshot_redis(environment: str, kind: Kind = "bgsave", plan: str = "", confirm: str = "") -> Report:
    """手動でのスナップショット作成 (§2.3)

    Runs BGSAVE, SAVE or BGREWRITEAOF and waits until it has succeeded, with progress. It first waits for a save that is
    already running. Run it before a restart, or if check-redis-persistence recommends it. It takes no backup: use
    backup-redis.

    It changes no data. Undo: nothing to undo. The old file stays until the new one is complete. SAVE blocks every
    client until it ends: with an empty confirm the plan shows for how long. Evidence: the file, its time, the fork's
    cost.

    Departs from the manual: BGSAVE and BGREWRITEAOF return immediately, and LASTSAVE alone does not distinguish a
    failed save from a running one. SAVE is refused if it would outlast the Sentinels' down-after-milliseconds.

    Args:
        environment: Environment (lab, staging, production …)
        kind: bgsave: save in the background; save: blocks all clients; rewrite: rewrite the AOF
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: For kind=save: type the environment's name to carry it out. Empty: only show the plan. Other kinds do
            not need it
    """
    env = Environment.find(environment)
    alone: WithoutConfirm = "reads" if kind == "save" else "changes"
    with runbook("Snapshot Redis", env, confirm, plan, changes=True, without_confirm=alone) as report:
        watch = read_sentinels(env.redis)
        block = judge_master(report, env.redis, watch, changes=False)
        server = read_persistence(block)
        snapshot.judge_save(report, server, read_place(server), kind)
        report.fail_if_critical()
        if kind == "save":
            snapshot.judge_standstill(report, server, watch)
            saving = snapshot.saving(block, server)
            down = f"no client is served for {about(saving.seconds)}"
            effect = Effect("Redis writes its RDB file (SAVE)", "not needed", down=down)
            pins = [lambda report: pin_redis(report, block)]
            with carrying_out(report, saving, effect=effect, pins=pins) as carry:
                saved = carry(saving)
        else:
            saved = (save_in_background if kind == "bgsave" else rewrite_aof)(block, server)
        snapshot.report_saved(report, kind, saved, read_place.after(saved)(server))
        snapshot.judge_master(report, server, read_sentinels.after(saved)(env.redis))
    return report


@flow(name="backup-redis", flow_run_name=RunName("backup-redis {environment} {kind}"))
def backup_redis(environment: str, kind: Form = "rdb") -> Report:
    """Redisのバックアップ (§2.3)

    Takes a snapshot of every database (BGSAVE), loads it into a scratch server and reads its content there into a
    manifest, so that a restore can be proven equal. Run it daily, and before every change.

    If the server's files are on another host ([redis] remote), a scratch server becomes its replica (under Sentinel,
    a replica of a replica), receives every acknowledged write, and is saved. If replication is forbidden, keys are read
    one by one, and the report warns that they are not from one moment. With kind=aof the AOF's files are copied while
    rewrites are off, and their content is also saved as the RDB that a restore uses. The AOF itself (appendonlydir in
    the backup) can be restored by its path.

    It changes no data. Undo: nothing to undo. With kind=aof, auto-aof-rewrite-percentage is 0 during the copy; after a
    kill the next run resets it. An incomplete backup is never offered for a restore, and the next run deletes it.
    Evidence: the manifest next to the RDB, and a table of each database's content.

    Departs from the manual: there is no appendonly.aof to copy (since Redis 7 the AOF has several files). A copy that
    was never loaded proves nothing. The copy starts only after the save has succeeded. Configuration and ACL files are
    included, without their secrets.

    Args:
        environment: Environment (lab, staging, production …)
        kind: rdb: a snapshot; aof: all files of the AOF, and its content as RDB
    """
    env = Environment.find(environment)
    with runbook("Backup Redis", env, changes=True) as report:
        backup = take(report, env, stores.store_for(env, "redis"), kind)
        report_results(report, backup)
        stores.judge_shrunk(report, backup)
        stores.note(report, env, f"Backup completed - {backup.name}, {size(backup.manifest.bytes)}")
    return report


@flow(name="restore-redis", flow_run_name=RunName("restore-redis {environment} {backup}"))
def restore_redis(
    environment: str,
    backup: str = "latest",
    source: Stores = "backups",
    prefixes: list[str] = [],  # noqa: B006 (Prefect copies it; the form shows a list)
    extra: Extra = "keep",
    expected_removed: Annotated[int, Field(ge=0)] = 0,
    redis_source: NamedSource = "backup",
    plan: str = "",
    confirm: str = "",
) -> Report:
    """Redisのリストア (§2.3)

    Replaces the live data with a backup's. Run it if Redis has lost its data, or if the data is corrupt. The server can
    be down, and its data directory can be missing.

    What it changes: it builds a staged copy next to the data directory and proves it on a scratch server against the
    backup's manifest. Then it stops the service, swaps the two directories by rename, starts the service and verifies
    it. With an empty confirm it shows the plan and changes nothing. Writes after the backup's snapshot are lost. Keys
    under drop_prefixes are left out, because the application creates them again. The server starts with the settings
    and users of its files: the plan names those that only run. Undo: undo-restore-redis; the old data is kept as `<data
    directory>.superseded_<time>`. Without an AOF it is saved and proven before the stop; if that fails, nothing stops.

    With `prefixes` only keys that begin with them are restored, one by one, while the server keeps serving. If the
    server's files are on another host ([redis] remote), the data is replicated from a temporary server, or copied key
    by key. In both cases the live data is first kept as a backup, which the report names as the undo. Afterwards every
    key is compared with the backup; keys that clients wrote meanwhile are listed separately.

    If the master is dead and a replica or its own files survive, the plan reports which loses less, or may lose less.
    `redis_source` takes it: its data is backed up and proven first. A copy from which a command deleted keys is
    reported. Files are judged by their content and times, a replica by its replication offset.

    If the server has restarted since the run judged it, was down and answers again, or follows another server, the run
    ends with nothing replaced. This is checked again when it is stopped.

    A dump_….rdb, an appendonly_….aof or an appendonlydir without a manifest can be restored too, as unproven. Evidence:
    the table of expected and found keys in each database, and how many keys the live server loaded.

    Departs from the manual: nothing is copied over the live files. An old AOF would take precedence over the RDB, and
    without an AOF the server would start with 0 keys. So the RDB becomes the AOF's base, whether the AOF is on or off.
    A damaged RDB, or one of a newer server, is refused before anything stops.

    Args:
        environment: Environment (lab, staging, production …)
        backup: latest, a date (YYYYMMDD), a backup's name (dump_YYYYMMDD_HHMMSS), or the path of an .rdb, .aof or
            appendonlydir
        source: Store. copies: the replica store
        prefixes: Prefixes of the keys to restore (e.g. session:). Empty: replace all data
        extra: Keys under prefixes that the backup does not have. keep: leave them; remove: delete them
        expected_removed: Number of keys that extra=remove deletes (the plan shows it; if over 10 % more would be
            deleted, the run is refused)
        redis_source: Source: backup: a backup; replica: a surviving replica; files: the stopped master's own files
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Restore Redis", env, confirm, plan, changes=True, rank="recovery") as report:
        if redis_source != "backup":
            survivor.restore(report, env, redis_source, prefixes)
            return report
        chosen = choice.choose(report, env, backup, source)
        with methods.prepare(report, env, chosen, prefixes, extra, expected_removed) as restore:
            effect = methods.effect(restore.lines, env, chosen.backup, prefixes)
            pins = [lambda report: pin_redis(report, env.redis, replaced=True)]
            with carrying_out(report, *restore.lines, effect=effect, pins=pins) as carry:
                restore.carry_out(carry)
        report.fail_if_critical()
        if chosen.proven:
            stores.mark_verified(report, chosen.backup)
            if not prefixes:
                report.measure(*stores.measured(chosen.backup))
    return report
