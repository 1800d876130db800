"""daily_check: one page on real servers, and each thing that can be wrong in the morning."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blocks.environment import Environment
from flows.database.backup import backup_database, verify_backup
from flows.database.base_backup import backup_cluster
from flows.routine.daily import Part, daily_check
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from tasks.backups import catalogue
from tasks.stores.store import store_of
from tests.database.restore.test_restore import flip, reseal
from tests.fixtures.application.broken import reported
from tests.fixtures.postgres.clusters import NAME as CLUSTER
from tests.fixtures.postgres.clusters import Cluster
from tests.fixtures.servers import free_port
from tests.fixtures.workday import NAME, Day, ago, app_line, finding


def check(part: Part = "all") -> Report:
    return reported(lambda: daily_check.fn(NAME, part))


def backed_up(day: Day, days: float = 0.0) -> Path:
    """A real backup of the database, of some days ago: it was sealed again."""
    backup_database.fn(NAME)
    return aged(day.base, days)


def aged(base: Path, days: float) -> Path:
    (path,) = (base / "backups" / "postgresql").glob("backup_*")
    taken = ago(24 * days)
    old = path.rename(path.with_name(f"backup_{taken:%Y%m%d_%H%M%S}"))
    reseal(old, lambda content: content.update(name=old.name, taken=taken.isoformat()))
    return old


def test_a_morning_on_which_all_is_well_is_one_page_of_six(day: Day) -> None:
    catalogue.mark_verified.work(store_of(Environment.find(NAME), "postgres"), backed_up(day).name, {"by": "test"})
    report = check()
    assert {"health", "errors", "backup of database", "disk", "connections", "Redis"} <= report.facts.keys()
    bad = {one.name for one in report.findings if one.status is not Status.OK}
    assert bad == {"newest backup of redis"}, "which has never been backed up"
    assert finding(report, "a backup of database was proven").status is Status.OK
    assert report.path
    assert "## Disks" in report.path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("part", "tables"),
    [
        ("health", {"Errors of the last 24 h (the first 0 of 0 kinds)"}),
        ("backup", {"Recovery points"}),
        ("resources", {"Connections", "Memory", "Disks", "Wraparound: databases", "Wraparound: oldest tables of "}),
    ],
)
def test_a_part_has_its_own_rows_only(day: Day, part: Part, tables: set[str]) -> None:
    assert {table.name.removesuffix(day.database) for table in check(part).evidence} == tables


def test_what_is_dead_is_one_finding_with_what_to_launch_and_the_others_go_on(day: Day) -> None:
    day.write(postgres=free_port(), redis=free_port(), backend=f"http://127.0.0.1:{free_port()}")
    day.frontend.status, day.frontend.body = 503, {"status": "degraded", "backend": "unreachable"}
    report = check()
    for name, flow, why in (
        ("backend", "diagnose-application", "does not answer"),
        ("frontend", "diagnose-application", "503: backend unreachable"),
        ("PostgreSQL", "diagnose-database", "does not answer"),
        ("Redis", "diagnose-redis", "127.0.0.1"),
    ):
        found = finding(report, name)
        assert found.status is Status.CRITICAL
        assert f"launch {flow}/{NAME}" in found.hint
        assert why in found.value
    assert {"errors", "disk", "this host"} <= report.facts.keys()
    assert finding(report, "newest backup of database").value.endswith("is missing")


def test_errors_are_those_of_exactly_a_day_over_rotated_files(day: Day) -> None:
    lines = [app_line(f"Timeout after {hours} s", hours, "ERROR") for hours in (23.9, 20, 20, 24.1, 30, 47)]
    packed = day.logs / "app.log.1.gz"
    packed.write_bytes(gzip.compress((app_line("began", 100) + "".join(lines[:4])).encode()))
    os.utime(packed, (ago(20).timestamp(),) * 2)
    day.log(*lines[4:], app_line("it is\nin lines of its own", 1, "CRITICAL"), app_line("well", 1), "Traceback\n")
    report = check("health")
    assert report.facts["errors"] == "4 in 24 h"
    (table,) = report.evidence[-1:]
    assert [row[:4] for row in table.rows] == [
        ("3", "3", "ERROR", "Timeout after <n> s"),
        ("1", "0", "CRITICAL", "it is"),
    ]
    assert finding(report, "logs.errors.day_count").status is Status.OK
    assert finding(report, "lines that are not JSON").value == "1", "is in no count, and is told"
    day.log(*[app_line("again", 2, "ERROR")] * 30)
    assert finding(check("health"), "logs.errors.day_count").status is Status.WARN


def emptied(day: Day) -> None:
    for path in day.logs.iterdir():
        path.unlink()


def begun_lately(day: Day) -> None:
    (day.logs / "app.log").write_text(app_line("began", 5))


def undated(day: Day) -> None:
    day.log('{"level": "ERROR", "message": "x"}\n')


def of_tomorrow(day: Day) -> None:
    day.log(app_line("x", -20, "ERROR"))


def silent(day: Day) -> None:
    (day.logs / "app.log").write_text(app_line("began", 72))
    os.utime(day.logs / "app.log", (ago(30).timestamp(),) * 2)


def damaged(day: Day) -> None:
    packed = day.logs / "app.log.1.gz"
    packed.write_bytes(gzip.compress(app_line("x" * 10_000, 3).encode())[:-30])


@pytest.mark.parametrize(
    ("break_it", "name", "value"),
    [
        (emptied, "errors", "not measured: there is no log"),
        (begun_lately, "all of the day's errors", "not measured: the log begins at"),
        (undated, "errors without a time", "1, not counted"),
        (of_tomorrow, "errors with a time in the future", "1, not counted"),
        (silent, "the log", "not measured: no line was written for 24 h"),
        (damaged, "app.log.1.gz is whole", "damaged"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_errors_that_cannot_be_counted_are_never_none(
    day: Day, break_it: Callable[[Day], None], name: str, value: str
) -> None:
    break_it(day)
    found = finding(check("health"), name)
    assert found.status is Status.WARN
    assert value in found.value
    assert found.hint


def test_a_backup_that_is_older_than_the_rpo_warns_and_one_of_another_day_is_critical(day: Day) -> None:
    path = backed_up(day, days=0.1)
    report = check("backup")
    found = finding(report, "backup.age_seconds (database")
    assert found.status is Status.WARN
    assert f"{path.name} is 2 h 24 min old, RPO 1 h 00 min" in found.name
    assert "launch backup-database/trial takes one now" in found.hint
    assert finding(report, "a backup of database was proven").value == "never"
    older = path.rename(path.with_name("backup_20250101_030000"))
    taken = ago(49).isoformat()
    reseal(older, lambda content: content.update(name=older.name, taken=taken))
    assert finding(check("backup"), "backup.age_seconds (database").status is Status.CRITICAL


def test_a_backup_that_did_not_stand_its_proof_is_critical(day: Day) -> None:
    flip(backed_up(day) / "dump" / "toc.dat")
    with contextlib.suppress(RunbookFailed):
        verify_backup.fn(NAME)
    found = finding(check("backup"), "newest backup of database")
    assert found.status is Status.CRITICAL
    assert "failed its verification" in found.value


def test_a_proof_of_tomorrow_is_none(day: Day) -> None:
    path = backed_up(day)
    verify_backup.fn(NAME)
    assert finding(check("backup"), "a backup of database was proven").status is Status.OK
    (note,) = (path.parent / ".verified").glob("*.json")
    note.write_text(json.dumps(json.loads(note.read_text()) | {"verified": ago(-30).isoformat()}))
    assert finding(check("backup"), "a backup of database was proven").status is Status.WARN


def test_a_manifest_that_nobody_can_read_and_a_clock_that_jumped_are_told(day: Day) -> None:
    path = backed_up(day, days=-1)
    (path.parent / "backup_20250101_030000").mkdir()
    report = check("backup")
    assert "in the future" in finding(report, "clock").value
    assert finding(report, "newest backup of database").status is Status.CRITICAL, "none that can be relied on"
    assert finding(report, "backup_20250101_030000 in the store").status is Status.WARN


def test_a_disk_over_its_threshold_is_told_once_with_what_is_on_it(day: Day) -> None:
    day.write(disk=[0.0, 0.0])
    report = check("resources")
    full = [one for one in report.findings if one.name.startswith("host.disk.used_ratio")]
    assert full
    assert {one.status for one in full} == {Status.CRITICAL}
    assert sum("logs" in row[3].split(", ") for row in report.evidence[-1].rows) == 1, "each file system once"
    assert "clean-logs" in full[0].hint


def test_a_server_whose_places_are_nearly_taken_warns(day: Day) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(82):
            stack.enter_context(day.postgres.connect())
        found = finding(check("resources"), "postgres.connections.used_ratio")
    assert found.status is Status.WARN
    assert "of 100; 3 of them are reserved" in found.name


def test_redis_without_a_limit_is_told_and_one_that_is_full_is_critical(day: Day) -> None:
    client = day.redis.client()
    try:
        client.config_set("maxmemory", 0)
        report = check("resources")
        assert finding(report, "maxmemory is 0").status is Status.WARN
        assert report.facts["Redis"].endswith("without maxmemory")
        client.config_set("maxmemory", 1_000_000)
        assert finding(check("resources"), "redis.memory.used_ratio").status is Status.CRITICAL
    finally:
        client.config_set("maxmemory", 100_000_000)


def test_a_place_on_another_host_is_not_measured(day: Day, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (day.base / "trial.toml").read_text().replace("[redis]\n", '[redis]\nhost = "redis.invalid"\n')
    (day.base / "trial.toml").write_text(text)
    found = finding(check("resources"), "disk of Redis")
    assert (found.status, found.value) == (Status.WARN, "not measured: it is on redis.invalid")


def test_an_old_dump_is_well_where_a_proven_base_backup_and_wal_reach_to_now(cluster: Cluster) -> None:
    cluster.sql("postgres", "CREATE TABLE accounts (id int PRIMARY KEY)")
    name = backup_cluster.fn(CLUSTER).facts["backup"]
    backup_database.fn(CLUSTER)
    path = aged(cluster.root, 0.5)
    catalogue.mark_verified.work(store_of(Environment.find(CLUSTER), "cluster"), name, {"by": "test"})
    cluster.sql("postgres", "INSERT INTO accounts VALUES (1)")
    cluster.settle()
    report = reported(lambda: daily_check.fn(CLUSTER, "backup"))
    found = finding(report, "newest backup of database")
    assert found.status is Status.OK
    assert (
        f"{path.name} is 12 h 00 min old; recovered by point in time ({name}): nothing of grc_db is lost" in found.value
    )
    assert finding(report, "newest base backup").status is Status.OK
    assert finding(report, "newest backup of files").status is Status.CRITICAL, "there is none"
