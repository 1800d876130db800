"""The interview application on a real PostgreSQL and Redis: installed as `lab up` does, in a database of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import httpx
import psycopg
import pytest
from dotenv import dotenv_values
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from redis import Redis

from lab.application.grc_backend.settings import InvalidSettings, Settings
from lab.application.install import install
from lab.data.seed import seed
from lab.state.state import Ports
from runbook.errors import Unreachable
from runbook.wait import until
from tests.fixtures.servers import taken_ports

PASSWORD = "試験-pa$$ 'word'"


class Lab(Protocol):
    def status(self) -> dict[str, Any]: ...


@contextmanager
def scratch_database(postgres: dict[str, Any]) -> Iterator[str]:
    """A database of its own on the lab's server, as the role's; yields its address as backend/.env has it."""
    role = conninfo_to_dict(postgres["dsn"])
    name = f"test_application_{uuid.uuid4().hex[:12]}"
    create = sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE template0")
    with psycopg.connect(postgres["admin_dsn"], autocommit=True) as connection:
        connection.execute(create.format(sql.Identifier(name), sql.Identifier(str(role["user"]))))
        try:
            user, password = (quote(str(role.get(key, "")), safe="") for key in ("user", "password"))
            yield f"postgresql://{user}:{password}@{role['host']}:{role['port']}/{name}"
        finally:
            drop = sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))
            until(lambda: dropped(connection, drop), what=f"the drop of {name}", seconds=120)


def dropped(connection: psycopg.Connection[Any], drop: sql.Composed) -> bool:
    """PostgreSQL itself waits five seconds for the end of the sessions in a database, which may stand still."""
    with suppress(psycopg.errors.ObjectInUse):
        connection.execute(drop)
        return True
    return False


@contextmanager
def emptied(redis_url: str) -> Iterator[None]:
    """A database of Redis, empty before and after."""
    try:
        with Redis.from_url(redis_url) as redis:
            redis.flushdb()
        yield
    finally:
        with Redis.from_url(redis_url) as redis:
            redis.flushdb()


def wait_for(url: str, *statuses: int) -> httpx.Response:
    """Return the first HTTP answer; the first with one of the statuses, where there are some."""

    def answer() -> httpx.Response | None:
        try:
            found = httpx.get(url, trust_env=False, timeout=30)
        except httpx.TransportError as error:
            raise Unreachable(f"{url}: {type(error).__name__}") from None
        return found if not statuses or found.status_code in statuses else None

    found = until(answer, what=f"an answer of {url}", seconds=120)
    assert found
    return found


@contextmanager
def running(module: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / f"{module}.stderr").open("wb") as errors:
        process = subprocess.Popen([sys.executable, "-m", module], cwd=folder, stderr=errors)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(120)


def alembic(folder: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "alembic", *arguments], cwd=folder, check=True, capture_output=True)


@dataclass(frozen=True)
class Application:
    """The installed application's parts, all running."""

    root: Path
    settings: dict[str, str]
    client: httpx.Client

    @property
    def backend(self) -> Path:
        return self.root / "opt/backend"

    def create_user(self, name: str, password: str = PASSWORD) -> None:
        subprocess.run(
            [sys.executable, "-m", "grc_backend.create_user", name],
            cwd=self.backend,
            env={**os.environ, "OPS_APPLICATION_PASSWORD": password},
            check=True,
        )

    def log_in(self, name: str) -> dict[str, str]:
        """Create a user; return the headers of a logged-in client."""
        self.create_user(name)
        answer = self.client.post("/api/auth/login", json={"username": name, "password": PASSWORD})
        assert answer.status_code == 200
        return {"Authorization": f"Bearer {answer.json()['token']}"}

    def begin(self, headers: dict[str, str]) -> str:
        answer = self.client.post("/api/interview/sessions", json={"position": "SRE"}, headers=headers)
        assert answer.status_code == 201
        return str(answer.json()["session_id"])

    def say(self, session: str, content: str, headers: dict[str, str]) -> httpx.Response:
        return self.client.post(
            f"/api/interview/sessions/{session}/messages", json={"content": content}, headers=headers
        )

    def control(self, provider: str, failing: bool) -> None:
        url = f"{self.settings['AI_PROVIDERS_URL']}/control/{provider}"
        httpx.post(url, json={"failing": failing}, trust_env=False).raise_for_status()

    def log(self, name: str = "app.log") -> list[dict[str, Any]]:
        lines = (Path(self.settings["LOG_DIRECTORY"]) / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def settings(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    status = lab.status()
    ports = Ports.chosen(taken_ports())
    # User ids begin at 1 in every database: the lab's own keys are not to be mixed up with these.
    redis_url = urlsplit(status["redis"]["url"])._replace(path="/15").geturl()
    with emptied(redis_url), scratch_database(status["postgres"]) as database_url:
        yield {
            "HOST": "127.0.0.1",
            "PORT": str(ports.backend),
            "FRONTEND_PORT": str(ports.frontend),
            "AI_PROVIDERS_URL": f"http://127.0.0.1:{ports.ai_providers}",
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "LOG_DIRECTORY": str(tmp_path_factory.mktemp("logs")),
            "AI_RATE_LIMIT": "8",
        }


PATIENCE = {
    "ai.py": "REPLY_TIMEOUT_SECONDS",
    "health.py": "CHECK_TIMEOUT_SECONDS",
    "resources.py": "REDIS_TIMEOUT_SECONDS",
}


def make_patient(package: Path) -> None:
    """A server that answers after its deadline is one that is away: the users' deadline is not that of these tests,
    beside which everything may stand still for a while."""
    for name, constant in PATIENCE.items():
        path = package / name
        text, changed = re.subn(rf"^{constant} = .*$", f"{constant} = 120.0", path.read_text(), flags=re.MULTILINE)
        assert changed == 1
        path.write_text(text)


@pytest.fixture(scope="module")
def application(settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    root = tmp_path_factory.mktemp("application")
    install(root / "opt", settings)
    make_patient(root / "opt/backend/grc_backend")
    backend, frontend = root / "opt/backend", root / "opt/frontend"
    alembic(backend, "upgrade", "head")
    url = f"http://127.0.0.1:{settings['PORT']}"
    with ExitStack() as stack:
        for module, folder in (("grc_backend", backend), ("ai_providers", backend), ("grc_frontend", frontend)):
            stack.enter_context(running(module, folder))
        for address in (url, settings["AI_PROVIDERS_URL"], f"http://127.0.0.1:{settings['FRONTEND_PORT']}"):
            assert wait_for(f"{address}/health", 200)
        client = stack.enter_context(httpx.Client(base_url=url, trust_env=False, timeout=300))
        yield Application(root, settings, client)


def test_the_labs_own_application_is_healthy(lab: Lab) -> None:
    answer = wait_for(f"{lab.status()['application']['url']}/health", 200)
    assert answer.json() == {"status": "healthy", "database": "ok", "redis": "ok"}


def test_an_interview_is_read_back_as_it_was_held(application: Application) -> None:
    headers = application.log_in("interview")
    session = application.begin(headers)
    spoken = ["はじめまして。", "前職では決済基盤を担当しました。", "以上です。🙇"]
    answers = [application.say(session, content, headers) for content in spoken]
    assert [answer.status_code for answer in answers] == [201, 201, 201]
    read = application.client.get(f"/api/interview/sessions/{session}", headers=headers).json()
    replies = [answer.json()["reply"] for answer in answers]
    expected = [text for said, reply in zip(spoken, replies, strict=True) for text in (said, reply["content"])]
    assert [message["content"] for message in read["messages"]] == expected
    assert [message["role"] for message in read["messages"]] == ["user", "assistant"] * 3
    assert {reply["provider"] for reply in replies} == {"azure"}
    assert (read["session_id"], read["position"], read["status"]) == (session, "SRE", "in_progress")


def test_strangers_and_nonsense_are_refused(application: Application) -> None:
    owner, other = application.log_in("owner"), application.log_in("other")
    session, client = application.begin(owner), application.client
    path = f"/api/interview/sessions/{session}"
    assert client.get(path).status_code == 401
    assert client.get(path, headers={"Authorization": "Bearer nonsense"}).status_code == 401
    assert client.get(path, headers=other).status_code == 403
    assert application.say(session, "割り込み", other).status_code == 403
    assert client.get(f"/api/interview/sessions/{uuid.uuid4()}", headers=owner).status_code == 404
    assert application.say(session, "a\0b", owner).status_code == 422
    assert client.get(path, headers=owner).json()["messages"] == []


def test_a_password_is_reset_and_never_echoed(application: Application) -> None:
    application.create_user("resets", "old")
    application.create_user("resets", "new")
    answers = [
        application.client.post("/api/auth/login", json={"username": "resets", "password": password})
        for password in ("old", "new", "secret" * 50)
    ]
    assert [answer.status_code for answer in answers] == [401, 200, 422]
    assert "secret" not in answers[2].text


def test_a_session_of_a_user_whom_the_restore_did_not_bring_back_ends(application: Application) -> None:
    headers = application.log_in("gone")
    with psycopg.connect(application.settings["DATABASE_URL"]) as connection:
        connection.execute("DELETE FROM users WHERE username = 'gone'")
    for _ in range(2):
        answer = application.client.post("/api/interview/sessions", json={"position": "SRE"}, headers=headers)
        assert answer.status_code == 401


def test_the_next_provider_answers_when_one_fails(application: Application) -> None:
    headers = application.log_in("fallback")
    session = application.begin(headers)
    try:
        said = []
        for provider, expected in (("azure", "bedrock"), ("bedrock", "vertex")):
            application.control(provider, failing=True)
            answer = application.say(session, f"{provider}が停止しました。", headers)
            said.append((answer.json()["reply"]["provider"], expected))
        application.control("vertex", failing=True)
        assert application.say(session, "全て停止しました。", headers).status_code == 503
    finally:
        for provider in ("azure", "bedrock", "vertex"):
            application.control(provider, failing=False)
    assert said == [("bedrock", "bedrock"), ("vertex", "vertex")]
    read = application.client.get(f"/api/interview/sessions/{session}", headers=headers).json()
    assert len(read["messages"]) == 4, "a message without a reply is not stored"
    assert application.say(session, "復旧しました。", headers).json()["reply"]["provider"] == "azure"


def test_the_rate_limit_counts_within_a_window_that_does_not_move(application: Application) -> None:
    began = time.monotonic()
    headers = application.log_in("hasty")
    session = application.begin(headers)
    user_id = application.client.get(f"/api/interview/sessions/{session}", headers=headers).json()["user_id"]
    with Redis.from_url(application.settings["REDIS_URL"]) as redis:
        key = f"rate_limit:ai:{user_id}"
        asked = time.monotonic()
        application.say(session, "1", headers)
        assert 3600 - (time.monotonic() - asked) - 2 <= redis.ttl(key) <= 3600
        redis.expire(key, 1000)
        statuses = [application.say(session, str(number), headers).status_code for number in range(2, 11)]
        assert statuses == [201] * 7 + [429] * 2
        assert redis.ttl(key) <= 1000
        left = redis.ttl(f"session:{headers['Authorization'].removeprefix('Bearer ')}")
        assert 3600 - (time.monotonic() - began) - 2 <= left <= 3600


def test_a_repeated_question_is_answered_from_the_cache(application: Application) -> None:
    headers = application.log_in("repeats")
    session = application.begin(headers)
    content = f"繰り返し {uuid.uuid4()}"
    replies = [application.say(session, content, headers).json()["reply"]["content"] for _ in range(2)]
    assert replies[0] == replies[1]
    user_id = application.client.get(f"/api/interview/sessions/{session}", headers=headers).json()["user_id"]
    calls = [line for line in application.log() if line["message"] == "AI API Call" and line["user_id"] == user_id]
    assert len(calls) == 1


def test_an_acknowledged_write_is_in_the_log_with_all_fields(application: Application) -> None:
    headers = application.log_in("logged")
    session = application.begin(headers)
    asked = datetime.now(UTC)
    answer = application.say(session, f"記録 {uuid.uuid4()}", {**headers, "X-Request-ID": "request-7"})
    answered = datetime.now(UTC)
    lines = application.log()  # at once: the line was there before the answer
    assert answer.headers["x-request-id"] == "request-7"
    call, request = [line for line in lines if line.get("request_id") == "request-7"]
    common = {"timestamp", "level", "logger", "message", "module", "function", "line", "user_id", "request_id"}
    assert set(call) == common | {"model", "provider", "prompt_tokens", "completion_tokens", "total_tokens"}
    assert set(request) == common | {"method", "path", "status", "duration_ms", "resource"}
    assert call["message"] == "AI API Call"
    assert call["total_tokens"] == call["prompt_tokens"] + call["completion_tokens"] > 0
    assert (request["logger"], request["message"]) == ("grc_backend.access", "request")
    assert (request["status"], request["resource"]) == (201, str(answer.json()["message_id"]))
    assert isinstance(request["duration_ms"], float)
    begun = [line for line in lines if line.get("resource") == session and line["status"] == 201]
    assert len(begun) == 1
    told = datetime.fromisoformat(request["timestamp"])
    assert told.utcoffset() == timedelta(0)
    assert asked <= told <= answered


def test_failed_and_successful_log_ins_are_audited(application: Application) -> None:
    application.log_in("audited")
    wrong = {"username": "audited", "password": "wrong"}
    application.client.post("/api/auth/login", json=wrong, headers={"User-Agent": "audit-test"})
    events = [line for line in application.log("audit.log") if line["resource"] == "audited"]
    assert [(event["action"], event["result"]) for event in events] == [("login", "success"), ("login", "failure")]
    fields = {"user_id", "action", "resource", "result", "ip_address", "user_agent", "timestamp"}
    assert all(fields <= set(event) and event["message"] == "Audit Event" for event in events)
    assert events[1]["user_agent"] == "audit-test"
    assert {event["ip_address"] for event in events} == {"127.0.0.1"}
    with psycopg.connect(application.settings["DATABASE_URL"]) as connection:
        stored = connection.execute(
            "SELECT user_id::text, result FROM audit_events WHERE resource = 'audited' ORDER BY id"
        ).fetchall()
    assert stored == [(event["user_id"], event["result"]) for event in events]


def test_the_log_is_opened_again_after_logrotate_moved_it(application: Application) -> None:
    path = Path(application.settings["LOG_DIRECTORY"]) / "app.log"
    moved = path.with_name("app.log.1")
    path.rename(moved)
    length = moved.stat().st_size
    application.client.get("/health", headers={"X-Request-ID": "after-rotation"})
    assert [line["request_id"] for line in application.log()] == ["after-rotation"]
    assert moved.stat().st_size == length


def test_the_page_is_japanese_and_its_health_follows_the_backend(application: Application, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{application.settings['FRONTEND_PORT']}"
    assert "<title>AI面接システム</title>" in httpx.get(url, trust_env=False, timeout=120).text
    ports = Ports.chosen(taken_ports())
    lonely = {**application.settings, "FRONTEND_PORT": str(ports.frontend), "PORT": str(ports.backend)}
    install(tmp_path, lonely)
    with running("grc_frontend", tmp_path / "frontend"):
        answer = wait_for(f"http://127.0.0.1:{lonely['FRONTEND_PORT']}/health")
    assert (answer.status_code, answer.json()["backend"]) == (503, "unreachable")


def test_it_starts_without_its_servers_says_so_and_stops_quickly(settings: dict[str, str], tmp_path: Path) -> None:
    ports = Ports.chosen(taken_ports())
    closed = ports.postgres
    install(
        tmp_path,
        {
            **settings,
            "PORT": str(ports.backend),
            "DATABASE_URL": f"postgresql://grc_user:hidden@127.0.0.1:{closed}/grc_db",
            "REDIS_URL": f"redis://:hidden@127.0.0.1:{closed}/0",
            "LOG_DIRECTORY": str(tmp_path / "logs"),
        },
    )
    make_patient(tmp_path / "backend/grc_backend")
    port = dotenv_values(tmp_path / "backend/.env")["PORT"]
    with running("grc_backend", tmp_path / "backend") as process:
        answer = wait_for(f"http://127.0.0.1:{port}/health")
        login = httpx.post(
            f"http://127.0.0.1:{port}/api/auth/login",
            json={"username": "a", "password": "b"},
            trust_env=False,
            timeout=120,
        )
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(180)
    assert time.monotonic() - asked < 120
    assert answer.status_code == 503
    assert answer.json() == {"status": "unhealthy", "database": "unreachable", "redis": "unreachable"}
    assert login.status_code == 503
    assert "hidden" not in answer.text + login.text + (tmp_path / "logs/app.log").read_text(encoding="utf-8")


def test_installing_again_keeps_the_users_files_and_replaces_the_code(settings: dict[str, str], tmp_path: Path) -> None:
    awkward = {**settings, "DATABASE_URL": "postgresql://grc_user:a'b\\c#d$e f\"@127.0.0.1:5432/grc_db"}
    install(tmp_path, awkward)
    backend = tmp_path / "backend"
    (backend / "uploads/履歴書.pdf").write_bytes(b"%PDF")
    (backend / "grc_backend/left_over.py").touch()
    (backend / "uploads/README.txt").unlink()
    install(tmp_path, awkward)
    assert [path.name for path in (backend / "uploads").iterdir()] == ["履歴書.pdf"]
    assert not (backend / "grc_backend/left_over.py").exists()
    assert not [path for path in backend.iterdir() if path.name.endswith((".new", ".old"))]
    for folder in ("backend", "frontend"):
        assert stat.S_IMODE((tmp_path / folder / ".env").stat().st_mode) == 0o600
    assert Settings.load(backend).database_url == awkward["DATABASE_URL"]
    with pytest.raises(ValueError, match="REDIS_URL"):
        install(tmp_path, {**settings, "REDIS_URL": ""})


def test_missing_settings_are_named_and_the_environment_wins(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidSettings, match="DATABASE_URL, REDIS_URL"):
        Settings.from_mapping({**settings, "DATABASE_URL": "", "REDIS_URL": ""})
    with pytest.raises(InvalidSettings, match="PORT is not"):
        Settings.from_mapping({**settings, "PORT": "many"})
    install(tmp_path, settings)
    monkeypatch.setenv("DATABASE_POOL_SIZE", "7")
    loaded = Settings.load(tmp_path / "backend")
    assert (loaded.database_pool_size, loaded.database_max_overflow, loaded.ai_rate_limit) == (7, 10, 8)


_SCHEMA = """
SELECT 'relation', c.relname::text,
       concat_ws(' ', c.relkind, pg_get_expr(c.relpartbound, c.oid),
                 CASE WHEN c.relkind IN ('v', 'm') THEN pg_get_viewdef(c.oid) END)
FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'S')
UNION ALL SELECT 'column', a.attrelid::regclass::text,
       concat_ws(' ', a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
                 a.attgenerated, pg_get_expr(d.adbin, d.adrelid))
FROM pg_attribute a LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
JOIN pg_class c ON c.oid = a.attrelid WHERE c.relnamespace = 'public'::regnamespace AND a.attnum > 0
UNION ALL SELECT 'constraint', conrelid::regclass || '.' || conname, pg_get_constraintdef(oid)
FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL SELECT 'index', indexrelid::regclass::text, pg_get_indexdef(indexrelid)
FROM pg_index JOIN pg_class c ON c.oid = indexrelid WHERE c.relnamespace = 'public'::regnamespace
UNION ALL SELECT 'enum', enumtypid::regtype::text, enumlabel::text FROM pg_enum
UNION ALL SELECT 'function', proname::text, pg_get_functiondef(oid)
FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prokind = 'f'
UNION ALL SELECT 'trigger', tgname::text, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
UNION ALL SELECT 'comment', objoid::regclass::text, description
FROM pg_description JOIN pg_class c ON c.oid = objoid
WHERE classoid = 'pg_class'::regclass AND c.relnamespace = 'public'::regnamespace
ORDER BY 1, 2, 3
"""


def test_every_migration_goes_down_and_up_again(lab: Lab, settings: dict[str, str], tmp_path: Path) -> None:
    with scratch_database(lab.status()["postgres"]) as database_url:
        install(tmp_path, {**settings, "DATABASE_URL": database_url})
        schemas = []
        for direction, target in (("upgrade", "head"), ("downgrade", "base"), ("upgrade", "head")):
            alembic(tmp_path / "backend", direction, target)
            with psycopg.connect(database_url) as connection:
                schemas.append(connection.execute(_SCHEMA).fetchall())
    first, emptied, second = schemas
    assert {name for kind, name, _ in emptied if kind == "relation"} == {"alembic_version"}
    assert first == second
    names = {name for _, name, _ in first}
    assert {"candidate_number_seq", "session_status", "position_statistics", "session_overview"} <= names
    assert {"idx_interview_sessions_user_id", "audit_events_default", "users_updated_at"} <= names


def test_rows_survive_a_downgrade_of_the_enum(lab: Lab, settings: dict[str, str], tmp_path: Path) -> None:
    with scratch_database(lab.status()["postgres"]) as database_url:
        install(tmp_path, {**settings, "DATABASE_URL": database_url})
        alembic(tmp_path / "backend", "upgrade", "head")
        seed(database_url, 1, progress=lambda line: None)
        question = "SELECT md5(string_agg(s::text, ',' ORDER BY id)) FROM interview_sessions s"
        hashes = []
        for direction in (None, ("downgrade", "0003"), ("upgrade", "head")):
            if direction:
                alembic(tmp_path / "backend", *direction)
            with psycopg.connect(database_url) as connection:
                hashes.append(connection.execute(question).fetchone())
    assert hashes[0] is not None
    assert hashes[0] == hashes[1] == hashes[2]


def test_seeding_grows_the_database_by_about_what_was_asked(application: Application) -> None:
    database_url = application.settings["DATABASE_URL"]
    assert 0 < seed(database_url, 1, progress=lambda line: None).grown_bytes < 3 * 2**20
    # Autovacuum's own pages (maps, GIN's pending lists) come whenever it chooses to run: they are not seed's.
    with psycopg.connect(database_url) as connection:
        tables = connection.execute(
            "SELECT c.oid::regclass::text FROM pg_class c WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
        ).fetchall()
        for (table,) in tables:
            connection.execute(sql.SQL("ALTER TABLE {} SET (autovacuum_enabled = off)").format(sql.SQL(table)))
    for megabytes in (24, 24):
        result = seed(database_url, megabytes, progress=lambda line: None)
        assert 0.85 <= result.grown_bytes / (megabytes * 2**20) <= 1.15
    with psycopg.connect(database_url) as connection:
        rows = connection.execute(
            """
            SELECT inhparent IS NULL, relname::text, pg_total_relation_size(c.oid), reltuples::bigint
            FROM pg_class c LEFT JOIN pg_inherits ON inhrelid = c.oid
            WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'm') AND relname <> 'alembic_version'
            """
        ).fetchall()
        filled = connection.execute(
            "SELECT count(*) FROM interview_sessions WHERE duration_seconds > 0 AND metadata ? 'notes'"
        ).fetchone()
        summarised = connection.execute(
            "SELECT count(*) FROM position_statistics WHERE sessions > 0 AND average_score IS NOT NULL"
        ).fetchone()
    sizes = {name: size for _, name, size, _ in rows}
    assert max(sizes.values()) < 0.45 * sum(sizes.values())
    assert all(count > 0 for top, _, _, count in rows if top), rows
    assert sum(count for top, _, _, count in rows if not top) > 1000
    assert filled is not None
    assert filled[0] > 1000
    assert summarised is not None
    assert summarised[0] > 12
