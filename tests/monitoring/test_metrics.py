"""watch_metrics: each row of appendix B, seeded for real, is found after its minimum duration and not before."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest

from blocks.config import toml
from blocks.places import Logs
from flows.monitoring import sources
from flows.monitoring.metrics import watch_metrics
from flows.monitoring.scaling import advise_scaling
from flows.monitoring.serve import MetricsWatcher
from flows.monitoring.table import ALARMS, TABLE
from runbook.errors import OpsError, RunbookFailed
from runbook.language.catalogue import read
from runbook.metrics import CATALOGUE
from runbook.report import Status
from runbook.wait import until
from tasks.host.disk import Disk, disk_of
from tasks.monitoring import history, state
from tests.fixtures.servers import free_port
from tests.monitoring.watched import (
    MOST_CONNECTIONS,
    NAME,
    Backend,
    Watched,
    backend,
    small_postgres,
    small_redis,
    watched,
    without_prefect,
)

__all__ = ["backend", "small_postgres", "small_redis", "watched"]
Seed = Callable[[Watched], AbstractContextManager[object]]
MANUAL = {
    "レスポンスタイム": ("API response time", 2, "アラート", "alert on-call"),
    "エラーレート": ("API error rate", 0.05, "緊急対応", "emergency response"),
    "接続数": ("database connections in use", 0.8, "スケールアップ", "scale up"),
    "レプリケーション遅延": ("replication lag", 10, "調査", "find the cause"),
    "メモリ使用率": ("Redis memory in use", 0.9, "キャッシュクリア", "clear the cache"),
    "CPU使用率": ("CPU time in use", 0.8, "スケールアップ", "scale up"),
    "ディスク使用率": ("disk space in use", 0.85, "クリーンアップ", "clean up"),
    "トークン使用量": ("AI token budget", 0.8, "コスト最適化", "optimise costs"),
}


def test_the_table_is_the_manuals() -> None:
    path = toml.DIRECTORY / "production.toml"
    written = {name: tuple(pair) for name, pair in tomllib.loads(path.read_text())["thresholds"].items()}
    assert {one.name: CATALOGUE[one.name].limits for one in TABLE} == {one.name: written[one.name] for one in TABLE}
    assert [(one.title, one.limit({}), one.action) for one in TABLE] == [
        (title, limit, action) for title, limit, _, action in MANUAL.values()
    ]
    known = read("ja")
    for title, (english, _, _, action) in MANUAL.items():
        assert title in known[english]
        assert action in known
    assert ALARMS["redis.memory.used_ratio"].limit({"redis.memory.used_ratio": (0.5, 0.6)}) == 0.6
    assert ALARMS["host.disk.used_ratio"].limit({"host.disk.used_ratio": (0.5, 0.6)}) == 0.5


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Events are kept."""
    with without_prefect():
        yield


def exceeded(watched: Watched) -> set[str]:
    return {name for name, one in state.load(watched.reports).standings.items() if one.exceeded}


@contextmanager
def slow(watched: Watched) -> Iterator[None]:
    watched.requests(5, milliseconds=3000)
    yield


@contextmanager
def failing(watched: Watched) -> Iterator[None]:
    watched.requests(20, status=500)
    yield


@contextmanager
def crowded(watched: Watched) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for _ in range(MOST_CONNECTIONS - 3):
            stack.enter_context(watched.postgres.connect())
        yield
    until(lambda: not sessions(watched), what="the end of the sessions, which the server sees later", seconds=120)


def sessions(watched: Watched) -> int:
    """Of clients, but for the one that asks."""
    others = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    return int(watched.postgres.sql(others)[0][0])


@contextmanager
def full_redis(watched: Watched) -> Iterator[None]:
    with watched.redis.client() as client:
        client.config_set("maxmemory", 16_000_000)
        try:
            number = 0
            while client.info("memory")["used_memory"] < 0.95 * 16_000_000:
                client.set(f"cache:{number}", "x" * 100_000)
                number += 1
            yield
        finally:
            client.flushall()
            client.config_set("maxmemory", 0)


@contextmanager
def busy(watched: Watched) -> Iterator[None]:
    """One processor of however many, and a limit below that."""
    watched.limit("host.cpu.used_ratio", 0.3 / (os.cpu_count() or 1))
    burning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        own = psutil.Process(burning.pid)
        until(lambda: own.cpu_times().user > 1, what="a second that it has burnt", seconds=120, every_seconds=0.02)
        yield
    finally:
        burning.kill()
        burning.wait()
        watched.limit("host.cpu.used_ratio", 2)


