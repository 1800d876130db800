"""clear-cache on real servers: what it deletes, what it keeps, and what happens if something dies meanwhile."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from flows.redis.cache import clear_cache
from flows.redis.persistence import backup_redis
from runbook import kinds
from runbook.errors import NotConfirmed, OpsError, RunbookFailed
from runbook.guard.carried_out import CarriedOut
from runbook.guard.pins import PlanChanged
from runbook.report import Report, Status
from runbook.wait import until
from tasks.redis.cache import server as cache_server
from tasks.redis.cache import sweep as cache_sweep
from tasks.redis.cache.clearing import ClearingOrder, unlink_keys
from tasks.redis.cache.selection import by_prefixes, escaped
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
NO_MASTER = ("is no longer the master", "is a replica: it takes no writes", "is now a slave; it was a master")
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


def by_plan(**parameters: Any) -> str:
    """The plan of a run with these parameters."""
    report: Report = clear_cache.fn(NAME, **parameters)
    assert report.status is Status.PLANNED, report.sentence()
    return str(report.pins["plan"])


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


def test_a_plan_counts_and_changes_nothing(server: RedisServer) -> None:
    client = server.client()
    put(client, *STRANGE, *KEPT)
    fill(client, 300, "cache:page:", ms=3_600_000)
    before = names(server)
    report = clear_cache.fn(NAME, prefixes=("cache:",))
    assert (report.status, names(server)) == (Status.PLANNED, before)
    (row,) = table(report, "Keys to delete")
    assert row[:3] == ("db 0", "cache:", f"{300 + len(STRANGE)}")
    assert (row[4], row[5]) == (str(len(STRANGE)), row[2]), "every key was measured"
    first = table(report, "The first 20 keys")
    assert len(first) == 20
    assert {kind for _, _, kind, _, _ in first} == {"string"}
    assert f"key under cache: in db 0 of {server.address}: 310 keys" in report.plan_steps[0].detail
    assert report.plan_steps[0].bytes > 300 * 10


def test_a_prefix_takes_every_key_that_begins_so_and_no_other(server: RedisServer) -> None:
    put(server.client(), *STRANGE, *KEPT)
    report = clear(prefixes=("cache:",))
    assert names(server) == {*KEPT}
    assert report.facts["unlinked"].startswith(f"{len(STRANGE)} keys")
    assert report.facts["added meanwhile"] == "0 keys"
    assert clear(prefixes=("cache:",)).outcome.startswith("0 keys")


def test_a_prefix_is_literal(server: RedisServer) -> None:
    put(server.client(), "a[b]*:1", "a[b]*:", "ab*:1", "ab:1", "a[b]x:1", "a[b]", r"a\[b]*:1")
    clear(prefixes=("a[b]*:",))
    assert names(server) == {b"ab*:1", b"ab:1", b"a[b]x:1", b"a[b]", rb"a\[b]*:1"}


def test_several_prefixes_and_bytes(server: RedisServer) -> None:
    put(server.client(), b"\xff\x00:1", b"\xff\x01:1", "tmp:1", "tmp:deep:1", "tmq:1", rb"\xff:1")
    report = clear(prefixes=(r"\xff\x00:", "tmp:", "tmp:deep:"))
    assert names(server) == {b"\xff\x01:1", b"tmq:1", rb"\xff:1"}
    found = {row[1]: row[2] for row in table(report, "Deleted keys")}
    assert found == {r"\xff\x00:": "1", "tmp:": "1", "tmp:deep:": "1"}
    clear(prefixes=(r"\x5cxff",))
    assert names(server) == {b"\xff\x01:1", b"tmq:1"}


def test_sixteen_databases(server: RedisServer) -> None:
    for number in range(16):
        put(server.client(number), f"cache:{number}", f"kept:{number}")
    clear(prefixes=("cache:",), databases=(3, 15))
    assert [n for n in range(16) if len(names(server, n)) == 1] == [3, 15]
    report = clear(prefixes=("cache:",), databases=tuple(range(16)))
    assert all(names(server, n) == {f"kept:{n}".encode()} for n in range(16))
    assert len(table(report, "Deleted keys")) == 14
    assert "db 3: 1, " in report.facts["keys"], "the report names the databases that have keys"


def test_protected_keys_are_kept_unless_they_are_named(server: RedisServer) -> None:
    client = server.client()
    put(client, "session:1", "session:2", "session:old:1", "queue:1", "cache:1", "s:1", "sessions", "plain")
    report = clear(prefixes=("s",))
    kept = {b"session:1", b"session:2", b"session:old:1", b"queue:1", b"cache:1", b"plain"}
    assert names(server) == kept, "a shorter prefix names nothing"
    assert warnings(report)["protected keys kept"] == "session: 3"
    wanted: dict[str, Any] = {"prefixes": ("s", "session:old:")}
    assert "confirmed plan: the environment's name only" in failed(**wanted).sentence()
    clear(**wanted, plan=by_plan(**wanted))
    assert names(server) == kept - {b"session:old:1"}, "a longer prefix names no shorter one"
    wanted = {"prefixes": ("session:",)}
    clear(**wanted, plan=by_plan(**wanted))
    assert names(server) == {b"queue:1", b"cache:1", b"plain"}


def test_keys_without_a_ttl(server: RedisServer, after_page: Callable[[Callable[[int], None]], None]) -> None:
    """Keys that get a TTL between the pages are kept."""
    client = server.client()
    fill(client, 1000, "cache:stays:")
    fill(client, 20, "cache:timed:", ms=3_600_000)
    put(client, "plain")
    wanted: dict[str, Any] = {"prefixes": ("cache:",), "only_without_ttl": True}
    assert "confirmed plan" in failed(**wanted).sentence()
    plan = clear_cache.fn(NAME, **wanted)
    assert plan.plan_steps[0].detail == f"key under cache: without a TTL in db 0 of {server.address}: 1,000 keys"
    kept = {b"plain", *(f"cache:timed:{n}".encode() for n in range(20))}

    def set_ttl(page: int) -> None:
        for key in (f"cache:stays:{n}".encode() for n in range(50) if page == 1):
            if client.pexpire(key, 3_600_000):
                kept.add(key)

    after_page(set_ttl)
    report = clear(**wanted, plan=plan.pins["plan"])
    assert len(kept) > 21
    assert names(server) == kept
    assert int(report.facts["kept because of their TTL"].split()[0]) >= 20


def test_flush_databases(server: RedisServer) -> None:
    for number in (0, 1, 3):
        fill(server.client(number), 100)
    assert "confirmed plan" in failed(flush=True).sentence()
    report = clear_cache.fn(NAME, flush=True, databases=(0, 3, 5))
    assert [step.detail for step in report.plan_steps] == [f"db {n} of {server.address}: 100 keys" for n in (0, 3)]
    assert report.outcome.startswith("200 keys would be deleted")
    assert warnings(report)["newest backup of Redis"] == "none"
    plan = str(report.pins["plan"])
    for change in (put, redis.Redis.delete):
        change(server.client(), *(f"more:{n}" for n in range(21)))
        assert (len(names(server)) == 100) is (change is not put)
        if change is put:
            with pytest.raises(PlanChanged, match="keys in db 0, db 3, db 5 of .* was 200, is 221"):
                clear(flush=True, databases=(0, 3, 5), plan=plan)
    report = clear(flush=True, databases=(0, 3, 5), plan=plan)
    assert (names(server), len(names(server, 1)), names(server, 3)) == (set(), 100, set())
    assert report.outcome == "200 keys flushed"
    outcome = clear_cache.fn(NAME, flush=True, databases=(3, 5)).outcome
    assert outcome == f"there is nothing to delete: no key in db 3, db 5 of {server.address}"


def test_a_flush_is_refused_while_there_are_protected_keys(server: RedisServer) -> None:
    put(server.client(), "session:1", "queue:1", "a")
    with pytest.raises(RunbookFailed, match="protected keys: session: 1, queue: 1") as raised:
        clear_cache.fn(NAME, flush=True)
    (found,) = [found for found in raised.value.report.findings if found.name == "protected keys"]
    assert found.follow[0].parameters == {"prefixes": ["session:", "queue:"]}
    wanted: dict[str, Any] = {"prefixes": ("session:", "queue:")}
    clear(**wanted, plan=by_plan(**wanted))
    clear(flush=True, plan=by_plan(flush=True))
    assert names(server) == set()


def test_a_flush_is_refused_if_keys_were_added_after_the_check(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(server.client(), 100)
    plan = by_plan(flush=True)

    def add(point: str) -> None:
        if point == "before flush_keys":
            fill(server.client(), 50, "new:")

    monkeypatch.setattr(kinds, "failpoint", add)
    told = failed(flush=True, plan=plan).sentence()
    assert "100 keys were planned, now there are 150" in told
    assert f"db 0 of {server.address} (100 keys) was not flushed" in told
    assert len(names(server)) == 150


def test_it_stops_if_more_keys_are_added_than_the_plan_tolerates(
    server: RedisServer, after_page: Callable[[Callable[[int], None]], None]
) -> None:
    fill(server.client(), 1000, "session:")
    plan = by_plan(prefixes=("session:",))

    def add(page: int) -> None:
        if len(names(server)) <= 1000:
            fill(server.client(), 1000, f"session:new:{page}:")

    after_page(add)
    report = failed(prefixes=("session:",), plan=plan)
    assert "there are more keys than the 1,000 planned ones" in report.sentence()
    assert "keys were unlinked by then, the rest is untouched" in report.sentence()
    assert names(server)


def test_bytes_of_many_keys_are_those_of_a_sample(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.redis.cache.clearing.MEASURED_KEYS", 100)
    fill(server.client(), 2000)
    fill(server.client(), 10, "rare:")
    rows = {row[1]: row for row in table(clear_cache.fn(NAME, flush=True), "Keys to delete")}
    exact = sum(server.client().memory_usage(f"cache:{n}") or 0 for n in range(2000))
    about = float(rows["cache:"][3].removeprefix("≈ ").removesuffix(" kB")) * 1000
    assert rows["cache:"][3].startswith("≈ ")
    assert int(rows["cache:"][5]) < 1000
    assert abs(about - exact) < exact / 10
    assert rows["rare:"][5] != "0"
    (row,) = table(clear_cache.fn(NAME, prefixes=("cache:",)), "Keys to delete")
    assert row[3].startswith("≈ ")


def test_invalid_parameters(server: RedisServer) -> None:
    put(server.client(), "a")
    for parameters, told in (
        ({}, "name prefixes or choose flush, one of them"),
        ({"prefixes": ("a",), "flush": True}, "one of them"),
        ({"prefixes": ("a", "")}, "an empty prefix means every key"),
        ({"prefixes": ("a",), "databases": ()}, "name the databases"),
        ({"flush": True, "only_without_ttl": True}, "only_without_ttl needs prefixes"),
        ({"prefixes": ("\ud800",)}, "cannot be part of a key"),
    ):
        assert told in failed(**parameters).sentence()
    assert names(server) == {b"a"}


@pytest.mark.parametrize("command", ["unlink", "evalsha"])
def test_a_user_without_a_command(server: RedisServer, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    put(server.client(), "cache:1")
    enter_as(server, monkeypatch, "+@all", f"-{command}")
    told = failed(prefixes=("cache:",)).sentence()
    assert f"forbids user ops the command {command.upper()}" in told
    assert f"ACL SETUSER ops +{command}" in told
    assert names(server) == {b"cache:1"}


def test_a_user_with_the_fewest_commands(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that cannot be measured are reported, and nothing else depends on them."""
    put(server.client(), "cache:1", "plain")
    enter_as(
        server, monkeypatch, "+ping", "+client|setname", "+info", "+scan", "+unlink", "+select", "+eval", "+evalsha"
    )
    report = clear(prefixes=("cache:",))
    assert names(server) == {b"plain"}
    assert warnings(report)["bytes and TTL"].startswith("not measured")
    assert table(report, "Deleted keys")[0][3] == "not measured"


