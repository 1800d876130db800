"""The shipped production.toml for thirty days, by a clock that the test advances: real stores, real decisions and real
deletions, on backups that were really taken once and are dated anew."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml  # type: ignore[import-untyped]
from prefect.server.schemas.schedules import CronSchedule

from blocks.environment import Environment, Stores
from deployments.runbooks import has_schedule
from flows.application.files import backup_files
from flows.database.backup import backup_database, prune_backups, verify_backup
from flows.database.copies import replicate_backups
from flows.recovery.objectives.check import DANGERS, check_recovery_objectives
from flows.recovery.objectives.due import is_late
from flows.recovery.objectives.points import resources_of
from flows.redis.persistence import backup_redis
from runbook import clock
from runbook.report import Status
from tasks.backups import catalogue, manifest
from tasks.backups.catalogue import PREFIX, Backup
from tasks.backups.manifest import Kind
from tasks.backups.retention import expected_backups, read_needs, read_store
from tasks.stores.store import store_of
from tests.fixtures.postgres.templates import new_directory
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer
from tests.redis.servers import PASSWORD, running_redis

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENTS = ROOT / "deployments" / "environments"
NAME, DATABASE = "production", "thirty_days"
# Midnight in Tokyo, over the end of a month, and later than any change of the files of this test.
BEGIN, DAYS = datetime(2050, 3, 19, 15, tzinfo=UTC), 30
KINDS: tuple[Kind, ...] = ("postgres", "redis", "files")
OFTEN = ("postgres", "redis")  # the files do not change: their daily backup loses nothing
FLOWS = ("backup_database", "backup_redis", "backup_files", "verify_backup", "prune_backups", "take_due_backups")
TAKES: dict[str, Kind] = {"backup_database": "postgres", "backup_redis": "redis", "backup_files": "files"}


@dataclass
class Days:
    """The simulation: its clock, the backups that are dated anew, and what happened."""

    env: Environment
    now: datetime
    made: dict[Kind, Backup] = field(default_factory=dict)
    newest: dict[Kind, datetime] = field(default_factory=dict)
    taken: dict[str, datetime] = field(default_factory=dict)
    proven: dict[Kind, datetime] = field(default_factory=dict)
    most: dict[tuple[Stores, Kind], int] = field(default_factory=dict)
    deleted: int = 0

    def read(self, which: Stores, kind: Kind) -> tuple[Backup, ...]:
        return read_store.work(store_of(self.env, kind, which), kind, NAME).backups

    def take(self, kind: Kind) -> None:
        """A backup of this moment, and its copy in the second place."""
        one = self.made[kind].manifest
        name = f"{PREFIX[kind]}_{self.now.astimezone(self.env.zone):%Y%m%d_%H%M%S}"
        for which in get_args(Stores):
            root = Path(getattr(self.env.stores(which), kind))
            for path in one.files:
                (root / name / path).parent.mkdir(parents=True, exist_ok=True)
                os.link(self.made[kind].path / path, root / name / path)
            manifest.write(root / name, one.model_copy(update={"name": name, "taken": self.now}))
        self.newest[kind] = self.taken[name] = self.now

    def take_due(self, minutes: int) -> None:
        """As take-due-backups decides, where nothing but backups is a means against bad data."""
        for kind in OFTEN:
            loss = (self.now - self.newest[kind]).total_seconds() if kind in self.newest else None
            if is_late(loss, self.made[kind].manifest.seconds, minutes * 60, self.env.rpo_seconds):
                self.take(kind)

    def verify(self, kind: Kind) -> None:
        """As verify-backup and the next replicate-backups note it."""
        chosen = catalogue.find_backup.work(store_of(self.env, kind), kind, "latest", NAME)
        for which in get_args(Stores):
            catalogue.mark_verified.work(store_of(self.env, kind, which), chosen.name, {"by": "test"})
        self.proven[kind] = self.taken[chosen.name]

    def prune(self, kind: Kind, source: Stores) -> None:
        """The very runbook, as its schedule launches it; whatever it deletes, a newer backup is proven."""
        store = store_of(self.env, kind, source)
        before = catalogue.names(store, kind)
        self.most[source, kind] = max(self.most.get((source, kind), 0), len(before))
        report = prune_backups.fn(NAME, kind=kind, source=source)
        assert report.status in (Status.OK, Status.WARN), report.sentence()
        gone = set(before) - set(catalogue.names(store, kind))
        assert all(self.taken[name] < self.proven[kind] for name in gone)
        self.deleted += len(gone)


def shipped(base: Path, server: PostgresServer, redis_port: int, redis_data: Path) -> str:
    """production.toml with other addresses, directories and secrets; the second place is a mount in the place of a
    bucket. Nothing else is changed."""
    text = (ENVIRONMENTS / "production.toml").read_text(encoding="utf-8")
    for pattern, new in {
        r'"/var/lib/interview-ops/': f'"{base}/ops/',
        r'"/(var/backups|backup)/': f'"{base}/backups/',
        r'"s3://grc-backups-copies/': f'"{base}/copies/',
        r'(?m)^region = "ap-northeast-3"\nsse = "AES256"$': 'survives = "server"',
        r'(?m)^directory = "expectations/': f'directory = "{ENVIRONMENTS}/expectations/',
        r'"/opt/grc': f'"{base}/grc',
        r'"/var/log/': f'"{base}/log/',
        r"(?m)^port = 5432$": f"port = {server.port}",
        r'(?m)^database = "grc_db"$': f'database = "{DATABASE}"',
        r'(?m)^programs = "/usr/lib/postgresql/17/bin"$': f'programs = "{server.programs}"',
        r'(?m)^data_directory = "/var/lib/postgresql/data"$': f'data_directory = "{server.data}"',
        r'(?m)^os_user = "postgres"$': f'os_user = "{server.account.name}"',
        r"(?m)^port = 6379$": f"port = {redis_port}",
        r'(?m)^data_directory = "/var/lib/redis"$': f'data_directory = "{redis_data}"',
        r"(?m)^sentinels = .*$": "",
    }.items():
        text, number = re.subn(pattern, lambda _, new=new: new, text)  # type: ignore[misc]
        assert number, f"production.toml has no {pattern}"
    return text


@pytest.fixture
def base() -> Iterator[Path]:
    """In memory: a thousand backups are deleted there."""
    made = new_directory("thirty-days")
    yield made
    shutil.rmtree(made)


@pytest.fixture
def days(postgres_server: PostgresServer, base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Days]:
    """The environment with one real backup of each kind, taken before the clock is the test's."""
    for name, value in {
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
        "OPS_ENVIRONMENT": NAME,
        "OPS_ENVIRONMENT_FILE": str(base / "production.toml"),
        "OPS_POSTGRES_PASSWORD": ROLE_PASSWORD,
        "OPS_POSTGRES_ADMIN_PASSWORD": ADMIN_PASSWORD,
        "OPS_REDIS_PASSWORD": PASSWORD,
        **dict.fromkeys(("OPS_APPLICATION_PASSWORD", "OPS_PAGERDUTY_KEY", "OPS_SLACK_URL"), "https://slack.invalid/x"),
    }.items():
        monkeypatch.setenv(name, value)
    postgres_server.create_database(DATABASE)
    postgres_server.sql("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)", database=DATABASE)
    (base / "grc").mkdir()
    (base / "grc" / "main.py").write_text("print(1)\n")
    with running_redis() as server:
        server.client().set("session:1", "x")
        text = shipped(base, postgres_server, server.port, server.data)
        (base / "production.toml").write_text(text.replace('"redis-server"', f'"{server.program}"'))
        made = Days(Environment.find(NAME), BEGIN)
        for flow in (backup_database, backup_redis, backup_files):
            kind = TAKES[flow.fn.__name__]
            one = catalogue.open_backup(store_of(made.env, kind), flow.fn(NAME).facts["backup"])
            made.made[kind] = Backup(one.path.rename(base / kind), one.manifest, one.store)
        monkeypatch.setattr(clock, "now", lambda: made.now)
        monkeypatch.setattr("runbook.run.is_unattended", lambda target: "prune-backups" in target.unattended)
        monkeypatch.setattr("flows.database.backup.show_backups", lambda report, env: None)  # tested elsewhere
        yield made
    postgres_server.drop_database(DATABASE)


