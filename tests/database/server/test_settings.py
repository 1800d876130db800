"""check_, apply_ and undo_postgres_settings on a server of their own: what a reload takes over and what a restart."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.database.server.settings import apply_postgres_settings, check_postgres_settings, undo_postgres_settings
from flows.database.upkeep.vacuum import check_autovacuum
from lab.servers.postgres import _RECOMMENDED
from runbook import kinds
from runbook.errors import RunbookFailed
from runbook.files.chain import verify_chain
from runbook.report import Report, Status
from tasks.postgres.server import settings
from tasks.postgres.server.recommended import MANUAL
from tasks.reports.setting_records import FOLDER
from tests.database.conftest import NAME, write_environment
from tests.fixtures import forked
from tests.fixtures.reports import beginning as found
from tests.fixtures.servers import ADMIN_PASSWORD, PATIENT, ROLE_PASSWORD, PostgresServer, running_postgres

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """Its settings change and it restarts, so no other test may use it. Like the lab's it begins with the manual's."""
    with running_postgres() as server:
        server.stop()
        server.settings = tuple(s for s in server.settings if not s.startswith("shared_buffers"))
        lines = "".join(f"{name} = '{value}'\n" for name, value in MANUAL.items())
        with (server.data / "postgresql.conf").open("a") as file:
            file.write(lines)
        server.start()
        server.create_database("settings_db")
        yield server


@pytest.fixture
def server(own_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PostgresServer]:
    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(write_environment(own_server, "settings_db", tmp_path)))
    monkeypatch.setenv("TRIAL_PASSWORD", ROLE_PASSWORD)
    monkeypatch.setenv("TRIAL_ADMIN_PASSWORD", ADMIN_PASSWORD)
    yield own_server
    own_server.sql("ALTER SYSTEM RESET ALL")
    own_server.sql("SELECT pg_reload_conf()")
    if own_server.sql("SELECT count(*) FROM pg_settings WHERE pending_restart")[0][0]:
        own_server.restart()


def show(server: PostgresServer, name: str) -> str:
    return str(server.sql("SELECT current_setting(%s)", name)[0][0])


def auto(server: PostgresServer) -> str:
    return (server.data / "postgresql.auto.conf").read_text()


def apply(**parameters: object) -> Report:
    return apply_postgres_settings.fn(NAME, confirm=NAME, **parameters)  # type: ignore[arg-type]


def record_path(tmp_path: Path) -> Path:
    return max((tmp_path / "reports" / FOLDER).glob("*.json"))


def test_the_manual_s_values_are_ok_and_the_lab_s(server: PostgresServer) -> None:
    report = check_postgres_settings.fn(NAME)
    assert report.status is Status.OK, report.sentence()
    assert report.outcome == "19 of 19 settings have an accepted value"
    assert dict(_RECOMMENDED) == dict(MANUAL)
    assert apply_postgres_settings.fn(NAME).outcome == "nothing to change"


def test_changed_settings_are_found_with_what_they_need(server: PostgresServer) -> None:
    for statement in ("work_mem = '1MB'", "autovacuum_naptime = '60s'", "max_connections = 150"):
        server.sql(f"ALTER SYSTEM SET {statement}")
    report = check_postgres_settings.fn(NAME)
    assert found(report, "work_mem").value == "1MB after the next reload"
    server.sql("SELECT pg_reload_conf()")
    report = check_postgres_settings.fn(NAME)
    assert report.status is Status.WARN
    assert (found(report, "work_mem").value, "by reload" in found(report, "work_mem").hint) == ("1MB", True)
    assert found(report, "max_connections").value == "150 after the next restart"
    assert found(report, "autovacuum_naptime").status is Status.OK, "60 s is 1 min"
    server.sql("ALTER SYSTEM SET autovacuum = off")
    server.sql("SELECT pg_reload_conf()")
    with pytest.raises(RunbookFailed, match="autovacuum: off"):
        check_postgres_settings.fn(NAME)


def test_a_reload_alone_is_planned(server: PostgresServer) -> None:
    server.sql("ALTER SYSTEM SET work_mem = '1MB'")
    server.restart()
    server.sql("ALTER SYSTEM SET work_mem = '4MB'")
    planned = apply_postgres_settings.fn(NAME)
    assert [(step.step, step.detail) for step in planned.plan_steps] == [("reload", "the configuration")]
    assert apply().plan_steps == planned.plan_steps
    assert show(server, "work_mem") == "4MB"


def test_a_plan_changes_nothing_then_values_are_set_and_undone(server: PostgresServer, tmp_path: Path) -> None:
    server.sql("ALTER SYSTEM SET work_mem = '1MB'")
    server.sql("ALTER SYSTEM SET max_connections = 150")
    server.restart()
    before = auto(server)
    planned = apply_postgres_settings.fn(NAME)
    assert planned.status is Status.PLANNED
    assert sorted(step.detail.split(";")[0] for step in planned.plan_steps) == [
        "max_connections = 200",
        "the configuration",
        "work_mem = 4MB",
    ]
    assert auto(server) == before
    assert not (tmp_path / "reports" / FOLDER).exists()
    report = apply()
    assert report.status is Status.WARN
    assert found(report, "waits for a restart").value == "max_connections"
    assert (show(server, "work_mem"), show(server, "max_connections")) == ("4MB", "150")
    assert found(check_postgres_settings.fn(NAME), "max_connections").hint.startswith("restart PostgreSQL")
    assert apply().outcome == "nothing to change", "what waits for a restart is not written again"
    server.restart()
    assert check_postgres_settings.fn(NAME).status is Status.OK
    assert undo_postgres_settings.fn(NAME).pins["record"] == record_path(tmp_path).stem
    undone = undo_postgres_settings.fn(NAME, confirm=NAME)
    assert found(undone, "waits for a restart").value == "max_connections"
    assert sorted(auto(server).splitlines()) == sorted(before.splitlines())
    assert show(server, "work_mem") == "1MB"
    assert json.loads(record_path(tmp_path).read_text())["undone"]
    with pytest.raises(RunbookFailed, match="there is no record"):
        undo_postgres_settings.fn(NAME, confirm=NAME)
    assert verify_chain(tmp_path / "reports") == []


def test_the_manual_s_temporary_max_connections(server: PostgresServer, tmp_path: Path) -> None:
    report = apply(override="max_connections = 300", override_hours=2, reason="incident 42")
    assert found(report, "waits for a restart").value == "max_connections"
    assert show(server, "max_connections") == "200"
    server.restart()
    assert show(server, "max_connections") == "300"
    report = check_postgres_settings.fn(NAME)
    assert report.status is Status.OK, report.sentence()
    assert "incident 42" in found(report, "override max_connections = 300").value
    assert apply().outcome == "nothing to change", "an override in force is left alone"
    _expire(tmp_path)
    report = check_postgres_settings.fn(NAME)
    assert report.status is Status.WARN
    assert "undo-postgres-settings" in found(report, "override max_connections = 300").hint
    assert found(report, "max_connections").expected == "200"
    apply()  # enforces it
    assert "max_connections = '200'" in auto(server)
    assert not [f for f in check_postgres_settings.fn(NAME).findings if f.name.startswith("override")]
    server.restart()
    assert check_postgres_settings.fn(NAME).status is Status.OK


def launch(parameters: str, **environment: str) -> int:
    """apply-postgres-settings in a process of its own; returns how that ended."""
    call = f"apply_postgres_settings.fn({NAME!r}, confirm={NAME!r}, {parameters})"
    code = f"{PATIENT}from flows.database.server.settings import *; {call}"
    return forked.run(["-c", code], {**os.environ, **environment}, capture=False).returncode


def test_an_override_that_was_recorded_and_never_written_is_none(server: PostgresServer, tmp_path: Path) -> None:
    """Killed between record and ALTER SYSTEM: what a check asks for, an apply does."""
    override = "override='max_connections = 300'"
    assert launch(override, OPS_FAILPOINT="settings: recorded") == -signal.SIGKILL
    assert json.loads(record_path(tmp_path).read_text())["until"]
    assert "max_connections" not in auto(server)
    report = check_postgres_settings.fn(NAME)
    assert report.status is Status.OK, report.sentence()
    server.sql("ALTER SYSTEM SET max_connections = 150")
    server.restart()
    assert found(check_postgres_settings.fn(NAME), "max_connections").expected == "200 or more"
    apply(names=("max_connections",))
    server.restart()
    assert show(server, "max_connections") == "200"
    assert launch(override) == 0
    assert "max_connections = '300'" in auto(server)
    assert launch("override='max_connections = 400'", OPS_FAILPOINT="settings: recorded") == -signal.SIGKILL
    server.restart()
    report = check_postgres_settings.fn(NAME)
    assert found(report, "override max_connections = 300").status is Status.OK, "the one before is in force still"
    assert found(report, "max_connections").expected == "300"


MORE = {
    "shared_buffers": "320MB",
    "max_connections": "250",
    "work_mem": "8MB",
    "max_wal_size": "8GB",
    "autovacuum_vacuum_scale_factor": "0.02",
    "autovacuum_naptime": "15s",
}


def test_a_bigger_server_and_an_eager_autovacuum_are_well_and_left_alone(server: PostgresServer) -> None:
    for name, value in MORE.items():
        server.sql(f"ALTER SYSTEM SET {name} = '{value}'")
    server.restart()
    report = check_postgres_settings.fn(NAME)
    assert report.status is Status.OK, report.sentence()
    assert (found(report, "shared_buffers").value, found(report, "shared_buffers").expected) == (
        "320MB",
        "256MB or more",
    )
    notes = {row[0]: row[-1] for row in table(report, "Settings")}
    assert notes["autovacuum_naptime"] == "accepted: the manual has 1min or less"
    assert {found(check_autovacuum.fn(NAME), name).status for name in MORE if "autovacuum" in name} == {Status.OK}
    applied = apply()
    assert applied.outcome == "nothing to change"
    assert {row[0] for row in table(applied, "Kept")} == set(MORE)
    step, reload = apply_postgres_settings.fn(NAME, names=("max_connections",)).plan_steps
    assert "max_connections = 200; now 250, which is more;" in step.detail
    assert reload.step == "reload"
    assert apply(names=("work_mem",)).status is Status.OK
    assert show(server, "work_mem") == "4MB"
    server.sql("ALTER SYSTEM SET autovacuum_vacuum_scale_factor = 0.3")
    server.sql("SELECT pg_reload_conf()")
    lazy = found(check_autovacuum.fn(NAME), "autovacuum_vacuum_scale_factor")
    assert lazy == found(check_postgres_settings.fn(NAME), "autovacuum_vacuum_scale_factor"), "one judgement"
    assert "apply-postgres-settings with names=autovacuum_vacuum_scale_factor" in lazy.hint


def table(report: Report, name: str) -> tuple[tuple[str, ...], ...]:
    return next(evidence.rows for evidence in report.evidence if evidence.name == name)


def _expire(tmp_path: Path) -> None:
    path = record_path(tmp_path)
    told = json.loads(path.read_text())
    until = datetime.fromisoformat(told["until"])
    assert timedelta(hours=1.9) < until - datetime.now(UTC) < timedelta(hours=2.1)
    path.write_text(json.dumps({**told, "until": (until - timedelta(hours=3)).isoformat()}))


def test_an_override_is_undone_to_what_the_file_says(server: PostgresServer) -> None:
    apply(override="work_mem=32MB")
    assert show(server, "work_mem") == "32MB"
    undo_postgres_settings.fn(NAME, confirm=NAME)
    assert show(server, "work_mem") == "4MB"
    assert "work_mem" not in auto(server)


def test_a_setting_that_somebody_changed_since_is_left_alone(server: PostgresServer) -> None:
    apply(override="work_mem=32MB")
    server.sql("ALTER SYSTEM SET work_mem = '8MB'")
    report = undo_postgres_settings.fn(NAME, confirm=NAME)
    assert report.status is Status.WARN
    assert found(report, "work_mem kept").value == "8MB, changed since"
    assert "work_mem = '8MB'" in auto(server)


def test_an_override_that_was_replaced_never_comes_into_force_again(server: PostgresServer) -> None:
    """The same value, set by hand later, is somebody's decision: nobody takes it back for an override's end."""
    apply(override="work_mem = 32MB", reason="incident")
    server.sql("ALTER SYSTEM SET work_mem = '2MB'")
    server.sql("SELECT pg_reload_conf()")
    apply()
    server.sql("ALTER SYSTEM SET work_mem = '32MB'")
    server.sql("SELECT pg_reload_conf()")
    assert not [f for f in check_postgres_settings.fn(NAME).findings if f.name.startswith("override")]


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("max_connections", "is not an override"),
        ("fsync = off", "is not an override"),
        ("work_mem = lots", "is not a value of work_mem"),
        ("work_mem = 5min", "is not a value of work_mem"),
        ("work_mem = 1kB", "out of range"),
        ("max_connections = 200", "is the manual's value"),
        ("max_connections = 2", "max_connections above the reserved ones"),
    ],
)
def test_an_override_that_would_do_harm_is_refused(server: PostgresServer, override: str, why: str) -> None:
    before = auto(server)
    with pytest.raises(RunbookFailed, match=why):
        apply(override=override)
    assert auto(server) == before


def test_what_stands_above_alter_system_is_said(server: PostgresServer) -> None:
    server.settings, kept = (*server.settings, "shared_buffers=64MB", "work_mem=4MB"), server.settings
    try:
        server.sql("ALTER SYSTEM SET work_mem = '1MB'")
        server.restart()
        report = check_postgres_settings.fn(NAME)
        assert "start command" in found(report, "shared_buffers").hint
        assert found(report, "work_mem").status is Status.OK, "the file's value has no effect"
        report = apply()
        assert report.status is Status.WARN
        assert "command line" in found(report, "shared_buffers").value
        assert "shared_buffers" not in auto(server)
    finally:
        server.settings = kept
        server.restart()


def test_values_of_a_role_or_database_and_file_errors_are_found(server: PostgresServer) -> None:
    server.sql("ALTER ROLE grc_user IN DATABASE settings_db SET work_mem = '99MB'")
    server.sql("ALTER ROLE postgres SET random_page_cost = 4")
    conf = server.data / "postgresql.conf"
    text = conf.read_text()
    try:
        report = check_postgres_settings.fn(NAME)
        assert found(report, "other values for the application").value == "work_mem = 99MB …"
        assert found(report, "random_page_cost not measured").value == "set by user"
        conf.write_text(text + "work_mem = 'nonsense'\n")
        with pytest.raises(RunbookFailed, match="configuration files.*work_mem"):
            check_postgres_settings.fn(NAME)
    finally:
        conf.write_text(text)
        server.sql("ALTER ROLE grc_user IN DATABASE settings_db RESET work_mem")
        server.sql("ALTER ROLE postgres RESET random_page_cost")


def test_a_run_killed_between_two_writes_is_launched_again(server: PostgresServer, tmp_path: Path) -> None:
    server.sql("ALTER SYSTEM SET work_mem = '1MB'")
    server.sql("ALTER SYSTEM SET random_page_cost = 4")
    server.sql("SELECT pg_reload_conf()")
    before = auto(server)
    assert launch("", OPS_FAILPOINT="settings: written") == -signal.SIGKILL
    assert len([line for line in before.splitlines() if line not in auto(server)]) == 1, "one of two was written"
    apply()
    assert check_postgres_settings.fn(NAME).status is Status.OK
    assert len(list((tmp_path / "reports" / FOLDER).glob("*.json"))) == 2
    for _ in range(2):
        undo_postgres_settings.fn(NAME, confirm=NAME)
    assert sorted(auto(server).splitlines()) == sorted(before.splitlines())


def test_a_server_killed_between_two_writes_is_served_again(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.sql("ALTER SYSTEM SET work_mem = '1MB'")
    server.sql("ALTER SYSTEM SET random_page_cost = 4")
    server.sql("SELECT pg_reload_conf()")
    with monkeypatch.context() as patched:
        patched.setattr(kinds, "RETRY_DELAYS_SECONDS", [0.1, 0.1, 0.1])
        patched.setattr(settings, "failpoint", lambda _: server.crash())
        with pytest.raises(RunbookFailed, match="does not answer"):
            apply()
    server.start()
    apply()
    assert check_postgres_settings.fn(NAME).status is Status.OK
