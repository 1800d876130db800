"""Archived WAL after a base backup: read from end to end, damaged segments replaced, called with the open report."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from blocks.environment import Environment, Stores
from runbook.errors import OpsError
from runbook.report import Report
from tasks.backups.catalogue import Backup
from tasks.cluster.content import cluster_in
from tasks.cluster.origin import is_on
from tasks.stores.directory import told
from tasks.wal.archive.archive import Archive, timeline_in
from tasks.wal.archive.continuity import Link, chain_from
from tasks.wal.archive.destinations import archive_of
from tasks.wal.format.names import lsn_text
from tasks.wal.reading.decode import Reader, copies_of, mark_damaged, replace_damaged


def mend(report: Report, archive: Archive, replaced: Sequence[Link], undecodable: Link | None, directory: Path) -> None:
    """Replace damaged segments in the archive by the intact copies that were read in their place (in `directory`). One
    of which there was no copy is marked, so that no later run takes it for whole."""
    for link in replaced:
        name = f"damaged segment {link.segment.name}"
        if link.stored.end:  # the archiver would replace it by the receiver's, which has the same damage
            report.warn(
                name,
                "check the disk of [wal] directory; switch to a new segment (SELECT pg_switch_wal()) and "
                "run backup-cluster: until then a recovery needs that other copy",
                value="the unfinished segment in the archive is damaged; another copy (pg_wal, the other "
                "archive) decodes further and is used",
                expected="decodes to its end",
            )
            continue
        try:
            replace_damaged(archive, link, (directory / link.segment.name).read_bytes())
        except OpsError as error:
            report.warn(
                name,
                f"copy the receiver's file of that name to a safe place, then: {error.hint}",
                value=f"it could not be replaced in the archive: {error.message}",
            )
        else:
            report.fact(
                name,
                "replaced in the archive by the receiver's copy, which decodes and continues the segments next to it",
            )
    if undecodable and not undecodable.stored.damaged and not undecodable.stored.end:
        with contextlib.suppress(OpsError):  # a repository that only pgBackRest writes: each run finds it again
            mark_damaged(archive, undecodable)


def judge_wal(report: Report, env: Environment, backup: Backup, source: Stores) -> None:
    """Whether every archived segment after a base backup decodes: a point in time can be reached only up to the first
    that does not."""
    if not env.has("wal"):
        return
    content, spool = cluster_in(backup), Path(env.backups.spool) / env.name
    with told(spool):
        spool.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with tempfile.TemporaryDirectory(prefix=".wal-", dir=spool) as directory:
            archive = archive_of(env, source, content.system, backup.manifest.environment)
            listing = archive.listing()
            history = timeline_in(archive, listing)
            if not is_on(history, content):
                history = timeline_in(archive, listing, content.timeline)
            chain = chain_from(listing, history, content.stop, content.segment_bytes)
            reader = Reader(
                env.postgres,
                archive,
                content.system,
                chain,
                Path(directory),
                copies_of(env, content.system, backup.manifest.environment),
                end=content.stop,
                keeps=False,
            )
            for _ in reader.batches():
                pass
            behind = reader.behind()
            mend(report, archive, reader.replaced, reader.undecodable, reader.directory)
    except OpsError as error:
        report.warn("WAL after the base backup", error.hint or "check [wal] and the archive", value=error.message)
        return
    why = reader.damage or chain.trouble
    more = f"; behind it: {behind.text}" if behind else ""
    pruned = f"; {chain.end_reason}: only newer base backups reach later points" if chain.pruned else ""
    report.require(
        "WAL after the base backup",
        not why,
        "run backup-cluster now: nothing behind that place can be restored to a point in time. Then look for an intact "
        "copy of that segment (the second store, pg_wal of primary and standby), and put it into [wal] directory",
        value=f"{why}{more}" if why else f"{len(reader.read)} segments decode, up to {lsn_text(reader.end)}{pruned}",
        expected="every segment is there and decodes",
    )
