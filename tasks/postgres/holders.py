"""Who keeps vacuum from removing dead rows, and on whom a rebuild would wait.

A row is removed when no snapshot can see it any more: an open transaction, a prepared one, a replication slot or a
standby's feedback holds that horizon (xmin) back for every table of its database.
https://www.postgresql.org/docs/current/routine-vacuuming.html
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from blocks.postgres import Connection, Postgres, execute
from runbook.kinds import probe
from runbook.render import duration
from runbook.report import Report, Status
from tasks.postgres.upkeep import upkeep_session

LONG_SECONDS = 300
# Of a slot or a standby that is in use nobody knows since when: it counts where it is this many transactions behind.
FAR_BEHIND_XIDS = 1_000_000

Kind = Literal["transaction", "prepared transaction", "replication slot", "standby"]


@dataclass(frozen=True)
class Holder:
    """One of them. `seconds` is −1 where PostgreSQL does not tell; `xids` is how far back it holds xmin, −1 if not."""

    kind: Kind
    name: str
    who: str
    seconds: float
    xids: int
    hint: str
    builds_index: bool = False

    @property
    def holds_xmin(self) -> bool:
        """Whether dead rows stay because of it."""
        return self.xids >= 0

    @property
    def text(self) -> str:
        """One line."""
        since = f", {duration(self.seconds)} old" if self.seconds >= 0 else ""
        held = f", holds xmin {self.xids:,} transactions back" if self.holds_xmin else ""
        return f"{self.kind} {self.name} ({self.who}){since}{held}"


@probe
def find_holders(postgres: Postgres, longer_than_seconds: float = LONG_SECONDS) -> tuple[Holder, ...]:
    """Transactions of the application's database open for longer than that, and slots and standbys that lag."""
    with upkeep_session(postgres) as connection:
        return (
            *_transactions(connection, postgres.database, longer_than_seconds),
            *_prepared(connection, postgres.database, longer_than_seconds),
            *_slots(connection),
            *_standbys(connection),
        )


def _transactions(connection: Connection, database: str, longer_than_seconds: float) -> list[Holder]:
    rows = execute(connection, _TRANSACTIONS, database, longer_than_seconds)
    return [
        Holder(
            "transaction", f"of process {pid}", who, float(seconds), int(xids), f"{_END} {pid}: {_terminate(pid)}",
            bool(builds),
        )
        for pid, who, seconds, xids, builds in rows
    ]  # fmt: skip


_END = "ask its owner to end it, or end process"


def _terminate(pid: int) -> str:
    return f"SELECT pg_terminate_backend({pid})"


def _prepared(connection: Connection, database: str, longer_than_seconds: float) -> list[Holder]:
    rows = execute(connection, _PREPARED, database, longer_than_seconds)
    return [
        Holder("prepared transaction", gid, f"of {owner}", float(seconds), int(xids), f"{_RESOLVE} {literal}")
        for gid, owner, seconds, xids, literal in rows
    ]


_RESOLVE = "ask its transaction manager, then COMMIT PREPARED or ROLLBACK PREPARED"


def _slots(connection: Connection) -> list[Holder]:
    return [
        Holder(
            "replication slot", name, "in use" if active else "nobody reads it", -1, int(xids), f"{_SLOT}({literal})"
        )
        for name, active, xids, literal in execute(connection, _SLOTS, FAR_BEHIND_XIDS)
    ]


_SLOT = "start its reader; if that is gone for good: SELECT pg_drop_replication_slot"


def _standbys(connection: Connection) -> list[Holder]:
    hint = "end the long query on that standby, or switch its hot_standby_feedback off"
    rows = execute(connection, _STANDBYS, FAR_BEHIND_XIDS)
    return [Holder("standby", name, "hot_standby_feedback", -1, int(xids), hint) for name, xids in rows]


# Vacuum itself is passed over (PostgreSQL passes it over too), and so are a query's parallel workers.
_TRANSACTIONS = """
SELECT a.pid, concat_ws(' ', coalesce(a.usename, a.backend_type), nullif(a.application_name, ''), a.state),
       extract(epoch FROM clock_timestamp() - a.xact_start),
       CASE WHEN a.backend_xmin IS NULL AND a.backend_xid IS NULL THEN -1
            ELSE greatest(coalesce(age(a.backend_xmin), 0), coalesce(age(a.backend_xid), 0)) END,
       EXISTS (SELECT FROM pg_stat_progress_create_index b WHERE b.pid = a.pid)
FROM pg_stat_activity a
WHERE a.datname = %s AND a.pid <> pg_backend_pid() AND a.leader_pid IS NULL
  AND a.backend_type NOT IN ('walsender', 'autovacuum worker', 'parallel worker')
  AND NOT EXISTS (SELECT FROM pg_stat_progress_vacuum v WHERE v.pid = a.pid)
  AND a.xact_start <= clock_timestamp() - %s * interval '1 second'
ORDER BY a.xact_start
"""
_PREPARED = """
SELECT gid, owner, extract(epoch FROM clock_timestamp() - prepared), age(transaction), quote_literal(gid)
FROM pg_prepared_xacts WHERE database = %s AND prepared <= clock_timestamp() - %s * interval '1 second'
ORDER BY prepared
"""
# catalog_xmin holds the system catalogues only: no table of the application.
_SLOTS = """
SELECT slot_name, active, age(xmin), quote_literal(slot_name) FROM pg_replication_slots
WHERE xmin IS NOT NULL AND (NOT active OR age(xmin) >= %s) ORDER BY 3 DESC
"""
_STANDBYS = """
SELECT coalesce(nullif(application_name, ''), client_addr::text, pid::text), age(backend_xmin)
FROM pg_stat_replication WHERE age(backend_xmin) >= %s ORDER BY 2 DESC
"""


def judge_holders(report: Report, holders: tuple[Holder, ...], *, what: str, otherwise: Status = Status.WARN) -> None:
    """One finding for each, with how to end it; one that is well where there is none."""
    for holder in holders[:MOST_NAMED]:
        report.expect(what, False, holder.hint, value=holder.text, expected="none", otherwise=otherwise)
    if len(holders) > MOST_NAMED:
        report.expect(what, False, "end those first", value=f"{len(holders) - MOST_NAMED} more", otherwise=otherwise)
    if not holders:
        report.expect(what, True, "", value="none")


MOST_NAMED = 10
