"""One page of a clearing: SCAN, the comparison with the prefixes, and UNLINK, in one script.

Nothing comes between the check of a key and its deletion. Keys that are only counted never leave the server.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field

import redis

from tasks.redis.cache.selection import KeySelection
from tasks.redis.script import as_command, evaluate

# Few words in each direction: parsing them costs more than the keys cost the server. The answer: the cursor; keys left
# out because of their TTL, the server's µs (-1: unknown), keys chosen so far (for the stride), whether keys can be
# measured, how many groups and guards follow; groups (name; keys, measured keys, their bytes, those without TTL);
# guards (name; keys left out); names; the error of an UNLINK, if one was refused. A script is not rolled back: keys
# that were unlinked before that error are counted.
PAGE = r"""
local began = os and os.clock and os.clock()
local function numbers(text)
  local found = {}
  for number in string.gmatch(text, '%d+') do found[#found + 1] = tonumber(number) end
  return unpack(found)
end
local step, seen, want = numbers(ARGV[2])
local stride, unlink, untimed_only, by_colon = numbers(ARGV[4])
unlink, untimed_only, by_colon = unlink == 1, untimed_only == 1, by_colon == 1
local sub, call = string.sub, redis.call
local terms, at = {}, 5
while ARGV[at] do
  local guards = {}
  for i = 1, tonumber(ARGV[at + 1]) do guards[i] = ARGV[at + 1 + i] end
  terms[#terms + 1] = {prefix = ARGV[at], guards = guards}
  at = at + 2 + #guards
end
local page = call('SCAN', ARGV[1], 'MATCH', ARGV[3], 'COUNT', step)
local keys, guarded, timed, measurable = page[2], {}, 0, 1
local groups, order, names = {}, {}, {}

local function starts(key, prefix) return sub(key, 1, #prefix) == prefix end
local function term_of(key)
  for _, term in ipairs(terms) do
    if starts(key, term.prefix) then
      for _, guard in ipairs(term.guards) do
        if starts(key, guard) then
          guarded[guard] = (guarded[guard] or 0) + 1
          return nil
        end
      end
      return term
    end
  end
end
local function group_of(name)
  local group = groups[name]
  if not group then
    group = {name = name, keys = {}, n = 0, measured = 0, bytes = 0, untimed = 0}
    groups[name], order[#order + 1] = group, group
  end
  return group
end
local function measure(group, key)
  local size, left = redis.pcall('MEMORY', 'USAGE', key), redis.pcall('PTTL', key)
  if type(size) == 'table' or type(left) == 'table' then  -- the ACL forbids it
    measurable = 0
    return
  end
  group.measured, group.bytes = group.measured + 1, group.bytes + (size or 0)
  if left == -1 then group.untimed = group.untimed + 1 end
end
local function wanted(key)
  if not untimed_only then return true end
  local left = call('PTTL', key)
  if left > -1 then timed = timed + 1 end
  return left == -1
end

if #terms == 1 and #terms[1].guards == 0 and not untimed_only and not by_colon and #keys > 0 then
  local group = group_of(terms[1].prefix)  -- SCAN has chosen them all
  group.keys = keys
  for i = 1, #keys, stride do measure(group, keys[i]) end
else
  for _, key in ipairs(keys) do
    local term = term_of(key)
    if term and wanted(key) then
      local colon = by_colon and string.find(sub(key, 1, 64), ':', 1, true)
      local group = group_of(by_colon and sub(key, 1, colon or 0) or term.prefix)
      group.keys[#group.keys + 1] = key
      if seen % stride == 0 or group.measured == 0 then measure(group, key) end
      seen = seen + 1
    end
  end
end
local out, guards, format, refused = {page[1], ''}, 0, string.format, nil
for _, group in ipairs(order) do
  local found = group.keys
  for i = 1, math.min(want - #names, #found) do names[#names + 1] = found[i] end
  if not unlink then group.n = #found end
  for i = 1, unlink and not refused and #found or 0, 1000 do
    local unlinked = redis.pcall('UNLINK', unpack(found, i, math.min(i + 999, #found)))
    if type(unlinked) == 'table' then
      refused = unlinked
      break
    end
    group.n = group.n + unlinked
  end
  out[#out + 1] = group.name
  out[#out + 1] = format('%d %d %.0f %d', group.n, group.measured, group.bytes, group.untimed)
end
for guard, count in pairs(guarded) do
  guards = guards + 1
  out[#out + 1], out[#out + 2] = guard, format('%d', count)
end
for _, name in ipairs(names) do out[#out + 1] = name end
local took = began and (os.clock() - began) * 1000000 or -1
out[2] = format('%d %.0f %d %d %d %d', timed, took, seen, measurable, #order, guards)
if refused then out[#out + 1] = refused end
return out
"""


@dataclass
class PrefixGroup:
    """Keys of one prefix. Bytes and TTL are known for `measured` of them."""

    keys: int = 0
    measured: int = 0
    bytes: int = 0
    without_ttl: int = 0

    def add(self, other: PrefixGroup) -> None:
        """The same prefix on another page."""
        self.keys += other.keys
        self.measured += other.measured
        self.bytes += other.bytes
        self.without_ttl += other.without_ttl


@dataclass
class SweepPage:
    """What one call counted or unlinked, by prefix, and SCAN's next cursor. `with_ttl` keys were left out. `error`: a
    refusal; keys unlinked before it are counted."""

    cursor: bytes
    seconds: float
    seen: int
    with_ttl: int
    measurable: bool
    groups: dict[bytes, PrefixGroup] = field(default_factory=dict)
    protected: Counter[bytes] = field(default_factory=Counter)
    names: list[bytes] = field(default_factory=list)
    error: redis.RedisError | None = None


@dataclass(frozen=True)
class SweepRequest:
    """What all pages of a sweep have in common: one key in `stride` is measured."""

    selection: KeySelection
    unlink: bool
    stride: int

    @functools.cached_property
    def words(self) -> tuple[bytes, ...]:
        """The script's arguments that do not change."""
        wanted = self.selection
        flags = b"%d %d %d %d" % (self.stride, self.unlink, wanted.without_ttl, wanted.by_colon)
        return (wanted.match, flags, *wanted.words())


def read_page(client: redis.Redis, request: SweepRequest, cursor: bytes, step: int, seen: int, names: int) -> SweepPage:
    """Count or unlink one page. `seen` is the value of the page before; at most `names` keys are named."""
    words = (cursor, b"%d %d %d" % (step, seen, names), *request.words)
    found = evaluate(client, PAGE, *words, command="SCAN or PTTL")
    with_ttl, microseconds, seen, measurable, groups, guards = map(int, found[1].split())
    page = SweepPage(found[0], max(microseconds, 0) / 1e6, seen, with_ttl, bool(measurable))
    after_groups = 2 + 2 * groups
    after_guards = after_groups + 2 * guards
    for place in range(2, after_groups, 2):
        page.groups[found[place]] = PrefixGroup(*map(int, found[place + 1].split()))
    for place in range(after_groups, after_guards, 2):
        page.protected[found[place]] = int(found[place + 1])
    if len(found) > after_guards and isinstance(found[-1], redis.ResponseError):
        page.error = as_command(found.pop(), "UNLINK")
    page.names = found[after_guards:]
    return page
