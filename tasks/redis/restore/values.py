"""Compare one key of two servers in small parts: for values too large for one call on a server in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from runbook.errors import VerificationFailed
from tasks.redis.line import RedisLine

PIECE_BYTES = 1 << 18
MOST_ITEMS = 2000


def same_value(first: RedisLine, second: RedisLine, database: int, key: bytes, volatile: bool) -> bool:
    """Whether type, expiry and content are equal; `volatile`: fields of hashes can expire.

    Raises:
        VerificationFailed: the type cannot be read in parts.
    """
    asked = [("TYPE", key), ("PEXPIRETIME", key), ("MEMORY", "USAGE", key)]
    kind, expires, size = first.pipe(database, asked, together=True)
    if [kind, expires] != second.pipe(database, asked[:2], together=True):
        return False
    compare = _COMPARED.get(kind)
    if compare is None:
        raise VerificationFailed(f"a {kind.decode()} cannot be compared", "a module's data needs its own backup")
    return compare(_Pair(first, second, database, key, int(size or 0), volatile))


class _Pair:
    """The same key of two servers."""

    def __init__(
        self, first: RedisLine, second: RedisLine, database: int, key: bytes, size: int, volatile: bool
    ) -> None:
        self.sides, self.database, self.key, self.volatile = (first, second), database, key, volatile
        self.size = size

    def both(self, *words: object) -> tuple[Any, Any]:
        first, second = (side.call(self.database, *words) for side in self.sides)
        return first, second

    def same(self, *words: object) -> bool:
        first, second = self.both(*words)
        return bool(first == second)

    def items(self, length: int) -> int:
        """How many members are read at once."""
        return max(1, min(MOST_ITEMS, length * PIECE_BYTES // max(self.size, 1)))

    def pages(self, scan: str, pieces: int) -> Iterator[list[bytes]]:
        """The first server's members (and values), page by page."""
        cursor = b"0"
        while True:
            cursor, page = self.sides[0].call(self.database, scan, self.key, cursor, "COUNT", pieces)
            yield page
            if cursor == b"0":
                return


def _string(pair: _Pair) -> bool:
    length, other = pair.both("STRLEN", pair.key)
    return length == other and all(
        pair.same("GETRANGE", pair.key, start, start + PIECE_BYTES - 1) for start in range(0, length, PIECE_BYTES)
    )


def _list(pair: _Pair) -> bool:
    length, other = pair.both("LLEN", pair.key)
    step = pair.items(length)
    return length == other and all(
        pair.same("LRANGE", pair.key, start, start + step - 1) for start in range(0, length, step)
    )


def _sorted_set(pair: _Pair) -> bool:
    length, other = pair.both("ZCARD", pair.key)
    step = pair.items(length)
    return length == other and all(
        pair.same("ZRANGE", pair.key, start, start + step - 1, "WITHSCORES") for start in range(0, length, step)
    )


def _set(pair: _Pair) -> bool:
    length, other = pair.both("SCARD", pair.key)
    pages = pair.pages("SSCAN", pair.items(length))
    second = pair.sides[1]
    return length == other and all(
        all(second.call(pair.database, "SMISMEMBER", pair.key, *page)) for page in pages if page
    )


def _hash(pair: _Pair) -> bool:
    length, other = pair.both("HLEN", pair.key)
    if length != other:
        return False
    second = pair.sides[1]
    for page in pair.pages("HSCAN", pair.items(length)):
        names, values = page[::2], page[1::2]
        if names and second.call(pair.database, "HMGET", pair.key, *names) != values:
            return False
        if names and pair.volatile and not pair.same("HPEXPIRETIME", pair.key, "FIELDS", len(names), *names):
            return False
    return True


def _stream(pair: _Pair) -> bool:
    (length, other), start = pair.both("XLEN", pair.key), b"-"
    step = pair.items(length)
    if length != other or not _same_facts(pair, "STREAM", _STREAM_FACTS) or not _same_groups(pair):
        return False
    while True:
        first, second = pair.both("XRANGE", pair.key, start, "+", "COUNT", step)
        if first != second:
            return False
        if len(first) < step:
            return True
        start = b"(" + first[-1][0]


_STREAM_FACTS = (b"last-generated-id", b"max-deleted-entry-id", b"entries-added")
_GROUP_FACTS = (b"name", b"consumers", b"pending", b"last-delivered-id", b"entries-read")


def _same_facts(pair: _Pair, what: str, names: tuple[bytes, ...]) -> bool:
    found = [_named(answer) for answer in pair.both("XINFO", what, pair.key)]
    return all(found[0].get(name) == found[1].get(name) for name in names)


def _same_groups(pair: _Pair) -> bool:
    first, second = ([_named(group) for group in groups] for groups in pair.both("XINFO", "GROUPS", pair.key))
    facts = [[[group.get(name) for name in _GROUP_FACTS] for group in groups] for groups in (first, second)]
    return facts[0] == facts[1] and all(_same_pending(pair, group[b"name"]) for group in first)


def _same_pending(pair: _Pair, group: bytes) -> bool:
    """Pending entries: consumer and deliveries, without idle times."""
    start = b"-"
    while True:
        first, second = (
            [(entry, consumer, times) for entry, consumer, _, times in answer]
            for answer in pair.both("XPENDING", pair.key, group, start, "+", MOST_ITEMS)
        )
        if first != second:
            return False
        if len(first) < MOST_ITEMS:
            return True
        start = b"(" + first[-1][0]


def _named(pairs: list[Any]) -> dict[bytes, Any]:
    return dict(zip(pairs[::2], pairs[1::2], strict=True))


_COMPARED: dict[bytes, Callable[[_Pair], bool]] = {
    b"string": _string,
    b"list": _list,
    b"zset": _sorted_set,
    b"set": _set,
    b"hash": _hash,
    b"stream": _stream,
    b"none": lambda _pair: True,
}
