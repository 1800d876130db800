"""Scenario 3 of §8.4: a bug of the application rewrites data. Back to the transaction before it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

from blocks.environment import START_ORDER, Environment
from blocks.postgres.server import execute
from flows.database.base_backup import backup_cluster
from flows.recovery.drills import control, detection
from flows.recovery.drills.scenario import Drill, Refusal, Scenario, Targets, now
from flows.recovery.point.restore import restore_to_point
from flows.recovery.postgres.failover import rejoin_standby
from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.report import Report
from tasks.drill.sabotage import alter_segment, copy_of, remove_segment
from tasks.failover.promotion import streams
from tasks.faults.corruption import Fingerprint, corruption_of, read_fingerprint, rewrite_rows
from tasks.faults.disposable import BREAK, Fault
from tasks.host.services import start_services
from tasks.postgres.tables.rewriters import find_rewriter
from tasks.wal.format.names import Segment, lsn_of

OLDER = timedelta(seconds=30)
"""Rows that are so much older than the fault: no transaction that is still open has written one of them."""


class DataCorruption(Scenario):
    """データ破損."""

    name = "data_corruption"
    title = "データ破損"
    situation = "アプリケーションバグによるデータ破損"
    goal = "特定時点へのポイントインタイムリカバリ"
    checks = "破損前の状態に復旧"
    backups = ("cluster",)
    sensors = ("content",)

    def targets(self, env: Environment) -> Targets:
        """The environment's RTO, and everything that was acknowledged before the bug."""
        return Targets(env.rto_seconds, 0.0, 0)

    def acts(self, env: Environment) -> list[Act]:
        """The rows of a table."""
        return [Act(BREAK, corruption_of(env).table)]

    def judge(self, report: Report, env: Environment) -> None:
        """Only the expectations notice this fault; the negative control spoils a copy of the archive."""
        report.require(
            "steady state: expectations",
            bool(env.suites),
            "set [expectations] directory in the TOML: nothing else notices this fault",
            value=env.expectations or "none are configured",
        )
        where = env.backups.wal
        hint = "hold the drill where it is in a directory, and start its archiver: a copy of it is to be spoiled"
        report.require("steady state: archive of WAL", Path(where).is_dir(), hint, value=where)

    def strike(self, drill: Drill) -> Fault:
        """One transaction; its number and what was there before are noted first, for a run that has to heal."""
        env, before = drill.env, now() - OLDER
        known = read_fingerprint(env.postgres, env.postgres.database, corruption_of(env), before)
        drill.note(before=before.isoformat(), fingerprint=str(known))
        return rewrite_rows(drill.permit, env, lambda xid: drill.note(xid=str(xid)))

    def decide(self, drill: Drill) -> None:
        """Which transaction: by the rows of the table that the sensor names. Then the way back, planned."""
        env = drill.env
        told = next((one.told for one in drill.symptoms if one.sensor == "content"), "")
        table = told.partition(":")[0]
        if not re.fullmatch(r"\w+", table):
            raise OpsError("no sensor names a table whose data is wrong", "look at the expectations by hand")
        found = find_rewriter(env.postgres, env.postgres.database, table)
        told = f"transaction {found.xid} wrote {found.rows:,} of {found.of_rows:,} rows of {table}"
        drill.report.fact("diagnosis", told)
        was = drill.fault.facts["xid"] if drill.fault else ""
        drill.report.require(
            "the diagnosis is right",
            was == str(found.xid),
            "find out why the rows name another one",
            value=found.xid,
            expected=was,
        )
        plan = drill.run(restore_to_point, by="before_transaction", target=str(found.xid))
        drill.done["strategy"] = f"restore-to-point: {plan.facts.get('stops', '')}"
        drill.note(
            found=str(found.xid),
            backup=str(plan.pins["backup"]),
            timeline=str(plan.pins["timeline"]),
            stops=plan.facts["stops"],
        )

    def restore(self, drill: Drill) -> Report:
        """The whole cluster, as it was before the transaction that was found."""
        target = drill.half_done.notes["found"]
        done = drill.run(restore_to_point, by="before_transaction", target=target, confirm=drill.env.name)
        drill.done["database"] = f"restore-to-point: {done.facts.get('base backup', '')}"
        return done

    def verify(self, drill: Drill) -> None:
        """確認項目: the rows are what they were before the bug, and the expectations hold."""
        env, notes = drill.env, drill.half_done.notes
        there = _fingerprint(drill)
        drill.report.require(
            "破損前の状態に復旧",
            str(there) == notes["fingerprint"],
            "look what else was rewritten",
            value=there,
            expected=notes["fingerprint"],
        )
        detection.expect_rules(drill)
        drill.done["integrity"] = f"{there}{detection.rules_hold(env)}"

    def settle(self, drill: Drill) -> None:
        """A standby of the new timeline, and a base backup of it."""
        drill.env.forget_roles()
        if drill.env.has("standby"):
            drill.run(rejoin_standby, confirm=drill.env.name)
        drill.run(backup_cluster)

    def control(self, drill: Drill) -> list[Refusal]:
        """The same recovery from copies of the archive: a segment missing, altered, altered with a right SHA-256."""
        notes = drill.half_done.notes
        segment, offset = _segment(drill)
        wanted = {
            "by": "before_transaction",
            "target": notes["found"],
            "backup": notes["backup"],
            "timeline": int(notes["timeline"]),
        }
        spoils: tuple[Callable[[Path], str], ...] = (
            partial(remove_segment, segment=segment),
            partial(alter_segment, segment=segment, offset=offset, resum=False),
            partial(alter_segment, segment=segment, offset=offset, resum=True),
        )
        found = []
        for number, spoil in enumerate(spoils, 1):
            scratch = drill.directory / f"control-{number}"
            archive = copy_of(Path(drill.env.backups.wal), scratch / "wal")
            derived = _with_archive(drill.env, archive, scratch)
            if number == 1:
                control.require_accepted(derived, restore_to_point, **wanted)
            found.append(control.try_sabotaged(derived, restore_to_point, spoil(archive), **wanted))
        return found

    def heal(self, drill: Drill) -> None:
        """Services first; then back before the bug where its traces are live; then a standby."""
        env, notes = drill.env, drill.half_done.notes
        start_everything(env)
        env.forget_roles()
        if "xid" in notes and (detection.database(env, drill.directory) or self._is_live(drill)):
            drill.run(restore_to_point, by="before_transaction", target=notes["xid"], confirm=env.name)
            env.forget_roles()
        if env.has("standby") and not streams(env.postgres, env.standby.name):
            drill.run(rejoin_standby, confirm=env.name)

    def _is_live(self, drill: Drill) -> bool:
        """Whether the rows are not what they were: the bug was committed, and is not undone."""
        return str(_fingerprint(drill)) != drill.half_done.notes["fingerprint"]


