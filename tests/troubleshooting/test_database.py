"""diagnose-database: each cause on a real server is named first, and a healthy one has none."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from flows.troubleshooting import database
from runbook.errors import RunbookFailed, Unreachable
from runbook.report import Report, Status
from runbook.wait import until
from tasks.host import ports
from tasks.postgres.server import greeting
from tasks.postgres.server.log_reasons import find_reason
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE, ROLE_PASSWORD, free_port
from tests.troubleshooting.conftest import PLACES, Host, cause, evidence, following


def diagnosed() -> Report:
    """Its report, critical or not."""
    try:
        return database.diagnose_database.fn(environment="sick")
    except RunbookFailed as error:
        return error.report


def test_of_a_healthy_server_nothing_is_found(host: Host, tmp_path: Path) -> None:
    host.describe(tmp_path, env_file=host.write_env())
    report = diagnosed()
    assert (report.status, cause(report)) == (Status.OK, "nothing found")
    assert "ready to accept connections" in evidence(report, "Log of postgres").text
    assert not following(report)
    answers = evidence(report, "Decision tree").rows
    assert len(answers) > 8
    assert {row[2] for row in answers} == {"as expected"}


def test_what_clients_sent_is_in_no_report(host: Host) -> None:
    host.server.sql("CREATE TABLE IF NOT EXISTS people (name text UNIQUE, age int)", database="grc_db")
    for statement in (
        "INSERT INTO people VALUES ('Hanako-4716', 1)",
        "INSERT INTO people VALUES ('Hanako-4716', 1)",
        "SELECT\n'Hanako-4716'::int",
    ):
        with contextlib.suppress(psycopg.Error):
            host.server.sql(statement, database="grc_db")
    report = diagnosed()
    log = evidence(report, "Log of postgres").text
    assert "duplicate key value violates unique constraint" in log
    assert "STATEMENT:  (left out)" in log
    assert "Hanako-4716" not in str(report.as_json())


def test_a_dead_process_is_reported_with_what_stopped_it(host: Host) -> None:
    with host.stopped("postgres"):
        report = diagnosed()
    assert "is down: the server's process is dead (postgresql is STOPPED" in cause(report)
    assert "since somebody stopped it" in cause(report)
    assert "show-recovery-options" in following(report)


def test_an_error_in_its_configuration_is_read_from_its_log(host: Host) -> None:
    file = host.server.data / "postgresql.auto.conf"
    before, log = file.read_text(), host.root / "postgresql.log"
    with host.stopped("postgres"):
        file.write_text(before + "this is no setting\n")
        log.write_text("")
        host.services.start("postgres")
        until(lambda: "contains errors" in log.read_text(), what="its end", seconds=120)
        report = diagnosed()
        file.write_text(before)
    assert "its configuration has an error" in cause(report)
    assert "undo-postgres-settings" in following(report)


def test_a_port_where_nobody_listens_is_no_dead_process(host: Host, tmp_path: Path) -> None:
    host.describe(tmp_path, port=free_port())
    found = cause(diagnosed())
    assert "nobody listens on" in found
    assert "process runs" in found


def test_what_ends_at_once_and_is_just_tried_again_has_the_same_next_step(host: Host, tmp_path: Path) -> None:
    """Its log has the reason; that there is a process for a moment changes nothing."""
    host.describe(tmp_path, port=free_port())
    log = host.root / "postgresql.log"
    before = log.read_text()
    log.write_text(before + '[1] FATAL:  configuration file "postgresql.auto.conf" contains errors\n')
    report = diagnosed()
    log.write_text(before)
    assert "process runs" in cause(report)
    assert "undo-postgres-settings" in following(report)


def test_a_supervisor_that_does_not_answer_is_not_taken_for_a_dead_process(host: Host, tmp_path: Path) -> None:
    host.describe(tmp_path, port=free_port(), control=free_port())
    report = diagnosed()
    assert "nobody listens there" in cause(report)
    assert "process is dead" not in cause(report)
    assert any(one.name.startswith("not measured: is the process") for one in report.findings)


@pytest.mark.parametrize(
    ("name", "text"), [("no-such-host.invalid", "cannot resolve the name"), ("255.255.255.255", "cannot be reached")]
)
def test_a_host_that_is_away(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setattr(ports, "CONNECT_SECONDS", 1.0)
    host.describe(tmp_path, host=name)
    assert text in cause(diagnosed())


def test_what_listens_there_is_something_else(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "UNPROMPTED_SECONDS", 0.5)
    host.describe(tmp_path, port=host.control)
    assert "is no PostgreSQL" in cause(diagnosed())


def test_a_server_that_hangs(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(greeting, "UNPROMPTED_SECONDS", 0.25)
    pid = host.services.state("postgres").pid
    os.kill(pid, signal.SIGSTOP)
    try:
        assert "hangs" in cause(diagnosed())
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_server_that_is_not_up_yet(host: Host) -> None:
    signals = host.server.data / "standby.signal"
    host.server.sql("ALTER SYSTEM SET hot_standby = off")
    try:
        with host.stopped("postgres"):
            signals.touch()
            os.chown(signals, host.server.account.uid, host.server.account.gid)
            host.services.start("postgres")
            where = host.server.block()
            until(lambda: greeting.read_greeting.work(where).answers, what="a greeting", seconds=120)
            report = diagnosed()
            host.services.stop("postgres")
            signals.unlink()
    finally:
        host.server.sql("ALTER SYSTEM RESET hot_standby")
        with host.stopped("postgres"):
            pass  # it was a standby: until another start it looks as if it had crashed
    assert "is starting up, recovering or stopping" in cause(report)
    assert "diagnose-database" in following(report)


def test_a_wrong_password_of_the_environment(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SICK_PASSWORD", "not-this-one")
    report = diagnosed()
    assert "refuses the password of role grc_user" in cause(report)
    assert "not-this-one" not in str(report.as_json())


def test_a_wrong_password_in_the_application_s_own_file(host: Host, tmp_path: Path) -> None:
    host.describe(tmp_path, env_file=host.write_env("stale-word-77"))
    report = diagnosed()
    assert "refuses the password of the application's own connection string (DATABASE_URL" in cause(report)
    for secret in ("stale-word-77", ROLE_PASSWORD):
        assert secret not in str(report.as_json())


@contextlib.contextmanager
def sessions(host: Host, count: int) -> Iterator[list[psycopg.Connection[tuple[object, ...]]]]:
    """So many of the application's role, each in a transaction of its own when it is used."""
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(contextlib.closing(until(lambda: _opened(host), what="a place", seconds=120)))
            for _ in range(count)
        ]
        pids = [one.info.backend_pid for one in opened]
        yield opened
    until(lambda: _all_ended(host, pids), what="the end of the sessions, which the server sees later", seconds=120)


