"""The steps that mend something, each followed by every check from outside."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping
from typing import Any

from lab.servers.postgres import DATABASE
from tests.recovery.sequences.accidents import correct_port
from tests.recovery.sequences.checks import check_standby
from tests.recovery.sequences.confirmation import Stuck, carry_out, raise_broken
from tests.recovery.sequences.ledger import Write
from tests.recovery.sequences.promises import APART, FILES, REDIS
from tests.recovery.sequences.settlement import newest_kept, settle
from tests.recovery.sequences.steps import NOT_POSSIBLE, step
from tests.recovery.sequences.world import UNRELATED, World

TABLES = ["public.kv", "public.attempts"]


@step("full-restore", "recovery", 6)
def full_restore(world: World, chance: random.Random) -> str:
    """The main job, with its defaults."""
    return _full_restore(world, chance)


@step("full-restore-dump", "recovery", 0.7)
def full_restore_dump(world: World, chance: random.Random) -> str:
    """From the newest dump."""
    return _full_restore(world, chance, method="dump")


@step("full-restore-cluster", "recovery", 1)
def full_restore_cluster(world: World, chance: random.Random) -> str:
    """From the base backup and all WAL."""
    return _full_restore(world, chance, method="cluster")


@step("full-restore-replica", "recovery", 0.4, "replica")
def full_restore_replica(world: World, chance: random.Random) -> str:
    """With the replica of Redis as its source."""
    return _full_restore(world, chance, redis_source="replica")


def _full_restore(world: World, chance: random.Random, **parameters: Any) -> str:
    before = {name: ledger.copy() for name, ledger in world.ledgers.items()}
    places = {"kept Redis": world.system.layout.redis_data, "kept files": world.files}
    kept = {token: newest_kept(path) for token, path in places.items()}
    is_there = {"kept Redis": world.redis_answers(), "kept files": world.files.exists()}
    try:
        carried = carry_out(world, chance, "full-restore", **parameters)
    finally:
        correct_port(world)
    settle(world, carried)
    world.tokens["kept tables"] = None
    is_kept = carried.seen.content[DATABASE] is not None and not carried.kept_is_unknown
    world.tokens["kept"] = before[DATABASE] if is_kept and "__old_" in carried.texts else None
    world.tokens["kept cluster"] = before if is_kept and "data.superseded_" in carried.texts else None
    for token, name in (("kept Redis", REDIS), ("kept files", FILES)):
        if newest_kept(places[token]) != kept[token]:
            world.tokens[token] = before[name] if is_there[token] and not carried.kept_is_unknown else None
    return f"{carried.ran.status}: {carried.plan.effect.split(';')[1].strip() if ';' in carried.plan.effect else ''}"


@step("restore-database", "recovery", 0.7)
def restore_database(world: World, chance: random.Random) -> str:
    """The application's database from its newest dump."""
    before = world.database.copy()
    carried = carry_out(world, chance, "restore-database")
    settle(world, carried)
    is_kept = carried.seen.content[DATABASE] is not None and not carried.kept_is_unknown
    world.tokens |= {"kept": before if is_kept else None, "kept tables": None}
    return carried.ran.status


@step("undo-restore", "recovery", 0.8)
def undo_restore(world: World, chance: random.Random) -> str:
    """The database that the last restore replaced."""
    kept = world.tokens.get("kept")
    if not kept:
        return NOT_POSSIBLE
    now = world.database.copy()
    carried = carry_out(world, chance, "undo-restore")
    settle(world, carried, back_to={DATABASE: [*kept]})
    world.tokens |= {"kept": now, "kept tables": None}
    return carried.ran.status


@step("undo-full-restore", "recovery", 1.2)
def undo_full_restore(world: World, chance: random.Random) -> str:
    """The cluster that the last full restore replaced."""
    kept = world.tokens.get("kept cluster")
    if not kept:
        return NOT_POSSIBLE
    now = {name: ledger.copy() for name, ledger in world.ledgers.items()}
    carried = carry_out(world, chance, "undo-full-restore")
    settle(world, carried, back_to={name: writes for name, writes in kept.items() if name not in APART})
    world.tokens |= {"kept": None, "kept tables": None, "kept cluster": now}
    return carried.ran.status


@step("restore-to-point", "recovery", 1)
def restore_to_point(world: World, chance: random.Random) -> str:
    """The whole cluster to one of the marks."""
    return _to_mark(world, chance)


