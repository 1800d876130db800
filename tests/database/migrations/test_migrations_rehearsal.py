"""Migrations rehearsed on a copy: seeded failures are found there, and the live database is not touched by them."""

# ruff: noqa: F811
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from blocks.config import toml
from flows.database.migration import live
from flows.database.migration.rehearsal import Rehearsed
from flows.database.migrations import apply_migrations, check_migrations, rollback_migrations
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from tasks.migrations.alembic import MigrationUndo, downgrade
from tasks.migrations.rehearsal import MigrationLoss, RehearsedState
from tests.database.migrations.test_migrations import (  # noqa: F401
    DATABASE,
    NAME,
    add,
    finding,
    found,
    revision,
    tier,
)
from tests.database.migrations.test_migrations_states import backend, migrate_to  # noqa: F401
from tests.fixtures.servers import PostgresServer


def failed(call: object, *arguments: object, **named: object) -> Report:
    """The report of a run that must be CRITICAL."""
    with pytest.raises(RunbookFailed) as raised:
        call.fn(NAME, *arguments, **named)  # type: ignore[attr-defined]
    return raised.value.report


def table(report: Report, name: str) -> list[tuple[str, ...]]:
    return [row for evidence in report.evidence if evidence.name.startswith(name) for row in evidence.rows]


def databases(server: PostgresServer) -> list[str]:
    return [
        row[0] for row in server.sql("SELECT datname FROM pg_database WHERE datname LIKE 'migrations_db%' ORDER BY 1")
    ]


def columns(server: PostgresServer, of: str) -> list[str]:
    query = "SELECT column_name FROM information_schema.columns WHERE table_schema = 'public' AND table_name = %s ORDER BY 1"
    return [row[0] for row in server.sql(query, of, database=DATABASE)]


def test_a_lock_on_a_large_table_is_found_before_anybody_confirms(
    postgres_server: PostgresServer, backend: Path
) -> None:
    """The table is large by its rows; the migration is harmless but for the lock."""
    migrate_to(postgres_server, "0005")
    postgres_server.sql("INSERT INTO people SELECT generate_series(1, 100000)", database=DATABASE)
    add(
        backend,
        "0006",
        "0005",
        "op.execute('ALTER TABLE people ADD COLUMN note text')",
        "op.execute('ALTER TABLE people DROP COLUMN note')",
    )

    report = check_migrations.fn(NAME, rehearse=True)
    locks = found(report, "locks on large tables")
    assert locks.status is Status.WARN
    assert "0006: ACCESS EXCLUSIVE on public.people (100,001 rows)" in locks.value
    assert "CONCURRENTLY" in locks.hint
    [row] = table(report, "Locks on existing tables")
    assert row[:5] == ("0006", "public.people", "ACCESS EXCLUSIVE", "reads and writes", "")
    assert [row[0] for row in table(report, "Rehearsal")] == ["1. up", "2. down", "3. up"]
    assert finding(report, "schema after up and down") is Status.OK
    assert finding(report, "rehearsal: 3. up") is Status.OK
    assert revision(postgres_server) == "0005"
    assert columns(postgres_server, "people") == ["id"]
    assert databases(postgres_server) == [DATABASE], "the copy is gone"


def test_a_lock_that_is_held_too_long_ends_the_run_unless_it_is_allowed(
    postgres_server: PostgresServer, backend: Path
) -> None:
    migrate_to(postgres_server, "0005")
    add(
        backend,
        "0006",
        "0005",
        "op.execute('ALTER TABLE people ADD COLUMN x int'); op.execute('SELECT pg_sleep(0.6)')",
        "op.execute('ALTER TABLE people DROP COLUMN x')",
    )
    report = failed(apply_migrations, longest_lock_seconds=0.5, confirm=NAME)
    longest = found(report, "longest lock")
    assert longest.status is Status.CRITICAL
    assert "0006: ACCESS EXCLUSIVE on public.people" in longest.value
    assert "longest_lock_seconds" in longest.hint
    assert "is unchanged, at 0005" in found(report, "state of the system").value
    assert revision(postgres_server) == "0005"

    done = apply_migrations.fn(NAME, longest_lock_seconds=3600, confirm=NAME)
    assert finding(done, "longest lock") is Status.OK
    assert finding(done, "schema") is Status.OK
    assert revision(postgres_server) == "0006"


