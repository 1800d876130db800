"""Temporary overrides of Redis's settings, from their record to their end, on real servers: none is lost, none revived."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
import redis
import yaml  # type: ignore[import-untyped]

from blocks.environment import Environment
from flows.routine.checklist.reminders import remind_checklists, remind_overrides
from runbook import kinds
from runbook.errors import RunbookFailed
from runbook.report import Finding, Report, Status
from runbook.run import runbook
from runbook.wait import until
from tasks.reports import setting_records as records
from tests.fixtures.reports import beginning as found
from tests.redis.servers import NAME, Group, RedisServer, running_redis
from tests.redis.settings.setting_runs import (
    MANUAL,
    ROOT,
    apply,
    bad,
    check,
    expire,
    launch,
    plan,
    record_paths,
    runs,
    table,
    told_of,
    undo,
    written,
)

GB = 1024**3


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """A server with the manual's settings, and a gigabyte for its data."""
    with running_redis(settings=(*MANUAL, "maxmemory 1gb")) as server:
        server.register(monkeypatch)
        yield server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is gone is asked again at once."""
    monkeypatch.setattr(kinds, "RETRY_DELAYS_SECONDS", [0.01] * 3)


def overrides(report: Report) -> list[Finding]:
    return [finding for finding in report.findings if finding.name.startswith("override ")]


def gigabytes(server: RedisServer) -> float:
    return int(runs(server, "maxmemory")) / GB


def decide(server: RedisServer, value: str) -> None:
    """Somebody sets maxmemory for good, without a runbook."""
    server.client().config_set("maxmemory", value)
    server.client().config_rewrite()


def is_in_sync(server: RedisServer) -> bool:
    """Whether it follows another: before, it is loading that one's data and answers nobody, or a Sentinel that makes it
    a replica ends its connections."""
    try:
        found = server.client().info("replication")
    except (redis.ConnectionError, redis.TimeoutError):
        return False
    return bool(found["role"] == "slave" and found["master_link_status"] == "up")


def hours_left(told: str) -> float:
    return (datetime.fromisoformat(told) - datetime.now(UTC)) / timedelta(hours=1)


def test_the_manual_s_temporary_maxmemory(kept: RedisServer) -> None:
    report = apply(override="maxmemory 2gb", override_hours=2, reason="incident 42")
    assert report.status is Status.OK, report.sentence()
    assert (gigabytes(kept), written(kept, "maxmemory")) == (2, "2gb")
    report = check()
    assert report.status is Status.OK, report.sentence()
    assert report.outcome == "14 of 14 settings have the manual's or an accepted value, 1 overridden for a time"
    assert found(report, "override").name == f"override maxmemory = 2gb on {kept.address}"
    assert "incident 42" in found(report, "override").value
    assert table(report, "Settings")["maxmemory"][:2] == ("2gb", "2gb")
    assert "override until" in table(report, "Settings")["maxmemory"][-1]
    assert apply().outcome == "there is nothing to change", "an override in force is left alone"
    assert 1.9 < hours_left(told_of(kept)["until"]) < 2.1
    expire(kept)
    report = check()
    assert report.status is Status.WARN
    assert "undo-redis-settings with record=" in found(report, "override maxmemory").hint
    assert apply().status is Status.OK  # enforces it
    assert (gigabytes(kept), check().status) == (1, Status.OK)
    assert told_of(kept, 0)["replaced"]


def test_the_end_of_one_is_looked_for_daily(kept: RedisServer) -> None:
    """By remind-checklists, in every environment; check-redis-settings looks once a week."""
    entries = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    entrypoint = f"{remind_checklists.fn.__module__}.remind_checklists"
    (entry,) = [entry for entry in entries if entry["entrypoint"] == entrypoint]
    ((_, _, *days),) = [schedule["cron"].split() for schedule in entry["schedules"]]
    assert ("daily" in entry["tags"], days) == (True, ["*", "*", "*"])
    assert not {"needs", "schedule_needs"} & entry.keys()
    apply(override="maxmemory 2gb")
    assert _reminded() == []
    expire(kept)
    (told,) = _reminded()
    assert (told.name, told.status) == ("temporary setting maxmemory of redis", Status.WARN)
    assert f"undo-redis-settings with record={record_paths(kept)[0].stem}" in told.hint
    undo()
    assert _reminded() == []


def _reminded() -> list[Finding]:
    """What remind-checklists finds of overrides; an environment without [alerts] escalates to nobody."""
    env = Environment.find(NAME)
    with runbook("Remind checklists", env) as report:
        remind_overrides(report, env, datetime.now(env.zone).date())
    return report.findings


def test_one_is_ended_by_hand(kept: RedisServer) -> None:
    kept.client().config_set("timeout", 200)
    apply(override="timeout = 3000")
    assert found(check(), "override timeout = 3000").status is Status.OK
    undo()
    assert (runs(kept, "timeout"), written(kept, "timeout")) == ("200", "200")
    apply(override="timeout = 3000")
    apply(names=("timeout",))
    assert runs(kept, "timeout") == "200", "it was as well before"
    apply(override="timeout = 3000")
    expire(kept)
    assert "timeout" in bad(check())


def test_one_over_the_other(kept: RedisServer) -> None:
    """When the upper one is over, the lower counts again while its time lasts; then what was there before both."""
    apply(override="maxmemory 2gb")
    lower = record_paths(kept)[0].read_text()
    apply(override="maxmemory 3gb")
    assert [told.name.split(" on ")[0] for told in overrides(check())] == ["override maxmemory = 3gb"]
    expire(kept)
    record_paths(kept)[0].write_text(lower)
    apply()
    (told,) = overrides(check())
    assert (gigabytes(kept), told.status) == (2, Status.OK)
    expire(kept)
    assert [told.status for told in overrides(check())] == [Status.WARN]
    apply()
    assert (gigabytes(kept), overrides(check())) == (1, [])


def test_the_lower_of_two_need_not_be_as_well_as_the_manual_s(kept: RedisServer) -> None:
    apply(override="timeout 3000")
    lower = record_paths(kept)[0].read_text()
    apply(override="timeout 4000")
    expire(kept)
    record_paths(kept)[0].write_text(lower)
    apply()
    assert runs(kept, "timeout") == "3000"
    assert [told.status for told in overrides(check())] == [Status.OK]


def test_names_end_all_of_them(kept: RedisServer) -> None:
    apply(override="maxmemory 2gb")
    apply(override="maxmemory 3gb")
    apply(names=("maxmemory",))
    assert (gigabytes(kept), overrides(check())) == (1, [])
    report = apply(names=("maxmemory",))
    assert report.outcome == "there is nothing to change"
    assert "no override of it is in force" in table(report, "Kept")["maxmemory"][1]


def test_the_end_of_one_is_undone(kept: RedisServer) -> None:
    """Its value is there again, and so is its record: it has an owner, and a time."""
    apply(override="maxmemory 2gb", reason="incident 42")
    expire(kept)
    apply()
    assert gigabytes(kept) == 1
    undo()
    assert gigabytes(kept) == 2
    (told,) = overrides(check())
    assert (told.status, "incident 42" in told.value) == (Status.WARN, True)
    apply()
    assert (gigabytes(kept), overrides(check())) == (1, [])


def test_an_undo_killed_in_the_middle_leaves_no_value_without_a_record(
    kept: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(override="maxmemory 2gb")
    expire(kept)
    apply()
    assert launch(flow="undo", OPS_FAILPOINT="after set_values") == -signal.SIGKILL
    assert gigabytes(kept) == 2
    assert [told.status for told in overrides(check())] == [Status.WARN]
    undo()
    assert told_of(kept)["undone"], "launched again it ends what was begun"
    assert gigabytes(kept) == 2


def test_a_value_that_was_replaced_is_no_override_when_it_returns(kept: RedisServer) -> None:
    """Somebody decided otherwise, and months later for that very value: nobody takes it for the old override."""
    apply(override="maxmemory 2gb")
    expire(kept)
    decide(kept, "3gb")
    assert overrides(check()) == []
    assert told_of(kept)["replaced"]
    decide(kept, "2gb")
    assert check().status is Status.OK
    assert apply().outcome == "there is nothing to change"
    assert gigabytes(kept) == 2
    with pytest.raises(RunbookFailed, match="was found replaced at"):
        undo(record=record_paths(kept)[0].stem)


def test_a_check_beside_an_apply_closes_nothing(kept: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value is recorded and not set yet: that is not replaced."""
    with monkeypatch.context() as patched:
        patched.setattr(records, "failpoint", lambda _: check())
        apply(override="maxmemory 2gb")
    assert not told_of(kept)["replaced"]
    assert len(overrides(check())) == 1