def _opened(host: Host) -> psycopg.Connection[tuple[object, ...]]:
    try:
        return psycopg.connect(
            host="127.0.0.1",
            port=host.server.port,
            user=ROLE,
            password=ROLE_PASSWORD,
            dbname="grc_db",
            application_name="grc_backend",
        )
    except psycopg.OperationalError as error:  # who has just left has it for a moment yet
        raise Unreachable(str(error)) from None


def _all_ended(host: Host, pids: list[int]) -> bool:
    with contextlib.suppress(psycopg.OperationalError):  # every place is taken for a moment yet
        return host.server.sql("SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s)", pids) == [(0,)]
    return False


@pytest.mark.parametrize("reserved", [0, 3], ids=["all but the reserved places", "every place"])
def test_the_connection_limit_is_reached(host: Host, tmp_path: Path, reserved: int) -> None:
    """Nobody's password is to blame, the application's own connection string included (SQLSTATE 53300, not 28P01)."""
    host.describe(tmp_path, env_file=host.write_env())
    with contextlib.ExitStack() as stack:
        stack.enter_context(sessions(host, PLACES - 3))
        stack.enter_context(contextlib.ExitStack())
        for _ in range(reserved):
            stack.enter_context(host.server.connect())
        report = diagnosed()
    assert "has reached its connection limit" in cause(report)
    follow = following(report)
    assert "'override=max_connections = 300'" in follow
    assert "takes effect at a restart of PostgreSQL only" in follow
    assert "undo-postgres-settings" in follow
    if not reserved:
        assert f"{PLACES - 3} by grc_user (grc_backend)" in cause(report)
    assert "PASSWORD" not in "".join(f"{one.value}{one.hint}" for one in report.findings).upper()


def test_a_role_s_own_limit_is_no_wrong_password(host: Host, tmp_path: Path) -> None:
    host.describe(tmp_path, env_file=host.write_env())
    host.server.sql("ALTER ROLE grc_user CONNECTION LIMIT 0")
    report = diagnosed()
    host.server.sql("ALTER ROLE grc_user CONNECTION LIMIT -1")
    assert cause(report).startswith("the role grc_user has reached its own connection limit of 0")
    critical = [one for one in report.findings if one.status is Status.CRITICAL]
    assert all("CONNECTION LIMIT" in one.hint for one in critical), critical
    assert "max_connections" not in following(report)


