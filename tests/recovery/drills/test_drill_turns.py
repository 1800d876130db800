"""Where drills of an environment take place, and whose turn it is: what can be told before anything runs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows.recovery.drills import past_drills
from flows.recovery.drills.drill import SCENARIOS, run_drill
from flows.recovery.drills.summary import MEASURED
from runbook.errors import OpsError, RunbookFailed
from runbook.files import chain
from runbook.report import Report
from tests.fixtures.logfiles import NAME

BEGIN = datetime(2026, 1, 15, 4, tzinfo=UTC)
OWN = "trial-drill"


@pytest.fixture
def production(logs: Path) -> Environment:
    """One that nobody may break."""
    return Environment.find(NAME)


def elsewhere(production: Environment, tmp_path: Path, *parts: str, **said: object) -> Environment:
    """The disposable one."""
    changed = {"name": OWN, "disposable": True, "reports": str(tmp_path / "drill"), **said}
    slugs = {part: f"type/{part}" for part in parts}
    return production.model_copy(update={**changed, "slugs": slugs})


def held(env: Environment, quarter: int, scenario: str) -> None:
    """A drill of the past."""
    at = BEGIN + timedelta(days=91 * quarter)
    report = Report("DR drill", env.name, started=at, finished=at + timedelta(hours=4))
    if scenario:
        report.table(MEASURED, ("measure", "value"), [("scenario", scenario), ("rto_seconds", "61.20")])
    chain.append(env.reports_directory, "dr-drill", report.as_json())


def turn(env: Environment) -> str:
    return past_drills.next_scenario(Report("DR drill", env.name), env, SCENARIOS)


def drilled(env: Environment) -> Report:
    with env.stands_in(), pytest.raises(RunbookFailed) as caught:
        run_drill.fn(NAME, "next")
    return caught.value.report


def test_the_scenarios_come_in_turn_and_those_that_cannot_be_held_are_left_out(
    production: Environment, tmp_path: Path
) -> None:
    whole = elsewhere(production, tmp_path, "standby", "endpoint")
    for quarter, scenario in enumerate(SCENARIOS):
        assert turn(whole) == scenario
        held(whole, quarter, scenario)
        held(whole, quarter, "")  # a plan, or one that was refused: it counts as none
    assert turn(whole) == "database_failure", "from the beginning again"
    alone = whole.model_copy(update={"slugs": {}})
    assert turn(alone) == "data_corruption"
    report = Report("DR drill", alone.name)
    past_drills.next_scenario(report, alone, SCENARIOS)
    assert report.pins["scenario"] == "data_corruption", "what is confirmed is what was planned"
    assert report.facts["not possible here"] == "database_failure: no standby; region_outage: no endpoint"


def test_production_s_drill_is_held_in_the_environment_that_it_names(production: Environment, tmp_path: Path) -> None:
    production.drill_environment = OWN
    drill = elsewhere(production, tmp_path)
    with drill.stands_in():
        report = drilled(production)
    assert report.environment == OWN
    assert report.facts["held in"] == f"{OWN}, the drill_environment of {NAME}"
    assert report.facts["next scenario"] == "data_corruption, after none yet"
    assert list((tmp_path / "drill").glob("*-dr-drill.json")), "it is filed where it was held"


def test_without_one_it_is_refused_and_so_is_one_that_is_not_disposable(
    production: Environment, tmp_path: Path
) -> None:
    assert f"{NAME} is not disposable" in drilled(production).sentence()
    assert "set drill_environment" in drilled(production).sentence()
    production.drill_environment = OWN
    with elsewhere(production, tmp_path, disposable=False).stands_in():
        assert f"{OWN} is not disposable" in drilled(production).sentence()


def test_one_on_the_same_server_is_refused(production: Environment, tmp_path: Path) -> None:
    """As when its TOML was copied, and its addresses never changed."""
    production.drill_environment = OWN
    redis = Redis(host="db1", port=6379)
    shared = production.with_parts({**production.parts(), "redis": redis})
    shared.slugs = {**shared.slugs, "redis": "type/redis"}
    own = elsewhere(production, tmp_path, "redis").with_parts({"redis": redis})
    with shared.stands_in(), own.stands_in(), pytest.raises(OpsError, match="both use Redis at db1:6379"):
        run_drill.fn(NAME, "next")
