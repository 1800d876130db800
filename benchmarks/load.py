"""What clients see and what the server needs, watched from threads while something else runs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import psycopg

from benchmarks.place import DATABASE, Place
from lab.lifecycle import existing
from lab.processes import marked

USER = "monitor"
HAMMER_SECONDS = 0.01
READS_PER_SECOND, WRITES_PER_SECOND = 40.0, 5.0
READERS = 2
SAMPLE_SECONDS = 0.5
SIZE = "SELECT sum(pg_database_size(oid)) + (SELECT sum(size) FROM pg_ls_waldir()) FROM pg_database"
IDLE_SECONDS, IDLE_SHARE = 2.0, 0.1


@dataclass
class Watched:
    """Filled while the block runs."""

    values: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@contextmanager
def _threads(*works: Callable[[threading.Event], None]) -> Iterator[None]:
    stop = threading.Event()
    threads = [threading.Thread(target=work, args=[stop], daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def let_pass(seconds: float) -> None:
    """While threads work."""
    threading.Event().wait(seconds)


@contextmanager
def hammering(place: Place) -> Iterator[Watched]:
    """A client of the database that asks every 10 ms and reconnects at once: the moments of its answers."""
    dsn, watched = place.status["postgres"]["dsn"], Watched()

    def ask(stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                with psycopg.connect(dsn, connect_timeout=5, autocommit=True) as connection:
                    while not stop.is_set():
                        connection.execute("SELECT 1 FROM public.alembic_version")
                        watched.values.append(time.monotonic())
                        stop.wait(HAMMER_SECONDS)
            except psycopg.Error:
                stop.wait(HAMMER_SECONDS)

    with _threads(ask):
        yield watched


def longest_gap(watched: Watched) -> float:
    """Seconds between two answers of `hammering`, the longest."""
    return max(after - before for before, after in zip(watched.values, watched.values[1:], strict=False))


@contextmanager
def application_load(place: Place, password: str) -> Iterator[Watched]:
    """Reading and writing requests at a modest rate: each one's seconds from the moment at which it was due."""
    watched = Watched()
    with httpx.Client(base_url=place.status["application"]["url"], timeout=30, trust_env=False) as client:
        token = client.post("/api/auth/login", json={"username": USER, "password": password}).raise_for_status()
        client.headers["Authorization"] = f"Bearer {token.json()['token']}"
        path = "/api/interview/sessions"
        session = client.post(path, json={"position": "負荷"}).raise_for_status().json()["session_id"]

        def read() -> httpx.Response:
            return client.get(f"{path}/{session}")

        def write() -> httpx.Response:
            return client.post(path, json={"position": "負荷"})

        readers = [lambda stop: _paced(stop, READS_PER_SECOND / READERS, read, watched) for _ in range(READERS)]
        with _threads(*readers, lambda stop: _paced(stop, WRITES_PER_SECOND, write, watched)):
            yield watched


def _paced(stop: threading.Event, per_second: float, request: Callable[[], httpx.Response], watched: Watched) -> None:
    due = time.monotonic()
    while not stop.wait(max(0.0, due - time.monotonic())):
        try:
            answer = request()
        except httpx.HTTPError as error:
            watched.problems.append(type(error).__name__)
        else:
            if answer.is_error:
                watched.problems.append(str(answer.status_code))
        watched.values.append(time.monotonic() - due)
        due += 1 / per_second


@dataclass
class Growth:
    """Bytes that were needed at most beyond those at the start, and WAL written."""

    peak_bytes: int = 0
    wal_bytes: int = 0


@contextmanager
def disk_growth(place: Place) -> Iterator[Growth]:
    """The size of all databases and of pg_wal, sampled."""
    growth, first = Growth(), _size(place)
    began = place.sql("SELECT pg_current_wal_lsn()")[0][0]

    def sample(stop: threading.Event) -> None:
        with psycopg.connect(place.status["postgres"]["admin_dsn"], autocommit=True) as connection:
            while not stop.wait(SAMPLE_SECONDS):
                with contextlib.suppress(psycopg.errors.DatabaseError):  # a database went while it was being looked at
                    (found,) = connection.execute(SIZE).fetchone() or (0,)
                    growth.peak_bytes = max(growth.peak_bytes, int(found) - first)

    with _threads(sample):
        yield growth
    ended = place.sql("SELECT pg_current_wal_lsn()")[0][0]
    growth.wal_bytes = int(place.sql(f"SELECT pg_wal_lsn_diff('{ended}', '{began}')")[0][0])


@dataclass
class Acknowledged:
    """Numbers whose commit returned, in a table of their own."""

    place: Place
    numbers: list[int] = field(default_factory=list)

    def lost(self) -> set[int]:
        """Those that the database has no more."""
        there = {int(number) for (number,) in self.place.sql("SELECT number FROM public.bench_writes", DATABASE)}
        return set(self.numbers) - there


def acknowledged(place: Place) -> Acknowledged:
    """A client that commits a number every 10 ms, for two seconds."""
    place.sql("DROP TABLE IF EXISTS public.bench_writes", DATABASE)
    place.sql("CREATE TABLE public.bench_writes (number bigint PRIMARY KEY)", DATABASE)
    written, dsn = Acknowledged(place), place.status["postgres"]["admin_dsn"]

    def write(stop: threading.Event) -> None:
        with psycopg.connect(dsn, dbname=DATABASE, autocommit=True) as connection:
            while not stop.wait(HAMMER_SECONDS):
                number = len(written.numbers)
                connection.execute("INSERT INTO public.bench_writes VALUES (%s)", [number])
                written.numbers.append(number)

    with _threads(write):
        let_pass(IDLE_SECONDS)
    return written


def archiver_seconds(place: Place, *, until_idle: bool = False) -> float:
    """Processor seconds of the lab's archiver of WAL until now. `until_idle`: until two seconds cost it next to
    nothing, so that what was written before is archived."""
    services, _ = existing(place.lab.name)
    (process,) = [one for one in marked(services.layout.supervisor) if "tasks.wal.archiver" in one.cmdline()]

    def spent() -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    while until_idle:
        before = spent()
        let_pass(IDLE_SECONDS)
        if spent() - before < IDLE_SHARE * IDLE_SECONDS:
            break
    return spent()


def _size(place: Place) -> int:
    return int(place.sql(SIZE)[0][0])
