"""check-redis-memory never mixes two servers, a sample and all keys, or its own reads and others'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from flows.redis.memory.check import check_redis_memory
from flows.redis.memory.limits import judge_memory
from runbook import kinds
from runbook.errors import RunbookFailed
from runbook.report import Finding, Report, Status
from runbook.units import size
from runbook.wait import until
from tasks.redis.memory import sweep
from tasks.redis.memory.info import read_memory
from tests.redis.servers import NAME, PASSWORD, RedisServer, running_redis, settles

USER = "ops"
CHANGES = {
    "the server was restarted during this report",
    "the role changed during this report",
    "keys were deleted during this report",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "RETRY_DELAYS_SECONDS", [0.05, 0.05, 0.05])


def run(**options: object) -> Report:
    report: Report = check_redis_memory.fn(NAME, **options)
    return report


def findings(report: Report) -> dict[str, Finding]:
    return {found.name: found for found in report.findings}


def fill(client: redis.Redis, count: int, prefix: str = "k:", **options: int) -> None:
    with client.pipeline(transaction=False) as pipe:
        for n in range(count):
            pipe.set(f"{prefix}{n}", "x" * 200, **options)
        pipe.execute()


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], None]], None]]:
    """Have something done before the tenth page is asked for; in a thread that lasts: a server ends with its own."""
    lasting = ThreadPoolExecutor(1)

    def set_up(work: Callable[[], None]) -> None:
        real, pages = sweep.read_page, iter(range(1, 1_000_000))

        def ask(*words: object) -> object:
            if next(pages) == 10:
                lasting.submit(work).result()
            return real(*words)  # type: ignore[arg-type]

        monkeypatch.setattr(sweep, "read_page", ask)

    with lasting:
        yield set_up


def only_change(report: Report) -> tuple[str, str]:
    """The one finding that something changed, and what it says."""
    assert report.status is Status.WARN, report.sentence()
    ((name, found),) = [(name, found) for name, found in findings(report).items() if name in CHANGES]
    assert found.hint
    return name, found.value


def test_a_restart_in_the_middle(server: RedisServer, meanwhile: Callable[[Callable[[], None]], None]) -> None:
    fill(server.client(), 5000)
    meanwhile(lambda: (server.crash(), server.start())[1])
    name, value = only_change(run())
    assert name == "the server was restarted during this report"
    assert value.endswith("keys read")


def test_a_flush_in_the_middle(server: RedisServer, meanwhile: Callable[[Callable[[], None]], None]) -> None:
    fill(server.client(), 5000)
    meanwhile(lambda: server.client().flushall())
    name, value = only_change(run())
    assert name == "keys were deleted during this report"
    assert value.endswith("of 5,000; 0 expired and 0 were evicted")


def test_other_data_in_the_middle(server: RedisServer, meanwhile: Callable[[Callable[[], None]], None]) -> None:
    """It is made a replica, and holds what its master holds."""
    fill(server.client(), 5000)
    with running_redis() as other:
        fill(other.client(), 100, "other:")

        def follow() -> None:
            server.client().replicaof("127.0.0.1", str(other.port))
            settles(lambda: server.client().dbsize() == 100, "the other's data")

        meanwhile(follow)
        name, value = only_change(run())
    assert (name, value) == ("the role changed during this report", "slave")


def test_keys_that_expire_or_are_evicted_are_no_surprise(
    server: RedisServer, meanwhile: Callable[[Callable[[], None]], None]
) -> None:
    client = server.client()
    fill(client, 3000)
    fill(client, 3000, "brief:", px=1500)

    def expire() -> None:
        until(lambda: client.dbsize() == 3000, what="their expiry", seconds=120)

    meanwhile(expire)
    report = run()
    assert int(report.facts["sweep"].split()[0].replace(",", "")) < 5000, "many were gone by then"
    assert not CHANGES & set(findings(report))

    def evict() -> None:
        def evicted() -> bool:
            client.config_set("maxmemory", int(client.info("memory")["used_memory"]) - 300_000)
            return bool(client.dbsize() < 2500)

        client.config_set("maxmemory-policy", "allkeys-random")
        until(evicted, what="their eviction", seconds=120)
        client.config_set("maxmemory", 0)

    meanwhile(evict)
    assert not CHANGES & set(findings(run()))


def test_a_few_keys_that_an_application_deletes_are_none(
    server: RedisServer, meanwhile: Callable[[Callable[[], None]], None]
) -> None:
    client = server.client()
    fill(client, 5000)
    meanwhile(lambda: client.delete(*(f"k:{n}" for n in range(400))))
    assert not CHANGES & set(findings(run()))


def test_it_tells_no_hit_rate_that_is_its_own(server: RedisServer) -> None:
    client = server.client()
    fill(client, 2000)
    before = client.info("stats")["keyspace_hits"]
    report = run()
    assert client.info("stats")["keyspace_hits"] - before >= 2000, "its reads count as hits"
    assert not any("hit rate" in row[0] for found in report.evidence for row in found.rows if row)


def test_a_limit_beyond_the_host_is_none(server: RedisServer) -> None:
    client = server.client()
    memory = read_memory(server.block())
    client.config_set("maxmemory", 2 * memory.host)
    report = Report("x", NAME, limits={"redis.memory.host_ratio": (-1.0, -1.0)})
    judge_memory(report, read_memory(server.block()))
    told = {found.name.split(" (")[0]: found for found in report.findings}
    assert told["redis.memory.host_ratio"].status is Status.CRITICAL
    assert "apply-redis-settings" in told["maxmemory is more than the host has"].hint
    client.config_set("maxmemory", memory.host)
    report = Report("x", NAME)
    judge_memory(report, read_memory(server.block()))
    assert not any("host_ratio" in found.name for found in report.findings)


def enter_as(server: RedisServer, monkeypatch: pytest.MonkeyPatch, *commands: str) -> None:
    server.client().acl_setuser(
        USER, enabled=True, reset=True, passwords=[f"+{PASSWORD}"], keys=["*"], channels=["*"], commands=[*commands]
    )
    server.register(monkeypatch, extra=f'username = "{USER}"\n')


def test_elements_are_counted_only_where_that_leaves_no_trace(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = server.client()
    client.rpush("list", *range(500))
    until(lambda: client.object("IDLETIME", "list") >= 1, what="an idle second", seconds=120)
    enter_as(server, monkeypatch, "+@all", "-client|no-touch")
    report = run()
    assert client.object("IDLETIME", "list") >= 1
    (row,) = next(found.rows for found in report.evidence if found.name == "Biggest keys")
    assert (row[1], row[4]) == ("list", "")
    assert "not counted" in report.facts["elements of the biggest keys"]
    server.register(monkeypatch)
    report = run()
    (row,) = next(found.rows for found in report.evidence if found.name == "Biggest keys")
    assert (row[4], client.object("IDLETIME", "list") >= 1) == ("500", True)
    assert "elements of the biggest keys" not in report.facts


def test_a_big_key_that_a_sample_has_not_seen_is_missed(server: RedisServer) -> None:
    """The server counts its bytes; the sample's error does not."""
    client = server.client()
    for first in range(0, 200_000, 20_000):
        client.mset({f"k:{n}": "x" * 50 for n in range(first, first + 20_000)})
    name = "data that the sample does not explain"
    report = run(budget_seconds=1e-6)
    assert "a sample, not all keys" in findings(report)
    assert name not in findings(report)
    *_, last = client.scan_iter(count=10_000)  # the sample reads the first of them, in this very order
    client.setrange(last, 60_000_000, "x")
    report = run(budget_seconds=1e-6)
    told = findings(report)[name]
    assert told.status is Status.WARN
    assert 50 < float(told.value.split()[0]) < 75, told.value
    assert name not in findings(run())


