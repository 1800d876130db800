"""How far a dump is and a restore of tables: a part of the whole that is never too much, for a bar on the run's page."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.database.backup import backup_database
from flows.database.tables import restore_tables
from runbook.progress import WorkDone
from tasks.postgres.dump import dump
from tasks.postgres.dump.progress import DumpProgress, weights_of
from tasks.postgres.dump.snapshot import exported_snapshot
from tasks.postgres.tables import scratch
from tests.database.conftest import NAME, Trial

Tell = Callable[[], WorkDone]


@pytest.fixture
def tellers(monkeypatch: pytest.MonkeyPatch) -> list[Tell]:
    """What long work would be asked every few seconds; asked once at its beginning and once at its end here."""
    kept: list[Tell] = []

    @contextlib.contextmanager
    def progress(tell: Tell) -> Iterator[None]:
        first = tell()
        yield
        last = tell()
        kept.extend([lambda: first, lambda: last])

    monkeypatch.setattr(dump, "progress", progress)
    monkeypatch.setattr(scratch, "progress", progress)
    return kept


def test_a_table_in_hand_counts_by_its_rows(trial: Trial, tmp_path: Path) -> None:
    trial.sql("CREATE TABLE wide AS SELECT g AS id, repeat(md5(g::text), 100) AS body FROM generate_series(1, 20000) g")
    trial.sql(
        "CREATE TABLE other AS SELECT g AS id, repeat(md5(g::text), 100) AS body FROM generate_series(1, 20000) g"
    )
    trial.sql("ANALYZE wide")
    postgres, target = trial.environment.postgres, tmp_path / "dump"
    target.mkdir()
    with exported_snapshot(postgres) as (exporter, _, _), trial.server.connect(trial.database) as client:
        weights = weights_of(exporter)
        whole = sum(weights.tables.values())
        oids = trial.sql("SELECT 'wide'::regclass::oid::bigint, 'other'::regclass::oid::bigint")[0]
        # Nearly the same: autovacuum gives one of them its maps before the other.
        share, others = (weights.tables[int(str(oid))] / whole for oid in oids)
        assert 0.4 < share < 0.5, "and about as much in the other, which was never analysed"
        done = DumpProgress(postgres, target, weights)
        assert done.read().ratio == 0
        with client.cursor().copy("COPY wide TO STDOUT") as copy:
            for _ in range(10000):
                copy.read()
            half = done.read().ratio
            assert 0.4 * share < half < share
            for _ in copy:
                pass
        assert done.read().ratio == pytest.approx(share)
        with client.cursor().copy("COPY other TO STDOUT") as copy:
            for _ in range(10000):
                copy.read()
            assert share + others * 0.4 < done.read().ratio <= share + others
            for _ in copy:
                pass
        # Two files were seen being written; a third came and went: one of the smallest tables, for all that is known.
        for number in range(3):
            (target / f"{number}.dat.zst").write_bytes(b"x" * 1000)
        (target / "2.dat").write_bytes(b"x" * 5000)  # which is still being compressed
        told = done.read()
        assert told.ratio == pytest.approx(share + others + min(weights.tables.values()) / whole)
        assert told.text.startswith("3.0 kB dumped; of ")
        assert told.text.endswith(f" in tables at least {told.ratio:.0%} are read")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_dump_that_is_done_has_a_full_bar(trial: Trial, tellers: list[Tell], jobs: int) -> None:
    trial.sql("INSERT INTO people (name) SELECT 'x' FROM generate_series(1, 20000)")
    backup_database.fn(NAME, jobs=jobs)
    first, last = (tell() for tell in tellers)
    assert first.ratio < 0.1
    assert last.ratio == pytest.approx(1.0), "every table and large object has its file"


def test_a_dump_of_chosen_tables_is_measured_by_those(trial: Trial, tellers: list[Tell]) -> None:
    backup_database.fn(NAME, kind="tables", tables=["answers"])
    assert [tell().ratio for tell in tellers] == [0.0, pytest.approx(1.0)]


def test_a_restore_of_tables_goes_by_their_bytes(trial: Trial, tellers: list[Tell]) -> None:
    backup_database.fn(NAME)
    tellers.clear()
    trial.sql("DELETE FROM answers WHERE person > 10")
    restore_tables.fn(NAME, tables=["answers", "people"], confirm=NAME)
    first, last = (tell() for tell in tellers)
    assert first.ratio < 0.2
    assert 0.8 < last.ratio <= 1.0
    assert last.text.endswith(" restored")
