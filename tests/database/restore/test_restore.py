"""restore_database: refused when the backup is bad, proven by content, swapped under clients, undone."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psycopg
import pytest

from blocks.environment import Environment
from flows.database.backup import backup_database
from flows.database.restore import restore_database
from flows.database.superseded import discard_superseded, find_kept_data
from flows.database.undo_restore import choose_superseded, undo_restore
from runbook import clock
from runbook.errors import NotConfirmed, OpsError, RunbookFailed
from runbook.guard.carried_out import CarriedOut
from runbook.guard.pins import PlanChanged
from runbook.report import Report, Status, StepTime
from runbook.wait import until
from tasks.backups import catalogue, manifest
from tasks.backups.manifest import Manifest
from tasks.postgres.content.comparison import compare
from tasks.postgres.content.content import DatabaseContent, content_of
from tasks.postgres.content.equivalence import compare_definitions
from tasks.postgres.dump.dump import STATISTICS_VERSION
from tasks.postgres.restore.staged_copy import content_in, copy_name
from tasks.stores.directory import DirectoryStore
from tests.database.backup.test_backup import newest, run
from tests.database.conftest import NAME, Trial
from tests.fixtures import forked
from tests.fixtures.postgres.definitions import OBJECTS

GOOD = (Status.OK, Status.WARN)


def restore(**parameters: object) -> Status:
    return restore_database.fn(NAME, confirm=NAME, **parameters).status  # type: ignore[arg-type]


def compared(trial: Trial, expected: DatabaseContent, database: str) -> tuple[str, ...]:
    """How a database differs from what is expected."""
    postgres = trial.environment.postgres
    found = content_of(postgres, database)
    texts = compare_definitions.work(postgres, database, expected.definitions, found.definitions)
    return compare(expected, found, texts).differences


def test_restore_brings_back_what_was_there(trial: Trial) -> None:
    before = content_of(trial.environment.postgres, trial.database)
    trial.sql("ANALYZE people")
    backup_database.fn(NAME)
    trial.sql("DELETE FROM answers; UPDATE people SET name = 'X' WHERE id < 100; DROP TABLE by_mood CASCADE")
    assert restore() in GOOD
    assert compared(trial, before, trial.database) == ()
    assert newest(trial).verified
    analyzed = (
        "SELECT relname, last_analyze IS NOT NULL FROM pg_stat_user_tables WHERE relname IN ('people', 'answers_rest')"
    )
    carried = int(str(trial.sql("SHOW server_version_num")[0][0])) >= STATISTICS_VERSION
    from_dump = {"people": not carried, "answers_rest": True}
    assert dict(trial.sql(analyzed)) == from_dump, "from the dump, or else made anew"
    assert trial.sql(
        "SELECT count(DISTINCT tablename) FROM pg_stats WHERE tablename IN ('people', 'answers_rest')"
    ) == [(2,)]
    with psycopg.connect(
        host="127.0.0.1",
        port=trial.server.port,
        dbname=trial.database,
        user="grc_user",
        password=os.environ["TRIAL_PASSWORD"],
    ) as connection:
        assert connection.execute("SHOW work_mem").fetchone() == ("8MB",)
        assert connection.execute("SHOW search_path").fetchone() == ('"$user", public',)


def test_dry_run_changes_nothing_and_shows_the_plan(trial: Trial) -> None:
    backup_database.fn(NAME)
    oid, before = trial.oid(), trial.databases()
    report = restore_database.fn(NAME)
    assert report.status is Status.PLANNED
    unpack = f"unpack {newest(trial).name}"
    assert [(step.step.split()[0], step.bytes > 0) for step in report.plan_steps if step.step != unpack] == [
        *(("create", False), ("restore", True), ("prove", False), ("ANALYZE", False), ("swap", False))
    ]
    assert (trial.oid(), trial.databases()) == (oid, before)
    assert re.fullmatch(
        rf"PLANNED: {trial.database} goes back to \d\d:\d\d \([+-]\d\d:00\); writes of "
        rf"{trial.database} of the last \d+ (s|min) are lost: 0 commits as of .*; later writes are added; "
        r"less than 1 s down; undo: undo-restore\. Nothing has changed\..*",
        report.sentence(),
    )
    assert "was not yet" in report.facts["verified"]
    assert "verif" not in " ".join(found.name for found in report.findings), "the restore itself proves it"


def test_wrong_confirm_is_refused(trial: Trial) -> None:
    backup_database.fn(NAME)
    oid = trial.oid()
    for confirm in ("yes", "Trial", "trial ", "'; DROP DATABASE x; --"):
        with pytest.raises(NotConfirmed, match=f"type {NAME} in the field confirm"):
            restore_database.fn(NAME, confirm=confirm)
        assert trial.oid() == oid, confirm


UNKNOWN = (
    *("20200101", "backup_20200101_000000", "../../etc", '"; DROP DATABASE x; --', "x" * 200, "バックアップ", ""),
)


def test_unknown_backup_names_the_newest(trial: Trial) -> None:
    backup_database.fn(NAME)
    for name in UNKNOWN:
        with pytest.raises(RunbookFailed, match=f"the newest in the store: {newest(trial).name}"):
            restore_database.fn(NAME, backup=name, confirm=NAME)


def test_backup_is_found_by_date_and_by_name(trial: Trial) -> None:
    backup_database.fn(NAME)
    name = newest(trial).name
    for wanted in (name, name.split("_")[1], "latest"):
        assert name in restore_database.fn(NAME, backup=wanted).facts["backup"]


def largest(backup: Path) -> Path:
    return max((path for path in backup.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    """The same content, but elsewhere."""
    elsewhere = path.parents[2] / ".elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def reseal(backup: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest that was changed by somebody who knows how to seal it again."""
    content = json.loads((backup / "manifest.json").read_text())
    change(content)
    manifest.write(backup, Manifest.model_validate(content))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped byte in the largest file": lambda b: flip(largest(b)),
    "a flipped byte in the manifest": lambda b: flip(b / "manifest.json"),
    "a flipped byte in the seal": lambda b: flip(b / "manifest.json.sha256"),
    "a flipped byte in the table of contents": lambda b: flip(b / "dump" / "toc.dat"),
    "a truncated file": lambda b: os.truncate(largest(b), 10),
    "a missing file": lambda b: largest(b).unlink(),
    "a missing manifest": lambda b: (b / "manifest.json").unlink(),
    "a file added": lambda b: (b / "dump" / "stranger.dat.gz").write_bytes(b"x"),
    "a link instead of a file": lambda b: link(largest(b)),
    "another day's manifest": lambda b: reseal(b, lambda m: m.update(name="backup_20200101_000000")),
    "a manifest of another database": lambda b: reseal(b, lambda m: m["content"].update(database="other")),
    "a newer server": lambda b: reseal(b, lambda m: m["content"].update(server_version=990001)),
    "a role that does not exist": lambda b: reseal(b, lambda m: m["content"].update(roles=["grc_user", "stranger"])),
    "another environment's backup": lambda b: reseal(b, lambda m: m.update(environment="staging")),
    "a content manifest that is none": lambda b: reseal(b, lambda m: m.update(content={"tables": 1})),
}


