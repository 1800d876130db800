"""check_indexes and rebuild_indexes on a real server."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from flows.database.upkeep import indexes
from flows.database.upkeep.indexes import check_indexes, rebuild_indexes
from runbook.errors import RunbookFailed, Unreachable
from runbook.report import Evidence, Report, Status
from runbook.units import size
from runbook.wait import until
from tasks.postgres.upkeep import reindex, session
from tasks.postgres.upkeep.indexes import read_indexes
from tasks.postgres.upkeep.reindex import drop_leftover
from tests.database.conftest import NAME, Trial
from tests.fixtures.reports import finding as found

GOOD = (Status.OK, Status.WARN)


def table(report: Report, name: str) -> Evidence:
    return next(evidence for evidence in report.evidence if evidence.name.startswith(name))


def invalid(trial: Trial) -> list[str]:
    return [index.relation for index in read_indexes(trial.environment.postgres) if not index.valid]


@contextlib.contextmanager
def writer(trial: Trial) -> Iterator[None]:
    """A client in the middle of writing: whoever builds an index concurrently waits for it."""
    with trial.server.connect(trial.database) as client, client.transaction(force_rollback=True):
        client.execute("LOCK TABLE people IN ROW EXCLUSIVE MODE")
        yield


WAITS = "SELECT pid FROM pg_stat_activity WHERE query LIKE %s AND wait_event_type = 'Lock'"


def backend_that_waits(trial: Trial, statement: str) -> int:
    return int(str(until(lambda: trial.sql(WAITS, statement), what="a build that waits", seconds=120)[0][0]))


@contextlib.contextmanager
def build(trial: Trial, statement: str) -> Iterator[int]:
    """Somebody's build, that waits for a writer: its process. It goes on when the block is left."""

    def run() -> None:
        with contextlib.suppress(psycopg.Error):
            trial.sql(statement)

    thread = threading.Thread(target=run)
    with writer(trial):
        thread.start()
        yield backend_that_waits(trial, statement)
    thread.join()


def leave_invalid(trial: Trial, statement: str) -> None:
    """A build that was cancelled."""
    with build(trial, statement) as pid:
        trial.sql("SELECT pg_cancel_backend(%s)", pid)
        until(lambda: not trial.sql("SELECT 1 FROM pg_stat_progress_create_index"), what="its end", seconds=120)


def test_a_duplicate_is_named_and_what_a_constraint_rests_on_is_kept(trial: Trial) -> None:
    trial.sql("CREATE INDEX people_id_again ON people (id); CREATE INDEX people_name_again ON people (name)")
    trial.sql(
        'CREATE INDEX people_name_c ON people (name COLLATE "C"); CREATE INDEX people_name_part ON people (name) WHERE id > 5'
    )
    report = check_indexes.fn(NAME)
    rows = table(report, "Duplicates").rows
    assert sorted((row[0], row[1]) for row in rows) == [
        ("public.people_name", "public.people_name_again"),
        ("public.people_pkey", "public.people_id_again"),
    ]
    assert found(report, "duplicate indexes").status is Status.WARN
    for row in rows:
        trial.sql(row[3])
    assert found(check_indexes.fn(NAME), "duplicate indexes").status is Status.OK


def test_an_index_that_keeps_out_more_is_no_duplicate_nor_is_one_with_other_parameters(trial: Trial) -> None:
    trial.sql("CREATE TABLE codes (a int, words tsvector); CREATE UNIQUE INDEX plain ON codes (a)")
    trial.sql("CREATE UNIQUE INDEX strict ON codes (a) NULLS NOT DISTINCT; CREATE INDEX loose ON codes (a)")
    trial.sql("CREATE INDEX short ON codes USING gist (words tsvector_ops (siglen = 100))")
    trial.sql("CREATE INDEX long ON codes USING gist (words tsvector_ops (siglen = 200))")

    def duplicates() -> list[tuple[object, ...]]:
        found = [row[:2] for row in table(check_indexes.fn(NAME), "Duplicates").rows]
        return sorted(row for row in found if row[0] in ("public.plain", "public.strict"))

    assert duplicates() == [("public.strict", "public.loose"), ("public.strict", "public.plain")]
    assert not {"public.short", "public.long"} & {row[1] for row in table(check_indexes.fn(NAME), "Duplicates").rows}
    trial.sql("DROP INDEX plain; ALTER TABLE codes ADD CONSTRAINT rested UNIQUE (a)")
    rows = {row[:2] for row in table(check_indexes.fn(NAME), "Duplicates").rows}
    assert ("public.rested", "public.loose") in rows
    assert ("public.rested", "public.strict") not in rows


