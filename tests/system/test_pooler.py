"""PgBouncer in transaction mode between the runbooks and the server: a session's lock protects nothing there."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocks.exclusion import Cluster, Exclusion
from blocks.postgres.server import Postgres
from flows.pinned import pin_database
from lab.processes import OsAccount, write
from runbook.errors import OpsError, Unreachable
from runbook.report import Report, Status
from runbook.wait import until
from tasks.postgres.restore.swap import advisory_lock
from tests.fixtures.servers import PostgresServer, free_port

pytestmark = pytest.mark.system
PROGRAM = "pgbouncer"
CONFIGURATION = """\
[databases]
* = host=127.0.0.1 port={server.port} user={login.admin_user} password='{password}'
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
auth_type = any
pool_mode = transaction
unix_socket_dir =
"""


@pytest.fixture
def pooled(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[Postgres]:
    """The server's block, by way of the pooler. PgBouncer refuses to run as root."""
    login, port, account = postgres_server.block(), free_port(), OsAccount.of_servers()
    configuration = Path("/var/tmp") / f"ops-pooler-{port}.ini"
    password = login.admin_password.get_secret_value()
    write(
        configuration,
        CONFIGURATION.format(server=postgres_server, login=login, password=password, port=port),
        0o600,
        account,
    )
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*account.prefix, PROGRAM, configuration], stdout=log, stderr=log)
    block = login.model_copy(update={"port": port})

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()
        try:
            block.connect().close()
        except OpsError as error:
            raise Unreachable(error.message) from None
        return True

    try:
        until(answers, what="PgBouncer", seconds=60, every_seconds=0.05)
        yield block
    finally:
        process.kill()
        process.wait(60)
        configuration.unlink()


def test_a_lock_through_a_transaction_pooler_is_refused_in_the_plan_and_before_anything_changes(
    pooled: Postgres, postgres_server: PostgresServer
) -> None:
    refused = "a connection pooler answers at .*, not PostgreSQL itself"
    exclusion = Exclusion([Cluster(pooled, "interview-ops lab: Restore")])
    with pytest.raises(OpsError, match=refused) as error:
        exclusion.take()
    assert "set [postgres] host and port to the server itself" in error.value.hint
    with pytest.raises(OpsError, match=refused), advisory_lock(pooled):
        pass
    assert postgres_server.sql("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [(0,)]
    plan, direct = Report("Restore", "lab"), Report("Restore", "lab")
    pin_database(plan, pooled)
    pin_database(direct, postgres_server.block())
    assert (plan.status, direct.status) == (Status.CRITICAL, Status.OK)
    assert "a connection pooler" in plan.sentence()
