"""The steps of crashes and accidents of PostgreSQL."""

from __future__ import annotations

import contextlib
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

from lab.processes import write
from lab.servers.postgres import DATABASE
from runbook.wait import until
from tests.fixtures.postgres.clusters import PROGRAMS
from tests.recovery.sequences.steps import NOT_POSSIBLE, Do, client_writing, step
from tests.recovery.sequences.stores import DatabaseStore
from tests.recovery.sequences.world import OTHER, World

BULK_ROWS = 1_200_000
"""About 300 MB of WAL: a few seconds of crash recovery."""


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


@step("starting", "accident", 1)
def starting(world: World, chance: random.Random) -> str:
    """kill -9 of the primary with much WAL since its checkpoint: the next recovery meets it in crash recovery."""
    role = world.primary
    if role not in world.running():
        return NOT_POSSIBLE
    with contextlib.suppress(psycopg.Error):
        world.sql(
            "BEGIN; CREATE TABLE bulk (id int, filler text); INSERT INTO bulk "
            f"SELECT id, repeat('x', 200) FROM generate_series(1, {BULK_ROWS}) AS id; ROLLBACK",
            DATABASE,
        )
    world.system.shoot(role)
    until(lambda: role in world.running(), what="the supervisor", seconds=20, every_seconds=0.02)
    return role


@step("standby-behind", "accident", 1, "standby")
def standby_behind(world: World, chance: random.Random) -> str:
    """The primary dies while its standby is behind: it was detached, and starts only now."""
    role = world.primary
    if not world.variant.standby or not {role, world.standby} <= world.running():
        return NOT_POSSIBLE
    behind = world.standby
    world.system.stop(behind)
    outcomes = [world.database.write(chance) for _ in range(30)]
    world.system.crash(role)
    world.system.supervisor.start(PROGRAMS[behind])
    return f"{outcomes.count('acknowledged')} behind"


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
        world.tokens.pop("slot", None)
        world.tokens["dropped"] = True
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


def _remove(directory: Path) -> None:
    """Though a killed server's children may still write there for a moment."""

    def is_gone() -> bool:
        shutil.rmtree(directory, ignore_errors=True)
        return not directory.exists()

    until(is_gone, what=f"the end of {directory}", seconds=30)


@step("remove-data", "accident", 2)
def remove_data(world: World, chance: random.Random) -> str:
    """The primary dies, and its data directory is missing."""
    role = world.primary
    if role in world.running():
        world.system.crash(role)
    data = world.system.node(role).data
    if not data.exists():
        return NOT_POSSIBLE
    _remove(data)
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
    _remove(data / "pg_wal")
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
