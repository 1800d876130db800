"""What restore-redis puts back: a backup of ours, or a file that the manual's own commands left (§2.3)."""

from __future__ import annotations

from dataclasses import dataclass

from blocks.environment import Environment, Stores
from flows import store as stores
from flows.redis.restore.steps import judge_files
from runbook.report import Report
from runbook.units import size
from tasks.backups import fetched_files
from tasks.backups.catalogue import KEPT, Backup, find_backup
from tasks.redis.backup.foreign import Foreign, adopt, is_foreign, read_foreign
from tasks.redis.backup.rdb import read_rdb, read_readable
from tasks.redis.backup.snapshot import RDB
from tasks.redis.scratch import refuse_empty


@dataclass(frozen=True)
class Restorable:
    """A backup that is at hand. `proven` is False for a foreign file: nothing says what should be in it."""

    backup: Backup
    proven: bool = True


def choose(report: Report, env: Environment, wanted: str, which: Stores) -> Restorable:
    """Find what an operator means, have it at hand, and judge it: whose it is, its files, and whether this server
    program reads its version. Nothing live is asked.

    Raises:
        OpsError: there is no such backup or file.
        RunbookFailed: it is damaged, or of a newer server.
    """
    if is_foreign(wanted):
        return _adopted(report, env, wanted, which)
    backup = find_backup(stores.store_for(env, "redis", which), "redis", wanted, env.name)
    report.fact("backup", backup.name)
    report.pin("backup", backup.name)
    report.pin_state("backup", backup.name)
    if backup.manifest.environment == KEPT.format(env.name):
        report.fact("it is", f"what {backup.manifest.content.get('kept_by', 'a restore')} kept of the live data")
    else:
        stores.judge_origin(report, env, backup, wanted)
    judge_files(report, backup, stores.read_files(report, backup))
    report.fail_if_critical()
    refuse_empty(backup.path / RDB)
    version = read_rdb(backup.path / RDB)
    _judge_version(report, env, version.header, version.version, backup.manifest.tool)
    _tell_lost(report, backup)
    return Restorable(backup)


def _tell_lost(report: Report, backup: Backup) -> None:
    report.fact("lost", f"every write after {backup.manifest.taken:%Y-%m-%d %H:%M:%S UTC}")


def _judge_version(report: Report, env: Environment, header: str, version: int, tool: str) -> None:
    """A newer server's RDB, or the other family's, is refused with the reason before anything is loaded or stopped."""
    found = read_readable(env.redis, version)
    report.require(
        "RDB version",
        found.ok,
        f"restore it with {tool or 'the server that wrote it'} or a newer one of its family ([redis] server_program): "
        "Valkey 9 and Redis 8 cannot read each other's newer RDB files",
        value=f"{header} of {tool or 'an unknown server'}"
        + ("" if found.ok else f": {found.program} cannot read what {tool or 'it'} saved"),
        expected=found.told(),
    )
    report.fail_if_critical()


def _adopted(report: Report, env: Environment, wanted: str, which: Stores) -> Restorable:
    store = stores.store_for(env, "redis", which)
    found = read_foreign(store.spool, wanted)
    report.fact("backup", f"{found.path} ({found.form}, {size(found.bytes)})")
    report.warn(
        "no manifest",
        "it cannot be proven; take backups with backup-redis: those can",
        value=f"{found.path.name} is an {found.form} of {size(found.bytes)} and no more",
        expected="a backup with a manifest",
    )
    _judge_foreign(report, env, found)
    adopted = adopt(env.redis, store, env.name, found)
    report.at_end(lambda: fetched_files.put_away(adopted.backup))
    if adopted.cut_bytes:
        report.warn(
            "end of the AOF",
            "that is what a crash, or a copy of a running server's file, leaves; what came before it is there",
            value=f"{adopted.cut_bytes:,} bytes of a command or transaction that had not ended were left off",
            expected="a whole command",
        )
    if adopted.has_more:
        report.warn(
            "bytes after the end of the RDB",
            "they are left off. Where they are commands the file is an AOF that begins with an RDB: name it *.aof",
            value=f"{found.path.name} does not end with the RDB's last byte",
            expected="nothing after it",
        )
    _tell_lost(report, adopted.backup)
    return Restorable(adopted.backup, proven=False)


def _judge_foreign(report: Report, env: Environment, found: Foreign) -> None:
    if found.rdb:
        _judge_version(report, env, found.rdb.header, found.rdb.version, found.rdb.tool)
    if found.rdb and not found.aof:
        report.prefer(
            "checksum of the RDB",
            found.rdb.checksum,
            "it was saved with rdbchecksum no: a flipped bit inside a value is seen by nobody; choose another where "
            "there is one",
            value="there" if found.rdb.checksum else "none",
            expected="CRC-64, which the server checks as it loads",
        )
