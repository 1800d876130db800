"""Persistence of Redis (§2.3): checked, saved now, backed up as a proven snapshot, and its way back."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment, Stores
from flows import store as stores
from flows.pinned import pin_redis
from flows.redis import backup as keeping
from flows.redis import backup as taking
from flows.redis import persistence_files as places
from flows.redis import persistence_findings as findings
from flows.redis import snapshot as saving
from flows.redis.backup import Form
from flows.redis.master import judge_master
from flows.redis.restore import choice, methods
from flows.redis.snapshot import Kind
from runbook.guard.permit import Act
from runbook.report import Report
from runbook.run import runbook
from runbook.units import size
from tasks.redis.persistence.place import read_place
from tasks.redis.persistence.saving import BLOCK, rewrite_aof, save_blocking, save_in_background
from tasks.redis.persistence.state import read_persistence
from tasks.redis.persistence.written import read_written
from tasks.redis.restore.prefixes import Extra
from tasks.redis.sentinels import read_sentinels


@flow(name="check-redis-persistence", flow_run_name="check-redis-persistence {environment}")
def check_redis_persistence(environment: str) -> Report:
    """永続化設定（RDB/AOF）・保存状態確認 (§2.3)

    Judges whether what Redis holds would survive: the RDB and AOF settings, the last save and rewrite and their
    failures, disk, fork and kernel, the files as the next start would load them, and what a kill would lose now,
    against the RPO. Run it daily, and first when clients are answered MISCONF.

    It changes nothing; there is nothing to undo. Evidence: each setting beside the manual's, and the table of files.

    Departs from the manual: settings are judged by meaning (saving more often is as well), and running ones against
    the configuration file too. The AOF is in parts since version 7: there is no appendonly.aof in /var/lib/redis.

    Args:
        environment: 対象の環境 (lab, staging, production …)
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
        places.judge_place(report, server, place)
        places.judge_files(report, server, place, written)
        places.judge_written(report, server, written, problem)
        places.judge_sentinels(report, env.redis.sentinel_master, watch)
        report.outcome = f"a kill now would lose {report.facts['a kill now would lose']}"
    return report


@flow(name="snapshot-redis", flow_run_name="snapshot-redis {environment} {kind}")
def snapshot_redis(environment: str, kind: Kind = "bgsave", plan: str = "", confirm: str = "") -> Report:
    """手動でのスナップショット作成 (§2.3)

    Saves now: BGSAVE, SAVE or BGREWRITEAOF, and waits for its proven end, with progress. A save that is under way is
    waited for first. Run it before a restart, and when check-redis-persistence asks for it. It takes no backup: that
    is backup-redis.

    It changes no data; there is nothing to undo. What stands on disk stays until the new file is complete. SAVE serves
    no client until it ends: with an empty confirm it shows for how long, and does nothing. Evidence: the file, its
    time, the fork's cost.

    Departs from the manual: BGSAVE and BGREWRITEAOF answer at once, and LASTSAVE alone does not tell a failed save
    from one that is still running. Where SAVE would outlast the Sentinels' patience it is refused.

    Args:
        environment: 対象の環境 (lab, staging, production …)
        kind: bgsave はバックグラウンド保存、save は同期保存 (全クライアントが停止)、rewrite は AOF の書き換え
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: kind=save の実行には環境名を入力。空なら計画のみ表示。他の kind では不要
    """
    env = Environment.find(environment)
    with runbook("Snapshot Redis", env, confirm, plan, changes=True) as report:
        watch = read_sentinels(env.redis)
        block = judge_master(report, env.redis, watch, changes=False)
        server = read_persistence(block)
        saving.judge_save(report, server, read_place(server), kind)
        report.fail_if_critical()
        if kind == "save":
            saving.judge_standstill(report, server, watch)
            pin_redis(report, block)
            saved = save_blocking(report.permit(Act(BLOCK, server.address)), block, server)
        else:
            saved = (save_in_background if kind == "bgsave" else rewrite_aof)(block, server)
        saving.tell_saved(report, kind, saved, read_place.after(saved)(server))
        saving.judge_master(report, server, read_sentinels.after(saved)(env.redis))
    return report


