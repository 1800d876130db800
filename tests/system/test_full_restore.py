"""full_restore of a system that runs from systemd's units, and of one that runs in containers: end to end, for real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from runbook.wait import until
from tests.fixtures.engine import Engine
from tests.system.image import host_engine
from tests.system.interview import HOSTS, WRITTEN_BY_CHECKS, Content, Interview, running

__all__ = ["host_engine"]
pytestmark = pytest.mark.system


@pytest.fixture(scope="module", params=HOSTS)
def interview(request: pytest.FixtureRequest, host_engine: Engine) -> Iterator[Interview]:
    """The system with a backup of everything."""
    with running(request.param, host_engine) as found:
        yield found


@pytest.fixture(scope="module")
def saved(interview: Interview) -> Content:
    """What is in the backups."""
    before = interview.content()
    assert len(before.rows) > 5
    interview.back_up()
    return before


def assert_back(interview: Interview, saved: Content) -> None:
    """Everything that was saved is live, and nothing else but what the checks wrote."""
    live = interview.content()
    assert live.rows.keys() == saved.rows.keys()
    for table, rows in saved.rows.items():
        assert not rows - live.rows[table], table
        assert live.rows[table] == rows or table.startswith(WRITTEN_BY_CHECKS), table
    lasting = {name: found for name, found in saved.keys.items() if not name[1].startswith(b"cache:")}
    assert {name: live.keys.get(name) for name in lasting} == lasting
    more = {name[1].partition(b":")[0] for name in live.keys.keys() - lasting.keys()}
    assert more <= {b"session", b"rate_limit", b"cache"}
    assert live.files == saved.files
    assert interview.healthy()
    assert interview.logs_in()


def kept(interview: Interview) -> tuple[str, Path]:
    """The newest database and the newest directory of Redis that were set aside."""
    (database,) = interview.sql(
        "SELECT max(datname) FROM pg_database WHERE starts_with(datname, 'grc_db__old_')", "postgres"
    )
    data = interview.host.redis_data
    done = interview.host.program("find", data.parent, "-maxdepth", "1", "-name", f"{data.name}.superseded_*")
    return str(database[0]), Path(max(done.text.split()))


def test_everything_comes_back(interview: Interview, saved: Content) -> None:
    interview.destroy()
    before = {role: interview.host.turn(role) for role in ("postgres", "redis", "backend")}
    done = interview.restore()
    assert done.code == 0, done.text
    assert_back(interview, saved)

    after = {role: interview.host.turn(role) for role in before}
    assert after["postgres"] == before["postgres"], "the server ran, and nobody had to stop it"
    assert after["redis"].run != before["redis"].run
    assert after["backend"].run != before["backend"].run
    assert after["redis"].ended < after["redis"].began < after["backend"].began

    database, directory = kept(interview)
    assert interview.sql("SELECT what FROM late", database) == [("written after the disaster",)]
    assert interview.host.program("test", "-d", directory).code == 0


def test_servers_whose_data_is_gone_begin_anew(interview: Interview, saved: Content) -> None:
    """A new cluster, roles from the backup, passwords from the secrets; and a Redis that its manager has given up."""
    interview.erase()
    done = interview.restore()
    assert done.code == 0, done.text
    assert_back(interview, saved)
    assert interview.sql("SHOW data_checksums", "postgres") == [("on",)]


@pytest.mark.parametrize("role", ["redis", "backend"])
def test_a_service_that_does_not_start_again_is_said_and_nothing_is_lost(
    interview: Interview, saved: Content, role: str
) -> None:
    """What is live when it fails is what was saved; what it replaced is kept; launched again, it ends well."""
    interview.sql("CREATE TABLE late AS SELECT 'written after the backup' AS what")
    with interview.redis() as client:
        client.set("late", "written after the backup")
    words = ("--redis-source", "backup")  # it serves all of its data, and would be kept
    with interview.host.broken(role):
        done = interview.restore(*words)
        assert done.code == 1
        assert f"{role} does not start" in done.text or f"{role} has ended again" in done.text
        state = next(found for found in interview.report()["findings"] if found["name"] == "state of the system")
        assert state["value"].startswith("the backups' data is live, proven; the replaced data is kept: grc_db__old_")
        database, directory = kept(interview)
        assert database in state["value"]
        assert str(directory) in state["value"]
        assert interview.sql("SELECT what FROM late", database) == [("written after the backup",)]
        assert interview.sql("SELECT to_regclass('late')") == [(None,)]
    interview.host.start("redis")
    interview.host.start("backend")
    until(interview.healthy, what="health", seconds=180)
    assert_back(interview, saved)
    before = {one: interview.host.turn(one) for one in ("redis", "backend")}
    assert interview.restore(*words).code == 0
    after = {one: interview.host.turn(one) for one in before}
    assert before["backend"].began < after["backend"].ended < after["redis"].ended, "who writes stops first"
    assert after["redis"].ended < after["redis"].began < after["backend"].began
    assert_back(interview, saved)
