"""Containment on a real pair: replay stands still, maintenance is refused, writes are held off; and exactly back."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from psycopg import errors

from flows.database.backup import prune_backups
from flows.database.base_backup import backup_cluster
from flows.recovery.forensics.containment import contain_incident, release_containment
from flows.recovery.postgres.failover import postgres_failover
from lab.servers import postgres
from runbook.errors import OpsError, RunbookFailed
from runbook.guard.containment import is_here
from runbook.report import Report, Status
from runbook.wait import until
from tasks.postgres.replication import write_block
from tasks.wal.archive.destinations import destinations_of
from tasks.wal.archiver import WalArchiver
from tests.database.backup.test_backup import run
from tests.fixtures import forked
from tests.fixtures.postgres.clusters import NAME, Cluster, Template, running_cluster

WHY = {"reason": "rows are gone", "by": "佐藤"}
STATE = "SELECT pg_get_wal_replay_pause_state()"
SETTINGS = "SELECT setrole::regrole::text, unnest(setconfig) FROM pg_db_role_setting WHERE setrole <> 0 ORDER BY 1, 2"


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is needed where Prefect died too."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")


def contain(block_writes: bool = False) -> Report:
    return contain_incident.fn(NAME, block_writes=block_writes, confirm=NAME, **WHY)


def release() -> Report:
    return release_containment.fn(NAME, confirm=NAME)


def paused(cluster: Cluster) -> str:
    return str(cluster.sql("standby", STATE)[0][0])


def application(cluster: Cluster) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(postgres.dsn(cluster.state, cluster.node("postgres").port), autocommit=True)


@pytest.fixture(scope="module")
def pair(cluster_template: Template) -> Iterator[Cluster]:
    with running_cluster(cluster_template) as running:
        yield running


@pytest.fixture
def cluster(pair: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """One pair for all of these tests: each leaves it as it was, whatever became of it."""
    for name, value in pair.variables.items():
        monkeypatch.setenv(name, value)
    yield pair
    pair.start("postgres", "standby", "receiver")
    (pair.environment.reports_directory / f".contained-{NAME}").unlink(missing_ok=True)
    if pair.sql("standby", STATE) != [("not paused",)]:
        pair.sql("standby", "SELECT pg_wal_replay_resume()")
    pair.sql(
        "postgres",
        "ALTER ROLE grc_user IN DATABASE grc_db RESET ALL; DROP TABLE IF EXISTS notes;"
        "DROP ROLE IF EXISTS reader, loader",
    )


@pytest.fixture
def table(cluster: Cluster) -> None:
    """A table of the application's own."""
    with application(cluster) as client:
        client.execute("CREATE TABLE notes (id int PRIMARY KEY)")
        client.execute("INSERT INTO notes VALUES (1)")


def replayed(cluster: Cluster, rows: int) -> None:
    def there() -> bool:
        with suppress(errors.UndefinedTable):  # that it was created is not replayed yet
            return cluster.sql("standby", "SELECT count(*) FROM notes") == [(rows,)]
        return False

    until(there, what=f"{rows} rows", seconds=120)


@pytest.mark.usefixtures("table")
def test_a_standby_whose_replay_commits_wait_for_is_not_paused(cluster: Cluster) -> None:
    cluster.sql("postgres", "ALTER DATABASE grc_db SET synchronous_commit = 'remote_apply'")
    try:
        planned = contain_incident.fn(NAME, **WHY)
        report = contain()
        assert paused(cluster) == "not paused"
        with application(cluster) as client:  # else it would wait for ever
            client.execute("INSERT INTO notes VALUES (2)")
    finally:
        cluster.sql("standby", "SELECT pg_wal_replay_resume()")  # else what follows waits, where this failed
        cluster.sql("postgres", "ALTER DATABASE grc_db RESET synchronous_commit")
    assert not [step for step in planned.plan_steps if step.step == "pause replay"]
    (told,) = [one for one in report.findings if one.name.startswith("replay on ")]
    assert (told.status, "remote_apply" in told.value) == (Status.WARN, True)
    release()


