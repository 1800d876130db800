"""The PostgreSQL server that all tests of a session share (a plugin)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fixtures.servers import ADMIN, ROLE, PostgresServer, running_postgres

_shared: list[PostgresServer] = []
_told = set[str]()
TEMPLATE = "interview_template"  # the schema that tests/tasks copies, of a session too


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One server for all tests of a session: a file of tests leaves it as it found it, which is checked."""
    with running_postgres() as server:
        _shared.append(server)
        yield server
        _shared.clear()
        _require_tidy(server, "the last file of tests")


# The role belongs to every database that `create_database` makes.
_LEFT = f"""
SELECT 'database ' || datname FROM pg_database WHERE datname NOT IN ('postgres', 'template0', 'template1', '{TEMPLATE}')
UNION ALL SELECT 'role ' || rolname FROM pg_roles
    WHERE rolname NOT LIKE 'pg\\_%' AND rolname NOT IN ('{ADMIN}', '{ROLE}')
UNION ALL SELECT 'replication slot ' || slot_name FROM pg_replication_slots WHERE NOT temporary
UNION ALL SELECT 'tablespace ' || spcname FROM pg_tablespace WHERE spcname NOT LIKE 'pg\\_%'
UNION ALL SELECT 'setting of a role or database ' || setconfig::text FROM pg_db_role_setting
UNION ALL SELECT 'setting ' || name FROM pg_file_settings WHERE sourcefile LIKE '%auto.conf'
UNION ALL SELECT 'table of the maintenance database ' || oid::regclass FROM pg_class
    WHERE relkind IN ('r', 'v', 'm') AND relnamespace = 'public'::regnamespace
"""


def _require_tidy(server: PostgresServer, who: str) -> None:
    if not server.is_running:  # a test that stopped it failed before it was started again
        server.start()
    left = {what for (what,) in server.sql(_LEFT)} - _told
    _told.update(left)  # the files that come after this one did not leave it
    assert not left, f"{who} left on the shared server: {', '.join(sorted(left))}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """After the last test of a file: nothing is left on the shared server that another file's tests would meet."""
    yield
    if _shared and (nextitem is None or nextitem.path != item.path):
        _require_tidy(_shared[0], item.path.name)
