"""The objects of a database with their owners and a role's privileges, to compare two databases.

Only names, owners and privileges are read; nothing is locked.
https://www.postgresql.org/docs/current/functions-info.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blocks.postgres.server import Postgres, execute
from runbook.kinds import probe
from tasks.postgres.content.pinned_session import pinned

OWN = "own"


@dataclass(frozen=True)
class ContentRelation:
    """A table, view, sequence, function or type. `rights`: the role's privileges, and `own` if it can alter it."""

    kind: str
    schema: str
    name: str
    owner: str
    rights: frozenset[str]

    @property
    def key(self) -> str:
        """`table public.users`."""
        return f"{self.kind} {self.schema}.{self.name}"


@probe
def read_relations(postgres: Postgres, database: str, role: str) -> Mapping[str, ContentRelation]:
    """Relations by key, without extensions' objects and the tables that restore-tables keeps."""
    with pinned(postgres, database) as connection:
        rows = execute(connection, _RELATIONS, role)
    found = (
        ContentRelation(kind, schema, name, owner, frozenset(rights)) for kind, schema, name, owner, rights in rows
    )
    return {relation.key: relation for relation in found}


def missing(live: Mapping[str, ContentRelation], copy: Mapping[str, ContentRelation]) -> tuple[str, ...]:
    """The live relations that the copy lacks."""
    return tuple(key for key in live if key not in copy)


@dataclass(frozen=True)
class RelationPart:
    """A part of a table or view: a column, a constraint, an index, a trigger, a policy …"""

    kind: str
    schema: str
    relation: str
    name: str

    @property
    def key(self) -> str:
        """`index public.users: users_name`."""
        return f"{self.kind} {self.schema}.{self.relation}" + (f": {self.name}" if self.name else "")


@probe
def read_parts(postgres: Postgres, database: str) -> tuple[RelationPart, ...]:
    """The parts of tables and views, which a dump without post-data or of an older state lacks.

    Parts that partitions inherit from their parents are left out.
    """
    with pinned(postgres, database) as connection:
        return tuple(RelationPart(*map(str, row)) for row in execute(connection, _PARTS))


def missing_parts(live: Sequence[RelationPart], copy: Sequence[RelationPart]) -> tuple[str, ...]:
    """The parts of live tables and views that the copy's of the same name lack."""
    there, known = set(copy), {(part.schema, part.relation) for part in copy}
    return tuple(part.key for part in live if part not in there and (part.schema, part.relation) in known)


def lost_rights(live: Mapping[str, ContentRelation], copy: Mapping[str, ContentRelation]) -> tuple[str, ...]:
    """The role's rights in the live database that it lacks in the copy: `table public.users: SELECT, own`."""
    lost = {key: relation.rights - copy[key].rights for key, relation in live.items() if key in copy}
    return tuple(f"{key}: {', '.join(sorted(rights))}" for key, rights in lost.items() if rights)


def unreadable(copy: Mapping[str, ContentRelation]) -> tuple[str, ...]:
    """The tables that the role cannot read."""
    return tuple(f"{key}: SELECT" for key, one in copy.items() if one.kind == "table" and "SELECT" not in one.rights)


def other_owners(live: Mapping[str, ContentRelation], copy: Mapping[str, ContentRelation]) -> tuple[str, ...]:
    """Relations with another owner in the copy: `table public.users: postgres instead of app_user`."""
    pairs = ((key, live[key].owner, copy[key].owner) for key in live if key in copy)
    return tuple(f"{key}: {found} instead of {owner}" for key, owner, found in pairs if owner != found)


