"""Base backups and points in time, on a real cluster under a supervisor."""

from __future__ import annotations

import json
import logging
import random
import shutil
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest

from flows.database.backup import prune_backups, verify_backup
from flows.database.base_backup import backup_cluster
from flows.recovery.objectives.check import check_recovery_objectives
from flows.recovery.point.restore import restore_to_point
from flows.recovery.postgres.failover import rejoin_standby
from runbook.errors import OpsError
from runbook.report import Report, Status
from runbook.wait import until
from tasks.backups import codec
from tasks.wal.archive.archive import Archive
from tasks.wal.archive.continuity import intact
from tasks.wal.archive.destinations import archive_of, ship_now
from tasks.wal.format.names import SEGMENT, SEGMENT_BYTES, Segment, lsn_of
from tasks.wal.receiver import wait_received
from tests.fixtures.postgres.clusters import NAME, Cluster, Template, running_cluster
from tests.fixtures.reports import values as findings

OFTEN = timedelta(seconds=6)
YOUNG: dict[str, Any] = {"hours": 24, "daily": 0, "weekly": 0, "monthly": 0}
"""prune-backups keeps the last day only."""


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery needs no Prefect server."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")


def accounts(cluster: Cluster) -> str:
    """A table of which a bug will rewrite every row; then a base backup, whose name is returned."""
    cluster.sql("postgres", "CREATE TABLE accounts (id int PRIMARY KEY, balance int)")
    cluster.sql("postgres", "INSERT INTO accounts SELECT g, g FROM generate_series(1, 100) g")
    return backup_cluster.fn(NAME).facts["backup"]


def transaction(cluster: Cluster, statement: str, role: str = "postgres") -> int:
    """Run one statement as a transaction, which is returned."""
    with cluster.connect(role) as connection, connection.transaction():
        connection.execute(statement.encode())
        row = connection.execute("SELECT pg_current_xact_id()::xid::text::bigint").fetchone()
    assert row
    return int(row[0])


def bug(cluster: Cluster) -> int:
    return transaction(cluster, "UPDATE accounts SET balance = 0")


def segments(cluster: Cluster) -> list[Path]:
    """The finished segments of the archive, oldest first."""
    (archive,) = (cluster.root / "backups" / "wal" / NAME).iterdir()
    return sorted(path for path in archive.iterdir() if SEGMENT.fullmatch(path.name.partition("-")[0]))


def switch(cluster: Cluster, role: str = "postgres") -> None:
    """The segment ends: the next transaction is in another one."""
    cluster.sql(role, "SELECT pg_switch_wal()")


def untouched(cluster: Cluster) -> tuple[object, ...]:
    """What a refused run must not change: every service's process, whatever its supervisor calls its youth."""
    processes = {name: service.pid for name, service in cluster.supervisor.services().items()}
    return (processes, cluster.sql("postgres", "SELECT count(*), sum(balance) FROM accounts"))


def refused(cluster: Cluster, **parameters: object) -> str:
    """The sentence of a run that is refused before anything is touched."""
    before = untouched(cluster)
    with pytest.raises(OpsError) as caught:
        restore_to_point.fn(NAME, confirm=NAME, **parameters)
    assert untouched(cluster) == before
    assert not (cluster.node("postgres").data.parent / "data.restoring").exists()
    return str(caught.value)


def test_a_base_backup_is_taken_verified_by_postgresql_and_restores(cluster: Cluster) -> None:
    name = accounts(cluster)
    assert (cluster.root / "backups" / "cluster" / name / "base.tar.zst").is_file()
    proven = verify_backup.fn(NAME, kind="cluster")
    assert proven.facts["backup"].startswith(name)
    (table,) = [evidence for evidence in proven.evidence if evidence.name == "Read on the private instance"]
    assert {row[0] for row in table.rows} == {"grc_db", "postgres"}
    assert not (cluster.node("postgres").data.parent / "data.verifying").exists()


