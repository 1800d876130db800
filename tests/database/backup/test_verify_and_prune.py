"""verify_backup and prune_backups: what is verified was really restored, and the last good copy never goes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import psutil
import pytest

from flows.database.backup import backup_database, prune_backups, verify_backup
from runbook import clock
from runbook.errors import RunbookFailed
from runbook.report import Status
from runbook.wait import until
from tasks.backups import catalogue, manifest, publishing
from tasks.backups.manifest import Manifest
from tasks.stores.directory import DirectoryStore
from tasks.stores.store import Store
from tests.database.backup.test_backup import newest
from tests.database.conftest import NAME, Trial, with_expectations
from tests.database.restore.test_restore import GOOD, flip, largest, newest_path, reseal
from tests.fixtures import forked
from tests.fixtures.servers import PATIENT

OLDER_THAN_30_DAYS: dict[str, Any] = {"hours": 720, "daily": 0, "weekly": 0, "monthly": 0}
"""What parameters of prune-backups delete, in the place of the TOML's tiers."""


def databases(trial: Trial) -> list[str]:
    return [name for name in trial.databases() if name.startswith(trial.database)]


def test_a_backup_is_verified_by_restoring_it_and_leaves_nothing_behind(trial: Trial) -> None:
    backup_database.fn(NAME)
    oid = trial.oid()
    assert not newest(trial).verified
    report = verify_backup.fn(NAME)
    assert report.status in GOOD
    assert newest(trial).verified
    assert databases(trial) == [trial.database]
    assert trial.oid() == oid
    again = verify_backup.fn(NAME)
    trend = next(table for table in again.evidence if table.name.startswith("Verifications"))
    assert [row[1] for row in trend.rows] == [report.facts["backup"]]


@pytest.mark.parametrize("kind", ["a byte", "the morning's manifest", "a rule"])
def test_a_bad_backup_is_not_verified(trial: Trial, kind: str) -> None:
    if kind == "a rule":
        with_expectations(trial.reports.parent)
        trial.sql("CREATE TABLE users (username text); INSERT INTO users VALUES (NULL)")
    backup_database.fn(NAME)
    if kind == "a byte":
        flip(largest(newest_path(trial)))
    if kind == "the morning's manifest":
        reseal(newest_path(trial), lambda m: m["content"]["tables"]["public.people"].update(rows=1999))
    with pytest.raises(
        RunbookFailed,
        match={
            "a byte": "SHA-256|changed|differs",
            "the morning's manifest": "1,999",
            "a rule": "username values to not be null",
        }[kind],
    ):
        verify_backup.fn(NAME)
    assert not newest(trial).verified
    assert bool(newest(trial).failed) == (kind != "a rule"), "such a backup still restores: recoveries may take it"
    assert ("username values" in newest(trial).broken) == (kind == "a rule")
    assert databases(trial) == [trial.database]


def aged(trial: Trial, days: float, *, verified: bool = False, environment: str = NAME) -> str:
    """A backup of some days ago: a real one that was sealed again."""
    taken = datetime.now(UTC) - timedelta(days=days)
    name = f"backup_{taken:%Y%m%d_%H%M%S}"
    offered(trial, name, taken, environment)
    if verified:
        catalogue.mark_verified.work(DirectoryStore(trial.store), name, {"by": "test"})
    return name


def offered(trial: Trial, name: str, taken: datetime, environment: str = NAME) -> None:
    path = newest_path(trial)
    copy = path.with_name(name)
    subprocess.run(["cp", "-a", path, copy], check=True)
    content = json.loads((copy / "manifest.json").read_text())
    content.update(name=name, taken=taken.isoformat(), environment=environment)
    manifest.write(copy, Manifest.model_validate(content))


