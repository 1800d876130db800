"""Large objects: what is in them, and whose they are.

https://www.postgresql.org/docs/current/lo-funcs.html
"""

from __future__ import annotations

from blocks.postgres import Connection, execute

# The most that one value may have (src/include/utils/memutils.h, MaxAllocSize, without its header). A larger object is
# read in parts.
PART_BYTES = (1 << 30) - 5


def content(connection: Connection) -> tuple[int, int]:
    """How many there are, and the sum of the hashes of their parts."""
    count, total, longer = execute(connection, _FIRST, PART_BYTES, PART_BYTES)[0]
    offset = PART_BYTES
    while longer:
        beyond = offset + PART_BYTES
        part, longer = execute(connection, _NEXT, offset, offset, PART_BYTES, beyond, longer)[0]
        total, offset = total + part, beyond
    return int(count), int(total)


def rights(connection: Connection) -> tuple[int, int]:
    """How many there are, and the sum of the hashes of their owners, privileges, comments and security labels."""
    count, total = execute(connection, _RIGHTS)[0]
    return int(count), int(total)


_FIRST = """
SELECT count(*), coalesce(sum(hashtextextended(oid::text || ':' || md5(lo_get(oid, 0, %s)), 0)::numeric), 0),
       array_agg(oid) FILTER (WHERE length(lo_get(oid, %s, 1)) > 0)
FROM pg_largeobject_metadata
"""
_NEXT = """
SELECT sum(hashtextextended(oid::text || ':' || %s::bigint || ':' || md5(lo_get(oid, %s, %s)), 0)::numeric),
       array_agg(oid) FILTER (WHERE length(lo_get(oid, %s, 1)) > 0)
FROM unnest(%s::oid[]) AS oid
"""
_RIGHTS = """
SELECT count(*), coalesce(sum(hashtextextended(concat_ws(chr(10), oid, pg_get_userbyid(lomowner),
    (SELECT string_agg(format('%s %s %s', coalesce(r.rolname, 'PUBLIC'), a.privilege_type, a.is_grantable), ','
                       ORDER BY r.rolname COLLATE "C", a.privilege_type, a.is_grantable)
     FROM aclexplode(coalesce(lomacl, acldefault('L', lomowner))) a LEFT JOIN pg_roles r ON r.oid = a.grantee),
    coalesce(obj_description(oid, 'pg_largeobject'), ''),
    (SELECT string_agg(format('%s: %s', provider, label), ',' ORDER BY provider COLLATE "C") FROM pg_seclabel
     WHERE objoid = o.oid AND classoid = 'pg_largeobject'::regclass)), 0)::numeric), 0)
FROM pg_largeobject_metadata o
"""
