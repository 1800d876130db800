"""The application's indexes: size, use, bloat, duplicates, invalid ones.

https://www.postgresql.org/docs/current/monitoring-stats.html, …/sql-reindex.html
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from psycopg.rows import TupleRow

from blocks.postgres.server import Connection, Postgres, execute
from runbook.kinds import probe
from tasks.postgres.upkeep.session import upkeep_session

# The suffixes of REINDEX CONCURRENTLY for the new and the replaced index; with a number if the name is taken.
TRANSIENT = re.compile(r"_cc(new|old)\d*$")


@dataclass(frozen=True)
class Index:
    """An index. `estimated_bytes`: size of a fresh one, −1 if unknown. `nulls_alike`: unique, with NULLS NOT DISTINCT.

    `building`: a session builds an index of its table now, so an invalid one may be that one.
    """

    oid: int
    name: str
    schema: str
    relation: str
    table: str
    table_schema: str
    table_relation: str
    method: str
    bytes: int
    estimated_bytes: int
    scans: int
    last_scan: str
    tuples_read: int
    tuples_fetched: int
    primary: bool
    unique: bool
    nulls_alike: bool
    exclusion: bool
    identity: bool
    partition: bool
    valid: bool
    building: bool
    constraint: str
    same_as: str
    definition: str
    tablespace: str

    @property
    def is_needed_unused(self) -> bool:
        """Whether it is needed without scans, or can only be dropped with a constraint or a parent."""
        return self.primary or self.unique or self.identity or self.partition or bool(self.constraint)

    @property
    def refuses(self) -> int:
        """The strength of its uniqueness: a stronger one includes a weaker one."""
        return self.unique + self.nulls_alike

    @property
    def is_transient(self) -> bool:
        """Whether it is the second index of a running or failed REINDEX CONCURRENTLY."""
        return not self.valid and bool(TRANSIENT.search(self.relation))

    @property
    def is_leftover(self) -> bool:
        """Whether it is the leftover of a failed REINDEX CONCURRENTLY."""
        return self.is_transient and not self.building

    @property
    def is_broken(self) -> bool:
        """Whether it is invalid and no session is building it."""
        return not self.valid and not self.building

    @property
    def bloat_ratio(self) -> float:
        """The estimated share that a rebuild would free; 0 if unknown."""
        return max(0.0, 1 - self.estimated_bytes / self.bytes) if self.estimated_bytes > 0 and self.bytes else 0.0


@dataclass(frozen=True)
class IndexStatistics:
    """The start of the scan counters (the latest possible), its age, and the number of standbys with own counters."""

    since: str
    seconds: float
    standbys: int


@probe
def read_indexes(postgres: Postgres) -> tuple[Index, ...]:
    """Every index of the application's tables, and invalid ones of TOAST tables, largest first."""
    with upkeep_session(postgres) as connection:
        return read(connection)


def read(connection: Connection) -> tuple[Index, ...]:
    """`read_indexes` in an open session."""
    knows_last_scan = connection.info.server_version >= LAST_SCAN_VERSION
    rows = execute(connection, _INDEXES_16 if knows_last_scan else _INDEXES)
    return tuple(map(_index, rows))


def _index(row: TupleRow) -> Index:
    oid, name, schema, relation, table, method, size, estimate, scans, last_scan, fetched, flags, *texts = row
    primary, unique, nulls_alike, exclusion, identity, partition, valid, building = map(bool, flags)
    constraint, same_as, definition, tablespace = map(str, texts)
    return Index(
        int(oid),
        name,
        schema,
        relation,
        table[0],
        table[1],
        table[2],
        method,
        int(size),
        int(estimate),
        int(scans),
        last_scan,
        int(fetched[0]),
        int(fetched[1]),
        primary,
        unique,
        nulls_alike,
        exclusion,
        identity,
        partition,
        valid,
        building,
        constraint,
        same_as,
        definition,
        tablespace,
    )


LAST_SCAN_VERSION = 160_000