@contextmanager
def full_disk(watched: Watched) -> Iterator[None]:
    """Lowered: nobody fills a disk for a test."""
    watched.limit("host.disk.used_ratio", 0.000001)
    yield
    watched.limit("host.disk.used_ratio", 2)


@contextmanager
def spent(watched: Watched) -> Iterator[None]:
    told = {
        "timestamp": watched.at(watched.minute).isoformat(),
        "level": "INFO",
        "logger": "grc.ai",
        "message": "AI API Call",
        "module": "ai",
        "provider": "azure",
        "model": "gpt-4o",
        "prompt_tokens": 500_000,
        "completion_tokens": 1_000_000,
        "total_tokens": 1_500_000,
    }
    with watched.log.open("a") as log:
        log.write(json.dumps(told) + "\n")  # 1 + 8 of a budget of 10
    yield


SEEDS: dict[str, Seed] = {
    "api.response_seconds": slow,
    "api.error_ratio": failing,
    "postgres.connections.used_ratio": crowded,
    "redis.memory.used_ratio": full_redis,
    "host.cpu.used_ratio": busy,
    "host.disk.used_ratio": full_disk,
    "ai.tokens.budget_ratio": spent,
}


def test_a_system_that_is_well_is_said_to_be(watched: Watched) -> None:
    found = watched.rounds(4)
    assert exceeded(watched) == set()
    assert {name for name, one in found.standings.items() if not one.measured} == set()
    assert found.standings.keys() == ALARMS.keys() - {
        *("postgres.replication.lag_seconds", "postgres.wal.streams_missing", "services.stopped")
    }, "no standby, no services in it"
    assert state.load(watched.reports).unsent == []
    report = watch_metrics.fn(NAME)
    assert report.status is Status.OK, report.sentence()
    assert "metrics are healthy" in report.outcome
    assert "<svg" in next(item.svg for item in report.evidence if "24 hours" in item.name)
    assert "svg" in str(report.as_json())


@pytest.mark.parametrize("metric", SEEDS)
def test_each_row_is_found_after_three_minutes_and_is_well_again_after_three(watched: Watched, metric: str) -> None:
    watched.round()
    last = {"ai.tokens.budget_ratio": 61}.get(metric, 0)  # tokens are added up once an hour
    watched.minute += last
    with SEEDS[metric](watched):
        for _ in range(2):
            found = watched.round()
            assert exceeded(watched) == set(), "too early"
            assert found.standings[metric].against > 0
        found = watched.round()
        assert found.changed == {metric: "exceeded"}
        (event,) = [one for one in found_events(watched) if one["payload"]["metric"] == metric]
    assert event["event"] == "ops.metric.exceeded"
    assert event["resource"]["prefect.resource.id"] == f"ops.metric.{NAME}.{metric}"
    assert event["resource"]["ops.metric.measured"] == "yes"
    told = event["payload"]
    assert told["environment"] == NAME
    assert told["value"] > told["threshold"]
    assert told["hint"]
    assert told["severity"] == ("severe" if metric == "api.error_ratio" else "normal")
    assert ALARMS[metric].title in told["what"]
    if metric == "ai.tokens.budget_ratio":
        return  # a month's cost does not come down
    watched.minute += 5 * (metric in ("api.response_seconds", "api.error_ratio"))  # of the last five minutes
    assert watched.rounds(2).standings[metric].exceeded, "too early"
    assert watched.round().changed == {metric: "recovered"}
    assert [one["event"] for one in found_events(watched)] == ["ops.metric.exceeded", "ops.metric.recovered"]


def found_events(watched: Watched) -> list[dict[str, object]]:
    """Kept, since no Prefect server runs for these tests."""
    return state.load(watched.reports).unsent


def test_the_application_down_is_an_error_rate_of_all(watched: Watched, backend: Backend) -> None:
    backend.status = 503
    assert watched.rounds(3).changed == {"api.error_ratio": "exceeded"}
    with pytest.raises(RunbookFailed, match="API error rate.*100 %.*backend answers 503"):
        watch_metrics.fn(NAME)