def test_bad_backup_is_refused_before_anything_is_touched(trial: Trial, tmp_path: Path) -> None:
    """The same backup, with one damage after the other."""
    backup_database.fn(NAME)
    backup, whole = newest_path(trial), tmp_path / "whole"
    shutil.copytree(backup, whole)
    oid, before = trial.oid(), trial.databases()
    for kind, damage in DAMAGE.items():
        damage(backup)
        with pytest.raises(RunbookFailed) as caught:
            restore_database.fn(NAME, confirm=NAME)
        assert caught.value.report.status is Status.CRITICAL, kind
        assert caught.value.report.sentence().count("Next: ") == 1, kind
        assert (trial.oid(), trial.databases()) == (oid, before), kind
        shutil.rmtree(backup)
        shutil.copytree(whole, backup)
    assert restore() in GOOD, "the copy of the backup was whole"


def newest_path(trial: Trial) -> Path:
    return trial.store / catalogue.names(DirectoryStore(trial.store), "postgres")[-1]


def test_definitions_that_postgresql_prints_differently_are_no_false_alarm(trial: Trial) -> None:
    """Fifty definitions of every kind, restored from a backup, and again from a backup of what was restored."""
    for name in ("people", "notes"):
        trial.sql(f"DROP TABLE {name} CASCADE")
    trial.sql(OBJECTS)
    source = content_of(trial.environment.postgres, trial.database)
    for _ in range(2):
        backup_database.fn(NAME)
        report = restore_database.fn(NAME, confirm=NAME)
        assert report.status in GOOD
        rows = f"{sum(table.rows for table in source.tables.values()):,}"
        proof = next(one.value for one in report.findings if one.name == "copy equal to the backup")
        assert proof == f"{rows} of {rows} rows, every definition"
        assert compared(trial, source, trial.database) == ()
    now = content_of(trial.environment.postgres, trial.database)
    assert sum(text != now.definitions[key] for key, text in source.definitions.items()) >= 30
    trial.sql("ALTER TABLE t DROP CONSTRAINT ranged, ADD CONSTRAINT ranged CHECK (s BETWEEN 0 AND 100 OR w > 0)")
    (found,) = compared(trial, source, trial.database)
    assert found.startswith("TABLE public.t ")


