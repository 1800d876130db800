"""The content of a Redis server in a backup's manifest, and the comparison of a copy with it.

Keys without a TTL are proven by their number and an order-independent digest (the sum of 128-bit hashes of every key's
logical content). Each expiring key, and each expiring field of a hash, has a line in `expiring.tsv.zst` next to the RDB
(database, PEXPIRETIME in ms, hash, `key` or `field`). A restore requires exactly those that have not expired yet. A
type that cannot be compared is an error, never a pass.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from pydantic import BaseModel, ConfigDict

from runbook import clock
from runbook.errors import OTHER_BACKUPS
from tasks.backups import codec

EXPIRING = f"expiring.tsv{codec.ENDING}"
OLD_EXPIRING = "expiring.tsv.gz"
"""Of versions before zstd."""
_LINE_BYTES = 256
"""A line has a database, a time, a digest and a word: a hundred bytes."""
COLUMNS = ("database", "keys without TTL", "found", "content equal", "keys with TTL ahead", "found", "expired since")


class RedisDatabaseContent(BaseModel):
    """One database. `prefixes`: keys by their text up to the first colon ("": no colon), the most frequent ones."""

    model_config = ConfigDict(frozen=True)
    all_keys: int
    persistent_keys: int
    persistent_digest: str
    expiring_keys: int
    expiring_fields: int = 0
    prefixes: dict[str, int] = {}


EMPTY = RedisDatabaseContent(all_keys=0, persistent_keys=0, persistent_digest="0" * 32, expiring_keys=0)


class RedisContent(BaseModel):
    """The content of an RDB. `rdb_keys`: its records; `read_*_ms`: the times before and after it was read."""

    model_config = ConfigDict(frozen=True)
    server_version: str
    databases: dict[int, RedisDatabaseContent]
    functions: dict[str, str] = {}
    rdb_keys: int = -1
    rdb_version: str = ""
    memory_bytes: int = 0
    read_began_ms: int = 0
    read_ended_ms: int = 0

    @property
    def all_keys(self) -> int:
        """The keys of all databases."""
        return sum(found.all_keys for found in self.databases.values())

    @property
    def may_vanish(self) -> int:
        """Keys that may be missing when the RDB is loaded later: hashes without a TTL whose last fields expire. The
        server counts them neither as loaded nor as expired."""
        fading = sum(d.all_keys - d.persistent_keys - d.expiring_keys for d in self.databases.values())
        return max(fading, 0) + max(self.rdb_keys - self.all_keys, 0)


@dataclass(frozen=True)
class ContentProof:
    """One database's row: the backup's keys, and the keys found."""

    database: int
    persistent_expected: int
    persistent_found: int
    digest_equal: bool
    expiring_expected: int
    expiring_found: int
    expired_since: int

    def row(self) -> tuple[str, ...]:
        """Under `COLUMNS`."""
        return (
            f"db {self.database}",
            f"{self.persistent_expected:,}",
            f"{self.persistent_found:,}",
            "yes" if self.digest_equal else "NO",
            f"{self.expiring_expected:,}",
            f"{self.expiring_found:,}",
            f"{self.expired_since:,}",
        )


@dataclass(frozen=True)
class RedisComparison:
    """`differences` are sentences; without any, the copy equals the backup."""

    differences: tuple[str, ...]
    proofs: tuple[ContentProof, ...]

    @property
    def is_equal(self) -> bool:
        """There is no difference."""
        return not self.differences

    @property
    def expired_since(self) -> int:
        """Keys whose TTL ended between the backup and this comparison, as expected."""
        return sum(proof.expired_since for proof in self.proofs)

    def rows(self) -> list[tuple[str, ...]]:
        """For a table under `COLUMNS`."""
        return [proof.row() for proof in self.proofs]


class _Expiring:
    """The comparison of two lists of expiring keys: counts by (database, kind)."""

    def __init__(self, required: RedisContent, expected: Path, copied: RedisContent, actual: Path) -> None:
        found, now_ms = set(lines_of(actual, copied)), copied.read_ended_ms
        self.required: Counter[tuple[int, str]] = Counter()
        self.found: Counter[tuple[int, str]] = Counter()
        self.gone: Counter[tuple[int, str]] = Counter()
        self.missing: Counter[tuple[int, str]] = Counter()
        self.first_missing: dict[tuple[int, str], int] = {}
        for line in lines_of(expected, required):
            database, expires, what = _parsed(line)
            if line in found:
                found.discard(line)
                self.required[database, what] += 1
                self.found[database, what] += 1
            elif expires > now_ms:
                self.required[database, what] += 1
                self.missing[database, what] += 1
                first = self.first_missing.setdefault((database, what), expires)
                self.first_missing[database, what] = min(first, expires)
            else:
                self.gone[database, what] += 1
        self.strange = Counter((_parsed(line)[0], _parsed(line)[2]) for line in found)


def compare(expected: RedisContent, expiring: Path, actual: RedisContent, actual_expiring: Path) -> RedisComparison:
    """Compare a copy's content with a backup's manifest and its list `expiring`.

    An expiring key is required if it had not expired at the end of the reading, and must be missing if it had expired
    before. A key that is only in the copy is a difference too.
    """
    lines = _Expiring(expected, expiring, actual, actual_expiring)
    numbers = sorted({*expected.databases, *actual.databases, *(key[0] for key in lines.strange)})
    differences: list[str] = []
    proofs = []
    for number in numbers:
        before, after = expected.databases.get(number, EMPTY), actual.databases.get(number, EMPTY)
        equal = before.persistent_digest == after.persistent_digest
        differences += _persistent(number, before, after)
        differences += _expiring(number, lines)
        where = (number, "key")
        proofs.append(
            ContentProof(
                number,
                before.persistent_keys,
                after.persistent_keys,
                equal,
                lines.required[where],
                lines.found[where],
                lines.gone[where],
            )
        )
    differences += _sidecar_whole(expected, lines)
    differences += _functions(expected, actual)
    return RedisComparison(tuple(differences), tuple(proofs))


def _persistent(number: int, before: RedisDatabaseContent, after: RedisDatabaseContent) -> list[str]:
    if before.persistent_keys != after.persistent_keys:
        return [
            f"database {number} has {after.persistent_keys:,} keys without a TTL instead of {before.persistent_keys:,}"
            + _prefixes(before, after)
        ]
    if before.persistent_digest != after.persistent_digest:
        return [f"database {number}: its {before.persistent_keys:,} keys without a TTL have other content"]
    return []


def _prefixes(before: RedisDatabaseContent, after: RedisDatabaseContent) -> str:
    less = {name: count - after.prefixes.get(name, 0) for name, count in before.prefixes.items()}
    worst = sorted((name for name in less if less[name] > 0), key=lambda name: -less[name])[:3]
    return f" (fewest: {', '.join(f'{name or chr(8230)} −{less[name]:,}' for name in worst)})" if worst else ""


def _expiring(number: int, lines: _Expiring) -> list[str]:
    sentences = []
    for what in ("key", "field"):
        where = (number, what)
        if missing := lines.missing[where]:
            first = datetime.fromtimestamp(lines.first_missing[where] / 1000, UTC)
            sentences.append(
                f"database {number}: {missing:,} of {lines.required[where]:,} {what}s with a TTL are missing or "
                f"differ; the first of them expires at {clock.text(first)}"
            )
        if strange := lines.strange[where]:
            sentences.append(f"database {number}: {strange:,} {what}s with a TTL are not in the backup")
    return sentences


def _sidecar_whole(expected: RedisContent, lines: _Expiring) -> list[str]:
    """The list of expiring keys must have as many lines as in the manifest: an empty one would require nothing."""
    wrong = []
    for number, database in expected.databases.items():
        for what, listed in (("key", database.expiring_keys), ("field", database.expiring_fields)):
            count = lines.required[number, what] + lines.gone[number, what]
            if count != listed:
                wrong.append(f"{EXPIRING} has {count:,} {what}s of database {number}, the manifest has {listed:,}")
    return wrong


def _functions(expected: RedisContent, actual: RedisContent) -> list[str]:
    names = sorted({*expected.functions, *actual.functions})
    changed = [name for name in names if expected.functions.get(name) != actual.functions.get(name)]
    return [f"function libraries differ: {', '.join(changed)}"] if changed else []


def lines_of(sidecar: Path, content: RedisContent) -> Iterator[bytes]:
    """The lines of the list of expiring keys of that content."""
    count = sum(one.expiring_keys + one.expiring_fields for one in content.databases.values())
    with codec.readable(sidecar.name, OTHER_BACKUPS), codec.reader(sidecar, (count + 1) * _LINE_BYTES) as file:
        yield from io.BufferedReader(cast(io.RawIOBase, file), codec.CHUNK_BYTES)  # twice as fast as the stream itself


def expiring_in(backup: Path) -> Path:
    """The list of expiring keys in a backup's directory."""
    old = backup / OLD_EXPIRING
    return old if old.exists() else backup / EXPIRING


def _parsed(line: bytes) -> tuple[int, int, str]:
    database, expires, _, what = line.rstrip(b"\n").split(b"\t")
    return int(database), int(expires), what.decode()
