"""The headline of a plan: what is done, what is lost, for how long it is down, what undoes it."""

from __future__ import annotations

import inspect
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from runbook import clock
from runbook.errors import NotConfirmed
from runbook.guard.effect import Effect, back_to, seconds_from
from runbook.guard.loss import Loss
from runbook.guard.permit import Act, PlannedStep, PlanOnly
from runbook.next import Next
from runbook.report import Report
from runbook.units import counted, first_of

NOW = datetime(2026, 11, 28, 17, 1, 20, tzinfo=UTC)


def test_the_headline_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded, with units, in the environment's zone; it says that nothing has changed."""
    monkeypatch.setattr(clock, "now", lambda: NOW)
    taken, steps = NOW - timedelta(seconds=130), [PlannedStep("restore", "", 0, 60), PlannedStep("stop", "", 0, 18.4)]
    report = Report("Full restore", "lab")
    with clock.use_zone(ZoneInfo("Asia/Tokyo")):
        lost = (Loss.everything_since("grc_db", taken),)
        effect = Effect(back_to("grc_db", taken), "undo-restore", lost, seconds_from(steps, "stop"))
    with pytest.raises(PlanOnly):
        report.permit(Act("swap", "grc_db"), effect=effect)
    assert report.sentence() == (
        "PLANNED: grc_db goes back to 01:59 (+09:00); writes of grc_db of the last 2 min are lost; about 18 s down; "
        "undo: undo-restore. Nothing has changed."
    )
    report.warn("fsync", "switch it on", value="off")
    assert report.sentence().endswith("Nothing has changed. Warning: fsync: off. Next: switch it on")


@pytest.mark.parametrize(
    ("effect", "text"),
    [
        (Effect("x is deleted", "", "it is lost"), "x is deleted; it is lost; no downtime; cannot be undone"),
        (Effect("x", "y", down=0.3), "x; nothing is lost; less than 1 s down; undo: y"),
        (
            Effect("x", Next("y", parameters={"z": 1}), down=400),
            "x; nothing is lost; about 7 min down; undo: y with z=1",
        ),
        (Effect("x", "y", down=float("nan")), "x; nothing is lost; downtime unknown; undo: y"),
        (Effect("x", "y", down="writes pause"), "x; nothing is lost; writes pause; undo: y"),
    ],
)
def test_each_part_is_stated(effect: Effect, text: str) -> None:
    assert str(effect) == text


def test_every_plan_has_to_state_its_effect() -> None:
    """mypy checks each call of `permit`; here, that it can."""
    parameter = inspect.signature(Report.permit).parameters["effect"]
    assert (parameter.default, parameter.kind) == (inspect.Parameter.empty, inspect.Parameter.KEYWORD_ONLY)
    report = Report("Full restore", "lab", "another")
    with pytest.raises(NotConfirmed):
        report.permit(Act("swap", "grc_db"), effect=Effect("x", "y"))


def test_names_and_days_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "now", lambda: NOW)
    assert [counted(1, "key"), counted(1250, "key")] == ["1 key", "1,250 keys"]
    assert counted(2, "copy", "copies") == "2 copies"
    assert first_of(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    with clock.use_zone(ZoneInfo("Asia/Tokyo")):
        assert clock.short(NOW - timedelta(days=2)) == "2026-11-27 02:01 (+09:00)"
    assert "of the last 3 d are lost" in Loss.everything_since("grc_db", NOW - timedelta(days=3)).text
