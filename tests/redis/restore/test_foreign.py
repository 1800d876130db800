"""Files without a manifest: what the manual's commands left, RDB files of other versions, and what is broken."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from blocks.environment import Environment
from flows.redis.persistence import backup_redis, restore_redis
from runbook import shell
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.redis.backup.aof import read_aof
from tasks.redis.backup.foreign import is_foreign
from tasks.redis.backup.rdb import Readable, crc64, read_rdb, read_readable
from tasks.redis.backup.snapshot import RDB
from tasks.redis.server import family, holders, program_version
from tests.fixtures.reports import finding as found
from tests.fixtures.servers import free_port
from tests.redis.conftest import NAME, Rig
from tests.redis.data import account, fill, survivors
from tests.redis.servers import RedisServer

OWN = {"valkey": ("VALKEY080", "REDIS0012"), "redis": ("REDIS0012", "VALKEY080")}
"""The newest RDB that a family writes, and one of the other's that it cannot read."""


def encoded(header: bytes, keys: dict[bytes, bytes], *, checksum: bool = True) -> bytes:
    """An RDB of strings, as old servers wrote it (https://rdb.fnordig.de/file_format.html)."""

    def string(content: bytes) -> bytes:
        return (
            bytes([len(content)]) + content
            if len(content) < 64
            else b"\x80" + len(content).to_bytes(4, "big") + content
        )

    notes = {b"redis-ver": b"4.0.14", b"ctime": b"1771100000"}
    body = header + b"".join(b"\xfa" + string(name) + string(value) for name, value in notes.items())
    body += b"\xfe\x00" + b"".join(b"\x00" + string(name) + string(value) for name, value in keys.items()) + b"\xff"
    return body + (crc64(body).to_bytes(8, "little") if checksum else bytes(8))


def restore(wanted: object) -> Report:
    return restore_redis.fn(NAME, str(wanted), confirm=NAME)


def refused(rig: Rig, wanted: object) -> str:
    """Its reason; the service was not touched."""
    started = rig.run_id()
    with pytest.raises(RunbookFailed) as failure:
        restore(wanted)
    assert rig.run_id() == started, "the service was touched"
    assert not list(rig.store.glob(".at-hand-*")), "something was left at hand"
    return failure.value.report.sentence()


@pytest.fixture
def saved(rig: Rig) -> Path:
    """§2.3, literally: BGSAVE, and a copy of dump.rdb in the store."""
    fill({0: rig.client(), 5: rig.client(5)})
    rig.client().save()
    rig.store.mkdir(exist_ok=True)
    return Path(shutil.copy(rig.data / "my dump.rdb", rig.store / "dump_20260215.rdb"))


@contextlib.contextmanager
def by_hand(rig: Rig, directory: Path) -> Iterator[int]:
    """A server that no service started, in that directory."""
    rig.account.directory(directory, 0o700)
    options = ["--port", str(free_port()), "--dir", str(directory), "--save", ""]
    with shell.spawn([rig.program, *options], user=rig.account.name if rig.account.is_other else "") as child:
        block = Environment.find(NAME).redis
        until(lambda: child.pid in holders(block, directory), what="the server's start", seconds=30)
        yield child.pid


def test_a_server_that_somebody_started_by_hand_is_named_in_the_plan(rig: Rig, saved: Path) -> None:
    """The stop of the service would not end it."""
    rig.services.stop("redis")
    with by_hand(rig, rig.data) as pid, pytest.raises(RunbookFailed, match=f"its service .*: process {pid} works in "):
        restore_redis.fn(NAME, str(saved))


def test_a_server_whose_directory_was_removed_keeps_nobody_from_its_name(rig: Rig, saved: Path) -> None:
    """Another system's that had the same path: it cannot write there."""
    rig.services.stop("redis")
    aside = rig.data.with_name("aside")
    rig.data.rename(aside)
    with by_hand(rig, rig.data):
        shutil.rmtree(rig.data)
        aside.rename(rig.data)
        assert restore(saved).status is Status.WARN


