"""The steps of a sequence: what clients, administrators, accidents and crashes do. Recoveries are in recoveries.py.

A step is a function of the world and of its own random numbers, so that a sequence without some of its steps does the
rest as before. It returns a note for the round's line; "-" where it could not be done.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psycopg
import redis

from lab.processes import run, write
from lab.servers.postgres import DATABASE, ROLE
from runbook.errors import OpsError, Unreachable
from runbook.wait import until
from tests.fixtures.postgres.clusters import PROGRAMS
from tests.recovery.sequences.ledger import Ledger
from tests.recovery.sequences.stores import DatabaseStore
from tests.recovery.sequences.world import OTHER, World

Do = Callable[[World, random.Random], str]
NOT_POSSIBLE = "-"
TABLESPACE = "extra"


@dataclass(frozen=True)
class Step:
    """One kind of step. `weight`: how often it comes, among those of its kind."""

    name: str
    do: Do
    kind: str
    weight: float = 1.0


STEPS: dict[str, Step] = {}


def step(name: str, kind: str, weight: float = 1.0) -> Callable[[Do], Do]:
    """Enter a function as a step. Kinds: `quiet` changes nothing that a recovery mends; `accident` destroys something;
    `recovery` mends it."""

    def enter(do: Do) -> Do:
        STEPS[name] = Step(name, do, kind, weight)
        return do

    return enter


# Clients


@step("write", "quiet", 6)
def write_some(world: World, chance: random.Random) -> str:
    """Up to 30 transactions of each part."""
    told = dict[str, int]()
    for ledger in world.ledgers.values():
        for _ in range(chance.randint(1, 30)):
            outcome = ledger.write(chance)
            told[outcome] = told.get(outcome, 0) + 1
            if outcome != "acknowledged":
                break
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(told.items()))


@step("write-much", "quiet", 1)
def write_much(world: World, chance: random.Random) -> str:
    """More of the application's database than a switched segment has."""
    outcomes = [world.database.write(chance) for _ in range(200)]
    return f"{outcomes.count('acknowledged')} acknowledged"


@step("mark", "quiet", 2)
def mark(world: World, chance: random.Random) -> str:
    """A moment to which a point-in-time recovery may go back; nobody writes around it."""
    try:
        ((lsn, now),) = world.sql("SELECT pg_current_wal_insert_lsn()::text, clock_timestamp()")
    except psycopg.Error:
        return NOT_POSSIBLE
    at = {name: ledger.next_attempt for name, ledger in world.ledgers.items()}
    world.tokens.setdefault("marks", []).append((lsn, now, at))
    for ledger in world.ledgers.values():  # the recovery proves itself by the transaction after the target
        ledger.write(chance)
    return str(lsn)


@step("client-writes-on", "quiet", 1)
def client_writes_on(world: World, chance: random.Random) -> str:
    """A client that is no service of the environment writes during the next recovery."""
    world.tokens["client"] = True
    return ""


@step("prepare", "quiet", 0.5)
def prepare(world: World, chance: random.Random) -> str:
    """A prepared transaction, still open."""
    ledger = world.database
    attempt = ledger.note(1_000_000 + ledger.next_attempt)
    attempt.outcome, name = "indeterminate", f"client_{attempt.attempt}"
    try:
        world.sql(
            f"BEGIN; INSERT INTO attempts VALUES ({attempt.attempt}); INSERT INTO kv VALUES ({attempt.key}, "
            f"{attempt.attempt}, repeat('value of attempt {attempt.attempt} ', 4)); PREPARE TRANSACTION '{name}'",
            DATABASE,
        )
    except psycopg.Error:
        return NOT_POSSIBLE
    world.tokens.setdefault("prepared", {})[name] = attempt
    return name


@step("end-prepared", "quiet", 0.8)
def end_prepared(world: World, chance: random.Random) -> str:
    """Commit or roll back the oldest prepared transaction."""
    prepared = world.tokens.get("prepared", {})
    if not prepared:
        return NOT_POSSIBLE
    name = next(iter(prepared))
    commits = chance.random() < 0.6
    try:
        world.sql(f"{'COMMIT' if commits else 'ROLLBACK'} PREPARED '{name}'", DATABASE)
    except psycopg.errors.UndefinedObject:
        prepared.pop(name)
        return "gone"
    except psycopg.Error:
        return NOT_POSSIBLE
    attempt, ledger = prepared.pop(name), world.database
    ledger.writes.remove(attempt)
    if commits:
        attempt.outcome, attempt.answered = "acknowledged", time.time()
        ledger.writes.append(attempt)
    return f"{'commit' if commits else 'rollback'} {name}"


