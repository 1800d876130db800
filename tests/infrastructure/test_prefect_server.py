"""backup_prefect and restore_prefect on a real Prefect with PostgreSQL and Redis; and what such an installation must
stand: strangers without the password, two workers, a thousand scheduled runs, a network that is cut."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from prefect import Flow, State
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, LogCreate, WorkPoolCreate
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.events.actions import DoNothing
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.states import Completed, Failed, Running, Scheduled, Suspended
from prefect.workers.process import ProcessWorker
from websockets import Subprotocol
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as websocket

from blocks.config import toml
from blocks.prefect_server import PrefectServer
from deployments import automations
from deployments.deploy import deploy as deploy_all
from deployments.doctor.__main__ import examine
from deployments.doctor.host import clock
from deployments.doctor.line import Level
from deployments.doctor.watcher import look_at_watcher
from deployments.register import register
from deployments.stopping import end_flows
from flows.database import restore_steps
from flows.database.backup import verify_backup
from flows.infrastructure.prefect.history import clean_prefect_history
from flows.infrastructure.prefect.server import backup_prefect, rehearse_prefect_upgrade, restore_prefect
from flows.monitoring.metrics import watch_metrics
from lab.state.base import CHECKOUT
from runbook.errors import OpsError, RunbookFailed
from runbook.files.chain import verify_chain
from runbook.guard.holder import LockHolder, remember
from runbook.guard.lease import ensure_limit
from runbook.report import Report, Status
from runbook.wait import until
from tasks.monitoring import state
from tasks.prefect.server import revisions
from tests.database.restore.test_restore import flip, largest
from tests.fixtures import forked
from tests.infrastructure.errands import errand, long_errand
from tests.infrastructure.installation import AUTH, NAME, STRANGER, Installation, running_installation
from tests.s3.proxy import Proxy

pytestmark = pytest.mark.contrib  # Prefect needs pg_trgm
TOKEN = "s3cret-of-a-block-4719"
GOOD = (Status.OK, Status.WARN)
POOL = "trial"
SOON = timedelta(seconds=1)
OLDER, BEFORE = "older", "d4a7e1c93f52"
"""A database of an older Prefect, and its revision: the next one makes the table automation_held_event."""
BLOCKING = "CREATE TABLE automation_held_event ()"
LOSING = """
CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN DELETE FROM public.automation; RETURN NEW; END';
CREATE TRIGGER lose AFTER UPDATE ON alembic_version FOR EACH ROW EXECUTE FUNCTION lose()
"""


@pytest.fixture(scope="module")
def prefect() -> Iterator[Installation]:
    with running_installation() as made, made.client():
        with get_client(sync_client=True) as client:
            template = ProcessWorker.get_default_base_job_template()
            client.create_work_pool(
                WorkPoolCreate(name=POOL, type="process", base_job_template=template), overwrite=True
            )
        yield made


def deploy(name: str, flow: Flow[..., Any] = errand, **parameters: object) -> UUID:
    with get_client(sync_client=True) as client:
        step = {"prefect.deployments.steps.set_working_directory": {"directory": str(CHECKOUT)}}
        return client.create_deployment(
            client.create_flow(flow),
            name,
            work_pool_name=POOL,
            parameters=parameters,
            pull_steps=[step],
            entrypoint=f"tests.infrastructure.errands.{flow.fn.__name__}",
        )


def start(deployment: UUID, name: str, state: State[Any] | None = None) -> UUID:
    with get_client(sync_client=True) as client:
        return client.create_flow_run_from_deployment(deployment, name=name, state=state).id


def state_of(run: UUID) -> str:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run).state_name or ""


def ended(*runs: UUID) -> None:
    def all_ended() -> bool:
        with get_client(sync_client=True) as client:
            states = [client.read_flow_run(run).state for run in runs]
        return all(state is not None and state.is_final() for state in states)

    until(all_ended, what="the end of the runs", seconds=240, every_seconds=1)


def listens(address: str, token: str | None) -> bool:
    """Whether a websocket is let in with that token."""
    with websocket(address, subprotocols=[Subprotocol("prefect")], open_timeout=240) as one:
        one.send(json.dumps({"type": "auth", "token": token}))
        try:
            return bool(json.loads(one.recv(timeout=240))["type"] == "auth_success")
        except ConnectionClosed:
            return False


def test_without_the_password_nobody_gets_anything(prefect: Installation) -> None:
    owner = httpx.BasicAuth(*AUTH.split(":", 1))
    paths = httpx.get(f"{prefect.api}/openapi.json", auth=owner, trust_env=False, timeout=240).json()["paths"]
    ways = [(method.upper(), path.removeprefix("/api")) for path, methods in paths.items() for method in methods]
    ways = [(method, path) for method, path in ways if path not in ("/health", "/ready")]
    with httpx.Client(base_url=prefect.api, trust_env=False, timeout=240) as stranger:
        assert stranger.get("/health").status_code == stranger.get("/ready").status_code == 200
        for method, path in ways:
            answer = stranger.request(method, path.replace("{", "").replace("}", ""), json={})
            assert answer.status_code == 401, (method, path)
        for auth in (("ops", "wrong"), ("", ""), ("ops", "")):
            assert stranger.post("/block_documents/filter", json={}, auth=auth).status_code == 401
    sockets = ("/events/in", "/events/out", "/logs/out", "/task_runs/subscriptions/scheduled")
    for path in (*sockets, f"/work_pools/{POOL}/workers/connect"):
        for token in ("ops:wrong", None):
            assert not listens(f"{prefect.api.replace('http', 'ws', 1)}{path}", token), (path, token)
    assert listens(f"{prefect.api.replace('http', 'ws', 1)}/events/in", AUTH)
    assert ("POST", "/block_documents/filter") in ways
    assert len(ways) > 150


def test_two_workers_among_a_thousand_scheduled_runs_run_each_once_and_a_cut_network_is_outlived(
    prefect: Installation, tmp_path: Path
) -> None:
    book, gate = tmp_path / "book", tmp_path / "gate"
    planned, due = deploy("planned", book=str(book)), deploy("due", book=str(book))
    held = deploy("held", book=str(tmp_path / "other"), gate=str(gate))
    with get_client(sync_client=True) as client:
        client.create_deployment_schedules(planned, [(IntervalSchedule(interval=timedelta(minutes=1)), True)])
        span = {"start_time": datetime.now(UTC) + timedelta(hours=1), "end_time": datetime.now(UTC) + timedelta(days=2)}
        body = {name: value.isoformat() for name, value in span.items()} | {"min_runs": 1000, "max_runs": 1000}
        answer = client._client.post(f"/deployments/{planned}/schedule", json=body)
        answer.raise_for_status()
    ahead = "SELECT count(*) FROM flow_run WHERE deployment_id = %s AND state_type = 'SCHEDULED'"
    assert int(str(prefect.sql(ahead, planned)[0][0])) >= 1000
    with Proxy(prefect.port) as network:
        prefect.worker(POOL, "--name", "near")
        prefect.worker(POOL, "--name", "far", api=f"{network.endpoint}/api")
        runs = [start(due, f"due-{number}", Scheduled(scheduled_time=datetime.now(UTC) - SOON)) for number in range(4)]
        ended(*runs)
        assert [state_of(run) for run in runs] == ["Completed"] * 4
        written = book.read_text().split()
        assert set(map(str, runs)) <= set(written)
        assert len(written) == len(set(written)), "each once; after a minute planned ones are due too"

        near, far = prefect.workers[-2:]
        near.terminate()
        near.wait(120)
        run = start(held, "held")
        until((tmp_path / "other").exists, what="that the run began", seconds=240)
        network.cut_requests(1, times=-1)
        network.drop()
        until(lambda: network.faults >= 2, what="that somebody misses the server", seconds=120)
        gate.touch()
        assert state_of(run) == "Running"
        until(lambda: network.faults >= 6, what="that they try again", seconds=120)
        network.cut_requests(0, times=0)
        ended(run)
        assert state_of(run) == "Completed"

        gate.unlink()
        run = start(held, "stopped")
        until(lambda: str(run) in (tmp_path / "other").read_text(), what="that it began", seconds=240)
        assert (
            end_flows(far.pid) >= 1
        )  # a planned one may be due just now; without this a worker's stop kills them, and tells nobody
        far.terminate()
        assert far.wait(240) == 0
        ended(run)
        with get_client(sync_client=True) as client:
            last = client.read_flow_run(run).state
        assert last
        assert (last.name, last.message) == ("Crashed", "Execution was aborted by a termination signal.")
    with get_client(sync_client=True) as client:
        client.delete_deployment(planned)


@contextlib.contextmanager
def outages(prefect: Installation, directory: Path, *names: str) -> Iterator[tuple[Proxy, Callable[[str], None]]]:
    """One runbook, which holds the lock and waits at a gate of each name. Gives the network between Prefect and its
    worker, and what lets it through a gate, once it is there. It has ended well at the block's end."""
    register(NAME)
    book, gates = directory / "book", {name: directory / name for name in names}
    for worker in prefect.workers:
        worker.terminate()
    name = directory.name
    deployment = deploy(
        name, long_errand, environment=NAME, book=str(book), gates=[str(gate) for gate in gates.values()]
    )

    def at(gate: str) -> None:
        until(lambda: book.exists() and str(gates[gate]) in book.read_text(), what=f"that it is at {gate}", seconds=240)

    def pass_gate(gate: str) -> None:
        gates[gate].write_text("passed")
        if following := names[names.index(gate) + 1 :]:
            at(following[0])

    earlier = len(long_errands(prefect))
    with Proxy(prefect.port) as network:
        worker = prefect.worker(POOL, "--name", name, api=f"{network.endpoint}/api")
        run = start(deployment, name)
        at(names[0])
        assert lock(prefect) == 1
        yield network, pass_gate
        ended(run)
        worker.terminate()
    with get_client(sync_client=True) as client:
        last = client.read_flow_run(run).state
    assert last
    assert last.is_completed(), last
    filed = long_errands(prefect)
    assert len(filed) == earlier + 1
    assert [filed[-1]["facts"][gate] for gate in names] == ["passed"] * len(names)
    assert verify_chain(prefect.base / "reports") == []
    until(lambda: lock(prefect) == 0, what="that the lock is free", seconds=240)


