"""What would be lost now, judged on real servers: what holds, and each fault that must be found."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from blocks.environment import Environment
from flows.application.files import backup_files
from flows.database.backup import backup_database, verify_backup
from flows.database.base_backup import backup_cluster
from flows.database.copies import replicate_backups
from flows.recovery.objectives.check import check_recovery_objectives
from flows.recovery.objectives.options import Option, find_options
from flows.recovery.objectives.points import read_recovery_points
from runbook.errors import OpsError, RunbookFailed
from runbook.files import chain
from runbook.metrics import Measure
from runbook.report import NOT_CONFIGURED, Finding, Report, Status
from runbook.wait import until
from tasks.backups import catalogue, manifest
from tasks.recovery_points import standing
from tasks.recovery_points.following import read_replica_point
from tasks.recovery_points.standing import Recoverable
from tasks.stores.store import store_of
from tasks.wal.archive.destinations import ship_now
from tests.fixtures.postgres.clusters import NAME, Cluster
from tests.recovery.point.test_point_in_time import segments, switch, transaction
from tests.redis import servers
from tests.redis.servers import replicated


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check needs no Prefect server."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")


def check(name: str = NAME) -> Report:
    """The report, CRITICAL or not."""
    try:
        return check_recovery_objectives.fn(name)
    except RunbookFailed as error:
        return error.report


def finding(report: Report, name: str) -> Finding:
    found = [one for one in report.findings if one.name == name]
    assert len(found) == 1, f"{name} in {[(one.name, one.value) for one in report.findings]}"
    return found[0]


def board(cluster: Cluster) -> dict[str, Recoverable]:
    """What the board's record says of each resource."""
    found = standing.read(cluster.environment.reports_directory)
    assert found
    return {one.resource: one for one in found.resources}


def rows(report: Report) -> list[tuple[str, ...]]:
    (table,) = [evidence for evidence in report.evidence if evidence.name == "Recovery points"]
    return list(table.rows)


def configure(cluster: Cluster, pattern: str, replacement: str) -> None:
    """Change the environment's TOML."""
    path = Path(os.environ["OPS_ENVIRONMENT_FILE"])
    changed = re.sub(pattern, replacement, path.read_text(), flags=re.DOTALL)
    assert changed != path.read_text()
    path.write_text(changed)
    assert cluster.environment.name == NAME


def copies(cluster: Cluster) -> None:
    """A second set of stores."""
    kinds = ("postgres", "redis", "files", "cluster", "wal")
    places = "".join(f'{kind} = "{cluster.root}/copies/{kind}"\n' for kind in kinds)
    configure(
        cluster,
        r"\[application\]",
        f"[copies]\nsurvives = 'server'\n{places}spool = '{cluster.root}/spool'\n[application]",
    )


def note_proven(kind: manifest.Kind, name: str) -> None:
    """As verify-backup notes it."""
    catalogue.mark_verified.work(store_of(Environment.find(NAME), kind), name, {"by": "test"})


def seconds_lost(told: str) -> float:
    """`…; its newest data is 1 min 05 s old` as a number."""
    units, age = {"s": 1, "min": 60, "h": 3600}, told.rpartition("its newest data is")[2]
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) (s|min|h)\b", age))


@pytest.fixture
def base(cluster: Cluster) -> str:
    """A cluster with a table and a proven base backup, whose name is given."""
    cluster.sql("postgres", "CREATE TABLE accounts (id int PRIMARY KEY)")
    name = backup_cluster.fn(NAME).facts["backup"]
    note_proven("cluster", name)
    cluster.sql("postgres", "INSERT INTO accounts VALUES (1)")
    cluster.settle()
    return name


def test_with_all_in_place_nothing_is_lost_and_what_was_never_tried_is_said(cluster: Cluster, base: str) -> None:
    report = check()
    assert report.status is Status.CRITICAL, "there is no backup of the files, and that is not overlooked"
    server, data = finding(report, "database, server lost"), finding(report, "database, data corrupted")
    assert (server.status, data.status) == (Status.OK, Status.OK)
    assert server.value.startswith("nothing of grc_db is lost; recovered by standby")
    assert data.value == f"nothing of grc_db is lost; recovered by point in time ({base})", (
        "a standby is no means against bad data"
    )
    assert "copies" in report.facts[NOT_CONFIGURED], "of a second place nothing is asked where none is described"
    assert not [one.name for one in report.findings if "region lost" in one.name]
    assert finding(report, "files, server lost").status is Status.CRITICAL
    times = [one for one in report.findings if one.name.startswith("time for database")]
    assert {one.status for one in times} == {Status.WARN}
    assert all("ever measured" in one.value for one in times)