def skew(client: redis.Redis) -> int:
    """Seed a hash with its bytes in 40 of 4,040 fields, none of them among the first 5; its true size in bytes.

    The order of fields is the server's own. One time in twenty the first 5 hold a big one, so others are tried.
    """
    for names in map("f{}:{{}}".format, range(20)):
        small, big = ([names.format(n) for n in part] for part in (range(4000), range(4000, 4040)))
        client.delete("report:daily")
        client.hset("report:daily", mapping=dict.fromkeys(small, "x") | dict.fromkeys(big, b"x" * 1_000_000))
        client.hmget("report:daily", small)  # every look-up rehashes a step: the order stays as it is from here on
        true: int = client.memory_usage("report:daily", samples=0)
        if client.memory_usage("report:daily") < true / 20:
            return true
    raise AssertionError("no seed hides the big fields from MEMORY USAGE")


def test_a_hash_whose_bytes_are_in_few_of_its_fields_is_measured_or_missed_aloud(server: RedisServer) -> None:
    """MEMORY USAGE looks at 5 fields, and takes 40 MB for some kilobytes."""
    client = server.client()
    fill(client, 2000)

    true = skew(client)
    report = run()
    tables = {one.name: one.rows for one in report.evidence}
    for name in ("Biggest keys", "Biggest prefixes by memory"):
        (row,) = [row for row in tables[name] if row[1].startswith("report:")]
        assert row == tables[name][0]
        assert size(true) in row
    gap = "data that the keys do not explain"
    assert gap not in findings(report)
    assert float(report.outcome.split(" use ")[1].split()[0]) > 40, report.outcome
    decoys = dict.fromkeys(range(25), "y" * 30000)
    for n, text in decoys.items():  # by 5 fields each of them is bigger: the skewed one is no candidate any more
        client.hset(f"decoy:{n}", mapping={str(field): text for field in range(100)})
    told = findings(run())[gap]
    assert told.status is Status.WARN
    assert 35 < float(told.value.split()[0]) < 45, told.value


def test_a_pattern_takes_bytes_as_reports_show_them(server: RedisServer) -> None:
    server.client().set(b"\xff\xfe:1", "x")
    server.client().set("sp*ce:1", "x")
    for pattern, key in ((r"\xff*", "\\xff\\xfe:1"), (r"sp\x2ace:*", "sp*ce:1")):
        (row,) = next(found.rows for found in run(pattern=pattern).evidence if found.name.startswith("First"))
        assert row[1] == key
    with pytest.raises(RunbookFailed, match="cannot be part of a key"):
        run(pattern="\ud800")


def test_hints_name_runbooks_and_no_raw_commands_for_the_limit(server: RedisServer) -> None:
    report = run()
    assert "apply-redis-settings with override" in findings(report)["maxmemory is 0"].hint
    assert "CONFIG SET maxmemory" not in " ".join(found.hint for found in report.findings)
