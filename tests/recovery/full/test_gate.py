"""Nothing live is replaced before it is fenced and read to its end: what a recovery loses is what its plan said."""

from __future__ import annotations

import contextlib
import re
import shutil
import time

import pytest

from blocks.environment import Environment
from flows.application.files import backup_files
from flows.database.backup import backup_database
from flows.database.base_backup import backup_cluster
from flows.recovery.full import build, method
from flows.recovery.full import cluster as cluster_restore
from flows.recovery.full_restore import full_restore
from flows.recovery.point.restore import restore_to_point
from runbook.errors import OpsError, RunbookFailed, VerificationFailed
from runbook.files import chain
from runbook.report import Report
from runbook.wait import until
from tasks.postgres.restore.superseded import find_superseded
from tests.fixtures.postgres.clusters import NAME, PROGRAMS, Cluster
from tests.fixtures.reports import values


@pytest.fixture
def backed_up(cluster: Cluster) -> Cluster:
    """A dump, a base backup, and a table that a client writes to."""
    with cluster.writing() as writes:
        writes.wait(20)
    backup_database.fn(NAME)
    backup_cluster.fn(NAME)
    return cluster


def restored(**parameters: object) -> Report:
    try:
        return full_restore.fn(NAME, confirm=NAME, **parameters)  # type: ignore[arg-type]
    finally:  # its records are beside the reports, and none of them
        assert chain.verify_chain(Environment.find(NAME).reports_directory) == []


def test_a_client_that_nobody_described_loses_nothing(backed_up: Cluster) -> None:
    """It writes until the server is fenced. The plan says that nothing is lost, and nothing is."""
    with backed_up.writing() as writes:
        writes.wait(50)
        plan = full_restore.fn(NAME, method="cluster")
        assert "nothing is lost" in plan.headline, plan.headline
        report = restored(method="cluster")
    assert report.losses["grc_db"].is_none, report.losses
    assert writes.lost(backed_up.sql("postgres", "SELECT id FROM writes")) == set()


def test_a_server_that_its_supervisor_starts_again_is_fenced_first(backed_up: Cluster) -> None:
    """It was killed, answers "starting" or nothing, and serves clients again a moment later."""
    with backed_up.writing() as writes:
        writes.wait(50)
        backed_up.shoot("postgres")
        report = restored(method="cluster")
    assert report.losses["grc_db"].is_none, report.losses
    assert writes.lost(backed_up.sql("postgres", "SELECT id FROM writes")) == set()


def test_commits_after_a_statement_are_counted_behind_the_fence(backed_up: Cluster) -> None:
    """Those that a client wrote after the plan were lost too, and only the planned ones were reported."""
    backed_up.sql("postgres", "CREATE TABLE audited AS SELECT 1 AS id")
    backed_up.sql("postgres", "TRUNCATE writes")
    backed_up.sql("postgres", "INSERT INTO audited VALUES (2)")
    plan = full_restore.fn(NAME)
    assert "1 commit of grc_db is lost" in plan.headline, plan.headline
    assert "later writes are added" in plan.headline
    backed_up.sql("postgres", "INSERT INTO audited VALUES (3)")
    report = restored()
    loss = report.losses["grc_db"]
    assert loss.count == 2, loss
    assert report.facts["lost"].startswith("2 commits of grc_db are lost ("), report.facts["lost"]
    assert backed_up.sql("postgres", "SELECT id FROM audited") == [(1,)]


def test_a_plan_is_carried_out_although_clients_filled_the_emptied_table_again(backed_up: Cluster) -> None:
    """Then nothing is empty any more, and the statement that the plan stops before is no suspect."""
    rows = backed_up.sql("postgres", "SELECT count(*) FROM writes")
    backed_up.sql("postgres", "TRUNCATE writes")
    plan = full_restore.fn(NAME)
    assert "TRUNCATE of public.writes" in plan.facts["target"]
    backed_up.sql("postgres", "INSERT INTO writes SELECT -id FROM generate_series(1, 99) AS id")
    report = restored(**plan.pins)
    assert report.facts["target"] == plan.facts["target"]
    assert report.losses["grc_db"].count == 1, report.losses
    assert backed_up.sql("postgres", "SELECT count(*) FROM writes") == rows


