"""What PostgreSQL stored of a definition: whole catalogue rows, so that a property which a later version adds is
compared too. Left out are identities (OIDs, files, the version that 17.12 notes of each column as pg_attver) and parse
trees; the server prints these.
"""

RELATION = """
SELECT jsonb_build_object(
    'relation', to_jsonb(c) - '{oid,reltype,relfilenode,reltoastrelid,relfrozenxid,relminmxid,relpartbound}'::text[],
    'bound', pg_get_expr(c.relpartbound, c.oid),
    'partitions by', pg_get_partkeydef(c.oid),
    'toast', (SELECT to_jsonb(t.reloptions) FROM pg_class t WHERE t.oid = c.reltoastrelid),
    'foreign', (SELECT to_jsonb(f) - 'ftrelid' FROM pg_foreign_table f WHERE f.ftrelid = c.oid),
    'parents', ARRAY(SELECT to_jsonb(i) - 'inhrelid' FROM pg_inherits i WHERE i.inhrelid = c.oid ORDER BY i.inhseqno),
    'columns', ARRAY(SELECT to_jsonb(a) - '{attrelid,attoptions}'::text[]
        || jsonb_build_object('options', ARRAY(SELECT o FROM unnest(a.attoptions) o
            WHERE NOT starts_with(o, 'pg_attver=') ORDER BY o))
        FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 ORDER BY a.attnum),
    'defaults', ARRAY(SELECT jsonb_build_object(d.adnum::text, pg_get_expr(d.adbin, d.adrelid)) FROM pg_attrdef d
        WHERE d.adrelid = c.oid ORDER BY d.adnum),
    'constraints', ARRAY(SELECT to_jsonb(k) - '{oid,conrelid,conindid,conbin}'::text[]
        || jsonb_build_object('definition', pg_get_constraintdef(k.oid)) FROM pg_constraint k
        WHERE k.conrelid = c.oid ORDER BY k.conname),
    'indexes', ARRAY(SELECT to_jsonb(i) - '{indexrelid,indrelid,indexprs,indpred}'::text[]
        || jsonb_build_object('definition', pg_get_indexdef(i.indexrelid), 'options', x.reloptions) FROM pg_index i
        JOIN pg_class x ON x.oid = i.indexrelid WHERE i.indrelid = c.oid ORDER BY x.relname),
    'triggers', ARRAY(SELECT to_jsonb(t) - '{oid,tgrelid,tgqual,tgconstraint}'::text[]
        || jsonb_build_object('definition', pg_get_triggerdef(t.oid)) FROM pg_trigger t
        WHERE t.tgrelid = c.oid AND NOT t.tgisinternal ORDER BY t.tgname),
    'rules', ARRAY(SELECT to_jsonb(r) - '{oid,ev_class,ev_qual,ev_action}'::text[]
        || jsonb_build_object('definition', pg_get_ruledef(r.oid)) FROM pg_rewrite r
        WHERE r.ev_class = c.oid ORDER BY r.rulename),
    'policies', ARRAY(SELECT to_jsonb(p) - '{oid,polrelid,polqual,polwithcheck}'::text[]
        || jsonb_build_object('using', pg_get_expr(p.polqual, c.oid), 'check', pg_get_expr(p.polwithcheck, c.oid))
        FROM pg_policy p WHERE p.polrelid = c.oid ORDER BY p.polname),
    'statistics', ARRAY(SELECT to_jsonb(s) - '{oid,stxrelid,stxexprs}'::text[]
        || jsonb_build_object('definition', pg_get_statisticsobjdef(s.oid)) FROM pg_statistic_ext s
        WHERE s.stxrelid = c.oid ORDER BY s.stxname),
    'publications', ARRAY(SELECT to_jsonb(p) - '{oid,prrelid,prqual}'::text[]
        || jsonb_build_object('where', pg_get_expr(p.prqual, c.oid)) FROM pg_publication_rel p
        WHERE p.prrelid = c.oid ORDER BY p.prpubid))
FROM pg_class c WHERE c.oid = %s::regclass
"""
DOMAIN = """
SELECT to_jsonb(t) - '{oid,typarray,typdefaultbin}'::text[],
       pg_get_expr(t.typdefaultbin, 0),
       ARRAY(SELECT to_jsonb(k) - '{oid,contypid,conbin}'::text[]
             || jsonb_build_object('definition', pg_get_constraintdef(k.oid)) FROM pg_constraint k
             WHERE k.contypid = t.oid ORDER BY k.conname)
FROM pg_type t WHERE t.oid = %s::regtype
"""
# All of that name: a text with other arguments makes one more.
FUNCTIONS = """
SELECT to_jsonb(p) - '{oid,prosqlbody,proargdefaults}'::text[],
       pg_get_expr(p.proargdefaults, 0), pg_get_function_sqlbody(p.oid)
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE ARRAY[n.nspname, p.proname]::text[] = parse_ident(%s) ORDER BY p.oid
"""
