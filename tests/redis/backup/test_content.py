"""The manifest of content: every kind of change is found, and nothing that is equal is called different."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from blocks.redis.server import Redis
from runbook.errors import VerificationFailed
from tasks.redis.content.manifest import EXPIRING, RedisComparison, RedisContent, compare
from tasks.redis.content.reading import drop_prefixes, read_content
from tasks.redis.scratch import reason, scratch_server
from tasks.redis.server import call
from tasks.redis.settings.file import masked, read_configuration
from tests.fixtures.servers import binaries
from tests.redis.data import BINARY, fill

Change = Callable[[redis.Redis], object]
BLOCK = Redis(server_program=str(binaries().redis))
CHANGES: dict[str, tuple[Change, str]] = {
    "string": (lambda c: c.set("plain:7:0", "8"), "have other content"),
    "binary": (lambda c: c.set(BINARY, BINARY[:-1]), "have other content"),
    "bit": (lambda c: c.setbit("bits", 3, 1), "have other content"),
    "swapped values": (lambda c: c.mset({"plain:1:0": 2, "plain:2:0": 1}), "have other content"),
    "missing key": (lambda c: c.delete("plain:7:0"), r"312 keys without a TTL instead of 313 .*plain: −1"),
    "one for another": (lambda c: c.rename("plain:7:0", "plain:700:0"), "have other content"),
    "extra key": (lambda c: c.set("plain:new", 1), "keys without a TTL instead of"),
    "another database": (lambda c: c.move("plain:7:0", 5), "database 5 has 1 keys without a TTL instead of 0"),
    "list order": (lambda c: c.rpoplpush("queue", "queue"), "have other content"),
    "set member": (lambda c: c.srem("tags", BINARY), "have other content"),
    "score": (lambda c: c.zadd("ranking", {"c": 0.3}), "have other content"),
    "field": (lambda c: c.hset("profile", "f7", "x"), "have other content"),
    "stream entry": (lambda c: c.xdel("events", "7-1"), "have other content"),
    "pending entry": (lambda c: c.xack("events", "workers", "2-1"), "have other content"),
    "group": (lambda c: c.xgroup_create("events", "more", id="0"), "have other content"),
    "type": (lambda c: (c.delete("numbers"), c.zadd("numbers", {"1": 1})), "have other content"),
    "TTL longer": (lambda c: c.pexpire("session:7", 7_200_000), "1 of 601 keys with a TTL are missing or differ"),
    "TTL removed": (lambda c: c.persist("session:7"), "keys with a TTL are missing"),
    "TTL given": (lambda c: c.pexpire("plain:7:0", 7_200_000), "1 keys with a TTL are not in the backup"),
    "value with a TTL": (lambda c: c.set("session:7", "x", keepttl=True), "1 of 601 keys with a TTL"),
    "missing with a TTL": (lambda c: c.delete("session:7"), "1 of 601 keys with a TTL"),
    "field's TTL": (lambda c: c.hpersist("timed", "long"), "1 of 2 fields with a TTL"),
    "field's value": (lambda c: c.hset("fading", "only", 2), "1 of 2 fields with a TTL"),
    "function": (lambda c: c.function_delete("lib"), "function libraries differ: lib"),
}


@pytest.fixture(scope="module")
def held() -> Iterator[tuple[redis.Redis, Path, RedisContent]]:
    """A scratch server with data, saved, and its manifest."""
    with tempfile.TemporaryDirectory() as place, scratch_server(BLOCK, Path(place)) as client:
        fill({0: client})
        client.save()
        yield client, Path(place), read_content(client, Path(place) / EXPIRING)


def _against(client: redis.Redis, place: Path, expected: RedisContent) -> RedisComparison:
    return compare(expected, place / EXPIRING, read_content(client, place / "now.gz"), place / "now.gz")


@pytest.mark.parametrize("kind", CHANGES)
def test_change_is_found(held: tuple[redis.Redis, Path, RedisContent], kind: str) -> None:
    """One change at a time, told in a sentence; loaded anew from the RDB, it is equal again."""
    client, place, expected = held
    change, told = CHANGES[kind]
    change(client)
    try:
        found = _against(client, place, expected)
    finally:  # for the next one
        call(client, "DEBUG", "RELOAD", "NOSAVE")
    assert not found.is_equal
    assert re.search(told, "; ".join(found.differences)), found.differences
    assert _against(client, place, expected).is_equal


def test_encoding_is_no_difference(held: tuple[redis.Redis, Path, RedisContent]) -> None:
    """Same members in other encodings and another order of insertion (DUMP's bytes differ)."""
    client, place, expected = held
    before = {key: client.dump(key) for key in ("numbers", "profile", "ranking")}
    members = sorted(client.smembers("numbers"), reverse=True)
    client.delete("numbers")
    client.sadd("numbers", "not a number", *members)
    client.srem("numbers", "not a number")
    fields = client.hgetall("profile")
    client.delete("profile")
    client.hset("profile", mapping=dict(reversed(fields.items())))
    client.zadd("ranking", {"x" * 200: 1})
    client.zrem("ranking", "x" * 200)
    assert all(client.dump(key) != value for key, value in before.items())
    assert _against(client, place, expected).is_equal
    call(client, "DEBUG", "RELOAD", "NOSAVE")


def test_most_keys_expired_before_the_load() -> None:
    """A table that is far too big for what is left shrinks: no key is read twice."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        with scratch_server(BLOCK, place) as client:
            with client.pipeline(transaction=False) as pipe:
                for n in range(40_000):
                    pipe.set(f"soon:{n}", n, px=1500)
                for n in range(3_000):
                    pipe.set(f"stays:{n}", n, px=600_000 if n % 2 else None)
                pipe.execute()
            client.save()
            expected = read_content(client, place / EXPIRING)
            assert expected.databases[0].expiring_keys >= 1_500
        time.sleep(1.5)
        aof = place / "appendonlydir"
        aof.mkdir()
        (place / "dump.rdb").rename(aof / "appendonly.aof.1.base.rdb")
        (aof / "appendonly.aof.manifest").write_text("file appendonly.aof.1.base.rdb seq 1 type b\n")
        for _ in range(3):
            with scratch_server(BLOCK, place, appendonly=True) as client:
                found = _against(client, place, expected)
                assert found.is_equal, found.differences
                assert found.proofs[0].expiring_found == 1_500
                assert drop_prefixes(client, ["st"]) == {"st": 3_000}
                assert client.dbsize() in range(40_001)
            (aof / "appendonly.aof.1.incr.aof").unlink()
            (aof / "appendonly.aof.manifest").write_text("file appendonly.aof.1.base.rdb seq 1 type b\n")


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        # Keys lie in another order in each file, and what is told of an end depends on the key that it is in.
        (lambda b: b[: b.rindex(b"plain:") + 3], "this data: Short read or OOM"),
        (lambda b: b[: b.index(b"events") + 9], "this data: Stream .*loading failed"),
        (lambda b: b[:-4] + bytes(4), "checksum"),
        (lambda b: b"VALKEY999" + b[9:], "Can't handle RDB format version 999"),
        (lambda b: b"REDIS0012" + b[9:], "Can't handle RDB format version 12"),
        (lambda b: b"nonsense!" * 20, "Wrong signature"),
    ],
)
def test_unloadable(
    held: tuple[redis.Redis, Path, RedisContent], tmp_path: Path, harm: Callable[[bytes], bytes], told: str
) -> None:
    """The server's own reason is the message."""
    (tmp_path / "dump.rdb").write_bytes(harm((held[1] / "dump.rdb").read_bytes()))
    with pytest.raises(VerificationFailed, match=told), scratch_server(BLOCK, tmp_path):
        pass


def test_reason_of_a_kill() -> None:
    """A scratch server that the kernel ended says so."""
    assert reason("", -9) == "it was killed by signal 9 (out of memory?)"


def test_configuration(tmp_path: Path) -> None:
    """Includes, quotes, the last of two settings; and no secret in a copy."""
    (tmp_path / "more.conf").write_text('appendfilename "a b.aof"\nrequirepass "s3cret two"\n')
    path = tmp_path / "redis.conf"
    path.write_text(
        f"dbfilename one.rdb\n# dbfilename no.rdb\nDBFILENAME two.rdb\ninclude {tmp_path}/mo*.conf\nappendonly yes\n"
        "masterauth s3cret\nuser anna on >s3cret '<s3cret x' #deadbeef5 ~* +@all\nrename-command CONFIG s3cret\n"
    )
    found = read_configuration(path)
    assert (found.rdb, found.aof, found.appendonly) == ("two.rdb", ("appendonlydir", "a b.aof"), True)
    assert len(found.files) == 2
    text = "".join(masked(file) for file in found.files)
    assert "s3cret" not in text
    assert "deadbeef5" not in text
    assert "user anna on >******** <******** #******** ~* +@all" in text
