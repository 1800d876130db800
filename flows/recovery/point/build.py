"""The staged copy of a point-in-time recovery, and the proof that it is at the target."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from blocks.environment import Environment
from flows.database.base_backup import wal_of
from flows.recovery.gate import ClusterCopy
from flows.recovery.point.choice import PointOrigin, fetch_files
from flows.recovery.point.target import epochs, warn_prepared
from runbook.change import BegunLine, Carrier, Change, Check, Line, State
from runbook.errors import OTHER_BACKUPS, OpsError
from runbook.failpoint import failpoint
from runbook.files import inside
from runbook.guard.permit import CarriesOut, PlannedStep
from runbook.kinds import Pending, action
from runbook.report import Report, Status
from runbook.units import first_of
from tasks.cluster.copy import BuiltCluster, build_instance
from tasks.cluster.instance import PrivateInstance, running
from tasks.cluster.recovery import RecoveryProgress, read_prepared, read_standing, wait_recovered
from tasks.cluster.tablespaces import find_created, read_names
from tasks.cluster.target import Stop
from tasks.host.disk import is_here
from tasks.postgres.content.content import read_counts
from tasks.recovery_points.estimate import estimate
from tasks.recovery_points.samples import read_samples
from tasks.stores.directory import told
from tasks.wal.archive.archive import Archive
from tasks.wal.archive.continuity import Link
from tasks.wal.archive.fetch import fetch_histories
from tasks.wal.format.names import Timeline, lsn_text
from tasks.wal.reading.waldump import Commit

UNCHANGED = State("nothing live was touched", "fix the findings above, then run this again")
PROMOTE = PlannedStep("promote the copy", "on a new timeline", seconds=1)
BUILD, REPLAY = "cluster build", "WAL replay"
_BYTES_A_SECOND = {BUILD: 150e6, REPLAY: 150e6}
"""Before anything was measured. Measured on two cores with an SSD: see docs/benchmarks-recovery.md."""


def expected_seconds(env: Environment, what: str, bytes_: int) -> float:
    """The duration of a step (BUILD, REPLAY), from this environment's past recoveries and verifications."""
    measured = read_samples.work(Path(env.reports_directory), env.name).get(what, ())
    found = estimate(measured, bytes_)
    return found.seconds if found else bytes_ / _BYTES_A_SECOND[what]


@dataclass(frozen=True)
class PointBuild:
    """The lines that build the staged copy of a point-in-time recovery, prove that it is at the target, and promote it.
    Nothing live changes. `promote`: returns the new timeline."""

    report: Report
    env: Environment
    instance: PrivateInstance
    files: Change[[], None]
    building: Change[..., BuiltCluster]
    replay: Change[[contextlib.ExitStack, ClusterCopy, Sequence[Link]], None]
    proof: Check[[ClusterCopy], None]
    promotion: Change[[], int]

    @classmethod
    def plan(
        cls,
        report: Report,
        env: Environment,
        instance: PrivateInstance,
        copy: ClusterCopy,
        links: int,
        promote: Callable[[], int],
        begun: State,
    ) -> PointBuild:
        """Plan the lines. `links`: the segments of WAL that it needs; `begun`: the state of the system meanwhile."""
        origin = copy.origin
        content, wal = origin.content, links * origin.content.segment_bytes
        return cls(
            *(report, env, instance),
            Change(
                lambda: fetch_files(report, origin),
                "check the backup",
                f"every file of {', '.join(one.name for one in origin.whole)} is as in its manifest",
                begun=begun,
            ),
            Change(
                build_instance,
                "build the copy",
                f"{origin.backup.name} in {instance.root}",
                size=content.bytes,
                seconds=expected_seconds(env, BUILD, content.bytes),
            ),
            Change(
                partial(_replay, report, instance),
                "replay",
                f"{links} segments of WAL",
                size=wal,
                seconds=expected_seconds(env, REPLAY, wal),
            ),
            Check(
                lambda built: prove(report, instance, built.origin, built.stop, built.known),
                "prove",
                "the copy has the last transaction before the target, and not the first after it",
            ),
            Change(promote, PROMOTE.step, PROMOTE.detail, seconds=PROMOTE.seconds),
        )

    @property
    def lines(self) -> Sequence[Line[..., Any]]:
        """Return those after `building`, in order."""
        return self.replay, self.proof, self.promotion

    def begin(self, carry: Carrier, origin: PointOrigin) -> BegunLine[BuiltCluster]:
        """Begin to build the data directory from the base backup alone, beside the lines that follow.

        Raises:
            RunbookFailed: a file of the backup is damaged.
        """
        carry(self.files)
        return carry.begin(self.building, self.instance, origin.whole, wal=wal_of(self.env))

    @contextlib.contextmanager
    def promoted(
        self, carry: Carrier, building: BegunLine[BuiltCluster], copy: ClusterCopy, links: Sequence[Link]
    ) -> Iterator[int]:
        """Run the copy, proven at its target and promoted, while the block runs. Yields its new timeline.

        Raises:
            RunbookFailed, VerificationFailed: it is not at the target.
        """
        self.report.measure(BUILD, copy.origin.content.bytes, building.result().seconds)
        with contextlib.ExitStack() as stack:
            carry(self.replay, stack, copy, links)
            carry(self.proof, copy)
            yield carry(self.promotion)


