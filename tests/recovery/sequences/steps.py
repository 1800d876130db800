"""The steps of a sequence, and those of clients. Others are in administration.py, accidents.py, recoveries.py; those of
Redis and of the files in redis_steps.py and file_steps.py.

A step is a function of the world and of its own random numbers, so that a sequence without some of its steps does the
rest as before. It returns a note for the round's line; "-" where it could not be done.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

import psycopg

from lab.servers.postgres import DATABASE
from tests.recovery.sequences.ledger import Ledger, Write
from tests.recovery.sequences.world import OTHER, World

Do = Callable[[World, random.Random], str]
NOT_POSSIBLE = "-"


@dataclass(frozen=True)
class Step:
    """One kind of step. `weight`: how often it comes, among those of its kind; `needs`: of a variant."""

    name: str
    do: Do
    kind: str
    weight: float = 1.0
    needs: str = ""


@dataclass(frozen=True)
class Mark:
    """A moment between two writes: a transaction without any, an LSN, a time. `at`: each part's next attempt;
    `branches`: each part's writes until then, which a recovery may leave later."""

    transaction: str
    lsn: str
    timeline: int
    moment: datetime
    at: Mapping[str, int]
    branches: Mapping[str, list[Write]]


STEPS: dict[str, Step] = {}


def step(name: str, kind: str, weight: float = 1.0, needs: str = "") -> Callable[[Do], Do]:
    """Enter a function as a step. Kinds: `quiet` changes nothing that a recovery mends; `accident` destroys something;
    `recovery` mends it. `needs`: what only some variants have (standby, other, replica)."""

    def enter(do: Do) -> Do:
        STEPS[name] = Step(name, do, kind, weight, needs)
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


TIMELINE = "('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int"


@step("mark", "quiet", 2)
def mark(world: World, chance: random.Random) -> str:
    """A moment to which a point-in-time recovery may go back; nobody writes around it."""
    try:
        ((transaction, lsn, timeline, now),) = world.sql(
            f"SELECT pg_current_xact_id()::text, pg_current_wal_insert_lsn()::text, {TIMELINE}, clock_timestamp()"
        )
    except psycopg.Error:
        return NOT_POSSIBLE
    at = {name: ledger.next_attempt for name, ledger in world.ledgers.items()}
    branches = {name: [replace(one) for one in ledger.copy()] for name, ledger in world.ledgers.items()}
    world.tokens.setdefault("marks", []).append(Mark(transaction, lsn, timeline, now, at, branches))
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
    if attempt in ledger.writes:  # a recovery may have dropped it from the branch
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


@step("write-other", "quiet", 0.4, "other")
def write_other(world: World, chance: random.Random) -> str:
    """The second database alone is written."""
    if OTHER not in world.ledgers:
        return NOT_POSSIBLE
    for _ in range(10):
        world.ledgers[OTHER].write(chance)
    return ""
