"""Restore of chosen prefixes into a server that goes on serving: what is asked for comes back, and nothing else moves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis

from flows.database.backup import prune_backups
from flows.redis.backup import keep_live
from flows.redis.persistence import backup_redis, restore_redis
from flows.redis.restore import prefixes as prefix_steps
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.backups import manifest
from tasks.backups.manifest import Manifest
from tasks.redis.content.manifest import compare
from tasks.redis.keys import read_prefix, widest
from tasks.redis.line import RedisLine, live_line
from tasks.redis.restore import prefixes, values
from tasks.redis.restore.prefixes import restore_keys
from tasks.redis.restore.values import same_value
from tasks.redis.server import call
from tests.fixtures.killed import exit_code_at
from tests.fixtures.stand_in import replace_step
from tests.redis.data import BINARY, LONG_MS, account, fill
from tests.redis.servers import NAME, Group, RedisServer, settles

HARD = (b"s p:a b", b"s p:\n\r\0", b"s p:" + BINARY, b"s p:[glob]*?\\", b"s p:")
PREFIX = "s p:"


def restore(*prefixes: str, **more: Any) -> Report:
    """As a plan confirms it that showed a few keys to remove."""
    few = {"expected_removed": 10} if "extra" in more else {}
    return restore_redis.fn(NAME, prefixes=[*prefixes], confirm=NAME, **few | more)


def refused(*prefixes: str, **more: Any) -> Report:
    with pytest.raises(RunbookFailed) as failure:
        restore(*prefixes, **more)
    return failure.value.report


def real_restore(*arguments: Any) -> Any:
    """The real action, under the permit of the run that calls it."""
    return restore_keys.bind(*arguments[:4])(*arguments[4:])


def status(report: Report, name: str) -> Status:
    return next(found.status for found in report.findings if found.name == name)


@pytest.fixture
def filled(server: RedisServer) -> RedisServer:
    """Data of every type in two databases, hard names, and a backup."""
    fill({0: server.client(), 9: server.client(9)})
    for number in (0, 9):
        with server.client(number).pipeline() as pipe:
            for name in HARD:
                pipe.set(name, name)
            pipe.execute()
    backup_redis.fn(NAME)
    return server


def test_only_what_is_asked_for_comes_back(filled: RedisServer) -> None:
    """Binary names, every type, times; keys of other prefixes keep what clients wrote since the backup."""
    before = {number: account(filled.client(number)) for number in (0, 9)}
    for number in (0, 9):
        client = filled.client(number)
        client.delete(*HARD, "profile", "events")
        client.set("session:1", "spoilt")
        client.set("session:new", "made since")
        client.set("plain:1:0", "written since")
    plan = restore_redis.fn(NAME, prefixes=["session:", PREFIX, "profile", "events"])
    assert plan.status is Status.PLANNED
    assert filled.client().get("session:1") == b"spoilt", "a plan changes nothing"
    report = restore("session:", PREFIX, "profile", "events")
    assert report.status is Status.OK, report.sentence()
    for number in (0, 9):
        expected = before[number]
        expected[b"session:new"] = (b"string", -1, b"made since")
        expected[b"plain:1:0"] = (b"string", -1, b"written since")
        assert account(filled.client(number)) == expected
    assert "equal the backup's" in report.outcome


def test_extra_keys_go_where_that_is_ordered_and_the_undo_brings_them_back(filled: RedisServer) -> None:
    client = filled.client()
    client.mset({"session:new": "made since", "session:1": "spoilt", "sessions": "another prefix"})
    before = account(client)
    report = restore("session:", extra="remove")
    assert report.status is Status.OK, report.sentence()
    assert client.exists("session:new") == 0
    assert client.get("session:1") == b"user 1 of 0"
    assert client.get("sessions") == b"another prefix"
    assert report.facts["keys deleted"] == "1"
    kept = report.facts["live data kept as"]
    assert kept in report.facts["undo"]
    undone = restore("session:", backup=kept, extra="remove")
    assert undone.status is Status.OK, undone.sentence()
    assert account(client) == before


def test_more_keys_than_the_plan_showed_are_not_removed(filled: RedisServer) -> None:
    """What is confirmed is the plan's number: without it, or with many more keys since, nothing goes."""
    client = filled.client()
    client.mset({f"session:extra {n}": 1 for n in range(20)})
    plan = restore_redis.fn(NAME, prefixes=["session:"], extra="remove")
    assert plan.pins["expected_removed"] == 20
    assert (
        "expected_removed: 20 live keys would be deleted"
        in refused("session:", extra="remove", expected_removed=0).sentence()
    )
    client.mset({f"session:since {n}": 1 for n in range(5)})
    told = refused("session:", extra="remove", expected_removed=20).sentence()
    assert "plan again with an empty confirm" in told
    assert client.exists("session:extra 1", "session:since 1") == 2
    client.delete("session:since 1", "session:since 2", "session:since 3")
    report = restore("session:", extra="remove", expected_removed=20)
    assert report.facts["keys deleted"] == "22"