def test_a_run_outlives_that_prefect_restarts(prefect: Installation, tmp_path: Path) -> None:
    """Its API and its services; the run goes on meanwhile, and nobody else gets the lock."""
    with outages(prefect, tmp_path, "before", "meanwhile", "after") as (_, pass_gate):
        for name in ("prefect-services", "prefect-api"):
            prefect.supervisor.stop(name)
        pass_gate("before")
        for name in ("prefect-api", "prefect-services"):
            prefect.supervisor.start(name)
        until(prefect.is_ready, what="that Prefect answers", seconds=240)
        assert lock(prefect) == 1, "a restart of Prefect gives nobody else the lock"
        pass_gate("meanwhile")
        pass_gate("after")


@pytest.mark.soak  # minutes: who missed the server tries again ever more seldom
def test_a_run_outlives_that_network_and_database_are_away(prefect: Installation, tmp_path: Path) -> None:
    """The last that it meets is the worst: it ends while the database is down."""
    reports = len(long_errands(prefect))
    with outages(prefect, tmp_path, "cut-off", "no-database") as (network, pass_gate):
        network.cut_requests(1, times=-1)
        network.drop()
        faults = network.faults
        pass_gate("cut-off")
        until(lambda: network.faults >= faults + 3, what="that somebody misses the server", seconds=240)
        network.heal()
        prefect.postgres.stop()
        pass_gate("no-database")
        until(lambda: len(long_errands(prefect)) > reports, what="its report", seconds=240)
        missed = internal_errors(prefect)
        until(lambda: internal_errors(prefect) > missed + 20, what="that somebody misses the database", seconds=240)
        prefect.postgres.start()
    assert long_errand.fn(NAME, str(tmp_path / "again"), []).status in GOOD, "another run gets it"