def test_the_run_is_killed_meanwhile(server: RedisServer) -> None:
    """Confirmed again, with the same plan, it deletes the rest."""
    fill(server.client(), 1000, "session:")
    put(server.client(), "kept")
    plan = by_plan(prefixes=("session:",))
    code = (
        "from flows.redis.cache import clear_cache;"
        f"clear_cache.fn({NAME!r}, prefixes=('session:',), plan={plan!r}, confirm={NAME!r})"
    )
    child = forked.run(["-c", code], {**os.environ, "OPS_FAILPOINT": "after find_keys"})
    assert (child.returncode, len(names(server))) == (-signal.SIGKILL, 1001)
    child = forked.run(["-c", DYING + code])
    assert child.returncode == -signal.SIGKILL
    assert 100 < len(names(server)) < 1000
    clear(prefixes=("session:",), plan=plan)
    assert names(server) == {b"kept"}


def test_prefixes_are_literal_bytes() -> None:
    assert escaped(b"a[b]*:?\\^-") == rb"a\[b\]\*:\?\\\^\-"
    assert bytes_of(r"\x2a", glob=True) == rb"\*"
    assert bytes_of("\udcff") == b"\xff"
    with pytest.raises(OpsError):
        bytes_of("\ud800")


def test_a_writer_adds_keys_and_others_expire_meanwhile(
    server: RedisServer, after_page: Callable[[Callable[[int], None]], None]
) -> None:
    client = server.client()
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
    left = {name for name in names(server) if name.startswith(b"cache:")}
    assert left <= added, "what was there before is gone"
    assert report.facts["added meanwhile"] == f"{len(left)} keys"
    assert any(name.startswith(b"other:") for name in names(server))


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
    (row,) = table(report, "Deleted keys")
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