def _replay(
    report: Report, instance: PrivateInstance, stack: contextlib.ExitStack, copy: ClusterCopy, links: Sequence[Link]
) -> None:
    origin = copy.origin
    place_wal(instance, origin.archive, links, instance.root / "wal", origin.chain.timeline)
    stack.enter_context(running(instance, copy.stop, origin.chain.timeline.number, unsynced=True))
    recover(report, instance, origin, len(links))


def recover(report: Report, instance: PrivateInstance, origin: PointOrigin, links: int) -> None:
    """Wait until the copy has replayed its WAL, and measure it. `links`: the number of segments.

    Raises:
        VerificationFailed: the recovery ended earlier, or failed.
    """
    started = time.monotonic()
    wait_recovered(instance, origin.content.system)
    report.measure(REPLAY, links * origin.content.segment_bytes, time.monotonic() - started)


def build(
    report: Report,
    env: Environment,
    instance: PrivateInstance,
    origin: PointOrigin,
    links: Sequence[Link],
    wal: Path,
    building: Pending[BuiltCluster] | None = None,
) -> BuiltCluster:
    """Build the data directory from the base backup, with all WAL up to the target in its `pg_wal`. `building`: the
    data directory, where `begin` has begun it."""
    built = (building or begin(env, instance, origin)).result()
    report.measure(BUILD, origin.content.bytes, built.seconds)
    place_wal.after(built)(instance, origin.archive, links, wal, origin.chain.timeline)
    return built


def begin(env: Environment, instance: PrivateInstance, origin: PointOrigin) -> Pending[BuiltCluster]:
    """Begin to build the data directory from the base backup alone, at the same time as the caller goes on."""
    return build_instance.submit(instance, origin.whole, wal=wal_of(env))


@action(idempotent=True)
def place_wal(instance: PrivateInstance, archive: Archive, links: Sequence[Link], wal: Path, timeline: Timeline) -> int:
    """Move the fetched segments and every timeline history into the copy's `pg_wal`, from which PostgreSQL replays
    them: only as many as the target needs. Returns how many.

    A segment in which a timeline begins is placed as the older timelines' too. It starts with a copy of their WAL, and
    there PostgreSQL reads a prepared transaction again while it replays the older timeline.
    src/backend/access/transam/xlogutils.c: read_local_xlog_page

    Raises:
        VerificationFailed: a history is damaged.
    """
    with told(instance.wal):
        for link in links:
            if (source := wal / link.segment.name).exists():
                source.replace(placed := instance.wal / link.segment.name)
                for older in timeline.candidates(link.segment.number, link.segment.bytes):
                    if older.timeline < link.segment.timeline:
                        inside.copy(placed, instance.wal / older.name)  # no link: PostgreSQL reuses its files
        failpoint("cluster: WAL placed")
    fetch_histories(archive, instance.wal)
    return len(links)


BUILDS: tuple[CarriesOut, ...] = (build_instance, place_wal)
"""The steps of `build`, for a plan."""


def judge_tablespaces(
    report: Report, env: Environment, origin: PointOrigin, stop: Stop, wal: Path, use: Literal["swap", "dump"]
) -> None:
    """Report the tablespaces that the WAL up to the target creates; the base backup has none. `wal`: the directory of
    the fetched segments. `use` of the copy: it becomes the live data, or it is dumped into the live server."""
    created = find_created(wal, stop.lsn or origin.content.stop)
    if not created:
        return
    names, here = read_names(env.postgres), is_here(env.postgres.host)
    missing = [one.path for one in created if here and not Path(one.path).is_dir()]
    shown = [
        f"{names.get(one.oid, f'OID {one.oid}')} in {one.path}" + " (missing)" * (one.path in missing)
        for one in created
    ]
    hint = "nothing to do: the copy has their files in its own directory, and does not use the live ones"
    if use == "swap":
        hint = (
            "nothing to do: the restored cluster has each in a new directory next to its data directory, with every "
            "row that the WAL has. Afterwards move their tables into pg_default (ALTER TABLE … SET TABLESPACE): "
            "backup-cluster takes no base backup of a cluster with tablespaces"
        )
    elif missing:
        hint = f"as {env.postgres.os_user}: mkdir -m 700 {missing[0]}: the live server makes the tables there"
    worst = Status.CRITICAL if use == "dump" and missing else Status.WARN
    report.fail(MADE_SINCE, hint, value=first_of(shown), expected="none", worst=worst)