def test_what_restores_kept_is_listed_and_goes_by_the_safe_rule(filled: RedisServer) -> None:
    """Old ones only, and only while a newer backup is verified; they count as no backup themselves."""
    kept = str(restore("session:").facts["live data kept as"])
    store = filled.root / "backups"
    taken = datetime.now(UTC) - timedelta(days=40)
    old = f"dump_{taken:%Y%m%d_%H%M%S}"
    shutil.copytree(store / kept, store / old)
    content = json.loads((store / old / "manifest.json").read_text())
    manifest.write(store / old, Manifest.model_validate({**content, "name": old, "taken": taken.isoformat()}))
    note = next((store / ".verified").iterdir())
    away = note.rename(store / "away.json")
    plan = prune_backups.fn(NAME, kind="redis", keep_verified=1, hours=720, daily=0, weekly=0, monthly=0)
    assert "nothing to delete" in plan.outcome, "no backup is verified"
    away.rename(note)
    plan = prune_backups.fn(NAME, kind="redis", keep_verified=1, hours=720, daily=0, weekly=0, monthly=0)
    assert [step.detail.split(",")[0] for step in plan.plan_steps] == [old]
    report = prune_backups.fn(
        NAME, kind="redis", keep_verified=1, hours=720, daily=0, weekly=0, monthly=0, confirm=NAME
    )
    (table,) = [each for each in report.evidence if each.name.startswith("All backups")]
    assert [(row[0], row[1]) for row in table.rows if "kept" in row[1]] == [(kept, "redis, kept by a restore")]
    assert not (store / old).exists()


def test_latest_never_means_what_a_restore_kept(filled: RedisServer) -> None:
    """It is newer than the backup, and holds what was found wrong."""
    filled.client().set("session:1", "spoilt")
    first = restore("session:")
    filled.client().set("session:1", "spoilt again")
    second = restore("session:")
    assert first.facts["backup"] == second.facts["backup"]
    assert filled.client().get("session:1") == b"user 1 of 0"


def test_a_key_whose_time_came_since_the_backup_is_not_brought_back(server: RedisServer) -> None:
    client = server.client()
    client.set("s:short", 1, px=1500)
    client.set("s:long", 1, px=LONG_MS)
    backup_redis.fn(NAME)
    until(lambda: not client.exists("s:short"), what="its end", seconds=120)
    client.set("s:short", "a client's own")
    client.delete("s:long")
    report = restore("s:")
    assert client.get("s:short") == b"a client's own"
    assert client.pttl("s:long") > LONG_MS / 2
    assert report.status is Status.OK, report.sentence()


def test_fields_that_expire_and_pending_entries_come_along(filled: RedisServer) -> None:
    client = filled.client()
    before = account(client)
    client.delete("timed", "fading", "events")
    assert restore("timed", "fading", "events").status is Status.OK
    assert account(client) == before


def test_large_values_go_one_at_a_time(server: RedisServer) -> None:
    """100 MB in one string, and large collections, compared in small pieces; a spoilt one is noticed."""
    client = server.client()
    client.set("big:string", os.urandom(1 << 20) * 100)
    with client.pipeline(transaction=False) as pipe:
        for n in range(40_000):
            pipe.rpush("big:list", f"entry {n}" + "x" * 40)
            pipe.sadd("big:set", f"entry {n}" + "x" * 40)
            pipe.zadd("big:zset", {f"entry {n}" + "x" * 40: n})
            pipe.hset("big:hash", f"field {n}", "x" * 40)
        for n in range(6_000):
            pipe.xadd("big:stream", {"n": "x" * 300}, id=f"{n + 1}-1")
        pipe.xgroup_create("big:stream", "workers", id="0")
        pipe.execute()
    backup_redis.fn(NAME)
    names = sorted(client.keys("big:*"))
    client.delete(*names)
    report = restore("big:")
    assert report.status is Status.OK, report.sentence()
    assert sorted(client.keys("big:*")) == names
    assert report.facts["values above 1 MiB"].startswith("6, one at a time")
    assert client.info("commandstats")["cmdstat_getrange"]["calls"] >= 400, "100 MB were read in one piece"


