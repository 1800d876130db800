"""What happened in an environment and what goes on there, as Prefect knows it: failed runs with their reports, running
ones, and who holds the lock."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort
from prefect.exceptions import ObjectNotFound

from runbook.errors import RunbookFailed
from runbook.guard.brief import asked_briefly
from runbook.guard.holder import LockHolder, remembered
from runbook.guard.lease import limit_name
from runbook.kinds import probe
from runbook.page.address import ui_address
from tasks.prefect.client import prefect_client

FAILED = (StateType.FAILED, StateType.CRASHED)
UNFINISHED = (StateType.RUNNING, StateType.PENDING, StateType.PAUSED, StateType.CANCELLING)
BOARD = "recovery-board"
OF_PREFECT = "Flow run encountered an exception: "
PAGE = 200


@dataclass(frozen=True)
class RecentRun:
    """A run: when it began (None: not yet), its state with its message, and the id of its report's artifact ("": it has
    none)."""

    id: str
    name: str
    started: datetime | None
    state: str
    message: str
    report: str = ""

    @property
    def page_address(self) -> str:
        """Of its page in the Prefect UI; "" where nobody knows the address of the UI."""
        return ui_address(f"runs/flow-run/{self.id}")

    @property
    def report_address(self) -> str:
        """Of its report there; "" where it has none."""
        return ui_address(f"artifacts/artifact/{self.report}") if self.report else ""


@dataclass(frozen=True)
class Activity:
    """The newest failed runs, the runs that have not ended, and who holds the environment's lock (None: nobody)."""

    failed: tuple[RecentRun, ...]
    unfinished: tuple[RecentRun, ...]
    holder: LockHolder | None


@probe
def read_activity(environment: str, since: datetime, most: int, own: str = "") -> Activity:
    """What failed since then (`most` runs at most) and what goes on, but for the run with the id `own`.

    Raises:
        Unreachable: Prefect does not answer.
    """
    began = FlowRunFilterStartTime.model_validate({"after_": since})
    with asked_briefly(), prefect_client() as client:
        failed = _newest(client, environment, FlowRunFilter(state=_state(FAILED), start_time=began))[:most]
        unfinished = _newest(client, environment, FlowRunFilter(state=_state(UNFINISHED)))
        reports = _reports(client, failed)
        locked = _is_locked(client, environment)
    return Activity(
        tuple(_recent(run, reports.get(str(run.id), "")) for run in failed),
        tuple(_recent(run) for run in unfinished if str(run.id) != own),
        remembered(environment) if locked else None,
    )


def _state(types: Sequence[StateType]) -> FlowRunFilterState:
    return FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types)))


def _newest(client: SyncPrefectClient, environment: str, wanted: FlowRunFilter) -> list[FlowRun]:
    """Of the last `PAGE` runs of all environments: their parameters name it, also without a deployment."""
    runs = client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.START_TIME_DESC, limit=PAGE)
    return [run for run in runs if run.parameters.get("environment") == environment]


def _reports(client: SyncPrefectClient, runs: Collection[FlowRun]) -> dict[str, str]:
    """Run → its last report: a runbook inside it reports earlier."""
    if not runs:
        return {}
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id for run in runs]))
    found = client.read_artifacts(artifact_filter=wanted, sort=ArtifactSort.UPDATED_DESC, limit=PAGE)
    return {str(one.flow_run_id): str(one.id) for one in reversed(found) if one.key != BOARD}


def _is_locked(client: SyncPrefectClient, environment: str) -> bool:
    try:
        return client.read_global_concurrency_limit_by_name(limit_name(environment)).active_slots > 0
    except ObjectNotFound:  # before its first run
        return False


def _recent(run: FlowRun, report: str = "") -> RecentRun:
    state = run.state
    name, message = (state.name or state.type.value, state.message or "") if state else ("unknown", "")
    told = " ".join(message.split()).removeprefix(OF_PREFECT).removeprefix(f"{RunbookFailed.__name__}: ")
    started = datetime.fromtimestamp(run.start_time.timestamp(), UTC) if run.start_time else None
    return RecentRun(str(run.id), run.name, started, name, told, report)
