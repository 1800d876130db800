"""Which tables have changed since a moment, by the server's counters and files: no table is read.

A write counts when its session has reported it, at the latest a second after its transaction ended. TRUNCATE and every
rewrite give a table another file. https://www.postgresql.org/docs/current/monitoring-stats.html
"""

from __future__ import annotations

from collections.abc import Mapping

from blocks.postgres.server import Postgres, execute
from runbook.kinds import probe

Table = tuple[str, str]
TableStates = Mapping[Table, str]
"""The state of each table by schema and name; a partitioned one with its partitions. Equal states: no change."""


@probe
def read_states(postgres: Postgres, database: str) -> TableStates:
    """The states now; empty where the server does not count writes (`track_counts`)."""
    with postgres.connect(database) as connection:
        if execute(connection, "SELECT current_setting('track_counts')")[0][0] != "on":
            return {}
        return {(str(schema), str(name)): str(state) for schema, name, state in execute(connection, _STATES)}


def changed(before: TableStates, after: TableStates) -> frozenset[Table]:
    """The tables that differ, are new, or are missing. A table without a state counts as changed."""
    return frozenset(table for table in {*before, *after} if before.get(table) != after.get(table))


_STATES = """
SELECT n.nspname, c.relname, string_agg(format('%s:%s:%s', m.oid, pg_relation_filenode(m.oid),
    pg_stat_get_tuples_inserted(m.oid) + pg_stat_get_tuples_updated(m.oid) + pg_stat_get_tuples_deleted(m.oid)),
    ' ' ORDER BY m.oid)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (SELECT c.oid UNION SELECT relid FROM pg_partition_tree(c.oid)
                    UNION SELECT inhrelid FROM pg_inherits WHERE inhparent = c.oid) AS m(oid)
WHERE c.relkind IN ('r', 'p') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' GROUP BY 1, 2
"""