def test_what_fails_on_the_copy_never_runs_on_the_live_database(postgres_server: PostgresServer, backend: Path) -> None:
    """Only real rows show it: two of one number. What is in them is not in the report."""
    migrate_to(postgres_server, "0005")
    postgres_server.sql("INSERT INTO people VALUES (471104711), (471104711)", database=DATABASE)
    add(backend, "0006", "0005", "op.execute('CREATE UNIQUE INDEX one ON people (id)')", "op.execute('DROP INDEX one')")
    report = failed(apply_migrations, confirm=NAME)
    first = found(report, "rehearsal: 1. up")
    assert first.status is Status.CRITICAL
    assert "could not create unique index" in first.value
    assert "471104711" not in str(report.as_json()), "nine digits: four are in a time of day every now and then"
    assert "is unchanged" in found(report, "state of the system").value
    assert not [step for step in report.steps if step.name == "upgrade_live"], "the live database was never asked"
    assert databases(postgres_server) == [DATABASE]


def test_a_downgrade_that_leads_elsewhere_is_found(postgres_server: PostgresServer, backend: Path) -> None:
    """It is written and it runs; it forgets one of two things, and deletes rows."""
    migrate_to(postgres_server, "0005")
    add(
        backend,
        "0006",
        "0005",
        "op.execute('CREATE TABLE kept (x int)'); op.execute('ALTER TABLE people ADD COLUMN x int')",
        "op.execute('ALTER TABLE people DROP COLUMN x'); op.execute('DELETE FROM people')",
    )
    report = check_migrations.fn(NAME, rehearse=True)
    schema = found(report, "schema after up and down")
    assert schema.status is Status.WARN
    assert "TABLE public.kept (owner grc_user) is new" in schema.value
    assert "public.people: 1 rows" in found(report, "rows after up and down").value
    again = found(report, "rehearsal: 3. up")
    assert again.status is Status.WARN
    assert 'relation "kept" already exists' in again.value
    assert finding(report, "rehearsal: 1. up") is Status.OK
    assert finding(report, "downgrades") is Status.OK, "reading the script alone does not show it"


def test_a_rollback_says_what_is_lost_and_wants_its_number(postgres_server: PostgresServer, backend: Path) -> None:
    up = "op.execute('CREATE TABLE answers AS SELECT generate_series(1, 12) AS n');"
    up += " op.execute('ALTER TABLE people ADD COLUMN note text'); op.execute('ALTER TABLE people RENAME id TO nr')"
    back = "op.execute('DROP TABLE answers'); op.execute('ALTER TABLE people DROP COLUMN note');"
    back += " op.execute('ALTER TABLE people RENAME nr TO id')"
    add(backend, "0006", "0005", up, back)
    migrate_to(postgres_server, "0006")
    postgres_server.sql("INSERT INTO people SELECT g, 'note' FROM generate_series(2, 6) g", database=DATABASE)

    planned = rollback_migrations.fn(NAME)
    assert planned.status is Status.PLANNED
    assert table(planned, "Data loss") == [
        ("public.answers", "12", "the table is dropped"),
        ("public.people", "5", "columns dropped with their values: note"),
    ], "of six rows five have a note; what is renamed stays"
    assert [s.detail.split(":")[0] for s in planned.plan_steps if s.step == "roll back"] == ["0006 → 0005"]
    assert planned.facts["rows that are lost"] == "17 in 2 tables"
    assert [s.step for s in planned.plan_steps] == ["roll back", "check"]
    unconfirmed = found(planned, "rows that are lost")
    assert (unconfirmed.status, "lose_rows=17" in unconfirmed.hint) == (Status.WARN, True)
    assert "whose migrations end at 0005" in planned.facts["before you roll back"]

    refused = failed(rollback_migrations, lose_rows=16, confirm=NAME)
    failed(rollback_migrations, confirm=NAME)
    assert "lose_rows=17" in found(refused, "rows that are lost").hint
    assert revision(postgres_server) == "0006"

    done = rollback_migrations.fn(NAME, lose_rows=17, confirm=NAME)
    assert done.status is Status.WARN, "columns are lost"
    assert finding(done, "columns that are lost") is Status.WARN
    assert [row[0] for row in table(done, "Rehearsal")] == ["1. down", "2. up", "3. down"]
    assert [row[1] for row in table(done, "Locks on existing tables")] == ["public.answers", "public.people"]
    assert done.facts["Alembic revision"] == "0006 → 0005"
    assert finding(done, "schema") is Status.OK
    assert revision(postgres_server) == "0005"
    assert columns(postgres_server, "people") == ["id"]
    assert databases(postgres_server) == [DATABASE]


