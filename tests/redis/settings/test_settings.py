"""check-, apply- and undo-redis-settings against real servers: what runs, what the file has, and what is put back."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest
from prefect.utilities.callables import parameter_schema

from flows.redis.settings.settings import apply_redis_settings, check_redis_settings, undo_redis_settings
from runbook import kinds
from runbook.errors import RunbookFailed
from runbook.report import Status
from runbook.wait import until
from tasks.redis.persistence import saving
from tasks.redis.server import call
from tasks.redis.settings import changes as setting_changes
from tasks.redis.settings import running as settings
from tasks.redis.settings.recommended import KINDS, RECOMMENDED, Name, same, shown
from tasks.redis.settings.running import read_settings
from tasks.reports import setting_records as records
from tests.fixtures.reports import beginning as found
from tests.redis.servers import NAME, PASSWORD, Group, RedisServer, running_redis
from tests.redis.settings.setting_runs import (
    KEYS,
    MANUAL,
    apply,
    bad,
    check,
    fill,
    launch,
    plan,
    record_paths,
    runs,
    table,
    told_of,
    undo,
    written,
)

OPEN_FILES = psutil.Process().rlimit(psutil.RLIMIT_NOFILE)[1]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """A server with the manual's settings and some keys."""
    with running_redis(settings=MANUAL) as server:
        server.register(monkeypatch)
        fill(server)
        yield server


