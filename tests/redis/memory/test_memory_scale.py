"""check-redis-memory over many keys: true totals, honest errors of samples, bounded memory, no slow call."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import redis

from flows.redis.memory.check import check_redis_memory
from runbook.report import Report, Status
from tasks.redis.memory.estimates import SizeEstimate, Stratum, Sums
from tasks.redis.memory.sampling import MOST_KEYS, Biggest, Prefixes
from tasks.redis.memory.script import BYTES, KEYS, WIDTH, KeyFacts, SurveyPage
from tasks.redis.memory.sweep import Survey, survey_keys
from tasks.redis.script import PageSize
from tests.redis.servers import NAME, RedisServer

KEYS_200K = 200_000
# 60 % sessions of growing sizes with a TTL, 30 % small hashes, 10 % lists without a colon.
FILL = """
for i = tonumber(ARGV[1]), tonumber(ARGV[2]) do
  local kind = i % 10
  if kind < 6 then redis.call('SET', 'session:' .. i, string.rep('x', 50 + i % 400), 'EX', 100000)
  elseif kind < 9 then redis.call('HSET', 'user:' .. i, 'name', 'n' .. i, 'age', i)
  else redis.call('RPUSH', 'list-' .. i, i, i) end
end
"""
# Every key's bytes, as the server tells them one by one: only the loop is in the server.
TRUTH = """
local page = redis.call('SCAN', ARGV[1], 'COUNT', 2000)
local found = {}
for i, key in ipairs(page[2]) do
  found[2 * i - 1], found[2 * i] = key, redis.call('MEMORY', 'USAGE', key, 'SAMPLES', 0)
