"""Lua that hashes keys' logical content: whole pages of a scratch server, or named keys.

DUMP's bytes are not canonical (the same set has several encodings), so members are sorted, every part is written with
its length before it (binary-safe), and physical facts (encodings, radix trees, idle times) are left out. Within a
script the time does not change, so that a key cannot expire between two calls.
"""

VALUES = r"""
local concat, sort, format = table.concat, table.sort, string.format

local function part(s) return #s .. ':' .. s end
local function digest(out) return string.sub(redis.sha1hex(concat(out, ' ')), 1, 32) end
local function add(out, items) for i = 1, #items do out[#out + 1] = part(items[i]) end end
local function whole(number) return format('%.0f', number) end

local function walk(out, value)
  if type(value) == 'table' then
    out[#out + 1] = '*' .. #value
    for i = 1, #value do walk(out, value[i]) end
  elseif type(value) == 'number' then out[#out + 1] = whole(value)
  elseif type(value) == 'string' then out[#out + 1] = part(value)
  else out[#out + 1] = '-' end
end
local function named(list)
  local map = {}
  for i = 1, #list, 2 do map[list[i]] = list[i + 1] end
  return map
end

local lines = {}
local function line(at, out, kind)
  lines[#lines + 1] = concat({db, whole(at), digest(out), kind}, '\t') .. '\n'
end

local readers = {}
readers['string'] = function(key, out) add(out, {redis.call('GET', key)}) end
readers['list'] = function(key, out) add(out, redis.call('LRANGE', key, 0, -1)) end
readers['set'] = function(key, out)
  local members = redis.call('SMEMBERS', key)
  sort(members)
  add(out, members)
end
readers['zset'] = function(key, out)
  local found = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  for i = 1, #found, 2 do out[#out + 1] = part(found[i]) .. format('%.17g', tonumber(found[i + 1])) end
end
local function field_times(key, found)
  local times = {}
  if not volatile then return times end
  for first = 1, #found, 1000 do
    local names = {}
    for i = first, math.min(first + 999, #found), 2 do names[#names + 1] = found[i] end
    local answer = redis.call('HPEXPIRETIME', key, 'FIELDS', #names, unpack(names))
    for i = 1, #names do times[names[i]] = answer[i] end
  end
  return times
end
-- Fields with a TTL are separate entries. Returns the time at which the key expires with its last field, or nil.
readers['hash'] = function(key, out, at)
  local found = redis.call('HGETALL', key)
  local times, fields, last = field_times(key, found), {}, 0
  for i = 1, #found, 2 do
    local goes = times[found[i]] or -1
    if goes > 0 then
      if goes > last then last = goes end
      if at > 0 and at < goes then goes = at end
      line(goes, {'field', part(key), part(found[i]), part(found[i + 1]), whole(times[found[i]])}, 'field')
    elseif goes == -1 then
      fields[#fields + 1] = part(found[i]) .. part(found[i + 1])
    end
  end
  sort(fields)
  out[#out + 1] = concat(fields, ' ')
  if #fields == 0 then return last end
end
readers['stream'] = function(key, out)
  local info = named(redis.call('XINFO', 'STREAM', key, 'FULL', 'COUNT', 0))
  for _, name in ipairs({'entries', 'last-generated-id', 'max-deleted-entry-id', 'entries-added'}) do
    walk(out, info[name])
  end
  for _, raw in ipairs(info['groups']) do
    local group = named(raw)
    for _, name in ipairs({'name', 'last-delivered-id', 'entries-read', 'pending'}) do walk(out, group[name]) end
    for _, raw_consumer in ipairs(group['consumers']) do
      local consumer = named(raw_consumer)
      walk(out, consumer['name'])
      walk(out, consumer['pending'])
    end
  end
end
"""
"""The readers of every type, which add a value's content to a list. They need `db` and `volatile`, and fill `lines`
with expiring fields."""

