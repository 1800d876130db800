"""check-redis-persistence against real servers, each with one thing wrong."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import redis

from flows.redis.persistence import check_redis_persistence, snapshot_redis
from flows.redis.persistence_files import judge_place
from flows.redis.persistence_findings import judge_cost, judge_last, judge_loss, settings_of
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.redis.persistence.files import read_manifest
from tasks.redis.persistence.place import DataDirectory, read_place
from tasks.redis.persistence.state import Persistence, read_persistence
from tasks.redis.persistence.written import read_written
from tasks.redis.settings.recommended import SettingRule, covers, normal
from tests.redis.servers import NAME, PASSWORD, Group, RedisServer, running_redis

MANUAL = ("save 900 1 300 10 60 10000", "appendonly yes")
# What a test's host may be like: nothing that a server of some kB tells.
OF_THE_HOST = {
    *("overcommit_memory", "memory for a save", "free space for a save and a rewrite"),
    *("redis.fork_seconds", "redis.aof.delayed_fsyncs_per_hour"),
}
Change = Callable[[RedisServer], object]


def register(server: RedisServer, monkeypatch: pytest.MonkeyPatch, **fields: str) -> None:
    """As the environment NAME, without services; fields of [redis] beside the usual ones."""
    server.register(monkeypatch, extra="".join(f'{name} = "{value}"\n' for name, value in fields.items()))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """A server with the manual's settings and some keys."""
    with running_redis(settings=MANUAL) as server:
        register(server, monkeypatch)
        fill(server)
        yield server


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """The same without an AOF."""
    with running_redis(settings=MANUAL[:1]) as server:
        register(server, monkeypatch)
        fill(server)
        yield server


def fill(server: RedisServer, keys: int = 3000) -> None:
    """Keys without a TTL."""
    with server.client().pipeline(transaction=False) as pipe:
        for n in range(keys):
            pipe.set(f"key:{n}", "x" * 50)
        pipe.execute()


def check() -> Report:
    """The flow's report, however it ended."""
    try:
        return check_redis_persistence.fn(NAME)
    except RunbookFailed as error:
        return error.report


def found(report: Report, status: Status) -> dict[str, str]:
    """Findings of a status but for the host's, with value and hint."""
    return {
        f.name.split(" (")[0]: f"{f.value} → {f.hint}"
        for f in report.findings
        if f.status is status and f.name.split(" (")[0] not in OF_THE_HOST
    }


def wrong(report: Report) -> dict[str, str]:
    """All that is not well."""
    return found(report, Status.WARN) | found(report, Status.CRITICAL)


def child_of(server: RedisServer) -> psutil.Process:
    """The process that saves."""
    process = psutil.Process(int(server.client().info("server")["process_id"]))
    return until(lambda: next(iter(process.children()), None), what="a save", seconds=120, every_seconds=0.01)  # type: ignore[return-value]


def break_a_save(server: RedisServer) -> None:
    """A save whose process is killed, as where memory runs out: the server refuses writes from then on."""
    client = server.client()
    client.config_set("rdb-key-save-delay", 100_000)  # minutes: it is in the middle whenever it is killed
    client.bgsave()
    child_of(server).kill()
    until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", what="the failure", seconds=120)
    client.config_set("rdb-key-save-delay", 0)


def test_all_is_well(kept: RedisServer) -> None:
    report = check()
    assert wrong(report) == {}
    assert report.facts["settings as in the manual"] == "9 of 9"
    assert "about the last second" in report.outcome
    assert report.facts["server"].startswith(f"{kept.address} (master")
    files = next(item for item in report.evidence if item.name == "Files")
    assert [row[1] for row in files.rows] == ["RDB", "AOF manifest", "AOF base", "AOF increment"]


