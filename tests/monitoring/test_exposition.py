"""What Prometheus gets of an environment, and that rules and dashboard use nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from blocks.config import toml
from deployments import observability
from flows.monitoring import exposition
from flows.monitoring.exposition import Exposition, known_of
from flows.monitoring.rounds import Round, take_round
from flows.monitoring.serve import HostWatcher, MetricsWatcher
from flows.monitoring.sources import Reading
from flows.monitoring.table import ALARMS
from runbook.errors import OpsError
from tasks.recovery_points import standing
from tasks.recovery_points.standing import BackupAge, LastDrill, Recoverable, RecoveryStanding
from tests.fixtures.servers import free_port
from tests.monitoring.watched import NAME, Watched, backend, small_postgres, small_redis, watched, without_prefect

__all__ = ["backend", "small_postgres", "small_redis", "watched"]
Sample = tuple[str, frozenset[tuple[str, str]]]
USED = re.compile(r"\bops_\w+")
OTHER = "127.0.0.2"


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with without_prefect():
        yield


@contextmanager
def served(made: Exposition) -> Iterator[str]:
    port = free_port()
    stop = exposition.serve(made, "127.0.0.1", port)
    try:
        yield f"http://127.0.0.1:{port}/metrics"
    finally:
        stop()


def scraped(address: str) -> dict[Sample, float]:
    """As Prometheus' own parser reads it; no sample twice."""
    families = text_string_to_metric_families(httpx.get(address, trust_env=False).raise_for_status().text)
    samples = [one for family in families for one in family.samples]
    found = {(one.name, frozenset(one.labels.items())): one.value for one in samples}
    assert len(found) == len(samples)
    assert {name for name, _ in found} <= exposition.names()
    assert all(dict(labels)["environment"] == NAME for _, labels in found)
    return found


def value(found: dict[Sample, float], name: str, **labels: str) -> float | None:
    """Of the sample with these labels among others."""
    wanted = set(labels.items())
    values = [one for (known, own), one in found.items() if known == name and wanted <= own]
    assert len(values) <= 1, f"{name} {labels}"
    return values[0] if values else None


def at(moment: datetime) -> Callable[[], datetime]:
    return lambda: moment


def record(now: datetime) -> RecoveryStanding:
    database = Recoverable(
        "database",
        "green",
        "",
        now - timedelta(minutes=3),
        180.0,
        240.5,
        "point in time",
        "restore-to-point",
        "2026-11-28",
        "at most the writes of app of the last 3 min are lost",
    )
    lost = Recoverable(
        "redis", "red", "none", None, None, None, "none", "show-recovery-options", "", "everything of Redis is lost"
    )
    ages = (BackupAge("postgres", now - timedelta(hours=1), now - timedelta(hours=25)), BackupAge("redis", None, None))
    drill = LastDrill(now - timedelta(days=3), "CRITICAL", "full_restore", None)
    return RecoveryStanding(NAME, "", "Asia/Tokyo", now, 3600.0, 14400.0, (database, lost), ages, drill, None)


def test_everything_that_is_known_is_served_and_what_is_not_measured_is_absent(watched: Watched) -> None:
    found = watched.rounds(2)
    now = watched.at(watched.minute)
    standing.save(watched.reports, record(now))
    with (
        served(MetricsWatcher(NAME).exposition()),
        served(Exposition(at_env(watched), known_of(at_env(watched)), at(now))) as url,
    ):
        samples = scraped(url)
    for name, one in found.standings.items():
        exported = exposition.exported(name)
        assert value(samples, exported) == pytest.approx(one.value)
        assert value(samples, f"{exported}_measured") == 1
        assert value(samples, "ops_metric_exceeded", metric=name) == 0
    assert value(samples, "ops_watch_last_round_timestamp_seconds") == pytest.approx(now.timestamp())
    assert (value(samples, "ops_objective_rpo_seconds"), value(samples, "ops_objective_rto_seconds")) == (3600, 14400)
    assert value(samples, "ops_recovery_loss_seconds", resource="database") == 180
    assert value(samples, "ops_recovery_estimate_seconds", resource="database") == 240.5
    assert value(samples, "ops_recovery_point_timestamp_seconds", resource="database") == now.timestamp() - 180
    assert value(samples, "ops_recovery_loss_seconds", resource="redis") is None
    assert value(samples, "ops_recovery_loss_seconds_measured", resource="redis") == 0
    assert value(samples, "ops_recovery_proven", resource="redis") == 0
    assert value(samples, "ops_backup_age_seconds", kind="postgres") == 3600
    assert value(samples, "ops_backup_verified_age_seconds", kind="postgres") == 25 * 3600
    assert value(samples, "ops_backup_age_seconds", kind="redis") is None
    assert value(samples, "ops_backup_age_seconds_measured", kind="redis") == 0
    assert value(samples, "ops_drill_last_timestamp_seconds") == now.timestamp() - 3 * 86400
    assert (value(samples, "ops_drill_last_ok"), value(samples, "ops_drill_last_rto_seconds")) == (0, None)

    late = at(now + timedelta(hours=1))
    with served(Exposition(at_env(watched), known_of(at_env(watched)), late)) as url:
        old = scraped(url)
    assert {name for name, _ in old if name in {exposition.exported(one) for one in ALARMS}} == set()
    assert {one for (name, _), one in old.items() if name == "ops_api_error_ratio_measured"} == {0}
    assert value(old, "ops_recovery_loss_seconds", resource="database") is None, "nobody has checked for an hour"
    assert value(old, "ops_backup_age_seconds_measured", kind="postgres") == 0
    assert value(old, "ops_watch_last_round_timestamp_seconds") == pytest.approx(now.timestamp())


