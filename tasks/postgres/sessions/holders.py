"""Transactions, slots and standbys that hold dead rows back, and that a rebuild would wait for.

Vacuum removes a row when no snapshot can see it any more. An open or prepared transaction, a replication slot or a
standby's feedback holds that horizon (xmin) back for every table of its database.
https://www.postgresql.org/docs/current/routine-vacuuming.html
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from blocks.postgres.server import Postgres, execute
from runbook.kinds import probe
from runbook.units import duration
from tasks.postgres.upkeep.session import upkeep_session

Kind = Literal[
    "transaction", "autovacuum", "prepared transaction", "replication slot", "replication slot (catalog)", "standby"
]
_SLOT = "start its consumer; if it no longer exists: SELECT pg_drop_replication_slot('{name}')"
_REMEDIES: Mapping[Kind, str] = {
    "transaction": "end it: SELECT pg_terminate_backend({name}) (its client loses uncommitted writes)",
    "autovacuum": "wait for its end; if it takes too long, give its table a higher autovacuum_vacuum_cost_limit",
    "prepared transaction": "check with its transaction manager, then COMMIT PREPARED or ROLLBACK PREPARED '{name}' in "
    "its database: it never ends by itself",
    "replication slot": _SLOT,
    "replication slot (catalog)": _SLOT,
    "standby": "end the long query on standby {name}, or switch hot_standby_feedback off there",
}


@dataclass(frozen=True)
class XminHolder:
    """One holder. `name`: process, gid, slot or standby; `database`: empty if it belongs to none; `seconds`: NaN if
    unknown; `xids`: how far back it holds xmin, −1 if it does not. `idle`: inactive (a slot without a reader)."""

    kind: Kind
    name: str
    database: str
    who: str
    seconds: float
    xids: int
    idle: bool
    builds_index: bool = False

    @property
    def holds_xmin(self) -> bool:
        """Whether it holds dead rows back."""
        return self.xids >= 0

    @property
    def is_slot(self) -> bool:
        """Whether it is a slot, of rows or of the system catalogs only."""
        return self.kind in ("replication slot", "replication slot (catalog)")

    @property
    def remedy(self) -> str:
        """The way to end it."""
        return _REMEDIES[self.kind].format(name=self.name.replace("'", "''"))

    @property
    def text(self) -> str:
        """The holder in one line."""
        name = f"of process {self.name}" if self.kind in ("transaction", "autovacuum") else self.name
        since = "" if math.isnan(self.seconds) else f", {duration(self.seconds)} old"
        held = f", holds xmin {self.xids:,} transactions back" if self.holds_xmin else ""
        return f"{self.kind} {name} ({self.who}){since}{held}"


@probe
def find_holders(postgres: Postgres) -> tuple[XminHolder, ...]:
    """All holders on the server except vacuums and this session, the furthest back first.

    Raises:
        Unreachable: it is down.
    """
    with upkeep_session(postgres) as connection:
        rows = execute(connection, _HOLDERS)
    return tuple(
        XminHolder(kind, name, database, who, math.nan if seconds is None else float(seconds), int(xids), idle, builds)
        for kind, name, database, who, seconds, xids, idle, builds in rows
    )


# PostgreSQL ignores vacuums too. A slot's catalog_xmin holds rows of the system catalogs only.
_HOLDERS = """
SELECT * FROM (
    SELECT CASE a.backend_type WHEN 'autovacuum worker' THEN 'autovacuum' ELSE 'transaction' END, a.pid::text,
           coalesce(a.datname, ''),
           concat_ws(' ', coalesce(a.usename, a.backend_type), nullif(a.application_name, ''), a.state),
           extract(epoch FROM clock_timestamp() - a.xact_start),
           coalesce(greatest(age(a.backend_xmin), age(a.backend_xid)), -1) AS xids,
           coalesce(a.state LIKE 'idle%', false),
           EXISTS (SELECT FROM pg_stat_progress_create_index b WHERE b.pid = a.pid)
    FROM pg_stat_activity a
    WHERE (a.xact_start IS NOT NULL OR a.backend_xmin IS NOT NULL OR a.backend_xid IS NOT NULL)
      AND a.pid <> pg_backend_pid() AND a.backend_type NOT IN ('walsender', 'parallel worker')
      AND NOT EXISTS (SELECT FROM pg_stat_progress_vacuum v WHERE v.pid = a.pid)
    UNION ALL
    SELECT 'prepared transaction', gid, database, 'of ' || owner, extract(epoch FROM clock_timestamp() - prepared),
           age(transaction), true, false
    FROM pg_prepared_xacts
    UNION ALL
    SELECT 'replication slot', slot_name, '', CASE WHEN active THEN 'in use' ELSE 'nobody reads it' END, NULL,
           age(xmin), NOT active, false
    FROM pg_replication_slots WHERE xmin IS NOT NULL
    UNION ALL
    SELECT 'replication slot (catalog)', slot_name, coalesce(database, ''),
           CASE WHEN active THEN 'in use' ELSE 'nobody reads it' END, NULL, age(catalog_xmin), NOT active, false
    FROM pg_replication_slots WHERE catalog_xmin IS NOT NULL
    UNION ALL
    SELECT 'standby', coalesce(nullif(application_name, ''), host(client_addr), pid::text), '', 'hot_standby_feedback',
           NULL, age(backend_xmin), false, false
    FROM pg_stat_replication WHERE backend_xmin IS NOT NULL
) AS holder ORDER BY xids DESC
"""
