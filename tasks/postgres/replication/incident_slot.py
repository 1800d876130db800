"""A physical replication slot that keeps WAL on a primary without a WAL archive, for contain-incident."""

from __future__ import annotations

from blocks.postgres.server import Postgres, execute
from runbook.guard.permit import Act
from runbook.kinds import action
from tasks.postgres.replication.synchronous import address

SLOT = "ops_containment"
KEEP_WAL, LET_GO = "keep WAL on", "let go WAL on"


@action(of=lambda postgres: Act(KEEP_WAL, address(postgres)), idempotent=True)
def keep_wal(postgres: Postgres) -> str:
    """Create the slot; returns the LSN from which WAL is kept, within max_slot_wal_keep_size."""
    with postgres.connect() as connection:
        if not execute(connection, "SELECT FROM pg_replication_slots WHERE slot_name = %s", SLOT):
            execute(connection, "SELECT pg_create_physical_replication_slot(%s, true)", SLOT)
        rows = execute(connection, "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = %s", SLOT)
    return str(rows[0][0])


@action(of=lambda postgres: Act(LET_GO, address(postgres)), idempotent=True)
def drop_slot(postgres: Postgres) -> str:
    """Drop the slot, if it exists."""
    with postgres.connect() as connection:
        rows = execute(connection, _DROP, SLOT)
    return f"slot {SLOT} is dropped" if rows else "the slot did not exist any more"


_DROP = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s"
