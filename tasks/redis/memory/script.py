"""One page of a survey: keys summed by prefix in the server, by a read-only script.

MEMORY USAGE (with its default of 5 samples), TYPE and PTTL change no key's idle time or frequency
(https://valkey.io/commands/memory-usage/).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from tasks.redis.script import evaluate
from tasks.redis.server import call

TYPES = ("string", "list", "set", "zset", "hash", "stream", "other")
TTL_NAMES = ("no expiry", "< 1 min", "< 1 h", "< 1 day", "< 7 days", "≥ 7 days")
MOST_PREFIX_BYTES = 64
# The sums of each prefix: keys by type, bytes by type, keys by TTL, bytes without expiry.
KEYS, BYTES = slice(0, 7), slice(7, 14)
TTLS, WITHOUT_TTL, BYTES_WITHOUT_TTL = slice(14, 20), 14, 20
WIDTH = 21

PAGE = r"""
local began, call, try, match, sub = os.clock(), redis.call, redis.pcall, string.match, string.sub
local db, cursor, count, rest = match(ARGV[1], '^(%S+) (%S+) (%S+) (.+)$')
local floors = {}
for floor in string.gmatch(rest, '%S+') do floors[#floors + 1] = tonumber(floor) end
local index = {string = 1, list = 2, set = 3, zset = 4, hash = 5, stream = 6}
call('SELECT', db)
local page = call('SCAN', cursor, 'COUNT', count)
local keys, groups, names, big, missing, denied = page[2], {}, {}, {}, 0, 0
for i = 1, #keys do
  local key = keys[i]
  local bytes = try('MEMORY', 'USAGE', key)
  if not bytes then missing = missing + 1
  elseif type(bytes) == 'table' then denied = denied + 1
  else
    local kind, ttl = index[call('TYPE', key).ok] or 7, call('PTTL', key)
    local prefix = sub(match(key, '^[^:]*:') or '', 1, 64)
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
  end
end
local sums = {}
for i = 1, #names do sums[i] = table.concat(groups[names[i]], ' ') end
local worked = math.floor((os.clock() - began) * 1000000)
local head = table.concat({#keys - missing - denied, missing, denied, worked}, ' ')
return {page[1], head, names, table.concat(sums, ' '), big}
"""


@dataclass(frozen=True)
class KeyFacts:
    """One key. `size` in bytes; `type` is an index of TYPES; `ttl_ms` -1: no expiry."""

    key: bytes
    size: int
    type: int
    ttl_ms: int


@dataclass(frozen=True)
class SurveyPage:
    """A page's answer. `missing` keys expired or were deleted meanwhile; `denied` keys are forbidden to the user.
    `worked_seconds`: the server's processor time. `groups`: WIDTH numbers for each prefix."""

    cursor: bytes
    read: int
    missing: int
    denied: int
    worked_seconds: float
    groups: dict[bytes, list[int]]
    biggest: Sequence[KeyFacts]


def require_commands(client: redis.Redis) -> None:
    """The user may read keys' sizes, types and TTLs. Inside a script, a forbidden command looks like a forbidden key.

    Raises:
        redis.NoPermissionError: a command is forbidden; it is named.
    """
    for words in (("SELECT", 0), ("SCAN", 0, "COUNT", 1), ("MEMORY", "USAGE", ""), ("TYPE", ""), ("PTTL", "")):
        try:
            call(client, *words)
        except redis.exceptions.NoPermissionError as error:
            if "to run the" in str(error):  # otherwise only that key is forbidden
                raise


def read_page(client: redis.Redis, database: int, cursor: bytes, count: int, floors: Sequence[int]) -> SurveyPage:
    """The next page of a database, about `count` keys. A key larger than `floors` of its type is returned by name."""
    words = f"{database} {cursor.decode()} {count} {' '.join(map(str, floors))}"
    cursor, head, names, sums, big = evaluate(client, PAGE, words, command="SCAN", read_only=True)
    read, missing, denied, worked = map(int, head.split())
    numbers = list(map(int, sums.split()))
    groups = {name: numbers[at * WIDTH : (at + 1) * WIDTH] for at, name in enumerate(names)}
    return SurveyPage(cursor, read, missing, denied, worked / 1e6, groups, tuple(_named(big)))


def prefix_of(key: bytes) -> bytes:
    """A key's prefix, as the script computes it: up to its first colon."""
    return key[: min(key.find(b":") + 1, MOST_PREFIX_BYTES)]


def _named(big: Sequence[Any]) -> Iterator[KeyFacts]:
    for key, size, kind, ttl in zip(big[::4], big[1::4], big[2::4], big[3::4], strict=True):
        yield KeyFacts(key, size, kind - 1, ttl)