def test_a_table_that_was_emptied_before_the_newest_dump_is_named(backed_up: Cluster) -> None:
    """With method=cluster no dump is a candidate, and nobody looked at its rows."""
    backed_up.sql("postgres", "TRUNCATE writes")
    backup_database.fn(NAME)
    plan = full_restore.fn(NAME, method="cluster")
    assert re.search(r"public.writes: \d+ → 0 rows", plan.headline), plan.headline


def test_a_database_that_was_dropped_before_the_shutdown_is_planned(backed_up: Cluster) -> None:
    """The plan of a stopped server stopped at the end of the WAL, and its run was refused."""
    rows = backed_up.sql("postgres", "SELECT count(*) FROM writes")
    backed_up.sql("postgres", "DROP DATABASE grc_db WITH (FORCE)", database="postgres")
    backed_up.stop("postgres")
    plan = full_restore.fn(NAME, method="cluster")
    assert "DROP DATABASE by transaction" in plan.facts["target"]
    restored(method="cluster", **plan.pins)
    assert backed_up.sql("postgres", "SELECT count(*) FROM writes") == rows


def test_a_base_backup_that_was_taken_without_the_database_is_no_option(backed_up: Cluster) -> None:
    """The plan chose it, said that nothing is lost, and its run was refused."""
    rows = backed_up.sql("postgres", "SELECT count(*) FROM writes")
    backed_up.sql("postgres", "DROP DATABASE grc_db WITH (FORCE)", database="postgres")
    taken = backup_cluster.fn(NAME)
    assert values(taken)["database in the backup"] == "grc_db does not exist"
    plan = full_restore.fn(NAME, method="cluster")
    assert values(plan)[f"not used: {taken.facts['backup']}"].startswith(f"neither {taken.facts['backup']} nor the WAL")
    assert "DROP DATABASE by transaction" in plan.facts["target"]
    restored(method="cluster", **plan.pins)
    assert backed_up.sql("postgres", "SELECT count(*) FROM writes") == rows


def test_other_databases_that_are_gone_with_the_data_directory_are_restored_or_named_as_lost(
    backed_up: Cluster,
) -> None:
    """The newest dump was a moment newer than the WAL, and a restore of it lost the others without a word."""
    backed_up.sql("postgres", "CREATE DATABASE other", database="postgres")
    backed_up.sql("postgres", "CREATE DATABASE grc_db__old_20261201_000000", database="postgres")  # a replaced copy
    backup_cluster.fn(NAME)
    backed_up.stop("receiver")
    with backed_up.writing() as writes:
        writes.wait(20)
    backup_database.fn(NAME)
    backed_up.crash("postgres")
    with backed_up.gone(backed_up.node("postgres").data):
        plan = full_restore.fn(NAME)
        assert plan.facts["database from"].startswith("base backup and WAL: "), plan.facts
        of_dump = full_restore.fn(NAME, method="dump")
        assert "everything of other is lost" in of_dump.headline, of_dump.headline
    assert values(of_dump)["other databases of the cluster"].startswith("other: in the lost cluster, and not")


def test_a_dropped_table_without_rows_in_the_dump_is_named(backed_up: Cluster) -> None:
    """Nothing tells an accident from a clean-up there, so no commits are given up for it."""
    backed_up.sql("postgres", "CREATE TABLE spare ()")
    backup_database.fn(NAME)
    backed_up.sql("postgres", "DROP TABLE spare")
    plan = full_restore.fn(NAME)
    assert "nothing is lost" in plan.headline
    named = next(one for one in plan.findings if one.name.startswith("tables that the newest dump has"))
    assert named.value == "public.spare"


def test_a_table_that_was_emptied_before_the_base_backup_is_named(backed_up: Cluster) -> None:
    """No WAL after the backup has the statement; the dump has the rows."""
    backed_up.sql("postgres", "DELETE FROM writes")
    backup_cluster.fn(NAME)
    plan = full_restore.fn(NAME)
    empty = next(one for one in plan.findings if one.name == "tables without rows")
    assert empty.value == "public.writes"


