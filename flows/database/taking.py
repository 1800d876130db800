"""What taking a backup of the database consists of, called with the open report."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

from blocks.environment import Environment
from flows.store import judge_key
from runbook.errors import OpsError
from runbook.render import duration, size
from runbook.report import Report, Status
from tasks import publishing
from tasks.catalogue import Backup
from tasks.host import read_disk
from tasks.manifest import Kind, Manifest, sums_of
from tasks.postgres.chosen import choose_tables
from tasks.postgres.dump import FULL, Dumped, Form, What, dump_database, dump_globals
from tasks.postgres.server import Server, judge_programs, read_database_bytes
from tasks.postgres.snapshot import read_lock_room
from tasks.stores.store import Store

# pg_dump's directory format is smaller than the database in all but strange cases (no indexes, compressed); so is its
# text, without the indexes. Encrypting writes each file once more, two at a time.
SPACE_RATIO = 0.8
# Beyond it other sessions leave too little; the dump itself refuses where there is too little.
LOCK_RATIO = 0.8
KIND_OF: dict[Form, Kind] = {
    "full": "postgres",
    "schema": "schema",
    "tables": "tables",
    "sql": "sql",
    "sql.gz": "sql",
}


def judge_wanted(env: Environment, form: Form, tables: Sequence[str]) -> What:
    """What a form asks for.

    Raises:
        OpsError: it is no such kind, or tables are named for another kind than `tables`; a table is not there.
    """
    if form not in KIND_OF:
        raise OpsError(f"kind is “{form}”", f"choose one of {', '.join(KIND_OF)}")
    if form != "tables" and tables:
        raise OpsError(f"tables are named for a backup of the kind {form}", "choose the kind tables, or name none")
    if form != "tables":
        return What(form)
    chosen = choose_tables(env.postgres, tables)
    return What(form, chosen.names, chosen.others)


def judge_source(report: Report, env: Environment, server: Server) -> None:
    """What must hold of a server whose content is to be trusted."""
    judge_programs(env.postgres, server)
    locks = read_lock_room(env.postgres, env.postgres.database)
    report.expect("locks for a dump", locks.tables <= LOCK_RATIO * locks.locks, locks.remedy,
                  value=f"{locks.tables:,} tables, each of which a dump locks",
                  expected=f"at most {LOCK_RATIO:.0%} of the server's table of locks: {locks.text}",
                  otherwise=Status.WARN)  # fmt: skip
    report.expect(
        "rights of the login",
        server.superuser,
        f"give {env.postgres.admin_user} BYPASSRLS: row security hides rows from a dump without an error",
        value=env.postgres.admin_user,
        expected="superuser or BYPASSRLS",
    )
    if not server.checksums:
        report.warn("data checksums", "switch them on (pg_checksums): a manifest certifies corruption too", value="off")
    if not server.fsync:
        report.warn("fsync", "switch it on: a power cut loses data that was acknowledged", value="off", expected="on")


def judge_room(report: Report, env: Environment, store: Store) -> None:
    """Free space where the backup is made."""
    needed = int(read_database_bytes(env.postgres, env.postgres.database) * SPACE_RATIO)
    disk = read_disk(store.spool)
    report.expect(
        "free space in the store",
        disk.free_bytes > needed,
        f"free {size(needed - disk.free_bytes)} at {store.spool}, or give the store more space",
        value=size(disk.free_bytes),
        expected=f"more than {size(needed)}",
    )


def take(
    report: Report, env: Environment, server: Server, store: Store, jobs: int, what: What = FULL, *,
    kind: Kind | None = None, tool: str = "",
) -> Backup:  # fmt: skip
    """Dump, read the manifest in the same snapshot, seal, put into the store. Of another database than the
    application's: its own `kind`, and the `tool` that wrote that."""
    started = time.monotonic()
    kind = kind or KIND_OF[what.form]
    name, directory = publishing.begin(store, kind, env.name, env.zone)
    dump_globals(env.postgres, directory)
    dumped = dump_database(env.postgres, directory, jobs, what)
    manifest = Manifest(
        kind=kind,
        name=name,
        environment=env.name,
        taken=dumped.taken,
        seconds=time.monotonic() - started,
        host=socket.gethostname(),
        tool=", ".join(filter(None, [f"pg_dump {server.text}", tool])),
        files=sums_of(directory),
        content=dumped.content.model_dump(mode="json"),
    )
    backup = publishing.publish(store, directory, manifest)
    _tell(report, dumped, backup)
    return backup


def _tell(report: Report, dumped: Dumped, backup: Backup) -> None:
    content, manifest = dumped.content, backup.manifest
    report.fact("store", backup.store.where)
    report.fact("snapshot", f"{manifest.taken:%Y-%m-%d %H:%M:%S UTC} (LSN {content.lsn})")
    report.fact("size", f"{size(manifest.bytes)} of a database of {size(content.bytes)}, {dumped.compression}")
    report.fact("encrypted", f"to {len(manifest.recipients)} keys" if manifest.recipients else "no")
    report.fact("rows", f"{content.rows:,} in {len(content.tables)} tables")
    report.fact("Alembic revision", content.revision or "none")
    report.fact("dump", f"{duration(dumped.dump_seconds)} with {dumped.jobs} jobs")
    report.fact("manifest", f"{duration(dumped.manifest_seconds)}, beside the dump")
    judge_key(report, backup)
    report.expect(
        "sequences",
        not dumped.behind,
        "advance them with setval: the next insert would collide",
        value="; ".join(dumped.behind[:3]) or f"{len(content.sequences)} at or past their columns",
        expected="not behind their columns",
        otherwise=Status.WARN,
    )
    if content.uncomputable:
        ours = "the backup has their stored values, and our restores load them; pg_restore alone fails"
        if content.part != "full" or manifest.kind == "sql":
            ours = "a restore of this backup fails; one of the kind full has their stored values"
        hint = f"{ours}. To fix it, have the function name its tables with their schema, or SET search_path"
        named = "; ".join(f"{one.name}: {one.why}" for one in content.uncomputable)
        report.warn("generated columns that pg_dump cannot restore", hint, value=named)
    if content.volatile_checks:
        named = ", ".join(f"{schema}.{table}: {name}" for schema, table, name in content.volatile_checks)
        report.fact("CHECK constraints that a restore does not check (time, functions)", named)
    report.table(
        "Content",
        ("table", "rows", "size"),
        [(table, f"{found.rows:,}", size(found.bytes)) for table, found in content.tables.items()],
    )
    if content.not_compared:
        report.table("Not compared by a restore", ("what",), [(what,) for what in content.not_compared])
