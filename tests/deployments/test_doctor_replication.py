"""The doctor's replication log-in: each reason for which it is refused has its own next step."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import psycopg
import pytest
from pydantic import SecretStr

from blocks.postgres.server import Postgres
from deployments.doctor.databases import _replicate
from runbook.errors import OpsError
from tests.fixtures.servers import ADMIN, ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer, free_port

WATCHER = "replication_watcher"


def as_watcher(server: PostgresServer) -> Postgres:
    block = server.block("postgres")
    return block.model_copy(update={"admin_user": WATCHER, "admin_password": SecretStr(ROLE_PASSWORD)})


@contextlib.contextmanager
def without_the_right(server: PostgresServer) -> Iterator[Postgres]:
    server.sql(f"ALTER ROLE {WATCHER} NOREPLICATION")
    yield as_watcher(server)


@contextlib.contextmanager
def without_login(server: PostgresServer) -> Iterator[Postgres]:
    server.sql(f"ALTER ROLE {WATCHER} NOLOGIN")
    yield as_watcher(server)


@contextlib.contextmanager
def with_another_password(server: PostgresServer) -> Iterator[Postgres]:
    yield as_watcher(server).model_copy(update={"admin_password": SecretStr("another")})


@contextlib.contextmanager
def without_a_line(server: PostgresServer) -> Iterator[Postgres]:
    path = server.data / "pg_hba.conf"
    before = path.read_text()
    path.write_text("".join(line for line in before.splitlines(True) if line.split()[1:2] != ["replication"]))
    server.sql("SELECT pg_reload_conf()")
    try:
        yield as_watcher(server)
    finally:
        path.write_text(before)
        server.sql("SELECT pg_reload_conf()")


@contextlib.contextmanager
def with_all_senders_in_use(server: PostgresServer) -> Iterator[Postgres]:
    ((most,),) = server.sql("SELECT current_setting('max_wal_senders')::int")
    with contextlib.ExitStack() as stack:
        for _ in range(most):
            stack.enter_context(
                psycopg.connect(
                    host="127.0.0.1",
                    port=server.port,
                    user=ADMIN,
                    password=ADMIN_PASSWORD,
                    replication="true",
                    autocommit=True,
                )
            )
        yield as_watcher(server)


@contextlib.contextmanager
def where_nobody_listens(server: PostgresServer) -> Iterator[Postgres]:
    yield as_watcher(server).model_copy(update={"port": free_port()})


@pytest.mark.parametrize(
    ("trouble", "said", "hint"),
    [
        (without_the_right, "to start (WAL sender|walsender)", f"^ALTER ROLE {WATCHER} REPLICATION$"),
        (without_login, "is not permitted to log in", "LOGIN right"),
        (with_another_password, "password authentication failed", "correct the secret"),
        (without_a_line, "no pg_hba.conf entry for replication", "add a line for replication to pg_hba.conf"),
        (with_all_senders_in_use, "exceeds", "raise max_wal_senders"),
        (where_nobody_listens, "refused", "start it, or read its log"),
    ],
)
def test_a_refused_replication_log_in_names_its_next_step(
    postgres_server: PostgresServer,
    trouble: Callable[[PostgresServer], contextlib.AbstractContextManager[Postgres]],
    said: str,
    hint: str,
) -> None:
    postgres_server.sql(f"CREATE ROLE {WATCHER} LOGIN REPLICATION PASSWORD '{ROLE_PASSWORD}'")
    try:
        _replicate(as_watcher(postgres_server))
        with trouble(postgres_server) as block, pytest.raises(OpsError, match=said) as error:
            _replicate(block)
        assert re.search(hint, error.value.hint), error.value
    finally:
        postgres_server.sql(f"DROP ROLE {WATCHER}")
