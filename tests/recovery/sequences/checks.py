"""What holds after every recovery, asked from outside: the client's ledger, SQL and Redis of its own, the supervisor."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from lab.servers.postgres import DATABASE
from runbook.errors import Unreachable
from runbook.wait import until
from tests.recovery.sequences import promises
from tests.recovery.sequences.ledger import PROBE, Content, Ledger, Write, expected
from tests.recovery.sequences.operator import Ran
from tests.recovery.sequences.promises import APART, FILES, Allowance
from tests.recovery.sequences.small_system import REPLICA
from tests.recovery.sequences.stores import DatabaseStore
from tests.recovery.sequences.world import World

ACKNOWLEDGED_SECONDS = 15


class Broken(AssertionError):
    """A promise was broken."""


@dataclass(frozen=True)
class Seen:
    """The system before a recovery: its services, its branches, its content, and what else a client can see."""

    running: frozenset[str]
    branches: Mapping[str, list[Write]]
    content: Mapping[str, Content | None]
    settings: Mapping[str, str] = field(default_factory=dict)
    redis: Mapping[str, str] = field(default_factory=dict)
    is_writable: bool = True
    at: float = field(default_factory=time.time)


def see(world: World) -> Seen:
    """Look at everything."""
    content = {name: ledger.store.read() for name, ledger in world.ledgers.items()}
    branches = {name: ledger.copy() for name, ledger in world.ledgers.items()}
    settings = dict(world.tokens.get("settings", {}))
    return Seen(frozenset(world.running()), branches, content, settings, redis_settings(world), world.is_writable)


def redis_settings(world: World) -> dict[str, str]:
    """The running settings of Redis that decide what a crash leaves; none where it does not answer."""
    if not world.redis_answers():
        return {}
    return {name: world.redis().config_get(name)[name] for name in ("appendonly", "save")}


@dataclass(frozen=True)
class Found:
    """What a recovery made of one part."""

    branch: list[Write]
    lost: list[Write]
    problems: list[str]
    abandoned: list[int] = field(default_factory=list)


def compare(ledger: Ledger, branch: Sequence[Write], content: Content | None) -> Found:
    """The branch as it is in the content, the acknowledged writes that are not there, and differences."""
    if content is None:
        return Found(
            [], [one for one in branch if one.is_acknowledged], [f"{ledger.name} is missing or does not answer"]
        )
    if content.attempts is None:
        return _compare_prefix(ledger, branch, content)
    present = content.attempts
    problems = [f"{ledger.name}: attempt {one} was never sent" for one in sorted(present - set(ledger.known))[:3]]
    ids = {one.attempt for one in branch}
    abandoned = sorted((present & set(ledger.known)) - ids)
    lost = [one for one in branch if one.is_acknowledged and one.attempt not in present]
    last = max((index for index, one in enumerate(branch) if one.attempt in present), default=-1)
    # Those after the last write may be there or not; one that was left out may have writes of the new branch after it.
    accidents = [one.attempt for one in branch if one.is_accident]
    before = sum(one.is_accident for one in branch[: last + 1])
    for number in range(len(accidents), -1, -1):
        variant = present.union(accidents[:number])
        if expected(branch, variant) == dict(content.rows):
            return Found(_of_branch(branch, variant), lost, problems, abandoned)
    variant = present.union(accidents[:before])
    if not abandoned:
        problems.append(f"{ledger.name}: {_differences(expected(branch, variant), content)}")
    return Found(_of_branch(branch, variant), lost, problems, abandoned)


def _of_branch(branch: Sequence[Write], present: Collection[int]) -> list[Write]:
    """The writes that are there, or may still come: a commit that waits for a standby is seen later."""
    return [one for one in branch if one.attempt in present or one.outcome == "indeterminate"]


def _compare_prefix(ledger: Ledger, branch: Sequence[Write], content: Content) -> Found:
    """A part without a list of attempts is as it was after one of the writes; the last such one counts."""
    for end in range(len(branch), -1, -1):
        kept = branch[:end]
        unsure = {one.key for one in kept if one.outcome == "indeterminate"}
        done = expected(kept, {one.attempt for one in kept})
        if _without(done, unsure) == _without(content.rows, unsure):
            lost = [one for one in branch[end:] if one.is_acknowledged]
            return Found(list(kept), lost, [])
    done = expected(branch, {one.attempt for one in branch})
    return Found(list(branch), [], [f"{ledger.name} is as it never was: {_differences(done, content)}"])


def _without(rows: Mapping[int, int], keys: Collection[int | None]) -> dict[int, int]:
    return {key: attempt for key, attempt in rows.items() if key not in keys}


def _differences(wanted: Mapping[int, int], content: Content) -> str:
    keys = sorted(key for key in {*wanted, *content.rows} if wanted.get(key) != content.rows.get(key))
    shown = ", ".join(f"key {key}: {content.rows.get(key)}, not {wanted.get(key)}" for key in keys[:4])
    return f"{len(keys)} keys differ ({shown})"


def check_losses(lost: Mapping[str, Sequence[Write]], plans: Sequence[Ran], ran: Ran) -> list[str]:
    """Compare what is lost, by part, with what the confirmed plans and the report said. A commit may concern any
    database, so those are compared together; what was written after the plan is the report's alone."""
    problems = list[str]()
    planned = [one for plan in plans for one in promises.of_plan(plan)]
    said = promises.of_report(ran) + (planned if len(plans) > 1 else [])  # a run that was ended has no report
    for parts in (tuple(name for name in lost if name not in APART), *((name,) for name in APART)):
        gone = [one for part in parts for one in lost.get(part, ())]
        if parts == (FILES,):  # counted by file; one that was deleted again is no loss
            gone = [one for one in {one.key: one for one in gone}.values() if not one.deletes]
        if not gone:
            continue
        name = "/".join(parts)
        if why := _widest(said, parts).refuses(gone):
            problems.append(f"{name}: the report says less than was lost: {why} ({ran.facts.get('lost', ran.effect)})")
        early = [one for one in gone if one.answered <= min(plan.started for plan in plans)]
        if why := _widest(planned, parts).refuses(early):
            effects = "; ".join(plan.effect for plan in plans)
            problems.append(f"{name}: the confirmed plan says less than was lost: {why} ({effects})")
    return problems


