"""full_restore: everything back and proven; refused, or the old data live, where it cannot be."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import TaskRun
from prefect.client.schemas.sorting import FlowRunSort

from flows.database import waiting_commits
from flows.database.backup import backup_database
from flows.recovery.full import bring_up
from flows.recovery.full_restore import full_restore
from lab import lifecycle
from lab.client import Lab
from lab.control import LabControl
from lab.state.base import base_directory
from runbook.errors import OpsError, RunbookFailed, Unreachable
from runbook.guard.lease import ANSWER_SECONDS, RENEW_EVERY_SECONDS
from runbook.report import Report, Status
from runbook.wait import until
from tasks.backups import catalogue
from tasks.stores.directory import DirectoryStore
from tests.recovery.conftest import System, restore
from tests.recovery.full.passwords import no_password_gets_out

GOOD = (Status.OK, Status.WARN)
HUNG_SECONDS = 70.0


def newest(system: System, kind: str = "postgres") -> Path:
    store = system.store(kind)
    return store / catalogue.names(DirectoryStore(store), kind)[-1]  # type: ignore[arg-type]


def newest_report(system: System) -> Path:
    return max(system.store("reports").glob("*-full-restore.json"), key=lambda path: path.stat().st_mtime)


def assert_steps(report: Report, lines: list[str]) -> None:
    """Every planned step is in the run's log in the plan's order, with its number, its estimate, and then its time; or
    why it was skipped."""
    total = len(report.plan_steps)
    named = [f"Step {number}/{total}: {one.step}" for number, one in enumerate(report.plan_steps, 1)]
    steps = [line for line in lines if line.startswith("Step ")]
    for name, planned in zip(named, report.plan_steps, strict=True):
        begun, *rest = [line for line in steps if line.startswith(f"{name}: ")]
        if begun.startswith(f"{name}: skipped: "):
            assert planned.step == "continue without a standby"
            continue
        assert begun.startswith(f"{name}: {planned.detail}")
        assert ("about" in begun or "less than" in begun) == bool(planned.seconds)
        assert re.fullmatch(rf"{re.escape(name)}: done in [\d.]+ s", rest[-1]), rest
    places = [steps.index(next(line for line in steps if line.startswith(name))) for name in named]
    swap = [one.step for one in report.plan_steps].index("swap")
    assert places[swap:] == sorted(places[swap:]), "those before run at the same time"
    assert max(places[:swap]) < places[swap]
    assert lines[-1].startswith("report in Prefect: http")


def test_everything_comes_back_from_ruins_through_prefect(
    system: System, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """The demo's disaster: database dropped, Redis's data removed, services killed. Redis's replica survives, with what
    was written since the backup. No password gets out meanwhile."""
    users = system.sql("SELECT count(*) FROM users")
    system.redis(1).set("since:the-backup", "kept")
    assert system.redis(1).wait(1, 60_000) == 1
    until(system.replica_is_known, what="Sentinels that know the replica's stream", seconds=120)
    keys = system.keys(1)
    pids = {name: row["pid"] for name, row in system.lab.status()["services"].items()}
    data = Path(system.lab.status()["redis"]["data"])
    system.drop()
    for name in ("grc-backend", "grc-frontend", "redis"):
        os.kill(pids[name], signal.SIGKILL)
    remove(data)
    until(lambda: not system.healthy(), what="the disaster", seconds=120)
    with no_password_gets_out(system, caplog, capfd):
        report: Report = full_restore(system.name, method="dump", files_source="backup", confirm=system.name)
    assert report.sentence() in caplog.text, "the log of the run was really read"
    ours = [one for one in caplog.records if one.name in ("prefect.flow_runs", "prefect.task_runs")]
    assert_steps(report, [one.getMessage() for one in ours if one.levelno >= logging.INFO])
    assert report.status in GOOD
    assert system.sql("SELECT count(*) FROM users") == users
    assert system.keys(1) == keys
    assert system.redis(1).getdel("since:the-backup") == b"kept"
    assert report.facts["redis source"].startswith("replica ")
    assert report.losses["Redis"].since, "the last offset of the master that a Sentinel knows bounds it"
    assert system.healthy()
    assert {"swap_databases", "swap_redis", "swap_files", "smoke_check"} <= {step.name for step in report.steps}
    assert report.facts["RTO"].endswith("of 4 h 00 min")
    written = json.loads(report.path.read_text()) if report.path else {}
    assert written["hash"] == report.hash
    assert written["status"] in ("OK", "WARN")
    begin = steps_without_edge(system, report)
    assert begin <= ROOTS, "the graph shows what stands behind what"


@pytest.mark.soak  # it stops the Prefect server that all tests share for a minute
def test_a_prefect_server_that_hangs_in_the_middle_does_not_prolong_the_outage(system: System) -> None:
    """SIGSTOP, from the stop of the services on: the application is healthy again before the server goes on."""
    control = LabControl.find(base_directory())
    assert control
    server = psutil.Process(control.supervisor.services()["server"].pid)
    hung = [server, *server.children(recursive=True)]
    began, healthy, resumed = list[float](), list[float](), list[float]()
    application = system.lab.status()["application"]["url"]

    def hang() -> None:
        until(lambda: not system.healthy(application), what="the outage", seconds=300, every_seconds=0.1)
        for process in hung:
            process.suspend()
        began.append(time.monotonic())
        try:
            health = "the application's health"
            until(lambda: system.healthy(application), what=health, seconds=HUNG_SECONDS, every_seconds=0.1)
            healthy.append(time.monotonic())
            resumed_at = began[0] + HUNG_SECONDS
            until(lambda: time.monotonic() > resumed_at, what="the end of the hang", seconds=HUNG_SECONDS + 5)
        finally:
            for process in hung:
                process.resume()
            resumed.append(time.monotonic())

    watcher = threading.Thread(target=hang)
    watcher.start()
    try:
        report: Report = full_restore(system.name, method="dump", confirm=system.name)
    finally:
        watcher.join()
    assert healthy, "the application was down for as long as Prefect did not answer"
    assert report.status is Status.WARN, report.sentence()
    (found,) = [one for one in report.findings if one.name == "Prefect did not answer"]
    silent, waited = map(float, re.findall(r"([\d.]+) s", found.value))
    assert healthy[0] - began[0] - RENEW_EVERY_SECONDS < silent < resumed[0] - began[0] + 1, "until the report"
    assert waited < 2 * ANSWER_SECONDS + 1, found.value


def remove(directory: Path) -> None:
    """Whatever is still written there by what has just been killed, or is being started again."""

    def gone() -> bool:
        shutil.rmtree(directory, ignore_errors=True)
        return not directory.exists()

    until(gone, what=f"the end of {directory}", seconds=120)


# What a run asks at its beginning, and what only reads the report's own state.
ROOTS = {
    "find_backup",
    "read_services",
    "read_server",
    "find_obstacles",
    "read_identity",
    "read_synchrony",
    "find_rewound",
    "mark_verified",
}


def steps_without_edge(system: System, report: Report) -> set[str]:
    """Of this lab's newest full restore in Prefect, which other workers' labs share, and which notes a task some time
    after it ran."""
    ours = FlowRunFilter(name={"like_": f"full-restore {system.name} "})  # type: ignore[arg-type]
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(flow_run_filter=ours, sort=FlowRunSort.START_TIME_DESC, limit=1)
        of_it = FlowRunFilter(id={"any_": [run.id]})

        def noted() -> list[TaskRun]:
            found = client.read_task_runs(flow_run_filter=of_it, limit=200)
            if missing := {step.name for step in report.steps} - {step_of(task) for task in found}:
                raise Unreachable(f"{len(found)} tasks, without {', '.join(sorted(missing))}")
            return found

        tasks = until(noted, what="all steps in Prefect", seconds=120)
    assert len(tasks) > 25
    return {step_of(task) for task in tasks if not any(task.task_inputs.values())}


def step_of(task: TaskRun) -> str:
    return task.name.rsplit("-", 1)[0]


def test_plan_shows_everything_and_changes_nothing(system: System) -> None:
    before = system.untouched()
    report = full_restore.fn(system.name, method="dump")
    assert report.status is Status.PLANNED
    steps = " ".join(f"{step.step} {step.detail}" for step in report.plan_steps)
    for word in ("staged copy", "swap", "stop services", "start services", "alembic", newest(system).name):
        assert word in steps
    assert system.untouched() == before


def test_stop_at_swap_gives_the_shorter_outage(system: System) -> None:
    """With services stopped at the swap only, they run while the copies are built."""
    report = full_restore.fn(system.name, method="dump", stop_services="at_swap", confirm=system.name)
    assert report.status in GOOD
    assert [measure.what for measure in report.measures] == ["everything backup"]
    order = [step.name for step in sorted(report.steps, key=lambda step: step.started)]
    assert order.index("stop_services") > order.index("analyze")


@pytest.mark.parametrize("kind", ["postgres", "redis", "files"])
def test_damaged_backup_is_refused_with_everything_running(system: System, kind: str) -> None:
    database = catalogue.find_backup(DirectoryStore(system.store("postgres")), "postgres", "latest", system.name)
    # Not a captured copy of Redis's data, which an earlier test's restore may have left in the store.
    store, moment = DirectoryStore(system.store(kind)), database.manifest.taken
    used = catalogue.find_nearest(store, kind, moment, system.name)  # type: ignore[arg-type]
    assert used
    backup = system.store(kind) / used.name
    victim = max((path for path in backup.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    before = system.untouched()
    try:
        with pytest.raises(RunbookFailed, match=backup.name):
            full_restore.fn(system.name, method="dump", files_source="backup", confirm=system.name)
        assert system.untouched() == before
    finally:
        victim.write_bytes(content)


def test_data_that_broke_the_rules_in_its_backup_goes_live_and_is_critical_unless_strict(system: System) -> None:
    """Every checksum, manifest and constraint is right, the data makes no sense. Only the expectations find it."""
    system.sql(
        "UPDATE interview_messages SET created_at = '2099-01-01' WHERE id = (SELECT min(id) FROM interview_messages)"
    )
    backup_database.fn(system.name)
    bad = newest(system)
    oid = system.untouched()[0]
    try:
        with pytest.raises(RunbookFailed, match="expectations on the copy.*its time is plausible") as failed:
            full_restore.fn(system.name, method="dump", strict=True, confirm=system.name)
        state = failed.value.report.state
        assert state
        assert state.value == "nothing live was replaced; services are as they were found"
        assert system.untouched()[0] == oid
        assert {row["running"] for row in system.lab.status()["services"].values()} == {True}

        done = restore(system)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1, last
        assert "CRITICAL: the system is up, and what was restored is proven; expectations on the copy" in last
        assert "its time is plausible: 1 rows break it" in last
        assert "the backup already had this data" in last
        assert system.untouched()[0] != oid
        assert system.log_in()
        assert system.healthy()
        told = findings(system)
        assert told["expectations on the live database"][0] == "OK", "it is reported once"
        assert "state of the system" not in told
        noted = catalogue.open_backup(DirectoryStore(bad.parent), bad.name)
        assert (noted.verified, noted.failed) == ("", "")
        assert "its time is plausible" in noted.broken
    finally:
        shutil.rmtree(bad)
        assert restore(system).returncode == 0


def test_older_schema_is_migrated_on_the_copy(system: System) -> None:
    backend = Path(system.lab.status()["root"]) / "opt" / "grc" / "backend"
    from runbook import shell

    shell.run([os.environ["OPS_LAB_PYTHON"], "-m", "alembic", "downgrade", "-1"], directory=backend)
    older = system.sql("SELECT version_num FROM alembic_version")[0][0]
    backup_database.fn(system.name)
    try:
        report = full_restore.fn(system.name, method="dump", confirm=system.name)
        assert report.status in GOOD
        assert report.facts["Alembic revision"].startswith(f"{older} → ")
        assert system.sql("SELECT version_num FROM alembic_version") != [(older,)]
    finally:
        shutil.rmtree(newest(system))


def test_backend_that_never_becomes_healthy_is_said(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bring_up, "HEALTH_SECONDS", 4)
    settings = Path(system.lab.status()["root"]) / "opt" / "grc" / "backend" / ".env"
    good = settings.read_text()
    from flows.application.files import backup_files

    settings.write_text(good.replace("grc_db", "no_such_database"))
    backup_files.fn(system.name)
    backup_database.fn(system.name)  # the files backup nearest to it is the bad one
    bad = newest(system, "files")
    try:
        with pytest.raises(RunbookFailed, match="not healthy after 4 s.*check the logs") as failed:
            full_restore.fn(system.name, method="dump", files_source="backup", confirm=system.name)
        (state,) = [found for found in failed.value.report.findings if found.name == "state of the system"]
        assert state.value.startswith("the backups' data is live, proven; the replaced data is kept: grc_db__old_")
        assert "undo-restore" in state.hint
    finally:
        shutil.rmtree(bad)
        assert restore(system).returncode == 0


def test_without_prefect_on_a_server_whose_data_is_gone(system: System) -> None:
    """The worst night: no control plane, no database cluster, no Redis data. Roles come from the backup."""
    status = system.lab.status()
    for name in ("postgres", "redis"):
        os.kill(status[name]["pid"], signal.SIGKILL)
        remove(Path(status[name]["data"]))
    try:
        done = restore(system)
        assert done.returncode == 0, done.stderr[-2000:]
        assert system.log_in()
        assert system.sql("SHOW data_checksums", "postgres") == [("on",)]
        told = findings(system)
        for name in ("standby and WAL receiver", "commits wait for no standby"):
            assert told[name][0] == "WARN", "nobody follows the new cluster"
            assert "rejoin-standby" in told[name][1]
        assert system.sql("SHOW synchronous_standby_names", "postgres") == [("",)]
        assert not system.lab.status()["services"]["wal-receiver"]["running"], "it would mix the WAL of two clusters"
        system.sql("CREATE TABLE committed ()")
        system.sql("DROP TABLE committed")
    finally:
        system.lab.renew_standby()
    assert system.sql("SHOW synchronous_standby_names", "postgres") != [("",)]


def findings(system: System) -> dict[str, tuple[str, str]]:
    """Status and hint by name, of the newest report of a full restore."""
    newest = newest_report(system)
    return {found["name"]: (found["status"], found["hint"]) for found in json.loads(newest.read_text())["findings"]}


def test_with_nobody_left_to_confirm_commits_it_goes_on_alone(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standby and receiver are dead, so every commit waits: the application's, and a restore's."""
    monkeypatch.setattr(waiting_commits, "ATTACH_SECONDS", 2.0)
    services, _ = lifecycle.existing(system.name)
    for program in ("postgresql-standby", "wal-receiver"):
        services.supervisor.stop(program)
    try:
        planned = full_restore.fn(system.name, method="dump")
        assert "continue without a standby" in {step.step for step in planned.plan_steps}
        assert system.sql("SHOW synchronous_standby_names", "postgres") != [("",)], "a plan changes nothing"
        report = full_restore.fn(system.name, method="dump", confirm=system.name)
        assert report.status is Status.WARN
        (found,) = [found for found in report.findings if found.name == "commits wait for no standby"]
        assert "rejoin-standby" in found.hint
        assert system.healthy()
    finally:
        system.sql("ALTER SYSTEM RESET synchronous_standby_names", "postgres")
        system.sql("SELECT pg_reload_conf()", "postgres")
        Lab.up(system.name, 3)