CHANGES: dict[str, tuple[bytes, Callable[[redis.Redis], object]]] = {
    "string": (b"string", lambda c: c.setrange("string", 700_000, "x")),
    "list": (b"list", lambda c: c.lset("list", 20_000, "x")),
    "set": (b"set", lambda c: (c.srem("set", "entry 7"), c.sadd("set", "entry x"))),
    "zset": (b"zset", lambda c: c.zadd("zset", {"entry 7": 8.5})),
    "hash": (b"hash", lambda c: c.hset("hash", "field 7", "x")),
    "field's time": (b"hash", lambda c: call(c, "HPEXPIRE", "hash", LONG_MS, "FIELDS", 1, "field 7")),
    "stream": (b"stream", lambda c: c.xdel("stream", "1500-1")),
    "entry": (b"stream", lambda c: (c.xdel("stream", "20000-1"), c.xadd("stream", {"n": "y"}, id="30001-1"))),
    "pending": (b"stream", lambda c: c.xreadgroup("workers", "anna", {"stream": ">"}, count=1)),
    "time": (b"set", lambda c: c.pexpire("set", LONG_MS)),
    "type": (b"list", lambda c: (c.delete("list"), c.set("list", "x"))),
}


def large_values(client: redis.Redis) -> list[bytes]:
    """One of each type, each compared in several pieces; their names."""
    entries = range(30_000)
    with client.pipeline(transaction=False) as pipe:
        pipe.set("string", "a" * 1_000_000)
        pipe.rpush("list", *entries)
        pipe.sadd("set", *(f"entry {n}" for n in entries))
        pipe.zadd("zset", {f"entry {n}": n for n in entries})
        pipe.hset("hash", mapping={f"field {n}": n for n in entries})
        for n in entries:
            pipe.xadd("stream", {"n": "x"}, id=f"{n + 1}-1")
        pipe.xgroup_create("stream", "workers", id="0")
        pipe.execute()
    return [b"string", b"list", b"set", b"zset", b"hash", b"stream"]


class Other(RedisLine):
    """A line that answers with the keys of database 1."""

    def pipe(self, database: int, commands: Any, *, together: bool = False) -> list[Any]:
        return super().pipe(1, commands, together=together)


def test_a_change_in_a_large_value_is_found_in_pieces(server: RedisServer) -> None:
    client, other = server.client(), server.client(1)
    names = large_values(client)
    block = server.block()
    with live_line(block) as first, contextlib.closing(Other(block, block.client(), scratch=False)) as second:
        for name in names:
            client.copy(name, name, destination_db=1)
            assert same_value(first, second, 0, name, True), name
        for kind, (name, change) in CHANGES.items():
            change(other)
            assert not same_value(first, second, 0, name, True), kind
            client.copy(name, name, destination_db=1, replace=True)