def test_a_proven_restore_is_what_the_time_is_estimated_from(cluster: Cluster, base: str) -> None:
    check()
    before = board(cluster)
    assert before["database"].why.startswith("duration never measured")
    assert [one.what for one in verify_backup.fn(NAME, kind="cluster").measures] == [
        "cluster build",
        "database point in time",
    ]
    assert board(cluster)["database"] != before["database"], "verify-backup rebuilds the board"
    told = finding(check(), f"time for database by point in time ({base})")
    assert told.status is Status.OK
    assert "from 1 measured" in told.value
    slow = Report("Verify backup", NAME, measures=[Measure("database point in time", 1, 99_999.0)] * 3)
    chain.append(cluster.environment.reports_directory, "verify-backup", slow.as_json())
    told = finding(check(), f"time for database by point in time ({base})")
    assert told.status is Status.CRITICAL, "the RTO is 4 h"
    assert "from 4 measured" in told.value
    assert board(cluster)["database"].why.startswith("data corrupted: it takes 13 h")
    page = (cluster.environment.reports_directory / "recovery-board.html").read_text()
    assert page.index("✗ database") < page.index("✗ files")


def test_a_dead_standby_is_no_means_and_a_stopped_receiver_makes_the_loss_grow(cluster: Cluster, base: str) -> None:
    configure(cluster, 'rpo = "1h"', 'rpo = "1s"')
    cluster.stop("receiver")
    assert finding(check(), "database, data corrupted").status is Status.OK, (
        "nothing was written since: nothing is lost"
    )
    cluster.sql("postgres", "INSERT INTO accounts VALUES (2)")
    until(lambda: finding(check(), "database, data corrupted").status is Status.CRITICAL, what="the loss", seconds=120)
    report = check()
    assert finding(report, "database, server lost").value.startswith("nothing of grc_db is lost; recovered by standby")
    assert finding(report, "the WAL receiver").value == "it does not stream: the loss grows"
    before = seconds_lost(finding(report, "database, data corrupted").value)
    assert before >= 1
    grown = until(
        lambda: seconds_lost(finding(check(), "database, data corrupted").value) > before, what="more loss", seconds=120
    )
    assert grown
    cluster.crash("standby")
    report = check()
    lost = finding(report, "database, server lost")
    assert lost.status is Status.CRITICAL
    assert "by point in time" in lost.value
    assert (
        "does not answer"
        in [one for one in report.findings if one.name.startswith("recovery of database by standby")][0].value
    )


def test_a_missing_segment_of_the_archive_is_where_it_ends(cluster: Cluster, base: str) -> None:
    configure(cluster, 'rpo = "1h"', 'rpo = "1s"')
    names = []
    for number in (101, 102, 103):
        transaction(cluster, f"INSERT INTO accounts VALUES ({number})")
        names += cluster.sql("postgres", "SELECT pg_walfile_name(pg_current_wal_lsn())")[0]
        switch(cluster)
    until(lambda: names[-1] in ship_now(cluster.environment).newest, what="the segments", seconds=120)
    assert finding(check(), "database, data corrupted").status is Status.OK
    (second,) = [path for path in segments(cluster) if path.name.startswith(names[1])]
    second.unlink()
    assert finding(check(), "database, data corrupted").status is Status.OK, "the receiver still has it, and ships it"
    for path in cluster.wal.iterdir():
        if not path.name.endswith(".partial"):
            path.unlink()
    until(lambda: finding(check(), "database, data corrupted").status is Status.CRITICAL, what="the loss", seconds=120)
    report = check()
    assert finding(report, "database, server lost").status is Status.OK, "the standby has everything"
    trouble = finding(report, f"recovery of database by point in time ({base})")
    assert names[1] in trouble.value
    assert "missing" in trouble.value
    newer = backup_cluster.fn(NAME).facts["backup"]
    told = finding(check(), "database, data corrupted")
    assert (told.status, newer in told.value) == (Status.WARN, True), "it starts behind the gap, and is not proven yet"