def test_the_safe_rule(trial: Trial) -> None:
    backup_database.fn(NAME)
    today = newest_path(trial).name
    unverified = aged(trial, 35)
    assert prune_backups.fn(NAME, **OLDER_THAN_30_DAYS, confirm=NAME).status is Status.WARN, (
        "nothing is verified: nothing goes"
    )
    old, older, oldest = (aged(trial, days, verified=True) for days in (40, 50, 60))
    stranger = aged(trial, 70, environment="staging")
    plan = prune_backups.fn(NAME, keep_verified=2, **OLDER_THAN_30_DAYS)
    assert plan.status is Status.PLANNED
    assert [step.detail.split(",")[0] for step in plan.plan_steps] == [oldest]
    assert set(catalogue.names(DirectoryStore(trial.store), "postgres")) == {
        today,
        unverified,
        old,
        older,
        oldest,
        stranger,
    }
    report = prune_backups.fn(NAME, keep_verified=2, **OLDER_THAN_30_DAYS, confirm=NAME)
    assert report.status is Status.OK
    assert set(catalogue.names(DirectoryStore(trial.store), "postgres")) == {today, unverified, old, older, stranger}
    catalogue.mark_verified.work(DirectoryStore(trial.store), today, {"by": "test"})
    prune_backups.fn(NAME, keep_verified=1, **OLDER_THAN_30_DAYS, confirm=NAME)
    assert set(catalogue.names(DirectoryStore(trial.store), "postgres")) == {today, stranger}
    prune_backups.fn(NAME, keep_verified=1, **{**OLDER_THAN_30_DAYS, "hours": 1}, confirm=NAME)
    assert today in catalogue.names(DirectoryStore(trial.store), "postgres")
    log = Path(trial.environment.logs.backup).read_text().splitlines()
    assert [line.split(": ", 1)[1].split(" - ")[0] for line in log] == ["Backup completed", "Pruned 1", "Pruned 3"]


