"""Whether two texts of one definition are equivalent: PostgreSQL creates both and prints how it parsed them.

A restored database prints some definitions differently from its source: `CHECK (s BETWEEN 0 AND 100 AND w > 0)` loses
a pair of parentheses, `-1::int` becomes `'-1'::integer`, the cast of an array moves to its elements. Both texts are
parsed to the same tree, so the server decides: each text is created in the copy, in a transaction that is rolled back,
and its catalog rows are compared. Expressions are compared as the server prints them, everything else as it is stored.

Safety of the created statements:
- one statement of a known kind, by the extended protocol, which refuses a second one;
- under its own name, after the copy's object was moved to another schema in the same transaction;
- on an empty clone of its table, so no row is read and no index is built from rows;
- with the copy's event triggers disabled.

https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-CATALOG
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psycopg
from psycopg import sql
from psycopg.types.json import set_json_loads

from blocks.postgres.server import Connection, Postgres, execute, first_line
from runbook.kinds import probe
from tasks.postgres.content.pinned_session import LOCK_SECONDS, PINNED, read_names
from tasks.postgres.content.quiet import copy_options, disable_event_triggers
from tasks.postgres.upkeep.session import refusals, set_known

ASIDE = "interview-ops aside"
STATEMENT_SECONDS = 60
_SETTINGS = {
    **PINNED,
    "statement_timeout": f"{STATEMENT_SECONDS}s",
    "check_function_bodies": "off",
    "transform_null_equals": "off",
    "standard_conforming_strings": "on",
    "quote_all_identifiers": "off",
    "client_min_messages": "error",
}
_NAME = r'(?:"(?:[^"]|"")+"|[\w$]+)'
_FULL = rf"{_NAME}\.{_NAME}"
_ON_TABLE = rf"ALTER (?:FOREIGN )?TABLE (?:ONLY )?(?P<relation>{_FULL})\s+"
# Constants only: the server evaluates a bound when the partition is attached.
_BOUND = r"(?>'[^']*'|[-\d., ()]|(?:FOR|VALUES|FROM|TO|IN|WITH|DEFAULT|NULL|true|false|M\w+VALUE|modulus|remainder)\b)+"
# The start (and, where it matters, the end) of pg_dump's statement for each kind of object with an expression.
_HEADS = {
    "TABLE": rf"CREATE (?:UNLOGGED )?TABLE (?P<new>{_FULL})\s.*",
    "FOREIGN TABLE": rf"CREATE FOREIGN TABLE (?P<new>{_FULL})\s.*",
    "VIEW": rf"CREATE VIEW (?P<new>{_FULL})\s.*",
    "MATERIALIZED VIEW": rf"CREATE MATERIALIZED VIEW (?P<new>{_FULL})\s.*\sWITH NO DATA;",
    "DEFAULT": rf"{_ON_TABLE}ALTER COLUMN {_NAME} SET DEFAULT\s.*",
    "CHECK CONSTRAINT": rf"(?:{_ON_TABLE}|ALTER DOMAIN (?P<domain>{_FULL})\s+)ADD CONSTRAINT {_NAME} CHECK\s.*",
    "CONSTRAINT": rf"{_ON_TABLE}ADD CONSTRAINT {_NAME} (?:EXCLUDE|UNIQUE|PRIMARY KEY)\s.*",
    "INDEX": rf"CREATE (?:UNIQUE )?INDEX {_NAME} ON (?:ONLY )?(?P<relation>{_FULL})\s.*",
    "RULE": rf"CREATE (?:RULE {_NAME} AS\s+ON \w+ TO|OR REPLACE VIEW) (?P<relation>{_FULL})\s.*",
    "TRIGGER": rf"CREATE (?:CONSTRAINT )?TRIGGER {_NAME} .*? ON (?P<relation>{_FULL})\s.*",
    "POLICY": rf"CREATE POLICY {_NAME} ON (?P<relation>{_FULL})\s.*",
    "STATISTICS": rf"CREATE STATISTICS (?P<statistics>{_FULL}) .* FROM (?P<relation>{_FULL});",
    "PUBLICATION TABLE": rf"ALTER PUBLICATION {_NAME} ADD TABLE (?:ONLY )?(?P<relation>{_FULL})\b.*",
    "TABLE ATTACH": rf"ALTER TABLE ONLY (?P<parent>{_FULL}) ATTACH PARTITION (?P<relation>{_FULL}) {_BOUND};",
    "DOMAIN": rf"CREATE DOMAIN (?P<newdomain>{_FULL}) AS\s.*",
    "FUNCTION": rf"CREATE FUNCTION (?P<function>{_FULL})\(.*",
    "PROCEDURE": rf"CREATE PROCEDURE (?P<function>{_FULL})\(.*",
}
_PATTERNS = {kind: re.compile(head, re.DOTALL) for kind, head in _HEADS.items()}
_QUOTED = r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|\$(?P<tag>(?:[^\W\d]\w*)?)\$.*?\$(?P=tag)\$"
_TOKEN = re.compile(_QUOTED + r"|[();]", re.DOTALL)
# These would run code when the statement is executed: a query, a computed bound, another language. A comment could hide
# them.
_RUNS = re.compile(r"--|/\*|\bPARTITION\s+OF\b|^CREATE [A-Z ]*TABLE\b.*\bAS\b", re.DOTALL | re.IGNORECASE)
_LANGUAGE = re.compile(r"\bLANGUAGE\b\s*(\w*)", re.IGNORECASE)
_LANGUAGES = {"sql", "plpgsql"}


Name = tuple[str, str]
Subject = Mapping[str, Name]


@dataclass(frozen=True)
class JudgedDefinition:
    """The names of definitions that differ in text only; for others, why they could not be created."""

    equal: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)


class _Undecided(Exception):
    """The server cannot compare two texts; the reason is the message."""


@probe
def compare_definitions(
    postgres: Postgres, database: str, expected: Mapping[str, str], actual: Mapping[str, str]
) -> JudgedDefinition:
    """The definitions of a private copy that differ from the expected ones in text only. Nothing is changed there.

    Without a difference in text no session is opened. A pair of texts takes some milliseconds, independent of the
    number of rows.

    Raises:
        OpsError: another session holds a lock in the copy.
    """
    pairs = {key: (text, actual[key]) for key, text in expected.items() if actual.get(key, text) != text}
    equal, refused = set[str](), dict[str, str]()
    if not pairs:
        return JudgedDefinition()
    with rolled_back(postgres, database) as connection:
        for key, (wanted, found) in pairs.items():
            try:
                if _same(connection, key, wanted, found):
                    equal.add(key)
            except _Undecided as error:
                refused[key] = str(error)
    return JudgedDefinition(frozenset(equal), refused)


@contextmanager
def rolled_back(postgres: Postgres, database: str) -> Iterator[Connection]:
    """A transaction to create objects for a comparison: without event triggers, with a timeout for each statement, and
    always rolled back. Existing objects can be moved to the schema `ASIDE`."""
    with postgres.connect(database, options=copy_options(postgres)) as connection:
        set_known(connection, _SETTINGS)
        if read_names(connection) != "utf-8":
            set_json_loads(lambda value: value, connection)  # only compared: psycopg would decode it as UTF-8
        with refusals(connection, LOCK_SECONDS), connection.transaction(force_rollback=True):
            execute(connection, "SET TRANSACTION READ WRITE")
            disable_event_triggers(connection)
            execute(connection, sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(ASIDE)))
            yield connection


def _same(connection: Connection, key: str, expected: str, actual: str) -> bool:
    """Whether both texts create the same object.

    The statements after the first (owner, statistics targets) are compared literally, in any order: they follow the
    columns' order, which a restored child table changes.

    Raises:
        _Undecided: the server cannot create one of them.
    """
    if key.startswith("DEFAULT ACL "):
        return _spelled(expected) == _spelled(actual)
    (wanted, *more), (found, *others) = _statements(expected), _statements(actual)
    if key.startswith("ACL "):
        return sorted([wanted, *more]) == sorted([found, *others])
    named, subject = _subject(key, wanted), _subject(key, found)
    if sorted(more) != sorted(others) or (wanted != found and (subject is None or named != subject)):
        return False
    if wanted == found or subject is None:
        return True
    try:
        return _alike(connection, subject, wanted, found, heir=False)
    except _Undecided as error:
        if "relation" not in subject:
            raise
        with suppress(_Undecided):
            return _alike(connection, subject, wanted, found, heir=True)
        raise error from None


def _alike(connection: Connection, subject: Subject, wanted: str, found: str, *, heir: bool) -> bool:
    with connection.transaction(force_rollback=True):
        _set_aside(connection, subject, heir)
        there = _created(connection, subject, found, "the copy's text")
        return _created(connection, subject, wanted, "the backup's text") == there
    raise AssertionError


def _statements(text: str) -> list[str]:
    first, rest = _split(text)
    found = [first]
    while rest.strip():
        statement, rest = _split(rest.lstrip("\n"))
        found.append(statement)
    return found


def _split(text: str) -> tuple[str, str]:
    """The first statement and the rest. A rule's commands are in parentheses; a function's body has statements too, but
    two empty lines follow its end."""
    depth, routine = 0, text.startswith(("CREATE FUNCTION ", "CREATE PROCEDURE "))
    for token in _TOKEN.finditer(text):
        depth += (token[0] == "(") - (token[0] == ")")
        after = text[token.end() : token.end() + 3]
        if token[0] == ";" and depth == 0 and (after in ("", "\n", "\n\n\n") or (after[0] == "\n" and not routine)):
            return text[: token.end()], _spelled(text[token.end() :])
    return text, ""


def _spelled(statements: str) -> str:
    """Normalise to the form of later pg_dump versions: 15 writes ALTER TABLE for owners of views and sequences, and
    doubles a blank."""
    statements = re.sub(
        r"^ALTER (?:TABLE|VIEW|MATERIALIZED VIEW|SEQUENCE)( .+ OWNER TO )", r"ALTER\1", statements, flags=re.MULTILINE
    )
    return re.sub(r"( ON [A-Z]+)  TO ", r"\1 TO ", statements)


def _subject(key: str, statement: str) -> Subject | None:
    """The names in a statement of its key's kind; None if it is not such a statement."""
    kind = next((kind for kind in sorted(_PATTERNS, key=len, reverse=True) if key.startswith(f"{kind} ")), "")
    match = _PATTERNS[kind].fullmatch(statement) if kind else None
    outline = _outline(statement)
    if match is None or _RUNS.search(outline):
        return None
    found = {name: _unquoted(text) for name, text in match.groupdict().items() if text}
    languages = {name.lower() for name in _LANGUAGE.findall(outline)}
    return found if "function" not in found or (languages and languages <= _LANGUAGES) else None


