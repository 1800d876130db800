"""The program that ships WAL: into a bucket, encrypted, while clients write; restarted, and without its place."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyrage import x25519

from flows.database.base_backup import backup_cluster
from flows.recovery.forensics.transactions import find_transaction
from flows.recovery.objectives.points import read_recovery_points
from flows.recovery.point.restore import restore_to_point
from runbook.errors import OpsError
from runbook.wait import until
from tasks.wal.archive.archive import BranchMark
from tasks.wal.archive.destinations import archive_of, destinations_of, ship_now
from tasks.wal.archiver import WalArchiver
from tasks.wal.put import put
from tests.fixtures.postgres.clusters import NAME, Cluster
from tests.recovery.forensics.test_transactions import deeds, transaction
from tests.s3.servers import ACCESS_KEY, SECRET_KEY, S3Server, running_gateway

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def gateway() -> Iterator[S3Server]:
    with running_gateway() as server:
        yield server


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")


@contextlib.contextmanager
def archiving(cluster: Cluster, keep: int = 64) -> Iterator[subprocess.Popen[bytes]]:
    """The archiver as its supervisor runs it."""
    argv = [sys.executable, "-m", "tasks.wal.archiver", "--environment", NAME, "--keep-segments", str(keep)]
    with (cluster.layout.logs / "archiver.log").open("ab") as log:
        process = subprocess.Popen(argv, cwd=ROOT, env=dict(os.environ), stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(300)


def places(cluster: Cluster, *lines: str) -> None:
    """Other places for base backups and WAL."""
    path = cluster.root / "pair.toml"
    text = path.read_text()
    for name in ("cluster", "wal"):
        text = text.replace(f'{name} = "{cluster.root}/backups/{name}"\n', "")
    path.write_text(text.replace("[backups]\n", "[backups]\n" + "\n".join(lines) + "\n"))


def in_bucket(cluster: Cluster, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base backups and WAL in a bucket, encrypted."""
    key = x25519.Identity.generate()
    monkeypatch.setenv("PAIR_SECRET_KEY", SECRET_KEY)
    monkeypatch.setenv("PAIR_IDENTITY", str(key))
    bucket = server.bucket()
    places(
        cluster,
        f'cluster = "s3://{bucket.bucket}/cluster"',
        f'wal = "s3://{bucket.bucket}/wal"',
        f'endpoint = "{server.endpoint}"',
        f'access_key = "{ACCESS_KEY}"',
        'secret_key_env = "PAIR_SECRET_KEY"',
        f'recipients = ["{key.to_public()}"]',
        'identity_env = "PAIR_IDENTITY"',
    )