@pytest.fixture
def bare(server: RedisServer) -> RedisServer:
    """A server with none of them: no RDB, no AOF, no timeout."""
    fill(server)
    return server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is gone is asked again at once."""
    monkeypatch.setattr(kinds, "RETRY_DELAYS_SECONDS", [0.01] * 3)


def test_the_manual_s_values_are_well(kept: RedisServer) -> None:
    report = check()
    assert report.status is Status.OK, report.sentence()
    assert report.outcome == f"{len(RECOMMENDED)} of {len(RECOMMENDED)} settings have the manual's or an accepted value"
    told = table(report, "Settings")
    assert [one.name for one in RECOMMENDED] == list(told)
    effect = {name: row[4] for name, row in told.items()}
    assert (effect["save"], effect["rdbchecksum"], effect["dir"]) == ("at once", "restart", "restart (protected)")
    assert apply_redis_settings.fn(NAME).outcome == "there is nothing to change"


def test_asking_changes_nothing(kept: RedisServer) -> None:
    kept.client().config_set("save", "1 1")
    before, file = kept.client().config_get("*"), kept.configuration.read_text()
    check()
    assert kept.client().config_get("*") == before
    assert kept.configuration.read_text() == file


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("save", "900 1", "900 1 300 10 60 10000"),
        ("save", "", "900 1 300 10 60 10000"),
        ("stop-writes-on-bgsave-error", "no", "yes"),
        ("rdbcompression", "no", "yes"),
        ("appendfsync", "no", "everysec"),
        ("auto-aof-rewrite-percentage", "0", "100"),
        ("auto-aof-rewrite-min-size", "1gb", "67108864"),
        ("no-appendfsync-on-rewrite", "yes", "no"),
        ("maxclients", "500", "10000"),
        ("timeout", "0", "300"),
        ("timeout", "301", "300"),
    ],
)
def test_a_worse_value_is_found_set_kept_and_undone(kept: RedisServer, name: str, value: str, wanted: str) -> None:
    kept.client().config_set(name, value)
    kept.client().config_rewrite()
    old = runs(kept, name)
    report = check()
    assert name in bad(report)
    assert f"apply-redis-settings with names={name}" in found(report, name).hint
    planned = apply_redis_settings.fn(NAME)
    assert planned.status is Status.PLANNED
    assert [step.step for step in planned.plan_steps] == ["CONFIG SET", "CONFIG REWRITE"]
    assert (runs(kept, name), record_paths(kept)) == (old, [])
    report = apply()
    assert report.status is Status.OK, report.sentence()
    assert runs(kept, name) == wanted
    assert check().status is Status.OK
    kept.crash()
    kept.start()
    until(lambda: runs(kept, name) == wanted, what="the value after a restart", seconds=120)
    undone = undo()
    assert undone.status is Status.OK, undone.sentence()
    assert runs(kept, name) == old
    with pytest.raises(RunbookFailed, match="there is no record"):
        undo()


def test_what_is_stricter_is_left_alone(kept: RedisServer) -> None:
    more = {
        "save": "60 1",
        "appendfsync": "always",
        "auto-aof-rewrite-percentage": "50",
        "auto-aof-rewrite-min-size": "1048576",
        "maxclients": "12000",
        "timeout": "60",
    }
    for name, value in more.items():
        kept.client().config_set(name, value)
    kept.client().config_rewrite()
    report = check()
    assert report.status is Status.OK, report.sentence()
    assert {name for name, row in table(report, "Settings").items() if row[5] == "accepted"} == {*more, "dir"}
    applied = apply()
    assert applied.outcome == "there is nothing to change"
    assert set(table(applied, "Kept")) == set(more)
    assert apply(names=("maxclients",)).status is Status.OK
    assert (runs(kept, "maxclients"), written(kept, "maxclients")) == ("10000", "10000")
    assert runs(kept, "timeout") == "60"


def test_nothing_is_kept_at_all(bare: RedisServer) -> None:
    """Critical until both are on; then a server that is killed comes back with every key."""
    critical = {f.name for f in check().findings if f.status is Status.CRITICAL}
    assert critical == {"save", "appendonly"}
    report = apply()
    assert report.status is Status.OK, report.sentence()
    assert list(table(report, "In effect"))[-1] == "appendonly", "it is the last"
    assert "on; written in" in report.facts["AOF"]
    assert (written(bare, "appendonly"), written(bare, "timeout")) == ("yes", "300")
    assert (bare.data / "appendonlydir").is_dir()
    bare.client().set("one", "more")
    bare.crash()
    bare.start()
    until(lambda: bare.client().dbsize() == KEYS + 1, what="all keys", seconds=120)
    undone = undo()
    assert "loses all data" in found(undone, f"{bare.address} saves nothing to disk").hint
    assert (runs(bare, "appendonly"), runs(bare, "save"), written(bare, "save")) == ("no", "", "")


def child_of(server: RedisServer) -> psutil.Process:
    process = psutil.Process(int(server.client().info("server")["process_id"]))
    return until(lambda: next(iter(process.children()), None), what="the rewrite", seconds=120, every_seconds=0.01)  # type: ignore[return-value]


def at_failpoint(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, work: Callable[[], object], *, times: int = 1
) -> None:
    """Do this at a place in a module, so often."""
    left = [work] * times
    monkeypatch.setattr(module, "failpoint", lambda reached: left.pop()() if reached == name and left else None)


BEGUN = "redis: CONFIG SET appendonly yes begun"
IS_SET = "redis settings: set"


def test_a_rewrite_that_fails_leaves_the_aof_off(bare: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is killed, as where memory runs out: the server alone would try again and again."""
    bare.client().config_set("rdb-key-save-delay", 100_000)  # minutes: it is in the middle whenever it is killed
    at_failpoint(monkeypatch, saving, BEGUN, lambda: child_of(bare).kill())
    with pytest.raises(RunbookFailed, match="the AOF is off again"):
        apply(names=("appendonly",))
    assert (runs(bare, "appendonly"), written(bare, "appendonly")) == ("no", "nothing")
    bare.client().config_set("rdb-key-save-delay", 0)
    until(lambda: not bare.client().info("persistence")["aof_rewrite_in_progress"], what="its end", seconds=120)
    monkeypatch.undo()
    bare.register(monkeypatch)
    assert apply(names=("appendonly",)).status is Status.OK, "launched again, an old failure counts for nothing"
    assert written(bare, "appendonly") == "yes"


def test_an_aof_that_has_no_place(bare: RedisServer) -> None:
    bare.data.chmod(0o555)
    try:
        report = apply(names=("appendonly", "timeout"))
        assert "cannot write to" in found(report, f"appendonly on {bare.address}").value
        assert "chown" in found(report, f"appendonly on {bare.address}").hint
    finally:
        bare.data.chmod(0o755)
    assert (runs(bare, "appendonly"), runs(bare, "timeout")) == ("no", "300")