def _fingerprint(drill: Drill) -> Fingerprint:
    postgres, before = drill.env.postgres, datetime.fromisoformat(drill.half_done.notes["before"])
    return read_fingerprint(postgres, postgres.database, corruption_of(drill.env), before)


def _segment(drill: Drill) -> tuple[str, int]:
    """The segment in which the recovery stopped, and a byte of the record before which it did."""
    notes = drill.half_done.notes
    place = lsn_of(notes["stops"].rpartition(" ")[2])
    with drill.env.postgres.connect() as connection:
        size = int(str(execute(connection, "SELECT setting FROM pg_settings WHERE name = 'wal_segment_size'")[0][0]))
    return Segment(place // size, int(notes["timeline"]), size).name, place % size + 4


def _with_archive(env: Environment, archive: Path, scratch: Path) -> Environment:
    """In memory: the same system, its WAL in a copy. Nobody ships anything into that: it names no [wal]."""
    backups = env.backups.model_copy(update={"wal": str(archive)})
    return env.derived({"backups": backups}, without=("wal",), reports=scratch / "reports")


def start_everything(env: Environment) -> None:
    """Every service that the environment names. One that does not start is told by the sensors later."""
    followers = [node.service for node in env.nodes()] + ([env.wal.service] if env.has("wal") else [])
    for role in dict.fromkeys([*followers, *START_ORDER]):
        if role in env.services.names:
            with contextlib.suppress(OpsError):
                start_services(env.services, [role])