@pytest.mark.parametrize("by", ["name", "path"])
def test_an_rdb_restores_and_is_said_to_be_unproven(rig: Rig, saved: Path, by: str) -> None:
    before = {number: account(rig.client(number)) for number in (0, 5)}
    rig.client().flushall()
    wanted = saved.name if by == "name" else saved
    plan = restore_redis.fn(NAME, str(wanted))
    assert plan.status is Status.PLANNED
    assert rig.client().dbsize() == 0
    report = restore(wanted)
    assert report.status is Status.WARN
    assert found(report, "no manifest").status is Status.WARN
    assert {number: account(rig.client(number)) for number in (0, 5)} == {
        number: survivors(keys) for number, keys in before.items()
    }
    assert not list(rig.store.glob(".verified/*"))
    assert not list(rig.store.glob(".at-hand-*"))
    assert saved.exists()


@pytest.mark.parametrize("version", [b"REDIS0006", b"REDIS0009", b"REDIS0010", b"REDIS0011"])
def test_rdb_files_of_older_servers_are_accepted(rig: Rig, version: bytes) -> None:
    path = rig.root / "old.rdb"
    path.write_bytes(encoded(version, {b"a": b"1", b"b\0\xff": b"x" * 1000}))
    report = restore(path)
    assert report.status is Status.WARN
    assert found(report, "RDB version").status is Status.OK
    assert f"{version.decode()} of redis 4.0.14" in found(report, "RDB version").value
    taken = datetime(2026, 2, 14, 20, 13, 20, tzinfo=UTC)
    assert report.losses["Redis"].since == taken, "the moment that the RDB itself tells"
    assert {key: rig.client().get(key) for key in rig.client().scan_iter()} == {b"a": b"1", b"b\0\xff": b"x" * 1000}


@pytest.mark.parametrize("kind", ["other family's", "newer", "of our own backup"])
def test_a_version_that_this_server_cannot_read_is_refused_with_the_reason(rig: Rig, kind: str) -> None:
    """Before anything is loaded or stopped."""
    rig.client().set("a", 1)
    program = program_version(rig.environment.redis)
    own, other = OWN[family(program)]
    header = {"other family's": other, "newer": own[:-3] + "099", "of our own backup": other}[kind].encode()
    if kind == "of our own backup":
        name = backup_redis.fn(NAME).facts["backup"]
        path = rig.store / name / "dump.rdb"
        path.write_bytes(header + path.read_bytes()[9:])
        assert "dump.rdb was altered" in refused(rig, name), "a backup's files are compared with its manifest first"
        return
    path = rig.root / "new.rdb"
    path.write_bytes(encoded(header, {b"a": b"1"}))
    sentence = refused(rig, path)
    assert f"{header.decode()} of redis 4.0.14: {program} cannot read the RDB of redis 4.0.14" in sentence
    assert "cannot read each other's newer RDB files" in sentence


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"user 7 of 0") + 5] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (flip, "checksum"),
        (cut, "the server cannot load this data"),
        (lambda path: path.write_bytes(b""), "is no RDB"),
        (lambda path: path.write_text("no RDB at all"), "is no RDB: it begins with b'no RDB at'"),
        (lambda path: path.unlink(), "does not exist|cannot be read"),
        (lambda path: path.chmod(0), "" if os.geteuid() == 0 else "cannot be read"),
    ],
    ids=["a flipped bit", "cut off", "empty", "something else", "gone", "unreadable"],
)
def test_a_broken_rdb_is_refused_before_anything_stops(
    rig: Rig, saved: Path, harm: Callable[[Path], object], told: str
) -> None:
    harm(saved)
    before = account(rig.client())
    if not told:
        assert restore(saved).status is Status.WARN, "root reads every file"
        return
    sentence = refused(rig, saved)
    assert any(word in sentence for word in told.split("|")), sentence
    assert account(rig.client()) == before


