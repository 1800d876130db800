"""Compare a live server with a scratch server, key by key, in parts too small to delay clients (§2.3)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import redis

from blocks.redis.server import Redis
from runbook.errors import Unreachable
from runbook.kinds import probe
from runbook.log import logger
from runbook.wait import until
from tasks.redis.content.reading import shown, volatile_databases
from tasks.redis.content.script import DIGESTS
from tasks.redis.keys import PROGRESS_SECONDS, batches, keys_under
from tasks.redis.line import RedisLine, scratch_line
from tasks.redis.restore.prefixes import PrefixKeys, RestoreOrder, absent
from tasks.redis.restore.values import same_value
from tasks.redis.restore.writes import LiveWrites

COLUMNS = (
    "database",
    "prefix",
    "keys of the backup",
    "equal",
    "written by clients since",
    "expired since",
    "DIFFERENT",
    "others there",
)
DIGEST_BYTES = 1 << 16
"""Hashing a thousand small members in Lua takes a server 3 ms; larger values are read in parts."""
MOST_NAMED = 5
AGAIN_SECONDS = 3.0
MOST_AGAIN = 1000


@dataclass
class KeyRow:
    """One database under one prefix. `written`: different keys that clients wrote; `replaced`: equal keys that clients
    wrote before the restore replaced them; `different`: different keys that no client is known to have written;
    `others`: live keys that are not in the backup."""

    database: int
    prefix: bytes
    equal: int = 0
    written: int = 0
    replaced: int = 0
    expired: int = 0
    different: list[bytes] = field(default_factory=list)
    others: int = 0
    new: int = 0
    left: list[bytes] = field(default_factory=list)

    @property
    def keys(self) -> int:
        """The keys of the backup."""
        return self.equal + self.written + self.expired + len(self.different)

    def cells(self) -> tuple[str, ...]:
        """Under `COLUMNS`."""
        counts = (self.keys, self.equal, self.written, self.expired, len(self.different), self.others)
        return (f"db {self.database}", shown(self.prefix) or "(every key)", *(f"{count:,}" for count in counts))


@dataclass(frozen=True)
class KeyComparison:
    """`writes_known` False: clients' writes are unknown, so they may have caused a difference."""

    rows: tuple[KeyRow, ...]
    writes_known: bool

    @property
    def differences(self) -> tuple[str, ...]:
        """The differences, as sentences."""
        sentences = []
        for row in self.rows:
            for keys, what in ((row.different, "different"), (row.left, "not in the backup")):
                if keys:
                    names = ", ".join(shown(key) for key in keys[:MOST_NAMED])
                    sentences.append(f"database {row.database}: {len(keys):,} keys are {what} ({names})")
        return tuple(sentences)

    @property
    def written(self) -> int:
        """Keys that clients have overwritten or added."""
        return sum(row.written + row.new for row in self.rows)

    @property
    def replaced(self) -> int:
        """Keys that clients wrote during the run, and that equal the backup."""
        return sum(row.replaced for row in self.rows)

    @property
    def equal(self) -> int:
        """Keys that are equal on both servers."""
        return sum(row.equal for row in self.rows)


@probe
def compare_keys(
    block: Redis, scratch: redis.Redis, live: RedisLine, order: RestoreOrder, writes: LiveWrites
) -> KeyComparison:
    """Compare every key of the backup under the order's prefixes with the live server's, and count other live keys.

    A different key is read again: it may have expired between two readings.

    Raises:
        Unreachable, OpsError: the live server does not answer, or refuses a command.
    """
    with scratch_line(block, scratch) as backup, block.client() as client:
        try:
            fading = volatile_databases(scratch) | volatile_databases(client)
        except redis.RedisError as error:
            raise block.refused(error) from None
        rows = tuple(
            _Comparing(backup, live, one, one.database in fading, writes, order.extra).row() for one in order.held
        )
    return KeyComparison(rows, writes.known)


class _Comparing:
    """One database under one prefix."""

    def __init__(
        self, backup: RedisLine, live: RedisLine, held: PrefixKeys, volatile: bool, writes: LiveWrites, extra: str
    ) -> None:
        self.backup, self.live, self.held = backup, live, held
        self.volatile, self.writes, self.extra = volatile, writes, extra
        self.number = held.database
        self.reported = time.monotonic()

    def row(self) -> KeyRow:
        row, unequal = KeyRow(self.number, self.held.prefix), list[bytes]()
        for page in keys_under(self.backup, self.number, self.held.prefix) if self.held.backup else ():
            for group, _ in batches(self.backup, self.number, page, DIGEST_BYTES):
                self._compare(group, row, unequal)
            self._report(row)
        self._resolve(list(dict.fromkeys(unequal)), row)
        for page in keys_under(self.live, self.number, self.held.prefix):
            self._others(page, row)
        return row

    def _compare(self, keys: Sequence[bytes], row: KeyRow, unequal: list[bytes]) -> None:
        ours, theirs = self._digests(self.backup, keys), self._digests(self.live, keys)
        for key, our, their in zip(keys, ours, theirs, strict=True):
            if not our:
                row.expired += 1
            elif self._same(key) if our[:1] in (b"+", b"?") else our == their:
                row.equal += 1
                row.replaced += key in self.writes
            else:
                unequal.append(key)

    def _digests(self, side: RedisLine, keys: Sequence[bytes]) -> list[bytes]:
        words = ("EVAL_RO", DIGESTS, 0, self.number, int(self.volatile), DIGEST_BYTES)
        answer: list[bytes] = side.call(self.number, *words, *keys)
        return answer

    def _same(self, key: bytes) -> bool:
        return same_value(self.backup, self.live, self.number, key, self.volatile)

    def _resolve(self, unequal: list[bytes], row: KeyRow) -> None:
        """Separate clients' writes; read the rest again, and once more later: keys may have expired."""
        self.writes.settle()
        waiting = [key for key in unequal if key not in self.writes]
        row.written += len(unequal) - len(waiting)

        def all_resolved() -> bool:
            for key in list(waiting[:MOST_AGAIN]):
                if state := self._state(key):
                    waiting.remove(key)
                    row.equal += state == "equal"
                    row.expired += state == "expired"
            return not waiting

        with contextlib.suppress(Unreachable):
            until(all_resolved, what="the same content", seconds=AGAIN_SECONDS)
        all_resolved()  # raises if the server does not answer
        row.different += waiting

    def _state(self, key: bytes) -> str:
        if absent(self.backup, self.number, [key]):
            return "expired"
        return "equal" if self._same(key) else ""

    def _others(self, page: Sequence[bytes], row: KeyRow) -> None:
        others = absent(self.backup, self.number, page)
        row.others += len(others)
        if others and self.extra == "remove":
            # Read after the page: by now the server has reported every key that a client made before.
            self.writes.settle()
            still = set(others) - set(absent(self.live, self.number, others))
            new = [key for key in others if key in self.writes]
            row.new += len(new)
            row.left += [key for key in still if key not in self.writes]

    def _report(self, row: KeyRow) -> None:
        if time.monotonic() - self.reported > PROGRESS_SECONDS:
            self.reported = time.monotonic()
            logger().info("database %d: %d of %d keys compared", self.number, row.equal, self.held.backup)
