"""Restore the keys under some prefixes into a live server that keeps serving (§2.3).

The keys are copied one by one from a scratch server with the backup. Afterwards both servers are compared key by key.
Clients' writes meanwhile are separated (tasks.redis.restore.writes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.redis.backup.rdb import accepts, payload_version
from tasks.redis.content.reading import shown
from tasks.redis.keys import PAGE_KEYS, Carried, carry, keys_under
from tasks.redis.line import RedisLine, scratch_line
from tasks.redis.restore.writes import LiveWrites
from tasks.redis.rights import find_refused
from tasks.redis.server import connected, key_counts

ACT = "restore Redis keys"
Extra = Literal["keep", "remove"]
"""What to do with live keys that are not in the backup."""


COMPARING = (("EXISTS", "ops:no-such-key"), ("EVAL_RO", "return 1", "0"), ("MEMORY", "USAGE", "ops:no-such-key"))
"""The commands that are needed only after the data is in place; the rights are checked before."""


@dataclass(frozen=True)
class PrefixKeys:
    """One database under one prefix: the backup's keys, the live keys, and those that are not in the backup. `bytes`:
    the backup's keys in memory."""

    database: int
    prefix: bytes
    backup: int
    live: int
    extra: int
    bytes: int


@dataclass(frozen=True)
class RestoreOrder:
    """The counted keys to restore."""

    address: str
    extra: Extra
    held: tuple[PrefixKeys, ...]

    @property
    def target(self) -> str:
        """The act's target, with the counts."""
        parts = [
            f"db {one.database} {shown(one.prefix) or 'every key'}: {one.backup:,} keys"
            + (f", {one.extra:,} others deleted" if self.extra == "remove" else "")
            for one in self.held
        ]
        return f"on {self.address} ({'; '.join(parts)})"

    @property
    def keys(self) -> int:
        """The keys of the backup."""
        return sum(one.backup for one in self.held)

    @property
    def removed(self) -> int:
        """How many live keys would be deleted."""
        return sum(one.extra for one in self.held) if self.extra == "remove" else 0

    @property
    def bytes(self) -> int:
        """The bytes of these keys in memory."""
        return sum(one.bytes for one in self.held)


@dataclass
class Restored:
    """The result of a restore. `removed`: deleted live keys; `spared`: others that were kept, because a client had just
    written them, or (if the clients' writes are unknown) because they are more than were counted."""

    carried: Carried = field(default_factory=Carried)
    removed: int = 0
    spared: int = 0


@probe
def count_keys(
    block: Redis, scratch: redis.Redis, live: RedisLine, prefixes: Sequence[bytes], extra: Extra
) -> RestoreOrder:
    """Count the keys that a restore of `prefixes` would change, in all databases of the backup and of the live server.

    Raises:
        Unreachable, OpsError: the live server does not answer, or refuses a command.
    """
    with scratch_line(block, scratch) as backup:
        numbers = sorted({*key_counts(scratch), *_databases(live)})
        held = [_count(backup, live, number, prefix) for number in numbers for prefix in prefixes]
    return RestoreOrder(block.address, extra, tuple(one for one in held if one.backup or one.live))


def _databases(live: RedisLine) -> list[int]:
    keyspace = bytes(live.call(0, "INFO", "keyspace")).decode()
    return [int(line.split(":", 1)[0].removeprefix("db")) for line in keyspace.splitlines() if line.startswith("db")]


def _count(backup: RedisLine, live: RedisLine, number: int, prefix: bytes) -> PrefixKeys:
    ours = theirs = extra = size = 0
    for page in keys_under(backup, number, prefix):
        sizes = backup.pipe(number, [("MEMORY", "USAGE", key) for key in page])
        ours += len(sizes) - sizes.count(None)
        size += sum(found or 0 for found in sizes)
    for page in keys_under(live, number, prefix):
        theirs += len(page)
        extra += len(absent(backup, number, page))
    return PrefixKeys(number, prefix, ours, theirs, extra, size)


def absent(side: RedisLine, number: int, keys: Sequence[bytes]) -> list[bytes]:
    """The keys that a server does not have."""
    answers = side.pipe(number, [("EXISTS", key) for key in keys])
    side.refuse(answers)
    return [key for key, found in zip(keys, answers, strict=True) if not found]


