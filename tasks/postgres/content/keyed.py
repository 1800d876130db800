"""Compare two databases' rows by primary key in bounded memory: each server sorts its keys, and only differing rows are
read completely."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute
from runbook.errors import VerificationFailed
from tasks.postgres.content.rowhash import row_hash
from tasks.postgres.tables.find import FoundTable, Known, known_in, table_of
from tasks.postgres.tables.pairs import settle_generated, unequal_columns

BATCH = 2000
FETCH = 500
REVISION = "alembic_version"
What = Literal["source only", "differs", "live only"]
Key = tuple[str, ...]
Row = tuple[str | None, ...]


@dataclass(frozen=True)
class Keyed:
    """A table of the source and the live one of its name, and the columns of their primary key, in its order."""

    source: FoundTable
    live: FoundTable
    key: tuple[str, ...]

    @property
    def written(self) -> list[str]:
        """The columns without generated ones, in the order of a completely read row."""
        return [column.name for column in self.live.columns if not column.generated]


@dataclass(frozen=True)
class Difference:
    """A key whose rows differ. `version`: the live row's xmin; `later`: the live row was written after the source was
    replaced, or that is unknown."""

    what: What
    key: Key
    version: str = ""
    later: bool = True


@dataclass(frozen=True)
class Matched:
    """The tables that can be compared, and those that cannot, each with the reason."""

    tables: tuple[Keyed, ...]
    others: tuple[tuple[str, str], ...]


def match_keyed(postgres: Postgres, source: Connection, live: Connection, chosen: Sequence[str]) -> Matched:
    """Every table of the source, or the chosen ones (quoted names), with the live one of its name on `postgres`."""
    known = {one.name: one for one in known_in(live)}
    tables, others = list[Keyed](), list[tuple[str, str]]()
    for one in known_in(source):
        if one.kind not in "rp" or one.root or (chosen and one.name not in chosen):
            continue
        if one.relation == REVISION and not chosen:
            others.append((one.name, "it has the schema's revision, not data"))
            continue
        found = _matched(postgres, source, live, one, known.get(one.name))
        if isinstance(found, str):
            others.append((one.name, found))
        else:
            tables.append(found)
    return Matched(tuple(tables), tuple(others))


def _matched(postgres: Postgres, source: Connection, live: Connection, one: Known, there: Known | None) -> Keyed | str:
    if there is None or there.kind not in "rp" or there.root:
        return "the live database has no such table"
    keys = [_key(connection, known.oid) for connection, known in ((source, one), (live, there))]
    if not all(keys):
        return "it has no primary key" if not keys[0] else "the live one has no primary key, or a deferrable one"
    if keys[0] != keys[1]:
        return f"its key is ({', '.join(keys[0])}), the live one's ({', '.join(keys[1])})"
    theirs = table_of(live, there)
    ours = settle_generated(postgres, live.info.dbname, theirs, table_of(source, one))
    if unequal := unequal_columns(ours, theirs):
        return "; ".join(unequal[:3])
    return Keyed(ours, theirs, keys[0])


def _key(connection: Connection, oid: int) -> tuple[str, ...]:
    return tuple(str(name) for (name,) in execute(connection, _KEY, oid))


_KEY = """
SELECT a.attname FROM pg_index i, unnest(i.indkey::smallint[]) WITH ORDINALITY AS k(attnum, place)
JOIN pg_attribute a ON a.attnum = k.attnum
WHERE i.indrelid = %s AND a.attrelid = i.indrelid AND i.indisprimary AND i.indimmediate AND k.place <= i.indnkeyatts
ORDER BY k.place
"""


def differences(source: Connection, live: Connection, keyed: Keyed, since: str) -> Iterator[Difference]:
    """Merge both tables, each in the order of its keys' texts. `since`: the transaction that replaced the source, empty
    if unknown.

    Raises:
        VerificationFailed: a server sorts keys in another order than this process, so they cannot be compared.
    """
    ours, theirs = _rows(source, keyed.source, keyed, "source", ""), _rows(live, keyed.live, keyed, "live", since)
    left, right = next(ours, None), next(theirs, None)
    while left or right:
        if right is None or (left is not None and left[0] < right[0]):
            assert left
            yield Difference("source only", left[0])
            left = next(ours, None)
        elif left is None or right[0] < left[0]:
            yield Difference("live only", right[0], right[2], right[3])
            right = next(theirs, None)
        else:
            if left[1] != right[1]:
                yield Difference("differs", right[0], right[2], right[3])
            left, right = next(ours, None), next(theirs, None)


def _rows(
    connection: Connection, table: FoundTable, keyed: Keyed, name: str, since: str
) -> Iterator[tuple[Key, int, str, bool]]:
    """Key, hash of the row, xmin, and whether that is newer than `since`."""
    columns = [(column.name, "text" if column.is_text else None) for column in table.columns]
    later = sql.SQL("age(xmin) < age({}::xid)").format(sql.Literal(since)) if since else sql.SQL("true")
    query = sql.SQL("SELECT {hash}, xmin::text, {later}, {keys} FROM {rows} ORDER BY {order}").format(
        hash=row_hash(columns),
        later=later,
        keys=sql.SQL(", ").join(text_of(column) for column in keyed.key),
        rows=table.rows_of,
        order=sql.SQL(", ").join(sql.SQL('{} COLLATE "C"').format(text_of(column)) for column in keyed.key),
    )
    before: Key = ()
    with connection.cursor(name) as cursor:
        cursor.itersize = BATCH
        for hash_, version, is_later, *texts in cursor.execute(query):
            key = tuple(map(str, texts))
            if key <= before:
                raise VerificationFailed(f"the keys of {table.name} are not in order", _ORDER)
            before = key
            yield key, int(hash_), str(version), bool(is_later)


_ORDER = "restore the other one to a database of the same encoding and compare by hand: this one is not in UTF-8"


def text_of(column: str) -> sql.Composed:
    """The output function's text: a cast to text trims char(n), and can be a user's function."""
    return sql.SQL("concat({})").format(sql.Identifier(column))


def whole_rows(connection: Connection, table: FoundTable, keyed: Keyed, keys: Sequence[Key]) -> dict[Key, Row]:
    """The texts of the written columns of at most `FETCH` rows, found by the key's index."""
    if not keys:
        return {}
    texts = [
        sql.SQL("CASE WHEN {} IS NOT NULL THEN {} END").format(sql.Identifier(name), text_of(name))
        for name in keyed.written
    ]
    one = sql.SQL("({})").format(sql.SQL(", ").join([sql.Placeholder()] * len(keyed.key)))
    query = sql.SQL("SELECT {keys}, {texts} FROM {rows} WHERE ({names}) IN ({wanted})").format(
        keys=sql.SQL(", ").join(text_of(column) for column in keyed.key),
        texts=sql.SQL(", ").join(texts),
        rows=table.rows_of,
        names=sql.SQL(", ").join(map(sql.Identifier, keyed.key)),
        wanted=sql.SQL(", ").join([one] * len(keys)),
    )
    size = len(keyed.key)
    found = connection.execute(query, [part for key in keys for part in key])
    return {tuple(map(str, row[:size])): tuple(row[size:]) for row in found}
