"""Base backups by pgBackRest: taken, verified, restored."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from blocks.postgres.server import Postgres, execute
from blocks.postgres.wal import Wal
from runbook.errors import OTHER_BACKUPS, CommandFailed, VerificationFailed
from runbook.failpoint import failpoint
from runbook.files import inside
from runbook.kinds import action, probe
from runbook.wait import until
from tasks.backups.encryption import Key
from tasks.cluster.base_backup import BaseBackupSource, TakenBaseBackup, read_moment
from tasks.cluster.content import ClusterContent, Form
from tasks.cluster.instance import PrivateInstance
from tasks.cluster.unpack import give
from tasks.pgbackrest.command import Label, call, labels_of, read_labels
from tasks.pgbackrest.repository import Repository, RepositoryArchive
from tasks.stores.directory import told
from tasks.wal.archive.archive import timeline_in
from tasks.wal.archive.continuity import chain_from
from tasks.wal.archive.fetch import fetch, fetch_histories

RECORD = "pgbackrest.json"
ARCHIVE_SECONDS = 60.0
_DAMAGE = (26, 28, 29, 55, 95)
"""Its exit codes for a wrong checksum, an invalid file or format, a missing file, and bad encryption."""
_EXPIRED = f"check pgBackRest's own retention (repo1-retention-full); {OTHER_BACKUPS}"


def archive_in(wal: Wal, postgres: Postgres) -> RepositoryArchive:
    """The archive of a stanza."""
    return RepositoryArchive(Repository(wal, postgres), Key.of([], ""))


@action
def take_label(wal: Wal, postgres: Postgres, source: BaseBackupSource, form: Form, directory: Path) -> TakenBaseBackup:
    """Let pgBackRest take a backup and verify it; a file in `directory` records it.

    Raises:
        CommandFailed: it failed.
        VerificationFailed: the stored backup is damaged.
    """
    known = {one.label for one in _labels(wal, postgres)}
    started = time.monotonic()
    call(wal, postgres, "backup", f"--type={'full' if form == 'full' else 'incr'}", "--start-fast")
    seconds = time.monotonic() - started
    failpoint("pgbackrest: taken")
    new = [one for one in _labels(wal, postgres) if one.label not in known]
    if not new or new[-1].system != source.system:
        raise VerificationFailed(
            f"pgBackRest's stanza {wal.stanza} has no new backup of this cluster",
            "correct its pg1-path: it must be this environment's server",
        )
    started = time.monotonic()
    verify_label(wal, postgres, new[-1].label)
    content = _content(postgres, source, new[-1])
    with told(directory):
        (directory / RECORD).write_text(json.dumps(asdict(new[-1]), default=str, indent=2))
    return TakenBaseBackup(content, seconds, time.monotonic() - started)


def _labels(wal: Wal, postgres: Postgres) -> tuple[Label, ...]:
    return labels_of(call(wal, postgres, "info", "--output=json"), wal.stanza)


def _content(postgres: Postgres, source: BaseBackupSource, label: Label) -> ClusterContent:
    stopped, next_xid, databases = read_moment(postgres)
    return ClusterContent(
        form="full" if label.kind == "full" else "incremental",
        system=label.system,
        timeline=label.timeline,
        start_lsn=label.start_lsn,
        stop_lsn=label.stop_lsn,
        stopped=stopped,
        next_xid=next_xid,
        server_version=source.version,
        segment_bytes=source.segment_bytes,
        bytes=label.bytes,
        database=postgres.database,
        label=label.label,
        databases=databases,
    )


def verify_label(wal: Wal, postgres: Postgres, label: str) -> None:
    """Compare every file of a backup, and the WAL that it needs, with their checksums.

    Raises:
        VerificationFailed: one is missing or damaged.
    """
    # It always exits with 0, and without --verbose it does not report intact files.
    printed = call(wal, postgres, "verify", f"--set={label}", "--output=text", "--verbose")
    if "status: ok" not in printed:
        why = " / ".join(line.strip() for line in printed.splitlines() if line.strip())[:300]
        raise VerificationFailed(f"pgBackRest's {label} is damaged: {why}", "take another backup")


@probe
def require_kept(wal: Wal, postgres: Postgres, content: ClusterContent) -> Label:
    """The backup in pgBackRest's repository.

    Raises:
        VerificationFailed: it no longer exists, or has a known error.
    """
    found = next((one for one in read_labels.work(wal, postgres) if one.label == content.label), None)
    if found is None:
        raise VerificationFailed(f"pgBackRest has no backup {content.label} any more", _EXPIRED)
    if found.damaged:
        raise VerificationFailed(
            f"pgBackRest found damaged pages in the cluster when it took {content.label}", OTHER_BACKUPS
        )
    return found


def build_from_label(instance: PrivateInstance, wal: Wal, content: ClusterContent) -> Path:
    """Restore a backup: its data directory, every file proven by its checksum, with the WAL that makes it consistent.

    Raises:
        CommandFailed, VerificationFailed: it is damaged.
    """
    with told(instance.root):
        inside.make_directory(instance.data)
    give(instance.data, instance.postgres.os_user)
    where = [f"--set={content.label}", f"--pg1-path={instance.data}", "--type=none", "--archive-mode=off"]
    try:
        call(wal, instance.postgres, "restore", *where)
    except CommandFailed as error:
        if error.exit_code not in _DAMAGE:
            raise
        message = f"pgBackRest's {content.label} cannot be restored: {error.message}"
        raise VerificationFailed(message, OTHER_BACKUPS) from None
    failpoint("pgbackrest: restored")
    archive = archive_in(wal, instance.postgres)
    listing = archive.listing()
    chain = chain_from(listing, timeline_in(archive, listing, content.timeline), content.start, content.segment_bytes)
    links = [link for link in chain.links if link.segment.start <= content.stop]
    found = fetch(archive, content.system, links, instance.wal)
    if found.damage or not links or links[-1].end < content.stop:
        why = found.damage or chain.trouble or "its WAL is not in the archive"
        raise VerificationFailed(f"{content.label} cannot be made consistent: {why}", OTHER_BACKUPS)
    fetch_histories(archive, instance.wal)
    return instance.data


@dataclass(frozen=True)
class ArchivedWal:
    """The last archived segment of the primary."""

    segment: str


@action(idempotent=True)
def archive_rest(postgres: Postgres) -> ArchivedWal:
    """Switch to a new segment, and wait until archive_command has archived the old one.

    Raises:
        Unreachable: the server is down, or archives nothing.
        OpsError: the server refuses.
    """
    with postgres.connect() as connection:
        segment = str(execute(connection, _SWITCH)[0][0])

        def archived() -> bool:
            last = execute(connection, "SELECT coalesce(last_archived_wal, '') FROM pg_stat_archiver")[0][0]
            return str(last)[:24] >= segment

        until(
            archived,
            what=f"the archiving of {segment}",
            seconds=ARCHIVE_SECONDS,
            hint="check pg_stat_archiver and the server's log: archive_command fails",
        )
    return ArchivedWal(segment)


# If the current segment is empty, a switch does nothing: then the one before it.
_SWITCH = "SELECT pg_walfile_name(pg_switch_wal() - 1)"