def test_files_of_before_a_failover_do_not_send_the_application_to_the_old_primary(system: System) -> None:
    settings = Path(system.lab.status()["root"]) / "opt" / "grc" / "backend" / ".env"
    good = settings.read_text()
    from flows.application.files import backup_files

    address = f":{system.lab.environ()['OPS_LAB_POSTGRES_PORT']}/grc_db"
    assert address in good
    settings.write_text(good.replace(address, f":{system.lab.environ()['OPS_LAB_STANDBY_PORT']}/grc_db"))
    backup_files.fn(system.name)
    backup_database.fn(system.name)  # the files backup nearest to it is the one of the old roles
    old = newest(system, "files")
    try:
        report = full_restore.fn(system.name, method="dump", files_source="backup", confirm=system.name)
        assert report.status in GOOD
        assert report.facts["connection string of the application"].endswith(address.removesuffix("/grc_db"))
        assert settings.read_text() == good
        assert system.healthy()
    finally:
        shutil.rmtree(old)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--backup", "20200101"), "there is no postgres backup “20200101”"),
        (("--confirm", "production"), "which is not the environment's name"),
        (("--environment", "../x"), "there is no environment"),
        (("--jobs", "99"), "jobs is 99"),
        (("--accept", "INDEX public.none"), "the backup has no INDEX public.none"),
    ],
)
def test_bad_input_gets_one_clear_sentence(system: System, words: tuple[str, ...], sentence: str) -> None:
    before = system.untouched()
    done = restore(system, *words)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert system.untouched() == before