@probe
def find_refusal(
    block: Redis, scratch: redis.Redis, live: RedisLine, held: RestoreOrder, *, left_following: bool = False
) -> str:
    """Why the live server would refuse the backup's keys (role or version); "": it would not. Nothing is written.
    `left_following`: it is a replica because of a killed restore, which this run completes.

    Raises:
        Unreachable, OpsError: it does not answer, or forbids a command that is needed.
    """
    role = live.call(0, "ROLE")[0]
    removing = () if left_following or held.extra == "keep" else (("UNLINK", "ops:no-such-key"),)
    with connected(block) as client:
        for refused in find_refused(client, block, *COMPARING, *removing):
            raise refused
    if left_following:
        return ""  # the earlier run checked the rest; and a replica refuses the test of the version
    if role != b"master":
        return f"{block.address} is a {role.decode()}: it refuses writes"
    with scratch_line(block, scratch) as backup:
        version = _version(backup, held)
    with block.client() as client:
        try:
            ok = version is None or accepts(client, version)
        except redis.exceptions.OutOfMemoryError:
            ok = True  # it checks memory before the version; the plan reports memory in bytes
        except redis.RedisError as error:
            raise block.refused(error) from None
    if not ok:
        return f"{block.address} does not accept values of RDB version {version}, which {block.server_program} writes"
    for number in {one.database for one in held.held}:
        try:
            live.call(number, "PING")
        except Unreachable:
            raise
        except OpsError as error:
            return f"{block.address} has no database {number}: {error.message}"
    return ""


def _version(backup: RedisLine, held: RestoreOrder) -> int | None:
    for one in held.held:
        for page in keys_under(backup, one.database, one.prefix) if one.backup else ():
            for payload in backup.pipe(one.database, [("DUMP", key) for key in page[:1]]):
                if isinstance(payload, bytes):
                    return payload_version(payload)
    return None


@action(of=lambda order: Act(ACT, order.target))
def restore_keys(
    block: Redis, scratch: redis.Redis, live: RedisLine, order: RestoreOrder, writes: LiveWrites
) -> Restored:
    """Delete the live keys that are not in the backup (if ordered), then copy the backup's keys. Other keys that a
    client wrote since the count are kept. A key of the backup that expires meanwhile is not in it any more.

    If it is killed, the live server has some earlier keys and some of the backup's; a second run completes it.

    Raises:
        OpsError: the live server refuses.
        Unreachable: it does not answer.
    """
    done = Restored()
    with scratch_line(block, scratch) as backup:
        if order.extra == "remove":
            _remove(backup, live, order, writes, done)
        failpoint("redis: others removed")
        for one in order.held:
            for page in keys_under(backup, one.database, one.prefix) if one.backup else ():
                carry(backup, live, one.database, page, done.carried)
                failpoint("redis: keys carried")
        if order.extra == "remove":  # again: keys have expired in the backup since
            _remove(backup, live, order, writes, done)
    return done


@action(of=lambda order: Act(ACT, order.target), idempotent=True)
def restore_functions(block: Redis, scratch: redis.Redis, live: RedisLine, order: RestoreOrder) -> str:
    """Replace the live server's function libraries by the backup's; returns why that failed, "": it succeeded.

    Raises:
        Unreachable: a server does not answer.
    """
    with scratch_line(block, scratch) as backup:
        payload = backup.call(0, "FUNCTION", "DUMP")
    (answer,) = live.pipe(0, [("FUNCTION", "RESTORE", payload, "FLUSH")])
    return str(answer) if isinstance(answer, Exception) else ""


def _remove(backup: RedisLine, live: RedisLine, order: RestoreOrder, writes: LiveWrites, done: Restored) -> None:
    """Delete the live keys that the backup does not have. More than were counted have expired in the backup since; but
    if the clients' writes are unknown, they may be a client's, and are kept."""
    done.spared = 0
    for one in order.held:
        for keys in _extra(backup, live, one):
            writes.settle()
            doomed = [key for key in keys if key not in writes]
            if not writes.known:
                doomed = doomed[: max(order.removed - done.removed, 0)]
            done.spared += len(keys) - len(doomed)
            live.refuse(live.pipe(one.database, [("UNLINK", key) for key in doomed]))
            done.removed += len(doomed)


def _extra(backup: RedisLine, live: RedisLine, one: PrefixKeys) -> Iterator[list[bytes]]:
    for page in keys_under(live, one.database, one.prefix):
        for start in range(0, len(page), PAGE_KEYS):
            if keys := absent(backup, one.database, page[start : start + PAGE_KEYS]):
                yield keys