SABOTAGE = {
    "one row changed": "UPDATE people SET share = 1.5 WHERE id = 777",
    "a value with other precision": "ALTER TABLE people DISABLE TRIGGER touch; UPDATE people SET wait = '30 days' WHERE id = 1",
    "one row missing": "DELETE FROM answers WHERE ctid = (SELECT ctid FROM answers_rest LIMIT 1)",
    "rows exchanged between tables": "UPDATE by_mood SET n = n + 1 WHERE n = 5",
    "a sequence behind": "SELECT setval('people_id_seq', 10)",
    "a missing constraint": "ALTER TABLE people DROP CONSTRAINT people_status",
    "a missing foreign key": "ALTER TABLE answers DROP CONSTRAINT answers_person_fkey",
    "an index dropped": "DROP INDEX people_mood",
    "an empty table": "DELETE FROM by_mood",
    "a dropped empty table": 'DROP TABLE "Empty Table"',
    "a stranger's table": "CREATE TABLE stranger (x int)",
    "a view that says something else": "CREATE OR REPLACE VIEW happy AS SELECT id, name FROM people WHERE mood = 'sad'",
    "a function with other code": "CREATE OR REPLACE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
    "a trigger disabled": "ALTER TABLE people DISABLE TRIGGER touch",
    "a policy dropped": "DROP POLICY own ON people",
    "a changed owner": "ALTER TABLE people OWNER TO postgres",
    "a table's privilege": "REVOKE SELECT ON people FROM pg_monitor",
    "a database privilege": "GRANT CONNECT ON DATABASE {db} TO PUBLIC",
    "a database setting": "ALTER DATABASE {db} SET timezone = 'UTC'",
    "a role's setting": "ALTER ROLE grc_user IN DATABASE {db} RESET work_mem",
    "a database comment": "COMMENT ON DATABASE {db} IS 'x'",
    "a filled materialised view": "REFRESH MATERIALIZED VIEW unfilled",
    "a large object": "SELECT lo_put(oid, 0, 'x') FROM pg_largeobject_metadata",
    "another revision": "UPDATE alembic_version SET version_num = '0003'",
    "an extension": "DO $$ BEGIN EXECUTE (SELECT 'DROP EXTENSION ' || extname FROM pg_extension WHERE extname <> 'plpgsql'); END $$",
    "a default": "ALTER TABLE people ALTER status SET DEFAULT 'old'",
    "a check grouped otherwise": "ALTER TABLE rules DROP CONSTRAINT grouped, ADD CONSTRAINT grouped CHECK (a OR (b AND c))",
    "a default without its blank": "ALTER TABLE rules ALTER label SET DEFAULT 'ab'",
    "an enum value": "ALTER TYPE mood ADD VALUE 'angry'",
}