def test_cancelled_between_two_swaps_and_launched_again(system: System) -> None:
    """The report names who ended it, what is live, what is left and what removes it; the next run completes."""
    assert restore(system, OPS_FAILPOINT="redis: before first rename:cancel").returncode == -signal.SIGTERM
    report = json.loads(newest_report(system).read_text())
    found = {one["name"]: one for one in report["findings"]}
    assert report["status"] == found["cancelled"]["status"] == "CRITICAL"
    assert found["cancelled"]["value"].startswith("ended by SIGTERM")
    changed = found["state of the system"]
    assert changed["value"].startswith(
        "interrupted, with an unknown result: swap redis; before that: swapped: database"
    )
    assert (
        "not swapped: Redis, files; services are stopped; the replaced data is kept: grc_db__old_" in changed["value"]
    )
    assert "run it again" in changed["hint"]
    left = found["left behind"]["value"].split("; ")
    assert {f"the service {role} is stopped" for role in ("backend", "frontend", "redis")} <= {*left}
    assert "start grc-backend, or run the runbook again" in found["left behind"]["hint"]
    assert "the next restore of Redis deletes it" in found["left behind"]["hint"]
    done = restore(system)
    assert done.returncode == 0, done.stderr[-2000:]
    assert system.log_in()


@pytest.mark.parametrize(
    "points", [("redis: between renames",), ("swap: after commit", "redis: between renames")], ids=["one", "in turn"]
)
def test_killed_at_the_swaps_and_launched_again(system: System, points: tuple[str, ...]) -> None:
    """Killed with -9 where the state of the system changes most: at each boundary in turn, the next run killed at the
    next; the last one ends well. The soak takes every point that a run passes."""
    for point in points:
        assert restore(system, OPS_FAILPOINT=point).returncode == -signal.SIGKILL, point
        assert system.sql("SELECT count(*) > 0 FROM users") == [(True,)], f"no database after a kill at {point}"
    done = restore(system)
    assert done.returncode == 0, done.stderr[-2000:]
    assert system.log_in()


@pytest.mark.soak
def test_killed_at_every_boundary(system: System, tmp_path: Path) -> None:
    """Every boundary that a run passes, each killed once and launched again to its end."""
    log = tmp_path / "points"
    assert restore(system, OPS_FAILPOINT_LOG=str(log)).returncode == 0
    for point in dict.fromkeys(log.read_text().splitlines()):
        assert restore(system, OPS_FAILPOINT=point).returncode == -signal.SIGKILL, point
        assert system.sql("SELECT count(*) > 0 FROM users") == [(True,)], point
        done = restore(system)
        assert done.returncode == 0, f"{point}: {done.stderr[-1500:]}"
        assert system.log_in(), point
        for old in system.sql("SELECT datname FROM pg_database WHERE datname ~ '__old_'", "postgres"):
            system.sql(f'DROP DATABASE "{old[0]}" WITH (FORCE)', "postgres")


def test_unknown_environment_is_an_ops_error() -> None:
    with pytest.raises(OpsError, match="there is no environment “nowhere”"):
        full_restore.fn("nowhere")