def at_env(watched: Watched) -> Callable[[], toml.Environment]:
    return lambda: watched.environment


def test_rules_and_dashboard_use_only_what_is_exported_and_the_same_limits() -> None:
    for path, text in observability.texts({}).items():
        assert path.read_text() == text, "python -m deployments.observability makes it again"
    groups = yaml.safe_load(observability.RULES.read_text())["groups"]
    rules = {rule["alert"]: rule for group in groups for rule in group["rules"]}
    assert sum(len(group["rules"]) for group in groups) == len(rules), "every name once"
    board = json.loads(observability.DASHBOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries.append(board["templating"]["list"][0]["query"])
    for expr in [*(str(rule["expr"]) for rule in rules.values()), *queries]:
        used = set(USED.findall(expr))
        assert used, expr
        assert used <= exposition.names(), expr
    for metric in ALARMS.values():
        name = exposition.exported(metric.name)
        (over,) = [rule for rule in rules.values() if str(rule["expr"]).startswith(f"{name} > ")]
        assert float(over["expr"].split(" > ")[1]) == metric.limit({})
        assert over["for"] == "2m"
        assert over["labels"]["severity"] == {"severe": "critical", "normal": "warning"}[metric.severity]
        assert any(rule["expr"] == f"{name}_measured == 0" for rule in rules.values())
        assert any(name in expr for expr in queries), f"{name} is in the dashboard"
    own = observability.rules({"host.disk.used_ratio": (0.5, 0.6)})["groups"][0]["rules"]
    assert "ops_host_disk_used_ratio > 0.5" in [rule["expr"] for rule in own]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_another_host_is_measured_by_its_own_watcher_and_never_left_out(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blocks.hosts._is_own", lambda host: False)  # though it is this machine's
    watched.toml.write_text(watched.toml.read_text().replace("[redis]\n", f'[redis]\nhost = "{OTHER}"\n'))
    names = [f"host.disk.used_ratio@{OTHER}", f"host.cpu.used_ratio@{OTHER}"]
    found = measured(watched, 0, names)
    assert {one.value for one in found.values()} == {None}
    assert "no watcher measures 127.0.0.2" in found[names[0]].told

    there = HostWatcher(NAME, OTHER)
    there.round()
    with served(there.exposition()) as url:
        port = url.split(":")[2].split("/")[0]
        watched.toml.write_text(watched.toml.read_text() + f'[monitoring.hosts]\n"{OTHER}" = "{url}"\n')
        assert port in watched.environment.monitoring.hosts[OTHER]
        found = measured(watched, 1, names)
        assert all(one.value is not None and 0 <= one.value <= 1 for one in found.values()), found
        with served(Exposition(at_env(watched), known_of(at_env(watched)), at(watched.at(1)))) as main:
            assert value(scraped(main), "ops_host_disk_used_ratio", host=OTHER) == pytest.approx(found[names[0]].value)
        there._at = datetime.now(UTC) - timedelta(hours=1)
        found = measured(watched, 2, names)
        assert {one.value for one in found.values()} == {None}
        assert "has not measured for" in found[names[0]].told
    found = measured(watched, 3, names)
    assert "does not answer" in found[names[0]].told


def measured(watched: Watched, minute: int, names: list[str]) -> dict[str, Reading]:
    """A round now, since the other watcher tells the real time."""
    watched.begin = datetime.now(UTC) - timedelta(minutes=minute)
    (watched.reports / "metrics" / "state.json").unlink(missing_ok=True)
    watched.requests(20)
    found: Round = take_round(watched.environment, watched.at(minute))
    return {name: Reading(found.standings[name].value, found.standings[name].told) for name in names}


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ('metrics_address = "9187"', "metrics_address"),
        ('hosts = { db1 = "db1:9187" }', "hosts"),
        ('metrics_adress = "127.0.0.1:9187"', "metrics_adress"),
    ],
)
def test_a_wrong_address_is_refused_with_what_is_expected(watched: Watched, more: str, key: str) -> None:
    watched.toml.write_text(watched.toml.read_text() + f"[monitoring]\n{more}\n")
    with pytest.raises(OpsError, match=rf"\[monitoring\] {key} is wrong"):
        _ = watched.environment


def test_an_address_that_is_taken_is_said(watched: Watched) -> None:
    with served(MetricsWatcher(NAME).exposition()) as url:
        port = int(url.split(":")[2].split("/")[0])
        with pytest.raises(OpsError, match="metrics cannot be served"):
            exposition.serve(MetricsWatcher(NAME).exposition(), "127.0.0.1", port)