OF_EACH_PART = ("one row changed", "one row missing", "a sequence behind", "a missing constraint", "a database setting")
"""Of the rows, the sequences, the definitions and the properties."""


@pytest.mark.parametrize("kinds", [OF_EACH_PART, tuple(SABOTAGE)], ids=["of each part", "every one"])
def test_content_verification_finds_every_sabotage_with_valid_checksums(trial: Trial, kinds: Sequence[str]) -> None:
    """Each on a database of its own, made from the same template; and the untouched one is found equal."""
    server, base = trial.server, trial.database
    postgres = trial.environment.postgres
    expected = content_of(postgres, base)
    missed = []
    for number, (kind, statement) in enumerate(
        {"nothing": "SELECT 1", **{one: SABOTAGE[one] for one in kinds}}.items()
    ):
        name = f"{base}_s{number}"
        server.copy_database(name, base)
        from tasks.postgres.server.properties import apply_properties

        with postgres.connect() as connection:
            apply_properties(connection, name, expected.properties)
        trial.sql(statement.replace("{db}", f'"{name}"'), database=name)
        differences = compared(trial, expected, name)
        if bool(differences) == (kind == "nothing"):
            missed.append(f"{kind}: {differences}")
        server.drop_database(name)
    assert missed == []


def test_copy_that_fails_its_proof_leaves_the_old_database_live(trial: Trial) -> None:
    """Sabotage inside the restore itself: the manifest of the morning beside the dump of the evening."""
    backup_database.fn(NAME)
    first = newest_path(trial)
    morning = content_in(newest(trial)).model_dump(mode="json")
    trial.sql("INSERT INTO answers VALUES (1, '2026-01-25', 'later')")
    backup_database.fn(NAME)
    reseal(newest_path(trial), lambda m: m.update(content=morning))
    oid = trial.oid()
    with pytest.raises(
        RunbookFailed,
        match=f"answers_2026_01: 288 rows instead of 287.*run verify-backup for the previous one, {first.name}",
    ):
        restore_database.fn(NAME, confirm=NAME)
    assert trial.oid() == oid
    assert not newest(trial).verified


STEPS = ("swap_databases", "analyze")
Span = tuple[datetime, datetime]


def span(step: StepTime) -> Span:
    return step.started, step.started + timedelta(seconds=step.seconds)


def test_swap_under_clients_that_keep_reconnecting(trial: Trial) -> None:
    """The swap alone ends their sessions and turns them away: whoever comes before it or after it stays."""
    backup_database.fn(NAME)
    stop = threading.Event()
    seen: list[int] = []
    ended: list[Span] = []
    swaps: list[Span] = []

    def client() -> None:
        while not stop.is_set():
            came = datetime.now(UTC)
            try:
                with psycopg.connect(
                    host="127.0.0.1",
                    port=trial.server.port,
                    dbname=trial.database,
                    user="grc_user",
                    password=os.environ["TRIAL_PASSWORD"],
                ) as connection:
                    while not stop.wait(0.01):
                        connection.execute("SELECT count(*) FROM by_mood")
                        seen.append(1)
            except psycopg.OperationalError:
                ended.append((came, datetime.now(UTC)))
                time.sleep(0.01)  # as a pool does

    clients = [threading.Thread(target=client, daemon=True) for _ in range(15)]
    for thread in clients:
        thread.start()
    try:
        until(lambda: len(seen) > 100, what="clients at work", seconds=120)
        for _ in range(3):
            report = restore_database.fn(NAME, confirm=NAME)
            assert report.status in GOOD
            swap, analyzed = (next(step for step in report.steps if step.name == name) for name in STEPS)
            assert span(analyzed)[1] <= swap.started, "all that takes long is done before it"
            assert float(report.facts["outage for clients"].split()[0]) <= swap.seconds + 0.01
            swaps.append(span(swap))
    finally:
        stop.set()
        for thread in clients:
            thread.join(120)
    assert len(ended) >= 3
    assert [one for one in ended if not any(begun <= one[1] and one[0] <= done for begun, done in swaps)] == []