def test_a_backup_that_failed_its_proof_stands_for_nothing(cluster: Cluster, base: str) -> None:
    bad = backup_cluster.fn(NAME).facts["backup"]
    assert f"({base})" in finding(check(), "database, data corrupted").value, "the proven one reaches as far"
    tar = cluster.root / "backups" / "cluster" / bad / "base.tar.zst"
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(content)
    with pytest.raises(OpsError, match="differs|altered|has another"):
        verify_backup.fn(NAME, kind="cluster")
    assert bad not in str(rows(check()))
    store = store_of(cluster.environment, "cluster")
    catalogue.mark_failed.work(store, base, {"by": "test", "reason": "damaged"})
    assert "no base backup" in finding(check(), "recovery of database by point in time").value
    first = backup_database.fn(NAME).facts["backup"]
    note_proven("postgres", first)
    second = backup_database.fn(NAME).facts["backup"]
    catalogue.mark_failed.work(store_of(cluster.environment, "postgres"), second, {"by": "test", "reason": "damaged"})
    report = check()
    assert second in finding(report, "newest backup of database in backups").value
    assert first in str(rows(report))


def test_the_manuals_daily_backup_is_told_before_it_is_too_old_and_red_when_it_is(cluster: Cluster) -> None:
    configure(cluster, r"\[standby\].*\[services\]", "[services]")
    name = backup_database.fn(NAME).facts["backup"]
    note_proven("postgres", name)
    cluster.sql(
        "postgres",
        "SELECT pg_create_physical_replication_slot(name, true)FROM unnest(ARRAY['ops_containment', 'forgotten']) name",
    )
    report = check()
    assert finding(report, "database, data corrupted").status is Status.OK
    assert finding(report, "database, data corrupted").value.endswith(f"by backup ({name})"), "kept WAL is no means"
    for slot, said in (("ops_containment", "release-containment"), ("forgotten", "pg_drop_replication_slot")):
        told = finding(report, f"slot {slot}")
        assert (told.status, "it is not in use" in told.value, said in told.hint) == (Status.WARN, True, True)
    assert not [one for one in report.findings if one.name in ("slot standby", "slot wal_archive")]
    told = finding(report, "database, data corrupted: between two backups")
    assert (told.status, "24 h" in told.value) == (Status.WARN, True)
    assert "a daily backup cannot meet an RPO of 1 h" in told.hint
    path = cluster.root / "backups" / "postgresql" / name
    old = manifest.read(path)
    taken = old.taken - timedelta(minutes=90)
    manifest.write(path, old.model_copy(update={"taken": taken}))
    note_proven("postgres", name)
    report = check()
    most = (datetime.now(UTC) - taken).total_seconds()
    for danger in ("server lost", "data corrupted"):
        told = finding(report, f"database, {danger}")
        assert told.status is Status.CRITICAL
        assert " are lost; recovered by backup" in told.value
        assert 90 * 60 <= seconds_lost(told.value) <= most
        assert "a daily backup cannot meet an RPO of 1 h" in told.hint


def test_a_store_that_cannot_be_read_is_not_known_and_never_well(cluster: Cluster, base: str) -> None:
    copies(cluster)
    assert "is missing" in finding(check(), "database, region lost").value
    replicate_backups.fn(NAME, kind="cluster")
    ship_now(cluster.environment, "copies")
    assert finding(check(), "database, region lost").status is Status.OK
    configure(
        cluster,
        r'postgres = "[^"]*/copies/postgres"(.*?)cluster = "[^"]*"\nwal = "[^"]*"',
        r'postgres = "s3://gone/postgres"\1cluster = "s3://gone/cluster"\nwal = "s3://gone/wal"\n'
        r'endpoint = "http://127.0.0.1:9"\naccess_key = "a"\nsecret_key_env = "PAIR_PASSWORD"\npatience_seconds = 1',
    )
    told = finding(check(), "database, region lost")
    assert told.status is Status.CRITICAL
    assert told.value.startswith("not known: ")
    assert told.hint