@step("tables-to-point", "recovery", 0.7)
def tables_to_point(world: World, chance: random.Random) -> str:
    """The tables of the application's client to one of the marks, while everything else is in use."""
    return _to_mark(world, chance, mode="tables", tables=TABLES)


def _to_mark(world: World, chance: random.Random, **parameters: Any) -> str:
    marks = world.tokens.get("marks")
    if not marks:
        return NOT_POSSIBLE
    mark = chance.choice(marks)
    targets = [
        ("lsn", mark.lsn),
        ("time", mark.moment.isoformat(" ", "microseconds")),
        ("transaction", mark.transaction),
        ("before_transaction", mark.transaction),
    ]
    by, target = chance.choice(targets)
    before = {name: ledger.copy() for name, ledger in world.ledgers.items()}
    carried = carry_out(world, chance, "restore-to-point", by=by, target=target, **parameters)
    names = [DATABASE] if parameters else [name for name in world.ledgers if name not in APART]
    wanted = {name: [*mark.branches[name]] for name in names}
    settle(world, carried, back_to=wanted, more=_later(world, wanted, mark.at, carried.seen.at))
    is_kept = carried.seen.content[DATABASE] is not None and not carried.kept_is_unknown
    if parameters:
        world.tokens["kept tables"] = before[DATABASE] if is_kept else None
    else:
        world.tokens |= {"kept": None, "kept tables": None, "kept cluster": before if is_kept else None}
    return f"{carried.ran.status} by {by}"


def _later(world: World, wanted: dict[str, list[Write]], at: Mapping[str, int], began: float) -> list[str]:
    """Writes after the target. A client that goes on writes after the recovery, too."""
    problems = list[str]()
    for name in wanted:
        content = world.ledgers[name].store.read()
        newest = {one.attempt for one in world.ledgers[name].copy() if one.sent >= began}
        later = [one for one in (content.attempts if content else ()) or () if one >= at[name] and one not in newest]
        if later:
            problems.append(f"{name}: {len(later)} writes after the target are there")
    return problems


@step("restore-tables", "recovery", 0.6)
def restore_tables(world: World, chance: random.Random) -> str:
    """The tables of the application's client from the newest dump."""
    now = world.database.copy()
    carried = carry_out(world, chance, "restore-tables", tables=TABLES)
    settle(world, carried)
    world.tokens["kept tables"] = None if carried.kept_is_unknown else now
    return carried.ran.status


@step("undo-restore-tables", "recovery", 0.7)
def undo_restore_tables(world: World, chance: random.Random) -> str:
    """The rows that the last restore of tables replaced."""
    kept = world.tokens.get("kept tables")
    if not kept:
        return NOT_POSSIBLE
    now = world.database.copy()
    carried = carry_out(world, chance, "undo-restore-tables")
    settle(world, carried, back_to={DATABASE: kept})
    world.tokens["kept tables"] = now
    return carried.ran.status


@step("restore-unrelated", "recovery", 0.7)
def restore_unrelated(world: World, chance: random.Random) -> str:
    """One table goes back to the newest point, while everything else is in use."""
    carried = carry_out(world, chance, "restore-to-point", by="latest", mode="tables", tables=[f"public.{UNRELATED}"])
    settle(world, carried)
    return carried.ran.status


@step("failover", "recovery", 1.5, "standby")
def failover(world: World, chance: random.Random) -> str:
    """The standby takes over, because the primary is dead, or before work on its host."""
    if not world.variant.standby:
        return NOT_POSSIBLE
    writable = [role for role in world.roles if world.takes_writes(role)]
    carried = carry_out(world, chance, "postgres-failover", mode="planned" if writable else "unplanned")
    settle(world, carried)
    return f"{carried.ran.status} {'planned' if writable else 'unplanned'}"


@step("rejoin-standby", "quiet", 0.7, "standby")
def rejoin_standby(world: World, chance: random.Random) -> str:
    """What most recoveries name as the next step."""
    if not world.variant.standby:
        return NOT_POSSIBLE
    plan = world.launch("rejoin-standby")
    if plan.status == "PLANNED":
        with contextlib.suppress(Stuck):
            carried = carry_out(world, chance, "rejoin-standby")
            settle(world, carried, more=check_standby(world))
            return carried.ran.status
    elif plan.is_done:
        raise_broken(world, check_standby(world), plan.text)
    return plan.status or plan.error[:60]
