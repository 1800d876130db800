"""Fill the application's tables with Japanese interviews until the database has grown by a given size.

The rows are made inside the server (``INSERT … SELECT generate_series``) over two connections: bytes sent by a client
would cost more than the rows. Every kind of value that a backup can get wrong is there: Japanese text, jsonb, numeric,
arrays, uuid, timestamps, an enum, inet, a generated column, partitions and their default, identities and a standalone
sequence, foreign keys, a materialised view.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow

from lab.data.phrases import AGENTS, ANSWERS, POSITIONS, QUESTIONS, REMARKS, SKILLS

CONNECTIONS = 2
FIRST_BATCH_SESSIONS = 5
LARGEST_BATCH_SESSIONS = 2500
CLOSE_ENOUGH_BYTES = 32 * 1024
STATISTICS_BYTES = 256 * 1024  # what ANALYZE adds at the end
TYPICAL_SESSION_BYTES = 6500  # with its messages, evaluations, audit events and their indexes
PROGRESS_EVERY_SECONDS = 5.0

ANALYZED = ("users", "interview_sessions", "interview_messages", "evaluations", "audit_events", "position_statistics")

Connection = psycopg.Connection[TupleRow]

_PHRASES = {
    "positions": POSITIONS,
    "remarks": REMARKS,
    "skills": SKILLS,
    "answers": ANSWERS,
    "questions": QUESTIONS,
    "agents": AGENTS,
}

_USERS = sql.SQL(
    """
    INSERT INTO public.users (username, display_name, password_hash, created_at)
    SELECT 'candidate-' || gen_random_uuid(), '受験者 ' || lpad((random() * 99999)::int::text, 5, '0'),
           '!', now() - random() * interval '400 days'
    FROM generate_series(1, %(users)s) RETURNING id
    """
)

# 64 characters that hardly compress: without them a dump would be smaller, and quicker, than a real system's.
_TOKEN = sql.SQL("encode(sha384(random()::text::bytea), 'base64')")

# One statement per batch: its parts see each other's rows by RETURNING, and the foreign keys are checked at its end.
# A subscript beside random() is evaluated per row, so that every row draws its own phrases.
_BATCH = sql.SQL(
    """
    WITH sessions AS (
        INSERT INTO public.interview_sessions (user_id, position, status, score, metadata, started_at, ended_at)
        SELECT (%(user_ids)s::bigint[])[1 + floor(random() * cardinality(%(user_ids)s::bigint[]))::int],
               (%(positions)s::text[])[1 + floor(random() * {positions})::int],
               (ARRAY['completed', 'completed', 'completed', 'cancelled'])[1 + floor(random() * 4)::int]
                   ::public.session_status,
               (random() * 100)::numeric(6, 2),
               jsonb_build_object(
                   'channel', (ARRAY['web', 'mobile', '会場'])[1 + floor(random() * 3)::int],
                   'trace', md5(random()::text), 'device', gen_random_uuid(), 'attempt', floor(random() * 5)::int,
                   'notes', (%(remarks)s::text[])[1 + floor(random() * {remarks})::int]
                       || (%(remarks)s::text[])[1 + floor(random() * {remarks})::int]
                       || (%(remarks)s::text[])[1 + floor(random() * {remarks})::int],
                   'skills', jsonb_build_array(
                       (%(skills)s::text[])[1 + floor(random() * {skills})::int],
                       (%(skills)s::text[])[1 + floor(random() * {skills})::int]),
                   'fingerprint', jsonb_build_array({token}, {token}, {token}, {token})),
               drawn.started_at, drawn.started_at + interval '5 minutes' + random() * interval '55 minutes'
        FROM (SELECT timestamptz '2026-06-01 00:00:00+00'
                     + random() * (now() - timestamptz '2026-06-01 00:00:00+00') AS started_at
              FROM generate_series(1, %(sessions)s)) AS drawn
        RETURNING id, user_id, started_at, score
    ), messages AS (
        INSERT INTO public.interview_messages (session_id, role, content, tokens, provider, model, created_at)
        SELECT sessions.id, CASE number %% 2 WHEN 0 THEN 'user' ELSE 'assistant' END,
               CASE number %% 2
                   WHEN 0 THEN (%(answers)s::text[])[1 + floor(random() * {answers})::int]
                       || (%(answers)s::text[])[1 + floor(random() * {answers})::int]
                   ELSE (%(questions)s::text[])[1 + floor(random() * {questions})::int]
                       || (%(questions)s::text[])[1 + floor(random() * {questions})::int]
               END || '（参照番号: ' || {token} || '、' || {token} || '）',
               20 + floor(random() * 400)::int,
               CASE number %% 2 WHEN 1 THEN 'azure' END, CASE number %% 2 WHEN 1 THEN 'gpt-4o' END,
               sessions.started_at + number * interval '47 seconds'
        FROM sessions CROSS JOIN generate_series(1, 5) AS number
    ), evaluations AS (
        INSERT INTO public.evaluations
            (session_id, technical, communication, overall, strengths, scores, details, comment, evaluated_at)
        SELECT sessions.id, (random() * 100)::numeric(5, 2), (random() * 100)::numeric(5, 2),
               sessions.score + (random() - 0.5)::numeric(8, 4),
               ARRAY[(%(skills)s::text[])[1 + floor(random() * {skills})::int],
                     (%(skills)s::text[])[1 + floor(random() * {skills})::int]],
               ARRAY[random() * 100, random() * 100, random() * 100]::numeric(5, 2)[],
               jsonb_build_object('evaluator', gen_random_uuid(), 'weight', random()::numeric(6, 5),
                                  'transcript', jsonb_build_array({token}, {token}, {token}),
                                  'passed', random() > 0.4, 'round', number),
               (%(remarks)s::text[])[1 + floor(random() * {remarks})::int]
                   || (%(remarks)s::text[])[1 + floor(random() * {remarks})::int]
                   || (%(remarks)s::text[])[1 + floor(random() * {remarks})::int],
               sessions.started_at + number * interval '1 day'
        FROM sessions CROSS JOIN generate_series(1, 2) AS number
    )
    INSERT INTO public.audit_events
        (occurred_at, user_id, action, resource, result, ip_address, user_agent, details)
    SELECT sessions.started_at + number * interval '3 minutes', sessions.user_id,
           (ARRAY['login', 'create_session', 'read_session', 'export'])[number], sessions.id::text,
           CASE WHEN random() < 0.05 THEN 'failure' ELSE 'success' END,
           '10.0.0.0'::inet + floor(random() * 16777215)::bigint,
           (%(agents)s::text[])[1 + floor(random() * {agents})::int],
           jsonb_build_object('request_id', md5(random()::text), 'duration_ms', (random() * 900)::numeric(7, 3),
                              'signature', {token} || {token})
    FROM sessions CROSS JOIN generate_series(1, 4) AS number
    """
).format(**{name: sql.Literal(len(values)) for name, values in _PHRASES.items()}, token=_TOKEN)


@dataclass(frozen=True)
class SeedResult:
    """What `seed` added. `grown_bytes` is the growth of ``pg_database_size``, indexes included."""

    users: int
    sessions: int
    grown_bytes: int
    database_bytes: int
    seconds: float


def seed(dsn: str, megabytes: int, *, progress: Callable[[str], None]) -> SeedResult:
    """Add rows until the database is about `megabytes` MB (2**20 bytes) larger; repeated, it adds as much again.

    The schema must be there (``alembic upgrade head``); `dsn` names a role that may insert and owns the materialised
    view. `progress` is called with a line every few seconds, in the caller's thread. At the end the view is refreshed
    and the tables are analysed, which counts into the growth. Autovacuum may add a megabyte of its own. Commits are
    asynchronous: a crash while seeding loses rows, never consistency. Raises `ValueError` below 1 MB, `psycopg.Error`.
    """
    if megabytes < 1:
        raise ValueError("seed at least 1 MB")
    started = time.monotonic()
    with ExitStack() as stack:
        main, *workers = [stack.enter_context(_connect(dsn)) for _ in range(1 + CONNECTIONS)]
        before = _database_bytes(main)
        user_ids = _add_users(main, min(20_000, max(20, megabytes * 10)))
        target = before + megabytes * 2**20 - STATISTICS_BYTES
        sessions = _Filling(main, workers, user_ids, before, target, progress).run()
        progress("refreshing the statistics")
        _settle(main)
        size = _database_bytes(main)
    return SeedResult(len(user_ids), sessions, size - before, size, time.monotonic() - started)


class _Filling:
    """Keeps every worker's connection busy until the target is near, then with ever smaller batches."""

    def __init__(
        self,
        main: Connection,
        workers: Sequence[Connection],
        user_ids: list[int],
        before: int,
        target: int,
        progress: Callable[[str], None],
    ) -> None:
        self._main, self._idle, self._user_ids = main, list(workers), user_ids
        self._before, self._target, self._progress = before, target, progress
        self._start = self._size = _database_bytes(main)
        self._running: dict[Future[int], tuple[Connection, int]] = {}
        self._sessions = 0

    def run(self) -> int:
        """Add sessions and return how many."""
        told = time.monotonic()
        with ThreadPoolExecutor(max_workers=len(self._idle)) as executor:
            while self._submit(executor):
                done, _ = wait(self._running, return_when=FIRST_COMPLETED)
                for future in done:
                    connection, _ = self._running.pop(future)
                    self._idle.append(connection)
                    self._sessions += future.result()
                self._size = _database_bytes(self._main)
                if time.monotonic() - told >= PROGRESS_EVERY_SECONDS:
                    told = time.monotonic()
                    grown, wanted = self._size - self._before, self._target - self._before
                    self._progress(f"{grown >> 20} of {wanted >> 20} MB, {self._sessions} sessions")
        return self._sessions

    def _submit(self, executor: ThreadPoolExecutor) -> bool:
        """Give each idle connection its share of what is missing; return whether anything is running."""
        weight = (self._size - self._start) / self._sessions if self._sessions else TYPICAL_SESSION_BYTES
        weight = max(weight, TYPICAL_SESSION_BYTES / 2)
        while self._idle:
            pending = sum(sessions for _, sessions in self._running.values())
            missing = self._target - self._size - pending * weight
            if missing < CLOSE_ENOUGH_BYTES:
                break
            connection = self._idle.pop()
            # The first rows of a table also cost its first pages: they are measured before more is asked for.
            largest = LARGEST_BATCH_SESSIONS if self._sessions else FIRST_BATCH_SESSIONS
            batch = min(largest, max(1, int(missing / weight / CONNECTIONS)))
            self._running[executor.submit(_add_sessions, connection, self._user_ids, batch)] = connection, batch
        return bool(self._running)


def _connect(dsn: str) -> Connection:
    connection = psycopg.connect(dsn, autocommit=True, connect_timeout=10, application_name="lab seed")
    connection.execute("SET synchronous_commit = off")
    return connection


def _database_bytes(connection: Connection) -> int:
    row = connection.execute("SELECT pg_database_size(current_database())").fetchone()
    assert row is not None, "a SELECT without FROM returns a row"
    return int(row[0])


def _add_users(connection: Connection, users: int) -> list[int]:
    return [int(row[0]) for row in connection.execute(_USERS, {"users": users})]


def _add_sessions(connection: Connection, user_ids: list[int], sessions: int) -> int:
    phrases = {name: list(values) for name, values in _PHRASES.items()}
    connection.execute(_BATCH, {"sessions": sessions, "user_ids": user_ids, **phrases})
    return sessions


def _settle(connection: Connection) -> None:
    """Refresh what is derived from the rows: the materialised view, and the planner's statistics."""
    connection.execute("REFRESH MATERIALIZED VIEW public.position_statistics")
    for table in ANALYZED:
        connection.execute(sql.SQL("ANALYZE {}").format(sql.Identifier("public", table)))