def test_unused_is_not_only_never_scanned(trial: Trial) -> None:
    trial.sql("SET enable_seqscan = off; SELECT * FROM people WHERE name = 'x'")
    until(
        lambda: trial.sql("SELECT 1 FROM pg_stat_user_indexes WHERE idx_scan > 0 AND indexrelname = 'people_name'"),
        what="the scan's count",
        seconds=120,
    )
    trial.sql("CREATE UNIQUE INDEX people_once ON people (id, name)")
    report = check_indexes.fn(NAME, days=0)
    names = {row[0] for row in table(report, "Never scanned").rows}
    assert names == {"public.people_mood"}, "neither keys, nor unique ones, nor what was scanned"
    assert found(report, "unused indexes").status is Status.WARN
    assert report.facts["scans counted since"]
    young = check_indexes.fn(NAME, days=30)
    assert found(young, "unused indexes").value.startswith("not measured: scans are counted since")
    assert found(young, "unused indexes").status is Status.WARN


def test_a_foreign_key_without_an_index_is_named_and_one_with_is_not(trial: Trial) -> None:
    trial.sql("CREATE TABLE marks (a bigint, p bigint REFERENCES people, q bigint REFERENCES people)")
    trial.sql("CREATE INDEX marks_p ON marks (p, a)")
    report = check_indexes.fn(NAME)
    rows = {row[1]: row for row in table(report, "Foreign keys without an index").rows}
    assert set(rows) == {"marks_q_fkey", "answers_person_fkey"}
    assert rows["answers_person_fkey"][5] == "CREATE INDEX ON public.answers (person);", "its table is partitioned"
    for row in rows.values():
        trial.sql(row[5])
    assert found(check_indexes.fn(NAME), "foreign keys without an index").status is Status.OK


def test_bloat_is_estimated_and_a_rebuild_gives_it_back(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "BLOATED_BYTES", 100_000)
    trial.sql("CREATE TABLE big (id bigint PRIMARY KEY, n int) WITH (autovacuum_enabled = false)")
    trial.sql("INSERT INTO big SELECT g, g % 100 FROM generate_series(1, 40000) g")
    trial.sql("ANALYZE big")
    fresh = check_indexes.fn(NAME)
    assert found(fresh, "bloat (estimate)").status is Status.OK
    trial.sql("DELETE FROM big WHERE id % 10 <> 0")
    trial.sql("VACUUM (ANALYZE) big")
    report = check_indexes.fn(NAME)
    assert found(report, "bloat (estimate)").value.startswith("public.big_pkey: 89% of ")
    done = rebuild_indexes.fn(NAME, ["big_pkey"], confirm=NAME)
    assert done.status in GOOD, done.sentence()
    assert found(check_indexes.fn(NAME), "bloat (estimate)").status is Status.OK
    assert trial.sql("SELECT pg_relation_size('big_pkey') < 200000") == [(True,)]


def test_a_cancelled_build_leaves_an_invalid_index_that_is_found_and_rebuilt(trial: Trial) -> None:
    leave_invalid(trial, "CREATE INDEX CONCURRENTLY people_born ON people (born)")
    report = check_indexes.fn(NAME)
    assert found(report, "invalid indexes").value == "public.people_born"
    [rebuild] = found(report, "invalid indexes").follow
    assert (rebuild.flow, rebuild.parameters) == ("rebuild-indexes", {"indexes": ["public.people_born"]})
    planned = rebuild_indexes.fn(NAME, ["public.people_born"])
    assert planned.status is Status.PLANNED
    assert invalid(trial) == ["people_born"]
    assert rebuild_indexes.fn(NAME, ["public.people_born"], confirm=NAME).status in GOOD
    assert invalid(trial) == []
    assert found(check_indexes.fn(NAME), "invalid indexes").status is Status.OK


def test_leftovers_are_dropped_without_any_choice(trial: Trial) -> None:
    leave_invalid(trial, "REINDEX INDEX CONCURRENTLY people_name")
    assert invalid(trial) == ["people_name_ccnew"]
    assert found(check_indexes.fn(NAME), "leftovers of rebuilds").value == "public.people_name_ccnew"
    with pytest.raises(RunbookFailed, match="cannot be rebuilt concurrently"):
        rebuild_indexes.fn(NAME, ["people_name_ccnew"], confirm=NAME)
    assert rebuild_indexes.fn(NAME).status is Status.PLANNED
    assert rebuild_indexes.fn(NAME, confirm=NAME).status in GOOD
    assert invalid(trial) == []
    assert rebuild_indexes.fn(NAME, confirm=NAME).outcome == "nothing to do"


