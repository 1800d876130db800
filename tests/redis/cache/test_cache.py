"""clear-cache on real servers: what it takes, what it leaves, and what happens when something dies meanwhile."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from flows.redis.cache.cache import clear_cache
from flows.redis.persistence import backup_redis
from runbook import kinds
from runbook.errors import NotConfirmed, OpsError, RunbookFailed
from runbook.guard.carried_out import CarriedOut
from runbook.guard.permit import Act, Permit
from runbook.guard.pins import PlanChanged
from runbook.report import Report, Status
from runbook.wait import until
from tasks.redis.cache import pages as cache_pages
from tasks.redis.cache import recheck
from tasks.redis.cache import sweep as cache_sweep
from tasks.redis.cache.clearing import UNLINK, Order, unlink_keys
from tasks.redis.cache.selection import escaped, literal_head, of_prefixes
from tasks.redis.cache.server import read_cache_server
from tasks.redis.keys import bytes_of
from tests.fixtures import forked
from tests.redis.servers import NAME, PASSWORD, Group, RedisServer, running_redis, settles

ROOT = Path(__file__).parents[3]
STRANGE = (
    b"cache:with spaces",
    b"cache:'quotes\"",
    b"cache:new\nline",
    b"cache:nul\0byte",
    b"cache:\xff\xfe",
    b"cache:",
    "cache:氏名".encode(),
    b"cache:*",
    b"cache:\\back",
    b"cache:" + bytes(range(256)),
)
KEPT = (b"cach:a", b"Cache:a", b"xcache:a", b"cache", b"plain", b"\xff\xfe")
GOOD = (Status.OK, Status.WARN)
# By the Sentinels' word, by its refusal of a write, and by its own word, which it gives some seconds after a failover.
NO_MASTER = ("is no longer the master", "is a replica: it takes no writes", "is a slave now, and was a master")
# Ends itself with -9 after its third page.
DYING = """\
import os, signal
from tasks.redis.cache import sweep as cache_sweep
pages = []
def die(name):
    pages.append(name)
    if pages.count("cache: unlinked a page") == 3:
        os.kill(os.getpid(), signal.SIGKILL)
cache_sweep.failpoint = die
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "RETRY_DELAYS_SECONDS", [0.05, 0.05, 0.05])


