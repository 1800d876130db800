"""The hash of a row: of every column's text as the type's output function prints it, and of its NULLs.

Texts are compared, not records. Chaining over the columns costs half as much as hashing the row's text, which quotes
every value, and is as strict.
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import sql

# Stored in manifests: hashes of another form cannot be compared.
FORM = "texts of columns by name, hashtextextended"

# Each column's hash is seeded with the one before; a NULL flips a bit, so that it differs from the empty text.
_OPEN = sql.SQL("hashtextextended(coalesce({}, '') COLLATE \"C\", ")
_CLOSE = sql.SQL(" # (CASE WHEN {} IS NULL THEN 1 ELSE 0 END))")


def row_hash(columns: Sequence[tuple[str, str | None]]) -> sql.Composed:
    """A bigint expression for a table with these columns (name, and `text` if it is already text).

    Other types are printed by `concat`: a cast to text trims `char(n)`, and can be a user's function.
    """
    names = [(sql.Identifier(name), kind) for name, kind in columns]
    texts = [name if kind else sql.SQL("concat({})").format(name) for name, kind in names]
    opened = [_OPEN.format(text) for text in reversed(texts)]
    closed = [_CLOSE.format(name) for name, _ in names]
    return sql.Composed([*opened, sql.SQL("0::bigint"), *closed])