@pytest.mark.parametrize(
    ("setting", "value", "name"),
    [
        ("save", "900 1", "save"),
        ("save", "", "save"),
        ("stop-writes-on-bgsave-error", "no", "stop-writes-on-bgsave-error"),
        ("rdbcompression", "no", "rdbcompression"),
        ("appendfsync", "no", "appendfsync"),
        ("auto-aof-rewrite-percentage", "0", "auto-aof-rewrite-percentage"),
        ("auto-aof-rewrite-percentage", "101", "auto-aof-rewrite-percentage"),
        ("auto-aof-rewrite-min-size", "1gb", "auto-aof-rewrite-min-size"),
        ("no-appendfsync-on-rewrite", "yes", "no-appendfsync-on-rewrite"),
    ],
)
def test_a_setting_that_is_worse(kept: RedisServer, setting: str, value: str, name: str) -> None:
    """Told with what to do; and so is that it is not what the file says."""
    kept.client().config_set(setting, value)
    told = wrong(check())
    assert set(told) == {name, "configuration file"}
    assert told[name].split(" → ")[1].startswith("set it")
    assert setting in told["configuration file"]
    kept.client().config_rewrite()
    assert set(wrong(check())) == {name}


def test_what_is_stricter_is_as_well(kept: RedisServer) -> None:
    for setting, value in (
        ("save", "60 1"),
        ("appendfsync", "always"),
        ("auto-aof-rewrite-percentage", "50"),
        ("auto-aof-rewrite-min-size", "1mb"),
    ):
        kept.client().config_set(setting, value)
    assert set(wrong(check())) == {"configuration file"}
    assert "no acknowledged write" in check().facts["a kill now would lose"]
    assert covers((SettingRule(60, 1),), SettingRule(300, 10))
    assert not covers((SettingRule(60, 11), SettingRule(301, 1)), SettingRule(300, 10))


def test_no_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be set at run time."""
    with running_redis(settings=(*MANUAL, "rdbchecksum no")) as server:
        register(server, monkeypatch)
        assert "and restart" in wrong(check())["rdbchecksum"]


def test_persistence_is_off(server: RedisServer) -> None:
    fill(server)
    critical = found(check(), Status.CRITICAL)
    assert set(critical) == {"persistence", "the RDB"}
    assert "no automatic save; no AOF" in critical["persistence"]
    assert "3,000 changes of the last" in check().facts["a kill now would lose"]


def test_a_server_that_refuses_writes(kept: RedisServer) -> None:
    """It refuses PING as well. A save that ends well opens it again."""
    break_a_save(kept)
    with pytest.raises(redis.ResponseError, match="MISCONF"):
        kept.client().set("k", "v")
    told = found(check(), Status.CRITICAL)
    assert set(told) == {"takes writes", "last save"}
    assert "the last save failed" in told["takes writes"]
    assert "take a snapshot" in told["takes writes"]
    assert snapshot_redis.fn(NAME).status is not Status.CRITICAL
    kept.client().set("k", "v")
    assert wrong(check()) == {}


def test_an_aof_that_cannot_be_written(kept: RedisServer) -> None:
    """The server's own words for it, on a real reading."""
    server = read_persistence(kept.block())
    assert server.refuses_writes == ""
    broken = replace(server, state=replace(server.state, write_ok=False))
    assert broken.refuses_writes == "its AOF cannot be written"
    replica = replace(broken, state=replace(broken.state, role="slave"))
    assert replica.refuses_writes == ""


def test_a_directory_that_its_user_cannot_write(kept: RedisServer) -> None:
    kept.data.chmod(0o555)
    try:
        told = found(check(), Status.CRITICAL)
        assert set(told) == {"the data directory"}
        assert f"{kept.account.name}, the server's user, cannot write to {kept.data}" in told["the data directory"]
        kept.client().bgsave()
        until(lambda: "takes writes" in found(check(), Status.CRITICAL), what="the failed save", seconds=120)
        assert "chown" in found(check(), Status.CRITICAL)["takes writes"]
    finally:
        kept.data.chmod(0o755)


def test_the_directory_is_gone(kept: RedisServer) -> None:
    """Also where a new one has its name: the server still stands in the removed one."""
    shutil.rmtree(kept.data)
    told = found(check(), Status.CRITICAL)
    assert f"its directory {kept.data} is missing" in told["the data directory"]
    assert "save the data over the network" in told["the data directory"]
    assert "all 3,000 keys" in next(f.name for f in check().findings if f.name.startswith("redis.loss_seconds"))
    kept.account.directory(kept.data, 0o755)
    assert "was deleted and created again" in found(check(), Status.CRITICAL)["the data directory"]


