"""Read a scratch server's whole content, page by page, while its data cannot change."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import redis

from runbook.errors import VerificationFailed
from runbook.log import logger
from tasks.backups import codec
from tasks.redis.content.manifest import RedisContent, RedisDatabaseContent
from tasks.redis.content.script import DROP_PAGE, READ_PAGE
from tasks.redis.server import call, key_counts, loaded_keys, version_of

PAGE_KEYS = 2000
MOST_PREFIXES = 50
PROGRESS_SECONDS = 5.0
HOLD_MILLISECONDS = 24 * 3600 * 1000
LANE_BITS = 32


@contextlib.contextmanager
def held_still(client: redis.Redis) -> Iterator[None]:
    """No key is written, expired or moved, so that SCAN returns every key exactly once.

    CLIENT PAUSE WRITE stops expiry too (https://valkey.io/commands/client-pause/); a table that shrinks would repeat
    keys. A pause permits EVAL_RO.
    """
    call(client, "DEBUG", "DICT-RESIZING", "0")
    call(client, "CLIENT", "PAUSE", HOLD_MILLISECONDS, "WRITE")
    try:
        yield
    finally:
        with contextlib.suppress(redis.RedisError):
            call(client, "CLIENT", "UNPAUSE")
            call(client, "DEBUG", "DICT-RESIZING", "1")


def read_content(client: redis.Redis, sidecar: Path) -> RedisContent:
    """A scratch server's content; its expiring keys are written to `sidecar` (zstd, a line each).

    Raises:
        VerificationFailed: a type cannot be compared (a module's), or the data changed meanwhile.
    """
    began = time.time_ns() // 1_000_000
    databases = {}
    with codec.writer(sidecar) as out, held_still(client):
        volatile = volatile_databases(client)
        for number, (keys, expires) in sorted(key_counts(client).items()):
            databases[number] = _read_database(client, number, number in volatile, keys, expires, out)
        functions = _functions(client)
    return RedisContent(
        server_version=version_of(client),
        databases={number: found for number, found in databases.items() if found.all_keys},
        functions=functions,
        rdb_keys=loaded_keys(client),
        memory_bytes=int(client.info("memory")["used_memory"]),
        read_began_ms=began,
        read_ended_ms=time.time_ns() // 1_000_000,
    )


@dataclass
class _Sums:
    untimed: int = 0
    persistent: int = 0
    live: int = 0
    expiring: int = 0
    fields: int = 0
    digest: int = 0
    prefixes: Counter[bytes] = field(default_factory=Counter)

    def add(self, page: Sequence[Any]) -> None:
        """One page's answer (see READ_PAGE's last line)."""
        _, untimed, persistent, live, lanes, lines, counted, _ = page
        self.untimed += untimed
        self.persistent += persistent
        self.live += live
        self.expiring += lines.count(b"\tkey\n")
        self.fields += lines.count(b"\tfield\n")
        for place, lane in enumerate(reversed(lanes)):
            # A page sums lanes separately, because a Lua number is exact to 2**53 only; the carry is added here.
            self.digest += lane << (LANE_BITS * place)
        for prefix, number in zip(counted[::2], counted[1::2], strict=True):
            self.prefixes[prefix] += number

    def content(self) -> RedisDatabaseContent:
        """The database's content for the manifest."""
        biggest = self.prefixes.most_common(MOST_PREFIXES)
        return RedisDatabaseContent(
            all_keys=self.live,
            persistent_keys=self.persistent,
            persistent_digest=f"{self.digest % 2**128:032x}",
            expiring_keys=self.expiring,
            expiring_fields=self.fields,
            prefixes={shown(name): number for name, number in biggest},
        )


def shown(name: bytes) -> str:
    text = name.decode(errors="backslashreplace")
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)


def _read_database(
    client: redis.Redis, number: int, volatile: bool, keys: int, expires: int, out: IO[bytes]
) -> RedisDatabaseContent:
    sums, cursor, reported = _Sums(), b"0", time.monotonic()
    while True:
        page = call(client, "EVAL_RO", READ_PAGE, 0, number, cursor, PAGE_KEYS, int(volatile))
        if page[7]:
            names = ", ".join(name.decode(errors="backslashreplace") for name in page[7])
            raise VerificationFailed(
                f"database {number} has types that cannot be verified: {names}",
                "a module's data needs its own backup: remove it, or keep it in another server",
            )
        sums.add(page)
        out.write(page[5])
        cursor = page[0]
        if cursor == b"0":
            break
        if time.monotonic() - reported > PROGRESS_SECONDS:
            reported = time.monotonic()
            logger().info("database %d: %d of %d keys read", number, sums.live, keys)
    if sums.untimed != keys - expires:
        raise VerificationFailed(
            f"database {number} changed while it was read: {sums.untimed} of {keys - expires} lasting keys were read",
            "run it again",
        )
    return sums.content()


def drop_prefixes(client: redis.Redis, prefixes: Sequence[str]) -> dict[str, int]:
    """UNLINK every key that begins with one of `prefixes`, in all databases; returns how many of each."""
    dropped = dict.fromkeys(prefixes, 0)
    if not prefixes:
        return dropped
    for number in key_counts(client):
        cursor = b"0"
        while True:
            cursor, counts = call(client, "EVAL", DROP_PAGE, 0, number, cursor, PAGE_KEYS, *prefixes)
            for prefix, count in zip(prefixes, counts, strict=True):
                dropped[prefix] += count
            if cursor == b"0":
                break
    return dropped


def volatile_databases(client: redis.Redis) -> set[int]:
    """Databases with fields that expire (Valkey 9: keys_with_volatile_items; Redis 7.4: subexpiry)."""
    found = set()
    for name, counts in client.info("keyspace").items():
        if int(counts.get("keys_with_volatile_items", counts.get("subexpiry", 0))):
            found.add(int(name.removeprefix("db")))
    return found


def _functions(client: redis.Redis) -> dict[str, str]:
    """Function libraries by name: their code's SHA-256."""
    found = {}
    for entry in call(client, "FUNCTION", "LIST", "WITHCODE"):
        pairs = entry if isinstance(entry, dict) else dict(zip(entry[::2], entry[1::2], strict=True))
        found[pairs[b"library_name"].decode()] = hashlib.sha256(pairs[b"library_code"]).hexdigest()
    return found
