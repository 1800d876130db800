"""The base backup and the WAL of a point-in-time recovery, chosen and judged before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from blocks.environment import Environment, Stores
from blocks.postgres import nodes
from flows.store import judge_origin, mark_failed, read_files, store_for
from runbook import clock
from runbook.errors import OpsError, VerificationFailed
from runbook.report import Report
from tasks.backups.catalogue import Backup, instead_of, open_all
from tasks.cluster.content import ClusterContent, cluster_in, lineage
from tasks.cluster.origin import is_on, own_backups
from tasks.cluster.target import RecoveryTarget
from tasks.pgbackrest.backup import require_kept
from tasks.wal.archive.archive import Archive, ArchiveListing
from tasks.wal.archive.continuity import Chain, chain_from, require_begun
from tasks.wal.archive.destinations import archive_of, ship_now
from tasks.wal.archive.rescue import ship_server_wal
from tasks.wal.branch import timeline_in_use
from tasks.wal.format.names import Timeline, lsn_text
from tasks.wal.receiver import read_flushed, wait_received

AUTO = "auto"


@dataclass(frozen=True)
class PointOrigin:
    """The base backup (the last of `whole`, after those that it depends on) and the WAL after it. `oldest`: the backup
    with which the reachable time begins. `unread`: why the WAL lacks commits that the primary has acknowledged ("":
    it lacks none of those before the run asked)."""

    whole: tuple[Backup, ...]
    archive: Archive
    chain: Chain
    oldest: Backup
    unread: str = ""

    @property
    def backup(self) -> Backup:
        """The base backup."""
        return self.whole[-1]

    @property
    def content(self) -> ClusterContent:
        """Its content."""
        return cluster_in(self.backup)


def ship(report: Report, env: Environment, source: Stores) -> int:
    """Ship the receiver's tail into the archive: only the receiver has the newest acknowledged writes. Returns the LSN
    that the archive must reach then: the primary may have acknowledged everything before it. 0: no primary answers."""
    if not env.has("wal"):
        report.warn("archived WAL", "add [wal] to the environment's TOML", value="[wal] is missing")
        return 0
    acknowledged = read_flushed(env.postgres)
    streams = env.wal.method != "archive_command" and wait_received(env.postgres, env.wal.name)
    if not streams and env.wal.method != "archive_command" and nodes.ask(env.postgres):
        report.warn(
            "WAL receiver",
            f"check the log of {env.wal.service}: WAL that it did not receive cannot be restored",
            value="does not stream, or lags behind the primary",
        )
    try:
        done = ship_now(env, source)
    except OpsError as error:
        hint = "check the receiver's directory: WAL that is only there cannot be restored"
        report.warn("newest WAL of the receiver", error.hint or hint, value=error.message)
        return acknowledged
    if done.refused:
        report.warn("newest WAL of the receiver", "check these files before you delete them", value=done.refused[0])
    if not streams:
        _ship_server_wal(report, env, source)
    return acknowledged


def _ship_server_wal(report: Report, env: Environment, source: Stores) -> None:
    """Ship what only the server's own pg_wal has. It must not stop a recovery: the archive may have everything."""
    try:
        done = ship_server_wal(env, source)
    except OpsError as error:
        hint = "copy pg_wal of the old data directory to a safe place: WAL that is only there is not restored"
        report.warn("newest WAL of the server", error.hint or hint, value=error.message)
        return
    if done.put:
        report.fact("WAL shipped from the server's pg_wal", ", ".join(done.put))
    if done.refused:
        hint = "copy them to a safe place before you delete them: WAL that is only there is not restored"
        report.warn("newest WAL of the server", hint, value=done.refused[0])


def ship_rest(report: Report, env: Environment) -> None:
    """Ship what an earlier run here left in the receiver's directory: the new timeline must not reuse its number."""
    if env.has("wal") and any(Path(env.wal.directory).glob("*")):
        ship(report, env, "backups")


def with_newest(origin: PointOrigin) -> PointOrigin:
    """The same with the WAL that the archive has now; itself where that is no more than before.

    Raises:
        OpsError, Unreachable: it cannot be listed.
    """
    timeline, content = origin.chain.timeline, origin.content
    chain = chain_from(origin.archive.listing(), timeline, content.stop, content.segment_bytes)
    return origin if chain.links == origin.chain.links else replace(origin, chain=chain)


def choose_origin(
    report: Report,
    env: Environment,
    target: RecoveryTarget,
    wanted: str,
    timeline: int,
    source: Stores,
    *,
    of: str = "",
    acknowledged: int = 0,
) -> PointOrigin:
    """The newest base backup from which the target can be reached. `of`: the other environment that took the backups;
    `acknowledged`: the LSN that the WAL must reach if the target is its newest point.

    Raises:
        OpsError: there is none, or no WAL after it.
    """
    store = store_for(env, "cluster", source)
    backups, unreadable = open_all(store, "cluster")
    if unreadable:
        report.warn("unreadable manifests", f"check them in {store.where}", value=", ".join(unreadable[:5]))
    candidates = _own(env, backups, wanted, store.where, of or env.name)
    first = cluster_in(candidates[-1])
    archive = archive_of(env, source, first.system, candidates[-1].manifest.environment)
    listing = archive.listing()
    history = timeline_in_use(env, archive, listing, first.system, timeline, of=candidates[-1].manifest.environment)
    usable = [one for one in candidates if is_on(history, cluster_in(one))]
    if not usable:
        there = ", ".join(sorted({str(cluster_in(one).timeline) for one in candidates}))
        raise OpsError(
            f"no base backup is on timeline {history.number} or was taken before it began",
            f"choose a timeline that has one: {there}",
        )
    chosen = _newest_before(target, usable)
    content = cluster_in(chosen)
    if content.label:
        require_kept(env.wal, env.postgres, content)
    chain = chain_from(listing, history, content.stop, content.segment_bytes)
    if not of:
        require_begun(chain, chosen.name)
    whole = lineage(chosen, backups)
    oldest = _oldest_before(chosen, usable, listing, history)
    _report_results(report, whole, chain, oldest, archive)
    if not of:
        judge_origin(report, env, chosen, wanted)
    unread = ""
    if target.by == "latest" and not timeline and (live := nodes.ask(env.postgres)) and live.system == content.system:
        unread = _unread(report, chain, acknowledged)
    return PointOrigin(tuple(whole), archive, chain, oldest, unread)