def test_prepared_transaction_and_logical_slot_are_found_before_anything_starts(trial: Trial) -> None:
    backup_database.fn(NAME)
    before = trial.databases()
    with trial.server.connect(trial.database) as connection:
        connection.autocommit = False
        connection.execute("INSERT INTO by_mood VALUES ('ok', 1)")
        connection.execute("PREPARE TRANSACTION 'tx-4711'")
    with pytest.raises(RunbookFailed, match="prepared transaction tx-4711.*ROLLBACK PREPARED"):
        restore_database.fn(NAME, confirm=NAME)
    trial.sql("ROLLBACK PREPARED 'tx-4711'")
    trial.sql("SELECT pg_create_logical_replication_slot('slot_4711', 'pgoutput')")
    with pytest.raises(RunbookFailed, match="logical slot slot_4711"):
        restore_database.fn(NAME, confirm=NAME)
    trial.sql("SELECT pg_drop_replication_slot('slot_4711')")
    assert trial.databases() == before


def test_a_staged_copy_that_a_killed_run_left_is_no_reason_to_refuse(trial: Trial) -> None:
    """The application's role may not connect to it yet: the run drops it."""
    backup_database.fn(NAME)
    staged = copy_name(trial.database)
    trial.server.create_database(staged)
    trial.sql(f'REVOKE ALL ON DATABASE "{staged}" FROM PUBLIC')
    assert restore_database.fn(NAME).status is Status.PLANNED
    trial.sql(f'ALTER DATABASE "{staged}" ALLOW_CONNECTIONS false')
    restore()


def test_undo_swaps_back_and_tells_what_it_discards(trial: Trial) -> None:
    backup_database.fn(NAME)
    trial.sql("DELETE FROM by_mood")
    restore()
    assert trial.sql("SELECT count(*) FROM by_mood") == [(300,)]
    trial.sql("INSERT INTO by_mood SELECT 'ok', g FROM generate_series(1, 40) g")
    assert undo_restore.fn(NAME).status is Status.PLANNED
    report = undo_restore.fn(NAME, confirm=NAME)
    assert report.status is Status.OK
    assert report.facts["written since the swap, missing in the old database"].startswith("1 commit of ")
    assert trial.sql("SELECT count(*) FROM by_mood") == [(0,)]
    assert trial.sql(
        "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = current_database()"
    ) == [("面接",)]
    undo_restore.fn(NAME, confirm=NAME)  # and once more: forward again
    assert trial.sql("SELECT count(*) FROM by_mood") == [(340,)]


def test_discard_removes_old_databases_with_a_permit_only(trial: Trial) -> None:
    backup_database.fn(NAME)
    restore()
    restore()
    assert len(trial.databases()) - 1 >= 3
    assert discard_superseded.fn(NAME, keep=0).status is Status.PLANNED
    assert len([name for name in trial.databases() if name.startswith(trial.database)]) == 3
    discard_superseded.fn(NAME, keep=1, confirm=NAME)
    assert len([name for name in trial.databases() if name.startswith(trial.database)]) == 2
    path = Path(os.environ["OPS_ENVIRONMENT_FILE"])
    lab = "[backups]\nkeep_superseded = { newest = 1, hours = 0 }"
    path.write_text('unattended = ["discard-superseded"]\n' + path.read_text().replace("[backups]", lab))
    for _ in range(2):  # as in the lab: the disk does not fill, however many restores there are
        report = restore_database.fn(NAME, confirm=NAME)
        assert report.facts["superseded before"].startswith("1 deleted")
        assert len([name for name in trial.databases() if name.startswith(trial.database)]) == 2, "the last undo"
    discard_superseded.fn(NAME, keep=0, confirm=NAME)
    assert [name for name in trial.databases() if name.startswith(trial.database)] == [trial.database]


