"""What a report shows of an error of the server: no password, nobody's data."""

from __future__ import annotations

import re

import psycopg
from psycopg import errors

from blocks.postgres.server import first_line


def described(error: psycopg.Error) -> str:
    """What the server refused and by which rule, without its DETAIL (“Failing row contains …”) and without the values
    that it quotes."""
    text = error.diag.message_primary or first_line(error)
    if isinstance(error, errors.DataError):
        text = re.sub(r'".*"', "“…”", text, flags=re.DOTALL)
    named = {"table": error.diag.table_name, "column": error.diag.column_name, "constraint": error.diag.constraint_name}
    told = ", ".join(f"{what} {name}" for what, name in named.items() if name and name not in text)
    return f"{text} ({told})" if told else text
