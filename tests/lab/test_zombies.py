"""What dies without a word: a worker with its run, the holder of an environment's lock while Prefect is restarted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import psutil
import psycopg
import pytest
from prefect.client.orchestration import get_client
from pydantic import SecretStr

from blocks.people.alerts import Alerts
from lab import lifecycle
from lab.client import Lab
from lab.control import LabControl
from lab.processes import alive, marked
from lab.runs import Runs
from lab.state.environment import api_url, prefect_variables
from runbook.wait import until
from tests.fixtures.receivers import http_receiver
from tests.fixtures.servers import separate_prefect
from tests.runbook.processes import Actor

CRASHED_SECONDS = 120  # the promise: from the death on
ESCALATED_SECONDS = 120
FREE_SECONDS = 120
HELD = "held_by_the_test"


@contextlib.contextmanager
def backups_waiting(dsn: str) -> Iterator[Callable[[], object]]:
    """Backups wait at a table that somebody alters (for a minute at most); gives: whether one is waiting."""
    waiting = "SELECT 1 FROM pg_locks WHERE relation = %s::regclass AND NOT granted"
    place = {"conninfo": dsn, "dbname": "grc_db"}
    with psycopg.connect(**place, autocommit=True) as looking, psycopg.connect(**place) as altering:
        looking.execute(f"CREATE TABLE {HELD} ()")
        try:
            altering.execute(f"LOCK TABLE {HELD} IN ACCESS EXCLUSIVE MODE")
            yield lambda: looking.execute(waiting, [HELD]).fetchone()
        finally:
            altering.rollback()
            looking.execute(f"DROP TABLE {HELD}")


def launch(runs: Runs, deployment: str) -> str:
    """Launched, and not waited for: the run's id."""
    found = runs.call("GET", f"/deployments/name/{deployment}")
    body = {"state": {"type": "SCHEDULED"}}
    return str(runs.call("POST", f"/deployments/{found['id']}/create_flow_run", body)["id"])


def state_of(runs: Runs, run: str) -> dict[str, Any]:
    return dict(runs.call("GET", f"/flow_runs/{run}")["state"])


def heartbeats(runs: Runs, run: str) -> int:
    """Prefect looks for the dead among those who were heard of once."""
    wanted = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": {"id": [f"prefect.flow-run.{run}"]}}
    return len(runs.call("POST", "/events/filter", {"filter": wanted})["events"])


def processes_of(control: LabControl, run: str) -> list[psutil.Process]:
    """A run's own process and everything that it started."""
    found = []
    for process in marked(control.layout.supervisor):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.environ().get("PREFECT__FLOW_RUN_ID") == run:
                found.append(process)
    return found


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # with its parent, by its parent-death signal
            os.kill(pid, signal.SIGKILL)


def restarted(control: LabControl, name: str, before: int) -> Callable[[], int]:
    """Gives the pid of what the supervisor started in place of `before`; 0 until then."""

    def pid() -> int:
        service = control.supervisor.services()[name]
        return service.pid if service.running and service.pid != before else 0

    return pid


@pytest.fixture
def duty(deployed: Lab) -> Iterator[list[dict[str, Any]]]:
    """As in production: runs that fail are escalated by themselves, and people are told at an address. Gives what they
    were told."""
    kept = cast(Alerts, Alerts.load(deployed.name))
    with http_receiver() as web, get_client(sync_client=True) as client:
        there = {"channels": ["webhook"], "webhook_url": SecretStr(f"{web.url}/hook")}
        kept.model_copy(update=there).save(deployed.name, overwrite=True)
        (automation,) = client.read_automations_by_name(f"escalate-failures-{deployed.name}")
        client.resume_automation(automation.id)
        yield web.got["/hook"]
        client.pause_automation(automation.id)
        kept.save(deployed.name, overwrite=True)


def slots(control: LabControl, limit: str) -> int:
    """How many hold it."""
    address = f"{api_url(control.state)}/v2/concurrency_limits/{limit}"
    found = httpx.get(address, auth=control.state.login, timeout=60).raise_for_status().json()
    return int(found["active_slots"])