MADE_SINCE = "tablespaces made since the base backup"


def prove(
    report: Report,
    instance: PrivateInstance,
    origin: PointOrigin,
    stop: Stop,
    commits: Sequence[Commit] | None = None,
) -> None:
    """Prove on the paused copy that it is this cluster, isolated, and exactly between the two transactions. No table is
    read: until the promotion, a transaction after the target (a TRUNCATE, a DROP) may hold a lock on it. `commits`:
    those that were read of the WAL; None: the caller judges the application's database.

    Raises:
        RunbookFailed: it is not at the target. Nothing live was touched.
    """
    found = read_standing(instance, stop, epochs(origin, stop))
    content = origin.content
    report.require(
        "isolation of the copy",
        not found.isolation,
        "do not use it: it could change production",
        value="; ".join(found.isolation) or "no archiving, no streaming, no subscriptions, own port",
    )
    report.require(
        "cluster of the copy",
        found.system == content.system,
        "choose another base backup: this one is from another cluster",
        value=found.system,
        expected=content.system,
    )
    begin = stop.before.lsn if stop.before else content.stop - 1
    reached = begin < found.replayed and (not stop.lsn or stop.inclusive or found.replayed <= stop.lsn)
    report.require(
        "the copy is at the target",
        found.paused and reached,
        "check its log; nothing live was touched",
        value=f"replayed up to {lsn_text(found.replayed)}",
        expected=f"the target, LSN {lsn_text(stop.lsn)}" if stop.lsn else "the end of the base backup",
    )
    _judge_sides(report, found, stop)
    _judge_invalid(report, found.invalid, instance.postgres.database, stop, commits)
    report.fail_if_critical()


def _judge_invalid(
    report: Report, invalid: Mapping[int, str], application: str, stop: Stop, commits: Sequence[Commit] | None
) -> None:
    """Databases that nobody can connect to. The application's is never one of them; nor is one that a transaction after
    the target drops: the target is inside that DROP DATABASE. Others are what an interrupted one left behind."""
    named = [name for name in invalid.values() if commits is not None or name != application]
    drops = [one for one in commits or () if one.dropped in invalid and one.lsn >= stop.lsn]
    is_inside = bool(drops) or application in named
    earlier = f"by=before_transaction target={drops[0].xid}" if drops else "an earlier target"
    report.require(
        "databases of the copy",
        not named,
        f"a DROP DATABASE had begun before the target: run it again with {earlier} to recover the database"
        if is_inside
        else "nothing to do if they are not needed: an interrupted DROP DATABASE left them; drop them again",
        value=f"invalid: {', '.join(named)}" if named else "",
        expected="none is invalid",
        worst=Status.CRITICAL if is_inside else Status.WARN,
    )


def _judge_sides(report: Report, found: RecoveryProgress, stop: Stop) -> None:
    """The last transaction before the target is in the copy, the first one after it is not."""
    if stop.before:
        report.require(
            f"last transaction before the target ({stop.before.xid})",
            found.before == "committed",
            f"nothing live was touched; {OTHER_BACKUPS}",
            value=found.before,
            expected="committed",
        )
    else:
        report.fact("last transaction before the target", "none since the base backup")
    if stop.after:
        report.require(
            f"first transaction after the target ({stop.after.xid})",
            found.after in ("in progress", "not begun", "aborted"),
            "nothing live was touched; run it again with by=lsn",
            value=found.after,
            expected="not committed",
        )
    else:
        report.fact("first transaction after the target", "none: the target is the end of the archive")


def compare(report: Report, env: Environment, instance: PrivateInstance) -> dict[str, int]:
    """Show what would change. A live server that is down is no obstacle. Returns the rows in the copy by table.

    The copy is promoted: from then on it shows its prepared transactions, also those that are older than its WAL.
    """
    warn_prepared(report, read_prepared(instance.postgres))
    copy = dict(read_counts(instance.postgres, instance.postgres.database).rows)
    try:
        live: dict[str, int] = dict(read_counts.work(env.postgres, env.postgres.database).rows)
    except OpsError:
        live = {}
    names = sorted({*copy, *live})
    report.table(
        "Rows in the copy and in the live database",
        ("table", "copy", "live"),
        [(name, copy.get(name, "missing"), live.get(name, "missing") if live else "down") for name in names],
    )
    report.prefer(
        "application's database in the copy",
        bool(copy) or not live,
        "check the copy's log",
        value=f"{len(copy)} tables",
    )
    return copy