def test_empty_columns_go_without_a_number_unless_somebody_fills_them_meanwhile(
    postgres_server: PostgresServer, backend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(
        backend,
        "0006",
        "0005",
        "op.execute('ALTER TABLE people ADD COLUMN note text')",
        "op.execute('ALTER TABLE people DROP COLUMN note')",
    )
    migrate_to(postgres_server, "0006")
    with monkeypatch.context() as patched:
        patched.setattr(
            "flows.database.migration.live.secure_backup",
            lambda *_: postgres_server.sql("UPDATE people SET note = 'by now'", database=DATABASE),
        )
        report = failed(rollback_migrations, confirm=NAME)
    assert "1 rows would lose data now, 0 were accepted" in report.sentence()
    assert columns(postgres_server, "people") == ["id", "note"]
    postgres_server.sql("UPDATE people SET note = NULL", database=DATABASE)
    assert rollback_migrations.fn(NAME, confirm=NAME).status is Status.OK
    assert columns(postgres_server, "people") == ["id"]


NOTED = 'op.execute("ALTER TABLE people ADD COLUMN note text"); op.execute("UPDATE people SET note = \'n\'")'
DROPPED = "op.execute('ALTER TABLE people DROP COLUMN note')"
ANEW = "op.execute('ALTER TABLE people ADD COLUMN note text')"


def test_an_upgrade_that_drops_a_filled_column_says_so_though_its_downgrade_adds_one_again(
    postgres_server: PostgresServer, backend: Path
) -> None:
    add(backend, "0006", "0005", NOTED, DROPPED)
    migrate_to(postgres_server, "0006")
    postgres_server.sql("UPDATE people SET note = 'filled'", database=DATABASE)
    add(backend, "0007", "0006", DROPPED, ANEW)
    checked = check_migrations.fn(NAME, rehearse=True)
    lost = [("public.people", "1", "columns dropped with their values: note")]
    assert table(checked, "Data loss") == lost, "before anybody confirms"
    assert found(checked, "rows after up and down").value == f"public.people: 1 rows, {lost[0][2]}"

    done = apply_migrations.fn(NAME, confirm=NAME)
    assert done.status is Status.WARN
    assert finding(done, "rows after up and down") is Status.WARN
    assert found(done, "columns that are lost").value == f"public.people (1 rows): {lost[0][2]}"
    assert table(done, "Data loss") == lost
    assert columns(postgres_server, "people") == ["id"]


def test_an_upgrade_that_drops_an_empty_column_loses_nothing_and_one_that_deletes_rows_says_so(
    postgres_server: PostgresServer, backend: Path
) -> None:
    add(backend, "0006", "0005", ANEW, DROPPED)
    migrate_to(postgres_server, "0006")
    add(backend, "0007", "0006", DROPPED, ANEW)
    done = apply_migrations.fn(NAME, confirm=NAME)
    assert not [finding for finding in done.findings if finding.name == "columns that are lost"]
    assert finding(done, "rows that are lost") is Status.OK
    assert found(done, "rows after up and down").value == "as before"
    assert table(done, "Data loss") == []

    add(backend, "0008", "0007", "op.execute('DELETE FROM people')", "op.execute('SELECT 1')")
    deleted = found(apply_migrations.fn(NAME, confirm=NAME), "rows that are lost")
    assert deleted.status is Status.WARN
    assert deleted.value == "public.people: 1 rows, rows are deleted"


def test_a_downgrade_that_makes_a_column_anew_wants_its_number(postgres_server: PostgresServer, backend: Path) -> None:
    add(backend, "0006", "0005", NOTED, DROPPED)
    add(
        backend,
        "0007",
        "0006",
        "op.execute('CREATE TABLE half (x int)')",
        f"op.execute('DROP TABLE half'); {DROPPED}; {ANEW}",
    )
    migrate_to(postgres_server, "0007")
    postgres_server.sql("UPDATE people SET note = 'filled'", database=DATABASE)
    assert rollback_migrations.fn(NAME).facts["rows that are lost"] == "1 in 1 tables"
    refused = failed(rollback_migrations, confirm=NAME)
    assert "lose_rows=1" in found(refused, "rows that are lost").hint
    assert postgres_server.sql("SELECT note FROM people", database=DATABASE) == [("filled",)]
    assert finding(rollback_migrations.fn(NAME, lose_rows=1, confirm=NAME), "columns that are lost") is Status.WARN
    assert postgres_server.sql("SELECT note FROM people", database=DATABASE) == [(None,)]


@pytest.mark.parametrize("what", ["script", "revision"])
@pytest.mark.parametrize("flow", [apply_migrations, rollback_migrations])
def test_what_changed_since_the_rehearsal_never_runs(
    postgres_server: PostgresServer, backend: Path, monkeypatch: pytest.MonkeyPatch, flow: object, what: str
) -> None:
    """Somebody deploys, or migrates, while the backup is taken."""
    up = flow is apply_migrations
    add(backend, "0006", "0005", "op.execute('CREATE TABLE half (x int)')", "op.execute('DROP TABLE half')")
    migrate_to(postgres_server, "0005" if up else "0006")

    def meanwhile(*_: object) -> None:
        if what == "script":
            other = "op.execute('DELETE FROM people')"
            add(backend, "0006", "0005", other, other)
        else:
            other = "0006" if up else "0005"
            postgres_server.sql("UPDATE alembic_version SET version_num = %s", other, database=DATABASE)

    monkeypatch.setattr("flows.database.migration.live.secure_backup", meanwhile)
    report = failed(flow, confirm=NAME)
    if what == "script":
        assert "the migrations differ from the rehearsed ones: 0006 changed since" in report.sentence()
    else:
        then, now = ("0005", "0006") if up else ("0006", "0005")
        assert f"migrations_db is at {now} now, not at {then}" in report.sentence()
    assert len(postgres_server.sql("SELECT id FROM people", database=DATABASE)) == 1


def test_base_loses_every_row_that_was_named_and_no_other(postgres_server: PostgresServer) -> None:
    migrate_to(postgres_server, "0005")
    postgres_server.sql("CREATE TABLE by_hand AS SELECT 1 AS x", database=DATABASE)
    assert "1 in 1 tables" in rollback_migrations.fn(NAME, "base").facts["rows that are lost"]
    done = rollback_migrations.fn(NAME, "base", lose_rows=1, confirm=NAME)
    assert done.status is Status.OK, done.sentence()
    assert revision(postgres_server) == ""
    assert columns(postgres_server, "people") == []
    assert columns(postgres_server, "by_hand") == ["x"]
    again = rollback_migrations.fn(NAME, "base", confirm=NAME)
    assert "nothing to roll back" in again.sentence()


def test_rows_that_come_after_the_judgement_are_not_lost(
    postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate_to(postgres_server, "0005")
    monkeypatch.setattr(
        "flows.database.migration.live.secure_backup",
        lambda *_: postgres_server.sql("INSERT INTO people VALUES (2)", database=DATABASE),
    )
    report = failed(rollback_migrations, "base", lose_rows=1, confirm=NAME)
    assert "2 rows would lose data now, 1 were accepted" in report.sentence()
    assert "nothing was changed: migrations_db is at 0005" in found(report, "state of the system").value
    assert revision(postgres_server) == "0005"


def test_a_rollback_across_an_empty_downgrade_is_refused_at_once(
    postgres_server: PostgresServer, backend: Path
) -> None:
    add(backend, "0006", "0005", "op.execute('CREATE TABLE kept (x int)')", "pass")
    migrate_to(postgres_server, "0006")
    report = failed(rollback_migrations, confirm=NAME)
    assert "0006 (0006_x.py): empty" in found(report, "downgrades").value
    assert not [step for step in report.steps if "rehearsal" in step.name]
    failed(rollback_migrations, "base", lose_rows=9, confirm=NAME)
    assert revision(postgres_server) == "0006"


def test_the_act_names_what_is_lost_and_a_database_that_was_migrated_since_is_refused(
    postgres_server: PostgresServer,
) -> None:
    migrate_to(postgres_server, "0005")
    env = toml.environment(NAME)
    undo = MigrationUndo("0005", "", tables=("public.people",), dropped=("public.people",), rows=1)
    assert undo.act(DATABASE).target == f"{DATABASE} to base, losing up to 1 rows in 1 tables"
    noted = replace(undo, columns=(("public.people", ("note", "x")),))
    assert noted.act(DATABASE).target.endswith("1 rows in 1 tables, dropping columns of public.people (note, x)")
    stale = replace(undo, before="0004")
    with pytest.raises(OpsError, match="is at 0005 now, not at 0004"):
        downgrade.work(env.postgres, env.application, stale)
    assert revision(postgres_server) == "0005"


def test_without_a_person_no_more_rows_are_lost_than_were_accepted(postgres_server: PostgresServer) -> None:
    env, state = toml.environment(NAME), RehearsedState({}, {}, {})
    rehearsed = Rehearsed(state, state, (MigrationLoss("public.people", 3),))
    for unattended, status in ((False, Status.WARN), (True, Status.CRITICAL)):
        report = Report("Roll back", NAME, unattended=unattended)
        live.judge_losses(report, env, rehearsed, MigrationUndo("0006", "0005"), 2)
        assert finding(report, "rows that are lost") is status