def test_what_clients_write_meanwhile_is_told_apart(filled: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a key is restored a client writes it: that is its right, it is told, and never called equal."""
    client = filled.client()
    carried = real_restore

    def and_then_a_client_writes(*arguments: Any) -> Any:
        done = carried(*arguments)
        client.set("session:1", "a client's own")
        client.delete("session:2")
        client.set("session:brand new", 1)
        return done

    replace_step(monkeypatch, prefix_steps, "restore_keys", and_then_a_client_writes)
    report = restore("session:", extra="remove")
    assert report.status is Status.WARN, report.sentence()
    (told,) = [found for found in report.findings if found.name == "written by clients meanwhile"]
    assert told.value.startswith("3 keys")
    assert client.get("session:1") == b"a client's own"
    assert client.get("session:brand new") == b"1", "what a client made meanwhile is not removed"


def test_what_clients_make_after_the_counting_is_spared(filled: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The permit names what was there when it was counted."""
    client = filled.client()
    client.set("session:old extra", 1)

    def and_a_client_writes(*arguments: Any) -> Any:
        client.set("session:brand new", 1)
        return keep_live(*arguments)

    monkeypatch.setattr(prefix_steps, "keep_live", and_a_client_writes)
    report = restore("session:", extra="remove")
    assert report.facts["keys deleted"] == "1; 1 that clients had just written were kept"
    assert client.exists("session:old extra") == 0
    assert client.get("session:brand new") == b"1"


@pytest.mark.parametrize("moment", ["redis: counted", "redis: others removed"])
def test_keys_of_the_backup_that_expire_meanwhile(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Each is another key that the backup does not have (any more): the run goes on, and ends with the backup's keys."""
    client, real = server.client(), prefixes.failpoint
    ends = datetime.now(UTC) + timedelta(seconds=6)
    with client.pipeline() as pipe:
        for number in range(200):
            pipe.set(f"session:{number}", number)
            if number % 2:
                pipe.expireat(f"session:{number}", ends)
        pipe.execute()
    backup_redis.fn(NAME)
    for number in range(1, 200, 2):
        client.persist(f"session:{number}")
    client.set("session:old extra", 1)

    def passes(name: str) -> None:
        real(name)
        if name == moment:
            assert datetime.now(UTC) < ends or moment != "redis: counted", "the backup took too long"
            until(lambda: datetime.now(UTC) > ends, what="the end of these keys", seconds=60)

    def and_time_passes(*arguments: Any) -> Any:
        passes("redis: counted")
        return keep_live(*arguments)

    monkeypatch.setattr(prefixes, "failpoint", passes)
    monkeypatch.setattr(prefix_steps, "keep_live", and_time_passes)
    report = restore("session:", extra="remove")
    assert report.status is Status.OK, report.sentence()
    assert {*client.keys()} == {f"session:{number}".encode() for number in range(0, 200, 2)}


def test_what_the_backup_replaced_is_said_to_be_lost(filled: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client writes a key after the live data was kept, and the backup's takes its place."""

    def and_a_client_writes(*arguments: Any) -> Any:
        kept = keep_live(*arguments)
        filled.client().set("session:1", "a client's own")
        return kept

    monkeypatch.setattr(prefix_steps, "keep_live", and_a_client_writes)
    report = restore("session:")
    assert report.status is Status.WARN, report.sentence()
    (told,) = [found for found in report.findings if found.name.endswith("are lost")]
    assert told.value.startswith("up to 2 keys"), "one of that name is in another database, and that is not told"


def test_damage_that_no_client_made_is_critical(filled: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeded failure: the restore itself writes something wrong (its own connection is not told of)."""
    carried = real_restore

    def wrongly(block: Any, scratch: Any, live: RedisLine, *rest: Any) -> Any:
        done = carried(block, scratch, live, *rest)
        live.call(9, "SET", "session:7", "wrong")
        live.call(0, "SET", "session:extra", "wrong")
        return done

    replace_step(monkeypatch, prefix_steps, "restore_keys", wrongly)
    report = refused("session:", extra="remove")
    sentence = report.sentence()
    assert "database 9: 1 keys are different (session:7)" in sentence
    assert "database 0: 1 keys are not in the backup (session:extra)" in sentence
    assert "restore-redis with backup=" in sentence


def test_without_word_of_writes_a_difference_is_not_called_equal(
    filled: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ACL user who may not subscribe."""
    commands = ["+@all", "-client|tracking"]
    filled.client().acl_setuser("ops", enabled=True, passwords=["+x"], keys=["*"], channels=["*"], commands=commands)
    filled.register(monkeypatch, extra='username = "ops"')
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", "x")
    carried = real_restore

    def and_then_a_client_writes(*arguments: Any) -> Any:
        done = carried(*arguments)
        filled.client().set("session:1", "a client's own")
        return done

    replace_step(monkeypatch, prefix_steps, "restore_keys", and_then_a_client_writes)
    report = restore("session:")
    assert report.status is Status.WARN
    assert status(report, "live keys equal to the backup") is Status.WARN
    assert "their writes are unknown" in report.sentence()
    assert "CLIENT|TRACKING" in report.sentence()


@pytest.mark.parametrize("command", ["restore", "dump", "eval_ro", "memory|usage", "unlink", "scan"])
def test_a_command_that_is_forbidden_is_named(
    filled: RedisServer, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Before anything is changed."""
    commands = ["+@all", f"-{command}"]
    filled.client().acl_setuser("ops", enabled=True, passwords=["+x"], keys=["*"], channels=["*"], commands=commands)
    filled.register(monkeypatch, extra='username = "ops"')
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", "x")
    filled.client().set("session:1", "spoilt")
    if command == "dump":
        assert restore("session:").status is Status.OK, "the live server's keys are not dumped"
        return
    report = refused("session:", extra="remove")
    assert f"forbids user ops the command {command.upper()}" in report.sentence()
    assert filled.client().get("session:1") == b"spoilt"


def test_names_are_judged(filled: RedisServer) -> None:
    assert "an empty prefix" in refused("").sentence()
    assert "keys under the prefixes" in refused("nobody has this:").sentence()
    assert read_prefix(r"a\xff\x00:b") == b"a\xff\0:b"
    assert widest([b"a:", b"a:b:", b"b", b"a:"]) == (b"a:", b"b")


def test_a_server_without_room_is_refused_before(filled: RedisServer) -> None:
    used = filled.client().info("memory")["used_memory"]
    filled.client().config_set("maxmemory", used + 1000)
    before = account(filled.client())
    assert "memory of the live server" in refused("session:").sentence()
    assert account(filled.client()) == before


@pytest.mark.parametrize("where", ["redis: others removed", "redis: keys carried", "before compare_keys"])
def test_killed_anywhere_it_ends_well_when_launched_again(filled: RedisServer, where: str) -> None:
    before = account(filled.client())
    filled.client().set("session:1", "spoilt")
    filled.client().set("session:new", "made since")
    assert _killed(where) == -signal.SIGKILL
    report = restore("session:", extra="remove")
    assert report.status is Status.OK, report.sentence()
    assert account(filled.client()) == before


def _killed(failpoint: str) -> int:
    return exit_code_at(failpoint, lambda: restore("session:", extra="remove"))


@contextlib.contextmanager
def beside(work: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_a_server_that_dies_in_the_middle_is_said_to(filled: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    carry, calls = real_restore, list[int]()

    def dying(*arguments: Any) -> Any:
        calls.append(1)
        with beside(filled.crash):
            while True:
                carry(*arguments)

    replace_step(monkeypatch, prefix_steps, "restore_keys", dying)
    report = refused("session:")
    assert calls
    assert "does not answer" in report.sentence()
    assert report.state
    assert "has all keys of before" in report.state.value


def test_a_replica_promoted_under_its_feet(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """The master that is written to becomes a replica in the middle: said so; launched again, the new one is found."""
    client = group.master.client()
    client.mset({f"session:{n}": n for n in range(500)})
    client.set("other", 1)
    backup_redis.fn(NAME)
    client.set("session:1", "spoilt")

    def and_then_a_failover(*arguments: Any) -> Any:
        kept = keep_live(*arguments)
        group.fail_over()
        settles(lambda: client.info("replication")["role"] == "slave", "the old one to follow")
        return kept

    monkeypatch.setattr(prefix_steps, "keep_live", and_then_a_failover)
    report = refused("session:")
    assert f"{group.agreed_master()} was promoted during the restore" in report.sentence()
    assert "run it again" in report.sentence()
    monkeypatch.setattr(prefix_steps, "keep_live", keep_live)
    again = restore("session:")
    assert again.status in (Status.OK, Status.WARN), again.sentence()
    assert again.facts["server"] == group.agreed_master() != group.master.address
    assert group.at(group.agreed_master()).client().get("session:1") == b"1"


@pytest.mark.parametrize("where", ["keep_live", "restore_keys"])
def test_a_master_that_was_replaced_and_still_takes_writes(
    group: Group, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """For ten seconds after a failover the old master does not know of it: what is restored there is lost."""
    group.master.client().set("session:1", 1)
    backup_redis.fn(NAME)
    group.master.client().set("session:1", "spoilt")
    real = keep_live if where == "keep_live" else real_restore

    def and_then_a_failover(*arguments: Any) -> Any:
        done = real(*arguments)
        group.fail_over()
        return done

    replace_step(monkeypatch, prefix_steps, where, and_then_a_failover)
    assert f"{group.replicas[0].address} was promoted during the restore" in refused("session:").sentence()
    assert group.replicas[0].client().get("session:1") == (b"spoilt" if where == "keep_live" else b"1")


def test_nothing_is_restored_where_no_sentinel_vouches_for_the_master(group: Group) -> None:
    """It may have been replaced long ago. A backup is taken all the same, and says so."""
    group.master.client().set("session:1", 1)
    assert backup_redis.fn(NAME).status is Status.OK
    for sentinel in group.sentinels:
        sentinel.crash()
    assert backup_redis.fn(NAME).status is Status.WARN
    group.master.client().set("session:1", "spoilt")
    report = refused("session:")
    assert status(report, "the Sentinels vouch for the master") is Status.CRITICAL
    assert "run it with master=" not in report.sentence(), "restore-redis has no such parameter"
    assert group.master.client().get("session:1") == b"spoilt"


def test_a_backup_that_is_not_what_its_manifest_says_restores_nothing(
    filled: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlike(expected: Any, *rest: Any) -> Any:
        return compare(expected.model_copy(update={"functions": {"gone": "x"}}), *rest)

    monkeypatch.setattr(prefix_steps, "compare", unlike)
    filled.client().set("session:1", "spoilt")
    assert "the backup equals its manifest" in refused("session:").sentence()
    assert filled.client().get("session:1") == b"spoilt"


def test_a_module_s_type_is_never_called_equal(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.client().set("a", 1)
    monkeypatch.delitem(values._COMPARED, b"string")
    with live_line(server.block()) as line, pytest.raises(OpsError, match="cannot be compared"):
        same_value(line, line, 0, b"a", False)