def test_a_run_without_a_person_deletes_half_of_a_store_at_most(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half is unattended_share's default. A wrong `keep` must not empty a store in one night; the next runs go on, the oldest first."""
    backup_database.fn(NAME)
    old = [aged(trial, days) for days in range(46, 40, -1)]
    catalogue.mark_verified.work(DirectoryStore(trial.store), newest(trial).name, {"by": "test"})
    monkeypatch.setattr("runbook.run.is_unattended", lambda target: True)
    left = []
    for _ in range(4):
        report = prune_backups.fn(NAME, keep_verified=1, **OLDER_THAN_30_DAYS)
        left.append(sorted(set(catalogue.names(DirectoryStore(trial.store), "postgres")) & set(old)))
        said = [found.value for found in report.findings if found.name == "share that is deleted"]
        assert len(said) == (1 if len(left) < 3 else 0), "what is left over is said, with the numbers"
    assert left == [old[3:], old[5:], [], []]


@pytest.mark.parametrize(("seconds", "told"), [(90, "ahead of"), (-90, "behind"), (50, "")])
def test_a_clock_that_differs_from_the_database_s_deletes_nothing(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, seconds: int, told: str
) -> None:
    backup_database.fn(NAME)
    aged(trial, 40, verified=True)
    old = aged(trial, 60)
    monkeypatch.setattr(clock, "of_host", lambda: datetime.now(UTC) + timedelta(seconds=seconds))
    given = {"keep_verified": 1, **OLDER_THAN_30_DAYS}
    if told:
        where = rf"{told} PostgreSQL at .* by 1 min 30 s; {told} {trial.store} by 1 min 30 s"
        with pytest.raises(RunbookFailed, match=f"this host's clock: {where}"):
            prune_backups.fn(NAME, **given, confirm=NAME)
    else:
        prune_backups.fn(NAME, **given, confirm=NAME)
    assert (old in catalogue.names(DirectoryStore(trial.store), "postgres")) is bool(told)


def test_a_clock_that_jumped_deletes_nothing(trial: Trial) -> None:
    backup_database.fn(NAME)
    aged(trial, 40, verified=True)
    aged(trial, 60)
    aged(trial, -2, verified=True)
    before = catalogue.names(DirectoryStore(trial.store), "postgres")
    with pytest.raises(RunbookFailed, match="clock.*in the future"):
        prune_backups.fn(NAME, **OLDER_THAN_30_DAYS, confirm=NAME)
    assert catalogue.names(DirectoryStore(trial.store), "postgres") == before


def test_killed_between_name_and_files_the_rest_goes_with_the_next_backup(trial: Trial) -> None:
    backup_database.fn(NAME)
    catalogue.mark_verified.work(DirectoryStore(trial.store), newest_path(trial).name, {"by": "test"})
    doomed = aged(trial, 40)
    code = f"{PATIENT}from flows.database.backup import prune_backups; "
    code += f"prune_backups.fn({NAME!r}, keep_verified=1, hours=720, daily=0, weekly=0, monthly=0, confirm={NAME!r})"
    environment = {**os.environ, "OPS_FAILPOINT": "prune: renamed"}
    done = forked.run(["-c", code], environment)
    assert done.returncode == -signal.SIGKILL
    assert doomed not in catalogue.names(DirectoryStore(trial.store), "postgres")
    assert list(trial.store.glob(".partial-*"))
    backup_database.fn(NAME)
    assert not list(trial.store.glob(".partial-*"))


def test_while_there_are_fewer_verified_ones_than_are_to_stay_none_goes(trial: Trial) -> None:
    backup_database.fn(NAME)
    aged(trial, 40, verified=True)
    aged(trial, 60)
    before = catalogue.names(DirectoryStore(trial.store), "postgres")
    report = prune_backups.fn(NAME, keep_verified=2, **OLDER_THAN_30_DAYS, confirm=NAME)
    assert report.outcome == "nothing to delete"
    assert any(found.name == "verified backups" and found.value == "1" for found in report.findings)
    assert catalogue.names(DirectoryStore(trial.store), "postgres") == before


def test_what_went_bad_since_it_was_verified_stands_in_for_nothing(trial: Trial) -> None:
    """The manual's trap: the last good copy goes by age while the newer ones are bad."""
    backup_database.fn(NAME)
    good, bad = aged(trial, 60, verified=True), aged(trial, 40, verified=True)
    flip(largest(trial.store / bad))
    with pytest.raises(RunbookFailed, match=f"files of {bad}, the newest that is verified.*SHA-256"):
        prune_backups.fn(NAME, keep_verified=1, **OLDER_THAN_30_DAYS, confirm=NAME)
    assert good in catalogue.names(DirectoryStore(trial.store), "postgres")
    assert not catalogue.open_backup(DirectoryStore(trial.store), bad).verified, "it counts no longer"
    assert prune_backups.fn(NAME, keep_verified=1, **OLDER_THAN_30_DAYS, confirm=NAME).outcome == "nothing to delete"


def test_a_failed_verification_takes_the_note_back(trial: Trial) -> None:
    backup_database.fn(NAME)
    verify_backup.fn(NAME)
    assert newest(trial).verified
    reseal(newest_path(trial), lambda m: m["content"]["tables"]["public.people"].update(rows=1999))
    assert not newest(trial).verified, "the note was of another manifest"
    catalogue.mark_verified.work(DirectoryStore(trial.store), newest_path(trial).name, {"by": "test"})
    with pytest.raises(RunbookFailed, match="1,999"):
        verify_backup.fn(NAME)
    assert not newest(trial).verified


def test_in_a_shared_store_latest_is_one_s_own(trial: Trial) -> None:
    backup_database.fn(NAME)
    mine = newest_path(trial).name
    stranger = aged(trial, -0.001, environment="staging")
    found = catalogue.open_all(DirectoryStore(trial.store), "postgres")[0]
    assert max(found, key=lambda backup: backup.manifest.taken).name == stranger
    assert verify_backup.fn(NAME).facts["backup"].startswith(mine)
    assert verify_backup.fn(NAME, backup=mine.split("_")[1]).facts["backup"].startswith(mine)


def test_when_clocks_go_back_the_newest_is_the_one_that_was_taken_last(trial: Trial) -> None:
    """Names are in the operators' zone: half past two comes twice where daylight saving ends, and names sort the wrong
    way round within that hour."""
    backup_database.fn(NAME)
    berlin, first = ZoneInfo("Europe/Berlin"), datetime(2026, 10, 25, 0, 50, tzinfo=UTC)
    names = [f"backup_{moment.astimezone(berlin):%Y%m%d_%H%M%S}" for moment in (first, first + timedelta(minutes=30))]
    assert names == ["backup_20261025_025000", "backup_20261025_022000"]
    for name, taken in zip(names, (first, first + timedelta(minutes=30)), strict=True):
        offered(trial, name, taken)
    store = DirectoryStore(trial.store)
    assert catalogue.find_backup.work(store, "postgres", "20261025", NAME).name == names[1]
    before = catalogue.earlier(catalogue.open_backup(store, names[1]))
    assert before
    assert before.name == names[0]


def test_a_name_is_taken_once(trial: Trial) -> None:
    """Two environments in one store, in the same second: whoever has it keeps it."""
    trial.store.mkdir(parents=True)
    store = DirectoryStore(trial.store)
    assert store.claim("staging", "backup_20260101_030000")
    assert not store.claim("production", "backup_20260101_030000"), "although it comes first in the alphabet"
    assert not store.claim("testing", "backup_20260101_030000")
    assert not store.claim("staging", "backup_20260101_030000"), "not even twice"
    assert [path.name for path in trial.store.iterdir()] == [".partial-staging-backup_20260101_030000"]
    (trial.store / "backup_20260101_040000").mkdir()
    assert not store.claim("production", "backup_20260101_040000"), "offered already"


def claimed_by(store: Store, environments: Sequence[str], name: str) -> list[str]:
    """Who gets a name of those that want it at once."""
    barrier = threading.Barrier(len(environments))

    def claim(environment: str) -> bool:
        barrier.wait()
        return store.claim(environment, name)

    with ThreadPoolExecutor(len(environments)) as pool:
        won = list(pool.map(claim, environments))
    return [environment for environment, mine in zip(environments, won, strict=True) if mine]


def test_a_name_that_several_want_at_once_is_nobody_s_or_one_s(trial: Trial) -> None:
    trial.store.mkdir(parents=True)
    store = DirectoryStore(trial.store)
    won = [claimed_by(store, ("production", "staging", "testing"), f"backup_20260101_{n:06}") for n in range(200)]
    assert max(len(names) for names in won) == 1
    assert len(list(trial.store.iterdir())) == sum(len(names) for names in won), "who yields leaves nothing"


def test_two_environments_that_begin_at_once_have_a_backup_each(trial: Trial) -> None:
    """What the one offers does not stand where the other's is to come."""
    store, barrier = DirectoryStore(trial.store), threading.Barrier(2)

    def begun(environment: str) -> str:
        barrier.wait()
        name, directory = publishing.begin(store, "schema", environment, ZoneInfo("UTC"))
        (directory / "file").write_text(environment)
        store.offer(directory, name, {})
        return (trial.store / name / "file").read_text()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(begun, ("production", "staging"))) == ["production", "staging"]


