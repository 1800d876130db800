"""CREATE TABLESPACE in WAL: every record is found, wherever it lies, and no other one is taken for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tasks.cluster.tablespaces import crc32c, find_created, tablespaces_inside
from tasks.wal.format.names import Segment, lsn_of
from tasks.wal.reading.waldump import lines_in
from tests.fixtures.servers import PostgresServer

SEGMENT_BYTES, PAGE_BYTES = 1 << 20, 8192
CASES = [(unit, left) for unit in (PAGE_BYTES, SEGMENT_BYTES) for left in range(-40, 80, 8)]


@pytest.fixture(scope="module")
def written() -> Iterator[PostgresServer]:
    """Tablespaces whose records end before, cross, or begin after the boundary of a page or of a segment."""
    server = PostgresServer(settings=("wal_keep_size=512MB", "full_page_writes=off", "autovacuum=off"))
    try:
        server.initdb("--wal-segsize=1")
        server.start()
        before = _create(server, 0)
        (first,) = find_created(server.data / "pg_wal")
        for number, (unit, left) in enumerate(CASES, 1):
            _write_up_to(server, unit, left + first.lsn - before)
            _create(server, number)
        server.sql("SELECT pg_logical_emit_message(true, 'x', repeat('\x05', 4000))")
        server.stop()
        yield server
    finally:
        server.remove()


def _create(server: PostgresServer, number: int) -> int:
    """Create one. Returns where the first record of its transaction begins."""
    place = server.root / f"space{number:02}"
    server.account.directory(place, 0o700)
    with server.connect() as connection:
        ((lsn,),) = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchall()
        connection.execute(f"CREATE TABLESPACE space{number:02} LOCATION '{place}'".encode())
    return lsn_of(str(lsn))


def _write_up_to(server: PostgresServer, unit: int, left: int) -> None:
    """Write until `left` bytes remain before the next boundary."""
    near, head = PAGE_BYTES // 2, 55  # of a message; so near to its place there is no other page header
    with server.connect() as connection:
        while True:
            ((lsn,),) = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchall()
            missing = (unit - left - lsn_of(str(lsn))) % unit
            if not missing:
                return
            size = int((missing - near) * 0.99) if missing > near else missing - head if missing > 300 else near
            connection.execute("SELECT pg_logical_emit_message(false, 'x', repeat('y', %s))", [size])


def _dumped(server: PostgresServer) -> list[tuple[str, str]]:
    """The LSN and the description of each record of the resource manager, by pg_waldump."""
    paths = sorted((server.data / "pg_wal").glob("0*"))
    files = [(Segment.named(path.name, SEGMENT_BYTES), path) for path in paths]
    lines = lines_in(server.block(), files, ["Tablespace"], stopped=lambda _: None)
    return [(line.split("lsn: ")[1].split(",")[0], line.split("desc: ")[1].strip()) for line in lines]


def test_each_record_is_found_and_its_path_is_hidden_only_while_the_block_runs(written: PostgresServer) -> None:
    wal = written.data / "pg_wal"
    before = {path.name: path.read_bytes() for path in wal.glob("0*")}
    expected = [(lsn_of(lsn), text.split()[-1].strip('"')) for lsn, text in _dumped(written)]
    found = find_created(wal)
    assert [(one.lsn, one.path) for one in found] == expected
    assert len(found) == len(CASES) + 1
    for unit in (PAGE_BYTES, SEGMENT_BYTES):
        assert {-one.lsn % unit for one in found} >= set(range(8, 72, 8)), "each way to cross a boundary"
    with tablespaces_inside(wal) as hidden:
        assert hidden == found
        assert {text for _, text in _dumped(written)} == {f'CREATE {one.oid} ""' for one in found}
        assert find_created(wal) == found, "known while they are hidden too"
    assert {path.name: path.read_bytes() for path in wal.glob("0*")} == before


def test_the_checksum_is_castagnolis() -> None:
    assert crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283
