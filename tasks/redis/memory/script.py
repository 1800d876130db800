"""One page of keys, summed by prefix, and the script that sums it in the server.

It is read-only (EVAL_RO). MEMORY USAGE (with its default of 5 samples), TYPE and PTTL touch no key's idle time or
frequency (https://valkey.io/commands/memory-usage/).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

TYPES = ("string", "list", "set", "zset", "hash", "stream", "other")
TTL_NAMES = ("no expiry", "< 1 min", "< 1 h", "< 1 day", "< 7 days", "≥ 7 days")
TTL_LIMITS_MS = (60_000, 3_600_000, 86_400_000, 604_800_000)
MOST_PREFIX_BYTES = 64
# What is summed for each prefix: keys by type, bytes by type, keys by TTL, bytes without expiry.
KEYS, BYTES = slice(0, 7), slice(7, 14)
TTLS, WITHOUT_TTL, BYTES_WITHOUT_TTL = slice(14, 20), 14, 20
WIDTH = 21

# TYPE costs a call for each key. SCAN's own filter tells the keys of the most common type for a third of that, in the
# order of the page.
PAGE = r"""
local began, call, try, match, sub = os.clock(), redis.call, redis.pcall, string.match, string.sub
local db, cursor, count, common, hits_floor, rest = match(ARGV[1], '^(%S+) (%S+) (%S+) (%S+) (%S+) (.+)$')
local parted, hottest, floors = ARGV[2], tonumber(hits_floor), {}
for floor in string.gmatch(rest, '%S+') do floors[#floors + 1] = tonumber(floor) end
local index = {string = 1, list = 2, set = 3, zset = 4, hash = 5, stream = 6}
call('SELECT', db)
local page = call('SCAN', cursor, 'COUNT', count)
local typed, at, common_kind = {}, 1, index[common]
if common_kind then typed = call('SCAN', cursor, 'COUNT', count, 'TYPE', common)[2] end
local keys, groups, names, big, hot, gone, denied = page[2], {}, {}, {}, {}, 0, 0
for i = 1, #keys do
  local key = keys[i]
  local kind
  if key == typed[at] then kind, at = common_kind, at + 1 end
  local bytes = try('MEMORY', 'USAGE', key)
  if not bytes then gone = gone + 1
  elseif type(bytes) == 'table' then denied = denied + 1
  else
    kind = kind or index[call('TYPE', key).ok] or 7
    local ttl, prefix = call('PTTL', key), match(key, '^[^:]*:') or ''
    if prefix == parted and prefix ~= '' then prefix = match(key, '^[^:]*:[^:]*:') or prefix end
    if #prefix > 64 then prefix = sub(prefix, 1, 64) end
    local group = groups[prefix]
    if not group then
      group = {0,0,0,0,0,0,0, 0,0,0,0,0,0,0, 0,0,0,0,0,0, 0}
      groups[prefix] = group
      names[#names + 1] = prefix
    end
    group[kind] = group[kind] + 1
    group[7 + kind] = group[7 + kind] + bytes
    local bucket = 15
    if ttl < 0 then group[21] = group[21] + bytes
    elseif ttl < 60000 then bucket = 16
    elseif ttl < 3600000 then bucket = 17
    elseif ttl < 86400000 then bucket = 18
    elseif ttl < 604800000 then bucket = 19
    else bucket = 20 end
    group[bucket] = group[bucket] + 1
    if bytes > floors[kind] then
      local last = #big
      big[last + 1], big[last + 2], big[last + 3], big[last + 4] = key, bytes, kind, ttl
    end
    if hottest >= 0 then
      local hits = try('OBJECT', 'FREQ', key)
      if type(hits) == 'number' and hits > hottest then hot[#hot + 1] = key; hot[#hot + 1] = hits end
    end
  end
end
local sums = {}
for i = 1, #names do sums[i] = table.concat(groups[names[i]], ' ') end
local worked = math.floor((os.clock() - began) * 1000000)
local head = table.concat({#keys - gone - denied, gone, denied, worked}, ' ')
return {page[1], head, names, table.concat(sums, ' '), big, hot}
"""
SHA = hashlib.sha1(PAGE.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Request:
    """What is asked of one page. `parted` is a prefix that is to be split at its second colon, `common` the type that
    most keys have; a key is told by name where it has more bytes than `floors` says for its type, or more hits than
    `hottest` (-1: hits are not counted)."""

    database: int
    cursor: bytes
    count: int
    parted: bytes = b""
    common: str = "-"
    floors: tuple[int, ...] = (-1,) * len(TYPES)
    hottest: int = -1

    @property
    def numbers(self) -> str:
        """The script's first argument (few words are packed sooner than many); `parted` is its second."""
        floors = " ".join(map(str, self.floors))
        return f"{self.database} {self.cursor.decode()} {self.count} {self.common} {self.hottest} {floors}"


@dataclass(frozen=True)
class KeyFacts:
    """One key. `size` is in bytes; `type` is a place in TYPES; `ttl_ms` -1 is no expiry."""

    key: bytes
    size: int
    type: int
    ttl_ms: int


@dataclass(frozen=True)
class Page:
    """A page's answer. `gone` expired or were deleted in between; `denied` are keys that the user may not read.
    `worked_seconds` is the processor time that the server took for it, 0 where it cannot be told. `sums` are WIDTH
    numbers for each of `names`, not yet parsed: the server need not wait for that."""

    cursor: bytes
    read: int
    gone: int
    denied: int
    worked_seconds: float
    names: Sequence[bytes]
    sums: bytes
    biggest: Sequence[KeyFacts]
    hot: Sequence[tuple[int, bytes]]

    def groups(self) -> Iterator[tuple[bytes, list[int]]]:
        """Each prefix with its numbers."""
        numbers = list(map(int, self.sums.split()))
        return zip(self.names, (numbers[at : at + WIDTH] for at in range(0, len(numbers), WIDTH)), strict=True)


def first_level(name: bytes) -> bytes:
    """A group's prefix: up to its first colon."""
    colon = name.find(b":") + 1
    return name[: min(colon, MOST_PREFIX_BYTES)] if colon else name


def prefix_of(key: bytes, parted: bytes = b"") -> bytes:
    """A key's group, as the script makes it: to its first colon, of the prefix `parted` to its second."""
    colon = key.find(b":") + 1
    prefix = key[: min(colon, MOST_PREFIX_BYTES)]
    if prefix and prefix == parted and (second := key.find(b":", colon) + 1):
        return key[: min(second, MOST_PREFIX_BYTES)]
    return prefix


def parsed(answer: Sequence[Any]) -> Page:
    """The script's answer."""
    cursor, head, names, sums, big, hot = answer
    read, gone, denied, worked = map(int, head.split())
    hits = tuple(zip(hot[1::2], hot[::2], strict=True))
    return Page(cursor, read, gone, denied, worked / 1e6, names, sums, tuple(_named(big)), hits)


def _named(big: Sequence[Any]) -> Iterator[KeyFacts]:
    for key, size, kind, ttl in zip(big[::4], big[1::4], big[2::4], big[3::4], strict=True):
        yield KeyFacts(key, size, kind - 1, ttl)