def test_a_file_of_the_aof_is_missing(kept: RedisServer) -> None:
    """Named; the server would not start. A rewrite writes it anew."""
    (base,) = kept.data.glob("appendonlydir/*.base.rdb")
    base.unlink()
    told = found(check(), Status.CRITICAL)
    assert set(told) == {"files of the AOF"}
    assert f"missing: {base}" in told["files of the AOF"]
    assert "rewrite the AOF" in told["files of the AOF"]
    snapshot_redis.fn(NAME, "rewrite")
    assert wrong(check()) == {}
    kept.crash()
    kept.start()
    until(lambda: kept.client().dbsize() == 3000, what="all keys", seconds=120)


def test_all_files_of_the_aof_are_gone(kept: RedisServer) -> None:
    """The server goes on writing to deleted files, and says that all is well; a start would load 0 keys."""
    shutil.rmtree(kept.data / "appendonlydir")
    assert kept.client().info("persistence")["aof_last_write_status"] == "ok"
    told = found(check(), Status.CRITICAL)
    assert set(told) == {"files of the AOF", "redis.loss_seconds"}
    snapshot_redis.fn(NAME, "rewrite")
    assert wrong(check()) == {}


@pytest.mark.parametrize("text", ["file appendonly.aof.1.base.rdb seq", "nonsense"])
def test_a_manifest_that_cannot_be_read(kept: RedisServer, text: str) -> None:
    manifest = kept.data / "appendonlydir" / "appendonly.aof.manifest"
    manifest.write_text(text)
    assert "is not a valid manifest" in found(check(), Status.CRITICAL)["files of the AOF"]


def test_names_with_spaces_and_files_of_history(tmp_path: Path) -> None:
    """As the server writes them; what it is about to remove is not missing."""
    manifest = tmp_path / "m"
    manifest.write_text('file "my log.1.base.rdb" seq 1 type b\nfile log.1.incr.aof seq 1 type h startoffset 5\n')
    assert read_manifest(manifest) == {"my log.1.base.rdb": "b", "log.1.incr.aof": "h"}


def test_an_aof_at_run_time_only(saved: RedisServer) -> None:
    """It is lost at the next start, unless the file is rewritten."""
    client = saved.client()
    client.config_set("appendonly", "yes")
    until(lambda: not client.info("persistence")["aof_rewrite_in_progress"], what="the AOF", seconds=120)
    told = found(check(), Status.CRITICAL)
    assert set(told) == {"the next start"}
    assert f"appendonly is yes now and no in {saved.configuration}" in told["the next start"]
    assert "CONFIG REWRITE" in told["the next start"]
    client.config_rewrite()
    assert wrong(check()) == {}


def test_an_aof_that_is_off_now_and_on_in_the_file(kept: RedisServer) -> None:
    """The old AOF would win over the RDB; without its files the server would start with nothing."""
    kept.client().config_set("appendonly", "no")
    kept.client().save()
    assert "the AOF of" in found(check(), Status.CRITICAL)["the next start"]
    shutil.rmtree(kept.data / "appendonlydir")
    assert "it would load 0 keys" in found(check(), Status.CRITICAL)["the next start"]


def test_without_a_configuration_file(kept: RedisServer) -> None:
    server = read_persistence(kept.block())
    assert read_written(replace(server, config_file=""))[1] == "the server was started without a configuration file"
    kept.configuration.unlink()
    assert "cannot be read" in wrong(check())["configuration file: not measured"]


def test_the_file_s_values_are_understood(kept: RedisServer, tmp_path: Path) -> None:
    """Save lines add up, an empty one takes them away, sizes have units, what is not named is the default."""
    more = tmp_path / "more.conf"
    tmp_path.chmod(0o755)
    more.write_text("save 300 10\nauto-aof-rewrite-min-size 1mb\n")
    kept.configuration.write_text(f'save 1 1\nsave ""\nsave 900 1\ninclude {more}\nappendonly YES\ndir "{kept.data}"\n')
    written, problem = read_written(read_persistence(kept.block()))
    assert problem == ""
    assert written["save"] == "900 1 300 10"
    assert written["auto-aof-rewrite-min-size"] == "1048576"
    assert (written["appendonly"], written["rdbcompression"]) == ("yes", "yes")
    assert normal("auto-aof-rewrite-min-size", "64m") == "64000000"


