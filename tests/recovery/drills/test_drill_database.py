"""The drill of a database failure: a primary with its disk lost, under clients that write."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.client.schemas.sorting import FlowRunSort

from flows.recovery.drills import control, detection
from flows.recovery.drills.drill import SCENARIOS, run_drill
from flows.recovery.drills.scenarios.database_failure import FOREIGN, PAUSED
from flows.recovery.postgres import findings
from flows.recovery.postgres.failover import postgres_failover
from runbook.errors import OpsError
from runbook.report import Report, Status
from runbook.wait import until
from tasks.postgres.replication.synchronous import address
from tests.fixtures.reports import rows as table
from tests.fixtures.reports import text_of as finding
from tests.recovery.conftest import System
from tests.recovery.drills.running import base_backup, begun, critical, environment, forget, hold, process, steady

NAME = "database_failure"
PLACES = (
    "drill: struck",
    "drill: decided",
    "failover: promoted",
    "rejoin: copied",
    "drill: replay paused",
    "drill: another cluster's standby",
)


@pytest.fixture(scope="module", autouse=True)
def verified(system: System) -> Iterator[None]:
    """A base backup first; at the end the server that was the primary is it again."""
    base_backup(system)
    before = address(environment(system).postgres)
    yield
    steady(system)
    if address(environment(system).postgres) != before:
        postgres_failover.fn(system.name, new_primary=before, confirm=system.name)


def seen(system: System) -> tuple[set[str], set[str | None]]:
    """The flows that the newest drill has launched, as Prefect knows them (other workers' labs share it), and the keys
    of the artifacts that it published itself."""
    ours = FlowRunFilter(name={"like_": f"run-drill {system.name} "})  # type: ignore[arg-type]
    with get_client(sync_client=True) as client:
        (drill,) = client.read_flow_runs(flow_run_filter=ours, sort=FlowRunSort.START_TIME_DESC, limit=1)
        found = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(parent_flow_run_id={"any_": [drill.id]})  # type: ignore[arg-type]
        )
        own = ArtifactFilter(flow_run_id={"any_": [drill.id]})  # type: ignore[arg-type]
        keys = {one.key for one in client.read_artifacts(artifact_filter=own)}
    return {run.name.split()[0] for run in found}, keys


def ledgers(report: Report) -> list[dict[str, int]]:
    """Of each client, the number in each row of its column."""
    rows = table(report, "Ledger")
    columns = range(1, len(rows[0]))
    return [{row[0]: int(row[column].split(" of ")[0].replace(",", "")) for row in rows} for column in columns]


def test_nothing_is_lost_every_phase_is_timed_and_a_sabotaged_standby_is_refused(system: System) -> None:
    before = environment(system).postgres.port
    incidents = environment(system).reports_directory / "incidents"
    earlier = sorted(incidents.glob("*"))
    report: Report = run_drill(system.name, NAME, participants=("山田", "佐藤"), confirm=system.name)
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert environment(system).postgres.port != before, "the other server is the primary"
    assert report.facts["participants"] == "山田, 佐藤"
    assert re.match(r"0 of [\d,]+ acknowledged writes lost, ", report.facts["RPO"])
    assert report.facts["detected by"].startswith(("database after", "application after"))
    assert [row[5] for row in table(report, "Phases (§8.4)")] == ["yes"] * 6
    assert [row[4] for row in table(report, "Phases (§8.4)")] == [f"{n} min" for n in (15, 30, 60, 60, 45, 30)]
    for ledger in ledgers(report):
        attempted, outcomes = ledger["attempted"], ("acknowledged", "refused", "not answered")
        assert attempted == sum(ledger[one] for one in outcomes), "every attempt is accounted for"
        assert ledger["acknowledged"] > 20
        assert ledger["lost"] == ledger["given up after the fault"] == ledger["unexpected rows"] == 0
    assert {row[1] for row in table(report, "Checks of phase 5")} == {"True"}
    controls = table(report, "Negative controls")
    assert [row[:2] for row in controls] == [(PAUSED, "postgres-failover"), (FOREIGN, "postgres-failover")]
    assert ["replay is not paused" in row[2] for row in controls] == [True, False]
    assert ["system identifier" in row[2] for row in controls] == [False, True]
    seconds = {row[0]: float(row[1]) for row in table(report, "The drill's seconds")}
    assert min(seconds.values()) > 0
    assert sum(seconds.values()) < report.seconds + 0.1, "no second is counted twice"
    boxes = {row[2]: row[1] for row in table(report, "Training checklist (§8.4)")}
    assert len(boxes) == 31
    assert boxes["Log-in works"] == boxes["The monitoring alert fired"] == "☑"
    assert boxes["Redis data was restored"] == boxes["Improvements are decided"] == "☐"
    called = (
        "The on-call engineer responded",
        "The escalation worked",
        "The incident was declared",
        "Stakeholders were notified",
    )
    assert {boxes[box] for box in called} == {"☑"}, "by the real escalation, on the drill's own channel"
    assert "山田 (run-drill)" in report.facts["acknowledged"]
    assert sorted(incidents.glob("*")) == earlier, "nobody's phone rings"
    assert system.healthy()
    assert finding(report, "healthy at the end").startswith("OK")
    launched, published = seen(system)
    assert launched >= {"postgres-failover", "rejoin-standby", "backup-cluster"}
    assert published >= {"dr-drill", "drill-control-postgresql-failover"}
    assert "postgresql-failover" not in published, "nobody reads a control's refusal as the newest failover"
    assert report.path
    page = report.path.with_suffix(".html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "山田" in page
    assert not re.search(r"""(src|href)=["']?http""", page), "nothing is loaded from elsewhere"
    assert system.sql("SELECT to_regclass('interview_ops_drill')") == [(None,)]


@pytest.mark.parametrize(("check", "accepted"), [("_judge_replay", PAUSED), ("_judge_identity", FOREIGN)])
def test_a_runbook_that_would_promote_a_sabotaged_standby_makes_the_drill_critical(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str, accepted: str
) -> None:
    """Only that one check is taken from the runbook: everything else of it is as it was."""
    monkeypatch.setattr(findings, check, lambda report, pair: None)
    drill = begun(system, NAME, tmp_path)
    try:
        control.report_results(drill.report, SCENARIOS[NAME].control(drill))
    finally:
        forget(system)
    assert drill.report.status is Status.CRITICAL
    assert finding(drill.report, "negative controls").startswith(f"CRITICAL postgres-failover: {accepted} ")


def test_no_negative_control_at_all_is_critical() -> None:
    report = Report("DR drill", "lab")
    control.report_results(report, [])
    assert report.status is Status.CRITICAL


def test_what_is_not_disposable_is_not_broken(system: System) -> None:
    before = system.untouched()
    env = environment(system)
    with env.model_copy(update={"disposable": False}).stands_in():
        assert "is not disposable" in critical(system, NAME).sentence()
    assert system.untouched() == before


def test_a_plan_breaks_nothing_and_a_wrong_confirm_neither(system: System) -> None:
    before = system.untouched()
    report = hold(system, NAME, confirm="")
    assert report.status is Status.PLANNED
    steps = ["break", "recover", "return to the steady state", "sabotage a copy", "clean up"]
    assert [step.step for step in report.plan_steps] == steps
    with pytest.raises(OpsError, match="is not the environment's name"):
        hold(system, NAME, confirm="production")
    assert system.untouched() == before


def test_a_system_that_is_not_well_is_not_broken_further(system: System, tmp_path: Path) -> None:
    env = environment(system)
    services, standby = env.services, env.standby.service
    services.stop(standby)
    until(lambda: detection.replication(env, tmp_path), what="the break of its stream", seconds=120)
    before = system.untouched()
    try:
        report = critical(system, NAME)
        assert "not streaming: standby" in finding(report, "steady state: replication")
        assert system.untouched() == before
    finally:
        services.start(standby)
        steady(system)


def killed_and_launched_again(system: System, place: str) -> None:
    done = process(system, NAME, OPS_FAILPOINT=place)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    report = hold(system, NAME)
    assert report.status is Status.WARN, report.sentence()
    assert "half-done drill was ended" in report.outcome
    assert NAME in finding(report, "an earlier drill did not end")
    assert finding(report, "healthy at the end").startswith("OK")
    for ledger in ledgers(report):
        assert ledger["lost"] == ledger["unexpected rows"] == 0
    assert system.healthy()
    assert system.log_in()
    beside = [path.name for node in environment(system).nodes() for path in Path(node.data_directory).parent.iterdir()]
    assert not [name for name in beside if name.endswith(".foreign")]


@pytest.mark.soak
def test_killed_when_the_server_is_lost_it_is_healed_by_the_next_launch(system: System) -> None:
    killed_and_launched_again(system, "fault: data directory away")


@pytest.mark.soak
@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_it_is_healed_by_the_next_launch(system: System, place: str) -> None:
    killed_and_launched_again(system, place)
