"""Free space: measured where the server's data is, or said to be not measured."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocks.environment import Environment
from flows.database import restore_steps
from flows.database import tables as table_steps
from flows.database.migration import rehearsal
from flows.database.server import replication
from runbook.errors import OpsError
from runbook.report import Report, Status
from tasks.host.disk import disk_of, disk_on
from tests.database.conftest import NAME, Trial

Judge = Callable[..., None]
MUCH = 1 << 60


def at(trial: Trial, **changes: object) -> Environment:
    """The environment over another server's address or directory."""
    env = trial.environment
    postgres = env.postgres.model_copy(update=changes)
    return env.with_parts({**env.parts(), "postgres": postgres})


def judged(judge: Judge, env: Environment, *arguments: object, **named: object) -> dict[str, Status]:
    report = Report("trial", NAME)
    judge(report, env, *arguments, **named)
    return {
        found.name.removeprefix(f"free space at {env.postgres.data_directory}"): found.status
        for found in report.findings
    }


@contextmanager
def somebody() -> Iterator[None]:
    """A user who may not look into other people's directories."""
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(me)


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A directory that everybody may look into: pytest's own are closed."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def judges(size: int) -> list[tuple[Judge, object]]:
    """Every flow's: of a restore, of a rehearsal, of a restore of tables."""
    tables = [(type("Pair", (), {"live": type("Table", (), {"bytes": size})}), type("Sum", (), {"bytes": size}))]
    return [(restore_steps.judge_space, size), (rehearsal.judge_space, size), (table_steps.judge_space, tables)]


def test_another_host_s_disk_is_not_this_one_s(trial: Trial) -> None:
    for judge, needed in judges(MUCH):
        assert judged(judge, trial.environment, needed) == {"": Status.CRITICAL}
        remote = at(trial, host="db.example.org")
        assert judged(judge, remote, needed) == {"": Status.WARN, "/pg_wal": Status.WARN}, "not measured, not judged"
    for judge, needed in judges(1000):
        assert judged(judge, trial.environment, needed) == {"": Status.OK}
    assert replication.free_for_wal(at(trial, host="db.example.org").postgres) is None


def test_a_directory_that_is_not_here_is_not_its_parent_s_disk_unless_it_will_be_made_there(
    trial: Trial, tmp_path: Path
) -> None:
    gone = at(trial, data_directory=str(tmp_path / "nowhere" / "data"))
    assert judged(restore_steps.judge_space, gone, MUCH) == {"": Status.WARN, "/pg_wal": Status.WARN}
    made_anew = at(trial, data_directory=str(tmp_path / "data"))
    report = Report("trial", NAME)
    restore_steps.judge_space(report, made_anew, MUCH, absent=True)
    assert [(found.name, found.status) for found in report.findings] == [(f"free space at {tmp_path}", Status.CRITICAL)]


@pytest.mark.parametrize("closed", ["parent", "data"])
def test_a_directory_that_is_closed_to_this_user_is_not_measured(trial: Trial, open_path: Path, closed: str) -> None:
    data = open_path / "parent" / "data"
    (data / "pg_wal").mkdir(parents=True)
    env, shut = at(trial, data_directory=str(data)), data if closed == "data" else data.parent
    shut.chmod(0o000)
    try:
        with somebody():
            assert disk_on("localhost", data / "pg_wal") is None
            found = judged(restore_steps.judge_space, env, 1000)
            with pytest.raises(OpsError, match="cannot be measured: Permission denied"):
                disk_of(data / "pg_wal" / "x")
    finally:
        shut.chmod(0o700)
    whole = Status.WARN if closed == "parent" else Status.OK
    assert found == {"": whole, "/pg_wal": Status.WARN}