def test_an_rdb_without_a_checksum_is_said_to_be(rig: Rig, saved: Path) -> None:
    """rdbchecksum no: nobody can see a flipped bit in a value, and the report says that."""
    saved.write_bytes(saved.read_bytes()[:-8] + bytes(8))
    flip(saved)
    report = restore(saved)
    assert found(report, "checksum of the RDB").status is Status.WARN
    assert rig.client().get("session:7") == b"user 6 of 0", "it was flipped, and nobody could know"


@pytest.fixture
def aof(rig: Rig) -> Path:
    """A copy of the rig's AOF: a base, and what was appended."""
    fill({0: rig.client()})
    rig.client().bgrewriteaof()
    until(lambda: not rig.client().info("persistence")["aof_rewrite_in_progress"], what="the rewrite", seconds=120)
    rig.client().mset({f"later:{n}": n for n in range(100)})
    rig.store.mkdir(exist_ok=True)
    return Path(shutil.copytree(rig.data / "aof files", rig.store / "appendonlydir"))


def test_an_appendonlydir_restores_unproven(rig: Rig, aof: Path) -> None:
    before = account(rig.client())
    rig.client().flushall()
    report = restore("appendonlydir")
    assert report.status is Status.WARN
    assert "AOF of 2 files" in report.facts["backup"]
    assert account(rig.client()) == survivors(before)


@pytest.mark.parametrize("kind", ["commands", "with a preamble"])
def test_a_single_aof_of_before_redis_7_restores(rig: Rig, kind: str) -> None:
    """`appendonly_20260215.aof` of §2.3: commands only, or an RDB and then commands."""
    rig.store.mkdir(exist_ok=True)
    path = rig.store / "appendonly_20260215.aof"
    commands = b"*2\r\n$6\r\nSELECT\r\n$1\r\n3\r\n" + b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$4\r\n\0\r\n\xff\r\n"
    preamble = encoded(b"REDIS0009", {b"old": b"1"}) if kind != "commands" else b""
    path.write_bytes(preamble + commands)
    report = restore(path.name)
    assert report.status is Status.WARN, report.sentence()
    assert rig.client(3).get("k") == b"\0\r\n\xff"
    assert rig.client().get("old") == (b"1" if preamble else None)


def test_what_was_cut_off_an_aof_is_told_in_bytes(rig: Rig, aof: Path) -> None:
    """As a crash leaves it: the last command is not whole."""
    last = read_aof(aof).parts[-1].path
    whole = last.read_bytes()
    last.write_bytes(whole + b"*3\r\n$3\r\nSET\r\n$7\r\nunfin")
    report = restore("appendonlydir")
    assert found(report, "end of the AOF").value.startswith("22 bytes of an incomplete command")
    assert rig.client().get("later:99") == b"99"
    assert rig.client().exists("unfin") == 0


def break_command(aof: Path) -> None:
    last = read_aof(aof).parts[-1].path
    content = last.read_bytes()
    last.write_bytes(content.replace(b"$8\r\nlater:50\r\n", b"$9\r\nlater:50\r\n"))


def lose_part(aof: Path) -> None:
    read_aof(aof).parts[0].path.unlink()


def lose_base_line(aof: Path) -> None:
    (manifest,) = aof.glob("*.manifest")
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(line for line in lines if not line.rstrip().endswith("type b")))


