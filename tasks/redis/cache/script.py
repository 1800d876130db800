"""Lua of a clearing (https://valkey.io/commands/eval/): one step of SCAN, the check and UNLINK in one call, so that
nothing comes between."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from typing import Any, Literal, get_args

import redis

from tasks.redis.server import call

Scripts = Literal["", "EVAL", "EVALSHA"]

# Few words there and back: reading them costs a client more than the keys cost the server. A page: the cursor; keys
# left out for their TTL, µs of the server (-1: it cannot tell), how many were chosen so far (for the stride), whether
# keys can be measured, how many groups and guards follow; groups (name; keys, measured ones, their bytes, those without
# TTL); guards (name; keys left out); names; at last the error of an UNLINK, where one was refused. What was unlinked
# before it stays so (a script is not rolled back), and is counted.
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
    local gone = redis.pcall('UNLINK', unpack(found, i, math.min(i + 999, #found)))
    if type(gone) == 'table' then
      refused = gone
      break
    end
    group.n = group.n + gone
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

# Flush only while the number of keys is the one that was confirmed, of the very server: {1: done, 0: not, -1: it was
# restarted, or is no master; keys}.
FLUSH = r"""
local function says(section, line) return string.find(redis.call('INFO', section), line, 1, true) end
if not says('server', 'run_id:' .. ARGV[4]) or not says('replication', 'role:master') then return {-1, 0} end
local keys = 0
if ARGV[1] == 'FLUSHALL' then
  for count in string.gmatch(redis.call('INFO', 'keyspace'), 'db%d+:keys=(%d+)') do keys = keys + count end
else
  keys = redis.call('DBSIZE')
end
if keys < tonumber(ARGV[2]) or keys > tonumber(ARGV[3]) then return {0, keys} end
redis.call(ARGV[1], 'ASYNC')
return {1, keys}
"""


def evaluated(client: redis.Redis, scripts: Scripts, script: str, *words: object, named: str) -> Any:
    """A script's answer; `named` are the commands in it that may be unknown to the server."""
    try:
        if scripts == "EVALSHA":
            with contextlib.suppress(redis.exceptions.NoScriptError):  # by now the server may be another
                return call(client, "EVALSHA", _sha(script), 0, *words)
        return call(client, "EVAL", script, 0, *words)
    except redis.ResponseError as error:
        raise alone(error, named) from None


def alone(error: redis.ResponseError, named: str) -> redis.ResponseError:
    """What was refused inside of a script, as if that command had been given alone: `named` where the ACL did not."""
    if str(error).startswith("ACL failure"):
        return redis.exceptions.NoPermissionError(str(error))
    if re.match(r"Unknown (Redis )?command called from script", str(error)):
        return redis.ResponseError(f"unknown command '{named}'")
    return error


def scripts_of(client: redis.Redis) -> Scripts:
    """How this user may call scripts: by their hash, which spares the server the text, or not at all."""
    script = "return 1"
    best: Scripts = ""
    for way in get_args(Scripts)[1:]:
        try:
            call(client, way, script if way == "EVAL" else _sha(script), 0)
        except redis.ResponseError:  # forbidden to this user, or renamed away
            return best
        best = way
    return best


@functools.cache
def _sha(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