def test_a_damaged_base_backup_is_not_verified_and_not_restored(cluster: Cluster) -> None:
    name = accounts(cluster)
    xid = bug(cluster)
    tar = cluster.root / "backups" / "cluster" / name / "base.tar.zst"
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(content)
    with pytest.raises(OpsError, match="differs|altered|has another"):
        verify_backup.fn(NAME, kind="cluster")
    assert f"files of {name}" in refused(cluster, by="before_transaction", target=str(xid), backup=name)
    assert "no base backup" in refused(cluster, by="before_transaction", target=str(xid))


@pytest.mark.parametrize("by", ["before_transaction", "time", "lsn", "transaction"])
def test_a_bug_is_undone_to_the_transaction_before_it_and_the_cluster_is_swapped(cluster: Cluster, by: str) -> None:
    accounts(cluster)
    before = transaction(cluster, "INSERT INTO accounts VALUES (101, 101)")
    moment, lsn = cluster.sql("postgres", "SELECT clock_timestamp(), pg_current_wal_insert_lsn()")[0]
    xid = bug(cluster)
    cluster.sql("postgres", "INSERT INTO accounts VALUES (102, 102)")
    target = {"before_transaction": xid, "transaction": before, "time": moment.isoformat(), "lsn": lsn}[by]
    plan = restore_to_point.fn(NAME, by=by, target=str(target))
    assert plan.status is Status.PLANNED
    assert cluster.sql("postgres", "SELECT sum(balance) FROM accounts") == [(102,)], "a plan changes nothing"
    report = restore_to_point.fn(NAME, by=by, target=str(target), confirm=NAME)
    assert report.status is Status.WARN
    measures = [measure.what for measure in report.measures]
    assert measures == ["cluster build", "WAL replay", "database point in time"]
    assert "rejoin-standby" in " ".join(finding.next_step for finding in report.findings)
    assert "backup-cluster" in report.sentence()
    (sides,) = [evidence.rows for evidence in report.evidence if evidence.name == "Both sides of the target"]
    assert [row[1] for row in sides] == [str(before), str(xid)]
    assert cluster.sql("postgres", "SELECT count(*), sum(balance) FROM accounts") == [(101, 5151)]
    assert cluster.streaming() == {"receiver"}
    cluster.sql("postgres", "INSERT INTO accounts VALUES (103, 103)")  # returns: the receiver confirms
    (kept,) = cluster.node("postgres").data.parent.glob("data.superseded_*")
    assert (kept / "PG_VERSION").exists()


