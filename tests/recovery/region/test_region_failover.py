"""A whole region lost: everything comes up in the other one from what was replicated there, and users are sent to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest

from blocks.environment import Environment
from flows.database.backup import backup_database
from flows.database.base_backup import backup_cluster
from flows.database.copies import replicate_backups
from flows.recovery.region.failover import region_failover
from lab.client import Lab
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from tasks.backups import codec, manifest
from tasks.backups.manifest import MANIFEST, SEAL
from tasks.wal.archive.archive import Archive
from tasks.wal.archive.destinations import archive_of
from tasks.wal.branch import timeline_in_use
from tasks.wal.format.names import SEGMENT_BYTES, lsn_text
from tests.fixtures import forked
from tests.fixtures.bits import flip
from tests.fixtures.postgres.shipped import commit, forget, wait_shipped
from tests.recovery.conftest import System

ATTESTED = "on-call: every process killed with -9, their supervisor first"
# One of each kind of boundary; the others are reached by the soak test.
BOUNDARIES = ("after promote_instance", "cluster: between renames", "before send_users")


# pg_restore cannot build the index over its row: the function names a table without the schema.
UNBUILDABLE = """
CREATE TABLE rates (rate int); INSERT INTO rates VALUES (2); CREATE TABLE priced (n int);
CREATE FUNCTION rated(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN RETURN $1 * (SELECT rate FROM rates); END $$;
CREATE INDEX by_price ON priced (rated(n)); INSERT INTO priced VALUES (1)
"""
ACCEPTED = "INDEX public.by_price"


def launch(lost: Lost, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """From the command line, without a Prefect server: it was in the region that is gone."""
    argv = ["-m", "flows.recovery.region.failover", "--environment", lost.region.name]
    argv += ["--source", lost.first.name, "--confirm", lost.region.name, "--fenced-by", ATTESTED, *words]
    environment = {name: text for name, text in os.environ.items() if name != "PREFECT_API_URL"} | variables
    return forked.run(argv, environment)


@dataclass(frozen=True)
class Lost:
    """Two regions, the first of them dead. Rows of `shipped`: `dump` and `base` were there at the time of the two
    backups, `wal` is in the WAL alone that came after both, in a segment after which another one came; `before_wal`: the
    LSN before it, in `segment`. `older` is a base backup too. `users`: the file of that table, of which nothing is in the WAL.
    `cluster`: the system identifier."""

    first: Lab
    region: System
    backups: dict[str, str]
    users: str
    before_wal: int
    segment: str
    cluster: int

    def rows(self) -> set[str]:
        return {what for (what,) in self.region.sql("SELECT what FROM shipped")}

    def store(self, kind: str) -> Path:
        return self.region.store(kind)

    def running(self) -> set[str]:
        return {name for name, row in self.region.lab.status()["services"].items() if row["running"]}

    def report(self) -> dict[str, Any]:
        """The newest in the region."""
        found = self.region.store("reports").glob("*region-failover.json")
        content: dict[str, Any] = json.loads(max(found, key=lambda path: path.stat().st_mtime).read_text())
        return content

    def plan(self, **named: object) -> Report:
        return region_failover.fn(self.region.name, source=self.first.name, fenced_by=ATTESTED, **named)  # type: ignore[arg-type]

    def require_serves(self, *rows: str) -> None:
        """Rows, a log-in, health, and users are sent there."""
        assert self.rows() == set(rows)
        assert self.region.log_in()
        url = self.region.lab.status()["application"]["url"]
        assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "healthy", "database": "ok", "redis": "ok"}
        assert self.first.endpoint() == url


@pytest.fixture(scope="module")
def lost(system: System) -> Iterator[Lost]:
    """Backups of every kind and their copies, and a write that is in the WAL alone; then the first region is dead until
    the module ends."""
    system.sql("DROP TABLE IF EXISTS shipped")
    system.sql(UNBUILDABLE)
    system.sql("CREATE DATABASE other_app", "postgres")
    commit(system.lab, "dump")
    dump = backup_database.fn(system.name).facts["backup"]
    older = backup_cluster.fn(system.name).facts["backup"]
    commit(system.lab, "base")
    base = backup_cluster.fn(system.name).facts["backup"]
    ((users,),) = system.sql("SELECT pg_relation_filepath('users')")
    assert replicate_backups.fn(system.name).status in (Status.OK, Status.WARN)
    system.sql("SELECT pg_switch_wal()")
    before_wal = commit(system.lab)
    ((segment,),) = system.sql(f"SELECT pg_walfile_name('0/0'::pg_lsn + {before_wal})")
    ((cluster,),) = system.sql("SELECT system_identifier FROM pg_control_system()")
    commit(system.lab, "wal")
    system.sql("SELECT pg_switch_wal()")
    system.sql("SELECT pg_logical_emit_message(true, 'test', 'a commit that changes no row')")
    system.sql("SELECT pg_create_physical_replication_slot('consumer')")
    wait_shipped(system.lab, commit(system.lab))
    names = {"dump": dump, "older": older, "base": base}
    try:
        system.lab.lose()
        yield Lost(system.lab, System(system.lab.region()), names, users, before_wal, segment, cluster)
    finally:
        system.lab.empty_region()
        forget(system.lab)
        system.sql("SELECT pg_drop_replication_slot('consumer')")
        system.sql("DROP DATABASE other_app", "postgres")
        system.sql("DROP TABLE IF EXISTS priced, rates; DROP FUNCTION IF EXISTS rated")
        backup_database.fn(system.name)  # the newest is what the next file's tests restore


@pytest.fixture(autouse=True)
def empty_again(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test of the lost region the other one is empty, and users are sent to the dead one."""
    yield
    if "lost" in request.fixturenames:
        request.getfixturevalue("lost").first.clear_region()


def finding(report: Report, name: str) -> str:
    found = [found.value for found in report.findings if found.name == name]
    assert found, (name, report.findings, report.facts)
    return found[0]


@contextmanager
def spoiled(path: Path) -> Iterator[None]:
    """One bit of a packed file is another one."""
    content = path.read_bytes()
    flip(path)
    try:
        yield
    finally:
        path.write_bytes(content)


def test_everything_comes_up_in_the_other_region_up_to_the_last_write_that_came_there(lost: Lost) -> None:
    with pytest.raises(RunbookFailed, match="is fenced .*fenced_by"):
        region_failover.fn(lost.region.name, source=lost.first.name, confirm=lost.region.name)
    plan = lost.plan()
    assert plan.status is Status.PLANNED
    assert finding(plan, "replication slots") == "consumer (physical)", "nobody makes it in this region"
    assert "everything of other_app is lost" in lost.plan(backup=lost.backups["dump"]).headline
    assert "writes of grc_db" not in plan.headline, "its primary's files are on this host, and have no further commit"
    assert "writes of Redis of the last" in plan.headline
    assert lost.running() == set(), "a plan starts nothing"
    with unreadable(lost):
        assert "writes of grc_db of the last" in lost.plan().headline, "nobody here knows what it acknowledged"
    done = launch(lost)
    assert done.returncode == 0, done.stderr[-2000:]
    lost.require_serves("dump", "base", "wal")
    assert {"wal-receiver", "wal-archiver"} <= lost.running(), (
        "its own WAL is received and shipped from the first moment"
    )
    report = lost.report()
    assert report["status"] == "WARN", "there is no backup of it yet"
    facts = report["facts"]
    assert facts["database from"].startswith(f"base backup and WAL: {lost.backups['base']}")
    (database,) = (loss for loss in report["losses"] if loss["part"] == "grc_db")
    assert database["count"] == 0
    assert "every write of Redis after" in facts["lost"]
    assert "attested for" in facts[f"fence of {lost.first.name}"]
    assert {"decision", "build and proof", "bring up", "switch"} <= set(facts)
    commit(lost.region.lab, "of its own")
    again = launch(lost)
    assert again.returncode == 0
    assert "nothing was changed" in again.stdout
    lost.require_serves("dump", "base", "wal", "of its own")


@contextmanager
def unreadable(lost: Lost) -> Iterator[None]:
    """The dead region's data directories are away, as on a host that cannot be reached."""
    nodes = [Path(node.data_directory) for node in Environment.find(lost.first.name).nodes()]
    for data in nodes:
        data.rename(data.with_name(f"{data.name}.away"))
    try:
        yield
    finally:
        for data in nodes:
            data.with_name(f"{data.name}.away").rename(data)


@contextmanager
def lacking(base: Path, file: str) -> Iterator[None]:
    """A base backup without a file of its cluster, every checksum right: its WAL replays all the same."""
    tar, kept = base / "base.tar.zst", {name: (base / name).read_bytes() for name in ("base.tar.zst", MANIFEST, SEAL)}
    plain = BytesIO(codec.decompress(kept[tar.name]))
    with (
        tarfile.open(fileobj=plain) as old,
        codec.writer(tar) as packed,
        tarfile.open(fileobj=packed, mode="w|") as new,
    ):
        assert file in old.getnames()
        for one in old:
            if one.name != file:
                new.addfile(one, old.extractfile(one))
    whole = manifest.read(base)
    manifest.write(base, whole.model_copy(update={"files": {**whole.files, tar.name: manifest.sum_of(tar)}}))
    try:
        yield
    finally:
        for name, content in kept.items():
            (base / name).write_bytes(content)


def test_what_is_spoiled_is_not_taken_and_the_next_best_is(lost: Lost) -> None:
    """A segment of WAL: everything up to it. Every base backup, be it only when it is built, after the confirmation,
    with every checksum right: the dump. Told, with the point that is reached."""
    whole = lost.plan()
    with ExitStack() as stack:  # else the other archive's copy is read
        for wal in (lost.store("wal"), Path(Environment.find(lost.first.name).backups.wal)):
            stack.enter_context(spoiled(newest_segment(wal / lost.first.name)))
        plan = lost.plan()
    assert plan.status is Status.PLANNED
    assert "is damaged" in finding(plan, "WAL in the store")
    assert point(plan) < point(whole)
    bases = [path for path in lost.store("cluster").iterdir() if path.name.startswith("base_")]
    with ExitStack() as stack:
        for base in bases:
            is_newest = base.name == lost.backups["base"]
            stack.enter_context(lacking(base, lost.users) if is_newest else spoiled(base / "base.tar.zst"))
        plan = lost.plan(accept=[ACCEPTED])
        more = launch(lost)
        first = {row["name"]: row["value"] for row in lost.report()["findings"]}
        assert f"backup={lost.backups['dump']}" in more.stderr, "the plan said that nothing is lost"
        assert lost.running() == set()
        refused = launch(lost, "--backup", lost.backups["dump"])
        done = launch(lost, "--backup", lost.backups["dump"], "--accept", ACCEPTED)
    for base in bases:  # the bits are right again
        (lost.store("cluster") / ".verified" / f"{base.name}.json").unlink(missing_ok=True)
    assert refused.returncode == 1
    assert f'accept=["{ACCEPTED}"]' in refused.stderr
    assert done.returncode == 0, done.stderr[-2000:]
    assert plan.facts["database from"].startswith(f"base backup and WAL: {lost.backups['base']}")
    report = lost.report()
    told = {row["name"]: row["value"] for row in report["findings"]}
    assert lost.users in first[f"not used: {lost.backups['base']}"]
    assert "SHA-256" in first[f"not used: {lost.backups['older']}"]
    assert report["facts"]["database from"].startswith(f"dump: {lost.backups['dump']}")
    assert told["accepted as not restored"] == ACCEPTED
    assert lost.region.sql("SELECT to_regclass('by_price'), count(*) FROM priced") == [(None, 1)]
    lost.require_serves("dump")


def newest_segment(wal: Path) -> Path:
    """Of an archive. The finished one counts, where what was written of it before was not taken away yet."""
    archive = max(wal.iterdir(), key=lambda path: path.stat().st_mtime)
    segments = (path for path in archive.iterdir() if "history" not in path.name)
    return max(segments, key=lambda path: (path.name[:24], ".partial" not in path.name, path.name))


@contextmanager
def undecodable(lost: Lost) -> Iterator[str]:
    """The segment in which `wal` was written, with a record altered and a right checksum: gives its name."""
    archive = archive_of(Environment.find(lost.region.name), "backups", lost.cluster, lost.first.name)
    (stored,) = archive.listing().segments[lost.segment]
    content = bytearray(whole := archive.get(stored))
    content[lost.before_wal % SEGMENT_BYTES + 30] ^= 1
    archive.remove([stored])
    archive.put(lost.segment, bytes(content))
    try:
        yield lost.segment
    finally:
        archive.remove(archive.listing().segments[lost.segment])
        archive.put(lost.segment, whole)


def test_wal_behind_a_gap_is_given_up_by_name_only(lost: Lost) -> None:
    with undecodable(lost) as name:
        with pytest.raises(RunbookFailed) as caught:
            lost.plan()
        gap = next(row for row in caught.value.report.findings if row.name == "WAL without a gap")
        assert gap.status is Status.CRITICAL
        assert f"{name} in " in gap.value
        assert "does not decode" in gap.value
        assert "later segments in the archive, with commits until" in gap.value
        assert f"backup={lost.backups['base']}" in gap.hint
        plan = lost.plan(backup=lost.backups["base"])
        assert plan.status is Status.PLANNED, plan.sentence()
        assert name in finding(plan, "WAL without a gap")
    assert "WAL without a gap" not in {row.name for row in lost.plan().findings}


@contextmanager
def branches(lost: Lost, fork: int, *numbers: int) -> Iterator[Archive]:
    """Timelines without a commit that left the one in use, in the archive that the region reads."""
    archive = archive_of(Environment.find(lost.region.name), "backups", lost.cluster, lost.first.name)
    before, listing = set(archive.place.names()), archive.listing()
    parent = timeline_in_use(Environment.find(lost.first.name), archive, listing, lost.cluster, of=lost.first.name)
    ends = (*parent.ancestors, (parent.number, fork))
    text = "".join(f"{number}\t{lsn_text(end)}\tno recovery target specified\n" for number, end in ends)
    try:
        for number in numbers:
            archive.put(f"{number:08X}.history", text.encode())
        yield archive
    finally:
        archive.place.remove(sorted(set(archive.place.names()) - before))


def test_the_timeline_that_a_person_names_is_followed(lost: Lost) -> None:
    """The archive's record names one that was left before the last write; or two may be in use, and the run asks."""
    whole = lost.plan()
    number = whole.pins["timeline"]
    with branches(lost, lost.before_wal, 90) as archive:
        archive.note_in_use(90)
        assert lost.plan().pins.get("timeline") != number
        named = lost.plan(timeline=number)
        assert named.pins["timeline"] == number
        assert point(named) == point(whole)
    with branches(lost, lost.before_wal + (1 << 40), 90, 91):
        with pytest.raises(OpsError, match="unknown which timeline is in use") as caught:
            lost.plan()
        assert "timeline=…" in str(caught.value)
        assert point(lost.plan(timeline=number)) == point(whole)


def point(report: Report) -> datetime:
    """The newest one that the chosen way reaches."""
    return datetime.fromisoformat(
        next(row.rows for row in report.evidence if row.name.startswith("Recovery options for the database"))[0][2]
    )


def require_ends_well(lost: Lost, points: tuple[str, ...]) -> None:
    for point in points:
        killed = launch(lost, OPS_FAILPOINT=point)
        assert killed.returncode == -signal.SIGKILL, f"{point}: {killed.stderr[-1000:]}"
        done = launch(lost)
        assert done.returncode == 0, (point, done.stderr[-2000:])
        lost.require_serves("dump", "base", "wal")
        lost.first.clear_region()


def test_killed_and_launched_again_it_ends_well(lost: Lost) -> None:
    require_ends_well(lost, BOUNDARIES[1:2])


@pytest.mark.soak
def test_killed_anywhere_and_launched_again(lost: Lost, tmp_path: Path) -> None:
    log = tmp_path / "points"
    assert launch(lost, OPS_FAILPOINT_LOG=str(log)).returncode == 0
    points = tuple(dict.fromkeys(log.read_text().splitlines()))
    assert set(BOUNDARIES) <= set(points)
    lost.first.clear_region()
    require_ends_well(lost, points)