def test_discard_finds_directories_beside_what_links_lead_to(trial: Trial, tmp_path: Path) -> None:
    """Redis and the application keep the old beside the directory itself, not beside the link to it."""
    (tmp_path / "disk").mkdir()
    for name in ("redis", "grc"):
        (tmp_path / name).symlink_to(f"disk/{name}")
        for path in (name, f"{name}.superseded_20261101_000000", f"{name}.superseded_20261102_000000"):
            (tmp_path / "disk" / path).mkdir()
            (tmp_path / "disk" / path / "content").write_bytes(bytes(1000))
    plain = trial.server.data.with_name(trial.server.data.name + ".superseded_20261101_000000")
    plain.mkdir()
    with Path(os.environ["OPS_ENVIRONMENT_FILE"]).open("a") as file:
        file.write(f'[redis]\ndata_directory = "{tmp_path}/redis"\n[application]\ndirectory = "{tmp_path}/grc"\n')
    shown = [(item.name, item.bytes) for item in find_kept_data(trial.environment, 1)]
    assert shown == [(f"{tmp_path}/disk/{name}.superseded_20261101_000000", 1000) for name in ("redis", "grc")]
    discard_superseded.fn(NAME, keep=0, confirm=NAME)
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["grc", "redis"]
    assert (tmp_path / "grc" / "content").exists()
    assert not plain.exists()