@pytest.mark.parametrize(
    ("harm", "wanted", "told"),
    [
        (break_command, "appendonlydir", "Bad file format"),
        (lose_part, "appendonlydir", "is missing"),
        (lose_base_line, "appendonlydir", "names no base"),
        (lambda aof: next(aof.glob("*.manifest")).unlink(), "appendonlydir", "has 0 manifests"),
        (lambda aof: next(aof.glob("*.manifest")).write_text("nonsense\n"), "appendonlydir", "is no manifest"),
        (lambda aof: next(aof.glob("*.manifest")).write_text(""), "appendonlydir", "names no file"),
        (lambda aof: None, "appendonlydir/log.aof.2.incr.aof", "is only one file of an AOF"),
        (lambda aof: (aof / "x.aof").write_text(""), "appendonlydir/x.aof", "is empty"),
        (lambda aof: (aof / "x.aof").write_text("hello\n"), "appendonlydir/x.aof", "Bad file format"),
        (lambda aof: None, "nowhere/appendonlydir", "does not exist"),
    ],
)
def test_a_broken_aof_is_refused_before_anything_stops(
    rig: Rig, aof: Path, harm: Callable[[Path], object], wanted: str, told: str
) -> None:
    harm(aof)
    before = account(rig.client())
    assert told in refused(rig, wanted)
    assert account(rig.client()) == before


def test_a_path_of_one_of_our_backups_is_sent_to_its_name(rig: Rig) -> None:
    rig.client().set("a", 1)
    name = backup_redis.fn(NAME).facts["backup"]
    assert f"run it with backup={name}" in refused(rig, rig.store / name)
    assert f"run it with backup={name}" in refused(rig, rig.store / name / RDB), "its SHA-256 would not be asked"


def test_a_disk_that_refuses_the_copy_is_told_and_nothing_is_left_of_it(rig: Rig) -> None:
    """No file may be longer than 400 kB: what a full disk says, in the middle of a file."""
    rig.client().set("big", random.randbytes(1 << 20))
    name = backup_redis.fn(NAME).facts["backup"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        told = refused(rig, name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in told
    assert "free disk space" in told
    assert not list(rig.data.parent.glob("*.restoring"))


def test_prefixes_of_a_foreign_file(server: RedisServer, tmp_path: Path) -> None:
    path = tmp_path / "old.rdb"
    path.write_bytes(encoded(b"REDIS0009", {b"session:1": b"old", b"other": b"old"}))
    server.client().set("other", "live")
    report = restore_redis.fn(NAME, str(path), prefixes=["session:"], confirm=NAME)
    assert report.status is Status.WARN
    assert server.client().mget("session:1", "other") == [b"old", b"live"]


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.rdb"
    path.write_bytes(encoded(b"REDIS0009", {b"a": b"1"}, checksum=False))
    told = read_rdb(path)
    assert (told.version, told.tool, told.checksum, told.written.year) == (9, "redis 4.0.14", False, 2026)
    path.write_bytes(encoded(b"REDIS0009", {}))
    assert read_rdb(path).checksum
    assert crc64(b"123456789") == 0xE9C6D914C4B8D9CA
    assert Readable(12, "valkey 9", (*range(1, 12), 80)).describe() == "valkey 9 reads RDB versions up to 11, and 80"
    assert [is_foreign(name) for name in ("latest", "20260215", "dump_20260215_030000", "a.rdb", "/x", "x/")] == (
        [False, False, False, True, True, False]
    )


def test_the_server_program_itself_says_what_it_reads(rig: Rig) -> None:
    block = rig.environment.redis
    own, other = OWN[family(program_version(block))]
    assert read_readable(block, int(own[-3:])).ok
    assert not read_readable(block, int(other[-3:])).ok


def test_bytes_after_the_end_of_an_rdb_are_left_off_and_said(rig: Rig) -> None:
    """A server that loads an RDB stops at its end; as the base of an AOF it read on, and blamed an AOF."""
    for tail in (b"\n", bytes(4096), b"*3\r\n$3\r\nSET\r\n$1\r\nx\r\n$1\r\n1\r\n"):
        path = rig.root / "longer.rdb"
        path.write_bytes(encoded(b"REDIS0009", {b"a": b"1"}) + tail)
        report = restore(path)
        assert found(report, "bytes after the end of the RDB").status is Status.WARN
        assert {key: rig.client().get(key) for key in rig.client().scan_iter()} == {b"a": b"1"}
    path.write_bytes(path.read_bytes()[:60])
    assert "AOF" not in refused(rig, path), "it was cut off: no advice about an AOF"
