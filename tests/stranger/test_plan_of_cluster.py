"""A green plan of a restore from base backup and WAL is carried out: what would refuse the run refuses the plan."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from blocks.environment import Environment
from flows.recovery.full.login import NOT_JUDGED
from flows.store import store_for
from runbook.report import Report, Status
from tasks.backups.catalogue import LATEST, find_backup, mark_broken, note_of
from tests.stranger import test_plan
from tests.stranger.system import NAME, ROLE, Stranger, backed_up_stranger
from tests.stranger.test_plan import Found, Seed, critical, down, findings, plan, refused_with

SEEDS: dict[str, tuple[Seed, str]] = {}
# Without a data directory nothing is created here: the base backup has all of it.
CREATING = ("cluster_gone_and_no_such_user", "cluster_gone_and_no_such_locale")


@pytest.fixture(scope="module")
def system() -> Iterator[Stranger]:
    with backed_up_stranger() as found:
        yield found


@pytest.fixture(autouse=True)
def tidy(system: Stranger) -> Iterator[None]:
    """After a test: a plan has left nothing beside the data directory, and what a run replaced is not needed."""
    yield
    for kept in (system.root / "pg").glob("data.superseded_*"):
        shutil.rmtree(kept)
    assert not test_plan.left_behind(system)


@refused_with("pg_hba.conf", SEEDS)
def closed_to_the_application(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    """The copy has its own pg_hba.conf, but the live one is used after the swap."""
    file = stranger.root / "pg/data/pg_hba.conf"
    text = file.read_text()
    file.write_text(f"host members {ROLE} 127.0.0.1/32 reject\n{text}")
    stranger.sql("SELECT pg_reload_conf()")
    yield None
    file.write_text(text)
    stranger.sql("SELECT pg_reload_conf()")


@refused_with("services: missing: redis", SEEDS)
def service_without_a_name_that_is_replaced(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    stranger.describe((' redis = "keys",', ""))
    yield {"redis_source": "backup"}


@refused_with("expectations that the backup breaks: scores above 100", SEEDS)
def rule_that_the_backup_breaks(stranger: Stranger, patch: pytest.MonkeyPatch) -> Iterator[Found]:
    store = store_for(Environment.find(NAME), "cluster")
    name = find_backup(store, "cluster", LATEST, NAME).name
    mark_broken(store, name, {"rules": "scores above 100"})
    yield {"strict": True}
    (stranger.root / "backups/cluster" / note_of(name)).unlink()


# In words of its own: the cluster's recovery needs more rights than a restore of the dump.
WORDS = {
    "administrator_without_rights": "rights of the administrator: none",
    "stopped_server_of_another_version": "configuration of the server",
}
ALL = {**{name: seed for name, seed in test_plan.SEEDS.items() if name not in CREATING}, **SEEDS}


def carried_out_or_refused(words: str, **parameters: object) -> Report:
    """The plan names what refuses the run, or the run succeeds. Returns the plan."""
    report = plan(**parameters)
    done = plan(**parameters, confirm=NAME)
    if report.status is Status.PLANNED:
        assert done.status in (Status.OK, Status.WARN), findings(done)
    else:
        assert critical(done) == critical(report)
        assert words in findings(report)
    return report


@pytest.mark.parametrize("name", ALL)
def test_what_would_refuse_later_refuses_now(
    system: Stranger, stranger: Stranger, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seed, words = ALL[name]
    with seed(stranger, monkeypatch) as parameters:
        report = carried_out_or_refused(WORDS.get(name, words), **(parameters or {}))
        assert report.status is Status.CRITICAL or name not in SEEDS


@pytest.mark.parametrize("name", ["wrong_password_of_the_application", "role_without_login"])
def test_the_files_of_a_stopped_server_show_it_too(
    system: Stranger, stranger: Stranger, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seed, words = test_plan.SEEDS[name]
    with seed(stranger, monkeypatch), down(stranger):
        assert carried_out_or_refused(words).status is Status.CRITICAL


def test_without_a_data_directory_the_plan_says_what_it_did_not_judge(system: Stranger, stranger: Stranger) -> None:
    data = stranger.root / "pg/data"
    with down(stranger):
        data.rename(data.with_name("lost"))
        try:
            report = plan()
        finally:
            data.with_name("lost").rename(data)
    assert report.status is Status.PLANNED, findings(report)
    assert [found.value for found in report.findings if found.name == NOT_JUDGED] == ["the data directory is missing"]


def test_a_role_that_was_changed_after_the_target_is_no_obstacle(system: Stranger, stranger: Stranger) -> None:
    """The copy has it as it was before the table was emptied."""
    stranger.sql("CREATE TABLE kept AS SELECT * FROM scores")
    stranger.sql("TRUNCATE scores")
    stranger.sql(f"ALTER ROLE {ROLE} PASSWORD 'changed by whoever emptied it'")
    report = plan()
    assert report.status is Status.PLANNED, findings(report)
    assert "refuses the password" in next(one.value for one in report.findings if one.name.startswith("log-in of the"))
    done = plan(confirm=NAME)
    assert done.status is Status.WARN, findings(done)
    assert stranger.ready()