def _outline(statement: str) -> str:
    """The text outside quotes and parentheses, with all comments."""
    found, depth, at = list[str](), 0, 0
    for token in _TOKEN.finditer(statement):
        between = statement[at : token.start()]
        found.append(between if depth == 0 or "--" in between or "/*" in between else " ")
        depth += (token[0] == "(") - (token[0] == ")")
        at = token.end()
    return " ".join((*found, statement[at:]))


def _unquoted(printed: str) -> Name:
    """Schema and name from PostgreSQL's quoted form."""
    schema, name = re.findall(_NAME, printed)
    return tuple(part[1:-1].replace('""', '"') if part[0] == '"' else part for part in (schema, name))


def _set_aside(connection: Connection, subject: Subject, heir: bool) -> None:
    """Free the name that the texts create, or replace the table that they change by an empty clone.

    Raises:
        _Undecided: the server refuses.
    """
    changed = [subject[name] for name in ("parent", "relation") if name in subject]
    with _deciding(connection, "an empty clone"):
        for name in (*changed, *([subject["new"]] if "new" in subject else [])):
            _move_relation(connection, name)
        if domain := subject.get("newdomain") or subject.get("domain"):
            execute(
                connection,
                sql.SQL("ALTER DOMAIN {} SET SCHEMA {}").format(sql.Identifier(*domain), sql.Identifier(ASIDE)),
            )
        if statistics := subject.get("statistics"):
            move = sql.SQL("ALTER STATISTICS {} SET SCHEMA {}")
            execute(connection, move.format(sql.Identifier(*statistics), sql.Identifier(ASIDE)))
        for name in changed:
            _clone(connection, name, heir)
        if domain := subject.get("domain"):
            (base,) = execute(connection, _BASE, _text(connection, (ASIDE, domain[1])))[0]
            execute(connection, sql.SQL("CREATE DOMAIN {} AS {}").format(sql.Identifier(*domain), sql.SQL(base)))


