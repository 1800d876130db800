"""A check that runs every few minutes: what tells nothing new is counted, and the chain stays whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from runbook.errors import RunbookFailed
from runbook.files import chain, repeats
from runbook.metrics import Measure
from runbook.report import Report, Status
from runbook.run import runbook
from tests.runbook.system import System


def look(
    system: System, status: Status = Status.OK, value: float = 1.0, hint: str = "wait", name: str = "lag"
) -> Report:
    """One run of a check."""
    with runbook("Check often", system, often=True) as found:
        found.require(name, status is Status.OK, hint, value=value, worst=status)
    return found


def filed(system: System) -> list[dict[str, object]]:
    """What is in the chain, which is whole."""
    assert chain.verify_chain(system.reports_directory) == []
    return [json.loads(path.read_text()) for path in sorted(system.reports_directory.glob("*.json"))]


def state_of(system: System) -> Path:
    (path,) = [path for path in system.reports_directory.glob(".same-*") if path.suffix != ".lock"]
    return path


def test_the_same_again_is_counted_and_told_by_the_next_that_differs(system: System) -> None:
    first = look(system)
    again = [look(system, value=value) for value in (2.0, 3.0)]
    assert len(filed(system)) == 1
    assert [one.path for one in again] == [first.path] * 2
    assert again[1].facts["filed"].endswith("2 times since")
    assert again[1].hash == first.hash
    look(system, Status.WARN)
    after = filed(system)[1]
    assert first.path
    assert f"2 found the same as {first.path.name}" in str(after["facts"])
    look(system, Status.WARN)
    assert len(filed(system)) == 2
    assert len(list(system.reports_directory.glob("*.md"))) == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda system: look(system, Status.WARN, hint="do that"),
        lambda system: look(system, Status.WARN, name="another"),
        lambda system: look(system),
    ],
    ids=["hint", "finding", "status"],
)
def test_what_differs_is_filed(system: System, other: Callable[[System], object]) -> None:
    look(system, Status.WARN)
    look(system, Status.WARN)
    other(system)
    assert len(filed(system)) == 2


def test_a_critical_one_is_always_filed(system: System) -> None:
    for _ in range(3):
        with pytest.raises(RunbookFailed):
            look(system, Status.CRITICAL)
    assert len(filed(system)) == 3


def test_what_measured_something_is_filed(system: System) -> None:
    for _ in range(2):
        with runbook("Check often", system, often=True) as found:
            found.measures.append(Measure("x", 1, 1.0))
    assert len(filed(system)) == 2


@pytest.mark.parametrize("minutes", [-61, 61], ids=["an hour ago", "the clock was set back"])
def test_once_an_hour_it_is_filed_all_the_same(system: System, minutes: int) -> None:
    look(system)
    look(system)
    content = json.loads(state_of(system).read_text())
    moved = (datetime.now(UTC) + timedelta(minutes=minutes)).isoformat()
    state_of(system).write_text(json.dumps({**content, "at": moved}))
    look(system)
    assert len(filed(system)) == 2


@pytest.mark.parametrize("damage", ["", "{}", "[1]", "gone"])
def test_a_damaged_state_files(system: System, damage: str) -> None:
    first = look(system)
    assert first.path
    if damage == "gone":
        content = json.loads(state_of(system).read_text())
        state_of(system).write_text(json.dumps({**content, "name": "another.json"}))
    else:
        state_of(system).write_text(damage)
    look(system)
    assert len(filed(system)) == 2
    assert repeats.result_of(first)


def test_a_report_that_is_not_often_is_always_filed(system: System) -> None:
    for _ in range(2):
        with runbook("Restore", system):
            pass
    assert len(filed(system)) == 2