def _unread(report: Report, chain: Chain, acknowledged: int) -> str:
    if not acknowledged or chain.reaches(acknowledged):
        return ""
    why = (
        f"the archived WAL ends at {lsn_text(chain.end)}, and the primary had written up to {lsn_text(acknowledged)} "
        "when this run asked it"
    )
    report.warn(
        "WAL up to the newest commit",
        "fix what kept the newest WAL out of the archive (the findings above), then run this again: the commits after "
        "that point are not restored",
        value=why,
    )
    return why


def _oldest_before(chosen: Backup, usable: Sequence[Backup], listing: ArchiveListing, history: Timeline) -> Backup:
    """The oldest base backup whose WAL reaches the chosen one: those that prune-backups keeps for longer have only the
    WAL of their own time."""
    stop = cluster_in(chosen).stop

    def reaches(content: ClusterContent) -> bool:
        return content.stop >= stop or chain_from(listing, history, content.stop, content.segment_bytes).end >= stop

    return next(one for one in usable if reaches(cluster_in(one)))


def _own(env: Environment, backups: Sequence[Backup], wanted: str, where: str, of: str) -> list[Backup]:
    """The candidates by the LSN at which they end: those of the live cluster, or of the last one."""
    if wanted != AUTO:
        found = [one for one in backups if one.name == wanted]
        if not found:
            newest = ", ".join(one.name for one in reversed(backups[-3:])) or "none"
            raise OpsError(f"there is no base backup “{wanted[:80]}” in {where}", f"the newest: {newest}")
        return found
    live = nodes.ask(env.postgres) if of == env.name else None
    own = own_backups(backups, of, live.system if live else 0)
    if not own:
        others = [one for one in backups if one.manifest.environment != of]
        more = f"; to use another environment's, give its name, e.g. {others[-1].name}" if others else ""
        raise OpsError(f"there is no base backup of {of}'s cluster in {where}", f"run backup-cluster{more}")
    return own


def _newest_before(target: RecoveryTarget, usable: Sequence[Backup]) -> Backup:
    """The newest that ends before the target. For a target before all of them: the oldest, which is then refused."""
    newest = cluster_in(usable[-1]).next_xid

    def is_before(content: ClusterContent) -> bool:
        match target.by:
            case "latest":
                return True
            case "time":
                return content.stopped <= target.at
            case "lsn":
                return content.stop <= target.lsn
        return content.next_xid <= full_xid(target.xid, newest)

    return next((one for one in reversed(usable) if is_before(cluster_in(one))), usable[0])


def full_xid(xid: int, near: int) -> int:
    """A transaction ID with its epoch: the one nearest to `near`, which has one."""
    candidates = ((near >> 32) + step << 32 | xid for step in (-1, 0, 1))
    return min((one for one in candidates if one >= 0), key=lambda one: abs(one - near))


def _report_results(report: Report, whole: Sequence[Backup], chain: Chain, oldest: Backup, archive: Archive) -> None:
    content, first = cluster_in(whole[-1]), cluster_in(oldest)
    report.fact("base backup", " ← ".join(one.name for one in reversed(whole)))
    report.fact("cluster", f"system identifier {content.system}")
    report.fact("WAL", f"{chain.text}, read from {archive.place.where}")
    report.fact("oldest reachable point", f"{clock.text(first.stopped)}, LSN {first.stop_lsn} ({oldest.name})")
    report.fact("newest reachable point", f"LSN {lsn_text(chain.end or content.stop)} at most")
    report.prefer(
        "continuity of the WAL",
        not chain.trouble,
        "find that segment (source=copies, or the receiver's directory), or use a base backup that was taken after it: "
        "nothing after the gap can be restored from here",
        value=chain.trouble or "no gap" + f"; {chain.end_reason}" * bool(chain.pruned),
    )


def fetch_files(report: Report, origin: PointOrigin) -> None:
    """Fetch the backups, and compare each file with its manifest.

    Raises:
        RunbookFailed: one is damaged.
    """
    for backup in origin.whole:
        try:
            problems = read_files(report, backup)
        except VerificationFailed as error:
            problems = [error.message]
            mark_failed(report, backup, error.message)
        report.require(
            f"files of {backup.name}",
            not problems,
            f"try the replica store (source=copies); {instead_of(backup)}" if problems else "",
            value="; ".join(problems[:3]) or f"{len(backup.manifest.files)} files",
            expected="as in the manifest (SHA-256)",
        )
    report.fail_if_critical()