@pytest.mark.usefixtures("table")
def test_replay_stands_still_maintenance_is_refused_and_all_goes_on_again(cluster: Cluster) -> None:
    replayed(cluster, 1)
    assert contain_incident.fn(NAME, **WHY).status is Status.PLANNED
    assert paused(cluster) == "not paused"
    with pytest.raises(OpsError, match="reason or by is empty"):
        contain_incident.fn(NAME, confirm=NAME)
    assert contain().status is Status.OK
    assert paused(cluster) == "paused"
    cluster.sql("postgres", "DELETE FROM notes")
    assert cluster.sql("standby", "SELECT count(*) FROM notes") == [(1,)], "what the bug deletes is still there"
    with pytest.raises(OpsError, match="contained by 佐藤 on .*: rows are gone.*release-containment"):
        prune_backups.fn(NAME, kind="cluster", confirm=NAME)
    assert backup_cluster.fn(NAME).facts["backup"], "backups only add"
    with pytest.raises(RunbookFailed) as refused:
        postgres_failover.fn(NAME, mode="planned", confirm=NAME)
    assert "release-containment resumes it" in " ".join(one.hint for one in refused.value.report.findings)
    assert "contained by 佐藤" in contain().outcome, "launched again"
    cluster.stop("standby")
    cluster.start("standby")
    assert paused(cluster) == "not paused", "PostgreSQL forgets it with a restart"
    assert contain().status is Status.OK
    assert paused(cluster) == "paused"
    assert release().status is Status.OK
    assert paused(cluster) == "not paused"
    replayed(cluster, 0)
    assert not is_here(NAME, cluster.environment.reports_directory)
    assert prune_backups.fn(NAME, kind="cluster", confirm=NAME).status in (Status.OK, Status.WARN)
    assert "nothing to release" in release().outcome


def test_what_somebody_else_paused_stays_paused(cluster: Cluster) -> None:
    cluster.sql("standby", "SELECT pg_wal_replay_pause()")
    until(lambda: paused(cluster) == "paused", what="the pause", seconds=120)
    report = contain()
    assert "paused already" in " ".join(report.facts.values())
    release()
    assert paused(cluster) == "paused"


@contextmanager
def writing(cluster: Cluster) -> Iterator[tuple[list[int], list[str]]]:
    """A client that never gives up: the ids that were acknowledged, and what refused the others."""
    done, refused, stop = list[int](), list[str](), threading.Event()

    def work() -> None:
        number = 1000
        while not stop.is_set():
            try:
                with application(cluster) as client:
                    while not stop.wait(0.01):
                        number += 1
                        client.execute("INSERT INTO notes VALUES (%s)", (number,))
                        done.append(number)
            except psycopg.Error as error:
                refused.append(type(error).__name__)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield done, refused
    finally:
        stop.set()
        thread.join()


@pytest.mark.usefixtures("table")
def test_writes_are_held_off_from_real_clients_and_an_open_one_is_ended(cluster: Cluster) -> None:
    cluster.sql("postgres", "ALTER ROLE grc_user IN DATABASE grc_db SET work_mem = '8MB'")
    cluster.sql(
        "postgres",
        "CREATE ROLE reader LOGIN; GRANT SELECT ON notes TO reader;"
        "CREATE ROLE loader LOGIN; GRANT INSERT ON notes TO loader",
    )
    before = cluster.sql("postgres", SETTINGS)
    with application(cluster) as holder, writing(cluster) as (done, refused):
        holder.execute("BEGIN")
        holder.execute("INSERT INTO notes VALUES (2)")
        until(lambda: len(done) > 5, what="writes", seconds=120)
        report = contain(block_writes=True)
        written = cluster.sql("postgres", "SELECT id FROM notes ORDER BY id")
        held = dict(cluster.sql("postgres", f"SELECT * FROM ({SETTINGS}) s WHERE unnest LIKE 'default%'"))
        assert set(held) == {"grc_user", "loader"}, "who only reads is left alone"
        assert report.status in (Status.OK, Status.WARN)
        with pytest.raises(psycopg.OperationalError):
            holder.execute("COMMIT")
        until(lambda: refused.count("ReadOnlySqlTransaction") > 3, what="refusals", seconds=120)
        assert cluster.sql("postgres", "SELECT id FROM notes ORDER BY id") == written, "nothing after it said so"
        acknowledged = len(done)
        with application(cluster) as reader:
            assert reader.execute("SELECT count(*) FROM notes WHERE id = 2").fetchone() == (0,)
            with pytest.raises(errors.ReadOnlySqlTransaction):
                reader.execute("TRUNCATE notes")
            reader.execute("BEGIN READ WRITE")  # by name: the report says that this is not held off
            reader.execute("INSERT INTO notes VALUES (3)")
            reader.execute("COMMIT")
        assert "BEGIN READ WRITE" in report.facts["not blocked"]
        assert contain(block_writes=True).status in (Status.OK, Status.WARN)
        assert release().status is Status.OK
        assert cluster.sql("postgres", SETTINGS) == before
        until(lambda: len(done) > acknowledged + 5, what="writes again", seconds=120)


