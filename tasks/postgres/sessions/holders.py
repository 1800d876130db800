"""Who keeps dead rows from being removed, and on whom a rebuild would wait.

A row is removed when no snapshot can see it any more: an open transaction, a prepared one, a replication slot or a
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
_SLOT = "start its consumer; if that is gone for good: SELECT pg_drop_replication_slot('{name}')"
_REMEDIES: Mapping[Kind, str] = {
    "transaction": "end it: SELECT pg_terminate_backend({name}) (its client loses what is not committed)",
    "autovacuum": "it ends by itself; where that takes too long, give its table a higher autovacuum_vacuum_cost_limit",
    "prepared transaction": "ask its transaction manager, then COMMIT PREPARED or ROLLBACK PREPARED '{name}', "
    "in its database: nobody else ends it",
    "replication slot": _SLOT,
    "replication slot (catalog)": _SLOT,
    "standby": "end the long query on standby {name}, or switch hot_standby_feedback off there",
}


@dataclass(frozen=True)
class Holder:
    """One of them. `name` is a process, gid, slot or standby; `database` is empty for what belongs to none; `seconds`
    is NaN where nobody knows since when; `xids` is how far back it holds xmin, −1 where it does not. `idle`: it does
    nothing by itself (nobody reads the slot)."""

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
        """Whether dead rows stay because of it."""
        return self.xids >= 0

    @property
    def is_slot(self) -> bool:
        """Of rows or of the system catalogues only."""
        return self.kind in ("replication slot", "replication slot (catalog)")

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return _REMEDIES[self.kind].format(name=self.name.replace("'", "''"))

    @property
    def text(self) -> str:
        """One line."""
        name = f"of process {self.name}" if self.kind in ("transaction", "autovacuum") else self.name
        since = "" if math.isnan(self.seconds) else f", {duration(self.seconds)} old"
        held = f", holds xmin {self.xids:,} transactions back" if self.holds_xmin else ""
        return f"{self.kind} {name} ({self.who}){since}{held}"


@probe
def find_holders(postgres: Postgres) -> tuple[Holder, ...]:
    """All of them on the server, what holds xmin back furthest first; vacuums and this session are none.

    Raises:
        Unreachable: it is down.
    """
    with upkeep_session(postgres) as connection:
        rows = execute(connection, _HOLDERS)
    return tuple(
        Holder(kind, name, database, who, math.nan if seconds is None else float(seconds), int(xids), idle, builds)
        for kind, name, database, who, seconds, xids, idle, builds in rows
    )


# PostgreSQL itself passes vacuums over. A slot's catalog_xmin holds rows of the system catalogues only.
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