def test_what_emptied_a_table_before_it_was_dropped_is_found_by_the_copy(backed_up: Cluster) -> None:
    """The plan saw a dropped table. The copy was built five times up to that statement, in which the table is empty."""
    rows = backed_up.sql("postgres", "SELECT count(*) FROM writes")
    backed_up.sql("postgres", "TRUNCATE writes")
    backed_up.sql("postgres", "DROP TABLE writes")
    plan = full_restore.fn(NAME)
    assert "DROP TABLE of public.writes" in plan.facts["target"]
    with pytest.raises(RunbookFailed) as refused:
        restored(**plan.pins)
    hint = re.search(r"run this with (before=\d+) to stop just before TRUNCATE of public.writes", str(refused.value))
    assert hint, refused.value
    restored(before=hint[1].partition("=")[2])
    assert backed_up.sql("postgres", "SELECT count(*) FROM writes") == rows


def test_an_older_base_backup_is_named_with_the_statement_that_its_copy_must_leave_out(backed_up: Cluster) -> None:
    """The newest one has the table already empty."""
    rows = backed_up.sql("postgres", "SELECT count(*) FROM writes")
    backed_up.sql("postgres", "TRUNCATE writes")
    backup_cluster.fn(NAME)
    backed_up.sql("postgres", "DROP TABLE writes")
    with pytest.raises(RunbookFailed) as refused:
        restored()
    hint = re.search(r"run this with backup=(base_\w+) before=(\d+) and an empty confirm", str(refused.value))
    assert hint, refused.value
    plan = full_restore.fn(NAME, backup=hint[1], before=hint[2])
    restored(before=hint[2], **plan.pins)
    assert backed_up.sql("postgres", "SELECT count(*) FROM writes") == rows


def test_a_drop_of_a_table_that_was_empty_by_and_by_is_undone_only_by_its_name(backed_up: Cluster) -> None:
    """No statement explains why it is empty: the end of the WAL, without the table, is no answer."""
    (ids,) = zip(*backed_up.sql("postgres", "SELECT id FROM writes"), strict=True)
    for one in ids:
        backed_up.sql("postgres", f"DELETE FROM writes WHERE id = {one}")
    backed_up.sql("postgres", "DROP TABLE writes")
    with pytest.raises(RunbookFailed) as refused:
        restored(method="cluster")
    report = refused.value.report
    assert "no statement in the WAL explains what is missing in the copy" in values(report).values()
    assert sum(one.name == "build_instance" for one in report.steps) == 1, report.steps
    assert report.state
    assert report.state.value.startswith("nothing live was replaced")