def _widest(allowances: Sequence[Allowance], parts: Sequence[str]) -> Allowance:
    each = [promises.widest(allowances, part) for part in parts]
    return max(each, key=lambda one: (bool(one.unknown), one.since is not None, one.count or 0))


def check_system(world: World, seen: Seen, ran: Ran, texts: str) -> list[str]:
    """One server takes writes, commits return, services run again, settings are as they were. `texts`: everything that
    a person has read of the recovery."""
    problems = list[str]()
    with contextlib.suppress(Unreachable):  # its service manager may be starting it
        until(lambda: any(map(world.takes_writes, world.roles)), what="a server", seconds=15, every_seconds=0.1)
    writable = [role for role in world.roles if world.takes_writes(role)]
    if len(writable) != 1:
        problems.append(f"{len(writable)} servers take writes: {', '.join(writable) or 'none'}")
    # A server that has to be rebuilt is named, and stays stopped.
    waiting = {role for role in ("standby", "postgres") if role not in writable and "standby" in ran.text}
    # It ends where nothing answers, and stays stopped where a new cluster took the old one's place.
    waiting |= set() if writable and "WAL receiver: out of date" not in ran.text else {"receiver"}
    if missing := seen.running - world.running() - waiting:
        problems.append(f"stopped, although they ran before: {', '.join(sorted(missing))}")
    if not writable:
        return problems
    problems += [*_check_commits(world), *_check_slot(world, texts), *_check_redis(world, seen, texts)]
    for name, value in seen.settings.items():
        ((now,),) = world.sql(f"SELECT current_setting('{name}')")
        if now != value and name not in texts and "ALTER SYSTEM" not in texts:
            problems.append(f"the setting {name} went from {value} to {now} without a word")
        world.tokens["settings"][name] = now  # a change is named once
    invalid = world.sql("SELECT datname FROM pg_database WHERE datconnlimit = -2")
    problems += [f"the database {name} is invalid" for (name,) in invalid]
    for (name,) in world.sql("SELECT gid FROM pg_prepared_xacts"):
        if name not in world.tokens.get("prepared", {}) and "prepared" not in ran.text:
            problems.append(f"the prepared transaction {name}, which had ended, is there again")
    return problems


