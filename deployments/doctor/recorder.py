"""Whether Prefect records the tasks of flow runs (its task-run recorder): where it does not, a run's graph is empty.

Tasks reach the server as events. The recorder of Prefect 3.9.1 writes them one after the other; an event of a flow run
that is not in its database fails, and is tried again six times before it is dropped. Its server's log then says
`task_run_recorder - Error flushing 1 events`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from prefect.client.orchestration import SyncPrefectClient, get_client

from deployments.doctor.line import DoctorLine, prefer

SINCE = timedelta(hours=1)
PATIENCE = timedelta(minutes=1)
"""What is younger may still be on its way."""
PAGES = 10
"""Of 50 events each, the newest first: as many as Prefect's API gives at once."""
_UNKNOWN = (
    "delete no run before it ends, and let no process use two Prefect servers: such events delay the tasks of every run"
)
_BEHIND = (
    "set PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL=1 on the server, and search its log for "
    "task_run_recorder"
)


def look_at_recorder() -> Iterator[DoctorLine]:
    """The newest tasks of the last hour belong to flow runs of this server, and each such run has tasks."""
    now = datetime.now(UTC)
    with get_client(sync_client=True) as client:
        runs = _runs_with_tasks(client, now - SINCE, now - PATIENCE)
        known = _ids(client, "flow_runs", {"flow_runs": {"id": {"any_": sorted(runs)}}})
        empty = [run for run in sorted(known) if not _ids(client, "task_runs", _one_task_of(run))]
    unknown, of_all = sorted(runs - known), f"of {len(runs)} flow runs with tasks in the last hour"
    yield prefer(not unknown, f"{of_all} {len(unknown)} are not in this server's database{_named(unknown)}", _UNKNOWN)
    yield prefer(not empty, f"{of_all} {len(empty)} have no recorded task{_named(empty)}", _BEHIND)


def _runs_with_tasks(client: SyncPrefectClient, since: datetime, until: datetime) -> set[str]:
    """Flow runs of the newest events of tasks."""
    wanted = {
        "event": {"prefix": ["prefect.task-run."]},
        "order": "DESC",
        "occurred": {"since": since.isoformat(), "until": until.isoformat()},
    }
    page = client.request("POST", "/events/filter", json={"filter": wanted}).json()
    events = list(page["events"])
    for _ in range(PAGES - 1):
        if not (next_page := page["next_page"]):
            break
        page = client.request("GET", "/events/filter/next", params=dict(parse_qsl(urlsplit(next_page).query))).json()
        events += page["events"]
    return {run for event in events if (run := _run_of(event["related"]))}


def _run_of(related: Iterable[dict[str, Any]]) -> str:
    """The id of the flow run that an event names; empty where it names none (a task on its own)."""
    resources = (one["prefect.resource.id"] for one in related if one.get("prefect.resource.role") == "flow-run")
    return next((resource.removeprefix("prefect.flow-run.") for resource in resources), "")


def _one_task_of(run: str) -> dict[str, Any]:
    return {"flow_runs": {"id": {"any_": [run]}}, "limit": 1}


def _ids(client: SyncPrefectClient, what: str, wanted: dict[str, Any]) -> set[str]:
    answer = client.request("POST", f"/{what}/filter", json=wanted)  # type: ignore[arg-type]
    return {str(one["id"]) for one in answer.json()}


def _named(runs: list[str]) -> str:
    return f" ({', '.join(runs[:3])}{', …' if len(runs) > 3 else ''})" if runs else ""