def test_a_run_that_would_lose_more_than_its_plan_said_replaces_nothing(
    backed_up: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base backup fails its proof: the dump lacks what was written since, which nobody confirmed."""

    def fail(*_: object) -> None:
        raise VerificationFailed("the copy is not at the target", "nothing live was touched")

    backed_up.sql("postgres", "CREATE TABLE later AS SELECT 7 AS id")  # only the WAL has it
    monkeypatch.setattr(cluster_restore, "build_copies", fail)
    with pytest.raises(RunbookFailed, match=r"writes of grc_db of .* are lost, but the plan said: nothing") as refused:
        restored()
    assert backed_up.sql("postgres", "SELECT id FROM later") == [(7,)]
    assert backed_up.supervisor.services()[PROGRAMS["postgres"]].state == "RUNNING"
    named = re.search(r"run this with backup=(backup_\w+)", str(refused.value))
    assert named, "a plan without it would choose the same base backup"
    confirmed = restored(backup=named[1])
    assert confirmed.losses["grc_db"].since, confirmed.losses
    assert backed_up.sql("postgres", "SELECT to_regclass('later')") == [(None,)]


def test_a_restored_dump_lacks_every_commit_until_its_swap(backed_up: Cluster) -> None:
    """A client that is no described service writes until its session is ended."""
    ((dumped,),) = backed_up.sql("postgres", "SELECT count(*) FROM writes")
    with backed_up.writing() as writes:
        writes.wait(5)
        report = restored(method="dump", stop_services="at_swap")
    kept = find_superseded(Environment.find(NAME).postgres)[0].name
    ((written,),) = backed_up.sql("postgres", "SELECT count(*) FROM writes", database=kept)
    loss = report.losses["grc_db"]
    assert loss.since
    assert (loss.count, written > dumped) == (written - dumped, True), loss


def test_a_server_on_another_port_is_not_taken_for_a_dead_one(backed_up: Cluster) -> None:
    path = backed_up.root / "pair.toml"
    text, port = path.read_text(), backed_up.node("postgres").port
    path.write_text(text.replace(f"port = {port}\n", f"port = {port + 1}\n", 1))
    try:
        with pytest.raises(OpsError, match=f"it listens on port {port}, not on {port + 1}"):
            full_restore.fn(NAME)
    finally:
        path.write_text(text)


def test_commits_that_only_a_missing_data_directory_had_are_unknown(backed_up: Cluster) -> None:
    """With commits that wait for the receiver, nothing is lost; without, nobody knows."""
    node = backed_up.node("postgres")
    plans = []
    for waits in (True, False):
        if not waits:
            conf = node.configuration.read_text()
            node.configuration.write_text(f"{conf}\nsynchronous_standby_names = ''\n")
        backed_up.crash("postgres") if waits else None
        with backed_up.gone(node.data):
            plans.append(full_restore.fn(NAME))
            of_dump = full_restore.fn(NAME, method="dump")
    assert values(of_dump)["replication slots"].startswith("not known: "), "a new cluster has none"
    assert "nothing is lost" in plans[0].headline, plans[0].headline
    assert "the loss of grc_db is unknown, because" in plans[1].headline, plans[1].headline
    assert "did not wait for the WAL receiver" in plans[1].headline


def test_the_only_database_of_several_that_goes_back_loses_what_was_counted(backed_up: Cluster) -> None:
    """The server serves the other one all the time, so writes go on: they wait, or are counted at the swap."""
    backed_up.sql("postgres", "CREATE DATABASE other", database="postgres")
    with backed_up.writing() as writes:
        writes.wait(20)
        report = restored(method="auto")
        assert "one database from base backup and WAL" in report.facts["newest point restored"]
        assert report.losses["grc_db"].is_none, report.losses
    assert writes.lost(backed_up.sql("postgres", "SELECT id FROM writes")) == set()


def test_a_write_that_came_in_before_the_swap_rolls_it_back(
    backed_up: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where writers cannot be held back, the swap finds their commits, and nothing is replaced."""
    backed_up.sql("postgres", "CREATE DATABASE other", database="postgres")
    monkeypatch.setattr(method, "held_writes", lambda *_: contextlib.nullcontext("for this test"))
    prove = build.prove

    def prove_late(*arguments: object, **named: object) -> None:
        prove(*arguments, **named)  # type: ignore[arg-type]
        backed_up.sql("postgres", "CREATE TABLE late AS SELECT 7 AS id")

    monkeypatch.setattr(build, "prove", prove_late)
    with pytest.raises(RunbookFailed, match="1 commit of grc_db is lost"):
        restored()
    assert backed_up.sql("postgres", "SELECT id FROM late") == [(7,)]


def test_a_recovery_to_the_newest_point_has_what_was_written_until_the_fence(backed_up: Cluster) -> None:
    with backed_up.writing() as writes:
        writes.wait(50)
        report = restore_to_point.fn(NAME, by="latest", confirm=NAME)
    assert report.losses["grc_db"].is_none, report.losses
    assert writes.lost(backed_up.sql("postgres", "SELECT id FROM writes")) == set()


def test_intact_live_files_stay_as_they_are(backed_up: Cluster) -> None:
    """A file that was uploaded after the backup is not lost, and its row is there; altered files go back."""
    files = backed_up.root / "opt" / "grc"
    (files / "uploads").mkdir()
    for name in ("old.png", "older.png"):
        (files / "uploads" / name).write_bytes(b"old")
    backup_files.fn(NAME)
    (files / "uploads" / "new.png").write_bytes(b"new")
    report = restored(method="cluster")
    assert "the live files are kept (1 path written since)" in report.facts["files backup"], report.facts
    assert "the files" not in report.losses
    assert (files / "uploads" / "new.png").read_bytes() == b"new"

    (files / "uploads" / "old.png").unlink()
    plan = full_restore.fn(NAME)
    assert "the files" not in [loss.part for loss in plan.effect.lost], "users delete files"
    seen = next(one.value for one in plan.findings if one.name == "live files")
    assert re.fullmatch(r"1 of \d+ paths are missing: uploads/old.png", seen)

    for path in (files / "uploads").iterdir():
        path.unlink()
    (files / "new.png").write_bytes(b"new")
    plan = full_restore.fn(NAME)
    assert "writes of the files of the last" in plan.headline, plan.headline


def test_files_that_would_lose_more_than_the_plan_said_keep_the_database_as_well(
    backed_up: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their gate is before the first swap. Other files are live by then, which were written before the plan."""
    files = backed_up.root / "opt" / "grc"
    (files / "uploads").mkdir()
    (files / "uploads" / "old.png").write_bytes(b"old")
    backup_files.fn(NAME)
    other = files.with_name("other")
    shutil.copytree(files, other)
    (other / "uploads" / "new.png").write_bytes(b"new")
    (files / "uploads" / "old.png").unlink()
    backed_up.sql("postgres", "CREATE TABLE later AS SELECT 7 AS id")
    time.sleep(0.2)
    prove = build.prove

    def proven(*arguments: object, **named: object) -> None:
        prove(*arguments, **named)  # type: ignore[arg-type]
        files.rename(files.with_name("replaced"))
        other.rename(files)

    monkeypatch.setattr(build, "prove", proven)
    with pytest.raises(
        RunbookFailed, match="1 changed file of the files is lost .*, but the plan said: 0 changed files"
    ):
        restored(method="dump", files_source="backup")
    assert (files / "uploads" / "new.png").read_bytes() == b"new"
    assert backed_up.sql("postgres", "SELECT id FROM later") == [(7,)]
    assert backed_up.supervisor.services()[PROGRAMS["postgres"]].state == "RUNNING"


def test_another_database_of_a_dead_server_is_restored_to_the_end_of_its_wal_too(backed_up: Cluster) -> None:
    """Its server cannot start, so nothing of it can be taken from the live directory either."""
    backed_up.sql("postgres", "CREATE DATABASE other", database="postgres")
    backed_up.sql("postgres", "CREATE TABLE orders AS SELECT 7 AS id", database="other")
    backed_up.crash("postgres")
    shutil.rmtree(backed_up.node("postgres").data / "pg_wal")
    report = restored()
    assert report.facts["other databases restored too"] == "other, to the end of the WAL"
    assert report.losses["grc_db"].is_none, report.losses
    assert backed_up.sql("postgres", "SELECT id FROM orders", database="other") == [(7,)]


def test_a_commit_that_only_the_standby_confirmed_is_restored(backed_up: Cluster) -> None:
    """The receiver is away, so only the standby has what the client was told; then the data directory is deleted."""
    with backed_up.writing() as writes:
        writes.wait(20)
        backed_up.stop("receiver")
        until(lambda: "receiver" not in backed_up.streaming(), what="the end of its stream", seconds=120)
        writes.wait(50)
        backed_up.crash("postgres")
        acknowledged = set(writes.acknowledged)
    shutil.rmtree(backed_up.node("postgres").data)
    report = restored(method="cluster")
    assert report.losses["grc_db"].is_none, report.losses
    found = {number for (number,) in backed_up.sql("postgres", "SELECT id FROM writes")}
    assert acknowledged - found == set()


def test_a_client_that_writes_on_adds_to_the_loss_that_the_plan_counted(backed_up: Cluster) -> None:
    """Also what it wrote between the plan's reading of WAL and the plan itself."""
    with backed_up.writing() as writes:
        writes.wait(20)
        with backed_up.connect("postgres") as connection, connection.transaction():
            connection.execute("CREATE TABLE mistake ()")
            row = connection.execute("SELECT pg_current_xact_id()::xid::text").fetchone()
        assert row
        writes.wait(50)
        report = restore_to_point.fn(NAME, by="before_transaction", target=row[0], confirm=NAME)
    lost = report.losses["grc_db"].count
    found = backed_up.sql("postgres", "SELECT id FROM writes")
    assert lost is not None
    assert 50 <= len(writes.lost(found)) <= lost
