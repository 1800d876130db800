"""Archived WAL after a base backup: decode it to its end, replace damaged segments. Called with the open report."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from blocks.environment import Environment, Stores
from runbook.errors import OpsError
from runbook.next import Next
from runbook.report import Report
from tasks.backups.catalogue import Backup
from tasks.cluster.content import cluster_in
from tasks.cluster.origin import is_on
from tasks.stores.directory import told
from tasks.wal.archive.archive import Archive, timeline_in
from tasks.wal.archive.continuity import Link, chain_from
from tasks.wal.archive.destinations import archive_of
from tasks.wal.branch import timeline_in_use
from tasks.wal.format.names import lsn_text
from tasks.wal.reading.decode import Reader, copies_of, mark_damaged, replace_damaged


def mend(report: Report, archive: Archive, replaced: Sequence[Link], undecodable: Link | None, directory: Path) -> None:
    """Replace damaged segments in the archive by the intact copies in `directory`.

    A segment without an intact copy is marked as damaged, so that no later run uses it.
    """
    for link in replaced:
        name = f"damaged segment {link.segment.name}"
        if link.stored.end:  # the archiver would overwrite it with the receiver's file, which has the same damage
            report.warn(
                name,
                "check the disk of [wal] directory, run SELECT pg_switch_wal(), then backup-cluster. Until then a "
                "recovery needs the other copy",
                value="the unfinished segment in the archive is damaged; another copy (pg_wal or the other archive) "
                "decodes further and was used",
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
            report.fact(name, "replaced in the archive by the receiver's copy, which decodes and fits its neighbours")
    if undecodable and not undecodable.stored.damaged and not undecodable.stored.end:
        with contextlib.suppress(OpsError):  # only pgBackRest can write to its repository: each run finds it again
            mark_damaged(archive, undecodable)


def judge_wal(report: Report, env: Environment, backup: Backup, source: Stores) -> None:
    """Whether every archived segment after a base backup decodes: recovery can reach only the first that does not."""
    if not env.has("wal"):
        return
    content, spool = cluster_in(backup), Path(env.backups.spool) / env.name
    with told(spool):
        spool.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with tempfile.TemporaryDirectory(prefix=".wal-", dir=spool) as directory:
            archive = archive_of(env, source, content.system, backup.manifest.environment)
            listing = archive.listing()
            of = backup.manifest.environment
            history = timeline_in_use(env, archive, listing, content.system, of=of)
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
    more = f"; after it: {behind.text}" if behind else ""
    pruned = f"; {chain.end_reason}: only newer base backups reach later points" if chain.pruned else ""
    report.require(
        "WAL after the base backup",
        not why,
        "run backup-cluster now: no point in time after that segment can be restored. Then search for an intact copy "
        "(replica store, pg_wal of primary and standby) and copy it into [wal] directory",
        value=f"{why}{more}" if why else f"{len(reader.read)} segments decode, up to {lsn_text(reader.end)}{pruned}",
        expected="every segment present and decodable",
        follow=[Next("backup-cluster", "start a new recovery window")],
    )