# Tables (OIDs) with a running index build. A REINDEX of a whole table shows one index at a time, and holds the lock on
# its TOAST table meanwhile.
BUILDS = """
SELECT relid FROM pg_stat_progress_create_index WHERE datname = current_database()
UNION
SELECT l.relation FROM pg_stat_progress_create_index p JOIN pg_locks l USING (pid)
WHERE p.datname = current_database() AND l.granted AND l.mode = 'ShareUpdateExclusiveLock' AND l.relation IS NOT NULL
"""
# A fresh B-tree: an entry has an 8-byte header, columns aligned to 8, and a 4-byte pointer; pages are 90 % full with
# 40 bytes of overhead; one page is metadata. Deduplication only makes it smaller.
_INDEXES = """
WITH builds AS MATERIALIZED (BUILDS)
SELECT i.indexrelid, format('%I.%I', n.nspname, x.relname), n.nspname, x.relname,
       ARRAY[format('%I.%I', tn.nspname, t.relname), tn.nspname, t.relname], m.amname,
       coalesce(pg_relation_size(x.oid), 0) AS size,
       CASE WHEN m.amname = 'btree' AND i.indpred IS NULL AND x.reltuples >= 0 AND w.known THEN
           (ceil(x.reltuples * (12 + ceil(w.bytes / 8) * 8) / ((b.page - 40) * 0.9)) + 1) * b.page ELSE -1 END,
       coalesce(s.idx_scan, 0), 'not recorded', ARRAY[coalesce(s.idx_tup_read, 0), coalesce(s.idx_tup_fetch, 0)],
       ARRAY[i.indisprimary, i.indisunique,
             i.indisunique AND coalesce((to_jsonb(i) ->> 'indnullsnotdistinct')::boolean, false),
             i.indisexclusion, i.indisreplident,
             EXISTS (SELECT FROM pg_inherits h WHERE h.inhrelid = x.oid),
             i.indisvalid AND i.indisready AND i.indislive, i.indrelid IN (SELECT relid FROM builds)],
       coalesce(c.conname, ''),
       CASE WHEN i.indisvalid THEN concat_ws('/', i.indrelid, x.relam, i.indkey, i.indnkeyatts, i.indclass,
           i.indcollation, i.indoption, pg_get_expr(i.indexprs, i.indrelid), '|', pg_get_expr(i.indpred, i.indrelid),
           '|', (SELECT array_agg(o.attoptions::text ORDER BY o.attnum) FROM pg_attribute o WHERE o.attrelid = x.oid
                 HAVING count(o.attoptions) > 0))
            ELSE '' END,
       pg_get_indexdef(i.indexrelid), coalesce(pg_tablespace_location(nullif(x.reltablespace, 0)), '')
FROM pg_index i
     JOIN pg_class x ON x.oid = i.indexrelid AND x.relkind = 'i' JOIN pg_namespace n ON n.oid = x.relnamespace
     JOIN pg_class t ON t.oid = i.indrelid AND t.relpersistence <> 't' JOIN pg_namespace tn ON tn.oid = t.relnamespace
     JOIN pg_am m ON m.oid = x.relam
     LEFT JOIN pg_stat_all_indexes s ON s.indexrelid = x.oid
     LEFT JOIN LATERAL (SELECT min(conname::text) AS conname FROM pg_constraint
                        WHERE conindid = x.oid AND contype IN ('p', 'u', 'x')) AS c ON true
     CROSS JOIN (SELECT current_setting('block_size')::int AS page) AS b
     CROSS JOIN LATERAL (
         SELECT count(*) = count(st.avg_width) AS known, sum(st.avg_width * (1 - st.null_frac)) AS bytes
         FROM generate_series(1, i.indnatts) AS k
              JOIN pg_attribute ia ON ia.attrelid = x.oid AND ia.attnum = k
              LEFT JOIN pg_attribute ta ON ta.attrelid = t.oid AND ta.attnum = nullif(i.indkey[k - 1], 0)
              LEFT JOIN pg_stats st ON NOT st.inherited AND st.schemaname = tn.nspname
                  AND st.tablename = CASE WHEN i.indkey[k - 1] = 0 THEN x.relname ELSE t.relname END
                  AND st.attname = CASE WHEN i.indkey[k - 1] = 0 THEN ia.attname ELSE ta.attname END) AS w
WHERE tn.nspname NOT IN ('pg_catalog', 'information_schema') AND (tn.nspname <> 'pg_toast' OR NOT i.indisvalid)
ORDER BY size DESC, 2
""".replace("BUILDS", BUILDS)
_INDEXES_16 = _INDEXES.replace("'not recorded'", "coalesce(to_char(s.last_idx_scan, 'YYYY-MM-DD'), 'never')")


@probe
def read_statistics(postgres: Postgres) -> IndexStatistics:
    """The start of the scan counters. A crash resets them; the server's own counters show it."""
    with upkeep_session(postgres) as connection:
        since, seconds, standbys = execute(connection, _STATISTICS)[0]
        return IndexStatistics(str(since), float(seconds), int(standbys))


_STATISTICS = """
SELECT to_char(since, 'YYYY-MM-DD HH24:MI'), extract(epoch FROM clock_timestamp() - since),
       (SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND application_name <> 'pg_receivewal')
FROM (SELECT greatest((SELECT stats_reset FROM pg_stat_database WHERE datname = current_database()),
                      (SELECT stats_reset FROM pg_stat_bgwriter)) AS since) AS s
"""


def find_duplicates(indexes: Iterable[Index]) -> list[tuple[Index, Index]]:
    """Pairs of (index to keep, redundant index): same columns, order, operators with parameters, expressions and
    condition, and no stronger uniqueness."""
    groups: dict[str, list[Index]] = {}
    for index in indexes:
        if index.same_as:
            groups.setdefault(index.same_as, []).append(index)
    found = []
    for group in groups.values():
        best, *others = sorted(group, key=_worth)
        found += [(best, other) for other in others if best.refuses >= other.refuses and not _must_stay(other)]
    return found


def _worth(index: Index) -> tuple[int, ...]:
    """Sort key, the most needed first: a constraint's or replica identity's index, then the strongest uniqueness."""
    return (not index.primary, not index.constraint, not index.identity, not index.partition, -index.refuses)


def _must_stay(index: Index) -> bool:
    return index.primary or bool(index.constraint) or index.identity or index.partition