READ_PAGE = (
    r"""
local db, cursor, count, volatile = ARGV[1], ARGV[2], ARGV[3], ARGV[4] == '1'
redis.call('SELECT', db)
local page = redis.call('SCAN', cursor, 'COUNT', count)
"""
    + VALUES
    + r"""
local lanes, untimed, persistent, live = {0, 0, 0, 0}, 0, 0, 0
local unknown, prefixes = {}, {}
for _, key in ipairs(page[2]) do
  local at = redis.call('PEXPIRETIME', key)
  local kind = redis.call('TYPE', key).ok
  if at == -1 then untimed = untimed + 1 end
  if at ~= -2 and not readers[kind] then
    if #unknown < 5 then unknown[#unknown + 1] = kind .. ' ' .. string.sub(key, 1, 80) end
  elseif at ~= -2 then
    local out = {part(key), kind, whole(at)}
    local last = readers[kind](key, out, at)
    if last and (at == -1 or last < at) then at = last end
    if at > 0 then line(at, out, 'key')
    elseif at == -1 then
      local hex = digest(out)
      persistent = persistent + 1
      for i = 1, 4 do lanes[i] = lanes[i] + tonumber(string.sub(hex, i * 8 - 7, i * 8), 16) end
    end
    if at ~= 0 then
      live = live + 1
      local colon = string.find(key, ':', 1, true)
      local prefix = colon and string.sub(key, 1, math.min(colon, 64)) or ''
      prefixes[prefix] = (prefixes[prefix] or 0) + 1
    end
  end
end
local counted = {}
for prefix, number in pairs(prefixes) do counted[#counted + 1] = prefix; counted[#counted + 1] = number end
return {page[1], untimed, persistent, live, lanes, concat(lines), counted, unknown}
"""
)

DIGESTS = (
    r"""
local db, volatile, most = ARGV[1], ARGV[2] == '1', tonumber(ARGV[3])
redis.call('SELECT', db)
"""
    + VALUES
    + r"""
-- A live server sorts by its own locale: there a sum that no order changes stands for what is sorted elsewhere.
sort = function(items)
  local sums, number = {0, 0, 0}, #items
  for i = number, 1, -1 do
    local hex = redis.sha1hex(items[i])
    for lane = 1, 3 do
      sums[lane] = (sums[lane] + tonumber(string.sub(hex, lane * 12 - 11, lane * 12), 16)) % 281474976710656
    end
    items[i] = nil
  end
  if number > 0 then items[1] = number .. ':' .. whole(sums[1]) .. ':' .. whole(sums[2]) .. ':' .. whole(sums[3]) end
end
local answers = {}
for i = 4, #ARGV do
  local key = ARGV[i]
  local kind = redis.call('TYPE', key).ok
  if kind == 'none' then answers[#answers + 1] = ''
  elseif not readers[kind] then answers[#answers + 1] = '?' .. kind
  elseif redis.call('MEMORY', 'USAGE', key) > most then answers[#answers + 1] = '+' .. kind
  else
    local at = redis.call('PEXPIRETIME', key)
    local out = {part(key), kind, whole(at)}
    readers[kind](key, out, at)
    sort(lines)
    answers[#answers + 1] = digest({digest(out), concat(lines)})
    for n = #lines, 1, -1 do lines[n] = nil end
  end
end
return answers
"""
)
"""A digest of each named key, with its expiry; `+type`: it uses more than `most` bytes of memory; `?type`: it cannot be
read; empty: it does not exist."""

DROP_PAGE = r"""
redis.call('SELECT', ARGV[1])
local page = redis.call('SCAN', ARGV[2], 'COUNT', ARGV[3])
local dropped = {}
for i = 4, #ARGV do dropped[i - 3] = 0 end
for _, key in ipairs(page[2]) do
  for i = 4, #ARGV do
    if string.sub(key, 1, #ARGV[i]) == ARGV[i] then
      dropped[i - 3] = dropped[i - 3] + redis.call('UNLINK', key)
      break
    end
  end
end
return {page[1], dropped}
"""
