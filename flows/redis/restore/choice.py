"""The source of a Redis restore: a backup, or an RDB or AOF file without a manifest (§2.3)."""

from __future__ import annotations

from dataclasses import dataclass

from blocks.environment import Environment, Stores
from flows import store as stores
from flows.redis.restore.findings import report_no_checksum
from flows.redis.restore.steps import judge_files
from runbook.next import Next
from runbook.report import Report
from runbook.units import size
from tasks.backups import fetched_files
from tasks.backups.catalogue import KEPT, Backup, find_backup
from tasks.redis.backup.foreign import Foreign, adopt, is_foreign, read_foreign
from tasks.redis.backup.rdb import read_rdb, read_readable
from tasks.redis.backup.snapshot import RDB
from tasks.redis.scratch import refuse_empty


@dataclass(frozen=True)
class RestorableRedis:
    """A fetched backup. `proven` is False for a file without a manifest: its expected content is unknown."""

    backup: Backup
    proven: bool = True


def choose(report: Report, env: Environment, wanted: str, which: Stores) -> RestorableRedis:
    """Find and fetch the wanted backup, and check its origin, its files and its RDB version. The live server is not
    queried.

    Raises:
        OpsError: there is no such backup or file.
        RunbookFailed: it is damaged, or of a newer server.
    """
    if is_foreign(wanted):
        return _adopt(report, env, wanted, which)
    store = stores.store_for(env, "redis", which)
    backup = find_backup(store, "redis", wanted, env.name)
    stores.report_failed(report, find_backup(store, "redis", wanted, env.name, failed_too=True), backup)
    stores.judge_drops(report, backup)
    report.fact("backup", backup.name)
    report.pin("backup", backup.name)
    report.pin_state("backup", backup.name)
    if backup.manifest.environment == KEPT.format(env.name):
        report.fact("origin", f"live data, kept by {backup.manifest.content.get('kept_by', 'a restore')}")
    else:
        stores.judge_origin(report, env, backup, wanted)
    judge_files(report, backup, stores.read_files(report, backup))
    report.fail_if_critical()
    refuse_empty(backup.path / RDB)
    version = read_rdb(backup.path / RDB)
    _judge_version(report, env, version.header, version.version, backup.manifest.tool)
    if backup.manifest.content.get("form") == "aof":
        report_no_checksum(report)
    return RestorableRedis(backup)


def _judge_version(report: Report, env: Environment, header: str, version: int, tool: str) -> None:
    """An RDB of a newer server, or of the other family, is refused before anything is loaded or stopped."""
    found = read_readable(env.redis, version)
    report.require(
        "RDB version",
        found.ok,
        f"set [redis] server_program to {tool or 'the server that wrote it'}, or a newer one of its family: Valkey 9 "
        "and Redis 8 cannot read each other's newer RDB files",
        value=f"{header} of {tool or 'an unknown server'}"
        + ("" if found.ok else f": {found.program} cannot read the RDB of {tool or 'it'}"),
        expected=found.describe(),
    )
    report.fail_if_critical()


def _adopt(report: Report, env: Environment, wanted: str, which: Stores) -> RestorableRedis:
    store = stores.store_for(env, "redis", which)
    found = read_foreign(store.spool, wanted)
    report.fact("backup", f"{found.path} ({found.form}, {size(found.bytes)})")
    report.warn(
        "no manifest",
        "take backups with backup-redis: a restore of this file cannot be proven",
        value=f"{found.path.name} is an {found.form} of {size(found.bytes)}",
        expected="a backup with a manifest",
        follow=[Next("backup-redis", "take a provable backup")],
    )
    _judge_foreign(report, env, found)
    adopted = adopt(env.redis, store, env.name, found)
    report.at_end(lambda: fetched_files.put_away(adopted.backup))
    if adopted.cut_bytes:
        report.warn(
            "end of the AOF",
            "nothing to do: a crash, or a copy while the server runs, causes this. All earlier commands are restored",
            value=f"{adopted.cut_bytes:,} bytes of an incomplete command or transaction were left out",
            expected="a complete command",
        )
    if adopted.has_more:
        report.warn(
            "bytes after the end of the RDB",
            "rename the file to *.aof if these bytes are commands: then it is an AOF that begins with an RDB",
            value=f"{found.path.name} continues after the RDB; these bytes are left out",
            expected="no bytes after the RDB",
        )
    if found.aof:
        report_no_checksum(report)
    return RestorableRedis(adopted.backup, proven=False)


def _judge_foreign(report: Report, env: Environment, found: Foreign) -> None:
    if found.rdb:
        _judge_version(report, env, found.rdb.header, found.rdb.version, found.rdb.tool)
    if found.rdb and not found.aof:
        report.prefer(
            "checksum of the RDB",
            found.rdb.checksum,
            "choose another backup, if there is one: this one was saved with rdbchecksum no, so a flipped bit inside a "
            "value cannot be detected",
            value="present" if found.rdb.checksum else "none",
            expected="CRC-64, which the server checks when it loads the file",
        )
