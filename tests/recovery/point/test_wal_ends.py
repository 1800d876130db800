"""Where WAL ends, to the byte: a failover compares that with what a standby has replayed."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from runbook.errors import OpsError
from tasks.failover.segments import read_beyond
from tasks.wal.format.names import lsn_of, lsn_text
from tasks.wal.format.pages import record_behind, record_end
from tasks.wal.reading.local import find_segments
from tests.fixtures.postgres.clusters import Cluster

PAGE = 8192
LINE = re.compile(r"len \(rec/tot\): +\d+/ *(\d+), tx: +\d+, lsn: ([0-9A-F]+/[0-9A-F]+), prev \S+, desc: (\w+)")


def records(cluster: Cluster, directory: Path, start: int, end: int) -> list[tuple[int, int, str]]:
    """Every record between two positions: where it begins, its bytes, what it is."""
    program = cluster.environment.postgres.program("pg_waldump")
    argv = [program, "-p", directory, "-t", "1", "-s", lsn_text(start), "-e", lsn_text(end)]
    printed = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    return [(lsn_of(at), int(bytes_), what) for bytes_, at, what in LINE.findall(printed)]


def written(cluster: Cluster) -> tuple[int, int]:
    """Records of many lengths, three segments of them; from where to where."""
    here = "SELECT pg_current_wal_lsn() - '0/0'::pg_lsn"
    cluster.sql("postgres", "SELECT pg_switch_wal()")
    start = int(cluster.sql("postgres", here)[0][0])
    for bytes_ in (*range(1, 300, 7), 4_000, 8_000, 8_151, 8_192, 20_000, 100_000, 900_000):
        cluster.sql("postgres", "SELECT pg_logical_emit_message(false, 'test', repeat('x', %s))", bytes_)
    cluster.sql("postgres", "SELECT pg_logical_emit_message(true, 'test', repeat('x', 16000000))")
    return start, int(cluster.sql("postgres", here)[0][0])


def test_every_record_ends_where_the_next_one_begins(cluster: Cluster) -> None:
    start, end = written(cluster)
    pg_wal = cluster.node("postgres").data / "pg_wal"
    size = find_segments(pg_wal)[0].bytes
    found = records(cluster, pg_wal, start, end)
    assert len(found) > 50
    for (at, bytes_, what), (following, _, _) in itertools.pairwise(found):
        ends = record_end(at, bytes_, size)
        if ends % PAGE == 0:  # the next one begins behind the page's header
            ends += 24 if ends % size else 40
        assert ends == following, f"{what} of {bytes_} bytes at {lsn_text(at)}"


def test_a_record_of_which_only_the_first_page_was_written_is_not_there(cluster: Cluster, tmp_path: Path) -> None:
    """The next page is empty, which pg_waldump tells in other words than the middle of a page that is."""
    start, end = written(cluster)
    pg_wal = cluster.node("postgres").data / "pg_wal"
    size = find_segments(pg_wal)[0].bytes
    found = records(cluster, pg_wal, start, end)
    torn = next(at for at, bytes_, _ in found if bytes_ > 8_000 and 40 < at % PAGE < PAGE - 24)  # not a page's first
    whole = [(at, bytes_) for at, bytes_, _ in found if at < torn][-1]
    for one in find_segments(pg_wal):
        if one.start <= torn:
            shutil.copy(one.path, tmp_path / one.name)
    last = max(tmp_path.iterdir())
    with last.open("r+b") as file:
        cut = (torn // PAGE + 1) * PAGE % size
        file.seek(cut)
        file.write(bytes(size - cut))
    beyond = read_beyond(cluster.environment.postgres, tmp_path, 1, start)
    assert beyond.end == record_end(*whole, size) == torn, "this one's beginning, in the middle of a page"
    assert beyond.bytes == torn - start
    assert read_beyond(cluster.environment.postgres, tmp_path, 1, torn).end == torn
    for one in find_segments(pg_wal):
        shutil.copy(one.path, tmp_path / one.name)
    with last.open("r+b") as file:
        file.seek(torn % size + 30)
        file.write(b"?!")
    files = [(one.segment, one.path) for one in find_segments(tmp_path)]
    last_of_page = max(at for at, _, _ in found if at < torn and at // PAGE == found[0][0] // PAGE)
    assert record_behind(files, torn) // PAGE > torn // PAGE, "on a later page"
    assert record_behind(files, found[0][0]) == found[1][0] <= last_of_page, "on the same page"
    with pytest.raises(OpsError, match="later WAL exists"):
        read_beyond(cluster.environment.postgres, tmp_path, 1, start)