def test_the_loss_without_an_aof(saved: RedisServer) -> None:
    """Changes since the last save, in numbers; against the RPO. No AOF is a warning while RDBs suffice."""
    assert set(wrong(check())) == {"appendonly"}
    assert "3,000 changes of the last" in check().facts["a kill now would lose"]
    snapshot_redis.fn(NAME)
    assert "nothing: no change since the last save" in check().facts["a kill now would lose"]
    saved.client().set("one", "more")
    server, place = _look(saved)
    late = replace(server, now=server.now + timedelta(hours=2))
    report = Report("trial", NAME)
    judge_loss(report, late, place, 3600)
    judge_last(report, late)
    assert set(found(report, Status.CRITICAL)) == {"redis.loss_seconds"}
    assert "1 changes of the last 2 h 00 min" in report.facts["a kill now would lose"]
    assert "save 900 1 is overdue by 1 h 45 min" in wrong(report)["a save that is due"]
    report = Report("trial", NAME)
    judge_loss(report, replace(server, settings={**server.settings, "save": "60 10000"}), place, 3600)
    assert "never saved automatically" in wrong(report)["loss at worst"]


def test_slow_disks_big_forks_and_growing_aofs(kept: RedisServer) -> None:
    """Judged on a real reading with other numbers."""
    server = read_persistence(kept.block())
    report = Report("trial", NAME)
    slow = replace(server.state, fork_seconds=0.2, delayed_fsyncs=5, save_cow_bytes=10**15)
    judge_cost(report, replace(server, state=slow))
    assert [f.status for f in report.findings] == [Status.WARN] * 3
    grown = replace(server.state, aof_bytes=10**9, aof_base_bytes=10**8)
    judge_last(report, replace(server, state=grown))
    assert "900%" in wrong(report)["growth of the AOF"]


def test_what_is_elsewhere_is_not_measured(kept: RedisServer) -> None:
    """A path of the same name on this host proves nothing: the server's process is not here."""
    server = read_persistence(kept.block())
    other = replace(server, process=2**22 + 1)
    place = read_place(other)
    assert "is not on this host" in place.problem
    report = Report("trial", NAME)
    judge_place(report, other, place)
    assert [f.status for f in report.findings] == [Status.WARN]
    assert "not measured" in report.findings[0].name
    assert "is not on this host" in read_written(other)[1]


