"""A contained environment: maintenance changes nothing, on this host or another; recoveries and backups go on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from prefect import flow

from runbook.errors import Locked, OpsError
from runbook.guard import containment
from runbook.guard.containment import Contained
from runbook.guard.holder import Rank
from runbook.guard.permit import Act, Permit
from runbook.kinds import action
from runbook.report import Report, Status
from runbook.run import runbook
from tests.runbook.system import EFFECT, System

DELETE = Act("delete backup", "postgres_1")


def contain(system: System, name: str = "one", began: float = 0) -> Contained:
    made = Contained(name, began or time.time(), "Sato", "rows are gone", "2026-11-26 09:00:00 JST", "db1")
    containment.write(system.name, system.reports_directory, made)
    return made


def release(system: System) -> None:
    found = containment.read(system.name, system.reports_directory)
    assert found
    containment.end(system.name, system.reports_directory, found)


def maintain(system: System, rank: Rank = "maintenance", confirm: str | None = None, inside: object = None) -> Report:
    given = system.name if confirm is None else confirm
    with runbook("Prune backups", system, given, changes=True, rank=rank) as report:
        permit = report.permit(DELETE, effect=EFFECT) if given else None
        if callable(inside):
            inside(report, permit)
    return report


@flow
def maintain_run(system: System, rank: Rank = "maintenance") -> Report:
    return maintain(system, rank)


@flow
def contain_run(system: System, name: str = "one") -> None:
    contain(system, name)


@flow
def release_run(system: System) -> None:
    release(system)


@pytest.fixture
def elsewhere(system: System, tmp_path: Path) -> System:
    """The same environment, seen from a host with other files."""
    return System(tmp_path / "elsewhere", system.name)


def test_maintenance_is_refused_and_says_who_why_and_how_to_go_on(system: System) -> None:
    assert maintain(system).status is Status.OK
    contain(system)
    with pytest.raises(Locked) as caught:
        maintain(system)
    said = str(caught.value)
    assert "contained by Sato on db1 since 2026-11-26 09:00:00 JST: rows are gone" in said
    assert "release-containment" in said
    added = maintain(system, confirm="")  # a backup, or a plan
    assert added.status is Status.WARN
    assert "contained by Sato" in added.sentence()
    recovered = maintain(system, "recovery")
    assert recovered.status is Status.OK
    assert recovered.facts["contained"].startswith("contained by Sato")
    release(system)
    assert maintain(system).status is Status.OK


def test_what_had_begun_is_stopped_before_its_next_irreversible_act(system: System) -> None:
    done = []

    @action
    def delete(permit: Permit) -> None:
        done.append(permit)

    def inside(_report: Report, permit: Permit) -> None:
        delete(permit)
        contain(system)
        delete(permit)

    with pytest.raises(Locked, match="contained by Sato"):
        maintain(system, inside=inside)
    assert len(done) == 1
    maintain(system, "recovery", inside=lambda _, permit: delete(permit))
    assert len(done) == 2


def test_a_runbook_inside_a_recovery_may_do_what_that_one_may(system: System) -> None:
    contain(system)
    maintain(system, "recovery", inside=lambda *_: maintain(system))
    with runbook("Drill", system), pytest.raises(Locked):
        maintain(system)


def test_a_damaged_note_refuses_maintenance_and_no_recovery(system: System) -> None:
    contain(system)
    (system.reports_directory / f".contained-{system.name}").write_text("{")
    with pytest.raises(OpsError, match="cannot be read"):
        maintain(system)
    assert maintain(system, "recovery").status is Status.WARN


@pytest.mark.usefixtures("prefect_server")
def test_other_hosts_know_it_by_prefect(system: System, elsewhere: System) -> None:
    contain_run(system)
    with pytest.raises(Locked, match="contained by Sato"):
        maintain_run(elsewhere)
    release_run(elsewhere)
    assert containment.is_here(system.name, system.reports_directory)
    assert maintain_run(system).status is Status.OK, "released elsewhere"
    assert not containment.is_here(system.name, system.reports_directory)
    contain(system, "while Prefect was away")
    assert maintain_run(elsewhere).status is Status.OK
    with pytest.raises(Locked):
        maintain_run(system)  # and tells it
    with pytest.raises(Locked):
        maintain_run(elsewhere)


@pytest.mark.usefixtures("prefect_server")
def test_an_old_note_does_not_hide_a_newer_containment(system: System, elsewhere: System) -> None:
    contain(system, "old", began=1000)
    contain_run(elsewhere, "new")
    maintain_run(system, "recovery")
    release_run(elsewhere)
    assert maintain_run(system).status is Status.OK
