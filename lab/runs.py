"""Flow runs of deployments, launched and watched through Prefect's REST API: the lab imports no flow."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx

from lab.progress import Tell, silent
from runbook.errors import OpsError, Unreachable
from runbook.wait import until

ANSWER_SECONDS = 120.0
POLL_SECONDS = 0.5
PAGE = 200
_NOISE = (
    *("Beginning flow run", "Finished in state", "Created task run", "View at ", "Task run failed with exception"),
    *("Running 1 deployment", "Executing deployment", "Deployment step", "All deployment steps"),
)


@dataclass(frozen=True)
class Run:
    """A flow run that ended. `seconds` are from its launch to its end, the start of its process included."""

    id: str
    name: str
    state: str
    message: str
    seconds: float
    lines: tuple[str, ...] = field(repr=False)

    @property
    def completed(self) -> bool:
        return self.state == "COMPLETED"


@dataclass(frozen=True)
class Runs:
    """Launches runs on the environment's worker. `api`, `ui` and `auth` as in `python -m lab status --json`."""

    api: str
    ui: str
    auth: str = field(repr=False)

    def run(self, deployment: str, parameters: Mapping[str, object], tell: Tell = silent, seconds: float = 600) -> Run:
        """Launch a deployment (`flow/name`) and wait for the end of its run, telling what it does meanwhile.

        Raises:
            OpsError: there is no such deployment, or the run did not end within `seconds`.
        """
        started = time.monotonic()
        launched = self._launch(deployment, parameters)
        follower = _Follower(self, launched["id"], tell)
        try:
            ended = until(follower.look, what=f"the end of {deployment}", seconds=seconds, every_seconds=POLL_SECONDS)
        except Unreachable as error:
            last = "\n".join(follower.lines[-10:])
            raise OpsError(f"{error.message}; its last lines:\n{last}", self.link(launched["id"])) from error
        follower.tell_the_rest()
        state = ended["state"]
        return Run(
            launched["id"],
            ended["name"],
            state["type"],
            state.get("message") or "",
            time.monotonic() - started,
            tuple(follower.lines),
        )

    def link(self, run: str) -> str:
        """The run's page."""
        return f"{self.ui}/runs/flow-run/{run}"

    def artifact_links(self, run: str) -> list[str]:
        """The pages of the reports that the run left."""
        body = {"artifacts": {"flow_run_id": {"any_": [run]}, "type": {"any_": ["markdown"]}}}
        return [f"{self.ui}/artifacts/artifact/{found['id']}" for found in self.call("POST", "/artifacts/filter", body)]

    def call(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Any:
        """One request, repeated while the server is busy (its SQLite answers 503 under load).

        Raises:
            OpsError: it refuses.
            Unreachable: it does not answer in time.
        """

        user, _, password = self.auth.partition(":")

        def answer() -> httpx.Response:
            try:
                found = httpx.request(
                    method, f"{self.api}{path}", json=body, auth=(user, password), timeout=30, trust_env=False
                )
            except httpx.HTTPError as error:
                raise Unreachable(f"{type(error).__name__}") from None
            if found.status_code >= 500:
                raise Unreachable(f"it answers {found.status_code}")
            return found

        found = until(lambda: (answer(),), what="an answer of the Prefect server", seconds=ANSWER_SECONDS)[0]
        if found.is_error:
            raise OpsError(f"Prefect refuses {method} {path}: {found.status_code} {found.text[:200]}")
        return found.json()

    def _launch(self, deployment: str, parameters: Mapping[str, object]) -> dict[str, Any]:
        found = self.call("GET", f"/deployments/name/{deployment}")
        key = uuid.uuid4().hex  # repeated after a lost answer, it launches once
        body = {"parameters": dict(parameters), "state": {"type": "SCHEDULED"}, "idempotency_key": key}
        launched: dict[str, Any] = self.call("POST", f"/deployments/{found['id']}/create_flow_run", body)
        return launched


class _Follower:
    """What a run does, line by line, each told once."""

    def __init__(self, runs: Runs, run: str, tell: Tell) -> None:
        self.runs, self.run, self.tell = runs, run, tell
        self.lines: list[str] = []
        self._tasks: set[str] = set()
        self._logged = 0

    def look(self) -> dict[str, Any]:
        """The run when it ended, empty until then; tells what is new."""
        found: dict[str, Any] = self.runs.call("GET", f"/flow_runs/{self.run}")
        self._tell_new()
        ended = found["state"] and found["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        return found if ended else {}

    def tell_the_rest(self) -> None:
        """Log lines arrive in batches: the last ones after the run's end."""
        with contextlib.suppress(Unreachable):
            until(self._tell_new, what="the last lines", seconds=2, every_seconds=POLL_SECONDS)

    def _tell_new(self) -> int:
        lines = sorted([*self._ended_tasks(), *self._new_lines()])
        for _, text in lines:
            self.lines.append(text)
            self.tell(text)
        return len(lines)

    def _ended_tasks(self) -> Iterator[tuple[datetime, str]]:
        body = {"flow_runs": {"id": {"any_": [self.run]}}, "limit": PAGE}
        for task in self.runs.call("POST", "/task_runs/filter", body):
            if task["end_time"] and task["id"] not in self._tasks:
                self._tasks.add(task["id"])
                mark = "✔" if task["state_type"] == "COMPLETED" else f"✘ {task['state_name']}:"
                name = str(task["name"]).rsplit("-", 1)[0].replace("_", " ")
                yield _time(task["end_time"]), f"  {mark} {name} ({task['total_run_time']:.1f} s)"

    def _new_lines(self) -> Iterator[tuple[datetime, str]]:
        body = {
            "logs": {"flow_run_id": {"any_": [self.run]}, "level": {"ge_": 20}},
            "sort": "TIMESTAMP_ASC",
            "offset": self._logged,
            "limit": PAGE,
        }
        found = self.runs.call("POST", "/logs/filter", body)
        self._logged += len(found)
        for line in found:
            ours = line["name"] in ("prefect.flow_runs", "prefect.task_runs") or line["level"] >= 40
            if ours and not line["message"].startswith(_NOISE):
                yield _time(line["timestamp"]), f"    {line['message'].strip()}"


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
