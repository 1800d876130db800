"""The interview schema on the session's server: migrated once, copied for each test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocks.config import toml
from blocks.places import Application
from blocks.postgres.server import Postgres
from tasks.migrations.alembic import upgrade
from tests.fixtures.servers import PostgresServer
from tests.plugins.shared import TEMPLATE

SUITES = toml.DIRECTORY / "expectations" / "interview"
BACKEND = Path(__file__).parents[2] / "lab" / "application"

ROWS = """
INSERT INTO users (username, display_name, password_hash) SELECT 'u' || g, '受験者 ' || g, '!' FROM generate_series(1, 20) g;
INSERT INTO interview_sessions (user_id, position, status, score, started_at, ended_at)
SELECT 1 + g % 20, 'エンジニア', 'completed', g % 100, now() - interval '2 hours', now() - interval '1 hour'
FROM generate_series(1, 40) g;
INSERT INTO interview_messages (session_id, role, content, tokens)
SELECT id, 'user', 'はい', 3 FROM interview_sessions UNION ALL SELECT id, 'assistant', 'では', 4 FROM interview_sessions;
INSERT INTO evaluations (session_id, technical, communication, overall, scores)
SELECT id, 50, 60, 55.5, '{50, 60}' FROM interview_sessions;
INSERT INTO audit_events (user_id, action, resource, result) SELECT id, 'login', username, 'success' FROM users;
"""


def application_at(backend: Path = BACKEND) -> Application:
    return Application(backend_directory=str(backend), python=sys.executable)


@pytest.fixture(scope="session")
def interview_template(postgres_server: PostgresServer) -> str:
    postgres_server.create_database(TEMPLATE)
    postgres = postgres_server.block(TEMPLATE)
    upgrade.work(postgres, application_at(), TEMPLATE)
    postgres_server.sql("SET ROLE grc_user;" + ROWS, database=TEMPLATE)
    return TEMPLATE


@pytest.fixture
def interview(
    postgres_server: PostgresServer, interview_template: str, request: pytest.FixtureRequest
) -> Iterator[Postgres]:
    """A database with the newest schema and some rows; dropped afterwards."""
    name = f"interview_{abs(hash(request.node.name)) % 10**8}"
    postgres_server.copy_database(name, interview_template)
    yield postgres_server.block(name)
    postgres_server.drop_database(name)


@pytest.fixture
def empty(postgres_server: PostgresServer, request: pytest.FixtureRequest) -> Iterator[Postgres]:
    """An empty database of the application's role."""
    name = f"empty_{abs(hash(request.node.name)) % 10**8}"
    postgres_server.create_database(name)
    yield postgres_server.block(name)
    postgres_server.drop_database(name)
