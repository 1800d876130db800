"""The backup that `latest` means: never one that failed its verification, and never silently an emptied one."""

from __future__ import annotations

import pytest

from flows.database.backup import backup_database, prune_backups, verify_backup
from flows.database.restore import restore_database
from flows.recovery.full_restore import full_restore
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from tasks.backups import catalogue
from tasks.stores.directory import DirectoryStore
from tests.database.backup.test_backup import newest
from tests.database.backup.test_verify_and_prune import OLDER_THAN_30_DAYS, aged
from tests.database.conftest import NAME, Trial
from tests.database.restore.test_restore import GOOD, flip, largest

# A restore fills materialised views last: the domain's check cannot read this one while the rows are loaded.
UNRESTORABLE = """
CREATE TABLE words AS SELECT 'yes' AS word;
CREATE MATERIALIZED VIEW allowed AS SELECT word FROM words;
CREATE FUNCTION is_allowed(text) RETURNS boolean LANGUAGE plpgsql STABLE AS
    $$ BEGIN RETURN EXISTS (SELECT FROM public.allowed WHERE word = $1); END $$;
CREATE DOMAIN permitted AS text CHECK (public.is_allowed(VALUE));
CREATE TABLE said (word permitted); INSERT INTO said VALUES ('yes'), ('yes');
"""


def backed_up(trial: Trial) -> str:
    """The name of a new backup. Names differ by a second at least."""
    return backup_database.fn(NAME).facts["backup"]


def texts(report: Report) -> str:
    return "\n".join(f"{one.status.value} {one.name}: {one.value} — {one.hint}" for one in report.findings)


def test_a_backup_that_failed_its_verification_is_not_the_next_choice(trial: Trial) -> None:
    """Its restore stopped the application and failed; the older good one was ignored."""
    good = backed_up(trial)
    trial.sql(UNRESTORABLE)
    bad = backed_up(trial)
    with pytest.raises(RunbookFailed):
        verify_backup.fn(NAME)
    assert newest(trial).name == bad
    assert newest(trial).failed
    for planned in (restore_database.fn(NAME), full_restore.fn(NAME)):
        assert planned.pins["backup"] == good
        assert f"{bad} failed its verification at" in texts(planned)
        assert 'materialized view "allowed" has not been populated' in texts(planned)
        assert "public.said: 0 → 2 rows" in texts(planned)
        assert not planned.facts.get("verified", "").startswith(bad)
    named = restore_database.fn(NAME, backup=bad)
    assert f"verification of {bad}: {bad} failed its verification at" in texts(named)
    assert "verified" not in named.facts, "that it failed is more than that it was not verified"
    with pytest.raises(RunbookFailed):
        verify_backup.fn(NAME)  # it verifies the newest one again, not an older one


def test_a_restore_that_fails_counts_as_a_failed_verification(trial: Trial) -> None:
    trial.sql(UNRESTORABLE)
    bad = backed_up(trial)
    with pytest.raises(RunbookFailed):
        restore_database.fn(NAME, confirm=NAME)
    assert newest(trial).failed
    planned = restore_database.fn(NAME)
    assert planned.pins["backup"] == bad, "no other one is left"
    assert f"verification of {bad}: {bad} failed its verification at" in texts(planned)
    catalogue.mark_verified.work(DirectoryStore(trial.store), bad, {})
    assert "failed its verification" not in texts(restore_database.fn(NAME))


def test_the_next_choice_is_the_newest_good_one_of_the_day(trial: Trial) -> None:
    names = [backed_up(trial) for _ in range(3)]
    store = DirectoryStore(trial.store)
    for name in names[1:]:
        catalogue.mark_failed.work(store, name, {"reason": "a test"})
    day = names[0].split("_")[1]
    assert catalogue.find_backup.work(store, "postgres", day, NAME).name == names[0]
    assert catalogue.find_backup.work(store, "postgres", "latest", NAME, failed_too=True).name == names[2]
    assert catalogue.find_nearest.work(store, "postgres", newest(trial).manifest.taken, NAME).name == names[0]
    catalogue.mark_verified.work(store, names[2], {})
    assert catalogue.find_backup.work(store, "postgres", "latest", NAME).name == names[2]


def test_an_emptied_database_is_named_by_its_backup_its_plan_and_kept_apart(trial: Trial) -> None:
    """It is backed up, and it verifies: the next restore would restore two rows, green."""
    full = backed_up(trial)
    assert verify_backup.fn(NAME).status in GOOD
    trial.sql("DELETE FROM answers; DELETE FROM people WHERE id > 2")
    emptied = backup_database.fn(NAME)
    assert emptied.status is Status.WARN
    assert f"against {full}: all tables: 2,854 → 356 rows; public.people: 2,000 → 2 rows" in texts(emptied)
    shrunk = next(one for one in emptied.evidence if one.name == "Tables that shrank")
    assert ("public.people", "2,000", "2") in shrunk.rows
    assert "shrank" in texts(verify_backup.fn(NAME)) or full in texts(verify_backup.fn(NAME))
    again = backup_database.fn(NAME)
    assert "100 %" not in texts(again), "nothing has changed since the newest verified one"
    planned = restore_database.fn(NAME)
    assert planned.pins["backup"] == again.facts["backup"]
    assert f"since {full} " in texts(planned)
    assert "public.people: 2,000 → 2 rows" in texts(planned)
    assert f"restore {full} instead; writes of the data of the last " in texts(planned)
    assert f"since {full} " in texts(full_restore.fn(NAME))
    assert "since" not in texts(restore_database.fn(NAME, backup=full))


def test_the_last_backup_before_a_drop_is_not_pruned(trial: Trial) -> None:
    backup_database.fn(NAME)
    before = [aged(trial, days, verified=True) for days in (50, 40)]
    trial.sql("DELETE FROM answers; DELETE FROM people WHERE id > 2")
    backup_database.fn(NAME)
    after = [aged(trial, days, verified=True) for days in (39, 38)]
    tiers = {**OLDER_THAN_30_DAYS, "monthly": 6, "weekly": 0}
    doomed = {step.detail.split(",")[0] for step in prune_backups.fn(NAME, keep_verified=1, **tiers).plan_steps}
    assert before[0] in doomed
    assert before[1] not in doomed, f"{after} are emptied"


def test_a_damaged_file_found_by_a_plan_counts_too(trial: Trial) -> None:
    good, bad = backed_up(trial), backed_up(trial)
    flip(largest(trial.store / bad))
    with pytest.raises((RunbookFailed, OpsError)):
        restore_database.fn(NAME)
    planned = restore_database.fn(NAME)
    assert planned.pins["backup"] == good
    assert f"{bad} failed its verification" in texts(planned)