def test_a_lock_pile_up_names_who_holds_it(host: Host) -> None:
    host.server.sql("CREATE TABLE IF NOT EXISTS piled (id int)", database="grc_db", user=ROLE)
    with sessions(host, 3) as (holder, *waiting):
        pid = holder.info.backend_pid
        holder.execute("LOCK TABLE piled IN ACCESS EXCLUSIVE MODE")
        threads = [threading.Thread(target=_waits, args=(one,)) for one in waiting]
        for thread in threads:
            thread.start()
        until(lambda: _blocked(host) == 2, what="two that wait", seconds=120)
        report = diagnosed()
        holder.rollback()
        for thread in threads:
            thread.join(120)
    assert cause(report).startswith("a lock pile-up: 2 sessions wait")
    assert f"behind process {pid} (grc_user, grc_backend, idle in transaction)" in cause(report)
    assert "LOCK TABLE piled" in cause(report)
    assert "close-idle-connections" in following(report)


def _waits(session: psycopg.Connection[tuple[object, ...]]) -> None:
    session.execute("SELECT count(*) FROM piled")
    session.rollback()


def _blocked(host: Host) -> object:
    waiting = (
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND clock_timestamp() > "
        "state_change + interval '0.2 s'"
    )
    return host.server.sql(waiting)[0][0]


def test_too_many_sit_idle_in_a_transaction(host: Host) -> None:
    with sessions(host, 7) as opened:
        for one in opened:
            one.execute("SELECT 1")
        report = diagnosed()
    assert "7 of 7 sessions are idle in a transaction" in cause(report)
    assert "close-idle-connections" in following(report)


def test_a_server_that_takes_no_writes(host: Host) -> None:
    host.server.sql(f"ALTER ROLE {ROLE} SET default_transaction_read_only = on")
    try:
        report = diagnosed()
    finally:
        host.server.sql(f"ALTER ROLE {ROLE} RESET default_transaction_read_only")
    assert "rejects writes" in cause(report)


STANDBY = """
[standby]
port = {port}
database = "grc_db"
user = "grc_user"
password_env = "SICK_PASSWORD"
admin_password_env = "SICK_ADMIN_PASSWORD"
"""


def test_a_standby_that_is_dead_does_not_lag_it_is_missed(host: Host, tmp_path: Path) -> None:
    port = free_port()
    host.describe(tmp_path, more=STANDBY.format(port=port))
    report = diagnosed()
    assert report.status is Status.WARN
    assert cause(report).startswith(f"the standby at 127.0.0.1:{port} does not answer (closed")
    assert "rejoin-standby" in following(report)


def test_an_administrator_who_may_not_look_is_never_ok(host: Host, tmp_path: Path) -> None:
    host.server.sql(f"CREATE ROLE weak LOGIN PASSWORD '{ADMIN_PASSWORD}'")
    host.describe(tmp_path, admin="weak")
    try:
        with sessions(host, 1):
            report = diagnosed()
    finally:
        host.server.sql("DROP ROLE weak")
    assert report.status is Status.WARN
    assert "probes that could not run: 2" in cause(report)
    assert "permission denied" in str([one.value for one in report.findings])


def test_a_probe_that_cannot_be_made_is_never_ok(host: Host) -> None:
    host.server.sql("REVOKE TEMPORARY ON DATABASE grc_db FROM PUBLIC; ALTER DATABASE grc_db OWNER TO postgres")
    try:
        report = diagnosed()
    finally:
        host.server.sql("GRANT TEMPORARY ON DATABASE grc_db TO PUBLIC; ALTER DATABASE grc_db OWNER TO grc_user")
    assert report.status is Status.WARN
    assert "not found; probes that could not run: 1" in cause(report)


def test_a_reason_is_read_from_the_end_of_a_log() -> None:
    lines = {
        "FATAL:  could not create shared memory segment: No space left on device": "segments",
        'PANIC:  could not write to file "pg_wal/xlogtemp.1": No space left on device': "disk",
        'LOG:  could not bind IPv4 address "127.0.0.1": Address already in use': "port",
        'FATAL:  configuration file "/x/postgresql.conf" contains errors': "configuration",
        'FATAL:  lock file "postmaster.pid" already exists': "lock file",
    }
    for line, kind in lines.items():
        found = find_reason(f"LOG:  database system is ready to accept connections\n{line}\n")
        assert found
        assert found.kind == kind
        assert find_reason(f"{line}\nLOG:  database system is ready to accept connections\n") is None
