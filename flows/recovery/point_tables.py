"""Chosen tables of a recovered copy put into the store as a backup, from which restore-tables brings them back."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from datetime import datetime

from blocks.environment import Environment
from flows.store import store_for
from runbook.permit import Act
from runbook.report import Report
from tasks import publishing
from tasks.catalogue import Backup
from tasks.cluster.instance import Instance
from tasks.manifest import Manifest, sums_of
from tasks.postgres.chosen import choose_tables
from tasks.postgres.dump import What, dump_database, dump_globals

COPY_BACK = "copy back"


def acts(tables: Sequence[str]) -> list[Act]:
    """What a permit is needed for; restore-tables asks for its own."""
    return [Act(COPY_BACK, name) for name in tables]


def plan(report: Report, tables: Sequence[str]) -> None:
    """The plan's lines."""
    report.plan("dump from the copy", f"{', '.join(tables)}, into the store as a backup of tables")
    report.plan("restore-tables", "from that backup: proven, foreign keys asked, the old rows kept", seconds=5)


def keep(report: Report, env: Environment, instance: Instance, tables: Sequence[str], at: datetime) -> Backup:
    """A dump of the copy's tables, with its manifest, in the environment's store: a backup as if it had been taken at
    the target's time."""
    started = time.monotonic()
    found = choose_tables(instance.postgres, tables)
    store = store_for(env, "tables")
    name, directory = publishing.begin(store, "tables", env.name, env.zone)
    dump_globals(instance.postgres, directory)
    dumped = dump_database(instance.postgres, directory, 1, What("tables", found.names, found.others))
    manifest = Manifest(
        kind="tables",
        name=name,
        environment=env.name,
        taken=at,
        seconds=time.monotonic() - started,
        host=socket.gethostname(),
        tool="pg_dump of a recovery to a point in time",
        files=sums_of(directory),
        content=dumped.content.model_dump(mode="json"),
    )
    backup = publishing.publish(store, directory, manifest)
    report.fact("tables at the target, as a backup", backup.name)
    return backup