@pytest.mark.parametrize(("overcommit", "ok"), [("0", False), ("1", True), ("2", False), ("", False)])
def test_what_the_kernel_allows(kept: RedisServer, overcommit: str, ok: bool) -> None:
    """0 is well while the data is small."""
    server, place = _look(kept)
    big = replace(server, used_bytes=server.system_bytes // 2)
    assert _kernel(big, replace(place, overcommit=overcommit)) == ([] if ok else ["overcommit_memory"])
    if overcommit == "0":
        assert _kernel(server, replace(place, overcommit="0")) == []
    huge = replace(big, settings={**server.settings, "disable-thp": "no"})
    assert "transparent huge pages" in _kernel(huge, replace(place, huge_pages="always"))
    assert "transparent huge pages" not in _kernel(big, replace(place, huge_pages="always"))


def _kernel(server: Persistence, place: DataDirectory) -> list[str]:
    report = Report("trial", NAME)
    judge_place(report, server, place)
    return [f.name for f in report.findings if f.status is not Status.OK and "free space" not in f.name]


def test_no_space(kept: RedisServer) -> None:
    server, place = _look(kept)
    for free, status in ((0, Status.CRITICAL), (server.dataset_bytes + 1, Status.WARN), (10**9, Status.OK)):
        report = Report("trial", NAME)
        judge_place(report, server, replace(place, free_bytes=free))
        assert [f.status for f in report.findings if "free space" in f.name] == [status]


def test_what_a_killed_save_left(kept: RedisServer) -> None:
    """Files of processes that are gone; one of a process that lives is a save under way."""
    gone, alive = kept.data / "temp-4194305.rdb", kept.data / "temp-rewriteaof-bg-1.aof"
    for path in (gone, alive):
        path.write_bytes(b"x" * 100)
    told = wrong(check())
    assert set(told) == {"files of killed saves"}
    assert told["files of killed saves"] == f"1 files, 100 B → rm {gone}"


def test_sentinels_that_do_not_watch(group: Group) -> None:
    """One that was taken off, then all, then one that is down; and each told what to do."""
    assert "Sentinel" not in str(wrong(check()))
    for sentinel in group.sentinels:
        sentinel.client().sentinel_remove("mymaster")
        told = found(check(), Status.WARN)
        assert "does not watch mymaster" in told[f"Sentinel {sentinel.address}"]
        assert "SENTINEL MONITOR mymaster" in told[f"Sentinel {sentinel.address}"]
    group.sentinels[0].crash()
    assert "start it" in found(check(), Status.WARN)[f"Sentinel {group.sentinels[0].address}"]


def test_a_promoted_replica_is_found(group: Group) -> None:
    new = group.lose_master()
    assert check().facts["server"].startswith(f"{new.address} (master")


def test_a_replica_where_no_sentinel_is_named(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    register(group.replicas[0], monkeypatch)
    assert f"a replica of {group.master.address}" in wrong(check())["role"]


def test_wrong_password(kept: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", "wr0ng")
    assert "refuses the password" in check().sentence()


def test_a_user_without_the_commands(kept: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which, and how to give it."""
    register(kept, monkeypatch, username="ops")
    allowed = ["+info", "+client"]
    for missing in ("TIME", "CONFIG|GET", ""):
        kept.client().acl_setuser("ops", enabled=True, passwords=[f"+{PASSWORD}"], commands=allowed, reset=True)
        told = check().sentence()
        if missing:
            assert f"forbids user ops the command {missing}" in told
            allowed.append(f"+{missing.lower()}")
        else:
            assert "forbids" not in told


def test_a_server_that_is_down(kept: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runbook.kinds.RETRY_DELAYS_SECONDS", [0.01] * 3)
    kept.crash()
    assert "does not answer" in check().sentence()


def test_a_server_that_dies_between_the_readings(kept: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are judged no more: its process is not there."""
    server = read_persistence(kept.block())
    kept.crash()
    assert "is not on this host" in read_place(server).problem
    with contextlib.suppress(OSError):
        assert "is not on this host" in read_written(server)[1]


def test_the_table_of_settings_is_the_manual_s(kept: RedisServer) -> None:
    assert [each.name for each in settings_of(read_persistence(kept.block()))][:5] == [
        "save",
        "stop-writes-on-bgsave-error",
        "rdbcompression",
        "rdbchecksum",
        "appendonly",
    ]


def _look(server: RedisServer) -> tuple[Persistence, DataDirectory]:
    told = read_persistence(server.block())
    return told, read_place(told)


@pytest.mark.parametrize(
    ("harm", "told"),
    [("empty", "is no RDB"), ("garbage", "is no RDB"), ("cut", "is truncated"), ("older", "before the last")],
)
def test_an_rdb_that_is_not_what_was_saved_is_no_safety(saved: RedisServer, harm: str, told: str) -> None:
    """A kill now would lose everything, and the server would not even start, or start with what is older."""
    client, path = saved.client(), saved.data / "dump.rdb"
    client.save()
    older = path.read_bytes()
    last = int(client.lastsave().timestamp())
    until(lambda: int(client.time()[0]) > last + 3, what="a later second", seconds=120)
    client.set("newer", 1)
    client.save()
    whole = path.read_bytes()
    assert "the RDB" not in wrong(check())
    path.write_bytes({"empty": b"", "garbage": b"garbage" * 100, "cut": whole[: len(whole) // 2], "older": older}[harm])
    os.utime(path, (last, last))  # as it was copied with its time
    report = check()
    assert told in found(report, Status.CRITICAL)["the RDB"]
    assert "up to all 3,001 keys" in report.facts["a kill now would lose"]