def test_an_extension_that_was_updated_since_is_told_and_costs_no_backup_its_proof(trial: Trial) -> None:
    """pg_dump writes no version: after a package's update every older backup restores with the newer one."""
    backup_database.fn(NAME)
    [(name,)] = trial.sql("SELECT extname FROM pg_extension WHERE extname <> 'plpgsql'")
    reseal(newest_path(trial), lambda m: m["content"]["extensions"].update({name: "0.0.1"}))
    report = verify_backup.fn(NAME)
    told = next(found for found in report.findings if found.name == "versions of extensions")
    assert told.status is Status.WARN
    assert told.value.startswith(f"{name}: 0.0.1 in the backup, ")
    assert newest(trial).verified
    reseal(newest_path(trial), lambda m: m["content"]["extensions"].update({"another": "1"}))
    with pytest.raises(RunbookFailed, match="extensions: not installed: another"):
        verify_backup.fn(NAME)


FAILS = """
CREATE FUNCTION public.fails(n int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN
    IF current_database() LIKE '%__verify' THEN RAISE EXCEPTION '{message}' USING ERRCODE = '{code}'; END IF;
    RETURN n; END $$;
CREATE TABLE public.connections (n int);
INSERT INTO public.connections VALUES (1);
CREATE INDEX connections_fails ON public.connections (public.fails(n));
"""


@pytest.mark.parametrize(
    ("code", "message", "at_fault"),
    [
        ("53100", 'could not extend file "base/1": No space left on device', False),
        ("57P01", "terminating connection due to administrator command", False),
        ("58030", 'could not read blocks 0..0 in file "base/1": Input/output error', False),
        ("23505", 'could not create unique index "file of connections"', True),
        ("P0001", "the connection is lost, said a row of connections", True),
    ],
)
def test_what_the_server_is_at_fault_for_is_not_the_backup_s(
    trial: Trial, code: str, message: str, at_fault: bool
) -> None:
    """What a full disk or a dying server says, said by an index of the restored database; and a rule that refuses."""
    trial.sql(FAILS.format(code=code, message=message))
    backup_database.fn(NAME)
    catalogue.mark_verified.work(DirectoryStore(trial.store), newest_path(trial).name, {"by": "test"})
    with pytest.raises(RunbookFailed, match=message.split(" ", 3)[0]):
        verify_backup.fn(NAME)
    assert bool(newest(trial).verified) is not at_fault


def test_a_pg_restore_that_is_killed_says_nothing_of_the_backup(trial: Trial) -> None:
    trial.sql(
        "CREATE FUNCTION public.waits(n int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN "
        "IF current_database() LIKE '%__verify' THEN PERFORM pg_sleep(600); END IF; RETURN n; END $$;"
        "CREATE TABLE public.slow (n int); INSERT INTO public.slow VALUES (1);"
        "CREATE INDEX slow_waits ON public.slow (public.waits(n))"
    )
    backup_database.fn(NAME)
    catalogue.mark_verified.work(DirectoryStore(trial.store), newest_path(trial).name, {"by": "test"})

    def children() -> list[psutil.Process]:
        found = list[psutil.Process]()
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # others come and go
                restores = child.name() == "pg_restore" and any(word.startswith("--jobs") for word in child.cmdline())
                found += [child] if restores else []
        return found

    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(verify_backup.fn, NAME)
        for child in until(children, what="a pg_restore at its slowest", seconds=600):
            child.kill()
        with pytest.raises(RunbookFailed, match="pg_restore exited -9"):
            running.result()
    assert newest(trial).verified