def _move_relation(connection: Connection, name: Name) -> None:
    """Move a relation to `ASIDE`, without the sequences that it owns: defaults refer to them by name."""
    for schema, sequence in execute(connection, _OWNED, _text(connection, name)):
        execute(connection, sql.SQL("ALTER SEQUENCE {} OWNED BY NONE").format(sql.Identifier(schema, sequence)))
    execute(connection, sql.SQL("ALTER TABLE {} SET SCHEMA {}").format(sql.Identifier(*name), sql.Identifier(ASIDE)))


def _clone(connection: Connection, name: Name, heir: bool) -> None:
    """Create an empty table (or a view) with the same columns instead of the moved one.

    `heir`: as its inheritance child, so that a function with its row type accepts the clone's rows.
    """
    clone, original = sql.Identifier(*name), sql.Identifier(ASIDE, name[1])
    kind, key = execute(connection, _KIND, original.as_string(connection))[0]
    if kind == "v":
        execute(connection, sql.SQL("CREATE VIEW {} AS SELECT * FROM {}").format(clone, original))
    elif heir:
        for (constraint,) in execute(connection, _CHECKS, original.as_string(connection)):
            drop = sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}")
            execute(connection, drop.format(original, sql.Identifier(constraint)))
        execute(connection, sql.SQL("CREATE TABLE {} () INHERITS ({})").format(clone, original))
    else:
        by = sql.SQL(" PARTITION BY {}").format(sql.SQL(key)) if key else sql.SQL("")
        execute(connection, sql.SQL("CREATE TABLE {} (LIKE {}){}").format(clone, original, by))