def test_a_permit_is_needed(server: RedisServer) -> None:
    put(server.client(), "cache:1")
    with pytest.raises(NotConfirmed):
        clear_cache.fn(NAME, prefixes=("cache:",), confirm="production")
    block = server.block()
    order = ClearingOrder(
        by_prefixes([b"cache:"], [], "key under cache:", without_ttl=False), (0,), read_cache_server(block)
    )
    with pytest.raises(NotConfirmed):
        unlink_keys.bind(block, order)()
    assert names(server) == {b"cache:1"}


def test_the_newest_backup_is_named(server: RedisServer) -> None:
    put(server.client(), "cache:1", ms=3_600_000)
    assert clear_cache.fn(NAME, prefixes=("cache:",)).facts["undo"] == "none: the application creates these keys again"
    put(server.client(), "cache:2")
    plan = clear_cache.fn(NAME, prefixes=("cache:",))
    assert warnings(plan)["newest backup of Redis"] == "none"
    name = backup_redis.fn(NAME).facts["backup"]
    plan = clear_cache.fn(NAME, prefixes=("cache:",))
    assert f"the newest backup, {name}" in plan.facts["undo"]


def test_wrong_password(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", "wrong")
    assert "refuses the password" in failed(prefixes=("cache:",)).sentence()


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
    monkeypatch.setattr(cache_server, "RECHECK_SECONDS", 0.0 if seen_by == "Sentinels" else 1e6)

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
    assert "run it again" in report.sentence() or "run it again" in report.sentence()
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
