"""Where reading of WAL ends: at its end, or at a hole, which no reader takes for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.database.base_backup import backup_cluster
from flows.recovery.forensics.transactions import find_transaction
from runbook import clock
from runbook.errors import OpsError, RunbookFailed, VerificationFailed
from tasks.recovery_points.wal import WrittenWal, moment_of
from tasks.wal.archive.rescue import ship_server_wal
from tasks.wal.format.names import lsn_of, lsn_text
from tasks.wal.format.pages import Files
from tasks.wal.reading.local import find_segments
from tasks.wal.reading.waldump import commits_in, lines_in
from tests.fixtures.postgres.clusters import NAME, Cluster

HERE = "SELECT pg_current_wal_insert_lsn()::text"


def place(cluster: Cluster) -> int:
    return lsn_of(cluster.sql("postgres", HERE)[0][0])


def files_in(directory: Path) -> Files:
    return [(one.segment, one.path) for one in find_segments(directory)]


@dataclass
class Holed:
    """A cluster whose newest segment but one has an unreadable record between two commits of the table `accounts`.
    Nobody streams from the primary, which is dead."""

    cluster: Cluster
    before: int
    hole: int
    behind: int


@pytest.fixture
def holed(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Holed:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    cluster.sql("postgres", "CREATE TABLE accounts (id int)")
    backup_cluster.fn(NAME)
    cluster.stop("receiver")
    cluster.sql("postgres", "SELECT pg_switch_wal()")
    cluster.sql("postgres", "INSERT INTO accounts VALUES (1)")
    before = place(cluster)
    cluster.sql("postgres", "SELECT pg_logical_emit_message(false, 'test', repeat('x', 20000))")
    cluster.sql("postgres", "DELETE FROM accounts WHERE id = 1")
    behind = place(cluster)
    cluster.sql("postgres", "SELECT pg_switch_wal()")
    cluster.sql("postgres", "INSERT INTO accounts VALUES (2)")
    cluster.crash("standby")
    cluster.crash("postgres")
    hole = before + 10_000
    for role in ("postgres", "standby"):
        for segment, path in files_in(cluster.node(role).data / "pg_wal"):
            if segment.start <= hole < segment.end:
                with path.open("r+b") as file:
                    file.seek(hole - segment.start)
                    file.write(b"?!")
    return Holed(cluster, before, hole, behind)


def test_reading_begins_behind_a_switch_and_says_where_it_ends(holed: Holed) -> None:
    postgres, files = holed.cluster.environment.postgres, files_in(holed.cluster.node("postgres").data / "pg_wal")
    whole = [one for one in files if one[0].end <= holed.before]
    switched = whole[-1][0]
    ends = list[int]()
    tail = switched.end - 8192  # zeros, behind a switch of segments
    found = list(lines_in(postgres, files, ["Heap"], start=tail, stopped=ends.append))
    assert any("INSERT" in line for line in found)
    assert switched.end < ends[0] < holed.hole
    assert commits_in(postgres, whole), "whole segments need no end"
    for read in (lambda: commits_in(postgres, files), lambda: list(lines_in(postgres, files, ["Heap"], start=tail))):
        with pytest.raises(VerificationFailed, match="does not decode after"):
            read()
    gap = [files[0], *files[2:]]
    with pytest.raises(OpsError, match="could not find file"):
        commits_in(postgres, gap, ends.append)


def test_no_reader_takes_a_hole_for_the_end(holed: Holed) -> None:
    cluster = holed.cluster
    with pytest.raises(RunbookFailed, match="the WAL after .* cannot be read"):
        find_transaction.fn(NAME, "accounts", kinds=["DELETE"], since="0/1000000", until=lsn_text(holed.behind))
    env = cluster.environment
    moment = moment_of(env, WrittenWal(clock.now(), cluster.node("postgres").system), holed.before)
    assert not moment.exact, "what follows is unknown, and not nothing"
    shipped = ship_server_wal(env, "backups")
    assert any("does not decode from" in why for why in shipped.refused)
    assert shipped.put, "what can be read before it"