def _check_slot(world: World, texts: str) -> list[str]:
    """A consumer's slot is there, or somebody has said that it is not."""
    slot = world.tokens.get("slot")
    if not slot or world.sql(f"SELECT 1 FROM pg_replication_slots WHERE slot_name = '{slot}'"):
        return []
    world.tokens.pop("slot")
    return (
        []
        if slot in texts or "replication slots: not known" in texts
        else [f"the logical slot {slot} has vanished without a word"]
    )


def _check_redis(world: World, seen: Seen, texts: str) -> list[str]:
    """Running settings are as they were, or named; a replica follows its master, or is named."""
    now = redis_settings(world)
    problems = [
        f"Redis's running setting {name} went from “{value}” to “{now[name]}” without a word"
        for name, value in seen.redis.items()
        if now and now[name] != value and name not in texts
    ]
    if REPLICA in seen.running and "redis" in world.running():
        try:
            until(world.replica_follows, what="the replica", seconds=ACKNOWLEDGED_SECONDS, every_seconds=0.1)
        except Unreachable:
            if "replica" not in texts:
                problems.append("the replica of Redis does not follow, and no word says so")
    return problems


def check_standby(world: World) -> list[str]:
    """A standby that has rejoined streams, takes no writes, and has every row of its primary."""
    role = world.standby
    try:
        until(lambda: world.is_behind(role) is False, what="the standby", seconds=30, every_seconds=0.1)
    except Unreachable:
        return [f"{role} has rejoined, and does not follow its primary"]
    if world.database.store.read() is None:
        return []
    counts = {
        one: world.system.sql(one, "SELECT count(*), sum(attempt) FROM attempts", database=DATABASE)
        for one in (world.primary, role)
    }
    return [] if len(set(map(str, counts.values()))) == 1 else [f"the standby has other rows: {counts}"]


def _check_commits(world: World) -> list[str]:
    """A write of each database is acknowledged within seconds. (Where a table is missing, that is another problem.)"""
    problems = list[str]()
    for name, ledger in world.ledgers.items():
        if ledger.store.read() is None:
            continue
        if isinstance(ledger.store, DatabaseStore):
            ledger.store.close()
        began = time.monotonic()
        try:
            until(
                lambda ledger=ledger: _acknowledged(ledger), what=name, seconds=ACKNOWLEDGED_SECONDS, every_seconds=0.1
            )  # type: ignore[misc]
        except Unreachable:
            problems.append(f"{name}: no write is acknowledged within {time.monotonic() - began:.0f} s")
    return problems


def _acknowledged(ledger: Ledger) -> bool:
    write = ledger.note(PROBE, deletes=True)
    write.outcome = ledger.store.send(write)
    write.answered = time.time()
    if write.outcome == "refused":
        ledger.writes.remove(write)
    return write.outcome == "acknowledged"


def check_untouched(world: World, seen: Seen, ran: Ran) -> list[str]:
    """A run that refused left everything as it was: content, services."""
    problems = list[str]()
    for name, ledger in world.ledgers.items():
        if seen.content[name] is None:
            continue
        found = compare(ledger, ledger.copy(), ledger.store.read())
        if found.problems or found.lost or found.abandoned:
            lost = f"{len(found.lost)} acknowledged writes missing" if found.lost else ""
            problems.append(f"refused, and yet {name} changed: {'; '.join([*found.problems, lost])}")
    alone = {"receiver"} if not any(map(world.takes_writes, world.roles)) else set()
    try:
        until(lambda: not seen.running - world.running() - alone, what="services", seconds=10, every_seconds=0.1)
    except Unreachable:
        missing = sorted(seen.running - world.running() - alone)
        problems.append(f"refused, and left stopped: {', '.join(missing)}")
    return problems


def sessions_end(world: World) -> None:
    """Every client connects again: the server behind the address may be another one."""
    for ledger in world.ledgers.values():
        if isinstance(ledger.store, DatabaseStore):
            ledger.store.close()
