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
        part, longer = execute(connection, _NEXT, offset, PART_BYTES, offset, PART_BYTES, longer)[0]
        total, offset = total + part, offset + PART_BYTES
    return int(count), int(total)


def rights(connection: Connection) -> tuple[int, int]:
    """How many there are, and the sum of the hashes of their owners, privileges, comments and security labels."""
    count, total = execute(connection, _RIGHTS)[0]
    return int(count), int(total)


# One part at a time is in memory.
_FIRST = """
SELECT count(*), coalesce(sum(hashtextextended(oid::text || ':' || md5(part), 0)::numeric), 0),
       array_agg(oid) FILTER (WHERE length(part) = %s)
FROM (SELECT oid, lo_get(oid, 0, %s) AS part FROM pg_largeobject_metadata OFFSET 0) AS parts
"""
_NEXT = """
SELECT coalesce(sum(hashtextextended(oid::text || ':' || %s::bigint || ':' || md5(part), 0)::numeric), 0),
       array_agg(oid) FILTER (WHERE length(part) = %s)
FROM (SELECT oid, lo_get(oid, %s, %s) AS part FROM unnest(%s::oid[]) AS oid OFFSET 0) AS parts
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
