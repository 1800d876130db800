"""A day in environments that have few parts: every scheduled runbook once, in the order of time, and none is red."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from prefect import Flow
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema

from blocks.config import toml
from blocks.environment import Environment
from deployments.maintenance import entries
from deployments.runbooks import has_schedule, has_to_run
from runbook.errors import OpsError, RunbookFailed
from runbook.report import NOT_CONFIGURED, Report, Status
from tests.fixtures.workday import NAME, Day
from tests.redis.servers import RedisServer, running_redis

HEAD = """
name = "trial"
reports = "{base}/reports"
unattended = ["prune-backups", "discard-superseded"]
[objectives]
rpo = "1h"
rto = "4h"
[backups]
survives = "server" # the tests' host stands for another machine
postgres = "{base}/backups/postgresql"
redis = "{base}/backups/redis"
files = "{base}/backups/files"
spool = "{base}/spool"
"""
POSTGRES = """
[postgres]
port = {postgres.port}
database = "{database}"
user = "grc_user"
password_env = "TRIAL_PASSWORD"
admin_password_env = "TRIAL_ADMIN_PASSWORD"
programs = "{postgres.programs}"
data_directory = "{postgres.data}"
os_user = "{postgres.account.name}"
"""
REDIS = """
[redis]
port = {redis.port}
password_env = "TRIAL_REDIS_PASSWORD"
data_directory = "{redis.data}"
config_file = "{redis.configuration}"
server_program = "{redis.program}"
os_user = "{redis.account.name}"
"""
BACKEND = """
[application]
url = "{backend.url}"
frontend_url = ""
directory = "{base}/application"
backend_directory = ""
python = ""
migrations = "none"
[logs]
app = "{base}/log/app.log"
audit = "{base}/log/audit.log"
backup = "{base}/log/db_backup.log"
rotation = "{base}/logrotate.conf"
"""
ENVIRONMENTS = {"PostgreSQL alone": (POSTGRES,), "Redis alone": (REDIS,), "no frontend": (POSTGRES, REDIS, BACKEND)}
WAITS_FOR_PEOPLE = "run-checklist"
"""It is suspended until somebody answers: tests/routine/checklist/test_checklist.py."""
FIRST_BACKUPS = ("backup-database", "backup-redis", "backup-files")
OF_THE_HOST = ("host.",)
"""The disks and the load of the tests' host are nobody's to judge."""


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that a runbook asked for and that the environment does not have."""
    asked, plain = list[str](), Environment._part

    def part(self: Environment, name: str) -> Any:
        if name not in self.slugs:
            asked.append(name)
        return plain(self, name)

    monkeypatch.setattr(Environment, "_part", part)
    return asked


@pytest.fixture(scope="module")
def durable_redis() -> Iterator[RedisServer]:
    """One that keeps what clients write, as the manual has it (§2.3)."""
    settings = ["maxmemory 100mb", "save 900 1 300 10 60 10000", "appendonly yes", "stop-writes-on-bgsave-error yes"]
    with running_redis(settings=settings) as server:
        yield server


@pytest.fixture(params=list(ENVIRONMENTS))
def few(
    day: Day,
    durable_redis: RedisServer,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    prefect_server: str,
) -> Environment:
    """Each of the environments, on real servers."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    (day.base / "application").mkdir()
    (day.base / "application" / "file").write_text("a user's\n")
    for log in ("audit.log", "db_backup.log"):
        (day.logs / log).touch()
    (day.base / "logrotate.conf").write_text(f"{day.logs}/*.log {{\n  daily\n  rotate 30\n}}\n")
    text = "".join((HEAD, *ENVIRONMENTS[request.param]))
    (day.base / "trial.toml").write_text(text.format(**{**vars(day), "redis": durable_redis}))
    return toml.environment(NAME)


def at(entry: Mapping[str, Any]) -> tuple[int, int]:
    """The first time of a day: hour and minute."""
    minute, hour, *_ = entry["schedules"][0]["cron"].split()
    return (0 if hour == "*" else int(hour), int(minute.removeprefix("*/").split(",")[0]) * minute.isdecimal())


def day_of(env: Environment) -> list[tuple[str, Mapping[str, Any]]]:
    """Whatever this environment has a schedule for, weekly and yearly ones too; the guide's first backups before."""
    chosen = {
        name: entry
        for name, entry in entries().items()
        if has_schedule(entry, env) and entry.get("schedules") and name.partition("/")[0] != WAITS_FOR_PEOPLE
    }
    first = [(name, chosen[name]) for name in FIRST_BACKUPS if name in chosen]
    return [*first, *sorted(chosen.items(), key=lambda one: at(one[1]))]


def launched(entry: Mapping[str, Any]) -> Report | str:
    """Its report, or why there is none."""
    flow: Flow[..., Report] = load_flow_from_entrypoint(entry["entrypoint"])
    given = flow.validate_parameters({**entry["parameters"], "environment": NAME})
    try:
        return flow.fn(**given)
    except RunbookFailed as error:
        return error.report
    except OpsError as error:
        return str(error)


def red(report: Report | str) -> Sequence[str]:
    """Why a run is Failed."""
    if isinstance(report, str):
        return [report]
    bad = [one for one in report.findings if one.status is Status.CRITICAL and not one.name.startswith(OF_THE_HOST)]
    return [f"{one.name}: {one.value} — {one.hint}" for one in bad]


def test_a_day_without_a_red_run(few: Environment, missing: list[str]) -> None:
    reports = [(name, launched(entry)) for name, entry in day_of(few)]
    assert len(reports) > 12
    assert {name: why for name, report in reports if (why := red(report))} == {}
    assert missing == [], "what is not there is nobody's to ask for"
    absent = {"redis", "logs", "docker"} - few.slugs.keys()
    left_out = {
        part for _, one in reports if isinstance(one, Report) for part in one.facts.get(NOT_CONFIGURED, "").split(", ")
    }
    assert absent <= left_out
    for name, report in reports:
        assert isinstance(report, Report)
        assert not [one.name for one in report.findings if "names no" in one.value], name


def by_hand(env: Environment) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What is deployed without a schedule, and is launched with nothing filled in."""
    for name, entry in entries().items():
        if has_to_run(entry, env) and not entry.get("schedules") and name != WAITS_FOR_PEOPLE:
            flow = load_flow_from_entrypoint(entry["entrypoint"])
            if set(parameter_schema(flow.fn).required) <= set(entry["parameters"]):
                yield name, entry


def test_what_is_deployed_needs_nothing_that_is_missing(few: Environment, missing: list[str]) -> None:
    """Every other runbook, with an empty form: whatever it says, it does not ask for a part that is not there."""
    wrong = dict[str, list[str]]()
    for name, entry in by_hand(few):
        launched(entry)
        if missing:
            wrong[name] = list(missing)
            missing.clear()
    assert wrong == {}