@pytest.mark.parametrize("statement", ["REINDEX INDEX CONCURRENTLY people_name", "REINDEX TABLE CONCURRENTLY people"])
def test_a_live_build_is_left_alone(trial: Trial, statement: str) -> None:
    """Its index is invalid as a leftover is, and has a leftover's name."""
    with build(trial, statement):
        building = invalid(trial)
        assert "people_name_ccnew" in building
        assert "waiting for writers before build, 0 B of" in str(reindex.read_progress(trial.environment.postgres))
        report = check_indexes.fn(NAME)
        assert found(report, "leftovers of rebuilds").status is Status.OK
        assert "public.people_name_ccnew" in report.facts["being built now"]
        report = rebuild_indexes.fn(NAME, ["people_mood"], confirm=NAME)
        assert found(report, "indexes of public.people").value == "skipped: another session builds one"
        assert invalid(trial) == building
    until(lambda: invalid(trial) == [], what="the end of the build, which nobody disturbed", seconds=120)
    assert trial.sql("SELECT indisvalid FROM pg_index WHERE indexrelid = 'people_name'::regclass") == [(True,)]


def test_a_build_that_began_after_the_look_is_not_dropped(trial: Trial) -> None:
    """What was a leftover when the plan was made may be somebody's index by now."""
    leave_invalid(trial, "REINDEX INDEX CONCURRENTLY people_name")
    postgres = trial.environment.postgres
    (left,) = [index for index in read_indexes(postgres) if index.is_leftover]
    with build(trial, "REINDEX INDEX CONCURRENTLY people_name_ccnew"):
        assert drop_leftover.work(postgres, left, 1) == "another session builds an index of its table"
    assert drop_leftover.work(postgres, left, 1) == "it was dropped, or is valid now"


def test_an_open_transaction_is_named_before_anything_begins(trial: Trial) -> None:
    with trial.server.connect(trial.database) as client:
        client.execute("BEGIN")
        client.execute("SELECT count(*) FROM people")  # it holds no xmin by now, and yet a rebuild waits for its lock
        with pytest.raises(RunbookFailed, match=f"would wait for: transaction of process {client.info.backend_pid}"):
            rebuild_indexes.fn(NAME, ["people_name"], long_seconds=0, confirm=NAME)
    assert invalid(trial) == []


def test_a_lock_that_is_not_to_be_had_leaves_nothing_behind(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reindex, "ATTEMPTS", 2)
    with writer(trial):
        with pytest.raises(RunbookFailed, match="the lock was not available within 1 s") as failed:
            rebuild_indexes.fn(NAME, ["people_name"], lock_seconds=1, confirm=NAME)
        assert table(failed.value.report, "Rebuilt").rows[0][3] == "2"
    assert set(invalid(trial)) <= {"people_name_ccnew", "people_name_ccnew1", "people_name_ccnew2"}
    assert rebuild_indexes.fn(NAME, ["people_name"], confirm=NAME).status in GOOD
    assert invalid(trial) == []


def test_a_rebuild_that_cannot_succeed_leaves_nothing_behind(trial: Trial) -> None:
    with pytest.raises(psycopg.errors.UniqueViolation):
        trial.sql("CREATE UNIQUE INDEX CONCURRENTLY people_moods ON people (mood)")
    assert invalid(trial) == ["people_moods"]
    with pytest.raises(RunbookFailed, match="people_moods: PostgreSQL refuses: could not create unique index"):
        rebuild_indexes.fn(NAME, ["people_moods", "people_name"], confirm=NAME)
    assert invalid(trial) == ["people_moods"], "and no people_moods_ccnew"


def test_there_must_be_room_for_twice_the_biggest(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "disk_on", lambda *_: type("Disk", (), {"free_bytes": 1000}))
    with pytest.raises(RunbookFailed, match="free space at"):
        rebuild_indexes.fn(NAME, tables=["people"], confirm=NAME)
    monkeypatch.setattr(session, "disk_on", lambda *_: None)
    assert "not measured" in rebuild_indexes.fn(NAME, tables=["people"]).sentence()


