"""What the content manifest asks of the catalogues. https://www.postgresql.org/docs/current/catalogs.html"""

EXTENSIONS = "SELECT extname, extversion FROM pg_extension"
LSN = "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END::text"

# Leaves of a hash-partitioned table are summed together: pg_dump restores enum keys through the root, where they may
# land in other leaves. Tables of an extension are the extension's own.
# Columns go by name: a restored child of an inheritance may have its parent's before its own.
TABLES = """
SELECT n.nspname, c.relname, ARRAY(
    SELECT ARRAY[a.attname::text, CASE WHEN a.atttypid IN ('text'::regtype, 'varchar'::regtype) THEN 'text' END]
    FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attname),
  pg_table_size(c.oid), coalesce((
    SELECT format('%I.%I', rn.nspname, r.relname) FROM pg_partition_ancestors(c.oid) WITH ORDINALITY a(relid, depth)
    JOIN pg_partitioned_table p ON p.partrelid = a.relid AND p.partstrat = 'h'
    JOIN pg_class r ON r.oid = a.relid JOIN pg_namespace rn ON rn.oid = r.relnamespace
    ORDER BY a.depth DESC LIMIT 1), format('%I.%I', n.nspname, c.relname))
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
  AND NOT EXISTS (
    SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
ORDER BY pg_table_size(c.oid) DESC
"""

POPULATED = """
SELECT format('%I.%I', n.nspname, c.relname), c.relispopulated
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'm' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
"""

NOT_COMPARED = """
SELECT 'rows of foreign table ' || format('%I.%I', n.nspname, c.relname)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'f' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
UNION ALL
SELECT 'rows of materialised view ' || format('%I.%I', n.nspname, c.relname) || ' (the restore refreshes it)'
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'm' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
UNION ALL
SELECT 'rows of table ' || format('%I.%I', n.nspname, c.relname) || ' (belongs to an extension)'
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
WHERE c.relkind = 'r' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
UNION ALL SELECT 'user mapping on server ' || srvname FROM pg_user_mappings
UNION ALL SELECT 'subscription ' || subname || ' (a copy has it disabled and without a slot)'
FROM pg_subscription WHERE subdbid = (SELECT oid FROM pg_database WHERE datname = current_database())
"""

SEQUENCES = """
SELECT n.nspname, c.relname, format('%I.%I', n.nspname, c.relname)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
"""

ROLES = """
SELECT rolname FROM pg_shdepend d JOIN pg_roles r ON r.oid = d.refobjid
WHERE d.refclassid = 'pg_authid'::regclass AND (
    d.dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
    OR d.classid = 'pg_database'::regclass
       AND d.objid = (SELECT oid FROM pg_database WHERE datname = current_database()))
UNION SELECT pg_get_userbyid(relowner) FROM pg_class
UNION SELECT pg_get_userbyid(nspowner) FROM pg_namespace
"""
