"""The rows of chosen tables as of a point in time: dumped from the staged copy, and restored by restore-tables."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from blocks.environment import Environment
from flows.database.tables import restore_tables
from flows.recovery import unlogged
from flows.recovery.gate import ClusterCopy
from flows.recovery.point import build
from flows.recovery.point.target import FoundTarget
from flows.store import store_for
from runbook.change import Carrier, Change, Line, State
from runbook.next import Next
from runbook.report import Report
from tasks.backups import publishing
from tasks.backups.catalogue import Backup
from tasks.backups.manifest import Manifest, sums_of
from tasks.cluster.instance import PrivateInstance
from tasks.cluster.recovery import promote_instance
from tasks.postgres.dump.dump import What, dump_database, dump_globals
from tasks.postgres.tables.chosen import choose_tables
from tasks.wal.format.names import lsn_text


@dataclass(frozen=True)
class TablesRestore:
    """The lines of a point-in-time recovery of chosen tables."""

    report: Report
    env: Environment
    instance: PrivateInstance
    copy: ClusterCopy
    found: FoundTarget
    tables: Sequence[str]
    build: build.PointBuild
    dump: Change[[], Backup]
    restore: Change[[Backup], Report]

    @classmethod
    def plan(
        cls,
        report: Report,
        env: Environment,
        instance: PrivateInstance,
        copy: ClusterCopy,
        found: FoundTarget,
        tables: Sequence[str],
    ) -> TablesRestore:
        """Plan the lines."""
        at = copy.stop.before.at if copy.stop.before else copy.origin.content.stopped
        # A transaction that is left out may hold locks on the tables until the promotion.
        promote = partial(promote_instance, instance, {})
        return cls(
            *(report, env, instance, copy, found, tables),
            build.PointBuild.plan(report, env, instance, copy, len(found.links), promote, build.UNCHANGED),
            Change(
                lambda: _keep(report, env, instance, tables, copy, at),
                "dump from the copy",
                f"{', '.join(tables)}, into the store as a backup of tables",
            ),
            Change(
                lambda kept: restore_tables.fn(env.name, tables=list(tables), backup=kept.name, confirm=env.name),
                "restore-tables",
                "from that backup: proven, foreign keys checked, the old rows kept",
                seconds=5,
                done=State(f"the rows of {', '.join(tables)} were replaced", "run undo-restore-tables to restore them"),
            ),
        )

    @property
    def lines(self) -> Sequence[Line[..., Any]]:
        """Return them in order."""
        return self.build.files, self.build.building, *self.build.lines, self.dump, self.restore

    def pin(self, report: Report) -> None:
        """Pin the tables: restore-tables permits its own acts."""
        report.pin_state("tables", ", ".join(self.tables))

    def carry_out(self, carry: Carrier) -> None:
        """Build and prove the copy, dump the tables from it, and restore them.

        Raises:
            RunbookFailed, OpsError: the copy is not at the target, or restore-tables fails.
        """
        building = self.build.begin(carry, self.copy.origin)
        with self.build.promoted(carry, building, self.copy, self.found.links):
            build.compare(self.report, self.env, self.instance)
            kept = carry(self.dump)
        done = carry(self.restore, kept)
        self.report.loses(*done.losses.values())
        self.report.table("Result of restore-tables", ("fact", "value"), list(done.facts.items()))
        self.report.undo_is(Next("undo-restore-tables"))
        self.report.outcome = f"{', '.join(self.tables)} have the rows of the target time ({done.outcome})"


def _keep(
    report: Report, env: Environment, instance: PrivateInstance, tables: Sequence[str], copy: ClusterCopy, at: datetime
) -> Backup:
    """Dump the copy's tables into the environment's store, as a backup with the target's time and place in WAL."""
    started = time.monotonic()
    unlogged.require_logged(report, instance.postgres, tables)
    found = choose_tables(instance.postgres, tables)
    store = store_for(env, "tables")
    name, directory = publishing.begin(store, "tables", env.name, env.zone)
    dump_globals(instance.postgres, directory)
    dumped = dump_database(instance.postgres, directory, 1, What("tables", found.names, found.others))
    # The copy was promoted: its own LSN and transactions are on a timeline that the live server does not know.
    place = {"lsn": lsn_text(copy.end), "timeline": copy.origin.chain.timeline.number, "snapshot": ""}
    manifest = Manifest(
        kind="tables",
        name=name,
        environment=env.name,
        taken=at,
        seconds=time.monotonic() - started,
        host=socket.gethostname(),
        tool="pg_dump of a recovery to a point in time",
        files=sums_of(directory),
        content=dumped.content.model_copy(update=place).model_dump(mode="json"),
    )
    backup = publishing.publish(store, directory, manifest)
    report.fact("tables at the target, as a backup", backup.name)
    return backup