@flow(name="backup-redis", flow_run_name="backup-redis {environment} {kind}")
def backup_redis(environment: str, kind: Form = "rdb") -> Report:
    """Redisのバックアップ (§2.3)

    Takes a snapshot of every database (BGSAVE, proven to be done), loads it into a scratch server and reads its content
    there into a manifest, so that a restore can be proven equal. Run it daily, and before every change.

    Where the environment says that the server's files cannot be reached ([redis] remote), a scratch server becomes its
    replica (of a replica, under Sentinel), follows it until it has had every acknowledged write, and is saved. Where
    replication is forbidden, keys are read one by one, and the report says that this is not one moment. With kind=aof
    the AOF's parts are copied while rewrites are off, and what they hold is saved beside as the RDB that a restore puts
    back; the AOF itself (appendonlydir in the backup) can be restored by its path.

    It changes no data; there is nothing to undo. With kind=aof auto-aof-rewrite-percentage is 0 during the copy; after
    a kill the next run puts it back. A backup that was killed is never offered for a restore, and the next run removes
    what it left. Evidence: the manifest beside the RDB, and the table of what each database holds.

    Departs from the manual: there is no appendonly.aof to copy (the AOF is in parts since Redis 7), and a copy that is
    not loaded proves nothing; the copy begins only when the save is proven to have ended; configuration and ACL files
    come along, without their secrets.

    Args:
        environment: 対象の環境 (lab, staging, production …)
        kind: rdb はスナップショット、aof は AOF の全ファイルとその内容の RDB
    """
    env = Environment.find(environment)
    with runbook("Backup Redis", env, changes=True) as report:
        backup = keeping.take(report, env, stores.store_for(env, "redis"), kind)
        taking.report_results(report, backup)
        stores.note(report, env, f"Backup completed - {backup.name}, {size(backup.manifest.bytes)}")
    return report


@flow(name="restore-redis", flow_run_name="restore-redis {environment} {backup}")
def restore_redis(
    environment: str,
    backup: str = "latest",
    source: Stores = "backups",
    prefixes: list[str] = [],  # noqa: B006 (Prefect copies it; the form shows a list)
    extra: Extra = "keep",
    expected_removed: Annotated[int, Field(ge=0)] = 0,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """Redisのリストア (§2.3)

    Puts a backup's data in the place of the live data. Run it when Redis has lost or spoilt its data; the server may be
    down, and its data directory may be gone.

    What it changes: a copy is built beside the data directory and proven on a scratch server against the backup's
    manifest; only then the service is stopped, the two directories are swapped by rename, and the service is started
    and verified. With an empty confirm it shows the plan and changes nothing. What was written after the backup's
    snapshot is lost; keys of drop_prefixes are left out, as they are made anew. Undo:
    undo-restore-redis; the old data is kept as `<data directory>.superseded_<time>`.

    With `prefixes` only keys that begin so are restored, one by one, into the server that goes on serving. A server
    whose files cannot be reached ([redis] remote) gets the data by replication from a temporary server, which swaps it
    in whole, or else key by key. In both cases the live data is kept before as a backup, which the report names as the
    undo, and afterwards every key is compared with the backup's; what clients wrote meanwhile is told apart.

    A dump_….rdb, an appendonly_….aof or an appendonlydir without a manifest restores too, as unproven. Evidence: the
    table of keys expected and found in each database, and how many keys the live server loaded.

    Departs from the manual: nothing is copied over the live files (an old AOF would win over the RDB, and without one
    the server would start with 0 keys): the RDB becomes the AOF's base, whether the AOF is on or off. A damaged RDB, or
    one of a newer server, is refused before anything stops.

    Args:
        environment: 対象の環境 (lab, staging, production …)
        backup: latest、日付 YYYYMMDD、バックアップ名 (dump_YYYYMMDD_HHMMSS)、または .rdb・.aof・appendonlydir のパス
        source: 保管先。copies は複製先
        prefixes: 戻すキーの接頭辞 (例 session:)。空なら全データを入れ替え
        extra: prefixes の下にありバックアップにないキー。keep は残す、remove は削除
        expected_removed: extra=remove で削除されるキー数 (計画が示す値。10 % を超えて多ければ拒否)
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 実行するには環境名を入力。空なら計画のみ表示
    """
    env = Environment.find(environment)
    with runbook("Restore Redis", env, confirm, plan, changes=True, rank="recovery") as report:
        chosen = choice.choose(report, env, backup, source)
        with methods.prepare(report, env, chosen, prefixes, extra, expected_removed) as restore:
            pin_redis(report, env.redis, replaced=True)
            restore.run(report.permit(*restore.acts))
        report.fail_if_critical()
        if chosen.proven:
            stores.mark_verified(report, chosen.backup)
            if not prefixes:
                report.measure(*stores.measured(chosen.backup))
    return report
