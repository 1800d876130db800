"""The recovery board: what it says, red first, for all environments, and nothing of it is loaded or run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import pytest
from prefect.artifacts import Artifact
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.variables import Variable
from pydantic import TypeAdapter

from flows.recovery.objectives import board_page
from flows.recovery.objectives.board import ARTIFACT
from flows.recovery.objectives.check import check_recovery_objectives
from tasks.recovery_points import standing
from tasks.recovery_points.standing import BackupAge, LastDrill, Recoverable, RecoveryStanding
from tests.routine.checklist.waiting import Waiting, waiting
from tests.runbook.processes import prefect_server

__all__ = ["prefect_server"]

NOW = datetime(2026, 11, 29, 3, 0, tzinfo=UTC)
GOOD = Recoverable(
    "database",
    "green",
    "",
    NOW - timedelta(minutes=5),
    300.0,
    421.0,
    "point in time (base_1)",
    "restore-to-point",
    "2026-11-28T02:00:00+00:00",
    "at most the writes of app of the last 5 min are lost",
)
DRILL = LastDrill(NOW - timedelta(days=20), "OK", "database_failure", 38.5)


def of(
    name: str, *resources: Recoverable, drill: LastDrill | None = DRILL, checked: datetime = NOW
) -> RecoveryStanding:
    ages = (BackupAge("postgres", NOW, NOW),)
    return RecoveryStanding(
        name, "本番 <b>", "Asia/Tokyo", checked, 3600.0, 14400.0, resources, ages, drill, NOW + timedelta(days=70)
    )


class Page(HTMLParser):
    """Its tags in order, its text, and whatever it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.text, self.loads = list[str](), "", list[str]()
        self.feed(text)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [str(value) for name, value in attrs if name in ("src", "href")] + [tag] * (tag == "script")
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_red_comes_first_and_every_question_is_answered() -> None:
    lost = replace(
        GOOD,
        resource="redis",
        state="red",
        why="server lost: writes of Redis of the last 9 h are lost; the newest data is 9 h 00 min old, RPO 1 h 00 min",
        loss_seconds=32400.0,
        option="backup (<img src=x onerror=alert(1)>)",
        proven="",
    )
    found = [
        of("alpha", GOOD),
        of("beta", GOOD, drill=None),
        of("gamma", GOOD, lost),
        of("delta", GOOD, checked=NOW - timedelta(hours=2)),
        of("epsilon", GOOD, drill=replace(DRILL, status="CRITICAL")),
    ]
    text = board_page.html(found, NOW)
    page = Page(text)
    assert page.loads == []
    assert [one.environment for one in board_page.ordered(found, NOW)] == ["delta", "gamma", "beta", "epsilon", "alpha"]
    positions = [page.text.index(name) for name in ("gamma", "beta", "alpha")]
    assert positions == sorted(positions)
    assert "✗ 2 red, ▲ 2 yellow, ✓ 1 green" in page.text
    assert "not checked since 2026-11-29 10:00:00+09:00: run check-recovery-objectives" in page.text
    gamma = page.text[page.text.index("gamma") :]
    assert gamma.index("✗ redis") < gamma.index("✓ database"), "red first within an environment too"
    for told in (
        "2026-11-29 11:55:00+09:00",
        "at most the writes of app of the last 5 min are lost",
        "7 min 01 s",
        "RPO 1 h 00 min, RTO 4 h 00 min",
        "point in time (base_1): restore-to-point",
        "2026-11-28 11:00:00+09:00",
        "database_failure OK",
        "users served after 38.5 s",
        "2027-02-07 12:00:00+09:00",
        "no drill has succeeded",
    ):
        assert told in page.text, told
    assert "<img src=x onerror=alert(1)>" in page.text, "as text"
    assert "prefers-color-scheme:dark" in text
    assert "<img" not in board_page.markdown(found, NOW)


@pytest.fixture
def place(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Waiting]:
    with waiting(tmp_path_factory.mktemp("board"), []) as made, temporary_settings({PREFECT_API_URL: made.runs.api}):
        yield made


def test_the_artifact_has_every_environment_that_was_checked(place: Waiting) -> None:
    other = f"{place.name}-other"
    record = TypeAdapter(RecoveryStanding).dump_json(of(other, GOOD, checked=datetime.now(UTC))).decode()
    Variable.set(standing.VARIABLE + other, record)
    try:
        check_recovery_objectives(place.name)
        own = standing.read(place.reports)
        assert own
        assert own.environment == place.name
        artifact = Artifact.get(ARTIFACT)
        assert artifact
        shown = str(artifact.data)
        assert other in (place.reports / "recovery-board.html").read_text()
        assert shown.count(f"| {other} |") == 1
    finally:
        for name in (other, place.name):
            Variable.unset(standing.VARIABLE + name)