@contextlib.contextmanager
def client_writing(ledger: Ledger, chance: random.Random) -> Iterator[None]:
    """A client that writes all the time while the block runs, and connects again after every error."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.004):
            if ledger.write(chance) != "acknowledged":
                stop.wait(0.05)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive(), "the client hangs"


# Administrators


@step("switch-wal", "quiet", 2)
def switch_wal(world: World, chance: random.Random) -> str:
    """Segments of which most is empty, as archive_timeout makes them."""
    times = chance.randint(1, 6)
    with contextlib.suppress(psycopg.Error):
        for _ in range(times):
            world.database.write(chance)
            world.sql("SELECT pg_switch_wal()")
        return str(times)
    return NOT_POSSIBLE


@step("checkpoint", "quiet", 1)
def checkpoint(world: World, chance: random.Random) -> str:
    """CHECKPOINT."""
    with contextlib.suppress(psycopg.Error):
        world.sql("CHECKPOINT")
        return ""
    return NOT_POSSIBLE


@step("alter-system", "quiet", 0.7)
def alter_system(world: World, chance: random.Random) -> str:
    """A setting that only the data directory has."""
    value = f"{chance.randint(5, 20)}MB"
    with contextlib.suppress(psycopg.Error):
        world.sql(f"ALTER SYSTEM SET work_mem = '{value}'")
        world.sql("SELECT pg_reload_conf()")
        until(lambda: world.sql("SHOW work_mem") == [(value,)], what="the setting", seconds=20, every_seconds=0.02)
        world.tokens["settings"] = {"work_mem": value}
        return value
    return NOT_POSSIBLE


@step("tablespace", "quiet", 0.7)
def tablespace(world: World, chance: random.Random) -> str:
    """A tablespace that the base backups do not know, with the client's table in it."""
    path = world.root / f"space_{chance.randrange(1000)}"
    world.system.account.directory(path, 0o700)
    try:
        if not world.sql(f"SELECT 1 FROM pg_tablespace WHERE spcname = '{TABLESPACE}'"):
            world.sql(f"CREATE TABLESPACE {TABLESPACE} OWNER {ROLE} LOCATION '{path}'")
        world.sql(f"ALTER TABLE attempts SET TABLESPACE {TABLESPACE}", DATABASE)
    except psycopg.Error:
        return NOT_POSSIBLE
    return path.name


def backup(flow: str) -> Do:
    """A scheduled backup."""

    def take(world: World, chance: random.Random) -> str:
        ran = world.launch(flow)
        return ran.status or ran.error[:60]

    return take


step("backup-database", "quiet", 1.5)(backup("backup-database"))
step("backup-redis", "quiet", 1)(backup("backup-redis"))
step("backup-cluster", "quiet", 1.5)(backup("backup-cluster"))


# Crashes


@step("shoot-postgres", "quiet", 1)
def shoot_postgres(world: World, chance: random.Random) -> str:
    """kill -9 of the primary; its supervisor starts it again, which nobody waits for."""
    with contextlib.suppress(Exception):
        world.system.shoot(world.primary)
        return ""
    return NOT_POSSIBLE


@step("crash-postgres", "accident", 2)
def crash_postgres(world: World, chance: random.Random) -> str:
    """kill -9 of the primary, which stays dead."""
    role = world.primary
    if role not in world.running():
        return NOT_POSSIBLE
    world.system.crash(role)
    return role


@step("comes-back", "accident", 1.5)
def comes_back(world: World, chance: random.Random) -> str:
    """The primary is dead, and its service manager starts it again while the next recovery runs; its client writes on."""
    role = world.primary
    if role not in world.running():
        return NOT_POSSIBLE
    world.system.crash(role)
    world.tokens["client"] = True
    world.tokens["starts"] = role, chance.uniform(0.1, 1.6)
    return f"{world.tokens['starts'][1]:.1f} s"


@contextlib.contextmanager
def starting_again(world: World) -> Iterator[None]:
    """Start a server that `comes_back` while the block runs, and wait for it at the end."""
    role, seconds = world.tokens.pop("starts", ("", 0.0))
    timer = threading.Timer(seconds, lambda: world.system.supervisor.start(PROGRAMS[role]))
    if role:
        timer.start()
    try:
        yield
    finally:
        timer.join() if role else None


