"""Whether somebody watches an environment (`python -m flows.monitoring.serve`): who does not look raises no alarm."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterStartTime
from prefect.client.schemas.sorting import FlowRunSort

from blocks.environment import Environment
from deployments.doctor.line import DoctorLine, expect
from flows.monitoring.metrics import watch_metrics
from flows.monitoring.serve import EVERY_SECONDS, REPORT_SECONDS
from tasks.monitoring.state import directory_of, load

ROUNDS = timedelta(seconds=3 * EVERY_SECONDS)
REPORTS = timedelta(seconds=REPORT_SECONDS + 5 * EVERY_SECONDS)
MOST_RUNS = 50
TODO = "on one host: systemctl enable --now interview-ops-watcher (docs/production.md); else journalctl -u it"


def look_at_watcher(env: Environment) -> Iterator[DoctorLine]:
    """In production, or where the TOML says that a watcher takes the frequent checks: a round within the last minutes,
    in this host's report folder; or, where this host's has none, its hourly run in Prefect."""
    if env.tier != "production" and not env.has("monitoring.watcher"):
        return
    reports, now = env.reports_directory, datetime.now(UTC)
    if last := load(reports).at:
        todo = f"{TODO}; if another host watches by now, remove {directory_of(reports)} here"
        yield expect(now - last <= ROUNDS, f"last round of the monitoring was at {last:%Y-%m-%d %H:%M:%S} UTC", todo)
    else:
        yield expect(_has_reported(env, now - REPORTS), "the monitoring runs, here or on another host", TODO)


def _has_reported(env: Environment, since: datetime) -> bool:
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[watch_metrics.name])),
            flow_run_filter=FlowRunFilter(start_time=FlowRunFilterStartTime(after_=since)),  # type: ignore[arg-type]
            sort=FlowRunSort.START_TIME_DESC,
            limit=MOST_RUNS,
        )
    return any(run.parameters.get("environment") == env.name for run in runs)
