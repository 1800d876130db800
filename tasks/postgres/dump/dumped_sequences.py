"""The sequences of a dump: the values that it will set, and whether their columns have larger numbers."""

from __future__ import annotations

import re
from pathlib import Path

from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute
from runbook import shell
from tasks.postgres.content.content import SequenceValue
from tasks.postgres.content.pinned_session import in_batches
from tasks.postgres.dump.printed import printed

_SETVAL = re.compile(r"setval\((E?'(?:[^']|'')*'), (-?\d+), (true|false)\)")


def dumped_sequences(postgres: Postgres, dump: Path, of_ascii: str = "utf-8") -> dict[str, SequenceValue]:
    """Every sequence's value in the dump: sequences ignore snapshots, so only the dump has it. `of_ascii`: the encoding
    of names in a SQL_ASCII database."""
    listed = shell.run([postgres.program("pg_restore"), "--list", dump]).stdout
    entries = [line for line in listed.splitlines() if " SEQUENCE SET " in line]
    if not entries:
        return {}
    chosen = dump.parent / ".sequences"
    chosen.write_text("\n".join(entries) + "\n", encoding="utf-8")
    try:
        argv: list[str | Path] = [postgres.program("pg_restore"), f"--use-list={chosen}", dump]
        setting = printed(postgres, argv, of_ascii=of_ascii)
    finally:
        chosen.unlink()
    return set_by(setting)


def set_by(statements: str) -> dict[str, SequenceValue]:
    """The values of a dump's `setval` statements."""
    return {
        _literal(name): SequenceValue(last=int(last), called=called == "true")
        for name, last, called in _SETVAL.findall(statements)
    }


def _literal(text: str) -> str:
    inner = text.removeprefix("E")[1:-1].replace("''", "'")
    return inner.replace("\\\\", "\\") if text.startswith("E") else inner


def spelled_by_server(connection: Connection, sequences: dict[str, SequenceValue]) -> dict[str, SequenceValue]:
    """The server's own spelling of each name."""
    found = {}
    for name, value in sequences.items():
        row = execute(
            connection,
            "SELECT format('%%I.%%I', n.nspname, c.relname) FROM pg_class c "
            "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%s)",
            name,
        )
        found[str(row[0][0]) if row else name] = value
    return found


def column_maxima(connection: Connection) -> dict[str, tuple[str, int]]:
    """The largest number in each sequence's column, in the snapshot: sequence → (column, number)."""
    found = {}
    for sequence, schema, table, column in in_batches(connection, execute(connection, _FED)):
        query = sql.SQL("SELECT max({}) FROM {}").format(sql.Identifier(column), sql.Identifier(schema, table))
        largest = execute(connection, query)[0][0]
        if isinstance(largest, int):
            found[str(sequence)] = (f"{schema}.{table}.{column}", largest)
    return found


# Ascending sequences of a column with an index: without one max() would read the whole table.
_FED = """
SELECT format('%I.%I', sn.nspname, s.relname), tn.nspname, t.relname, a.attname FROM pg_depend d
JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S' JOIN pg_namespace sn ON sn.oid = s.relnamespace
JOIN pg_sequence q ON q.seqrelid = s.oid AND q.seqincrement > 0 AND NOT q.seqcycle
JOIN pg_class t ON t.oid = d.refobjid AND t.relpersistence <> 't' JOIN pg_namespace tn ON tn.oid = t.relnamespace
JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = d.refobjsubid
WHERE d.classid = 'pg_class'::regclass AND d.deptype IN ('a', 'i') AND t.relkind IN ('r', 'p')
  AND EXISTS (SELECT FROM pg_index i WHERE i.indrelid = t.oid AND i.indkey[0] = a.attnum)
"""


def find_behind(sequences: dict[str, SequenceValue], maxima: dict[str, tuple[str, int]]) -> tuple[str, ...]:
    """Sequences whose column already has a larger number: their next value would be a duplicate."""
    return tuple(
        f"{sequence} is at {sequences[sequence].last}, {column} already has {largest}"
        for sequence, (column, largest) in maxima.items()
        if sequence in sequences and sequences[sequence].last < largest
    )
