"""full_restore: what it tells of the writes that are lost, of the RTO, and of the state that it leaves."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import socket
import threading
from pathlib import Path

import pytest

from blocks.environment import Environment
from flows import launch
from flows.database.backup import backup_database
from flows.recovery import full_restore as module
from flows.recovery.full_restore import full_restore
from runbook.errors import OpsError
from runbook.report import Report, Status
from tasks.drill.ledger import WriteLedger
from tasks.drill.lost_writes import find_lost_writes
from tasks.drill.writer import Writer
from tasks.postgres.dump.dump import GLOBALS
from tasks.postgres.server.roles import create_roles
from tasks.postgres.server.server import presence
from tasks.stores.directory import DirectoryStore
from tests.fixtures.servers import PostgresServer, running_postgres
from tests.recovery.conftest import System


def finding(report: Report, name: str) -> tuple[Status, str]:
    return next((found.status, found.value) for found in report.findings if found.name == name)


def test_writes_until_the_stop_are_counted_and_a_late_recovery_is_no_failed_one(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With services that run until the swap, clients write while the copies are built: a few, as the first thousand since
    the backup are named."""
    backup_database.fn(system.name)
    late = Environment.find(system.name)
    late.rto_seconds = 1
    monkeypatch.setattr(module.Environment, "find", lambda _name: late)
    ledger = WriteLedger(tmp_path / "writes.jsonl")
    with Writer(late.application, ledger, per_second=2, every=1000):
        report = full_restore.fn(system.name, method="dump", stop_services="at_swap", confirm=system.name)
    gone = find_lost_writes(ledger, system.lab.status()["postgres"]["dsn"], late.application).lost
    named = next(table for table in report.evidence if table.name.startswith("Writes lost, one by one"))
    assert [attempt for attempt in gone if attempt.sent > report.started], "clients wrote after the run began"
    assert {attempt.key for attempt in gone} <= {row[3] for row in named.rows}
    counted = re.match(r"[\d,]+", report.facts["writes lost"])
    assert counted
    assert int(counted[0].replace(",", "")) >= len(gone)
    assert report.status is Status.WARN
    assert finding(report, "recovery time against the RTO")[0] is Status.WARN


def test_a_server_whose_data_is_elsewhere_is_not_taken_for_a_lost_one(
    postgres_server: PostgresServer, tmp_path: Path
) -> None:
    block = postgres_server.block("postgres")
    assert presence(block) == "up"
    elsewhere = block.model_copy(update={"data_directory": str(tmp_path / "data")})
    with pytest.raises(OpsError, match="the environment says .*/data — correct .* data_directory"):
        presence(elsewhere)
    assert presence(elsewhere.model_copy(update={"port": 1})) == "absent"
    with pytest.raises(OpsError, match=f"it listens on port {block.port}, not on 1"):
        presence(block.model_copy(update={"port": 1}))


def test_roles_tablespaces_and_passwords_of_a_new_server(system: System, tmp_path: Path) -> None:
    """Killed half-way and launched again it ends well; roles without a password are named, ours is not in the log."""
    from tasks.backups.catalogue import Backup, names, open_backup

    store = DirectoryStore(system.store("postgres"))
    whole = open_backup(store, names(store, "postgres")[-1])
    with running_postgres(settings=("log_statement=all",)) as server:
        fast = server.root / "fast"
        backup = Backup(tmp_path, whole.manifest, whole.store)
        (tmp_path / GLOBALS).write_text(
            (whole.path / GLOBALS).read_text()
            + "CREATE ROLE reporter;\nALTER ROLE reporter WITH NOSUPERUSER LOGIN;\n"
            + f"CREATE TABLESPACE fast OWNER reporter LOCATION '{fast}';\n"
        )
        block = server.block("grc_db")
        with pytest.raises(OpsError, match="a tablespace cannot be created.*create that directory"):
            create_roles.work(block, backup, ["postgres"])
        server.account.directory(fast, 0o700)
        assert create_roles.work(block, backup, ["grc_user", "postgres", "reporter"]).names == ()
        assert server.sql("SELECT count(*) FROM pg_tablespace WHERE spcname = 'fast'") == [(1,)]
        server.sql("DROP TABLESPACE fast")
        server.sql("DROP ROLE reporter, grc_user")
        made = create_roles.work(block, backup, ["postgres"])
        assert (made.names, made.without_password) == (("grc_user", "reporter"), ("reporter",))
        block.connect("postgres", as_application=True).close()
        assert block.password.get_secret_value() not in server.log.read_text()
        shutil.rmtree(fast, ignore_errors=True)


def test_a_prefect_that_is_only_busy_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    def serve() -> None:
        for number in itertools.count():
            try:
                connection, _address = listener.accept()
            except OSError:  # it was shut down
                return
            with connection, contextlib.suppress(OSError):  # a client that waited long enough
                if number:  # the first time it is cut off
                    token = b"csrf-token" in connection.recv(65536)  # Prefect's client asks for one first
                    status = "422 Unprocessable" if token else "503 Busy" if number < 6 else "200 OK"
                    said = "CSRF protection is disabled."
                    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(said)}\r\nConnection: close\r\n\r\n"
                    connection.sendall((head + said).encode())

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{listener.getsockname()[1]}/api"}):
            assert launch.prefect_answers()
        listener.shutdown(socket.SHUT_RDWR)
    monkeypatch.setattr(launch, "PREFECT_SECONDS", 0.2)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        assert not launch.prefect_answers()


def test_a_run_without_prefect_says_whom_its_lock_keeps_out(system: System) -> None:
    assert full_restore.fn(system.name, method="dump").facts["lock"].startswith("keeps out runs on this host only")