def lock(prefect: Installation) -> int:
    return int(str(prefect.sql("SELECT active_slots FROM concurrency_limit_v2 WHERE name = %s", f"env-{NAME}")[0][0]))


def long_errands(prefect: Installation) -> list[dict[str, Any]]:
    """The reports that were filed of it."""
    filed = [json.loads(path.read_text()) for path in sorted((prefect.base / "reports").glob("*-long-errand.json"))]
    return [one for one in filed if one["runbook"] == "Long errand"]


def internal_errors(prefect: Installation) -> int:
    """What the API could not answer."""
    return (prefect.base / "log" / "prefect-api.log").read_text(errors="replace").count("exception in request")


@pytest.fixture(scope="module")
def filled(prefect: Installation, tmp_path_factory: pytest.TempPathFactory) -> dict[str, UUID]:
    """A deployment, runs, a secret block, an automation, a lock that is held; by name."""
    deployment = deploy("kept", book=str(tmp_path_factory.mktemp("book") / "book"))
    Secret(value=TOKEN).save("deploy-token", overwrite=True)  # type: ignore[arg-type]
    with get_client(sync_client=True) as client:
        client.create_automation(
            AutomationCore(
                name="kept",
                actions=[DoNothing()],
                trigger=EventTrigger(expect={"ops.nothing"}, posture=Posture.Reactive, threshold=1),
            )
        )
    ensure_limit(NAME)
    tomorrow = Scheduled(scheduled_time=datetime.now(UTC) + timedelta(days=1))
    runs = {"done": Completed(), "under-way": Running(), "tomorrow": tomorrow, "overdue": tomorrow}
    made = {name: start(deployment, name, state) for name, state in runs.items()}
    prefect.sql(
        "UPDATE flow_run SET auto_scheduled = true, expected_start_time = now() - interval '1 hour' WHERE id = %s",
        made["overdue"],
    )
    return {"deployment": deployment, **made}


