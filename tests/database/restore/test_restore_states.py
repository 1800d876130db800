"""restore_database: what it says of the state it leaves, and what must not stand in its way."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import time
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from flows.database import restore_steps, waiting_commits
from flows.database.backup import backup_database
from flows.database.restore import restore_database
from runbook.errors import RunbookFailed, Unreachable
from runbook.report import Report, Status
from runbook.wait import until
from tasks.backups import catalogue
from tasks.postgres.replication.synchronous import Synchrony
from tasks.postgres.restore.staged_copy import copy_name
from tasks.postgres.restore.swap import advisory_lock
from tasks.postgres.server.server import read_server
from tests.database.backup.test_backup import newest
from tests.database.conftest import NAME, Trial
from tests.database.restore.test_restore import GOOD, newest_path, reseal, restore
from tests.fixtures.servers import ADMIN_PASSWORD


def test_another_environment_s_backup_is_restored_by_its_name_only(trial: Trial) -> None:
    backup_database.fn(NAME)
    reseal(newest_path(trial), lambda m: m.update(environment="staging"))
    with pytest.raises(
        RunbookFailed,
        match=f"there is no postgres backup “latest”.*name another environment's backup in full, e.g. {newest_path(trial).name}",
    ):
        restore()
    assert restore(backup=newest_path(trial).name) is Status.WARN


def test_a_catalogue_that_can_be_neither_read_nor_written_stands_in_no_restore_s_way(trial: Trial) -> None:
    backup_database.fn(NAME)
    notes = trial.store / catalogue.VERIFIED
    notes.mkdir()
    (notes / f"{newest_path(trial).name}.json").write_text("")  # as after a power cut
    assert restore() in GOOD
    assert newest(trial).verified
    shutil.rmtree(notes)
    notes.write_text("in the way")
    report = restore_database.fn(NAME, confirm=NAME)
    assert report.status is Status.WARN
    assert "the result could not be written" in report.sentence()


def test_a_failure_after_the_swap_says_that_it_happened(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads “run it again” would lose what was written since."""
    backup_database.fn(NAME)
    monkeypatch.setattr(restore_steps, "judge_data_loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        restore_database.fn(NAME, confirm=NAME)
    told = json.loads(max(trial.reports.glob("*restore-database.json")).read_text())["findings"]
    state = next(finding for finding in told if finding["name"] == "state of the system")
    assert "is live, proven; the replaced database is kept as" in state["value"]
    assert "do not restore again" in state["hint"]
    assert not [finding for finding in told if "run this again" in finding["hint"]]


def test_roles_of_a_new_server_are_made_by_a_full_restore_only(trial: Trial) -> None:
    backup_database.fn(NAME)
    new = replace(read_server(trial.environment.postgres), roles=("postgres",), databases=("postgres",))
    for roles_are_made, status in ((False, Status.CRITICAL), (True, Status.OK)):
        report = Report("trial", NAME)
        restore_steps.judge_server(report, trial.environment, newest(trial), new, roles_are_made=roles_are_made)
        assert next(finding for finding in report.findings if finding.name == "roles").status is status


def test_the_session_that_guards_a_long_restore_does_not_end_for_idleness(trial: Trial) -> None:
    trial.sql("ALTER ROLE postgres SET idle_session_timeout = '1s'")
    try:
        with contextlib.ExitStack() as stack:
            postgres = trial.environment.postgres
            # Until it has said that it will be idle, it may end for just that.
            guard = until(lambda: stack.enter_context(advisory_lock(postgres)), what="its lock", seconds=120)
            other = stack.enter_context(
                psycopg.connect(**guard.info.get_parameters(), password=ADMIN_PASSWORD, autocommit=True)
            )
            until(lambda: not _answers(other), what="the end of another session", seconds=120)
            assert _answers(guard)
    finally:
        patient = {"password": ADMIN_PASSWORD, "options": "-c idle_session_timeout=0", "autocommit": True}
        with psycopg.connect(host="127.0.0.1", port=trial.server.port, user="postgres", **patient) as connection:
            connection.execute("ALTER ROLE postgres RESET idle_session_timeout")


def _answers(connection: psycopg.Connection[Any]) -> bool:
    """Asked once only: a question would keep it from being idle."""
    time.sleep(1.5)
    try:
        connection.execute("SELECT 1")
    except psycopg.OperationalError:
        return False
    return True


def test_no_number_is_given_out_twice_to_clients_that_go_on_until_the_swap(trial: Trial) -> None:
    backup_database.fn(NAME)
    numbers = []

    def take() -> None:
        with (
            contextlib.suppress(psycopg.OperationalError, Unreachable),
            trial.environment.postgres.connect(trial.database) as client,
        ):
            while True:
                numbers.append(client.execute("SELECT nextval('\"Ticket Numbers\"')").fetchone()[0])  # type: ignore[index]

    client = threading.Thread(target=take)
    client.start()
    until(lambda: len(numbers) > 100, what="a client at work", seconds=120)
    restore(advance=True)
    client.join(120)
    assert not client.is_alive(), "the swap ends its session"
    assert trial.sql("SELECT nextval('\"Ticket Numbers\"')")[0][0] > numbers[-1]


@pytest.mark.parametrize("is_new", [False, True], ids=["live", "into"])
def test_the_lines_that_are_logged_are_those_that_were_planned(
    trial: Trial, caplog: pytest.LogCaptureFixture, is_new: bool
) -> None:
    backup_database.fn(NAME)
    into = f"{trial.database}_lines" if is_new else ""
    trial.sql("SELECT nextval('\"Ticket Numbers\"') FROM generate_series(1, 25)")
    if not into:
        trial.server.create_database(copy_name(trial.database))
    planned = restore_database.fn(NAME, advance=True, into=into)
    steps = [step.step for step in planned.plan_steps if not step.step.startswith("unpack ")]
    restored = f"restore {newest(trial).name}"
    last = ["rename"] if into else ["swap", "advance sequences"]
    assert steps == [*(["drop"] if not into else []), "create", restored, "prove the copy", "ANALYZE", *last]
    caplog.clear()
    caplog.set_level(logging.INFO, logger="ops")
    report = restore_database.fn(NAME, **{**planned.pins, "advance": True, "into": into}, confirm=NAME)
    assert report.plan_steps == planned.plan_steps, "its copy is dropped in the run"
    begun = [
        line for line in caplog.messages if line.startswith("Step ") and "done in" not in line and " so far" not in line
    ]
    number = len(planned.plan_steps)
    assert [line.split(": ")[:2] for line in begun] == [
        [f"Step {position}/{number}", step.step] for position, step in enumerate(planned.plan_steps, 1)
    ]


def test_commits_that_wait_forever_are_let_go_and_that_is_planned(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The plan has the line also while a standby is connected: one that dies meanwhile does not make it another."""
    backup_database.fn(NAME)
    monkeypatch.setattr(waiting_commits, "ATTACH_SECONDS", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(waiting_commits, "read_synchrony", lambda _: Synchrony("nobody", 1, ("nobody",)))
        planned = restore_database.fn(NAME)
        assert planned.plan_steps[0].step == "continue without a standby"
        assert not [found for found in planned.findings if found.name == "commits wait forever"]
        caplog.set_level(logging.INFO, logger="ops")
        restore()
        name = f"Step 1/{len(planned.plan_steps)}: continue without a standby"
        assert f"{name}: skipped: enough standbys are connected" in caplog.messages
        planned = restore_database.fn(NAME)
    trial.server.sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    trial.server.sql("SELECT pg_reload_conf()")
    try:
        report = restore_database.fn(NAME, **planned.pins, confirm=NAME)
        (found,) = [found for found in report.findings if found.name == "commits wait for no standby"]
        assert "overridden" in found.value
        assert trial.server.sql("SHOW synchronous_standby_names") == [("",)]
    finally:
        trial.server.sql("ALTER SYSTEM RESET synchronous_standby_names")
        trial.server.sql("SELECT pg_reload_conf()")


def test_what_belongs_to_the_live_database_is_looked_for_again_just_before_the_swap(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_database.fn(NAME)
    ready = restore_steps.ready_database

    def late(*arguments: Any, **named: Any) -> str:
        with trial.server.connect(trial.database) as connection:
            connection.execute("BEGIN; INSERT INTO by_mood VALUES ('ok', 1); PREPARE TRANSACTION 'tx-late'")
        return ready(*arguments, **named)

    monkeypatch.setattr(restore_steps, "ready_database", late)
    oid = trial.oid()
    try:
        with pytest.raises(RunbookFailed, match="prepared transaction tx-late.*ROLLBACK PREPARED"):
            restore_database.fn(NAME, confirm=NAME)
        assert trial.oid() == oid
    finally:
        trial.sql("ROLLBACK PREPARED 'tx-late'")
