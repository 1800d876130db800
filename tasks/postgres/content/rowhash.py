"""The hash of a row: of every column's text as the type's output function prints it, and of whether it is NULL.

recovery-rules, content manifest: equal texts, not equal records. Chained over the columns it costs half of hashing
the text of the whole row, which quotes every value first, and is as strict.
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import sql

# What is written into manifests: hashes of another form cannot be compared.
FORM = "texts of columns by name, hashtextextended"

# Each column's hash is seeded with the one before; a NULL flips a bit of its seed, so that it is not the empty text.
_OPEN = sql.SQL("hashtextextended(coalesce({}, '') COLLATE \"C\", ")
_CLOSE = sql.SQL(" # (CASE WHEN {} IS NULL THEN 1 ELSE 0 END))")


def row_hash(columns: Sequence[tuple[str, str | None]]) -> sql.Composed:
    """An expression of type bigint for a table with such columns (name, and `text` where it is text already).

    Anything else is printed by `concat`: a cast to text trims `char(n)` and may be somebody's own function.
    """
    names = [(sql.Identifier(name), kind) for name, kind in columns]
    texts = [name if kind else sql.SQL("concat({})").format(name) for name, kind in names]
    opened = [_OPEN.format(text) for text in reversed(texts)]
    closed = [_CLOSE.format(name) for name, _ in names]
    return sql.Composed([*opened, sql.SQL("0::bigint"), *closed])