def backups(prefect: Installation) -> list[Path]:
    return sorted(path for path in (prefect.base / "backups" / "prefect").glob("prefect_*") if path.is_dir())


def told(report: Report, finding: str) -> str:
    return next(one.value for one in report.findings if one.name == finding)


def oid(prefect: Installation) -> object:
    return prefect.postgres.sql("SELECT oid FROM pg_database WHERE datname = 'prefect'")


def test_a_backup_that_would_not_be_encrypted_is_refused(prefect: Installation, filled: object) -> None:
    before = backups(prefect)
    with (
        described(lambda text: "\n".join(line for line in text.splitlines() if not line.startswith("recipients"))),
        pytest.raises(RunbookFailed, match="encryption of the backup: none"),
    ):
        backup_prefect.fn(NAME)
    assert backups(prefect) == before


@pytest.fixture(scope="module")
def backed_up(prefect: Installation, filled: object) -> tuple[Report, Path]:
    """The report of the backup, and where it is."""
    slots = "UPDATE concurrency_limit_v2 SET active_slots = %s WHERE name = %s"
    prefect.sql(slots, 1, f"env-{NAME}")  # as it is in every backup that a flow run takes
    report = backup_prefect.fn(NAME)
    prefect.sql(slots, 0, f"env-{NAME}")
    return report, backups(prefect)[-1]


def test_a_backup_is_taken_encrypted_and_verifies(prefect: Installation, backed_up: tuple[Report, Path]) -> None:
    report, backup = backed_up
    assert report.status in GOOD, report.sentence()
    assert report.facts["encrypted"] == "to 2 keys"
    files = [path for path in backup.rglob("*") if path.is_file()]
    assert all(path.suffix == ".age" for path in files if "manifest" not in path.name)
    key = str(prefect.sql("SELECT value->>'fernet_key' FROM configuration WHERE key = 'ENCRYPTION_KEY'")[0][0])
    assert key
    assert not any(key.encode() in path.read_bytes() for path in files)
    assert verify_backup.fn(NAME, kind="prefect").status in GOOD