def test_a_dead_database_is_not_measured_and_that_is_severe(watched: Watched) -> None:
    watched.round()
    watched.postgres.stop()
    try:
        watched.rounds(2)
        assert exceeded(watched) == set()
        assert watched.round().changed == {"postgres.connections.used_ratio": "exceeded"}
    finally:
        watched.postgres.start()
    (event,) = found_events(watched)
    assert event["payload"]["value"] is None
    assert event["payload"]["severity"] == "severe"
    assert event["resource"]["ops.metric.measured"] == "no"
    assert "does not answer" in event["payload"]["what"]
    assert watched.rounds(3).changed == {"postgres.connections.used_ratio": "recovered"}


def test_a_server_whose_places_are_all_taken_is_full_and_not_unknown(watched: Watched) -> None:
    with contextlib.ExitStack() as stack:
        opened = list[object]()

        def all_taken() -> bool:
            """By this test: who has left has a place for a moment yet."""
            with contextlib.suppress(psycopg.OperationalError):
                opened.append(stack.enter_context(watched.postgres.connect()))
            return len(opened) == MOST_CONNECTIONS

        until(all_taken, what="every place", seconds=120, every_seconds=0)
        found = watched.round().standings["postgres.connections.used_ratio"]
    assert found.value == 1.0
    assert "too many clients" in found.told


def test_a_log_that_cannot_be_read_is_not_measured(watched: Watched) -> None:
    watched.round()
    watched.log.unlink()
    watched.log.mkdir()
    watched.minute += 1
    from flows.monitoring.rounds import take_round

    found = take_round(watched.environment, watched.at(watched.minute))
    assert not found.standings["api.error_ratio"].measured
    assert found.standings["api.response_seconds"].measured, "/health tells it"


def test_an_alarm_that_stays_is_told_again_after_ten_minutes_and_then_once_an_hour(
    watched: Watched, backend: Backend
) -> None:
    backend.status = 500
    watched.rounds(3)
    for skipped, told in ((9, 1), (1, 2), (50, 2), (10, 3), (10, 3)):
        watched.minute += skipped - 1
        watched.round()
        assert [one["payload"]["metric"] for one in found_events(watched)] == ["api.error_ratio"] * told
    again = [one["resource"]["ops.metric.again"] for one in found_events(watched)]
    assert again == ["no", "yes", "yes"], "what was done about it did not help"


def test_requests_are_counted_across_a_rotation_and_none_that_is_older(watched: Watched) -> None:
    from tasks.logs.reading.access import read_access

    watched.minute = 0
    watched.requests(300, milliseconds=9000)  # too old by the time that they are looked at
    watched.minute = 10
    watched.requests(3000)
    watched.requests(7, status=502)
    watched.log.rename(watched.log.with_suffix(".log.1"))
    watched.requests(10, milliseconds=50)
    found = read_access.work(Logs(app=str(watched.log), access_logger="grc_backend.access"), watched.at(6))
    assert (found.requests, found.errors, found.slow_seconds, found.whole) == (3017, 7, 0.02, True)


def test_a_report_is_filed_where_something_changed_and_not_each_minute(watched: Watched) -> None:
    first = watch_metrics.fn(NAME)
    again = watch_metrics.fn(NAME)
    assert first.path == again.path
    assert "by another run" in again.facts["measured"], "within half a minute nobody measures twice"


def test_what_is_kept_of_the_past_is_small_and_its_peaks_stay(watched: Watched) -> None:
    directory = state.directory_of(watched.reports)
    directory.mkdir(parents=True)
    end = datetime(2026, 11, 26, 12, tzinfo=UTC)
    begin, value = end - timedelta(days=4), 0.0
    for minute in range(4 * 1440):
        value = 0.9 if minute == 100 else 0.25
        history.append(watched.reports, begin + timedelta(minutes=minute), {"host.cpu.used_ratio": value, "x": None})
    before = history.history(watched.reports, "host.cpu.used_ratio", begin)
    assert len(before) == 4 * 1440
    with (directory / "day-2026-11-22.jsonl").open("a") as torn:
        torn.write('{"at": "2026-11-')
    (directory / "2025-01.jsonl").write_text("")
    for _ in range(2):
        history.tidy(watched.reports, end)
        after = history.history(watched.reports, "host.cpu.used_ratio", begin - timedelta(hours=1))
        assert after["most"].max() == 0.9
        assert after["value"].min() == 0.25
        assert len(after) < 4 * 1440 - 600
    names = sorted(path.name for path in directory.glob("*.jsonl"))
    assert names == ["2026-11.jsonl", "day-2026-11-24.jsonl", "day-2026-11-25.jsonl", "day-2026-11-26.jsonl"]
    assert len((directory / "2026-11.jsonl").read_text().splitlines()) == 36, "one for each hour"
    assert history.history(watched.reports, "x", begin).empty