def test_wal_is_shipped_to_a_bucket_encrypted_as_it_comes_and_restores(
    cluster: Cluster, gateway: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_bucket(cluster, gateway, monkeypatch)
    cluster.sql("postgres", "CREATE TABLE accounts AS SELECT g AS id, g AS balance FROM generate_series(1, 100) g")
    backup = backup_cluster.fn(NAME)
    assert backup.facts["store"].startswith("s3://")
    archive = archive_of(cluster.environment, "backups", cluster.node("postgres").system)
    with archiving(cluster), cluster.writing() as writes:
        writes.wait(50)
        cluster.sql("postgres", "SELECT pg_switch_wal()")
        name = cluster.sql("postgres", "SELECT pg_walfile_name(pg_current_wal_lsn())")[0][0]
        writes.wait(50)
        partials = lambda: [one for one in archive.listing().partials if one >= name]  # noqa: E731
        until(partials, what="an unfinished segment of since then in the archive", seconds=120)
        with cluster.connect("postgres") as connection, connection.transaction():
            connection.execute("UPDATE accounts SET balance = 0")
            row = connection.execute("SELECT pg_current_xact_id()::xid::text::bigint").fetchone()
        writes.wait(20)
        acknowledged = set(writes.acknowledged)
    assert row
    assert all(name.endswith((".zst.age", ".in_use")) for name in archive.place.names()), "a mark says nothing of WAL"
    report = restore_to_point.fn(NAME, by="before_transaction", target=str(row[0]), confirm=NAME)
    assert report.facts["WAL"].endswith(archive.place.where)
    assert cluster.sql("postgres", "SELECT sum(balance) FROM accounts") == [(5050,)]
    back = restore_to_point.fn(NAME, by="latest", timeline=1, confirm=NAME)
    assert back.facts["timeline"].startswith("3")
    found = {number for (number,) in cluster.sql("postgres", "SELECT id FROM writes")}
    assert acknowledged - found == set(), "every acknowledged write of the old timeline"


def test_the_archiver_goes_on_after_its_place_was_away_and_empties_the_receivers_directory(cluster: Cluster) -> None:
    cluster.sql("postgres", "CREATE TABLE t (id int)")
    place = cluster.root / "backups" / "wal"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("a file where the directory should be")
    log = cluster.layout.logs / "archiver.log"
    with archiving(cluster, keep=1):
        until(lambda: "backups: " in log.read_text(), what="its complaint", seconds=120)
        for number in range(4):
            cluster.sql("postgres", f"INSERT INTO t VALUES ({number}); SELECT pg_switch_wal()")
        finished = lambda: [path for path in cluster.wal.iterdir() if path.suffix != ".partial"]  # noqa: E731
        until(lambda: len(finished()) >= 4, what="the segments", seconds=120)
        place.unlink()
        until(lambda: len(finished()) == 1, what="the receiver's directory emptied", seconds=120)
    archive = archive_of(cluster.environment, "backups", cluster.node("postgres").system)
    listing = archive.listing()
    assert len(listing.segments) >= 4
    assert "recovered: no file is refused" in log.read_text()
    for found in listing.segments.values():
        assert len(archive.get(found[0])) == 16 << 20


def test_an_archive_command_that_writes_over_nothing(tmp_path: Path) -> None:
    source, directory = tmp_path / "source", tmp_path / "wal"
    directory.mkdir()
    source.write_bytes(b"one")
    assert put(source, "000000010000000000000001", directory) == ""
    assert put(source, "000000010000000000000001", directory) == "", "the same again is no error"
    source.write_bytes(b"two")
    assert "other content" in put(source, "000000010000000000000001", directory)
    assert (directory / "000000010000000000000001").read_bytes() == b"one"
    assert [path.name for path in directory.iterdir()] == ["000000010000000000000001"]


def test_a_transaction_is_found_in_a_bucket_encrypted_when_the_table_is_gone(
    cluster: Cluster, gateway: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its WAL is in the archive only, its name in the base backup only."""
    in_bucket(cluster, gateway, monkeypatch)
    cluster.sql("postgres", "CREATE TABLE accounts AS SELECT g AS id, g AS balance FROM generate_series(1, 100) g")
    backup_cluster.fn(NAME)
    deleted = transaction(cluster, "DELETE FROM accounts WHERE id > 90")
    dropped = transaction(cluster, "DROP TABLE accounts")
    path = cluster.root / "pair.toml"
    path.write_text(path.read_text().replace('survives = "server"\n', ""))
    points = [one for one in read_recovery_points(cluster.environment).points if one.means == "point in time"]
    assert {one.serves("server lost") for one in points} == {True, False}, "the receiver is on the primary's host"
    ((name,),) = cluster.sql("postgres", "SELECT pg_walfile_name(pg_switch_wal())")
    until(lambda: name in ship_now(cluster.environment).newest, what=f"{name} in the archive", seconds=120)
    cluster.crash("standby")
    cluster.crash("postgres")
    for place in (cluster.wal, *(cluster.node(role).data / "pg_wal" for role in ("postgres", "standby"))):
        for path in place.iterdir():
            if path.is_file() and ".history" not in path.name:
                path.unlink()
    report = find_transaction.fn(NAME, "accounts")
    assert deeds(report) == {deleted: ("DELETE 10", 10, 0), dropped: ("DROP", 0, 0)}
    assert "from the archive" in report.facts["WAL"]
    assert report.facts["name found in"].startswith("base_")
    monkeypatch.setenv("PAIR_IDENTITY", str(x25519.Identity.generate()))
    with pytest.raises(OpsError, match="encrypted to other keys"):
        find_transaction.fn(NAME, "accounts")


def test_it_records_the_timeline_that_the_receiver_follows_after_a_promotion_by_hand(cluster: Cluster) -> None:
    env, system = cluster.environment, cluster.node("postgres").system
    archiver = WalArchiver(cluster.wal, destinations_of(env))

    def recorded(timeline: int) -> bool:
        archiver.round(last=True)
        mark = archive_of(env, "backups", system).listing().branch
        return mark is not None and mark.timeline == timeline

    cluster.sql("postgres", "CREATE TABLE t (id int)")
    until(lambda: recorded(1), what="the first record", seconds=60)
    cluster.stop("postgres")
    cluster.promote("standby")
    cluster.sql("standby", "SELECT pg_create_physical_replication_slot(%s, true)", env.wal.slot)
    until(lambda: recorded(2), what="the record of the promotion", seconds=60)
    assert recorded(2)
    assert archive_of(env, "backups", system).listing().branch == BranchMark(2, 2, 2), "it is not repeated"