def test_what_cannot_be_restored_is_refused_and_nothing_is_touched(
    prefect: Installation, filled: dict[str, UUID], backed_up: tuple[Report, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backup, before = backed_up[1], oid(prefect)
    monkeypatch.setenv("TRIAL_IDENTITY", str(STRANGER))
    with pytest.raises(RunbookFailed, match="encrypted to other keys than this environment's"):
        restore_prefect.fn(NAME, confirm=NAME)
    monkeypatch.undo()
    worst = largest(backup)
    whole = worst.read_bytes()
    flip(worst)
    with pytest.raises(RunbookFailed, match="its SHA-256 differs"):
        restore_prefect.fn(NAME, confirm=NAME)
    worst.write_bytes(whole)
    plan = restore_prefect.fn(NAME)
    assert plan.status is Status.PLANNED
    assert "prefect.server restore --environment trial" in plan.facts["to carry it out"]
    assert "under-way" in told(plan, "running flow runs")
    assert told(plan, "runs that hold a lock") == "none"
    holding = r"other is held by “Full restore”, run “under-way” .*process 4711 on db2, since"
    with monkeypatch.context() as meanwhile:  # a run takes its lock while the copy is built
        ready = restore_steps.ready_database

        def late(*given: Any, **named: Any) -> object:
            stack.enter_context(held_by(prefect, filled["under-way"]))
            return ready(*given, **named)

        meanwhile.setattr(restore_steps, "ready_database", late)
        with contextlib.ExitStack() as stack, pytest.raises(RunbookFailed) as refused:
            restore_prefect.fn(NAME, confirm=NAME)
    assert re.search("acquired a lock during the restore: " + holding, refused.value.report.sentence())
    assert "Prefect's database was not replaced" in str(refused.value.report.state)
    with held_by(prefect, filled["under-way"]):
        for confirm in ("", NAME):
            with pytest.raises(RunbookFailed, match="runs that hold a lock: " + holding):
                restore_prefect.fn(NAME, confirm=confirm)
        prefect.sql("UPDATE flow_run SET state_type = 'CANCELLED' WHERE id = %s", filled["under-way"])
        try:
            assert told(restore_prefect.fn(NAME), "runs that hold a lock") == "none"
        finally:
            prefect.sql("UPDATE flow_run SET state_type = 'RUNNING' WHERE id = %s", filled["under-way"])
    assert oid(prefect) == before
    assert prefect.is_ready()
    assert state_of(filled["under-way"]) == "Running"


@contextlib.contextmanager
def held_by(prefect: Installation, run: UUID) -> Iterator[None]:
    """A recovery on another host holds another environment, which the same Prefect serves."""
    holder = LockHolder("Full restore", "recovery", str(run), "under-way", "db2", 4711, "", "2026-11-29 01:00:00 UTC")
    ensure_limit("other")
    remember("other", holder)
    slots = "UPDATE concurrency_limit_v2 SET active_slots = %s WHERE name = 'env-other'"
    prefect.sql(slots, 1)
    try:
        yield
    finally:
        prefect.sql(slots, 0)


@pytest.fixture(scope="module")
def older_database(prefect: Installation, filled: object) -> None:
    """What an older Prefect left: a copy of the database at an earlier revision."""
    prefect.postgres.create_database(OLDER)
    tool = {**os.environ, **prefect.variables()}
    dump = subprocess.run(
        [Path(prefect.postgres.programs) / "pg_dump", "--no-password", "prefect"],
        env={**tool, **prefect_block().environment()},
        capture_output=True,
        check=True,
    )
    subprocess.run(
        [Path(prefect.postgres.programs) / "psql", "--quiet", "--set=ON_ERROR_STOP=1", "--dbname", OLDER],
        env={**tool, **prefect_block().environment()},
        input=dump.stdout,
        capture_output=True,
        check=True,
    )
    there = prefect_block().url(OLDER, driver="postgresql+asyncpg")
    argv = [sys.executable, "-m", "prefect", "server", "database", "downgrade", "-y", "-r", BEFORE]
    done = subprocess.run(argv, env={**tool, "PREFECT_SERVER_DATABASE_CONNECTION_URL": there}, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def older(prefect: Installation, older_database: None, tmp_path: Path) -> Iterator[str]:
    """That database described as Prefect's, with a store of its own. Gives its revision."""
    store = tmp_path / "older"
    store.mkdir()

    def change(text: str) -> str:
        text = text.replace('database = "prefect"', f'database = "{OLDER}"')
        return text.replace(f'prefect = "{prefect.base}/backups/prefect"', f'prefect = "{store}"')

    with described(change):
        yield BEFORE


def prefect_block() -> PrefectServer:
    return toml.environment(NAME).prefect_server


def databases(prefect: Installation) -> set[object]:
    return {name for (name,) in prefect.postgres.sql("SELECT datname FROM pg_database WHERE NOT datistemplate")}


def test_an_upgrade_is_rehearsed_on_a_copy(prefect: Installation, older: str) -> None:
    before = databases(prefect)
    assert backup_prefect.fn(NAME).status in GOOD
    argv = [sys.executable, "-m", "flows.infrastructure.prefect.server", "upgrade", "--environment", NAME]
    done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "and is served by it; every row is there" in done.stdout
    filed = json.loads(Path(done.stdout.rpartition("report: ")[2].strip()).read_text())
    values = {one["name"]: one["value"] for one in filed["findings"]}
    assert values["revision of the migrated copy"] == revisions()[0]
    assert re.match(r"[1-9]\d* blocks read in clear", values["secrets"])
    assert "prefect server database upgrade -y" in json.dumps(filed)
    assert prefect.postgres.sql("SELECT version_num FROM alembic_version", database=OLDER) == [(older,)]
    assert databases(prefect) == before
    assert prefect.is_ready()


@pytest.mark.parametrize(
    ("seeded", "undone", "told"),
    [
        (BLOCKING, "DROP TABLE automation_held_event", "the migration of the copy failed: .*already exists"),
        (LOSING, "DROP FUNCTION lose CASCADE", "rows to keep: fewer in public.automation"),
    ],
    ids=["fails", "loses"],
)
def test_an_upgrade_that_would_fail_or_lose_something_is_found_before_it(
    prefect: Installation, older: str, seeded: str, undone: str, told: str
) -> None:
    prefect.postgres.sql(seeded, database=OLDER)
    before = databases(prefect)
    try:
        assert backup_prefect.fn(NAME).status in GOOD
        with pytest.raises(OpsError, match=told):
            rehearse_prefect_upgrade.fn(NAME)
    finally:
        prefect.postgres.sql(undone, database=OLDER)
    assert databases(prefect) == before
    assert prefect.postgres.sql("SELECT version_num FROM alembic_version", database=OLDER) == [(older,)]


@pytest.fixture(scope="module")
def deployed(prefect: Installation) -> None:
    """As an operator would, once."""
    register(NAME)
    assert re.fullmatch(rf"deployed \d+ runbooks to {NAME}, [1-9]\d* of them scheduled in Asia/Tokyo", deploy_all(NAME))
    automations.register(NAME)


@contextlib.contextmanager
def described(change: Callable[[str], str]) -> Iterator[None]:
    """The environment's TOML, changed."""
    path = Path(os.environ["OPS_ENVIRONMENT_FILE"])
    text = path.read_text()
    path.write_text(change(text))
    try:
        yield
    finally:
        path.write_text(text)


def told_by_doctor(level: Level = "CRITICAL") -> dict[str, str]:
    with get_client(sync_client=True) as client:
        client.send_worker_heartbeat(POOL, "near", heartbeat_interval_seconds=600)
    lines = list(examine(NAME))
    assert len(lines) > 25
    return {line.what: line.todo for line in lines if line.level == level}


def test_old_history_is_deleted_and_what_runs_or_waits_is_kept(prefect: Installation) -> None:
    states = {
        "completed": Completed(),
        "failed": Failed(message="x"),
        "running": Running(),
        "scheduled": Scheduled(),
        "suspended": Suspended(timeout_seconds=3600),
    }
    identity = deploy("history")
    runs = {name: start(identity, f"old-{name}") for name in (*states, "young")}
    with get_client(sync_client=True) as client:
        for name, run in runs.items():
            for state in (Running(), states.get(name, Completed())):
                client.set_flow_run_state(run, state, force=True)
        at = datetime.now(UTC)
        client.create_logs(
            [LogCreate(name="trial", level=20, message="hello", timestamp=at, flow_run_id=run) for run in runs.values()]
        )
        for name in ("completed", "young"):
            client.create_artifact(ArtifactCreate(key=f"of-{name}", type="markdown", flow_run_id=runs[name], data="x"))

    def left(table: str) -> set[str]:
        found = prefect.sql(f"SELECT DISTINCT flow_run_id::text FROM {table} WHERE flow_run_id IS NOT NULL")
        return {name for name, run in runs.items() if (str(run),) in found}

    until(lambda: left("log") == set(runs), what="the logs of the runs", seconds=60)
    prefect.sql(
        "UPDATE flow_run SET end_time = end_time - interval '40 days', start_time = start_time "
        "- interval '40 days' WHERE name LIKE 'old-%' AND name <> 'old-young' RETURNING id"
    )
    with described(lambda text: text.replace("auth_env", "keep_days = 30\nauth_env")):
        report = clean_prefect_history.fn(NAME)
    assert report.outcome == "2 flow runs deleted"
    assert report.status is Status.OK, report.sentence()
    stays = {"running", "scheduled", "suspended", "young"}
    assert {name for name, run in runs.items() if prefect.sql("SELECT 1 FROM flow_run WHERE id = %s", run)} == stays
    assert left("artifact") == {"young"}
    until(lambda: left("log") == stays, what="that the logs are gone as well", seconds=60)
    (vacuumed,) = prefect.sql(
        "SELECT last_vacuum > now() - interval '5 min' FROM pg_stat_user_tables WHERE relname = 'flow_run'"
    )
    assert vacuumed == (True,)
    with get_client(sync_client=True) as client:
        for name in stays:
            client.delete_flow_run(runs[name])
        client.delete_deployment(identity)


def test_the_doctor_finds_nothing_where_all_is_well(prefect: Installation, deployed: None) -> None:
    prefect.postgres.create_database("grc_db")
    try:
        assert told_by_doctor() == {}
        of_this_host = ("[backups] postgres is on the same file system", "free disk space", "[services] names has no")
        assert not [what for what in told_by_doctor("WARN") if not what.startswith(of_this_host)]
    finally:
        prefect.postgres.drop_database("grc_db")


def test_the_doctor_finds_what_is_wrong(prefect: Installation, deployed: None, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    shutil.copytree(prefect.postgres.programs, programs, symlinks=True)
    (programs / "pg_dump").unlink()
    (programs / "pg_dump").write_text("#!/bin/sh\necho 'pg_dump (PostgreSQL) 15.1'\n")
    (programs / "pg_dump").chmod(0o755)
    (programs / "initdb").unlink()
    (tmp_path / "file").touch()

    def worse(text: str) -> str:
        text = text.replace(f'programs = "{prefect.postgres.programs}"', f'programs = "{programs}"', 1)
        text = text.replace(f'reports = "{prefect.base}', f'reports = "{tmp_path}/file')
        return text.replace("disposable = true", 'tier = "production"\npools = { redis = "trial-redis" }')

    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="trial-redis", type="process"), overwrite=True)
        watched = client.read_deployment_by_name(f"check-recovery-objectives/{NAME}").id
        client.pause_deployment(watched)
    assert automations.remove(NAME)
    with described(worse):
        bad = told_by_doctor()
    with get_client(sync_client=True) as client:
        client.resume_deployment(watched)
        client.delete_work_pool("trial-redis")
    automations.register(NAME)
    assert "the server is 18" in bad["[postgres] programs are of PostgreSQL 15"]
    assert "initdb not there" in bad[f"[postgres] programs in {programs}"]
    assert bad["work pool trial-redis has 0 workers ()"].startswith("start its worker")
    assert "check_recovery_objectives" in bad["no schedule is paused"]
    assert "flows.redis." in bad["deployments are in the pools of their hosts"]
    assert "deployments.automations register" in bad["automation zombie-runs is missing"]
    assert "systemctl enable --now interview-ops-watcher" in bad["the monitoring runs, here or on another host"]
    assert f"{tmp_path}/file is not writable" in bad[f"reports {tmp_path}/file/reports cannot be written"]
    assert "programs differs" in bad[f"block ops-postgresql/{NAME} is what the TOML says"]
    assert not [what for what in bad if what.startswith("[prefect_server]")]


def test_the_doctor_knows_whether_somebody_watches(prefect: Installation, deployed: None) -> None:
    env = toml.environment(NAME).model_copy(update={"tier": "production"})
    assert not [line.ok for line in look_at_watcher(toml.environment(NAME))], "asked for in production only"
    with contextlib.suppress(RunbookFailed):  # whatever it finds here
        watch_metrics(NAME)
    reports = env.reports_directory
    state.save(reports, state.MonitoringState())  # as on a host that does not watch
    assert [line.ok for line in look_at_watcher(env)] == [True], "the run in Prefect"
    for minutes, well in ((0, True), (10, False)):
        state.save(reports, state.MonitoringState(at=datetime.now(UTC) - timedelta(minutes=minutes)))
        assert [line.ok for line in look_at_watcher(env)] == [well]
    with get_client(sync_client=True) as client:  # other tests want an environment that nobody watches
        for run in client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=[watch_metrics.name]))):
            client.delete_flow_run(run.id)