def test_disk_usage_agrees_with_df(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def agrees() -> bool:
        """Others write to this disk meanwhile."""
        shown = subprocess.run(["df", "--output=pcent", tmp_path], capture_output=True, text=True, check=True).stdout
        return int(shown.split()[-1].rstrip("%")) == math.ceil(100 * disk_of(tmp_path).bytes_ratio)

    until(agrees, what="the same figure", seconds=120, every_seconds=0.02)
    reserved = os.statvfs_result((4096, 4096, 1000, 100, 50, 0, 0, 0, 0, 255))  # 900 used, 50 for all, 50 for root
    monkeypatch.setattr(os, "statvfs", lambda _: reserved)
    assert disk_of(tmp_path).bytes_ratio == pytest.approx(900 / 950)


def test_a_disk_that_nobody_may_see_is_not_measured(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = watched.root / "closed"
    watched.toml.write_text(
        watched.toml.read_text().replace("[services]", f'[backups]\npostgres = "{closed}"\n[services]')
    )

    def refused(path: Path) -> Disk:
        if path == closed:
            raise OpsError(f"the disk of {path} cannot be measured: Permission denied")
        return disk_of(path)

    monkeypatch.setattr(sources, "disk_of", refused)
    reading = sources.read_disks(watched.environment)["host.disk.used_ratio"]
    assert reading.value is None
    assert str(closed) in reading.told


def test_scaling_says_by_how_much(watched: Watched) -> None:
    with crowded(watched):
        watched.round()
    report = advise_scaling.fn(NAME)
    assert report.outcome == f"raise max_connections from {MOST_CONNECTIONS} to 30"
    assert "max_connections = 30" in report.facts["to raise it"]
    history.append(watched.reports, watched.begin, {"host.cpu.used_ratio": 1.0})
    report = advise_scaling.fn(NAME, part="cpu")
    assert "raise the processors of this host" in report.outcome


def test_scaling_without_a_past_says_so_and_what_is_enough_is_enough(watched: Watched) -> None:
    report = advise_scaling.fn(NAME)
    assert report.status is Status.WARN
    assert "only the current one is known" in report.sentence()
    assert "are enough" in report.outcome


def test_a_served_round_is_cheap_and_its_process_ends_when_it_is_told_to(watched: Watched) -> None:
    port = free_port()
    watched.toml.write_text(watched.toml.read_text() + f'[monitoring]\nmetrics_address = "127.0.0.1:{port}"\n')
    argv = [sys.executable, "-m", "flows.monitoring.serve", "--environment", NAME, "--every-seconds", "0.5"]
    told = watched.root / "served.txt"
    with told.open("w") as out:
        process = subprocess.Popen(argv, env={**os.environ, "PREFECT_API_URL": ""}, stdout=out, stderr=out)
    try:
        until(lambda: "metrics are healthy (" in told.read_text(), what="a round", seconds=300)
        seconds = float(told.read_text().partition("metrics are healthy (")[2].split(",")[1].split()[0])
        assert seconds <= 2.0, told.read_text()
        until(lambda: list(watched.reports.glob("*-watch-metrics.json")), what="its report", seconds=120)
        until((watched.reports / "recoverability.json").exists, what="what can be recovered", seconds=120)
        served = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        assert 'ops_postgres_connections_used_ratio{environment="watched"}' in served
        assert 'ops_recovery_loss_seconds_measured{environment="watched",resource="database"} 0.0' in served
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, told.read_text()
    finally:
        process.kill()
        process.wait(120)
    assert "Traceback" not in told.read_text()


def test_a_round_that_fails_does_not_end_the_watcher(watched: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    watched.toml.write_text("name = 3\n")
    watcher = MetricsWatcher(NAME, every_seconds=0.01)
    thread = threading.Thread(target=watcher.run)
    thread.start()
    until(lambda: "is wrong" in capsys.readouterr().out, what="what is wrong", seconds=120)
    assert thread.is_alive()
    watcher.stop.set()
    thread.join(120)
    assert not thread.is_alive()