def test_a_run_that_died_with_its_worker_is_crashed_escalated_and_launched_again(
    deployed: Lab, duty: list[dict[str, Any]]
) -> None:
    _, control = lifecycle.existing(deployed.name)
    status, deployment, worker = deployed.status(), f"backup-database/{deployed.name}", f"worker-{deployed.name}"
    lock = f"env-{deployed.name}"
    runs = Runs(status["prefect_api"], status["prefect_ui"], status["prefect_auth"])
    with backups_waiting(status["postgres"]["admin_dsn"]) as waiting:
        run = launch(runs, deployment)
        until(waiting, what="the backup at work", seconds=120)
        until(lambda: heartbeats(runs, run), what="the run's first heartbeat", seconds=120, every_seconds=0.5)
        assert slots(control, lock) == 1, "it holds the environment's lock"
        before = control.supervisor.services()[worker].pid
        (engine,) = (process for process in processes_of(control, run) if "prefect.engine" in process.cmdline())
        assert os.getsid(engine.pid) == engine.pid, "its priority is its own (tasks/host/priority.py)"
        assert engine.cmdline()[0] == psutil.Process(before).cmdline()[0], "the worker's interpreter, with its packages"
        victims = [before, *(process.pid for process in processes_of(control, run))]
        assert len(victims) > 1
        kill(victims)  # the worker first: it would report its run's death
        died = time.monotonic()
    until(lambda: not any(map(alive, victims)), what="their end", seconds=120)
    assert state_of(runs, run)["type"] == "RUNNING", "nobody was left to say that it died"

    def ended() -> dict[str, Any]:
        state = state_of(runs, run)
        return {} if state["type"] == "RUNNING" else state

    def after(what: str) -> None:
        print(f"{what} after {time.monotonic() - died:.0f} s")

    state = until(ended, what="the mark on the dead run", seconds=CRASHED_SECONDS, every_seconds=1)
    after("marked Crashed")
    assert (state["type"], state["name"]) == ("CRASHED", "Crashed")
    assert "zombie-runs" in state["message"]

    until(lambda: slots(control, lock) == 0, what="a free lock", seconds=FREE_SECONDS, every_seconds=1)
    after("the lock free")
    until(lambda: duty, what="the alert at the receiver", seconds=ESCALATED_SECONDS, every_seconds=1)
    after("told")
    assert duty[0]["kind"] == "trigger"
    assert duty[0]["title"].endswith(f"[{deployed.name}] backup-database ({deployed.name}): Crashed")
    assert duty[0]["to"] == "オンコールSRE"
    assert f"/runs/flow-run/{run}" in duty[0]["text"]
    assert "/run?parameters=" in duty[0]["text"], "the form that acknowledges it"

    new = until(restarted(control, worker, before), what="the worker's restart", seconds=120)
    again = runs.run(deployment, {}, seconds=120)
    assert again.completed, f"{again.state}: {again.message}"
    assert control.supervisor.services()[worker].pid == new, "by the worker of the restart"
    assert state_of(runs, run)["type"] == "CRASHED"
    assert slots(control, lock) == 0

    over = {"incident": duty[0]["incident"], "by": "佐藤", "action": "resolve"}
    resolved = runs.run(f"acknowledge-incident/{deployed.name}", over, seconds=120)
    assert resolved.completed, f"{resolved.state}: {resolved.message}"
    assert {one["to"] for one in duty if one["kind"] == "resolve"} == {one["to"] for one in duty}


@pytest.fixture
def control() -> Iterator[LabControl]:
    with separate_prefect("zombies") as own:
        yield own


@pytest.fixture
def maintain(control: LabControl, tmp_path: Path) -> Iterator[Callable[[str], Actor]]:
    """Launches a maintenance run, always of the same environment, from one of several "hosts"."""
    name, started = f"t{uuid.uuid4().hex[:12]}", []
    variables = prefect_variables(control.layout, control.state)

    def launched(host: str) -> Actor:
        words = ("flow", name, tmp_path / host / "reports", "maintenance")  # no lock's file in common
        started.append(Actor(tmp_path / host, "holder", *words, **variables))
        return started[-1]

    yield launched
    for actor in started:
        actor.end()


def pretend_host(control: LabControl, host: str) -> str:
    """What Prefect knows of the only holder says that it is on another host: nobody here can see that it died."""
    api, login = api_url(control.state), control.state.login
    (variable,) = httpx.post(f"{api}/variables/filter", json={}, auth=login).raise_for_status().json()
    holder = json.loads(variable["value"]) | {"host": host}
    body = {"value": json.dumps(holder)}
    httpx.patch(f"{api}/variables/{variable['id']}", json=body, auth=login).raise_for_status()
    return str(variable["name"]).removesuffix("-holder")


def restart_prefect(control: LabControl) -> None:
    """Killed, all of it; its supervisor starts it again."""
    before = control.supervisor.services()["server"].pid
    parts = [before, *(child.pid for child in psutil.Process(before).children(recursive=True))]
    kill(parts)
    until(lambda: not any(map(alive, parts)), what="the server's end", seconds=120)
    until(restarted(control, "server", before), what="the server's restart", seconds=120)
    control.wait()


def test_a_dead_holder_s_lock_is_free_in_two_minutes_though_prefect_was_restarted(
    control: LabControl, maintain: Callable[[str], Actor]
) -> None:
    holder = maintain("db-2")
    holder.says("held")
    limit = pretend_host(control, "db-2")
    holder.kill()
    died = time.monotonic()
    restart_prefect(control)
    print(f"Prefect answers again after {time.monotonic() - died:.0f} s")

    assert slots(control, limit) == 1
    refused = maintain("db-1")
    assert refused.process.wait(180) == 1
    assert "is held by “Rebuild indexes”" in refused.text
    assert f"process {holder.pid} on db-2" in refused.text

    until(
        lambda: slots(control, limit) == 0,
        what="the end of the dead holder's lease",
        seconds=FREE_SECONDS,
        every_seconds=0.5,
    )
    maintain("db-1").says("held")
    seconds = time.monotonic() - died
    print(f"the lock was taken after {seconds:.0f} s")
    assert seconds < FREE_SECONDS