@step("crash-redis", "quiet", 0.5)
def crash_redis(world: World, chance: random.Random) -> str:
    """kill -9 of Redis; its supervisor starts it again."""
    pid = world.system.supervisor.services()["redis"].pid
    if pid:
        run(["kill", "-9", str(pid)])
        with contextlib.suppress(Unreachable, OpsError):
            until(world._redis_answers, what="Redis", seconds=30, every_seconds=0.05)
    return ""


@step("restart-postgres", "quiet", 0.5)
def restart_postgres(world: World, chance: random.Random) -> str:
    """Its service manager restarts it."""
    role = world.primary
    if role not in world.running():
        return NOT_POSSIBLE
    world.system.stop(role)
    world.system.start(role)
    return role


# Accidents


@step("drop-database", "accident", 3)
def drop_database(world: World, chance: random.Random) -> str:
    """The application's database under its clients. A client of the second one, if there is one, writes meanwhile."""
    if isinstance(world.database.store, DatabaseStore):
        world.database.store.close()
    other = world.ledgers.get(OTHER)
    with client_writing(other, chance) if other else contextlib.nullcontext(), contextlib.suppress(psycopg.Error):
        world.sql(f"DROP DATABASE {DATABASE} WITH (FORCE)")
        return ""
    return NOT_POSSIBLE


def emptied(statement: str) -> Do:
    """A statement that takes every row from the client's table."""

    def do(world: World, chance: random.Random) -> str:
        accident = world.database.note(None)
        try:
            world.sql(statement, DATABASE)
        except psycopg.Error:
            world.database.writes.remove(accident)
            return NOT_POSSIBLE
        accident.outcome, accident.answered = "acknowledged", time.time()
        return ""

    return do


step("truncate", "accident", 2)(emptied("TRUNCATE kv"))
step("delete-all", "accident", 1)(emptied("DELETE FROM kv"))
step("drop-table", "accident", 2)(emptied("DROP TABLE kv"))


@step("remove-data", "accident", 2)
def remove_data(world: World, chance: random.Random) -> str:
    """The primary dies, and its data directory is missing."""
    role = world.primary
    if role in world.running():
        world.system.crash(role)
    data = world.system.node(role).data
    if not data.exists():
        return NOT_POSSIBLE
    shutil.rmtree(data)
    return role


@step("remove-pg-wal", "accident", 1)
def remove_pg_wal(world: World, chance: random.Random) -> str:
    """The primary dies, and somebody has deleted its WAL."""
    role = world.primary
    if role in world.running():
        world.system.crash(role)
    data = world.system.node(role).data
    if not (data / "pg_wal").exists():
        return NOT_POSSIBLE
    shutil.rmtree(data / "pg_wal")
    return role


@step("wrong-port", "accident", 1)
def wrong_port(world: World, chance: random.Random) -> str:
    """The TOML names a port on which nobody listens. It is corrected after the next recovery."""
    toml, port = world.root / "pair.toml", world.system.node("postgres").port
    text = toml.read_text()
    if f"\nport = {port}\n" not in text:
        return NOT_POSSIBLE
    world.tokens["toml"] = text
    write(toml, text.replace(f"\nport = {port}\n", f"\nport = {world.system.state.ports.backend}\n"), 0o644)
    return ""


def correct_port(world: World) -> None:
    """Somebody has seen it."""
    if text := world.tokens.pop("toml", None):
        write(world.root / "pair.toml", text, 0o644)


@step("flush-redis", "accident", 0.7)
def flush_redis(world: World, chance: random.Random) -> str:
    """FLUSHALL."""
    ledger = world.ledgers["Redis"]
    accident = ledger.note(None)
    try:
        world.redis().flushall()
    except redis.RedisError:
        ledger.writes.remove(accident)
        return NOT_POSSIBLE
    accident.outcome, accident.answered = "acknowledged", time.time()
    return ""


@step("remove-redis-data", "accident", 0.7)
def remove_redis_data(world: World, chance: random.Random) -> str:
    """Redis is stopped, and its data directory is missing."""
    world.system.supervisor.stop("redis")
    data = world.system.layout.redis_data
    if not data.exists():
        return NOT_POSSIBLE
    shutil.rmtree(data)
    return ""


@step("write-other", "quiet", 0.4)
def write_other(world: World, chance: random.Random) -> str:
    """The second database alone is written."""
    if OTHER not in world.ledgers:
        return NOT_POSSIBLE
    for _ in range(10):
        world.ledgers[OTHER].write(chance)
    return ""