def test_one_is_prolonged(kept: RedisServer) -> None:
    apply(override="maxmemory 2gb", override_hours=1)
    expire(kept)
    (step, _) = plan(override="maxmemory 2gb").plan_steps
    assert "prolonged" in step.detail
    apply(override="maxmemory 2gb", override_hours=5)
    (told,) = overrides(check())
    assert told.status is Status.OK
    assert 4.9 < hours_left(told.value.split()[1]) < 5.1
    expire(kept)
    apply()
    assert gigabytes(kept) == 1, "what was there before the first"
    apply(override="maxmemory 2gb")
    apply(override="maxmemory 2gb", override_hours=5)
    undo()
    assert (gigabytes(kept), overrides(check())) == (1, [])


def test_one_that_was_recorded_and_never_set_is_none(kept: RedisServer) -> None:
    assert launch("override='timeout 3000'", OPS_FAILPOINT="settings: recorded") == -signal.SIGKILL
    assert len(record_paths(kept)) == 1
    report = check()
    assert report.status is Status.OK, report.sentence()
    assert overrides(report) == []


def test_one_that_the_server_refuses_is_none(kept: RedisServer) -> None:
    """Nothing was set, and the report says that; its record stands in no undo's way."""
    kept.client().config_set("timeout", 0)
    apply(names=("timeout",))
    for override in ("timeout 99999999999", "save 0 0"):
        with pytest.raises(RunbookFailed) as failed:
            apply(override=override)
        report = failed.value.report
        assert report.outcome == f"0 values set on {kept.address}"
        refused = found(report, override.split()[0])
        assert "the server refuses it: " in refused.value
        assert f"with a value of {override.split()[0]} that the server accepts" in refused.hint
    undo()
    assert runs(kept, "timeout") == "0"