@pytest.mark.usefixtures("table")
def test_a_setting_that_was_there_comes_back_and_a_later_one_is_left(cluster: Cluster) -> None:
    cluster.sql("postgres", "ALTER ROLE grc_user IN DATABASE grc_db SET default_transaction_read_only = off")
    before = cluster.sql("postgres", SETTINGS)
    contain(block_writes=True)
    assert cluster.sql("postgres", SETTINGS) != before
    release()
    assert cluster.sql("postgres", SETTINGS) == before
    contain(block_writes=True)
    cluster.sql("postgres", "ALTER ROLE grc_user IN DATABASE grc_db RESET default_transaction_read_only")
    (put_back,) = [one.rows for one in release().evidence if one.name == "Restored"]
    assert "by now" in " ".join(map(str, put_back))
    assert cluster.sql("postgres", SETTINGS) == []


@pytest.mark.usefixtures("table")
def test_a_commit_that_waits_for_a_standby_is_not_cancelled(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled wait answers “committed”: it is told instead."""
    answers = list[str]()

    def commit() -> None:
        with application(cluster) as client:
            try:
                client.execute("INSERT INTO notes VALUES (5)")
            except psycopg.Error as error:
                answers.append(type(error).__name__)
            else:
                answers.append("committed")

    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    cluster.stop("standby", "receiver")
    thread = threading.Thread(target=commit)
    thread.start()
    until(lambda: cluster.sql("postgres", waiting) == [(1,)], what="the wait", seconds=120)
    with monkeypatch.context() as patch:
        patch.setattr(write_block, "END_SECONDS", 1.0)
        with pytest.raises(OpsError, match="start the standby that their commits wait for"):
            contain(block_writes=True)
    assert cluster.sql("postgres", waiting) == [(1,)]
    cluster.start("receiver", "standby")
    thread.join(120)
    assert answers == ["committed"]
    assert contain(block_writes=True).status in (Status.OK, Status.WARN)
    release()


@pytest.mark.soak
@pytest.mark.usefixtures("table")
def test_killed_anywhere_and_launched_again_it_ends_well(cluster: Cluster) -> None:
    before = cluster.sql("postgres", SETTINGS)
    module = "flows.recovery.forensics.containment"
    doing = (
        f"{module}.contain_incident dict(environment={NAME!r}, block_writes=True, reason='r', by='b', confirm={NAME!r})"
    )
    undoing = f"{module}.release_containment dict(environment={NAME!r}, confirm={NAME!r})"
    assert run(doing, OPS_FAILPOINT="contain: recorded").returncode == -9
    assert run(doing, OPS_FAILPOINT="writes: set").returncode == -9
    assert run(undoing, OPS_FAILPOINT="release: one").returncode == -9
    assert is_here(NAME, cluster.environment.reports_directory)
    assert contain(block_writes=True).status in (Status.OK, Status.WARN)
    assert paused(cluster) == "paused"
    assert run(undoing, OPS_FAILPOINT="writes: set").returncode == -9
    assert release().status is Status.OK
    assert (paused(cluster), cluster.sql("postgres", SETTINGS)) == ("not paused", before)


def test_a_server_that_is_down_keeps_it_contained_and_the_command_line_works(cluster: Cluster) -> None:
    contain(block_writes=True)
    cluster.stop("postgres")
    with pytest.raises(OpsError, match="stays contained"):
        release()
    assert is_here(NAME, cluster.environment.reports_directory)
    assert paused(cluster) == "not paused", "what can be released is released"
    cluster.start("postgres")
    argv = ["-m", "flows.recovery.forensics.containment", "release", "--environment", NAME, "--confirm", NAME]
    variables = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    done = forked.run(argv, variables)
    assert done.returncode == 0, done.stderr
    assert not is_here(NAME, cluster.environment.reports_directory)


@pytest.mark.usefixtures("table")
def test_wal_stays_in_the_receiver_s_directory_meanwhile(cluster: Cluster) -> None:
    contain()
    env = cluster.environment
    archiver = WalArchiver(cluster.wal, destinations_of(env), 0, lambda: is_here(NAME, env.reports_directory))
    cluster.sql("postgres", "INSERT INTO notes VALUES (7)")
    cluster.sql("postgres", "SELECT pg_switch_wal()")
    cluster.sql("postgres", "INSERT INTO notes VALUES (8)")

    def finished() -> list[Path]:
        return [path for path in cluster.wal.iterdir() if len(path.name) == 24]

    until(finished, what="a finished segment", seconds=120)
    archiver.round(last=True)
    archiver.round(last=True)
    assert finished()
    release()
    until(lambda: archiver.round(last=True) or not finished(), what="every finished segment archived", seconds=120)
