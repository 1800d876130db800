"""Scenario 3 of §8.4: a bug of the application rewrites data. Recovery to just before its transaction."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
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
from runbook.kinds import Bound
from runbook.report import Report
from tasks.drill.sabotage import alter_segment, copy_of, remove_segment
from tasks.failover.promotion import streams
from tasks.faults.corruption import Fingerprint, corruption_of, read_fingerprint, rewrite_rows
from tasks.faults.disposable import Fault
from tasks.host.services import start_services
from tasks.postgres.tables.rewriters import find_rewriter
from tasks.wal.format.names import Segment, lsn_of

OLDER = timedelta(seconds=30)
"""The fingerprint covers rows older than this: no open transaction has written one of them."""


class DataCorruption(Scenario):
    """Data corruption."""

    name = "data_corruption"
    title = "Data corruption"
    situation = "A bug of the application corrupts data"
    goal = "Point-in-time recovery to before the bug"
    checks = "data as before the corruption"
    backups = ("cluster",)
    sensors = ("content",)

    def targets(self, env: Environment) -> Targets:
        """The environment's RTO, and no lost write from before the bug."""
        return Targets(env.rto_seconds, 0.0, 0)

    def fault(self, env: Environment) -> Bound[..., Fault]:
        """Return what rewrites the rows of a table."""
        return rewrite_rows.bind(env)

    def judge(self, report: Report, env: Environment) -> None:
        """Only the expectations notice this fault; the negative control spoils a copy of the archive."""
        report.require(
            "steady state: expectations",
            bool(env.suites),
            "set [expectations] directory in the TOML: no other sensor notices this fault",
            value=env.expectations or "none are configured",
        )
        where = env.backups.wal
        hint = "run the drill where it is a directory, and start the archiver: the negative control sabotages a copy"
        report.require("steady state: WAL archive", Path(where).is_dir(), hint, value=where)

    def strike(self, drill: Drill, fault: Bound[..., Fault]) -> Fault:
        """One transaction. Its number and the rows' fingerprint are recorded first, for a run that has to heal."""
        env, before = drill.env, now() - OLDER
        known = read_fingerprint(env.postgres, env.postgres.database, corruption_of(env), before)
        drill.note(before=before.isoformat(), fingerprint=str(known))
        return fault(lambda xid: drill.note(xid=str(xid)))

    def decide(self, drill: Drill) -> None:
        """Find the transaction by the rows of the table that the sensor names; then the recovery's plan."""
        env = drill.env
        symptom = next((one.text for one in drill.symptoms if one.sensor == "content"), "")
        table = symptom.partition(":")[0]
        if not re.fullmatch(r"\w+", table):
            raise OpsError("no sensor names a table with wrong data", "check the expectations by hand")
        found = find_rewriter(env.postgres, env.postgres.database, table)
        text = f"transaction {found.xid} wrote {found.rows:,} of {found.of_rows:,} rows of {table}"
        drill.report.fact("diagnosis", text)
        was = drill.fault.facts["xid"] if drill.fault else ""
        drill.report.require(
            "the diagnosis is right",
            was == str(found.xid),
            "check which transaction wrote these rows after the fault",
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
        """The whole cluster, just before the transaction that was found."""
        target = drill.half_done.notes["found"]
        done = drill.run(restore_to_point, by="before_transaction", target=target, confirm=drill.env.name)
        drill.done["database"] = f"restore-to-point: {done.facts.get('base backup', '')}"
        return done

    def verify(self, drill: Drill) -> None:
        """To be verified: the rows are those of before the bug; the expectations are satisfied."""
        env, notes = drill.env, drill.half_done.notes
        found = _fingerprint(drill)
        drill.report.require(
            "data as before the corruption",
            str(found) == notes["fingerprint"],
            "find out which other transaction rewrote rows",
            value=found,
            expected=notes["fingerprint"],
        )
        detection.require_expectations(drill)
        drill.done["integrity"] = f"{found}{detection.expectations_text(env)}"

    def settled_by(self, env: Environment) -> Sequence[str]:
        """Return the backup, and before it the standby where there is one."""
        return ("rejoin-standby", "backup-cluster") if env.has("standby") else ("backup-cluster",)

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
        """Services first; then the recovery, if the bug is live; then a standby."""
        env, notes = drill.env, drill.half_done.notes
        start_everything(env)
        env.forget_roles()
        if "xid" in notes and (detection.database(env, drill.directory) or self._is_live(drill)):
            drill.run(restore_to_point, by="before_transaction", target=notes["xid"], confirm=env.name)
            env.forget_roles()
        if env.has("standby") and not streams(env.postgres, env.standby.name):
            drill.run(rejoin_standby, confirm=env.name)

    def _is_live(self, drill: Drill) -> bool:
        """Whether the rows have changed: the bug was committed, and is not undone."""
        return str(_fingerprint(drill)) != drill.half_done.notes["fingerprint"]


def _fingerprint(drill: Drill) -> Fingerprint:
    postgres, before = drill.env.postgres, datetime.fromisoformat(drill.half_done.notes["before"])
    return read_fingerprint(postgres, postgres.database, corruption_of(drill.env), before)


def _segment(drill: Drill) -> tuple[str, int]:
    """The segment in which the recovery stopped, and the offset of a byte of the record there."""
    notes = drill.half_done.notes
    place = lsn_of(notes["stops"].rpartition(" ")[2])
    with drill.env.postgres.connect() as connection:
        size = int(str(execute(connection, "SELECT setting FROM pg_settings WHERE name = 'wal_segment_size'")[0][0]))
    return Segment(place // size, int(notes["timeline"]), size).name, place % size + 4


def _with_archive(env: Environment, archive: Path, scratch: Path) -> Environment:
    """In memory: the same system with a copy of its WAL archive. Without [wal] nothing is archived to the copy."""
    backups = env.backups.model_copy(update={"wal": str(archive)})
    return env.derived({"backups": backups}, without=("wal",), reports=scratch / "reports")


def start_everything(env: Environment) -> None:
    """Start every service of the environment. The sensors report one that does not start."""
    followers = [node.service for node in env.nodes()] + ([env.wal.service] if env.has("wal") else [])
    for role in dict.fromkeys([*followers, *START_ORDER]):
        if role in env.services.names:
            with contextlib.suppress(OpsError):
                start_services(env.services, [role])
