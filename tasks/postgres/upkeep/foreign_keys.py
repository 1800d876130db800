"""Foreign keys without an index on the referencing columns."""

from __future__ import annotations

from dataclasses import dataclass

from blocks.postgres.server import Postgres, execute
from runbook.kinds import probe
from tasks.postgres.upkeep.session import upkeep_session


@dataclass(frozen=True)
class ForeignKey:
    """A foreign key without an index: each deletion in the referenced table reads this whole table."""

    table: str
    constraint: str
    referenced: str
    rows: int
    bytes: int
    create: str


@probe
def find_missing(postgres: Postgres) -> tuple[ForeignKey, ...]:
    """Foreign keys without an index, largest table first."""
    with upkeep_session(postgres) as connection:
        return tuple(
            ForeignKey(table, constraint, referenced, int(rows), int(size), create)
            for table, constraint, referenced, rows, size, create in execute(connection, _MISSING)
        )


# An index helps if its first columns are the key's, in any order. On a partitioned table it cannot be created
# concurrently.
_MISSING = """
SELECT format('%I.%I', n.nspname, t.relname), c.conname, c.confrelid::regclass::text, greatest(t.reltuples, 0),
       CASE WHEN t.relkind = 'p' THEN (SELECT coalesce(sum(pg_table_size(relid)), 0) FROM pg_partition_tree(t.oid))
            ELSE coalesce(pg_table_size(t.oid), 0) END,
       format('CREATE INDEX%s ON %I.%I (%s)', CASE WHEN t.relkind = 'p' THEN '' ELSE ' CONCURRENTLY' END,
              n.nspname, t.relname,
              (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY k.n)
               FROM unnest(c.conkey) WITH ORDINALITY AS k(attnum, n)
                    JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.attnum))
FROM pg_constraint c JOIN pg_class t ON t.oid = c.conrelid JOIN pg_namespace n ON n.oid = t.relnamespace
WHERE c.contype = 'f' AND c.conparentid = 0 AND NOT EXISTS (
    SELECT FROM pg_index i
    WHERE i.indrelid = c.conrelid AND i.indisvalid AND i.indpred IS NULL AND i.indnkeyatts >= cardinality(c.conkey)
      AND c.conkey <@ (string_to_array(i.indkey::text, ' ')::smallint[])[1:cardinality(c.conkey)])
ORDER BY 5 DESC, 1, 2
"""