_RELATIONS = """
WITH role AS (SELECT (SELECT oid FROM pg_catalog.pg_roles WHERE rolname = %s) AS oid),
     spaces AS (SELECT n.oid, n.nspname::text AS name,
                       coalesce(has_schema_privilege(role.oid, n.oid, 'USAGE'), false) AS usable
                FROM pg_catalog.pg_namespace n, role
                WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'),
     extended AS (SELECT classid, objid FROM pg_catalog.pg_depend WHERE deptype = 'e'),
     named AS (
    SELECT CASE c.relkind WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' WHEN 'S' THEN 'sequence'
                          WHEN 'f' THEN 'foreign table' WHEN 'c' THEN 'type' ELSE 'table' END AS kind,
           n.name AS schema, c.relname::text AS name, c.relowner AS owner,
           ARRAY(SELECT p FROM unnest(CASE c.relkind WHEN 'S' THEN ARRAY['USAGE', 'SELECT', 'UPDATE'] WHEN 'c' THEN '{}'
                                      ELSE ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE'] END) p
                 WHERE n.usable AND CASE WHEN c.relkind = 'S' THEN has_sequence_privilege(role.oid, c.oid, p)
                                         ELSE has_table_privilege(role.oid, c.oid, p) END) AS rights
    FROM pg_catalog.pg_class c JOIN spaces n ON n.oid = c.relnamespace, role
    WHERE c.relkind IN ('r', 'p', 'f', 'v', 'm', 'S', 'c') AND c.relpersistence <> 't'
      AND c.relname !~ '_old_[0-9]{8}_[0-9]{6}$'
      AND NOT EXISTS (SELECT FROM extended e WHERE e.classid = 'pg_catalog.pg_class'::regclass AND e.objid = c.oid)
    UNION ALL
    SELECT 'function', n.name, p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')', p.proowner,
           ARRAY(SELECT 'EXECUTE' WHERE n.usable AND has_function_privilege(role.oid, p.oid, 'EXECUTE'))
    FROM pg_catalog.pg_proc p JOIN spaces n ON n.oid = p.pronamespace, role
    WHERE NOT EXISTS (SELECT FROM extended e WHERE e.classid = 'pg_catalog.pg_proc'::regclass AND e.objid = p.oid)
    UNION ALL
    SELECT 'type', n.name, t.typname::text, t.typowner, '{}'
    FROM pg_catalog.pg_type t JOIN spaces n ON n.oid = t.typnamespace
    WHERE t.typtype IN ('e', 'd')
      AND NOT EXISTS (SELECT FROM extended e WHERE e.classid = 'pg_catalog.pg_type'::regclass AND e.objid = t.oid))
SELECT kind, schema, name, pg_get_userbyid(owner)::text,
       rights || ARRAY(SELECT 'own' FROM role WHERE pg_has_role(role.oid, owner, 'USAGE'))
FROM named ORDER BY kind <> 'table', kind, schema, name
"""
_PARTS = r"""
WITH tables AS (
    SELECT c.oid, n.nspname::text AS schema, c.relname::text AS relation, c.relkind, c.relrowsecurity
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.relpersistence <> 't'
      AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND c.relname !~ '_old_[0-9]{8}_[0-9]{6}$'
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                      WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')),
     columns AS (
    SELECT t.*, a.attname::text AS name, a.attnum, a.attnotnull, a.attidentity, a.atthasdef
    FROM tables t JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped)
SELECT 'column', schema, relation, name FROM columns
UNION ALL SELECT 'NOT NULL', schema, relation, name FROM columns WHERE attnotnull AND relkind IN ('r', 'p')
UNION ALL SELECT 'default', schema, relation, name FROM columns WHERE atthasdef
UNION ALL SELECT 'identity', schema, relation, name FROM columns WHERE attidentity <> ''
UNION ALL
SELECT CASE c.contype WHEN 'p' THEN 'primary key' WHEN 'f' THEN 'foreign key' ELSE 'constraint' END,
       t.schema, t.relation, c.conname::text
FROM tables t JOIN pg_catalog.pg_constraint c ON c.conrelid = t.oid
WHERE c.contype IN ('p', 'u', 'f', 'c', 'x') AND c.conislocal AND c.conparentid = 0
UNION ALL
SELECT 'index', t.schema, t.relation, i.relname::text
FROM tables t JOIN pg_catalog.pg_index x ON x.indrelid = t.oid AND x.indisvalid
JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_inherits h WHERE h.inhrelid = i.oid)
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_constraint c WHERE c.conindid = i.oid AND c.conrelid = t.oid)
UNION ALL
SELECT 'trigger', t.schema, t.relation, g.tgname::text
FROM tables t JOIN pg_catalog.pg_trigger g ON g.tgrelid = t.oid AND NOT g.tgisinternal AND g.tgparentid = 0
UNION ALL
SELECT 'policy', t.schema, t.relation, p.polname::text FROM tables t JOIN pg_catalog.pg_policy p ON p.polrelid = t.oid
UNION ALL SELECT 'row level security', schema, relation, '' FROM tables WHERE relrowsecurity
UNION ALL
SELECT 'rule', t.schema, t.relation, r.rulename::text
FROM tables t JOIN pg_catalog.pg_rewrite r ON r.ev_class = t.oid AND r.rulename <> '_RETURN'
"""
