"""What a full restore takes for “there is no backup”, and what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from blocks.environment import Environment
from flows.recovery.full.choose import Chosen, choose
from flows.redis.restore import sources as redis_sources
from runbook.current import use_report
from runbook.errors import OpsError, RunbookFailed, VerificationFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.redis.restore.survivors import IS_EMPTY, IS_SYNCING, SurvivingCopy, Survivors
from tasks.redis.topology.topology import read_topology
from tests.fixtures.reports import finding as of
from tests.fixtures.servers import free_port
from tests.recovery.conftest import System


def new(system: System) -> Report:
    return Report("trial", system.name, limits=Environment.find(system.name).limits)


def chosen(env: Environment, report: Report, **named: object) -> Chosen:
    with use_report(report):
        return choose(report, env, "latest", "backups", latest=True, **named)  # type: ignore[arg-type]


def with_stores(system: System, **places: object) -> Environment:
    env = Environment.find(system.name)
    return env.with_parts({**env.parts(), "backups": env.backups.model_copy(update=places)})


def survivors(env: Environment) -> Survivors:
    return redis_sources.find(Report("trial", env.name), env, read_topology(env.redis, env.reports_directory))


@pytest.mark.parametrize("part", ["redis", "files"])
def test_a_store_that_is_away_is_no_store_without_backups(system: System, part: str) -> None:
    login = {"access_key": "key", "secret_key": SecretStr("secret"), "patience_seconds": 0.1}
    away = with_stores(system, **{part: "s3://away/x"}, endpoint=f"http://127.0.0.1:{free_port()}", **login)
    with pytest.raises(OpsError, match="s3://away/x"):
        chosen(away, new(system))
    report = new(system)
    found = chosen(away, report, without=(part,))
    assert getattr(found, part) is None
    assert report.facts[f"{part} backup"] == f"skipped (without={part})", "only when it is asked for by name"


def test_unreadable_backups_are_not_none(system: System, tmp_path: Path) -> None:
    (tmp_path / "dump_20260101_000000").mkdir()
    with pytest.raises(VerificationFailed, match="dump_20260101_000000"):
        chosen(with_stores(system, redis=str(tmp_path)), new(system))


def test_without_a_backup_and_without_live_data_only_a_named_waiver_begins_with_nothing(
    system: System, tmp_path: Path
) -> None:
    none = with_stores(system, redis=str(tmp_path))
    report = new(system)
    assert chosen(none, report).redis is None
    assert of(report, "redis backup").status is Status.WARN, "the live data is there, and stays"

    gone = none.with_parts(
        {**none.parts(), "redis": none.redis.model_copy(update={"data_directory": str(tmp_path / "data")})}
    )
    report = new(system)
    with pytest.raises(RunbookFailed, match="redis backup: none in .* is missing"):
        chosen(gone, report, redis_source="backup")
    assert "without=redis" in of(report, "redis backup").hint
    assert chosen(gone, new(system), without=("redis",)).redis is None
    until(lambda: survivors(gone).able, what="the replica's data, after an earlier test", seconds=120)
    report = new(system)
    with pytest.raises(RunbookFailed, match="says dir"):  # only the environment says that the directory is elsewhere
        chosen(gone, report)
    assert report.facts["redis source"].startswith("replica "), "the lab's replica has the data"
    assert of(report, "redis backup").status is Status.WARN


@pytest.mark.parametrize(
    ("problem", "hint"),
    [(IS_SYNCING, "wait until the data of replica 10.0.0.2:6379 is complete, and run"), (IS_EMPTY, "source=copies")],
)
def test_why_a_replica_is_no_source_is_told(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str, hint: str
) -> None:
    """Beside a backup that is not there: a person may only have to wait."""
    gone = with_stores(system, redis=str(tmp_path))
    gone = gone.with_parts(
        {**gone.parts(), "redis": gone.redis.model_copy(update={"data_directory": str(tmp_path / "data")})}
    )
    copy = SurvivingCopy("replica", "10.0.0.2:6379", problem=problem)
    monkeypatch.setattr(redis_sources, "find", lambda *_: Survivors((copy,)))
    report = new(system)
    with pytest.raises(RunbookFailed, match=f"is missing; replica 10.0.0.2:6379: {problem}"):
        chosen(gone, report)
    assert hint in of(report, "redis backup").hint
