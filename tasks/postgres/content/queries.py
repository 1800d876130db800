"""The catalog queries of the content manifest. https://www.postgresql.org/docs/current/catalogs.html"""

EXTENSIONS = "SELECT extname, extversion FROM pg_extension"
LSN = "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END::text"

# The snapshot (not in recovery), the cluster and its timeline: with the LSN they say which commits a dump lacks.
ORIGIN = """
SELECT CASE WHEN pg_is_in_recovery() THEN '' ELSE pg_current_snapshot()::text END,
       (SELECT system_identifier FROM pg_control_system()),
       CASE WHEN pg_is_in_recovery() THEN 0
            ELSE ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int END
"""

# Leaves of a hash-partitioned table are summed together: pg_dump restores enum keys through the root, which can choose
# other leaves. Tables of an extension are left out. Columns are sorted by name: a restored inheritance child has its
# parent's columns first.
TABLES = """
SELECT n.nspname, c.relname, ARRAY(
    SELECT ARRAY[a.attname::text, CASE WHEN a.atttypid IN ('text'::regtype, 'varchar'::regtype) THEN 'text' END]
    FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attname),
  pg_table_size(c.oid), coalesce((
    SELECT format('%I.%I', rn.nspname, r.relname) FROM pg_partition_ancestors(c.oid) WITH ORDINALITY a(relid, depth)
    JOIN pg_partitioned_table p ON p.partrelid = a.relid AND p.partstrat = 'h'
    JOIN pg_class r ON r.oid = a.relid JOIN pg_namespace rn ON rn.oid = r.relnamespace
    ORDER BY a.depth DESC LIMIT 1), format('%I.%I', n.nspname, c.relname)),
  CASE am.amname WHEN 'heap' THEN (pg_relation_size(c.oid) / current_setting('block_size')::bigint)::int END
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_am am ON am.oid = c.relam
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

# Relations in another tablespace than the database's default.
TABLESPACES = """
SELECT format('%I.%I', n.nspname, c.relname), t.spcname
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_tablespace t ON t.oid = c.reltablespace
LEFT JOIN pg_index i ON i.indexrelid = c.oid
WHERE c.relkind IN ('r', 'p', 'm', 'i', 'I') AND c.relpersistence <> 't'
  AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass
                  AND d.objid = coalesce(i.indrelid, c.oid) AND d.deptype = 'e')
"""

ACCESS_METHODS = """
SELECT format('%I.%I', n.nspname, c.relname), a.amname
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_am a ON a.oid = c.relam
WHERE c.relkind IN ('r', 'p', 'm') AND a.amname <> 'heap' AND c.relpersistence <> 't'
  AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
  AND NOT EXISTS (
    SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
"""

# Filled materialised views that read a foreign table, also through other views.
REMOTE_VIEWS = """
WITH RECURSIVE remote(oid) AS (
    SELECT oid FROM pg_class WHERE relkind = 'f'
    UNION SELECT reader.oid FROM remote JOIN (
        SELECT d.refobjid AS source, r.ev_class AS oid FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid
        WHERE d.refclassid = 'pg_class'::regclass AND d.classid = 'pg_rewrite'::regclass
        UNION ALL SELECT inhrelid, inhparent FROM pg_inherits) reader ON reader.source = remote.oid)
SELECT n.nspname, c.relname FROM remote JOIN pg_class c ON c.oid = remote.oid
JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'm' AND c.relispopulated ORDER BY c.oid
"""

# CHECK constraints that valid rows can violate in a restore: the expression depends on the time, or on tables that a
# function finds by `search_path`, which is empty in a restore.
VOLATILE_CHECKS = r"""
SELECT n.nspname, c.relname, k.conname FROM pg_constraint k
JOIN pg_class c ON c.oid = k.conrelid AND c.relkind = 'r' AND c.relpersistence <> 't'
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE k.contype = 'c' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
  AND (k.conbin::text ~ '\{SQLVALUEFUNCTION ' OR EXISTS (
    SELECT FROM regexp_matches(k.conbin::text, ':(?:op)?funcid (\d+)', 'g') AS called
    JOIN pg_proc p ON p.oid = called[1]::oid JOIN pg_language l ON l.oid = p.prolang
    WHERE p.provolatile <> 'i' OR l.lanname NOT IN ('internal', 'c')))
ORDER BY 1, 2, 3
"""

# Stored generated columns whose function may find tables by `search_path`.
COMPUTED = r"""
SELECT n.nspname, c.relname, c.oid, a.attname, pg_get_expr(d.adbin, d.adrelid)
FROM pg_attribute a JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
JOIN pg_class c ON c.oid = a.attrelid AND c.relkind = 'r' AND c.relpersistence <> 't'
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE a.attgenerated = 's' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND EXISTS (
    SELECT FROM regexp_matches(d.adbin::text, ':(?:op)?funcid (\d+)', 'g') AS called
    JOIN pg_proc p ON p.oid = called[1]::oid JOIN pg_language l ON l.oid = p.prolang
    WHERE l.lanname NOT IN ('internal', 'c'))
ORDER BY 1, 2, a.attnum
"""

NOT_COMPARED = """
SELECT 'foreign table', format('%I.%I', n.nspname, c.relname)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'f' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
UNION ALL
SELECT 'materialised view', format('%I.%I', n.nspname, c.relname)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'm' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
UNION ALL
SELECT 'extension''s table', format('%I.%I', n.nspname, c.relname)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
WHERE c.relkind = 'r' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
UNION ALL SELECT 'user mapping', srvname FROM pg_user_mappings
UNION ALL SELECT 'security label', provider FROM pg_shseclabel
WHERE classoid = 'pg_database'::regclass
  AND objoid = (SELECT oid FROM pg_database WHERE datname = current_database())
UNION ALL SELECT 'collations', ''
WHERE EXISTS (SELECT FROM pg_collation WHERE collversion IS NOT NULL AND oid >= 16384)
   OR (SELECT datcollversion IS NOT NULL FROM pg_database WHERE datname = current_database())
UNION ALL SELECT 'subscription', subname
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
