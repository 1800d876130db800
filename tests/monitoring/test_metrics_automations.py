"""What Prefect does about a metric: a run of the table's flow, with its parameters, once an hour; told at least once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import run_flow_sync

from deployments import automations
from deployments.triggers import metrics
from flows.monitoring.rounds import payload, take_round, tell_watching
from flows.monitoring.table import ALARMS
from runbook.errors import Unreachable
from runbook.guard.permit import Act
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.wait import until
from tasks.monitoring import events, state
from tasks.monitoring.hysteresis import AlarmState
from tests.fixtures import forked
from tests.fixtures.prefect_client import login
from tests.monitoring.watched import NAME, Backend, Watched, backend, small_postgres, small_redis, watched
from tests.runbook.processes import prefect_server, system
from tests.runbook.system import EFFECT, System

__all__ = ["backend", "prefect_server", "small_postgres", "small_redis", "system", "watched"]
ROOT = Path(__file__).resolve().parents[2]
ONE_ROUND = """
from datetime import datetime
import sys
from blocks.config import toml
from flows.monitoring.rounds import take_round
take_round(toml.environment("watched"), datetime.fromisoformat(sys.argv[1]))
"""


@flow(name="escalate")
def escalate(environment: str, severity: str = "normal", what: str = "", owner: str = "", key: str = "") -> None:
    """Stands for the flow of 付録C: its runs are only looked at."""


@flow(name="clear-cache", validate_parameters=False)
def clear_cache(system: System, prefixes: tuple[str, ...] = (), confirm: str = "") -> Report:
    """Stands for the flow of §2.2: asks for a permit as that does."""
    with runbook("Clear cache", system, confirm) as report:
        report.permit(Act("unlink", ",".join(prefixes)), effect=EFFECT)
        report.outcome = "cleared"
    return report


@flow
def other(environment: str) -> None:
    """Any other flow of the table."""


@pytest.fixture
def deployed(prefect_server: str, watched: Watched) -> Iterator[dict[str, DeploymentFilter]]:
    """The flows of the table as deployments of the environment, and its automations."""
    made: dict[str, DeploymentFilter] = {}
    with get_client(sync_client=True) as client:
        for name in sorted({deed.flow for deed in metrics.deeds(watched.environment)}):
            chosen = {"escalate": escalate, "clear-cache": clear_cache}.get(name, other.with_options(name=name))
            made[name] = _deployed(client, chosen)
    automations.register(NAME, causes=[metrics.automations])
    before = _triggers()
    automations.register(NAME, causes=[metrics.automations])
    assert _triggers() == before, "registered again, once an hour would be twice"
    yield made
    automations.remove(NAME)
    with get_client(sync_client=True) as client:
        for found in made.values():
            assert found.id
            assert found.id.any_
            client.delete_deployment(found.id.any_[0])


def _triggers() -> list[str]:
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/automations/filter", json={"limit": 200}).json()
    return sorted(one["trigger"]["id"] for one in found if one["name"].endswith(f"-{NAME}"))


def _deployed(client: SyncPrefectClient, chosen: object) -> DeploymentFilter:
    identity = client.create_deployment(client.create_flow(chosen), NAME)  # type: ignore[arg-type]
    return DeploymentFilter(id=DeploymentFilterId(any_=[identity]))


def runs(of: DeploymentFilter) -> list[FlowRun]:
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(deployment_filter=of)


def tell(
    watched: Watched,
    metric: str,
    value: float | None,
    told: str = "seeded",
    kind: str = "exceeded",
    again: bool = False,
) -> None:
    standing = AlarmState(exceeded=True, value=value, told=told)
    now = datetime.now(UTC)
    assert (
        events.send([events.event(kind, payload(watched.environment, ALARMS[metric], standing), now, again=again)])
        == ""
    )


def one(of: DeploymentFilter) -> FlowRun:
    (found,) = until(lambda: runs(of), what="the automation's run", seconds=120)
    return found


def test_each_row_starts_its_flow_with_its_parameters_once(
    watched: Watched, deployed: dict[str, DeploymentFilter]
) -> None:
    for _ in range(3):
        tell(watched, "redis.memory.used_ratio", 0.95)
        tell(watched, "api.error_ratio", 0.4, "8 of 20 requests failed")
    tell(watched, "redis.memory.used_ratio", 0.5, kind="recovered")
    tell(watched, "host.cpu.used_ratio", 0.99)
    tell(watched, "postgres.connections.used_ratio", None, "it does not answer")
    cleared = one(deployed["clear-cache"])
    assert cleared.parameters == {"environment": NAME, "prefixes": ["cache:"]}
    assert cleared.created_by
    assert cleared.created_by.display_value == f"clear-cache-{NAME}"
    assert one(deployed["advise-scaling"]).parameters == {"environment": NAME, "part": "cpu"}
    assert one(deployed["diagnose-database"]).parameters == {"environment": NAME}
    _escalated(deployed["escalate"])
    tell(watched, "host.disk.used_ratio", 0.9)  # what was told before it has been handled when this is
    one(deployed["clean-logs"])
    assert [len(runs(deployed[name])) for name in ("clear-cache", "advise-scaling", "clean-logs")] == [1, 1, 1]
    assert len(runs(deployed["report-token-usage"])) == 0


def _escalated(of: DeploymentFilter) -> None:
    def all_of_them() -> dict[str, dict[str, object]]:
        told = {str(run.parameters["key"]): run.parameters for run in runs(of)}
        return told if len(told) >= 4 else {}

    told = until(all_of_them, what="the escalations", seconds=120)
    assert told.keys() == {
        f"{name} {NAME}"
        for name in (
            "api.error_ratio",
            "postgres.connections.used_ratio",
            "redis.memory.used_ratio",
            "host.cpu.used_ratio",
        )
    }, "clear-cache only planned, and advise-scaling only advised: people are called at once"
    assert told[f"api.error_ratio {NAME}"] == {
        "environment": NAME,
        "severity": "severe",
        "owner": "SRE",
        "key": f"api.error_ratio {NAME}",
        "what": "API error rate (metric api.error_ratio): 40 % (limit 5 %): 8 of 20 requests failed",
    }
    assert told[f"postgres.connections.used_ratio {NAME}"]["severity"] == "severe"


def test_what_did_not_help_and_a_watcher_that_says_nothing_are_escalated(
    watched: Watched, deployed: dict[str, DeploymentFilter]
) -> None:
    tell(watched, "host.disk.used_ratio", 0.9)
    one(deployed["clean-logs"])
    assert runs(deployed["escalate"]) == [], "it is cleaned, as unattended allows, and nobody is woken yet"
    tell(watched, "host.disk.used_ratio", 0.91, again=True)
    assert one(deployed["escalate"]).parameters["key"] == f"host.disk.used_ratio {NAME}"

    with get_client(sync_client=True) as client:
        (of_half_an_hour,) = client.read_automations_by_name(f"watching-silent-{NAME}")
        quick = metrics.silent(client, NAME, timedelta(seconds=10))
        client.update_automation(of_half_an_hour.id, quick)
    watched.begin = datetime.now(UTC)  # Prefect takes its events' time for the time
    watched.round()
    tell_watching(watched.environment, watched.at(1))
    assert state.load(watched.reports).watching == watched.at(0), "not every minute"

    def silent() -> list[dict[str, object]]:
        return [run.parameters for run in runs(deployed["escalate"]) if run.parameters["key"] == f"watching {NAME}"]

    (told,) = until(silent, what="the escalation of the silence", seconds=120)
    assert told["severity"] == "severe"


def test_an_automation_s_run_does_only_what_the_environment_pre_authorised(
    watched: Watched, deployed: dict[str, DeploymentFilter], system: System
) -> None:
    tell(watched, "redis.memory.used_ratio", 0.95)
    run = one(deployed["clear-cache"])
    named = System(system.reports_directory, system.name, unattended=("clear-cache",))
    given = {"system": system, "prefixes": ("cache:",)}
    report = run_flow_sync(clear_cache, flow_run=run, parameters=given)
    assert isinstance(report, Report)
    assert report.status is Status.PLANNED, "nobody has allowed it"
    assert report.facts["launched by"] == f"the automation clear-cache-{NAME}"
    with get_client(sync_client=True) as client:
        again = client.read_flow_run(run.id).model_copy(update={"state": None})
    assert clear_cache(named, prefixes=("cache:",)).status is Status.PLANNED, "a person gets the plan"
    _pending(run)
    report = run_flow_sync(clear_cache, flow_run=again, parameters=given | {"system": named})
    assert isinstance(report, Report)
    assert report.status is Status.OK
    assert report.outcome == "cleared"


def _pending(run: FlowRun) -> None:
    from prefect.states import Pending

    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, Pending(), force=True)


def told_of(server: str, resource: str) -> list[str]:
    """Events of a resource that Prefect has."""
    body = {"filter": {"resource": {"id": [resource]}, "order": "ASC"}}
    found = httpx.post(f"{server}/events/filter", json=body, auth=login(), timeout=120)
    if found.status_code != 200:
        raise Unreachable(found.text[:200])
    return [event["event"] for event in found.json()["events"]]


def test_what_happened_while_prefect_was_down_or_the_watcher_died_is_told_later(
    watched: Watched, backend: Backend, prefect_server: str
) -> None:
    backend.status = 503
    dead = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", "PYTHONPATH": str(ROOT)}
    for minute in range(3):
        watched.minute = minute
        watched.requests(20)
        if minute < 2:
            take_round(watched.environment, watched.at(minute))
    argv = ["-c", ONE_ROUND, watched.at(2).isoformat()]
    killed = forked.run(argv, {**dead, "OPS_FAILPOINT": "before send"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (kept,) = state.load(watched.reports).unsent
    argv[-1] = watched.at(3).isoformat()
    forked.run(argv, dead).check_returncode()
    assert state.load(watched.reports).unsent == [kept], "Prefect is down: it is kept"
    watched.minute = 3
    found = watched.round()
    assert (found.unsent, found.problem) == (0, "")
    resource = f"ops.metric.{NAME}.api.error_ratio"
    until(lambda: "ops.metric.exceeded" in told_of(prefect_server, resource), what="the event", seconds=120)


def test_two_that_watch_take_turns(watched: Watched) -> None:
    argv = ["-c", ONE_ROUND, watched.begin.isoformat()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_API_URL": ""}
    both = [forked.launch(argv, environment, capture=False) for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    kept = state.load(watched.reports)
    assert {one.against for one in kept.standings.values()} <= {0, 1}
    (lines,) = state.directory_of(watched.reports).glob("day-*.jsonl")
    assert len(lines.read_text().splitlines()) == 1, "the second had nothing to do"