def is_played(flow: str, parameters: Mapping[str, Any]) -> bool:
    """Base backups, with their WAL, are test_base_backups_of_a_month's."""
    return flow in FLOWS and parameters.get("kind") not in ("cluster", "prefect")


def events(
    env: Environment, played: Callable[[str, Mapping[str, Any]], bool] = is_played, days: int = DAYS
) -> list[tuple[datetime, str, Mapping[str, Any]]]:
    """Every run of the schedules in prefect.yaml that a simulation plays, in order."""
    content = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    found = list[tuple[datetime, str, Mapping[str, Any]]]()
    for entry in content["deployments"]:
        flow = entry["entrypoint"].rpartition(".")[2]
        if not has_schedule(entry, env) or not played(flow, entry["parameters"]):
            continue
        for one in entry.get("schedules") or []:
            schedule = CronSchedule(cron=one["cron"], timezone=one["timezone"])
            each = [BEGIN + timedelta(days=number) for number in range(days + 1)]
            dates = [
                moment
                for first, last in itertools.pairwise(each)
                for moment in asyncio.run(schedule.get_dates(100, first, last - timedelta(seconds=1)))
            ]
            found += [(datetime.fromtimestamp(one.timestamp(), UTC), flow, entry["parameters"]) for one in dates]
    return sorted(found, key=lambda one: (one[0], one[1]))


