"""check-redis-memory: its limits, prefixes, keys and TTLs, on real servers with known data."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from flows.redis.memory.check import check_redis_memory, judge_policy
from flows.redis.memory.limits import judge_memory
from runbook.errors import OpsError, RunbookFailed, Unreachable
from runbook.page.plots import Bar, bars, shares
from runbook.report import Report, Status
from runbook.wait import until
from tasks.redis.memory import sweep
from tasks.redis.memory.info import Memory, read_memory
from tasks.redis.memory.listing import find_first_keys
from tasks.redis.memory.script import TTL_NAMES
from tasks.redis.memory.sweep import Survey, survey_keys
from tests.redis import servers
from tests.redis.data import BINARY, fill
from tests.redis.servers import NAME, Group, RedisServer, settles

USER, PASSWORD = "ops", "x"
# The environment needs a service manager; servers of tests have none.


@pytest.fixture
def server(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> RedisServer:
    server.register(monkeypatch)
    return server


def run(**options: object) -> Report:
    report: Report = check_redis_memory.fn(NAME, **options)
    return report


def finding(report: Report, name: str) -> tuple[Status, str]:
    found = [found for found in report.findings if found.name.startswith(name)]
    (only,) = [each for each in found if each.name == name] or found
    return only.status, only.value


def rows(report: Report, name: str) -> list[tuple[str, ...]]:
    found = [found for found in report.evidence if found.name.startswith(name) and found.columns]
    (only,) = [each for each in found if each.name == name] or found
    return list(only.rows)


def add_user(server: RedisServer, rules: str, keys: str = "~*") -> None:
    words = ("ACL", "SETUSER", USER, "on", f">{PASSWORD}", keys, "&*", "+@all", *rules.split())
    server.client().execute_command(*words)


def as_user(server: RedisServer, budget_seconds: float = 60.0) -> Survey:
    return survey_keys(server.block(username=USER, password=PASSWORD), budget_seconds)


def truth(client: redis.Redis) -> dict[bytes, tuple[int, int]]:
    """Prefix → (keys, bytes), command by command."""
    found: dict[bytes, tuple[int, int]] = {}
    for key in client.scan_iter(count=1000):
        before, colon, _ = key.partition(b":")
        prefix = (before + colon)[:64] if colon else b""
        keys, size = found.get(prefix, (0, 0))
        found[prefix] = keys + 1, size + client.memory_usage(key)
    return found


def told(survey: Survey, database: int) -> dict[bytes, tuple[int, int]]:
    return {p.prefix: (int(p.keys.value), int(p.size.value)) for p in survey.prefixes if p.database == database}


def test_keys_and_bytes_of_every_type_in_sixteen_databases_are_those_of_the_commands(server: RedisServer) -> None:
    clients = {number: server.client(number) for number in range(16)}
    fill(clients)
    survey = survey_keys(server.block(), 60)
    assert survey.is_complete
    assert [found.database for found in survey.databases] == list(range(16))
    for number, client in clients.items():
        expected, found = truth(client), told(survey, number)
        assert {prefix: keys for prefix, (keys, _) in found.items()} == {p: keys for p, (keys, _) in expected.items()}
        for prefix, (_, size) in expected.items():  # the biggest collections are measured, the others guessed
            assert math.isclose(found[prefix][1], size, rel_tol=0.0 if prefix == b"plain:" else 0.06), prefix
    database = survey.databases[3]
    assert database.keys.value == clients[3].dbsize()
    assert set(database.sizes_by_type) == {"string", "list", "set", "zset", "hash", "stream"}
    assert database.persistent_keys == clients[3].dbsize() - clients[3].info("keyspace")["db3"]["expires"]


def test_ttls_types_and_collections_are_counted(server: RedisServer) -> None:
    client = server.client()
    fill({0: client})
    for n, seconds in enumerate((30, 1800, 7200, 2 * 86400, 30 * 86400)):
        client.set(f"ttl:{n}", "x", ex=seconds)
    client.set("ttl:never", "x")
    client.set("x" * 100 + ":long", "a prefix is cut at 64 bytes")
    survey = survey_keys(server.block(), 60)
    (found,) = [found for found in survey.prefixes if found.prefix == b"ttl:"]
    assert (found.ttls, found.persistent_keys, found.types) == ((1, 1, 1, 1, 1, 1), 1, {"string": 6})
    assert b"x" * 64 in {found.prefix for found in survey.prefixes}
    collections = {(key.key, key.elements) for key in survey.biggest_by_type if key.type != "string"}
    assert collections >= {(b"queue", 501), (b"events", 19)}


def test_the_biggest_keys_are_those_of_most_bytes_not_of_most_elements(server: RedisServer) -> None:
    client = server.client()
    client.sadd("many", *range(3000))
    client.rpush("few", *(b"x" * 100_000 for _ in range(20)))
    client.set("one", b"x" * 5_000_000)
    client.hset("h", mapping={"a": 1, "b": 2})
    report = run()
    assert [(row[1], row[2], row[4]) for row in rows(report, "Biggest keys")[:2]] == [
        ("one", "string", ""),
        ("few", "list", "20"),
    ]
    by_type = {row[2]: row[1] for row in rows(report, "Biggest keys of each type")}
    assert by_type == {"string": "one", "list": "few", "set": "many", "hash": "h"}


def test_what_it_reads_touches_no_key(server: RedisServer) -> None:
    client = server.client()
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.rpush("list", 1, 2, 3)
    client.set("string", "x")
    until(
        lambda: min(client.object("IDLETIME", key) for key in ("list", "string")) >= 1,
        what="an idle second",
        seconds=120,
    )
    run(pattern="*")
    assert client.object("IDLETIME", "list") >= 1
    assert client.object("IDLETIME", "string") >= 1


def test_binary_keys_are_shown_escaped_and_counted(server: RedisServer) -> None:
    client = server.client()
    for key in (BINARY, b"new\nline:1", b"nul\0:1", b"\xff\xfe:1", b"", b":", "鍵:1".encode(), b"a b:1"):
        client.set(key, b"x" * 1000)
    report = run(pattern="*")
    assert len(rows(report, "First 100 keys of *")) == 8
    shown = {row[1] for row in rows(report, "Biggest prefixes")}
    assert {"new\\x0aline:", "nul\\x00:", "\\xff\\xfe:", "(no colon)", ":", "鍵:", "a b:"} <= shown
    assert report.path
    page = report.path.with_suffix(".md").read_text(encoding="utf-8")
    assert "鍵:1" in page
    assert "\0" not in page


def test_a_pattern_lists_its_first_hundred_keys_with_type_ttl_and_bytes(server: RedisServer) -> None:
    client = server.client(2)
    with client.pipeline(transaction=False) as pipe:
        for n in range(3000):
            pipe.set(f"session:{n}", "x", ex=100_000)
            pipe.set(f"other:{n}", "x")
        pipe.execute()
    found = rows(run(pattern="session:*"), "First 100 keys of session:*")
    assert len(found) == 100
    assert all(row[0] == "db 2" and row[1].startswith("session:") and row[2] == "string" for row in found)
    assert found[0][3].startswith("27 h")
    assert found[0][4] == f"{client.memory_usage(found[0][1])} B"
    (only,) = rows(run(pattern="other:77"), "First 100 keys")
    assert only[1:4] == ("other:77", "string", "no expiry")
    assert not any(found.name.startswith("First") for found in run().evidence)


def test_a_search_for_a_pattern_that_runs_out_of_time_says_so(server: RedisServer) -> None:
    server.client().mset({f"k:{n}": n for n in range(5000)})
    report = run(pattern="nothing", budget_seconds=1e-6)
    assert finding(report, "incomplete search for nothing")[0] is Status.WARN
    assert not find_first_keys(server.block(), "k:*", 100, 0.0).is_complete


def test_keys_without_expiry_are_told_by_prefix_and_never_as_expired(server: RedisServer) -> None:
    client = server.client()
    for n in range(50):
        client.set(f"cache:{n}", "x")
        client.set(f"profile:{n}", "x" * 500)
        client.set(f"session:{n}", "x", ex=1000)
    report = run()
    assert report.facts["keys without expiry"] == "100 of 150 (66.7%)"
    assert [row[1:3] for row in rows(report, "Keys without expiry")] == [("profile:", "50"), ("cache:", "50")]
    assert finding(report, "cache: keys expire")[1].startswith("50 never expire")
    ttls = {row[1]: row[2] for row in rows(report, "TTL by prefix")}
    assert ttls == {"profile:": "100.0%", "cache:": "100.0%", "session:": "0.0%"}
    client.delete(*(f"cache:{n}" for n in range(50)))
    assert finding(run(), "cache: keys expire")[0] is Status.OK


def test_the_limit_is_judged_at_80_and_90_percent(server: RedisServer) -> None:
    client = server.client()
    client.set("big", b"x" * 20_000_000)
    client.close()  # the server keeps as much for its next command, and lets it go after a while
    client.config_set("maxmemory-policy", "volatile-lru")
    for ratio, status in ((0.7, Status.OK), (0.85, Status.WARN), (0.95, Status.CRITICAL)):
        client.config_set("maxmemory", int(client.info("memory")["used_memory"] / ratio))
        report = Report("x", NAME)
        judge_memory(report, read_memory(server.block()))
        assert finding(report, "redis.memory.used_ratio")[0] is status, ratio
    with pytest.raises(RunbookFailed, match=r"redis\.memory\.used_ratio .* delete cached keys"):
        run()


def test_without_a_limit_the_host_s_memory_is_the_measure(server: RedisServer) -> None:
    report = run()
    assert finding(report, "maxmemory is 0")[0] is Status.WARN
    status, value = finding(report, "redis.memory.host_ratio")
    assert status is Status.OK
    assert float(value.removesuffix(" %")) < 50


def test_an_environment_s_own_thresholds_win(server: RedisServer) -> None:
    report = Report("x", NAME, limits={"redis.memory.host_ratio": (-1.0, -1.0)})
    judge_memory(report, read_memory(server.block()))
    assert finding(report, "redis.memory.host_ratio")[0] is Status.CRITICAL


def test_a_policy_that_does_not_fit_the_keys_is_found(server: RedisServer) -> None:
    client = server.client()
    client.mset({f"session:{n}": "x" for n in range(20)})
    client.config_set("maxmemory", 100_000_000)
    wanted = {"noeviction": Status.OK, "volatile-lru": Status.WARN, "allkeys-lru": Status.WARN}
    for policy, status in wanted.items():
        client.config_set("maxmemory-policy", policy)
        found, value = finding(run(), "eviction policy")
        assert (found, value.startswith(policy)) == (status, True)
    client.delete(*(f"session:{n}" for n in range(20)))
    client.set("cache:1", "x", ex=1000)
    assert finding(run(), "eviction policy")[0] is Status.OK


def test_evicted_keys_are_told_since_the_start_and_during_the_report(server: RedisServer) -> None:
    client = server.client()
    client.config_set("maxmemory-policy", "allkeys-random")
    memory = read_memory(server.block())
    client.config_set("maxmemory", memory.used + 1_000_000)
    for n in range(40):
        client.set(f"k:{n}", b"x" * 100_000)
    report = Report("x", NAME)
    client.config_set("maxmemory", 0)
    evicted = int(client.info("stats")["evicted_keys"])
    judge_policy(report, memory, survey_keys(server.block(), 60), [], evicted)
    status, value = finding(report, "evicted keys")
    assert status is Status.WARN
    assert evicted > 0
    assert value.startswith(f"{evicted} since its start")
    assert value.endswith(f"{evicted} during this report")


def changed(memory: Memory, **values: object) -> Memory:
    return Memory(**{**vars(memory), **values})  # type: ignore[arg-type]


def test_fragmentation_is_judged_only_where_the_ratio_tells_something(server: RedisServer) -> None:
    found = read_memory(server.block())
    assert found.used < 100_000_000
    assert found.swapped >= 0, "the test's server is on this host"
    big = changed(found, used=1_000_000_000, resident=1_800_000_000, swapped=0, fragmentation=1.8)
    for memory, name, status in (
        (changed(found, fragmentation=8.0), "", Status.OK),
        (big, "redis.memory.fragmentation", Status.WARN),
        (changed(big, fragmentation=1.2), "redis.memory.fragmentation", Status.OK),
        (changed(big, swapped=50_000_000), "memory is swapped out", Status.WARN),
        (changed(big, swapped=-1, fragmentation=0.6, resident=600_000_000), "memory is swapped out", Status.WARN),
    ):
        report = Report("x", NAME)
        judge_memory(report, memory)
        if name:
            assert finding(report, name)[0] is status
        else:
            assert "not judged below" in report.facts["fragmentation"]
            assert not [f for f in report.findings if "fragmentation" in f.name]


def test_an_empty_server_is_well(server: RedisServer) -> None:
    report = run(pattern="*")
    assert report.facts["sweep"].startswith("0 of 0 keys")
    assert rows(report, "Databases") == []


def test_pictures_are_svg_whatever_a_prefix_has_in_it(server: RedisServer) -> None:
    import xml.etree.ElementTree as ET
    from xml.sax.saxutils import escape

    server.client().set(b'<&"\0\xff>:1', "x")
    for picture in [found.svg for found in run().evidence if found.svg]:
        assert ET.fromstring(picture).tag.endswith("svg")  # noqa: S314
    assert ET.fromstring(bars([Bar("a", (3.0,), "3"), Bar("b", (0.0,), "0")])) is not None  # noqa: S314
    drawn = shares([Bar("a", (1.0, 0.0, 0.0, 0.0, 0.0, 3.0), "4")], TTL_NAMES)
    assert drawn.count('id="bar-0-') == len(TTL_NAMES)
    assert all(f">{escape(name)}<" in drawn for name in TTL_NAMES)


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("scan", "SCAN"),
        ("memory|usage", r"MEMORY\|USAGE"),
        ("type", "TYPE"),
        ("pttl", "PTTL"),
        ("info", "INFO"),
        ("evalsha_ro", "EVALSHA_RO"),
    ],
)
def test_a_user_without_a_command_is_told_which(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, command: str, named: str
) -> None:
    server.client().set("k", "v")
    add_user(server, f"-{command}")
    server.register(monkeypatch, extra=f'username = "{USER}"\n')
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", PASSWORD)
    with pytest.raises(RunbookFailed, match=rf"forbids user {USER} the command {named}"):
        run(pattern="*")


def test_keys_that_the_user_may_not_read_are_counted_as_not_measured(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.client().mset({f"{'app' if n % 4 else 'private'}:{n}": n for n in range(1000)})
    add_user(server, "", keys="~app:*")
    server.register(monkeypatch, extra=f'username = "{USER}"\n')
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", PASSWORD)
    report = run(pattern="*")
    assert finding(report, "not measured") == (Status.WARN, "250 keys that the user may not read")
    assert [row[1:3] for row in rows(report, "Biggest prefixes")] == [("app:", "750")]
    assert finding(report, "not measured of *")[0] is Status.WARN


def test_a_wrong_password_is_one_clear_sentence(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", "wrong")
    with pytest.raises(RunbookFailed, match="refuses the password"):
        run()


def test_keys_that_expire_during_the_sweep_are_left_out(server: RedisServer) -> None:
    client = server.client()
    call = client.execute_command
    call("DEBUG", "SET-ACTIVE-EXPIRE", "0")
    with client.pipeline(transaction=False) as pipe:
        for n in range(2000):
            pipe.set(f"gone:{n}", "x", px=1)
            pipe.set(f"there:{n}", "x")
        pipe.execute()
    until(lambda: client.get("gone:1999") is None, what="their expiry", seconds=120)
    assert told(survey_keys(server.block(), 60), 0) == {b"there:": (2000, truth(client)[b"there:"][1])}


@contextlib.contextmanager
def when(ready: Callable[[], object], act: Callable[[], object]) -> Iterator[None]:
    """Act in the moment that something is so, beside the block."""
    thread = threading.Thread(target=lambda: (until(ready, what="the moment", seconds=120, every_seconds=0.002), act()))
    thread.start()
    try:
        yield
    finally:
        thread.join()


def populate(client: redis.Redis, keys: int) -> None:
    """DEBUG POPULATE is not replicated."""
    for first in range(0, keys, 10_000):
        client.mset({f"k:{n}": "x" for n in range(first, min(first + 10_000, keys))})


def sweeping(server: RedisServer) -> Callable[[], bool]:
    client = server.client()
    return lambda: int(client.info("commandstats").get("cmdstat_evalsha_ro", {}).get("calls", 0)) > 5


def test_a_server_that_dies_during_the_sweep_is_one_clear_sentence(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    populate(server.client(), 150_000)
    real, pages = sweep.read_page, iter(range(1, 1_000_000))

    def read_page(*words: Any) -> object:
        if next(pages) == 10:
            server.crash()
        return real(*words)

    monkeypatch.setattr(sweep, "read_page", read_page)
    with pytest.raises(RunbookFailed, match="does not answer") as raised:
        run()
    assert raised.value.report.findings[-1].hint
    with pytest.raises(Unreachable):
        survey_keys.work(server.block(), 60)


def test_the_master_is_the_one_that_the_sentinels_name(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    group.register(monkeypatch)
    group.master.client().set("k", "v")
    new = group.lose_master()
    report = run()
    assert report.facts["server"].startswith(f"{new.address}, master")
    assert report.facts["sweep"].startswith("1 of 1 keys")


def test_a_failover_during_the_report_is_said(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old master lives on, alone: what was read of it is no longer what clients write to."""
    group.register(monkeypatch)
    populate(group.master.client(), 150_000)
    settles(lambda: group.replicas[0].client().dbsize() == 150_000, "the replica")
    with when(sweeping(group.master), group.fail_over):
        report = _slowly(group)
    assert finding(report, "the master changed during this report") == (Status.WARN, group.replicas[0].address)


def _slowly(group: Group) -> Report:
    """A report whose last step comes after the failover."""
    from flows.redis.memory import check as module

    report = Report("x", NAME)
    block = group.master.block(sentinels=[s.address for s in group.sentinels], sentinel_master=servers.MASTER)
    server = module.judge_master(report, block, module.read_sentinels(block), changes=False)
    survey_keys(server, 60)
    group.wait_for_master_other_than(group.master)
    module.judge_same_master(report, server.address, module.read_sentinels(block))
    return report


def test_a_replica_alone_is_told_as_one(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    group.replicas[0].register(monkeypatch)
    assert finding(run(), "role") == (Status.WARN, "slave")


def test_refusals_are_no_retries(server: RedisServer) -> None:
    add_user(server, "-scan")
    with pytest.raises(OpsError, match=r"\+scan") as raised:
        as_user(server)
    assert not isinstance(raised.value, Unreachable)


def test_reports_are_written(server: RedisServer) -> None:
    report = run()
    assert report.path
    assert Path(report.path).exists()
    assert report.outcome.endswith("keys use 0 B")