@pytest.mark.parametrize(("by", "stops_behind"), [("latest", "build the copy"), ("transaction", "start the copy")])
def test_the_log_has_the_lines_of_the_plan_in_order(
    cluster: Cluster, by: str, stops_behind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """To the newest point the services stop while the copy is built; otherwise when it is proven."""
    accounts(cluster)
    xid = transaction(cluster, "INSERT INTO accounts VALUES (101, 101)")
    target = str(xid) if by == "transaction" else ""
    planned = [(step.step, step.detail) for step in restore_to_point.fn(NAME, by=by, target=target).plan_steps]
    caplog.set_level(logging.INFO, logger="ops")
    report = restore_to_point.fn(NAME, by=by, target=target, confirm=NAME)
    assert [(step.step, step.detail) for step in report.plan_steps] == planned
    logged = [line for line in caplog.messages if line.startswith("Step ")]
    others = (": done in ", ": skipped: ", " so far")
    begun = [line for line in logged if not any(one in line for one in others)]
    names = [f"Step {number}/{len(planned)}: {step}" for number, (step, _) in enumerate(planned, 1)]
    override = next(name for name in names if name.endswith("continue without a standby"))
    assert f"{override}: skipped: enough standbys are connected" in logged
    assert [": ".join(line.split(": ")[:2]) for line in begun] == [name for name in names if name != override]
    steps = [step for step, _ in planned]
    assert steps[steps.index("stop services") - 1] == stops_behind


def test_a_copy_that_cannot_become_live_leaves_every_service_running(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was stopped is put back before anything is replaced; behind the swap nothing is."""

    def refuse(*_: object, **__: object) -> None:
        raise OpsError("more is lost", "plan again")

    accounts(cluster)
    monkeypatch.setattr("flows.recovery.gate.require_confirmed", refuse)
    with pytest.raises(OpsError, match="more is lost") as caught:
        restore_to_point.fn(NAME, by="latest", confirm=NAME)
    assert "nothing live was touched" in str(caught.value)
    assert cluster.sql("postgres", "SELECT count(*) FROM accounts") == [(100,)]
    until(lambda: "receiver" in cluster.streaming(), what="the receiver", seconds=60)
    assert not list(cluster.node("postgres").data.parent.glob("data.superseded_*"))


def test_the_archive_goes_on_over_the_swap_and_the_old_timeline_can_still_be_reached(cluster: Cluster) -> None:
    """Undo by the same way: to the newest point of timeline 1, then forward along timeline 2 again."""
    accounts(cluster)
    xid = bug(cluster)
    cluster.sql("postgres", "INSERT INTO accounts VALUES (102, 102)")
    restore_to_point.fn(NAME, by="before_transaction", target=str(xid), confirm=NAME)
    after = transaction(cluster, "INSERT INTO accounts VALUES (200, 200)")
    last = transaction(cluster, "INSERT INTO accounts VALUES (201, 201)")
    assert after < last
    assert "timeline=…" in refused(cluster, by="transaction", target=str(last + 1000))
    back = restore_to_point.fn(NAME, by="latest", timeline=1, confirm=NAME)
    assert back.facts["timeline"].startswith("3")
    assert cluster.sql("postgres", "SELECT sum(balance) FROM accounts") == [(102,)]
    forth = restore_to_point.fn(NAME, by="transaction", target=str(after), timeline=2, confirm=NAME)
    assert forth.facts["timeline"].startswith("4")
    assert cluster.sql("postgres", "SELECT count(*), sum(balance) FROM accounts") == [(101, 5250)]


def test_what_is_written_after_a_swap_is_in_the_new_timelines_segment_where_the_old_ones_is_finished(
    cluster: Cluster,
) -> None:
    """Timelines part in one segment: the old one had finished it, the new one still writes it."""
    accounts(cluster)
    xid = bug(cluster)
    switch(cluster)
    restore_to_point.fn(NAME, by="before_transaction", target=str(xid), confirm=NAME)
    last = transaction(cluster, "INSERT INTO accounts VALUES (201, 201)")
    plan = restore_to_point.fn(NAME, by="latest")
    (sides,) = [evidence.rows for evidence in plan.evidence if evidence.name == "Both sides of the target"]
    assert sides[0][1] == str(last)
    restore_to_point.fn(NAME, by="latest", timeline=2, confirm=NAME)
    assert cluster.sql("postgres", "SELECT count(*), sum(balance) FROM accounts") == [(101, 5251)]


def test_chosen_tables_come_back_and_what_others_wrote_since_stays(cluster: Cluster) -> None:
    cluster.sql("postgres", "CREATE TABLE others (id int PRIMARY KEY)")
    accounts(cluster)
    cluster.sql("postgres", "INSERT INTO accounts VALUES (101, 101)")
    xid = transaction(cluster, "TRUNCATE accounts")  # whose lock the paused copy holds
    cluster.sql("postgres", "INSERT INTO others VALUES (1)")
    (pid,) = [service.pid for name, service in cluster.supervisor.services().items() if name == "postgresql"]
    report = restore_to_point.fn(
        NAME, by="before_transaction", target=str(xid), mode="tables", tables=["accounts"], confirm=NAME
    )
    assert report.facts["tables at the target, as a backup"].startswith("tables_")
    (loss,) = report.losses.values()
    assert (loss.part, loss.count, loss.since is None) == ("public.accounts", 1, False), "the TRUNCATE itself"
    assert cluster.sql("postgres", "SELECT count(*), sum(balance) FROM accounts") == [(101, 5151)]
    assert cluster.sql("postgres", "SELECT count(*) FROM others") == [(1,)]
    assert cluster.supervisor.services()["postgresql"].pid == pid, "nothing stopped"


def test_the_commits_that_chosen_tables_lose_are_counted(cluster: Cluster) -> None:
    """The copy was promoted, so its own place in WAL says nothing about the live server."""
    cluster.sql("postgres", "CREATE TABLE others (id int PRIMARY KEY)")
    accounts(cluster)
    xid = bug(cluster)
    cluster.sql("postgres", "INSERT INTO others VALUES (1)")
    cluster.sql("postgres", "INSERT INTO accounts VALUES (102, 102)")
    report = restore_to_point.fn(
        NAME, by="before_transaction", target=str(xid), mode="tables", tables=["accounts"], confirm=NAME
    )
    assert report.losses["public.accounts"].count == 2


def test_an_unlogged_table_keeps_its_rows(cluster: Cluster) -> None:
    """A recovered copy has none of them: it emptied the live table, and called that proven by content."""
    cluster.sql("postgres", "CREATE UNLOGGED TABLE sessions (id int PRIMARY KEY)")
    cluster.sql("postgres", "CREATE UNLOGGED TABLE none (id int PRIMARY KEY)")
    cluster.sql("postgres", "INSERT INTO sessions SELECT generate_series(1, 100)")
    accounts(cluster)
    xid = bug(cluster)
    target = {"by": "before_transaction", "target": str(xid)}
    assert "public.sessions: the WAL has none of their rows" in refused(
        cluster, **target, mode="tables", tables=["accounts", "sessions"]
    )
    cluster.sql("postgres", "ALTER TABLE sessions SET LOGGED")  # since the target
    assert "public.sessions: the WAL has none of their rows" in refused(
        cluster, **target, mode="tables", tables=["sessions"]
    )
    cluster.sql("postgres", "ALTER TABLE sessions SET UNLOGGED")
    assert cluster.sql("postgres", "SELECT count(*) FROM sessions") == [(100,)]
    (named,) = [one for one in restore_to_point.fn(NAME, **target).findings if one.name == "unlogged tables"]
    assert named.value == "empty afterwards, because the WAL has none of their rows: grc_db: public.sessions"


def test_five_random_targets_each_come_back_to_the_transaction_before(cluster: Cluster) -> None:
    accounts(cluster)
    seed = random.randrange(10**6)
    chance, written = random.Random(seed), list[tuple[int, int]]()
    for number in range(101, 181):
        written.append((transaction(cluster, f"INSERT INTO accounts VALUES ({number}, {number})"), number))
        if chance.random() < 0.05:
            switch(cluster)
    for xid, number in sorted(chance.sample(written, 5), reverse=True):
        report = restore_to_point.fn(NAME, by="before_transaction", target=str(xid), timeline=1, confirm=NAME)
        assert report.status is Status.WARN
        found = cluster.sql("postgres", "SELECT max(id), count(*) FROM accounts")
        assert found == [(number - 1, number - 1)], f"seed {seed}"


def test_a_target_outside_of_the_archive_is_refused_with_both_ends(cluster: Cluster) -> None:
    name = accounts(cluster)
    bug(cluster)
    for parameters in (
        {"by": "time", "target": "2020-01-01 00:00:00"},
        {"by": "time", "target": "2999-01-01 00:00:00"},
        {"by": "lsn", "target": "FF/0"},
        {"by": "lsn", "target": "0/1000000"},
        {"by": "before_transaction", "target": "4000000"},
    ):
        said = refused(cluster, **parameters)
        assert "oldest reachable point" in said, parameters
        assert "newest: transaction" in said, parameters
        assert name or said
    assert "before the oldest" in refused(cluster, by="time", target="2020-01-01 00:00:00")


def damaged(cluster: Cluster, template: Template, how: str) -> None:
    """Spoil the segment in which the second of three transactions is."""
    path = segments(cluster)[-2]
    if how == "missing":
        path.unlink()
    elif how == "damaged":
        content = bytearray(codec.decompress(path.read_bytes()))
        content[len(content) // 2] ^= 1  # packed anew: in a packed run of zeros a flipped bit may mean the same
        path.write_bytes(codec.compress(bytes(content)))
    else:
        with running_cluster(template, fresh=True) as other:
            path.unlink()
            name = path.name[:24]
            while not (found := other.wal / name).exists():
                other.sql("postgres", "CREATE TABLE IF NOT EXISTS x (); SELECT pg_switch_wal()")
            from tasks.backups.encryption import NO_KEY
            from tasks.wal.archive.archive import Archive
            from tasks.wal.archive.place import DirectoryPlace

            Archive(DirectoryPlace(path.parent), NO_KEY).put(name, found.read_bytes())


@pytest.mark.parametrize(
    ("how", "said"), [("missing", "missing"), ("damaged", "damaged"), ("foreign", "another cluster")]
)
def test_bad_wal_is_refused_with_the_point_that_can_be_reached(
    cluster: Cluster, cluster_template: Template, how: str, said: str
) -> None:
    accounts(cluster)
    found = []
    for number in (101, 102, 103):
        found.append(transaction(cluster, f"INSERT INTO accounts VALUES ({number}, {number})"))
        switch(cluster)
    assert wait_received(cluster.environment.postgres, "receiver")
    until(lambda: not list(cluster.wal.glob("*5.partial")), what="the end of the segment", seconds=120)
    ship_now(cluster.environment)
    for path in cluster.wal.iterdir():
        path.unlink()  # else the receiver's copy would put it right
    damaged(cluster, cluster_template, how)
    sentence = refused(cluster, by="transaction", target=str(found[2]))
    assert said in sentence
    assert f"transaction {found[0]}," in sentence
    report = restore_to_point.fn(NAME, by="transaction", target=str(found[0]), confirm=NAME)
    assert cluster.sql("postgres", "SELECT max(id) FROM accounts") == [(101,)], findings(report)


def flipped(cluster: Cluster, name: str, lsn: int) -> Archive:
    """One bit of a record in an archived segment, and the file named with the SHA-256 of that."""
    archive = archive_of(cluster.environment, "backups", cluster.node("postgres").system)
    stored = archive.listing().segments[name]
    content = bytearray(archive.get(intact(stored)[0]))
    content[lsn % len(content) + 30] ^= 1
    archive.remove(stored)
    archive.put(name, bytes(content))
    return archive


def test_wal_that_does_not_decode_is_replaced_from_an_intact_copy_or_else_critical(cluster: Cluster) -> None:
    """Its checksum is right, and whole segments follow."""
    accounts(cluster)
    found, places = list[int](), list[int]()
    for number in range(101, 107):
        places.append(lsn_of(cluster.sql("postgres", "SELECT pg_current_wal_insert_lsn()::text")[0][0]))
        found.append(transaction(cluster, f"INSERT INTO accounts VALUES ({number}, {number})"))
        ((name,),) = cluster.sql("postgres", "SELECT pg_walfile_name(pg_switch_wal())")
    assert wait_received(cluster.environment.postgres, "receiver")
    until(lambda: ship_now(cluster.environment).newest >= name, what=f"{name} in the archive", seconds=120)
    damaged = Segment(places[2] // SEGMENT_BYTES, 1).name
    archive = flipped(cluster, damaged, places[2])
    plan = restore_to_point.fn(NAME, by="latest")
    (sides,) = [evidence.rows for evidence in plan.evidence if evidence.name == "Both sides of the target"]
    assert sides[0][1] == str(found[-1])
    assert "decodes" in plan.facts[f"damaged segment {damaged}"]
    assert sorted(one.damaged for one in archive.listing().segments[damaged]) == [False, True]
    for path in cluster.wal.iterdir():
        path.unlink()
    flipped(cluster, damaged, places[2])
    assert [one.damaged for one in archive.listing().segments[damaged]] == [False], "as if nobody had noticed"
    with pytest.raises(OpsError) as caught:
        verify_backup.fn(NAME, kind="cluster")
    assert "WAL after the base backup" in str(caught.value)
    assert [one.damaged for one in archive.listing().segments[damaged]] == [True]
    report = check(cluster)
    assert f"{damaged} is damaged" in next(
        text for name, text in report.items() if name.startswith("recovery of database by point in time")
    )
    archive.place.remove([f"{archive.listing().segments[damaged][0].name}.damaged"])
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    for parameters in (
        {"by": "latest"},
        {"by": "time", "target": later},
        {"by": "transaction", "target": str(found[4])},
    ):
        said = refused(cluster, **parameters)
        assert f"{damaged} in " in said or f"{damaged} is damaged" in said, parameters
        assert "does not decode" in said or parameters["by"] != "latest", "marked from then on"
        assert "later segments in the archive, with commits until" in said, parameters
        assert f"transaction {found[-1]}," in said, parameters
        assert "holds nothing" not in said, parameters
        assert f"by=transaction target={found[1]}" in said, parameters
    done = restore_to_point.fn(NAME, by="transaction", target=str(found[1]), confirm=NAME)
    assert cluster.sql("postgres", "SELECT max(id) FROM accounts") == [(102,)], findings(done)
    assert done.status is Status.WARN


def test_damage_in_the_unfinished_segment_is_not_taken_for_the_end_of_wal(cluster: Cluster) -> None:
    """A bit of the receiver's file is another one: the archive has it so, with the right checksum."""
    accounts(cluster)
    switch(cluster)
    found, place = [transaction(cluster, "INSERT INTO accounts VALUES (101, 101)")], 0
    for number in (102, 103):
        place = place or lsn_of(cluster.sql("postgres", "SELECT pg_current_wal_insert_lsn()::text")[0][0])
        found.append(transaction(cluster, f"INSERT INTO accounts VALUES ({number}, {number})"))
    assert wait_received(cluster.environment.postgres, "receiver")
    name = Segment(place // SEGMENT_BYTES, 1).name
    with (cluster.wal / f"{name}.partial").open("r+b") as file:
        file.seek(place % SEGMENT_BYTES + 30)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    plan = restore_to_point.fn(NAME, by="latest")
    (sides,) = [evidence.rows for evidence in plan.evidence if evidence.name == "Both sides of the target"]
    assert sides[0][1] == str(found[-1]), "read from the primary's own pg_wal"
    assert "another copy" in findings(plan)[f"damaged segment {name}"]
    for role in ("standby", "postgres"):
        cluster.crash(role)
        (cluster.node(role).data / "pg_wal" / name).unlink()
    with pytest.raises(OpsError) as caught:
        restore_to_point.fn(NAME, by="latest")
    said = str(caught.value)
    assert f"{name} in " in said
    assert "has records after the end of decoding" in said
    assert "more of that segment, with commits until" in said
    assert f"transaction {found[-1]}," in said
    assert f"by=transaction target={found[0]}" in said
    plan = restore_to_point.fn(NAME, by="transaction", target=str(found[0]))
    assert "has records after" in findings(plan)["WAL of the archive"]


def check(cluster: Cluster) -> dict[str, str]:
    """What check-recovery-objectives finds."""
    with pytest.raises(OpsError):
        check_recovery_objectives.fn(NAME)
    newest = max((cluster.root / "reports").glob("*-check-recovery-objectives.json"))
    return {row["name"]: row["value"] for row in json.loads(newest.read_text())["findings"]}


def test_incremental_backups_stand_on_each_other(cluster: Cluster) -> None:
    accounts(cluster)
    cluster.sql("postgres", "INSERT INTO accounts VALUES (101, 101)")
    middle = backup_cluster.fn(NAME, kind="incremental")
    cluster.sql("postgres", "INSERT INTO accounts VALUES (102, 102)")
    last = backup_cluster.fn(NAME, kind="auto")
    assert last.facts["kind"] == f"incremental, on {middle.facts['backup']}"
    assert verify_backup.fn(NAME, kind="cluster").facts["backup"].startswith(last.facts["backup"])
    xid = bug(cluster)
    restore_to_point.fn(NAME, by="before_transaction", target=str(xid), confirm=NAME)
    assert cluster.sql("postgres", "SELECT count(*), sum(balance) FROM accounts") == [(102, 5253)]


def doomed(report: Report) -> list[str]:
    """What a plan of prune-backups deletes, in its order."""
    return [step.detail.split(",")[0] for step in report.plan_steps if step.step == "delete"]


def test_base_backups_go_by_chain_and_none_on_which_another_stands(cluster: Cluster) -> None:
    store = cluster.root / "backups" / "cluster"
    chain = [accounts(cluster)]
    for _ in range(2):
        cluster.sql("postgres", "UPDATE accounts SET balance = balance + 1")
        chain.append(backup_cluster.fn(NAME, kind="incremental").facts["backup"])
    for name in chain:
        age(store / name)  # before it is verified: a note is of one very manifest
    verify_backup.fn(NAME, kind="cluster", backup=chain[-1])
    plan = prune_backups.fn(NAME, kind="cluster", keep_verified=1, **YOUNG)
    assert doomed(plan) == [], "the newest that is verified stands on both"
    daily = backup_cluster.fn(NAME, kind="auto")
    assert daily.facts["kind"] == "full", "there is no full one of the last week"
    new = daily.facts["backup"]
    verify_backup.fn(NAME, kind="cluster", backup=new)
    plan = prune_backups.fn(NAME, kind="cluster", keep_verified=1, **YOUNG)
    assert doomed(plan) == chain[::-1], "what stands on another goes before it"
    prune_backups.fn(NAME, kind="cluster", keep_verified=1, **YOUNG, confirm=NAME)
    assert [path.name for path in store.glob("base_*")] == [new]
    ((lsn,),) = cluster.sql("postgres", "SELECT pg_current_wal_lsn()::text")
    cluster.sql("postgres", "CHECKPOINT")
    summarized = f"SELECT 1 FROM pg_available_wal_summaries() WHERE end_lsn >= '{lsn}'"
    until(lambda: cluster.sql("postgres", summarized), what="the summary of that WAL", seconds=60)
    for path in (cluster.node("postgres").data / "pg_wal" / "summaries").iterdir():
        path.unlink()
    again = backup_cluster.fn(NAME, kind="auto")
    assert again.facts["kind"] == "full", "what changed since is not known any more"
    assert any(one.name == "incremental base backup" for one in again.findings)


def age(path: Path) -> None:
    """Make a backup's manifest ten days older, sealed anew."""
    from tasks.backups import manifest

    old = manifest.read(path)
    manifest.write(path, old.model_copy(update={"taken": old.taken - timedelta(days=10)}))


def test_wal_goes_with_the_backups_that_needed_it(cluster: Cluster) -> None:
    first = accounts(cluster)
    switch(cluster)
    cluster.sql("postgres", "INSERT INTO accounts VALUES (101, 101)")
    second = backup_cluster.fn(NAME).facts["backup"]
    age(cluster.root / "backups" / "cluster" / first)
    verify_backup.fn(NAME, kind="cluster", backup=second)
    before = segments(cluster)
    oldest = before[0].read_bytes()
    report = prune_backups.fn(NAME, kind="cluster", keep_verified=1, **YOUNG, confirm=NAME)
    assert not (cluster.root / "backups" / "cluster" / first).exists()
    left = segments(cluster)
    assert 0 < len(left) < len(before), report.facts
    assert report.outcome.startswith("1 deleted, ")
    assert "of WAL deleted" in report.outcome
    before[0].write_bytes(oldest)  # as if the run had been killed before this one
    alone = prune_backups.fn(NAME, kind="cluster", keep_verified=1, **YOUNG, confirm=NAME)
    assert alone.outcome.startswith("no backup, 1 files of WAL deleted, "), "it says what went"
    xid = bug(cluster)
    restore_to_point.fn(NAME, by="before_transaction", target=str(xid), confirm=NAME)
    assert cluster.sql("postgres", "SELECT sum(balance) FROM accounts") == [(5151,)]


def test_a_dead_primary_and_its_receivers_tail(cluster: Cluster) -> None:
    """Primary and standby are gone, data and all: the newest point is in the receiver's unfinished segment."""
    accounts(cluster)
    last = transaction(cluster, "INSERT INTO accounts VALUES (101, 101)")
    cluster.settle()
    for role in ("postgres", "standby"):
        cluster.crash(role)
        shutil.rmtree(cluster.node(role).data)
    report = restore_to_point.fn(NAME, by="latest", confirm=NAME)
    (sides,) = [evidence.rows for evidence in report.evidence if evidence.name == "Both sides of the target"]
    assert sides[0][1] == str(last)
    assert cluster.sql("postgres", "SELECT sum(balance) FROM accounts") == [(5151,)]
    assert list(cluster.node("postgres").data.parent.glob("data.superseded_*")) == []


def test_what_is_in_the_archive_is_never_written_over(cluster: Cluster) -> None:
    accounts(cluster)
    cluster.sql("postgres", "INSERT INTO accounts VALUES (101, 101)")  # into the segment that a backup has begun
    ((name,),) = cluster.sql("postgres", "SELECT pg_walfile_name(pg_switch_wal())")
    until(lambda: ship_now(cluster.environment).newest == name, what=f"{name} in the archive", seconds=120)
    before = {path.name: path.read_bytes() for path in segments(cluster)}
    victim = cluster.wal / name
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    assert any("other content" in text for text in ship_now(cluster.environment).refused)
    assert {path.name: path.read_bytes() for path in segments(cluster)} == before
    assert all(codec.decompress(content)[:2] for content in before.values())


def test_a_wrong_target_says_what_to_write(cluster: Cluster) -> None:
    for by, target in (("time", "yesterday"), ("lsn", "0x17"), ("before_transaction", "abc"), ("latest", "now")):
        with pytest.raises(OpsError, match="does not fit"):
            restore_to_point.fn(NAME, by=by, target=target)
    with pytest.raises(OpsError, match="no target"):
        restore_to_point.fn(NAME, by="time")
    with pytest.raises(OpsError, match="no base backup"):
        restore_to_point.fn(NAME, by="latest")
    assert psycopg


def test_a_standby_that_is_ahead_of_the_point_is_joined_again(cluster: Cluster) -> None:
    """It has replayed what is not in the new timeline: told to follow, it would not even start."""
    accounts(cluster)
    xid = bug(cluster)
    until(lambda: cluster.sql("standby", "SELECT sum(balance) FROM accounts") == [(0,)], what="replay", seconds=120)
    restore_to_point.fn(NAME, by="before_transaction", target=str(xid), confirm=NAME)
    report = rejoin_standby.fn(NAME, confirm=NAME)
    assert report.facts["joined by"].startswith(("rewind", "base_backup")), report.facts
    until(lambda: cluster.sql("standby", "SELECT sum(balance) FROM accounts") == [(5050,)], what="replay", seconds=120)


def test_the_end_of_a_segment_is_reported_by_the_receiver_without_the_next_write(cluster: Cluster) -> None:
    """It reports what it writes, but not the end of a segment: that comes with its status, every second (by its own
    clock: by default it would be every 10 s)."""
    for number in range(3):
        cluster.sql("postgres", f"CREATE TABLE t{number} (id int)")
        switch(cluster)
        assert wait_received(cluster.environment.postgres, "receiver")
    reported = list[datetime]()

    def often() -> bool:
        ((at,),) = cluster.sql(
            "postgres", "SELECT reply_time FROM pg_stat_replication WHERE application_name = 'receiver'"
        )
        if at not in reported:
            reported.append(at)
        return max((two - one for one, two in pairwise(reported[-4:])), default=OFTEN) < OFTEN and len(reported) > 3

    until(often, what="a status every second, three times", seconds=120)