def test_production_sustains_itself(days: Days) -> None:
    assert {"prune-backups", "discard-superseded"} <= set(days.env.unattended)
    for moment, flow, parameters in events(days.env):
        days.now = moment
        kind: Kind = parameters.get("kind", "postgres")
        if flow in TAKES and days.newest.get(TAKES[flow]) != moment:
            days.take(TAKES[flow])
        elif flow == "verify_backup":
            days.verify(kind)
        elif flow == "prune_backups":
            days.prune(kind, parameters.get("source", "backups"))
        elif flow == "take_due_backups":
            days.take_due(15)
    _judge_stores(days)
    days.now += timedelta(minutes=1)
    report = check_recovery_objectives.fn(NAME)
    judged = {one.name: one for one in report.findings}
    for resource in resources_of(days.env):
        for danger in DANGERS:
            assert judged[f"{resource}, {danger}"].status is not Status.CRITICAL
    assert not [name for name in judged if name.endswith("between two backups")], "pruning made the gaps, not the RPO"
    assert replicate_backups.fn(NAME).outcome == "every backup has a copy", "what was pruned is not copied again"
    oldest = days.read("copies", "postgres")[0].name
    assert verify_backup.fn(NAME, backup=oldest, source="copies").status in (Status.OK, Status.WARN)


def _judge_stores(days: Days) -> None:
    keep = days.env.backups.keep
    needs, problems = read_needs(days.env)
    assert not problems
    for which in get_args(Stores):
        for kind in KINDS:
            left = days.read(which, kind)
            of_days = {one.manifest.taken.astimezone(days.env.zone).date() for one in left}
            assert len(of_days) >= DAYS, "one of each day"
            most = expected_backups(keep, 34 if kind in OFTEN else 1)
            assert most * 0.6 < days.most[which, kind] <= most, "never more on the way"
            (need,) = [one for one in needs if (one.which, one.kind) == (which, kind)]
            assert need.there_bytes <= need.bytes <= need.there_bytes * 1.7, "what the doctor says"
    assert days.deleted > 2 * len(OFTEN) * (DAYS - 5) * 30