@pytest.fixture(params=["scripts", "plain commands"])
def either(request: pytest.FixtureRequest, server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> RedisServer:
    """The server, entered as a user who may EVAL, and as one who may not."""
    if request.param != "scripts":
        enter_as(server, monkeypatch, "+@all", "-eval")
    return server


def enter_as(server: RedisServer, monkeypatch: pytest.MonkeyPatch, *commands: str) -> None:
    """An ACL user of these commands."""
    server.client().acl_setuser(
        "ops", enabled=True, reset=True, passwords=[f"+{PASSWORD}"], keys=["*"], channels=["*"], commands=[*commands]
    )
    server.register(monkeypatch, extra='username = "ops"\n')


def put(client: redis.Redis, *names: bytes | str, ms: int | None = None) -> None:
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.set(name, b"v" * 10, px=ms)
        pipe.execute()


def fill(client: redis.Redis, count: int, prefix: str = "cache:", ms: int | None = None) -> None:
    put(client, *(f"{prefix}{n}" for n in range(count)), ms=ms)


def names(server: RedisServer, database: int = 0) -> set[bytes]:
    return set(server.client(database).scan_iter(count=1000))


def failed(**parameters: Any) -> Report:
    """The report of a run that must fail."""
    with pytest.raises(RunbookFailed) as caught:
        clear_cache.fn(NAME, confirm=NAME, **parameters)
    return caught.value.report


def clear(**parameters: Any) -> Report:
    report = clear_cache.fn(NAME, confirm=NAME, **parameters)
    assert report.status in GOOD, report.sentence()
    return report


def table(report: Report, name: str) -> list[tuple[str, ...]]:
    return [row for found in report.evidence if found.name.startswith(name) for row in found.rows]


def warnings(report: Report) -> dict[str, str]:
    return {finding.name: finding.value for finding in report.findings if finding.status is Status.WARN}


@pytest.fixture
def after_page(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """Have something done after each page that is unlinked; it is told which page it is, from 1."""

    def set_up(work: Callable[[int], None]) -> None:
        pages = iter(range(1, 1_000_000))
        monkeypatch.setattr(cache_sweep, "failpoint", lambda name: work(next(pages)) if "unlinked" in name else None)

    return set_up


def test_a_plan_counts_and_changes_nothing(either: RedisServer) -> None:
    client = either.client()
    put(client, *STRANGE, *KEPT)
    fill(client, 300, "cache:page:", ms=3_600_000)
    before = names(either)
    report = clear_cache.fn(NAME, prefixes=("cache:",))
    assert (report.status, names(either)) == (Status.PLANNED, before)
    (row,) = table(report, "Keys that are meant")
    assert row[:3] == ("db 0", "cache:", f"{300 + len(STRANGE)}")
    assert (row[4], row[5]) == (str(len(STRANGE)), row[2]), "every key was measured"
    first = table(report, "The first 20 keys")
    assert len(first) == 20
    assert {kind for _, _, kind, _, _ in first} == {"string"}
    assert f"prefix cache: in db 0 of {either.address}: 310 keys" in report.plan_steps[0].detail
    assert report.plan_steps[0].bytes > 300 * 10


def test_a_prefix_takes_every_key_that_begins_so_and_no_other(either: RedisServer) -> None:
    put(either.client(), *STRANGE, *KEPT)
    report = clear(prefixes=("cache:",))
    assert names(either) == {*KEPT}
    assert report.facts["unlinked"].startswith(f"{len(STRANGE)} keys")
    assert report.facts["added meanwhile, and there now"] == "0 keys"
    assert clear(prefixes=("cache:",)).outcome.startswith("0 keys")


def test_a_prefix_is_literal(either: RedisServer) -> None:
    put(either.client(), "a[b]*:1", "a[b]*:", "ab*:1", "ab:1", "a[b]x:1", "a[b]", r"a\[b]*:1")
    clear(prefixes=("a[b]*:",))
    assert names(either) == {b"ab*:1", b"ab:1", b"a[b]x:1", b"a[b]", rb"a\[b]*:1"}


def test_several_prefixes_and_bytes(either: RedisServer) -> None:
    put(either.client(), b"\xff\x00:1", b"\xff\x01:1", "tmp:1", "tmp:deep:1", "tmq:1", rb"\xff:1")
    report = clear(prefixes=(r"\xff\x00:", "tmp:", "tmp:deep:"))
    assert names(either) == {b"\xff\x01:1", b"tmq:1", rb"\xff:1"}
    found = {row[1]: row[2] for row in table(report, "Keys that were unlinked")}
    assert found == {r"\xff\x00:": "1", "tmp:": "1", "tmp:deep:": "1"}
    clear(prefixes=(r"\x5cxff",))
    assert names(either) == {b"\xff\x01:1", b"tmq:1"}


def test_a_pattern_is_redis_s_glob(either: RedisServer) -> None:
    put(either.client(), "cache:a:1", "cache:b:1", "cache:ab:1", "cache:?:1", b"cache:\xfe:1", "other")
    clear(pattern=r"cache:\?:1")
    assert b"cache:?:1" not in names(either)
    assert len(names(either)) == 5
    clear(pattern="cache:[b-c]:1")
    assert names(either) == {b"cache:a:1", b"cache:ab:1", b"cache:\xfe:1", b"other"}
    clear(pattern=r"cache:\xfe:*")
    assert names(either) == {b"cache:a:1", b"cache:ab:1", b"other"}
    report = clear(pattern="cache:*", expected_keys=2)
    assert names(either) == {b"other"}
    assert [row[1:3] for row in table(report, "Keys that were unlinked")] == [("cache:", "2")]


def test_sixteen_databases(either: RedisServer) -> None:
    for number in range(16):
        put(either.client(number), f"cache:{number}", f"kept:{number}")
    clear(prefixes=("cache:",), databases=(3, 15))
    assert [n for n in range(16) if len(names(either, n)) == 1] == [3, 15]
    report = clear(prefixes=("cache:",), databases=(), all_databases=True)
    assert all(names(either, n) == {f"kept:{n}".encode()} for n in range(16))
    assert len(table(report, "Keys that were unlinked")) == 14
    with pytest.raises(RunbookFailed, match="has no database 99. Next: correct databases: it has 0 to 15"):
        clear_cache.fn(NAME, prefixes=("cache:",), databases=(99,))


def test_protected_prefixes_are_left_out_and_counted(either: RedisServer) -> None:
    client = either.client()
    put(client, "session:1", "session:2", "queue:1", "cache:1", "s:1", "sessions", "plain")
    report = clear(pattern="s*")
    assert names(either) == {b"session:1", b"session:2", b"queue:1", b"cache:1", b"plain"}
    assert warnings(report)["protected keys were left out"] == "session: 2"
    plan = clear_cache.fn(NAME, pattern="*")
    assert warnings(plan)["protected keys were left out"] == "session: 2, queue: 1"
    assert "2 in expected_keys" in plan.sentence()
    clear(pattern="*", expected_keys=2)
    assert names(either) == {b"session:1", b"session:2", b"queue:1"}
    report = clear(prefixes=("se",))
    assert "nothing to clear" not in report.outcome
    assert names(either) == {b"session:1", b"session:2", b"queue:1"}, "a shorter prefix names nothing"


def test_protected_keys_go_where_they_are_named(either: RedisServer) -> None:
    client = either.client()
    put(client, "session:1", "session:old:1", "queue:1", "q")
    told = failed(prefixes=("session:",)).sentence()
    assert "expected_keys: not given" in told
    clear(prefixes=("session:old:",), expected_keys=1)
    assert names(either) == {b"session:1", b"queue:1", b"q"}
    clear(pattern="session:*", expected_keys=1)
    assert names(either) == {b"queue:1", b"q"}
    clear(pattern="*", include_protected=("queue:",), expected_keys=2)
    assert names(either) == set()
    assert "include_protected names sessions:" in failed(pattern="*", include_protected=("sessions:",)).sentence()


def test_a_longer_prefix_does_not_open_a_protected_one_to_a_shorter(either: RedisServer) -> None:
    put(either.client(), "session:1", "session:old:1", "s:1")
    clear(prefixes=("s", "session:old:"), expected_keys=2)
    assert names(either) == {b"session:1"}


def test_keys_without_a_ttl_only_under_a_prefix(either: RedisServer) -> None:
    client = either.client()
    fill(client, 30, "cache:stays:")
    fill(client, 20, "cache:goes:", ms=3_600_000)
    put(client, "plain")
    told = failed(pattern="*", only_without_ttl=True).sentence()
    assert "it needs named prefixes" in told
    assert "expected_keys: not given" in failed(prefixes=("cache:",), only_without_ttl=True).sentence()
    plan = clear_cache.fn(NAME, prefixes=("cache:",), only_without_ttl=True)
    assert plan.plan_steps[0].detail.endswith("without a TTL in db 0 of " + either.address + ": 30 keys")
    report = clear(prefixes=("cache:",), only_without_ttl=True, expected_keys=30)
    assert names(either) == {*(f"cache:goes:{n}".encode() for n in range(20)), b"plain"}
    assert report.facts["left alone for their TTL"] == "20 keys"


def test_a_key_whose_ttl_is_set_meanwhile_stays(
    either: RedisServer, after_page: Callable[[Callable[[int], None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the pages, and (in plain commands) between the look and the deletion."""
    client = either.client()
    fill(client, 1000)
    real, kept = cache_pages._unlink, set[bytes]()

    def set_ttl(keys: Any) -> None:
        for key in keys:
            if client.exists(key):
                client.pexpire(key, 3_600_000)
                kept.add(key)

    def at_the_last_moment(server: redis.Redis, group: Any, keys: Any, without_ttl: bool) -> None:
        set_ttl(keys[:1])
        real(server, group, keys, without_ttl)

    monkeypatch.setattr(cache_pages, "_unlink", at_the_last_moment)
    after_page(lambda _: set_ttl(f"cache:{n}".encode() for n in range(50)))
    clear(prefixes=("cache:",), only_without_ttl=True, expected_keys=1000)
    assert kept
    assert names(either) == kept


def test_flush_a_database(either: RedisServer) -> None:
    fill(either.client(), 100)
    fill(either.client(1), 10)
    assert "expected_keys: not given" in failed(flush="database").sentence()
    assert "look at what it shows" in failed(flush="database", expected_keys=89).sentence()
    assert "look at what it shows" in failed(flush="database", expected_keys=113).sentence()
    plan = clear_cache.fn(NAME, flush="database")
    assert plan.plan_steps[0].detail == f"db 0 of {either.address}: 100 keys"
    assert len(names(either)) == 100
    report = clear(flush="database", expected_keys=98)
    assert (names(either), len(names(either, 1))) == (set(), 10)
    assert report.outcome == "100 keys flushed"
    assert "nothing to flush: no key in db 0" in clear(flush="database", expected_keys=98).outcome


def test_flush_everything(either: RedisServer) -> None:
    either.client().config_set("save", "3600 1")
    for number in (0, 3):
        fill(either.client(number), 10)
    plan = clear_cache.fn(NAME, flush="all")
    assert plan.plan_steps[0].detail == f"all databases of {either.address}: 20 keys"
    assert "RDB on disk is empty at once" in warnings(plan)["FLUSHALL saves too"]
    assert warnings(plan)["newest backup of Redis"] == "there is none"
    clear(flush="all", expected_keys=20)
    assert (names(either), names(either, 3)) == (set(), set())


def test_a_flush_is_refused_while_there_are_protected_keys(either: RedisServer) -> None:
    put(either.client(), "session:1", "queue:1", "a")
    report = failed(flush="database", expected_keys=3)
    assert "protected keys: " in report.sentence()
    assert "session: 1" in report.sentence()
    assert "session: 1" in failed(flush="all", expected_keys=3).sentence()
    assert "queue: 1" in failed(flush="database", include_protected=("session:",), expected_keys=3).sentence()
    assert len(names(either)) == 3
    clear(flush="database", include_protected=("session:", "queue:"), expected_keys=3)
    assert names(either) == set()


def test_a_flush_is_refused_where_keys_were_added_since(either: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(either.client(), 100)

    def add(point: str) -> None:
        if point == "before flush_keys":
            fill(either.client(), 50, "new:")

    monkeypatch.setattr(kinds, "failpoint", add)
    told = failed(flush="database", expected_keys=100).sentence()
    assert "100 keys were planned, now there are 150" in told
    assert f"db 0 of {either.address} (100 keys) was not flushed" in told
    assert len(names(either)) == 150


def test_more_keys_than_confirmed_are_refused_and_fewer_are_the_rest(server: RedisServer) -> None:
    fill(server.client(), 120, "session:")
    assert "the number has changed" in failed(prefixes=("session:",), expected_keys=100).sentence()
    assert len(names(server)) == 120
    clear(prefixes=("session:",), expected_keys=5000)
    assert names(server) == set()


def test_it_stops_where_keys_are_added_beyond_the_number(
    server: RedisServer, after_page: Callable[[Callable[[int], None]], None]
) -> None:
    fill(server.client(), 1000, "session:")

    def add(page: int) -> None:
        if len(names(server)) <= 1000:
            fill(server.client(), 1000, f"session:new:{page}:")

    after_page(add)
    report = failed(prefixes=("session:",), expected_keys=1000)
    assert "there are more keys than the 1,000 that were planned" in report.sentence()
    assert "keys were unlinked by then, the rest is untouched" in report.sentence()
    assert names(server)


def test_a_writer_adds_keys_and_others_expire_meanwhile(
    either: RedisServer, after_page: Callable[[Callable[[int], None]], None]
) -> None:
    client = either.client()
    fill(client, 1000)
    fill(client, 300, "cache:brief:", ms=150)
    added = set[bytes]()

    def write(page: int) -> None:
        if page == 1:
            until(lambda: not client.exists("cache:brief:0"), what="its expiry", seconds=120)
        if page <= 20:
            added.add(f"cache:new:{page}".encode())
            put(client, f"cache:new:{page}", f"other:{page}")

    after_page(write)
    report = clear(prefixes=("cache:",))
    left = {name for name in names(either) if name.startswith(b"cache:")}
    assert left <= added, "what was there before is gone"
    assert report.facts["added meanwhile, and there now"] == f"{len(left)} keys"
    assert any(name.startswith(b"other:") for name in names(either))


def test_values_of_every_size_are_freed(server: RedisServer) -> None:
    client = server.client()
    client.set("cache:big", b"x" * 100_000_000)
    client.sadd("cache:set", *range(50_000))
    fill(client, 300)
    client.close()  # its buffer holds the big value for a while
    report = clear(prefixes=("cache:",))
    assert names(server) == set()
    before, after = report.facts["memory in use"].removesuffix(" after").split(" before, ")
    assert float(before.split()[0]) > 100, before
    assert float(after.split()[0]) < 20, after
    (row,) = table(report, "Keys that were unlinked")
    assert float(row[3].removesuffix(" MB")) > 100, "the big one was measured"
    assert client.info("memory")["lazyfree_pending_objects"] == 0


def test_a_server_that_is_full_takes_it(server: RedisServer) -> None:
    client = server.client()
    fill(client, 500)
    client.config_set("maxmemory", 1)
    with pytest.raises(redis.OutOfMemoryError):
        client.set("more", "x")
    clear(prefixes=("cache:",))
    assert names(server) == set()


def test_it_keeps_the_pace(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: what this machine takes would be time that the pass need not wait."""
    fill(server.client(), 200)
    began, waits = time.monotonic(), list[float]()

    def wait(ready: Callable[[], bool], **options: Any) -> None:
        waits.append(options["every_seconds"] + 1e-6)
        assert ready()

    monkeypatch.setattr(cache_sweep, "until", wait)
    monkeypatch.setattr(cache_sweep, "time", SimpleNamespace(monotonic=lambda: began + sum(waits)))
    clear(prefixes=("cache:",), keys_per_second=400)
    assert sum(waits) > 0.4, "not faster than told"
    assert len(waits) > 5, "in small pages, not all at once and then a pause"
    assert names(server) == set()


def test_bytes_of_many_keys_are_those_of_a_sample(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.redis.cache.clearing.MEASURED_KEYS", 100)
    fill(server.client(), 2000)
    fill(server.client(), 10, "rare:")
    report = clear_cache.fn(NAME, pattern="*")
    rows = {row[1]: row for row in table(report, "Keys that are meant")}
    exact = sum(server.client().memory_usage(f"cache:{n}") or 0 for n in range(2000))
    about = float(rows["cache:"][3].removeprefix("≈ ").removesuffix(" kB")) * 1000
    assert rows["cache:"][3].startswith("≈ ")
    assert int(rows["cache:"][5]) < 1000
    assert abs(about - exact) < exact / 10
    assert rows["rare:"][5] != "0"
    (row,) = table(clear_cache.fn(NAME, prefixes=("cache:",)), "Keys that are meant")
    assert row[3].startswith("≈ ")


def test_what_the_parameters_must_not_be(server: RedisServer) -> None:
    put(server.client(), "a")
    for parameters, told in (
        ({}, "say what goes"),
        ({"prefixes": ("a",), "pattern": "a*"}, "one of them"),
        ({"pattern": "a*", "flush": "all"}, "one of them"),
        ({"prefixes": ("a", "")}, "an empty prefix means every key"),
        ({"prefixes": ("a",), "databases": ()}, "name the databases"),
        ({"prefixes": ("a",), "databases": (1,), "all_databases": True}, "contradict"),
        ({"flush": "all", "databases": (1,)}, "contradict"),
        ({"flush": "database", "all_databases": True}, "choose flush=all"),
        ({"prefixes": ("\ud800",)}, "cannot stand in a key"),
    ):
        assert told in failed(**parameters).sentence()
    assert names(server) == {b"a"}


def test_a_permit_is_needed(server: RedisServer) -> None:
    put(server.client(), "cache:1")
    with pytest.raises(NotConfirmed):
        clear_cache.fn(NAME, prefixes=("cache:",), confirm="production")
    block = server.block()
    order = Order(of_prefixes([b"cache:"], [], "prefix cache:", without_ttl=False), (0,), read_cache_server(block))
    with pytest.raises(NotConfirmed):
        unlink_keys(Permit(NAME, (Act(UNLINK, "something else"),)), block, order)
    assert names(server) == {b"cache:1"}


def test_the_newest_backup_is_named(server: RedisServer) -> None:
    put(server.client(), "cache:1", ms=3_600_000)
    assert clear_cache.fn(NAME, prefixes=("cache:",)).facts["undo"] == "none: the application makes these keys anew"
    put(server.client(), "cache:2")
    plan = clear_cache.fn(NAME, prefixes=("cache:",))
    assert warnings(plan)["newest backup of Redis"] == "there is none"
    name = backup_redis.fn(NAME).facts["backup"]
    plan = clear_cache.fn(NAME, prefixes=("cache:",))
    assert f"the newest backup is {name}" in plan.facts["undo"]


def test_wrong_password(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", "wrong")
    assert "refuses the password" in failed(prefixes=("cache:",)).sentence()


@pytest.mark.parametrize("commands", [("+@all", "-unlink"), ("+@all", "-unlink", "-eval")])
def test_a_user_who_must_not_unlink(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, commands: tuple[str, ...]
) -> None:
    put(server.client(), "cache:1")
    enter_as(server, monkeypatch, *commands)
    told = failed(prefixes=("cache:",)).sentence()
    assert "forbids user ops the command UNLINK: 0 keys were unlinked by then" in told
    assert "ACL SETUSER ops +unlink" in told
    assert names(server) == {b"cache:1"}


@pytest.mark.parametrize("eval_too", ["+eval", "-eval"])
def test_a_user_of_the_least_commands(server: RedisServer, monkeypatch: pytest.MonkeyPatch, eval_too: str) -> None:
    """What is not measured is said to be so, and hinders nothing."""
    put(server.client(), "cache:1", "plain")
    enter_as(server, monkeypatch, "+ping", "+client|setname", "+info", "+scan", "+unlink", "+select", eval_too)
    report = clear(prefixes=("cache:",))
    assert names(server) == {b"plain"}
    assert "bytes and TTL: not measured" in warnings(report)
    assert table(report, "Keys that were unlinked")[0][3] == "not measured"


def test_a_replica_is_refused(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    group.replicas[0].register(monkeypatch)
    assert "role: slave" in failed(prefixes=("cache:",)).sentence()


@pytest.mark.parametrize("seen_by", ["Sentinels", "server"])
def test_a_replica_is_promoted_meanwhile(
    group: Group, after_page: Callable[[Callable[[int], None]], None], monkeypatch: pytest.MonkeyPatch, seen_by: str
) -> None:
    """It says how many were unlinked, and the next run goes on at the new master."""
    old = group.master
    fill(old.client(), 2000)
    monkeypatch.setattr(recheck, "RECHECK_SECONDS", 0.0 if seen_by == "Sentinels" else 1e6)

    def fail_over(page: int) -> None:
        if page == 2:
            group.fail_over()
            if seen_by == "server":
                settles(lambda: old.client().info("replication")["role"] == "slave", "its demotion")

    after_page(fail_over)
    report = failed(prefixes=("cache:",))
    new = group.at(group.agreed_master())
    assert new is not old
    assert any(word in report.sentence() for word in NO_MASTER), report.sentence()
    assert "keys were unlinked by then, the rest is untouched" in report.sentence()
    assert "launch it again" in report.sentence()
    left = len(names(new))
    assert 1000 < left < 2000
    monkeypatch.setattr(cache_sweep, "failpoint", lambda _: None)
    again = clear(prefixes=("cache:",))
    assert again.facts["server"].startswith(new.address)
    assert names(new) == set()


def test_it_propagates_to_the_replicas(group: Group) -> None:
    fill(group.master.client(), 500)
    report = clear(prefixes=("cache:",))
    assert ", replicas: 1" in report.facts["server"]
    group.master.client().set("end", 1)
    group.in_step()
    assert names(group.replicas[0]) == {b"end"}


@pytest.fixture
def durable(monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """A server whose data outlives a kill -9."""
    with running_redis(settings=("appendonly yes", "appendfsync always")) as found:
        found.register(monkeypatch)
        yield found


def test_the_server_is_killed_meanwhile(
    durable: RedisServer, after_page: Callable[[Callable[[int], None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(durable.client(), 1000)
    put(durable.client(), "kept")
    after_page(lambda page: durable.crash() if page == 3 else None)
    report = failed(prefixes=("cache:",))
    assert "does not answer: " in report.sentence()
    assert "keys were unlinked by then, the rest is untouched" in report.sentence()
    durable.start()
    assert 100 < len(names(durable)) < 1001
    monkeypatch.setattr(cache_sweep, "failpoint", lambda _: None)
    clear(prefixes=("cache:",))
    assert names(durable) == {b"kept"}


def test_the_run_is_killed_meanwhile(server: RedisServer) -> None:
    """Of a run that needed its number to be confirmed, too: fewer are the rest."""
    fill(server.client(), 1000, "session:")
    put(server.client(), "kept")
    code = (
        "from flows.redis.cache.cache import clear_cache;"
        f"clear_cache.fn({NAME!r}, prefixes=('session:',), expected_keys=1000, confirm={NAME!r})"
    )
    child = forked.run(["-c", code], {**os.environ, "OPS_FAILPOINT": "after find_keys"})
    assert (child.returncode, len(names(server))) == (-signal.SIGKILL, 1001)
    child = forked.run(["-c", DYING + code])
    assert child.returncode == -signal.SIGKILL
    assert 100 < len(names(server)) < 1000
    clear(prefixes=("session:",), expected_keys=1000)
    assert names(server) == {b"kept"}


def test_globs_and_their_beginnings() -> None:
    assert escaped(b"a[b]*:?\\^-") == rb"a\[b\]\*:\?\\\^\-"
    assert literal_head(rb"session\:\*a*") == b"session:*a"
    assert literal_head(b"[a]") == literal_head(b"*") == literal_head(b"?x") == b""
    assert literal_head(b"end\\") == b"end\\"
    assert bytes_of(r"\x2a", glob=True) == rb"\*"
    assert bytes_of("\udcff") == b"\xff"
    with pytest.raises(OpsError):
        bytes_of("\ud800")


def test_a_plan_that_was_carried_out_takes_no_new_key(server: RedisServer) -> None:
    """Confirmed again, by a copied run or by a second person who planned it too: 300 new keys stay."""
    client = server.client()
    fill(client, 500)
    plans = [clear_cache.fn(NAME, prefixes=("cache:",)) for _ in range(2)]
    clear(prefixes=("cache:",), plan=plans[0].pins["plan"])
    fill(client, 300)
    with pytest.raises(CarriedOut, match="this plan was carried out at"):
        clear(prefixes=("cache:",), plan=plans[0].pins["plan"])
    with pytest.raises(PlanChanged, match="carried out at"):
        clear(prefixes=("cache:",), plan=plans[1].pins["plan"])
    assert len(names(server)) == 300
    plan = clear_cache.fn(NAME, prefixes=("cache:",)).pins["plan"]
    for number in range(300):
        client.hset(f"cache:of-another-kind:{number}", "field", "value")
    with pytest.raises(PlanChanged, match=r"keys in db 0 of .* was 300, is 600") as shown:
        clear(prefixes=("cache:",), plan=plan)
    assert "new plan in this report" in shown.value.hint
    assert len(names(server)) == 600
    client.delete(*(f"cache:of-another-kind:{number}" for number in range(300)))
    fill(client, 310)
    clear(prefixes=("cache:",), plan=plan)
    fill(client, 300)
    plan = clear_cache.fn(NAME, prefixes=("cache:",)).pins["plan"]
    server.stop()
    server.start()
    fill(server.client(), 300)
    with pytest.raises(PlanChanged, match="was run .*, is run"):
        clear(prefixes=("cache:",), plan=plan)
    assert len(names(server)) == 300