end
return {page[1], found}
"""


@pytest.fixture
def server(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> RedisServer:
    server.register(monkeypatch)
    return server


def fill(client: redis.Redis, keys: int) -> None:
    for first in range(0, keys, 20_000):
        client.eval(FILL, 0, first, min(first + 20_000, keys) - 1)


def truth(client: redis.Redis) -> dict[bytes, tuple[int, int]]:
    """Prefix → (keys, bytes)."""
    sizes: dict[bytes, int] = {}
    cursor = b"0"
    while True:
        cursor, found = client.eval(TRUTH, 0, cursor)
        sizes.update(zip(found[::2], found[1::2], strict=True))
        if cursor == b"0":
            break
    counted: dict[bytes, tuple[int, int]] = {}
    for key, size in sizes.items():
        prefix = key[: key.find(b":") + 1]
        keys, total = counted.get(prefix, (0, 0))
        counted[prefix] = keys + 1, total + size
    return counted


def told(survey: Survey) -> dict[bytes, tuple[SizeEstimate, SizeEstimate]]:
    return {found.prefix: (found.keys, found.size) for found in survey.prefixes}


def test_totals_of_200_000_keys_are_true_and_a_big_hash_among_them_is_found(server: RedisServer) -> None:
    client = server.client()
    fill(client, KEYS_200K)
    for first in range(0, 100_000, 10_000):
        client.hset("report:big", mapping={f"field-{n:06}": "v" * 20 for n in range(first, first + 10_000)})
    survey = survey_keys(server.block(), 600)
    assert survey.is_complete
    expected = truth(client)
    found = told(survey)
    assert found.keys() == expected.keys()
    for prefix, (keys, size) in expected.items():
        assert found[prefix][0] == SizeEstimate(keys)
        close = 0.05 if prefix == b"report:" else 0.0  # of the hash's fields 5 were looked at
        assert math.isclose(found[prefix][1].value, size, rel_tol=close), prefix
    biggest = survey.biggest[0]
    assert (biggest.key, biggest.type, biggest.elements) == (b"report:big", "hash", 100_000)
    assert math.isclose(biggest.size, client.memory_usage("report:big", samples=0), rel_tol=0.05)
    assert survey.prefixes[0].prefix == b"session:"


def test_when_the_time_is_over_it_reports_a_sample_with_its_error(server: RedisServer) -> None:
    client = server.client()
    fill(client, 300_000)
    fill(server.client(5), 30_000)
    expected = truth(client)
    survey = survey_keys(server.block(), 0.1)
    first, second = survey.databases
    assert not survey.is_complete
    assert 0 < survey.read < survey.expected == 330_000
    assert 0.3 < (first.read / first.expected) / (second.read / second.expected) < 3, "both are sampled alike"
    found = {p.prefix: p for p in survey.prefixes if p.database == 0}
    for prefix, (keys, size) in expected.items():
        for estimate, true in ((found[prefix].keys, keys), (found[prefix].size, size)):
            assert 0 < estimate.error < 2 * true
            assert abs(estimate.value - true) < 3 * estimate.error + 1, (prefix, estimate, true)
    report: Report = check_redis_memory.fn(NAME, budget_seconds=0.1)
    (warning,) = [f for f in report.findings if f.name == "a sample, not all keys"]
    assert warning.status is Status.WARN
    assert warning.follow[0].parameters["budget_seconds"]
    (table,) = [e for e in report.evidence if e.name == "Biggest prefixes by memory"]
    assert all("±" in row[2] and "±" in row[3] for row in table.rows)


def test_errors_hold_95_times_of_100() -> None:
    """Clusters of unequal size from a skewed population, estimated again and again."""
    chance = random.Random(7)
    population = [int(chance.lognormvariate(5, 1)) for _ in range(12_000)]
    rare = [chance.random() < 0.03 for _ in population]
    held, runs = {"size": 0, "rare": 0}, 300
    for _ in range(runs):
        chance.shuffle(rare)
        stratum, few = Stratum(0, len(population)), Sums()
        start = chance.randrange(len(population))
        for page in range(60):
            places = [(start + page * 97 + n) % len(population) for n in range(chance.randint(20, 90))]
            few.add(_numbers([population[p] for p in places if rare[p]]), len(places))
            stratum.add(_page(len(places)), _numbers([population[p] for p in places]))
        size, keys = stratum.size_of(stratum.total), stratum.keys_of(few)
        held["size"] += abs(size.value - sum(population)) <= size.error
        held["rare"] += abs(keys.value - sum(rare)) <= keys.error
        chance.shuffle(population)
    assert all(0.9 * runs <= count <= 0.99 * runs for count in held.values()), held


def _numbers(sizes: list[int]) -> list[int]:
    numbers = [0] * WIDTH
    numbers[KEYS.start], numbers[BYTES.start] = len(sizes), sum(sizes)
    return numbers


def _page(read: int, cursor: bytes = b"7") -> SurveyPage:
    return SurveyPage(cursor, read, 0, 0, 0.0, {}, ())


def test_too_few_pages_give_no_error() -> None:
    stratum = Stratum(0, 1000)
    for _ in range(3):
        stratum.add(_page(5), _numbers([10] * 5))
    assert stratum.size_of(stratum.total).value == 10_000
    assert math.isnan(stratum.size_of(stratum.total).error)
    stratum.add(_page(5, cursor=b"0"), _numbers([]))
    assert stratum.size_of(stratum.total) == SizeEstimate(150)


def test_memory_is_bounded_whatever_the_prefixes_are() -> None:
    """A late big prefix is kept, of many small ones only the biggest are."""
    bounded = Prefixes(most=50)
    for n in range(5000):
        bounded.add((0, b"%d:" % n), _numbers([100 + n % 7]), 10)
        assert len(bounded.kept) <= 100
    bounded.add((0, b"late:"), _numbers([10_000_000]), 10)
    for n in range(5000):
        bounded.add((0, b"x%d:" % n), _numbers([100]), 10)
    assert (0, b"late:") in bounded.kept
    assert bounded.dropped > 9000


def test_with_more_prefixes_than_are_kept_the_totals_still_hold(server: RedisServer) -> None:
    client = server.client()
    for first in range(0, 30_000, 5000):
        client.mset({f"u{n}:data": "x" * 20 for n in range(first, first + 5000)})
    client.set("whale:1", b"x" * 3_000_000)
    report: Report = check_redis_memory.fn(NAME)
    (table,) = [e for e in report.evidence if e.name == "Biggest prefixes by memory"]
    assert table.rows[0][1] == "whale:"
    assert table.rows[-1][1].startswith("others (about ")
    counted = sum(int(row[2].replace(",", "")) for row in table.rows)
    assert counted == client.dbsize() == 30_001


def test_the_biggest_keys_are_kept_once_each() -> None:
    biggest = Biggest()
    for size in range(1000):
        biggest.add(0, [KeyFacts(b"%d" % size, size, size % 2, -1)] * 2)
    assert [name.size for name in biggest.ranked()] == [*range(999, 999 - 2 * MOST_KEYS, -1)]
    assert biggest.floors[:3] == (960, 961, -1)


def test_a_page_grows_until_it_takes_its_time_and_shrinks_at_once() -> None:
    size = PageSize(0.0005, least=10, most=1000)
    for _ in range(30):
        size.adapt(size.keys * 2e-6)
    assert size.keys == 250
    for _ in range(3):
        size.adapt(size.keys * 1e-4)
    assert size.keys == 10
    for _ in range(30):
        size.adapt(0.0)
    assert size.keys == 1000


def waited_seconds(client: redis.Redis) -> float:
    """For how long the server's main thread could have run, and others did (proc(5), schedstat)."""
    process = client.info("server")["process_id"]
    return int(Path(f"/proc/{process}/task/{process}/schedstat").read_text().split()[1]) / 1e9


def test_no_call_of_a_report_is_slow(server: RedisServer) -> None:
    """300,000 keys, a set of a million and a string of 100 MB. The slow log goes by the clock, so that on a busy host
    it has what was stopped in its middle: what the server waited for a processor meanwhile does not count."""
    client = server.client()
    fill(client, 300_000)
    for first in range(0, 1_000_000, 100_000):
        script = "for i = ARGV[1], ARGV[1] + 99999 do redis.call('SADD', 'set:million', i .. ':member') end"
        client.eval(script, 0, first)
    client.set("string:huge", b"x" * 100_000_000)
    client.config_set("slowlog-log-slower-than", 10_000)
    survey = survey_keys(server.block(), 600)
    assert 0 < survey.longest_worked_seconds < 0.01
    for _ in range(3):
        client.slowlog_reset()
        before = waited_seconds(client)
        report: Report = check_redis_memory.fn(NAME, pattern="session:*", budget_seconds=600)
        assert report.facts["sweep"].startswith("300,002 of 300,002 keys")
        slow = client.slowlog_get(10)
        longest = max((call["duration"] / 1e6 for call in slow), default=0.0)
        worked = longest - (waited_seconds(client) - before)
        if worked < 0.01:
            break
    assert worked < 0.01, slow
    rows = {e.name: e.rows for e in report.evidence}
    (first_row, second_row) = rows["Biggest keys"][:2]
    assert (first_row[1], second_row[1]) == ("string:huge", "set:million")
    assert second_row[4] == "1,000,000"