def _text(connection: Connection, name: Name) -> str:
    """The quoted name, for a parameter of type regclass or regtype."""
    return sql.Identifier(*name).as_string(connection)


def _created(connection: Connection, subject: Subject, statement: str, whose: str) -> object:
    """Create the object, describe it, and roll it back."""
    if "function" in subject:
        statement = statement.replace("CREATE ", "CREATE OR REPLACE ", 1)
    with _deciding(connection, whose), connection.transaction(force_rollback=True):
        # Binary results use the extended protocol, which refuses a text of several statements.
        connection.execute(statement.encode(connection.info.encoding, "replace"), binary=True)
        return _describe(connection, subject)
    raise AssertionError


def _describe(connection: Connection, subject: Subject) -> object:
    if function := subject.get("function"):
        return execute(connection, FUNCTIONS, _text(connection, function))
    if domain := subject.get("newdomain") or subject.get("domain"):
        return execute(connection, DOMAIN, _text(connection, domain))
    return execute(connection, RELATION, _text(connection, subject.get("new") or subject["relation"]))


@contextmanager
def _deciding(connection: Connection, whose: str) -> Iterator[None]:
    try:
        yield
    except psycopg.errors.LockNotAvailable:
        raise
    except psycopg.Error as error:
        if connection.broken:
            raise
        raise _Undecided(f"PostgreSQL cannot create {whose}: {first_line(error)}") from None


_OWNED = """
SELECT n.nspname, s.relname FROM pg_depend d JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S'
JOIN pg_namespace n ON n.oid = s.relnamespace
WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = %s::regclass
  AND d.deptype = 'a'
"""
_KIND = "SELECT relkind::text, pg_get_partkeydef(oid) FROM pg_class WHERE oid = %s::regclass"
_CHECKS = "SELECT conname FROM pg_constraint WHERE conrelid = %s::regclass AND contype = 'c' AND coninhcount = 0"
_BASE = "SELECT format_type(typbasetype, typtypmod) FROM pg_type WHERE oid = %s::regtype"

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
# All of that name: a text with other arguments creates another one.
FUNCTIONS = """
SELECT to_jsonb(p) - '{oid,prosqlbody,proargdefaults}'::text[],
       pg_get_expr(p.proargdefaults, 0), pg_get_function_sqlbody(p.oid)
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE ARRAY[n.nspname, p.proname]::text[] = parse_ident(%s) ORDER BY p.oid
"""
