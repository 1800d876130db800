"""The board, show-recovery-options and the plan of full-restore state one loss for the same recovery option."""

from __future__ import annotations

import pytest

from blocks.environment import Environment
from flows.database.backup import backup_database
from flows.database.base_backup import backup_cluster
from flows.recovery import gate
from flows.recovery.full_restore import full_restore
from flows.recovery.objectives.check import check_recovery_objectives
from flows.recovery.objectives.options import find_options, show_recovery_options
from flows.recovery.objectives.points import read_recovery_points
from runbook.errors import RunbookFailed
from runbook.guard.loss import Loss
from runbook.report import Finding, Report, Status
from runbook.wait import until
from tasks.recovery_points import standing
from tests.fixtures.postgres.clusters import NAME, Cluster
from tests.recovery.objectives.test_objectives import note_proven


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")


@pytest.fixture
def backed_up(cluster: Cluster) -> Cluster:
    """A dump, and a proven base backup."""
    backup_database.fn(NAME)
    note_proven("cluster", backup_cluster.fn(NAME).facts["backup"])
    return cluster


def planned(method: str) -> Loss:
    """The database's loss by the plan of full-restore."""
    report = full_restore.fn(NAME, method=method)  # type: ignore[arg-type]
    assert report.effect
    (loss,) = [one for one in report.effect.lost if isinstance(one, Loss) and one.part == "grc_db"]
    return loss


def listed(method: str) -> Loss:
    """The same by show-recovery-options."""
    env = Environment.find(NAME)
    (option,) = [one for one in find_options(env, read_recovery_points(env)) if one.parameters.get("method") == method]
    return option.loss


def found(name: str) -> Finding:
    """A finding of check-recovery-objectives, which writes the board too."""
    try:
        report = check_recovery_objectives.fn(NAME)
    except RunbookFailed as error:
        report = error.report
    return next(one for one in report.findings if one.name == name)


def on_the_board() -> str:
    """The loss of the database on the board."""
    record = standing.read(Environment.find(NAME).reports_directory)
    assert record
    return next(one.lost for one in record.resources if one.resource == "database")


def shown() -> Report:
    """The report of show-recovery-options."""
    try:
        return show_recovery_options.fn(NAME)
    except RunbookFailed as error:
        return error.report


def do_not_wait(cluster: Cluster) -> None:
    """Commits wait for no copy from here on."""
    path = cluster.node("postgres").configuration
    path.write_text(f"{path.read_text()}\nsynchronous_standby_names = ''\n")
    cluster.sql("postgres", "SELECT pg_reload_conf()")


def test_with_a_writing_client_all_state_the_same_loss(backed_up: Cluster) -> None:
    with backed_up.writing() as writes:
        writes.wait(20)
        assert found("database, data corrupted").value.startswith(
            "nothing of grc_db is lost; recovered by point in time"
        )
        assert on_the_board() == planned("cluster").text == listed("cluster").text == "nothing of grc_db is lost"
        dump = planned("dump")
        assert dump.since
        assert dump.detail.startswith(listed("dump").detail), "every write since it began; the plan counts them"


def test_a_missing_data_directory_whose_commits_waited_for_nothing_is_unknown_to_all(backed_up: Cluster) -> None:
    do_not_wait(backed_up)
    backed_up.stop("standby")
    with backed_up.writing() as writes:
        writes.wait(20)
        server = found("database, server lost")
        assert server.status is Status.WARN, "nothing that is not received yet is known, whatever is received now"
        assert server.value.startswith("the loss of grc_db is unknown, because commits did not wait for "), server.value
        assert "set synchronous_standby_names" in server.hint
        assert on_the_board() == server.value.partition("; recovered by ")[0]
        assert listed("cluster").is_none, "the server is there: its own WAL is read behind the fence"
    backed_up.crash("postgres")
    with backed_up.gone(backed_up.node("postgres").data):
        plan, listing = planned("cluster"), listed("cluster")
        assert "is unknown, because" in plan.text, plan.text
        assert listing.text == plan.text
        report = shown()
        table = next(one for one in report.evidence if one.name == "Options, least loss first")
        row = next(row for row in table.rows if "base backup and WAL" in row[1])
        assert row[table.columns.index("lost")] == plan.text == on_the_board()


def test_settings_of_a_server_on_another_host_are_read_from_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are not here: only while it answers somebody can say that commits wait."""
    env = cluster.environment
    monkeypatch.setattr(gate, "is_here", lambda host: host != env.postgres.host)
    assert gate.unwaited(env, env.standby.name) == ""
    do_not_wait(cluster)
    until(lambda: "did not wait" in gate.unwaited(env), what="the settings", seconds=30)
    cluster.crash("postgres")
    assert gate.unwaited(env) == f"its configuration is on {env.postgres.host}"


@pytest.mark.parametrize("level", ["off", "local"])
def test_commits_that_do_not_wait_for_their_standbys_do_not_count_as_waiting(cluster: Cluster, level: str) -> None:
    env = cluster.environment
    assert gate.unwaited(env) == ""
    path = cluster.node("postgres").configuration
    path.write_text(f"{path.read_text()}\nsynchronous_commit = {level}\n")
    assert gate.unwaited(env) == "commits did not wait for the WAL receiver"
