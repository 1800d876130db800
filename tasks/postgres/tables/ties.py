"""Objects that depend on a table's rows: keys, triggers, rules, publications, views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blocks.postgres.server import Connection, Postgres, execute
from runbook.kinds import probe
from tasks.postgres.content.pinned_session import pinned
from tasks.postgres.tables.find import FoundTable


@dataclass(frozen=True)
class TiedForeignKey:
    """A foreign key of a chosen table, in either direction. `columns`: (referencing, referenced, operator's schema,
    operator, collation's schema, collation); `outside`: the table at its other end, if that was not chosen."""

    name: str
    child: tuple[str, str, bool]
    parent: tuple[str, str, bool]
    columns: tuple[tuple[str, str, str, str, str, str], ...]
    full: bool
    validated: bool
    temporal: bool
    outside: str


@dataclass(frozen=True)
class Sequenced:
    """A sequence of a column."""

    schema: str
    name: str
    column: str
    table: tuple[str, str]
    ascending: bool


@dataclass(frozen=True)
class Ties:
    """All ties of the chosen tables. `refusals`: reasons to refuse the restore, as sentences."""

    refusals: tuple[str, ...]
    keys: tuple[TiedForeignKey, ...]
    sequences: tuple[Sequenced, ...]
    deferrable: tuple[tuple[str, str], ...]
    triggers: tuple[str, ...]
    materialised: tuple[str, ...]
    publications: tuple[str, ...]
    subscriptions: tuple[str, ...]
    publishes_new_tables: bool

    @property
    def pinned(self) -> tuple[object, ...]:
        """The ties that must be unchanged when the rows are replaced."""
        return (self.refusals, self.keys, self.sequences, self.deferrable)


@probe
def read_ties(postgres: Postgres, tables: Sequence[FoundTable]) -> Ties:
    """The ties of tables of the live database."""
    with pinned(postgres, postgres.database) as connection:
        return ties_of(connection, tables)


def ties_of(connection: Connection, tables: Sequence[FoundTable]) -> Ties:
    """`read_ties` in a session with an empty search path."""
    members = [int(row[0]) for row in execute(connection, _MEMBERS, [table.oid for table in tables])]
    refusals = [str(row[0]) for row in execute(connection, _REFUSALS, members)]
    chosen = set(members)
    keys = tuple(_key(row, chosen) for row in execute(connection, _KEYS, members, members))
    refusals += [f"{key.name} is a temporal foreign key, which cannot be checked here" for key in keys if key.temporal]
    sequences = tuple(
        Sequenced(str(schema), str(name), str(column), (str(of_schema), str(of)), bool(ascending))
        for schema, name, column, of_schema, of, ascending in execute(connection, _SEQUENCES, members)
    )
    materialised, publications, subscriptions, triggers = (
        tuple(str(row[0]) for row in execute(connection, query, members))
        for query in (_MATERIALISED, _PUBLICATIONS, _SUBSCRIPTIONS, _TRIGGERS)
    )
    return Ties(
        refusals=tuple(refusals),
        keys=keys,
        sequences=sequences,
        deferrable=tuple((str(a), str(b)) for a, b in execute(connection, _DEFERRABLE, members)),
        triggers=triggers,
        materialised=materialised,
        publications=publications,
        subscriptions=subscriptions,
        publishes_new_tables=bool(execute(connection, _PUBLISHES_NEW, [table.schema for table in tables])[0][0]),
    )


_MEMBERS = """
SELECT DISTINCT coalesce(t.relid::oid, chosen)::bigint
FROM unnest(%s::oid[]) AS chosen LEFT JOIN LATERAL pg_partition_tree(chosen::regclass) t ON true ORDER BY 1
"""
# With session_replication_role = replica ordinary triggers and those of foreign keys do not fire; these do.
_REFUSALS = """
WITH chosen AS (SELECT unnest(%s::oid[]) AS oid)
SELECT format('trigger %%I of %%s always fires: ENABLE TRIGGER it for the restore', tgname, tgrelid::regclass)
FROM pg_trigger JOIN chosen ON chosen.oid = tgrelid WHERE tgenabled IN ('A', 'R')
UNION ALL
SELECT format('rule %%I of %%s changes writes: DISABLE RULE or drop it first', rulename, ev_class::regclass)
FROM pg_rewrite JOIN chosen ON chosen.oid = ev_class WHERE ev_type <> '1' AND ev_enabled <> 'D'
UNION ALL
SELECT format('%%s inherits from %%s: restore both to another database and copy the rows by hand',
              inhrelid::regclass,
              inhparent::regclass)
FROM pg_inherits JOIN pg_class p ON p.oid = inhparent AND p.relkind = 'r'
WHERE inhrelid IN (TABLE chosen) OR inhparent IN (TABLE chosen)
UNION ALL
SELECT format('partition %%s is a foreign table: its rows are on another server', c.oid::regclass)
FROM pg_class c JOIN chosen ON chosen.oid = c.oid WHERE c.relkind = 'f'
UNION ALL
SELECT format('%%s is published with its deletions but has no replica identity: '
              'ALTER TABLE … REPLICA IDENTITY FULL', c.oid::regclass)
FROM pg_class c JOIN chosen ON chosen.oid = c.oid
WHERE c.relkind = 'r' AND c.relreplident <> 'f' AND NOT EXISTS (
    SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
        AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident END)
  AND EXISTS (
    SELECT FROM pg_publication_tables t JOIN pg_publication p ON p.pubname = t.pubname AND p.pubdelete
    JOIN pg_namespace n ON n.nspname = t.schemaname
    JOIN pg_class named ON named.relnamespace = n.oid AND named.relname = t.tablename
    WHERE named.oid = c.oid OR named.oid IN (SELECT relid FROM pg_partition_ancestors(c.oid)))
UNION ALL
SELECT DISTINCT format('prepared transaction %%s has locked rows of %%s: COMMIT PREPARED or ROLLBACK PREPARED it',
                       x.gid, chosen.oid::regclass)
FROM pg_prepared_xacts x JOIN pg_locks own ON own.transactionid = x.transaction AND own.pid IS NULL
JOIN pg_locks l ON l.virtualtransaction = own.virtualtransaction AND l.pid IS NULL
JOIN chosen ON chosen.oid = l.relation
WHERE x.database = current_database() AND l.mode <> 'AccessShareLock'
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
ORDER BY 1
"""
# Copies of a key on partitions have a parent; a key that is not enforced (18) guarantees nothing.
_KEYS = """
SELECT format('%%I on %%s', con.conname, con.conrelid::regclass),
       cn.nspname, c.relname, c.relkind = 'p', pn.nspname, p.relname, p.relkind = 'p',
       ARRAY(SELECT ARRAY[ca.attname::text, pa.attname::text, opn.nspname::text, op.oprname::text,
                          coalesce(con2.nspname::text, ''), coalesce(col.collname::text, '')]
             FROM unnest(con.conkey, con.confkey, con.conpfeqop) WITH ORDINALITY AS k(child, parent, operator, place)
             JOIN pg_attribute ca ON ca.attrelid = con.conrelid AND ca.attnum = k.child
             JOIN pg_attribute pa ON pa.attrelid = con.confrelid AND pa.attnum = k.parent
             JOIN pg_operator op ON op.oid = k.operator JOIN pg_namespace opn ON opn.oid = op.oprnamespace
             LEFT JOIN pg_collation col ON col.oid = pa.attcollation AND pa.attcollation <> ca.attcollation
             LEFT JOIN pg_namespace con2 ON con2.oid = col.collnamespace
             ORDER BY k.place),
       con.confmatchtype = 'f', con.convalidated, coalesce((to_jsonb(con) ->> 'conperiod')::boolean, false),
       con.conrelid::bigint, con.confrelid::bigint, con.conrelid::regclass::text, con.confrelid::regclass::text
FROM pg_constraint con
JOIN pg_class c ON c.oid = con.conrelid JOIN pg_namespace cn ON cn.oid = c.relnamespace
JOIN pg_class p ON p.oid = con.confrelid JOIN pg_namespace pn ON pn.oid = p.relnamespace
WHERE con.contype = 'f' AND con.conparentid = 0 AND coalesce((to_jsonb(con) ->> 'conenforced')::boolean, true)
  AND (con.conrelid = ANY (%s::oid[]) OR con.confrelid = ANY (%s::oid[]))
ORDER BY con.oid
"""
_SEQUENCES = """
SELECT sn.nspname, s.relname, a.attname, tn.nspname, t.relname, q.seqincrement > 0
FROM pg_depend d JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S' JOIN pg_namespace sn ON sn.oid = s.relnamespace
JOIN pg_sequence q ON q.seqrelid = s.oid AND NOT q.seqcycle
JOIN pg_class t ON t.oid = d.refobjid JOIN pg_namespace tn ON tn.oid = t.relnamespace
JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = d.refobjsubid
WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')
  AND t.oid = ANY (%s::oid[]) ORDER BY s.oid
"""
_DEFERRABLE = """
SELECT format('%%s %%s', t.relname, conname), pg_get_constraintdef(con.oid)
FROM pg_constraint con JOIN pg_class t ON t.oid = conrelid
WHERE conrelid = ANY (%s::oid[]) AND condeferrable AND contype IN ('p', 'u', 'x') ORDER BY con.oid
"""
_TRIGGERS = """
SELECT format('%%I of %%s', tgname, tgrelid::regclass) FROM pg_trigger
WHERE tgrelid = ANY (%s::oid[]) AND NOT tgisinternal AND tgparentid = 0 AND tgenabled = 'O' ORDER BY 1
"""
_MATERIALISED = """
WITH RECURSIVE above AS (
    SELECT unnest(%s::oid[]) AS oid
    UNION
    SELECT r.ev_class FROM above JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = above.oid
                                                 AND d.classid = 'pg_rewrite'::regclass
                      JOIN pg_rewrite r ON r.oid = d.objid)
SELECT c.oid::regclass::text FROM above JOIN pg_class c USING (oid) WHERE c.relkind = 'm' AND c.relispopulated
ORDER BY 1
"""
_PUBLICATIONS = """
SELECT DISTINCT p.pubname FROM pg_publication_tables p JOIN pg_namespace n ON n.nspname = p.schemaname
JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename WHERE c.oid = ANY (%s::oid[]) ORDER BY 1
"""
_SUBSCRIPTIONS = """
SELECT DISTINCT subname FROM pg_subscription_rel r JOIN pg_subscription s ON s.oid = r.srsubid
WHERE r.srrelid = ANY (%s::oid[]) ORDER BY 1
"""
_PUBLISHES_NEW = """
SELECT EXISTS (SELECT FROM pg_publication WHERE puballtables)
    OR EXISTS (SELECT FROM pg_publication_namespace p JOIN pg_namespace n ON n.oid = p.pnnspid
               WHERE n.nspname = ANY (%s::text[]))
"""


def _key(row: tuple[object, ...], chosen: set[int]) -> TiedForeignKey:
    name, cs, c, cp, ps, p, pp, columns, full, validated, temporal, child, parent, child_name, parent_name = row
    outside = next((str(other) for oid, other in ((child, child_name), (parent, parent_name)) if oid not in chosen), "")
    return TiedForeignKey(
        str(name),
        (str(cs), str(c), bool(cp)),
        (str(ps), str(p), bool(pp)),
        tuple(tuple(column) for column in columns),  # type: ignore[attr-defined]
        bool(full),
        bool(validated),
        bool(temporal),
        outside,
    )
