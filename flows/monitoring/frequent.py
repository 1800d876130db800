"""The checks of every few minutes, taken by the watcher ([monitoring] watcher = true).

In Prefect they have hourly schedules then (deployments/deploy.py). A pass starts a run there only if something changed:
the status or the findings of check-recovery-objectives, or a backup that became due. Overdue escalations, and a pool
without a worker, are handled in this process: neither needs a worker.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkPoolStatus
from prefect.exceptions import ObjectNotFound

from blocks.environment import Environment
from flows.monitoring.escalation import escalate
from flows.monitoring.incident import incidents, is_overdue
from flows.recovery.objectives.check import check_recovery_objectives
from flows.recovery.objectives.due import MINUTES, is_due, take_due_backups
from runbook.errors import OpsError, RunbookFailed
from runbook.guard.brief import asked_briefly
from runbook.report import Report, Status

SETTING = "monitoring.watcher"
EVERY_SECONDS, HUNG_SECONDS = 300.0, 900.0
GRACE = timedelta(minutes=1)
"""The scheduled run of `escalate` notifies the next level first; the watcher does it if that run does not come."""


class FrequentChecks:
    """Passes in a separate thread: a slow store must not delay the next round of metrics. `answers`: whether Prefect
    does; `say` prints a line to the service's log."""

    def __init__(self, answers: Callable[[], bool], say: Callable[[str], None]) -> None:
        self._answers, self._say = answers, say
        self._thread: threading.Thread | None = None
        self._begun = time.monotonic() - EVERY_SECONDS
        self._healthy_at: float | None = None
        self._published = ""
        self._offline = frozenset[str]()
        self._backups_at = time.monotonic() - MINUTES * 60

    def is_healthy(self, env: Environment) -> bool:
        """Whether a pass succeeded within the last quarter of an hour, where passes are this watcher's. Otherwise it
        sends no heartbeat, and Prefect escalates its silence."""
        taken = env.has(SETTING) and self._healthy_at is not None
        return not taken or time.monotonic() - (self._healthy_at or 0.0) < HUNG_SECONDS

    def kick(self, env: Environment) -> None:
        """Begin a pass if one is due and none is running. Without the setting, Prefect's schedules take the checks."""
        is_busy = self._thread is not None and self._thread.is_alive()
        if not env.has(SETTING) or is_busy or time.monotonic() - self._begun < EVERY_SECONDS:
            return
        self._begun = time.monotonic()
        self._healthy_at = self._healthy_at or self._begun
        self._thread = threading.Thread(target=self.take, args=(env,), name="frequent checks", daemon=True)
        self._thread.start()

    def take(self, env: Environment) -> bool:
        """One pass; returns whether every check could be made. No check keeps another from being made."""
        checks = [self._workers, *([self._escalations] if env.has("alerts") else [])]
        checks += [self._objectives, self._backups] if env.has("backups") else []
        succeeded = [self._tried(check, env) for check in checks]
        if all(succeeded):
            self._healthy_at = time.monotonic()
        return all(succeeded)

    def _tried(self, check: Callable[[Environment], None], env: Environment) -> bool:
        try:
            check(env)
        except OpsError as error:
            self._say(str(error))
        except Exception:
            self._say(traceback.format_exc())
            return False
        return True

    def _workers(self, env: Environment) -> None:
        """Escalate a pool whose workers are all silent: schedules, runbooks and escalations by Prefect wait for one."""
        if not self._answers():
            return
        offline = set()
        with asked_briefly(retries=2), get_client(sync_client=True) as client:
            for pool in {env.name, *env.pools.values()}:
                try:
                    if client.read_work_pool(pool).status is WorkPoolStatus.NOT_READY:
                        offline.add(pool)
                except ObjectNotFound:
                    offline.add(pool)
        new, self._offline = offline - self._offline, frozenset(offline)
        for pool in sorted(new):
            what = f"work pool {pool} has no worker: systemctl status interview-ops-worker"
            self._say(f"work pool {pool} has no worker")
            if env.has("alerts"):
                escalate(env.name, severity="severe", what=what, owner="SRE", key=f"worker {pool}")

    def _escalations(self, env: Environment) -> None:
        if any(is_overdue(env, one, GRACE) for one in incidents(env).open()):
            (escalate if self._answers() else escalate.fn)(env.name)

    def _objectives(self, env: Environment) -> None:
        found = result_of(_report_of(env))
        if found != self._published and self._launched(check_recovery_objectives.name, env):
            self._published = found

    def _backups(self, env: Environment) -> None:
        """As often as the schedule that this replaces, at most: a backup that runs is still due."""
        waited = time.monotonic() - self._backups_at >= MINUTES * 60
        if waited and is_due(env, MINUTES) and self._launched(take_due_backups.name, env):
            self._backups_at = time.monotonic()

    def _launched(self, flow: str, env: Environment) -> bool:
        """Whether Prefect has the run: by the deployment, so that a worker takes it and its failure is escalated."""
        if not self._answers():
            return False
        with asked_briefly(retries=2), get_client(sync_client=True) as client:
            try:
                deployment = client.read_deployment_by_name(f"{flow}/{env.name}")
            except ObjectNotFound:
                raise OpsError(f"{flow} is not deployed for {env.name}", "python -m deployments.deploy") from None
            client.create_flow_run_from_deployment(deployment.id, parameters={"environment": env.name})
        self._say(f"{flow} was launched")
        return True


def _report_of(env: Environment) -> Report:
    try:
        return check_recovery_objectives.fn(env.name)
    except RunbookFailed as error:
        return error.report


def result_of(report: Report) -> str:
    """The status and the findings that need attention; measured values differ each time."""
    found = sorted(f"{one.status} {one.name}" for one in report.findings if one.status is not Status.OK)
    return " | ".join([report.status.value, *found])