def test_there_must_be_room_for_all_that_are_built_at_once(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tables with an index each: as many lanes, as much room. Those of one table are built in turn."""
    for name in ("first", "second"):
        trial.sql(f"CREATE TABLE {name} (a int, b int)")
        trial.sql(f"INSERT INTO {name} SELECT g, g FROM generate_series(1, 20000) g")
        trial.sql(f"CREATE INDEX {name}_a ON {name} (a); CREATE INDEX {name}_b ON {name} (b)")
    (one,) = {index.bytes for index in read_indexes(trial.environment.postgres) if index.table.endswith("first")}
    monkeypatch.setattr(session, "disk_on", lambda *_: type("Disk", (), {"free_bytes": 3 * one}))
    assert rebuild_indexes.fn(NAME, tables=["first", "second"], jobs=1).status is Status.PLANNED
    assert rebuild_indexes.fn(NAME, tables=["first"], jobs=2).status is Status.PLANNED
    with pytest.raises(RunbookFailed, match="free space at") as failed:
        rebuild_indexes.fn(NAME, tables=["first", "second"], jobs=2)
    assert size(4 * one) in next(f.expected for f in failed.value.report.findings if f.name.startswith("free space"))
    assert invalid(trial) == []


def test_the_whole_database_is_rebuilt(trial: Trial) -> None:
    before = files(trial)
    report = rebuild_indexes.fn(NAME, everything=True, confirm=NAME)
    assert report.status in GOOD, report.sentence()
    after = files(trial)
    assert set(after) == set(before)
    assert [name for name in before if before[name] == after[name]] == []
    assert invalid(trial) == []


def files(trial: Trial) -> dict[object, object]:
    rows = trial.sql("SELECT relname::text, relfilenode FROM pg_class WHERE relkind = 'i' AND relname !~ '^pg_'")
    return {row[0]: row[1] for row in rows}


@pytest.mark.parametrize("end", ["terminated", "killed"])
def test_a_rebuild_whose_backend_dies_ends_well_when_launched_again(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """It is tried again and again until it is met while it waits."""
    monkeypatch.setattr(reindex, "ATTEMPTS", 1000)

    def kill() -> None:
        while not ended.wait(0.05):
            with contextlib.suppress(psycopg.OperationalError, ProcessLookupError):
                for (pid,) in trial.sql(WAITS, "REINDEX%people_name%"):
                    if end == "terminated":
                        trial.sql("SELECT pg_terminate_backend(%s)", pid)
                    else:
                        os.kill(int(str(pid)), signal.SIGKILL)  # the server recovers from that as from a crash

    killer, ended = threading.Thread(target=kill), threading.Event()
    with contextlib.suppress(psycopg.OperationalError), writer(trial):
        killer.start()
        try:
            with pytest.raises(
                RunbookFailed, match="somebody cancelled it" if end == "terminated" else "server stopped"
            ) as failed:
                rebuild_indexes.fn(NAME, ["people_name"], lock_seconds=2, confirm=NAME)
        finally:
            ended.set()
            killer.join()
    assert "run this again" in found(failed.value.report, "state of the system").hint
    until(lambda: answers(trial), what="the server's recovery", seconds=120)
    assert trial.sql("SELECT indisvalid FROM pg_index WHERE indexrelid = 'people_name'::regclass") == [(True,)]
    report = rebuild_indexes.fn(NAME, ["people_name"], confirm=NAME)
    assert report.status in GOOD, report.sentence()
    assert invalid(trial) == []
    assert trial.sql("SELECT count(*) FROM people") == [(2000,)]


def answers(trial: Trial) -> bool:
    try:
        return trial.sql("SELECT 1") == [(1,)]
    except psycopg.OperationalError as error:
        raise Unreachable(str(error)) from None


def test_tables_are_rebuilt_beside_each_other_and_each_one_s_indexes_in_turn(trial: Trial) -> None:
    tables = {index.table for index in read_indexes(trial.environment.postgres)}
    with ThreadPoolExecutor(1) as beside:
        with trial.server.connect(trial.database) as client, client.transaction():
            client.execute(f"LOCK TABLE {', '.join(sorted(tables))} IN ROW EXCLUSIVE MODE".encode())
            running = beside.submit(rebuild_indexes.fn, NAME, everything=True, jobs=2, lock_seconds=600, confirm=NAME)
            until(lambda: running.done() or len(trial.sql(WAITS, "REINDEX%")) == 2, what="two that wait", seconds=120)
        report = running.result()
    assert report.status in GOOD
    ran = [step for step in report.steps if step.name == "rebuild_in_turn"]
    assert len(ran) == 2
    ends = [(step.started.timestamp(), step.started.timestamp() + step.seconds) for step in ran]
    assert max(sum(begin <= start < end for begin, end in ends) for start, _ in ends) == 2
    assert invalid(trial) == []