def test_nothing_on_disk_is_critical_in_spite_of_overrides(kept: RedisServer) -> None:
    """Each is warned of when it is planned; together they keep nothing, and no override excuses that."""
    off = apply(override="appendonly no")
    assert "the AOF of" in str(bad(off))
    assert check().outcome == "13 of 14 settings have the manual's or an accepted value, 1 overridden for a time"
    both = apply(override='save ""')
    assert "loses all data" in found(both, f"{kept.address} saves nothing to disk").hint
    report = check()
    assert {f.name for f in report.findings if f.status is Status.CRITICAL} == {"save", "appendonly"}
    assert report.outcome.startswith("12 of 14 settings")
    apply(names=("save",))
    assert {f.name for f in check().findings if f.status is Status.CRITICAL} == set()


def test_those_of_every_server_are_told(group: Group) -> None:
    """A former master keeps its own: it counts once it is promoted again."""
    master, replica = group.master, group.replicas[0]
    apply(override="maxmemory 2gb", everywhere=True)
    expire(master)
    told = {finding.name.rpartition(" ")[2]: finding for finding in overrides(check())}
    assert {address: finding.status for address, finding in told.items()} == dict.fromkeys(
        (master.address, replica.address), Status.WARN
    )
    assert "and everywhere" in told[replica.address].hint
    apply()
    assert [finding.name.rpartition(" ")[2] for finding in overrides(check())] == [replica.address]
    record = told[replica.address].hint.split("record=")[1].split(",")[0]
    undo(record=record)
    assert overrides(check()) == []
    assert runs(replica, "maxmemory") == "0"


def test_after_a_failover_the_new_master_counts(group: Group, quick: None) -> None:
    """The old one's override is not in force on it; its record is named, and can be undone by its name."""
    apply(override="maxmemory 2gb")
    (path,) = record_paths(group.master)
    new = group.lose_master()
    report = check()
    assert report.facts["server"].startswith(f"{new.address} (master")
    assert overrides(report) == []
    assert "not measured" in found(report, f"settings of {group.master.address}").value
    with pytest.raises(RunbookFailed, match=f"record=… for one of: {path.stem} of {group.master.address}"):
        undo()
    with pytest.raises(RunbookFailed, match=f"start {group.master.address}"):
        undo(record=path.stem)
    group.master.start()
    until(lambda: is_in_sync(group.master), what="it follows", seconds=120)
    undo(record=path.stem)
    assert runs(group.master, "maxmemory") == "0"


@pytest.mark.parametrize(
    "override", ["MAXMEMORY 2gb", "config set maxmemory 2GB", "redis-cli CONFIG SET maxmemory 2gb"]
)
def test_a_pasted_command_is_understood(kept: RedisServer, override: str) -> None:
    (step, _) = plan(override=override).plan_steps
    assert step.detail == f"maxmemory 2gb on {kept.address}; now 1gb"