def test_what_needs_the_file_and_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_redis(settings=(*MANUAL, "rdbchecksum no")) as server:
        server.register(monkeypatch)
        report = check()
        assert bad(report) == {"rdbchecksum"}
        assert f"write rdbchecksum yes into {server.configuration} and restart it" in found(report, "rdbchecksum").hint
        applied = apply()
        assert bad(applied) == {f"rdbchecksum on {server.address}"}
        assert "takes effect by restart" in found(applied, "rdbchecksum").value
        assert record_paths(server) == []
        with pytest.raises(RunbookFailed, match="0 keys"):
            apply(override="dbfilename other.rdb")


def test_a_directory_that_is_not_the_environment_s(kept: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never set: a start from another directory has no data."""
    toml = kept.root / "environment.toml"
    toml.write_text(toml.read_text().replace(f'data_directory = "{kept.data}"', 'data_directory = "/var/lib/redis"'))
    report = check()
    assert bad(report) == {"dir"}
    assert "0 keys" in found(report, "dir").hint
    assert "dir on" in str(bad(apply()))
    assert runs(kept, "dir") == str(kept.data)


def test_a_file_that_cannot_be_written(kept: RedisServer) -> None:
    kept.client().config_set("timeout", 0)
    kept.configuration.write_text(kept.text().replace("timeout 300", "timeout 0"))
    kept.root.chmod(0o555)
    try:
        report = apply()
        told = found(report, f"saved in the file of {kept.address}")
        assert told.status is Status.WARN
        assert "lost at the next restart" in told.hint
        assert f"write {kept.configuration} and its directory {kept.root}" in told.hint
        assert runs(kept, "timeout") == "300"
        assert "timeout 300 runs, 0 is written" in found(check(), "configuration file").value
    finally:
        kept.root.chmod(0o755)
    assert apply().status is Status.OK, "there is a place again: the file is written, nothing is set"
    assert written(kept, "timeout") == "300"


def test_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is set is lost at the next start, and said so."""
    server = RedisServer()
    server.configuration = Path("--port")
    try:
        server.start(str(server.port), "--bind", "127.0.0.1", "--requirepass", PASSWORD, "--dir", str(server.data))
        server.configuration = server.root / "no-such.conf"
        server.register(monkeypatch)
        assert "without a configuration file" in found(check(), "configuration file: not measured").value
        planned = plan(names=("timeout",))
        assert [step.step for step in planned.plan_steps] == ["CONFIG SET"], "there is nothing to rewrite"
        for report in (planned, apply(names=("timeout",))):
            told = found(report, f"saved in the file of {server.address}")
            assert (told.status, told.value) == (Status.WARN, "it was started without a configuration file")
            assert "start it with a configuration file" in told.hint
        assert runs(server, "timeout") == "300"
        server.client().config_set("timeout", 0)  # as its next start would
        undo()
        assert told_of(server)["undone"], "its values are back, and there is no file that they could miss in"
        with pytest.raises(RunbookFailed, match="there is no record to undo"):
            undo()
    finally:
        server.remove()


def test_an_undo_whose_file_cannot_be_written(kept: RedisServer) -> None:
    """Its record is done with when the file has the old values too; nothing is set anew."""
    kept.client().config_set("timeout", 0)
    kept.client().config_rewrite()
    apply()
    (path,) = record_paths(kept)
    kept.root.chmod(0o555)
    try:
        report = undo()
        assert f"then undo-redis-settings with record={path.stem} again" in found(report, "saved in the file").hint
        assert (runs(kept, "timeout"), written(kept, "timeout")) == ("0", "300")
    finally:
        kept.root.chmod(0o755)
    assert undo(record=path.stem).status is Status.OK
    assert (runs(kept, "timeout"), written(kept, "timeout"), bool(told_of(kept)["undone"])) == ("0", "0", True)


def test_a_value_that_is_only_in_the_file_or_only_runs(kept: RedisServer) -> None:
    """What the next start would bring back is found; and kept by an apply that has nothing to set."""
    kept.client().config_set("save", "60 1")
    report = check()
    assert "save 60 1 runs, 900 1 300 10 60 10000 is written" in found(report, "configuration file").value
    (step,) = apply_redis_settings.fn(NAME).plan_steps
    assert step.step == "CONFIG REWRITE"
    assert "also saves: save 60 1 runs" in step.detail
    assert apply().status is Status.OK
    assert check().status is Status.OK


def test_what_others_set_at_run_time_is_named(kept: RedisServer) -> None:
    """CONFIG REWRITE keeps all of it: the plan says so before, and the check that the next start would lose it. No
    secret is shown."""
    others = {
        "maxmemory-policy": "allkeys-random",
        "hz": "50",
        "min-replicas-to-write": "1",
        "replica-priority": "7",
        "protected-mode": "no",
        "bind": "127.0.0.1 -::1",
    }
    for name, value in others.items():
        kept.client().config_set(name, value)
    kept.client().config_set("masterauth", "s3cret")
    planned = plan(override="maxmemory 2gb")
    detail = planned.plan_steps[-1].detail
    for name, value in others.items():
        assert f"{name} {value} runs, " in detail
        assert f"{name} {value} runs, " in found(check(), "configuration file").value
    assert "hz 50 runs, 10 is written" in detail
    assert detail.count("priority") == 1, "once, by its present name"
    page = planned.path
    assert page
    assert "s3cret" not in page.read_text()
    kept.client().config_set("min-replicas-to-write", "0")
    assert apply(override="maxmemory 2gb").status is Status.OK
    assert {name: written(kept, name) for name in ("maxmemory-policy", "hz")} == {
        "maxmemory-policy": "allkeys-random",
        "hz": "50",
    }
    assert check().status is Status.OK


def test_what_only_they_set_is_kept_by_an_apply_that_sets_nothing(kept: RedisServer) -> None:
    kept.client().config_set("hz", "50")
    (step,) = plan().plan_steps
    assert (step.step, "hz 50 runs, 10 is written" in step.detail) == ("CONFIG REWRITE", True)
    assert apply().status is Status.OK
    assert bad(check()) == set()


def test_a_file_s_own_words_are_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older names, units, one line for a class of clients, flags in another order, a file that is included."""
    lines = (
        "slave-priority 50",
        "slave-announce-ip 10.1.2.3",
        "masteruser ops",
        "hash-max-ziplist-entries 100",
        'notify-keyspace-events "xE"',
    )
    server = RedisServer(settings=(*MANUAL, *lines, "client-output-buffer-limit pubsub 64mb 8mb 60"))
    included = server.root / "more.conf"
    included.write_text("repl-backlog-size 5mb\nslowlog-max-len 77\n")
    server.configuration.write_text(f"{server.text()}include {included}\n")
    try:
        server.start()
        server.register(monkeypatch)
        report = check()
        assert bad(report) == set(), report.sentence()
        included.write_text("repl-backlog-size 6mb\nslowlog-max-len 77\n")
        assert "repl-backlog-size 5242880 runs, 6291456 is written" in found(check(), "configuration file").value
    finally:
        server.remove()


def test_a_program_that_cannot_say_what_it_would_start_with(kept: RedisServer) -> None:
    """Of what others set nothing is known then, and that is said."""
    toml = kept.root / "environment.toml"
    toml.write_text(toml.read_text().replace(f'server_program = "{kept.program}"', 'server_program = "/bin/false"'))
    report = check()
    assert bad(report) == {"configuration file: only the manual's settings"}
    assert "/bin/false cannot be queried" in found(report, "configuration file: only").value
    planned = plan(override="maxmemory 2gb")
    assert bad(planned) == {f"other settings that CONFIG REWRITE saves on {kept.address}: not measured"}


def test_a_file_that_is_not_here(kept: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "find_written", lambda *_: ({}, "it is on another host"))
    report = check()
    assert bad(report) == {"configuration file: not measured"}
    kept.client().config_set("timeout", 250)
    assert apply().outcome == "there is nothing to change"
    report = apply(names=("save",))
    assert bad(report) == {f"other settings that CONFIG REWRITE saves on {kept.address}: not measured"}
    assert written(kept, "timeout") == "250", "written in any case: who names one wants it kept"


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("maxmemory", "is no override"),
        ("requirepass = x", "is no override"),
        ("maxmemory lots", "is not a valid value of maxmemory"),
        ("save 900", "is not a valid value of save"),
        ("timeout = -1", "is not a valid value of timeout"),
        ("timeout = 300", "is the manual's value"),
        ("maxmemory 1kb", "are in use"),
        ("maxmemory 900tb", "its host has"),
        ("maxclients 1", "is less than the current connections"),
        (f"maxclients {OPEN_FILES}", "its process can open .* files"),
        ("rdbchecksum no", "takes effect by restart"),
        ("dir /tmp", "0 keys"),
    ],
)
def test_an_override_that_would_do_harm_is_refused(kept: RedisServer, override: str, why: str) -> None:
    before = kept.client().config_get("*")
    with pytest.raises(RunbookFailed, match=why):
        apply(override=override)
    assert kept.client().config_get("*") == before
    assert record_paths(kept) == []


def test_more_clients_than_files_where_that_cannot_be_seen(kept: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server refuses it then: said why, and it has what it had. It is asked in steps: a refusal comes soon."""
    monkeypatch.setattr(settings, "_most_files", lambda _: 0)
    monkeypatch.setattr(setting_changes, "STEP_CLIENTS", 4000)
    with pytest.raises(RunbookFailed, match="LimitNOFILE"):
        apply(override=f"maxclients {OPEN_FILES + 50_000}")
    assert runs(kept, "maxclients") == "10000"
    assert kept.client().info("commandstats")["cmdstat_config|set"]["calls"] > 5
    assert apply(override="maxclients = 15000").status is Status.OK
    assert runs(kept, "maxclients") == "15000"


def test_a_server_that_lowered_its_maxclients(kept: RedisServer) -> None:
    """It does so at its start, where it may open too few files."""
    kept.client().config_set("maxclients", 4064)
    report = check()
    assert "raise LimitNOFILE" in found(report, "maxclients").hint
    assert "maxclients 4064 runs, 10000 is written" in found(report, "configuration file").value


def test_a_setting_that_somebody_changed_since_is_left_alone(kept: RedisServer) -> None:
    apply(override="timeout 3000")
    kept.client().config_set("timeout", 77)
    report = undo()
    assert report.outcome == "there is nothing to undo"
    assert found(report, "timeout kept").value == "77, changed since"
    assert runs(kept, "timeout") == "77"


def test_a_run_killed_between_two_values(kept: RedisServer) -> None:
    """The record was written first; launched again both are set and in the file; both records go back."""
    for name in ("timeout", "auto-aof-rewrite-percentage"):
        kept.client().config_set(name, 0)
    kept.client().config_rewrite()
    assert launch(OPS_FAILPOINT=IS_SET) == -signal.SIGKILL
    (path,) = record_paths(kept)
    assert {change["name"]: change["old"] for change in json.loads(path.read_text())["changes"]} == {
        "timeout": "0",
        "auto-aof-rewrite-percentage": "0",
    }
    assert [runs(kept, "auto-aof-rewrite-percentage"), runs(kept, "timeout")] == ["100", "0"]
    assert written(kept, "auto-aof-rewrite-percentage") == "0"
    assert apply().status is Status.OK
    assert check().status is Status.OK
    for _ in range(2):
        undo()
    assert (runs(kept, "timeout"), runs(kept, "auto-aof-rewrite-percentage")) == ("0", "0")
    assert (written(kept, "timeout"), written(kept, "auto-aof-rewrite-percentage")) == ("0", "0")


def test_a_run_killed_before_the_file_was_written(kept: RedisServer) -> None:
    kept.client().config_set("timeout", 0)
    kept.client().config_rewrite()
    assert launch(OPS_FAILPOINT="before rewrite_file") == -signal.SIGKILL
    assert (runs(kept, "timeout"), written(kept, "timeout")) == ("300", "0")
    assert "configuration file" in bad(check())
    assert apply().status is Status.OK
    assert written(kept, "timeout") == "300"


def test_a_server_killed_between_set_and_rewrite(
    kept: RedisServer, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    kept.client().config_set("timeout", 0)
    kept.client().config_rewrite()
    with monkeypatch.context() as patched:
        at_failpoint(patched, setting_changes, IS_SET, kept.crash)
        with pytest.raises(RunbookFailed, match="does not answer"):
            apply()
    assert len(record_paths(kept)) == 1, "it was written first"
    kept.start()
    assert runs(kept, "timeout") == "0", "it was in no file"
    assert apply().status is Status.OK
    assert (runs(kept, "timeout"), written(kept, "timeout")) == ("300", "300")


def test_a_server_restarted_between_set_and_rewrite(kept: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file must not be written with what it began with anew."""
    kept.client().config_set("timeout", 0)
    kept.configuration.write_text(kept.text().replace("timeout 300", "timeout 0"))

    def restart() -> None:
        kept.crash()
        kept.start()

    at_failpoint(monkeypatch, setting_changes, IS_SET, restart)
    with pytest.raises(RunbookFailed, match="was restarted meanwhile"):
        apply()
    assert apply().status is Status.OK
    assert written(kept, "timeout") == "300"


def test_a_server_restarted_during_an_undo(kept: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.client().config_set("timeout", 0)
    apply()

    def restart() -> None:
        kept.crash()
        kept.start()

    with monkeypatch.context() as patched:
        at_failpoint(patched, setting_changes, IS_SET, restart)
        with pytest.raises(RunbookFailed, match="was restarted meanwhile") as failed:
            undo()
    state = failed.value.report.state
    assert state
    assert (state.value, state.hint) == ("some values may be set and not yet in the file", "run it again")
    undo()
    assert (runs(kept, "timeout"), written(kept, "timeout"), bool(told_of(kept)["undone"])) == ("0", "0", True)


def test_a_server_killed_while_its_aof_is_switched_on(
    bare: RedisServer, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """Its file says no until the AOF is whole: it starts from its RDB."""
    bare.client().save()
    bare.client().config_set("rdb-key-save-delay", 100_000)
    with monkeypatch.context() as patched:
        at_failpoint(patched, saving, BEGUN, bare.crash)
        with pytest.raises(RunbookFailed, match="could not be switched off again|does not answer"):
            apply(names=("appendonly",))
    assert written(bare, "appendonly") == "nothing"
    bare.start()
    until(lambda: bare.client().dbsize() == KEYS, what="all keys", seconds=120)
    assert apply(names=("appendonly",)).status is Status.OK
    bare.crash()
    bare.start()
    until(lambda: bare.client().dbsize() == KEYS, what="all keys, from the AOF", seconds=120)


def test_a_master_that_becomes_a_replica_in_the_middle(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    master, replica = group.master, group.replicas[0]
    at_failpoint(
        monkeypatch, setting_changes, IS_SET, lambda: master.client().replicaof("127.0.0.1", str(replica.port))
    )
    with pytest.raises(RunbookFailed, match="is now a slave; it was a master"):
        apply(names=("save", "timeout"))
    assert (runs(master, "save"), runs(master, "timeout")) == ("900 1 300 10 60 10000", "0")
    told = json.loads(record_paths(master)[0].read_text())
    assert told["server"] == f"redis {NAME} {master.address}"


def test_replicas_keep_their_own_values(group: Group) -> None:
    """Warned of, then applied everywhere, and undone everywhere."""
    master, replica = group.master, group.replicas[0]
    report = apply(names=("timeout",))
    assert replica.address in found(report, "other servers keep their own values").value
    assert (runs(master, "timeout"), runs(replica, "timeout")) == ("300", "0")
    assert "timeout 0" in found(check(), f"settings of {replica.address} (slave)").value
    report = apply(everywhere=True)
    assert report.status is Status.OK, report.sentence()
    assert bad(check()) == set()
    assert (runs(replica, "timeout"), written(replica, "appendonly")) == ("300", "yes")
    planned = undo_redis_settings.fn(NAME, everywhere=True)
    assert [step.step for step in planned.plan_steps] == [
        *["CONFIG SET"] * 2,
        *("CONFIG REWRITE", "close"),
        *["CONFIG SET"] * 3,
        *("CONFIG REWRITE", "close"),
    ]
    undone = undo(everywhere=True)
    assert (runs(replica, "timeout"), runs(master, "appendonly")) == ("0", "no")
    assert runs(master, "timeout") == "300", "its newest record has the others"
    assert undone.outcome == f"2 values restored on {master.address}, 3 values restored on {replica.address}"


def test_a_replica_is_not_taken_for_the_master(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no Sentinel is named and the environment's server was demoted: nothing is planned, set or put back."""
    replica = group.replicas[0]
    replica.register(monkeypatch)
    assert found(check(), "role").status is Status.WARN
    for flow in (apply_redis_settings, undo_redis_settings):
        for confirm in ("", NAME):
            with pytest.raises(RunbookFailed, match=f"role: a replica of {group.master.address}.*name the Sentinels"):
                flow.fn(NAME, confirm=confirm)
    assert (runs(replica, "timeout"), record_paths(replica)) == ("0", [])


def test_a_master_whom_too_few_sentinels_name(group: Group) -> None:
    """It may be a former one: only an operator's word has it changed."""
    for sentinel in group.sentinels[1:]:
        sentinel.crash()
    assert found(check(), "the Sentinels vouch").status is Status.WARN
    with pytest.raises(RunbookFailed, match="the Sentinels vouch for the master"):
        apply(names=("timeout",))
    assert runs(group.master, "timeout") == "0"
    apply(names=("timeout",), master=group.master.address)
    assert runs(group.master, "timeout") == "300"
    with pytest.raises(RunbookFailed, match="the Sentinels vouch for the master"):
        undo()
    undo(master=group.master.address)
    assert runs(group.master, "timeout") == "0"


def test_names_and_an_override_exclude_each_other(kept: RedisServer) -> None:
    kept.client().config_set("timeout", 0)
    with pytest.raises(RunbookFailed, match="names and override exclude each other"):
        apply(names=("timeout",), override="maxmemory 2gb")
    assert (runs(kept, "timeout"), runs(kept, "maxmemory"), record_paths(kept)) == ("0", "0", [])


def test_names_are_chosen_from_a_list_and_set_once(kept: RedisServer) -> None:
    offered = parameter_schema(apply_redis_settings.fn).properties["names"]["items"]["enum"]
    assert offered == list(get_args(Name)) == list(KINDS)
    with pytest.raises(RunbookFailed, match="the manual has no setting time out"):
        apply(names=("time out",))
    kept.client().config_set("timeout", 0)
    assert [step.step for step in plan(names=("timeout", "timeout")).plan_steps] == ["CONFIG SET", "CONFIG REWRITE"]
    assert apply(names=("timeout", "timeout")).outcome == f"1 value set on {kept.address}"
    assert len(told_of(kept)["changes"]) == 1


@pytest.mark.parametrize("flow", [check_redis_settings, apply_redis_settings, undo_redis_settings])
def test_a_server_whose_config_is_renamed(flow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_redis(settings=('rename-command CONFIG ""',)) as server:
        server.register(monkeypatch)
        with pytest.raises(RunbookFailed, match=r"does not know the command CONFIG.* Next: .*rename-command"):
            flow.fn(NAME)


def test_a_server_whose_multi_is_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rights are not asked for then; all else is as ever."""
    with running_redis(settings=(*MANUAL, 'rename-command MULTI ""')) as server:
        server.register(monkeypatch)
        assert check().status is Status.OK
        assert apply(override="maxmemory 2gb").status is Status.OK


def test_wrong_password(kept: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", "wr0ng")
    assert "refuses the password" in check().sentence()


def test_a_user_without_the_commands(kept: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may only read is told what could not be measured; nothing is set before all that it takes may be done."""
    kept.register(monkeypatch, extra='username = "ops"\n')
    kept.client().config_set("timeout", 0)
    reads = ["+ping", "+client|setname", "+client|setinfo", "+info", "+time", "+config|get", "+multi"]

    def allow(*more: str) -> None:
        kept.client().acl_setuser("ops", enabled=True, passwords=[f"+{PASSWORD}"], commands=[*reads, *more], reset=True)

    allow()
    report = check()
    rights = [f.value for f in report.findings if f.name == "rights"]
    assert [any(command in told for told in rights) for command in ("CONFIG|SET", "CONFIG|REWRITE")] == [True, True]
    assert table(report, "Settings")["save"][4] == "not measured"
    for more, missing in (((), "CONFIG.SET"), (("+config|set",), "CONFIG.REWRITE")):
        allow(*more)
        with pytest.raises(RunbookFailed, match=f"forbids user ops the command {missing}"):
            apply()
        assert (runs(kept, "timeout"), record_paths(kept)) == ("0", [])
    allow("+config|set", "+config|rewrite")
    assert apply().status is Status.OK
    reads.remove("+config|get")
    allow("+config|set", "+config|rewrite")
    assert "forbids user ops the command CONFIG|GET" in check().sentence()


def test_a_server_that_is_down(kept: RedisServer, quick: None) -> None:
    kept.crash()
    assert "does not answer" in check().sentence()


def test_records_of_postgresql_are_read_and_left_alone(kept: RedisServer) -> None:
    """They lie in the same folder; those of before have another name for the server."""
    folder = kept.root / "reports" / records.FOLDER
    folder.mkdir(parents=True)
    old = {
        "name": "20260101T000000000000Z",
        "taken": "2026-01-01T00:00:00+00:00",
        "system_identifier": "7431",
        "changes": [{"name": "work_mem", "old": None, "new": "8MB"}],
        "until": "",
        "reason": "",
        "undone": "",
    }
    (folder / f"{old['name']}.json").write_text(json.dumps(old))
    (record,) = records.read_all(kept.root / "reports")
    change = record.change("work_mem")
    assert change
    assert (record.server, change.new, change.ended, record.change("none")) == ("7431", "8MB", (), None)
    assert records.find_record([record], "7431").name == old["name"]
    with pytest.raises(RunbookFailed, match="there is no record"):
        undo()
    assert check().status is Status.OK


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("maxmemory", "2147483648", "2gb"),
        ("maxmemory", "1536", "1536"),
        ("maxmemory", "0", "0"),
        ("auto-aof-rewrite-min-size", "67108864", "64mb"),
        ("save", "", "off"),
        ("timeout", "1024", "1024"),
    ],
)
def test_values_are_shown_as_they_are_typed(name: str, value: str, told: str) -> None:
    assert shown(name, value) == told


@pytest.mark.parametrize(
    ("name", "first", "second", "equal"),
    [
        ("maxmemory", "2gb", "2147483648", True),
        ("maxmemory", "2g", "2000000000", True),
        ("save", "900 1 60 10", "60 10 900 1", True),
        ("save", "", "900 1", False),
        ("appendonly", "YES", "yes", True),
        ("timeout", "0300", "300", True),
        ("dir", "/a", "/A", False),
    ],
)
def test_values_are_compared_by_what_they_mean(name: str, first: str, second: str, equal: bool) -> None:
    assert same(name, first, second) is equal


def test_what_a_later_version_would_add_is_asked_and_not_assumed(kept: RedisServer) -> None:
    """Where the server allows it, a protected setting takes effect at once; that is found by asking."""
    kept.settings = (*MANUAL, "enable-protected-configs yes")
    kept.configuration.write_text(kept.text())
    kept.stop()
    kept.start()
    told = read_settings(kept.block(), NAME)
    assert (told.by["dir"], told.by["appendfilename"]) == ("at once", "restart")
    assert replace(told, written={}).unwritten() == {}
    assert call(kept.client(), "PING")
