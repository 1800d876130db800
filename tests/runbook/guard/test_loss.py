"""A loss is a value: its words, and whether a person who confirmed one has confirmed another."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from runbook import clock
from runbook.guard.effect import Effect
from runbook.guard.loss import Loss, exceeded, losses_text
from runbook.report import Report

NOW = datetime(2026, 11, 28, 17, 1, 20, tzinfo=UTC)
THEN = NOW - timedelta(seconds=130)


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "now", lambda: NOW)


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (Loss("app"), "nothing of app is lost"),
        (Loss(), "nothing of the data is lost"),
        (Loss("app", 1, first=THEN, last=THEN), "1 commit of app is lost (2026-11-29 01:59:10 +09:00 to "),
        (Loss("app", 3, by={"app": 2, "other": 1}, first=THEN, last=NOW), "; app 2, other 1)"),
        (
            Loss("app", 3, as_of=NOW),
            "3 commits of app are lost as of 2026-11-29 02:01:20 +09:00; later writes are added",
        ),
        (Loss("app", 0, as_of=NOW), "0 commits of app are lost as of "),
        (Loss.everything("app"), "everything of app is lost"),
        (Loss.everything_since("app", THEN), "writes of app of the last 2 min are lost"),
        (Loss.everything_since("app", NOW + timedelta(seconds=5)), "writes of app of the last 0 s are lost"),
        (Loss.not_known("app", "its WAL cannot be read"), "the loss of app is unknown, because its WAL cannot be read"),
    ],
)
def test_the_words_of_a_loss(loss: Loss, text: str) -> None:
    with clock.use_zone(ZoneInfo("Asia/Tokyo")):
        assert text in loss.text


def test_a_part_that_loses_nothing_is_left_out_of_the_headline() -> None:
    effect = Effect("x", "y", (Loss("app"), Loss.everything_since("Redis", THEN)))
    assert str(effect) == "x; writes of Redis of the last 2 min are lost; no downtime; undo: y"
    assert losses_text((Loss("app"), Loss("Redis"))) == "nothing is lost"


def test_a_report_has_the_moment_and_every_part() -> None:
    report = Report("Full restore", "lab")
    report.loses(Loss("app"))
    report.loses(Loss.everything_since("Redis", THEN))
    assert report.facts["lost"] == "every write of Redis after 2026-11-28 16:59:10 +00:00 is lost"
    assert [loss["count"] for loss in report.as_json()["losses"]] == [0, None]


@pytest.mark.parametrize(
    ("confirmed", "found", "is_within"),
    [
        (Loss("app"), Loss("app"), True),
        (Loss("app"), Loss("app", 1), False),
        (Loss("app"), Loss.everything_since("app", THEN), False),
        (Loss("app"), Loss.not_known("app", "why"), False),
        (Loss.not_known("app", "why"), Loss("app", 7), True),
        (Loss.everything_since("app", THEN), Loss.everything_since("app", NOW), True),
        (Loss.everything_since("app", NOW), Loss.everything_since("app", THEN), False),
        (Loss.everything_since("app", THEN), Loss("app", 7), True),
        (Loss("app", 2), Loss("app", 3), False),
        (Loss("app", 2, as_of=THEN), Loss("app", 3, later=1), True),
        (Loss("app", 2, as_of=THEN), Loss("app", 3), False),
        (Loss("app", 2), Loss("app", 3, later=1), False),
        (Loss.everything_since("app", THEN), Loss.everything("app"), False),
        (Loss("app", 2), Loss.everything("app"), False),
        (Loss.everything("app"), Loss.everything_since("app", THEN), True),
        (Loss.everything("app"), Loss.everything("app"), True),
        (Loss.everything("app"), Loss.not_known("app", "why"), True),
    ],
)
def test_what_was_confirmed(confirmed: Loss, found: Loss, is_within: bool) -> None:
    assert found.is_within(confirmed) is is_within
    assert exceeded([confirmed], [found]) == ([] if is_within else [found])


def test_a_part_of_which_the_plan_said_nothing_may_lose_nothing() -> None:
    assert exceeded([], [Loss("Redis")]) == []
    assert exceeded([], [Loss("Redis", 1)]) == [Loss("Redis", 1)]