def test_a_dead_primary_of_which_only_the_files_are_left(cluster: Cluster, base: str) -> None:
    """Its own WAL says what the standby lacks: nothing. With its files gone nobody can say so."""
    cluster.crash("postgres")
    report = check()
    assert "does not answer" in finding(report, "the primary").value
    assert finding(report, "database, server lost").value.startswith("nothing of grc_db is lost; recovered by standby")
    cluster.node("postgres").data.rename(cluster.root / "gone")
    report = check()
    assert finding(report, "database, server lost").value.startswith("at most ")


def test_a_backup_on_the_very_host_of_the_database_goes_with_it(cluster: Cluster, base: str) -> None:
    configure(cluster, 'survives = "server"\n', "")
    configure(cluster, r"\[standby\].*?\[wal\]", "[wal]")
    report = check()
    lost = finding(report, "database, server lost")
    assert lost.status is Status.WARN, "no second place is described: a decision, no incident"
    assert "all backups are on this host" in lost.value
    assert "survives" in lost.hint
    assert finding(report, "database, data corrupted").status is Status.OK
    assert {one.helps for one in found_options(cluster) if one.flow == "restore-to-point"} == {("data corrupted",)}
    copies(cluster)
    replicate_backups.fn(NAME, kind="cluster")
    ship_now(cluster.environment, "copies")
    told = finding(check(), "database, server lost")
    assert (told.status, "from the copies" in told.value) == (Status.OK, True)
    configure(cluster, "survives = 'server'\n", "")
    for danger in ("server lost", "region lost"):
        assert finding(check(), f"database, {danger}").status is Status.CRITICAL


def found_options(cluster: Cluster) -> list[Option]:
    """As show-recovery-options finds them."""
    return find_options(cluster.environment, read_recovery_points(cluster.environment))


def test_backups_of_the_future_do_not_count(cluster: Cluster) -> None:
    name = backup_database.fn(NAME).facts["backup"]
    path = cluster.root / "backups" / "postgresql" / name
    manifest.write(path, manifest.read(path).model_copy(update={"taken": datetime.now(UTC) + timedelta(days=1)}))
    report = check()
    assert name in finding(report, "clock of the backups of database in backups").value
    assert name not in str(rows(report))


def test_a_region_that_does_not_serve_is_not_judged(cluster: Cluster) -> None:
    endpoint = cluster.root / "endpoint"
    endpoint.write_text("https://elsewhere.example\n")
    configure(cluster, r"\[logs\]", f'[endpoint]\nfile = "{endpoint}"\n[logs]')
    assert finding(check(), "database, server lost"), "without an address of its own nobody can say that it is not this"
    configure(cluster, r"\[application\]", '[application]\nurl = "http://127.0.0.1:8000"')
    report = check()
    assert report.status is Status.OK
    assert "users are sent to another region" in report.outcome
    endpoint.write_text("http://127.0.0.1:8000\n")
    assert finding(check(), "database, server lost")


def test_files_that_nobody_has_changed_since_their_backup_lose_nothing(cluster: Cluster) -> None:
    backup_files.fn(NAME)
    told = finding(check(), "files, data corrupted")
    assert (told.status, told.value.startswith("nothing of the files is lost")) == (Status.WARN, True), (
        "it was never proven"
    )
    (cluster.root / "opt" / "grc" / "extra.txt").write_text("new")
    until(lambda: "writes of the files" in finding(check(), "files, data corrupted").value, what="loss", seconds=120)


def test_a_replica_that_does_not_answer_is_no_means(monkeypatch: pytest.MonkeyPatch) -> None:
    with replicated(replicas=1, sentinels=0) as group:
        (replica,) = group.replicas
        group.master.register(monkeypatch, extra=f'replicas = ["{replica.address}"]\n')
        env = Environment.find(servers.NAME)
        until(lambda: read_replica_point.work(env).detail == "has everything", what="the replica", seconds=120)
        replica.crash()
        point = read_replica_point.work(env)
        assert (point.at, bool(point.problem), bool(point.hint)) == (None, True, True)
        group.master.crash()
        report = check(servers.NAME)
        assert finding(report, "redis, server lost").status is Status.CRITICAL