@pytest.mark.parametrize(
    ("told", "vague", "well"),
    [(100.0, 0, True), (109.0, 0, True), (97.5, 0, False), (112.5, 0, False), (96.5, 2, True), (112.5, 2, False)],
)
def test_the_doctor_blames_no_clock_for_a_slow_answer(told: float, vague: float, well: bool) -> None:
    assert clock("a server", told, (100.0, 110.0), vague).ok is well


@pytest.mark.parametrize(
    ("old", "new", "line", "todo"),
    [
        ("[redis]\nport = ", "[redis]\nport = 1 #", "redis: ", "start it"),
        ('api_url = "', 'api = "', ": [prefect_server] api is wrong: found an unknown key", "did you mean api_url"),
    ],
)
def test_the_doctor_outlives_what_is_away(prefect: Installation, old: str, new: str, line: str, todo: str) -> None:
    with described(lambda text: text.replace(old, new)):
        bad = {one.what: one.todo for one in examine(NAME) if not one.ok}
    assert any(line in what and todo in said for what, said in bad.items()), bad


@pytest.mark.parametrize(
    ("pools", "told"),
    [
        ("redis", "there is no work pool nowhere — start its worker"),
        ("rediss", "names rediss — a chapter is one of .*redis"),
    ],
)
def test_a_pool_that_is_nowhere_is_told_before_anything_is_deployed(
    prefect: Installation, pools: str, told: str
) -> None:
    with (
        described(lambda text: text.replace("disposable = true", f'pools = {{ {pools} = "nowhere" }}')),
        pytest.raises(OpsError, match=told),
    ):
        deploy_all(NAME)