def test_what_the_toml_keeps_of_what_restores_replaced(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its schedule launches it: each restore can be undone for so many hours, then the newest of each kind."""
    monkeypatch.setattr(clock, "now", lambda: datetime(2026, 11, 10, 6, tzinfo=UTC))
    stamps = ("20261101_000000", "20261102_000000", "20261109_120000", "20261110_030000")
    for stamp in stamps:
        trial.server.sql(f'CREATE DATABASE "{trial.database}__old_{stamp}"')
        (tmp_path / f"wal.superseded_{stamp}").mkdir()
    (tmp_path / "redis").mkdir()
    (tmp_path / "redis.superseded_20260101_000000").mkdir()
    path = Path(os.environ["OPS_ENVIRONMENT_FILE"])
    path.write_text(
        path.read_text() + f'[wal]\ndirectory = "{tmp_path}/wal"\n[redis]\ndata_directory = "{tmp_path}/redis"\n'
    )

    def left(keep: str) -> list[list[str]]:
        plain = path.read_text()
        path.write_text(plain.replace("[backups]", f"[backups]\nkeep_superseded = {keep}"))
        discard_superseded.fn(NAME, confirm=NAME)
        path.write_text(plain)
        databases = [name[-15:] for name in trial.databases() if name.startswith(f"{trial.database}__old_")]
        return [databases, sorted(one.name[-15:] for one in tmp_path.glob("wal.superseded_*"))]

    assert left("{ newest = 3 }") == [[*stamps[1:]]] * 2, "the newest, whatever their age"
    assert left("{ newest = 1, hours = 48 }") == [[*stamps[2:]]] * 2, "and all of two days"
    assert left("{ newest = 0, hours = 10 }") == [[stamps[3]]] * 2, "the last undo"
    assert left("{ newest = 1, hours = 0 }") == [[stamps[3]]] * 2, "as in the lab"
    assert left("{ newest = 0, hours = 1 }") == [[], []]
    assert not list(tmp_path.glob("redis.superseded_*"))


def test_sequences_can_be_advanced_past_the_replaced_database(trial: Trial) -> None:
    backup_database.fn(NAME)
    trial.sql("SELECT nextval('\"Ticket Numbers\"') FROM generate_series(1, 25)")
    report = restore_database.fn(NAME, confirm=NAME)
    assert report.facts["numbers that will be used twice"].startswith("by 1 sequences")
    undo_restore.fn(NAME, confirm=NAME)
    restore(advance=True)
    assert trial.sql('SELECT last_value FROM "Ticket Numbers"') == [(1025,)]


@pytest.mark.parametrize("trial", ['it\'s "quoted"; DROP DATABASE x; --', "面接データ", "x" * 63], indirect=True)
def test_hostile_database_names(trial: Trial) -> None:
    backup_database.fn(NAME)
    trial.sql("DELETE FROM by_mood")
    assert restore() in GOOD
    assert trial.sql("SELECT count(*) FROM by_mood") == [(300,)]
    assert undo_restore.fn(NAME, confirm=NAME).status is Status.OK
    assert trial.sql("SELECT count(*) FROM by_mood") == [(0,)]


def test_restore_when_the_database_was_dropped(trial: Trial) -> None:
    backup_database.fn(NAME)
    trial.server.drop_database(trial.database)
    assert restore() in GOOD
    assert trial.sql("SELECT count(*) FROM people") == [(2000,)]


def test_space_for_the_copy_beside_the_old_one(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    backup_database.fn(NAME)
    from tasks.host import disk

    real = os.statvfs

    def full(path: str | Path) -> os.statvfs_result:
        found = list(real(path))
        found[4] = 10
        return os.statvfs_result(found)

    monkeypatch.setattr(disk.os, "statvfs", full)
    before = trial.databases()
    with pytest.raises(RunbookFailed, match="free space"):
        restore_database.fn(NAME, confirm=NAME)
    assert trial.databases() == before


OURS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'interview-ops'"


def test_killed_anywhere_there_is_always_a_database_and_the_next_run_ends_well(trial: Trial, tmp_path: Path) -> None:
    backup_database.fn(NAME)
    log = tmp_path / "points"
    call = f"flows.database.restore.restore_database dict(environment={NAME!r},confirm={NAME!r})"
    assert run(call, OPS_FAILPOINT_LOG=str(log)).returncode == 0
    points = list(dict.fromkeys(log.read_text().splitlines()))
    critical = [p for p in points if p.startswith("swap:")] + ["before create_copy", "after fill_copy", "after analyze"]
    assert {"swap: before rename 1", "swap: after rename 1", "swap: before commit", "swap: after commit"} <= {*critical}
    for point in critical:
        assert run(call, OPS_FAILPOINT=point).returncode == -9, point
        assert trial.sql("SELECT count(*) FROM people") == [(2000,)], point
        until(lambda: not trial.server.sql(OURS), what="the end of the dead run's sessions", seconds=120)
        again = run(call)
        assert again.returncode == 0, f"{point}: {again.stderr[-500:]}"
        assert trial.server.sql("SELECT 1", database=trial.database, user="grc_user") == [(1,)]
        told = newest_report(trial)["facts"]["an earlier run died"]
        swapping = "interrupted, with an unknown result: swap databases"
        assert (swapping if point.startswith("swap:") else f"{trial.database} is unchanged") in told
        staged = f"database {trial.database}__new (the next run that stages one drops it)"
        assert (staged in told) == (point != "before create_copy"), "what it left, and what removes it"


CANCELLED = """
import signal
from prefect.exceptions import TerminationSignal
from flows.database.restore import restore_database

def end(number, frame):
    raise TerminationSignal(number)

signal.signal(signal.SIGTERM, end)
restore_database.fn({name!r}, confirm={confirm!r})
"""


def newest_report(trial: Trial) -> dict[str, Any]:
    path = max(trial.reports.glob("*.json"), key=lambda one: one.name.split("-")[2])
    return dict(json.loads(path.read_text(encoding="utf-8")))


def test_cancelled_anywhere_it_says_what_is_live_and_what_is_left(trial: Trial) -> None:
    """During the plan, before the first irreversible act, before the swap, in it, and after it."""
    backup_database.fn(NAME)
    name = trial.database
    unchanged, staged = f"{name} is unchanged", f"database {name}__new"
    cases = (
        ("after read_server", "", "WARN", "nothing live was changed", "nothing"),
        ("before create_copy", NAME, "WARN", unchanged, "nothing"),
        ("after fill_copy", NAME, "WARN", unchanged, staged),
        ("swap: after commit", NAME, "CRITICAL", "the swap was interrupted", staged),
        ("before find_rewound", NAME, "CRITICAL", "is live, proven; the replaced database is kept as", "nothing"),
    )
    for point, confirm, status, changed, left in cases:
        code = CANCELLED.format(name=NAME, confirm=confirm)
        forked.run(["-c", code], {**os.environ, "OPS_FAILPOINT": f"{point}:cancel"}, timeout=600)
        report = newest_report(trial)
        found = {one["name"]: one for one in report["findings"]}
        assert "cancelled" in found, f"{point}: {report['findings']}"
        assert report["status"] == found["cancelled"]["status"] == status, point
        assert changed in found["state of the system"]["value"], point
        assert found["state of the system"]["hint"], point
        assert "findings above" not in json.dumps(report["findings"]), "there are none: it was cancelled"
        assert found["left behind"]["value"] == left, point
        assert trial.sql("SELECT count(*) FROM people") == [(2000,)], point


def test_two_restores_never_overlap(trial: Trial) -> None:
    """The advisory lock alone, as when the environment's lock was lost."""
    backup_database.fn(NAME)
    from tasks.postgres.restore.swap import advisory_lock

    with advisory_lock(trial.environment.postgres), pytest.raises(OpsError, match="is already replacing "):
        restore_database.fn(NAME, confirm=NAME)
    shutil.rmtree(trial.reports)


def test_a_plan_says_which_backup_and_which_kept_database_and_a_confirmation_keeps_to_it(trial: Trial) -> None:
    """What comes between the plan and its confirmation is not what was planned."""
    backup_database.fn(NAME)
    planned = restore_database.fn(NAME)
    first = planned.pins["backup"]
    assert f'backup="{first}"' in planned.form
    trial.sql("DELETE FROM answers")
    until(lambda: backup_database.fn(NAME).facts["backup"] != first, what="a backup of another second", seconds=120)
    done = restore_database.fn(NAME, **planned.pins, confirm=NAME)
    assert done.facts["backup"].startswith(str(first))
    assert trial.sql("SELECT count(*) FROM answers") == [(500,)]
    trial.sql("INSERT INTO answers SELECT person, at + interval '1 second', body FROM answers LIMIT 100")
    with pytest.raises(CarriedOut, match="this plan was carried out at .* nothing was changed"):
        restore_database.fn(NAME, **planned.pins, confirm=NAME)  # somebody else who has the same plan
    assert trial.sql("SELECT count(*) FROM answers") == [(600,)], "what users wrote since stays"

    undo = undo_restore.fn(NAME)
    assert undo.facts["database to swap back"] == undo.pins["kept"]
    discard = discard_superseded.fn(NAME, keep=0)
    assert discard.pins["names"] == [undo.pins["kept"]]
    rescued = "CREATE TABLE rescued AS SELECT md5(g::text) AS text FROM generate_series(1, 60000) g"
    trial.sql(rescued, database=str(undo.pins["kept"]))
    with pytest.raises(PlanChanged, match="bytes of .* was"):
        discard_superseded.fn(NAME, keep=0, **discard.pins, confirm=NAME)
    restore()
    assert trial.sql("SELECT count(*) FROM answers") == [(0,)]
    with pytest.raises(PlanChanged, match="database .* was OID"):
        undo_restore.fn(NAME, **undo.pins, confirm=NAME)
    kept = str(undo.pins["kept"])
    undo_restore.fn(NAME, kept=kept, confirm=NAME)
    assert trial.sql("SELECT count(*) FROM answers") == [(0,)], "the one that was planned"
    with pytest.raises(RunbookFailed, match="there is no replaced database “"):
        undo_restore.fn(NAME, kept=kept, confirm=NAME)
    before = trial.databases()
    assert discard_superseded.fn(NAME, keep=0, names=(kept,), confirm=NAME).facts["already deleted"] == kept
    assert trial.databases() == before, "it is live again, and what came since was not planned"


def test_an_undo_after_the_recovery_of_a_whole_cluster_names_the_runbook_that_undoes_that(tmp_path: Path) -> None:
    env = cast(Environment, SimpleNamespace(postgres=SimpleNamespace(data_directory=str(tmp_path / "data"))))
    with pytest.raises(OpsError, match="there is no replaced database") as caught:
        choose_superseded(Report("Undo restore", NAME), env, [], "newest")
    assert "undo-full-restore" in caught.value.hint
