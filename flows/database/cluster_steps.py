"""What taking a base backup consists of, called with the open report."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from blocks.environment import Environment
from flows.store import judge_key
from runbook.errors import OpsError
from runbook.render import duration, size
from runbook.report import Report, Status
from tasks import publishing
from tasks.catalogue import Backup, open_all
from tasks.cluster.base_backup import INCREMENTAL_VERSION, TAR_VERSION, Source, take_base
from tasks.cluster.content import Form, cluster_in, lineage
from tasks.host import read_disk
from tasks.manifest import Manifest, sums_of
from tasks.pgbackrest.backup import take_label
from tasks.postgres.server import program_version
from tasks.stores.store import Store
from tasks.wal.continuity import read_chain
from tasks.wal.destinations import archive_of, ship_now
from tasks.wal.names import lsn_text

# Compressed by gzip's fastest level; a database of texts takes a third.
SPACE_RATIO = 0.8
FULL_EVERY_SECONDS = 8 * 86_400.0
"""A week, and a day of grace."""
NO_INCREMENTAL = "no incremental base backups"


def judge_source(report: Report, env: Environment, source: Source, kind: Form) -> None:
    """What must hold of a server of which a copy is taken."""
    found = program_version(env.postgres, "pg_basebackup")
    report.expect("programs", found == source.major,
                  f"install PostgreSQL {source.major}'s programs, or correct [postgres] programs",
                  value=found, expected=source.major)  # fmt: skip
    report.expect("rights of the login", source.may_replicate, f"ALTER ROLE {env.postgres.admin_user} REPLICATION",
                  value=env.postgres.admin_user, expected="superuser or REPLICATION")  # fmt: skip
    report.expect(
        "tablespaces",
        not source.tablespaces,
        "a restore beside would write into the live ones: move their tables into pg_default (ALTER TABLE … SET "
        "TABLESPACE), or use pgBackRest by hand",
        value=", ".join(source.tablespaces) or "only PostgreSQL's own",
    )
    if kind == "incremental":
        report.expect("version for incremental backups", source.major >= INCREMENTAL_VERSION, "take a full one",
                      value=source.major, expected=f"{INCREMENTAL_VERSION} or newer")  # fmt: skip
        report.expect("summarize_wal", source.summarizes, "ALTER SYSTEM SET summarize_wal = on, then take a full one",
                      value="on" if source.summarizes else "off", expected="on")  # fmt: skip
    for name, on in (("data checksums", source.checksums), ("fsync", source.fsync)):
        if not on:
            hint = "switch it on: a copy certifies corruption too, and a power cut loses what was acknowledged"
            report.warn(name, hint, value="off", expected="on")


def daily_form(report: Report, env: Environment, store: Store, source: Source) -> Form | None:
    """What the run of a day between the weekly full backups takes: an incremental one, a full one where this cluster
    has none of the last week; None, and why, where the server takes no incremental ones."""
    if why := why_not_incremental(source):
        report.fact(NO_INCREMENTAL, why)
        return None
    if by_pgbackrest(env):
        return "incremental"
    own = _own_bases(env, open_all(store, "cluster")[0], source)
    fresh = [one for one in own if cluster_in(one).form == "full" and one.age_seconds < FULL_EVERY_SECONDS]
    return "incremental" if fresh else "full"


def why_not_incremental(source: Source) -> str:
    """ "" where the server takes incremental base backups."""
    if source.major < INCREMENTAL_VERSION:
        return f"PostgreSQL {source.major} takes no incremental base backups ({INCREMENTAL_VERSION} and later do)"
    return "" if source.summarizes else "summarize_wal is off (ALTER SYSTEM SET summarize_wal = on)"


def _own_bases(env: Environment, backups: Sequence[Backup], source: Source) -> list[Backup]:
    return [
        backup
        for backup in backups
        if backup.manifest.environment == env.name and not backup.failed and cluster_in(backup).system == source.system
    ]


def choose_base(report: Report, env: Environment, store: Store, source: Source) -> Backup:
    """The newest base backup of this cluster, on which an incremental one is to stand.

    Raises:
        OpsError: there is none.
        VerificationFailed: what it stands on itself is gone.
    """
    backups, _ = open_all(store, "cluster")
    own = _own_bases(env, backups, source)
    if not own:
        raise OpsError(f"{store.where} has no base backup of this cluster", "take a full one first (kind=full)")
    base = max(own, key=lambda backup: backup.manifest.taken)
    whole = lineage(base, backups)
    report.fact("stands on", " ← ".join(backup.name for backup in reversed(whole)))
    return base


def judge_room(report: Report, store: Store, source: Source, base: Backup | None) -> None:
    """Where it is made; before version 18 it is unpacked there to be verified."""
    needed = int(source.bytes * SPACE_RATIO * (0.5 if base else 1.0))
    needed += source.bytes if source.major < TAR_VERSION else 0
    disk = read_disk(store.spool)
    report.expect("free space in the store", disk.free_bytes > needed,
                  f"free {size(needed - disk.free_bytes)} at {store.spool}, or give the store more space",
                  value=size(disk.free_bytes), expected=f"more than {size(needed)}")  # fmt: skip


def by_pgbackrest(env: Environment) -> bool:
    """Whether pgBackRest takes the backups, into its own repository."""
    return env.has("wal") and env.wal.tool == "pgbackrest"


def take(report: Report, env: Environment, store: Store, source: Source, base: Backup | None, kind: Form) -> Backup:
    """Copy, verify, seal, put into the store; of what pgBackRest has taken only a record."""
    name, directory = publishing.begin(store, "cluster", env.name, env.zone)
    if by_pgbackrest(env):
        taken = take_label(env.wal, env.postgres, source, kind, directory)
    else:
        taken = take_base(env.postgres, source, directory, base)
    content = taken.content
    manifest = Manifest(
        kind="cluster",
        name=name,
        environment=env.name,
        taken=content.stopped,
        seconds=taken.seconds,
        host=socket.gethostname(),
        tool=f"pgBackRest {content.label}" if content.label else f"pg_basebackup {source.major}",
        files=sums_of(directory),
        content=content.model_dump(mode="json"),
    )
    backup = publishing.publish(store, directory, manifest)
    report.fact("store", backup.store.where)
    report.fact("kind", content.form + (f", on {content.base}" if content.base else ""))
    report.fact("cluster", f"system identifier {content.system}, timeline {content.timeline}")
    report.fact("WAL", f"begins at {content.start_lsn}; can be stopped from {content.stop_lsn} on")
    if content.label:
        report.fact("pgBackRest", f"{content.label}, in stanza {env.wal.stanza}")
    else:
        report.fact("size", f"{size(manifest.bytes)} of a cluster of {size(source.bytes)}")
    report.fact("copied in", duration(taken.seconds))
    by = "pgbackrest verify" if content.label else "pg_verifybackup"
    report.fact(f"verified by {by} in", duration(taken.verify_seconds))
    judge_key(report, backup)
    return backup


def judge_archive(report: Report, env: Environment, backup: Backup) -> None:
    """Whether the archive goes on where the backup ends: else it can be brought to its own moment only."""
    content = cluster_in(backup)
    hint = "start the receiver of WAL and the archiver (python -m tasks.wal.archiver), and look at their logs"
    if not env.has("wal"):
        report.warn("archived WAL", "add [wal] to the environment's TOML", value="none: the environment names no [wal]")
        return
    try:
        shipped = ship_now(env)
        chain = read_chain(archive_of(env, "backups", content.system), content.stop, 0, content.segment_bytes)
    except OpsError as error:
        report.warn("archived WAL", error.hint or hint, value=error.message)
        return
    reaches = bool(chain.links) and chain.end >= content.stop and not chain.trouble and not shipped.refused
    report.expect(
        "archived WAL",
        reaches,
        hint,
        value="; ".join(shipped.refused) or chain.trouble or f"{chain.told}",
        expected=f"from {content.stop_lsn} on without a gap",
        otherwise=Status.WARN,
    )
    if chain.links:
        report.fact("newest archived WAL", lsn_text(chain.end))