def test_a_flow_run_does_not_replace_the_database_that_it_is_written_to(
    prefect: Installation, filled: object, deployed: None
) -> None:
    before = oid(prefect)
    with pytest.raises(RunbookFailed, match="launched outside Prefect: a flow run"):
        restore_prefect(NAME, confirm=NAME)
    assert oid(prefect) == before


@pytest.fixture
def new_servers(prefect: Installation, request: pytest.FixtureRequest) -> Iterator[None]:
    """Those of a new host, empty. The earlier ones are there again for the tests of this file that follow."""
    last = [item for item in request.session.items if item.path == request.path][-1]
    for worker in prefect.workers:
        worker.terminate()
    with prefect.new_servers(put_back=request.node is not last):
        yield


def test_everything_is_back_on_a_new_cluster_with_an_empty_redis(
    prefect: Installation, filled: dict[str, UUID], backed_up: object, new_servers: None
) -> None:
    argv = ["-m", "flows.infrastructure.prefect.server", "restore", "--environment", NAME, "--confirm", NAME]
    done = forked.run(argv, {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "proven by content" in done.stdout
    assert Secret.load("deploy-token").get() == TOKEN  # type: ignore[union-attr]
    with get_client(sync_client=True) as client:
        assert client.read_deployment(filled["deployment"]).name == "kept"
        assert client.read_automations_by_name("kept")[0].enabled
        assert client.read_global_concurrency_limit_by_name(f"env-{NAME}").active_slots == 0
    assert [state_of(filled[name]) for name in ("done", "under-way", "tomorrow")] == [
        "Completed",
        "Cancelled",
        "Scheduled",
    ]
    assert prefect.sql("SELECT 1 FROM flow_run WHERE id = %s", filled["overdue"]) == []
    assert {name: one.state for name, one in prefect.supervisor.services().items()} == {
        "prefect-api": "RUNNING",
        "prefect-services": "RUNNING",
    }
