"""Errors of the server for reports: no password and no personal data may appear in them."""

from __future__ import annotations

import re

import psycopg
from psycopg import errors

from blocks.postgres.server import first_line


def described(error: psycopg.Error) -> str:
    """The server's error and the violated constraint, without DETAIL (“Failing row contains …”) and quoted values."""
    text = error.diag.message_primary or first_line(error)
    if isinstance(error, errors.DataError):
        text = re.sub(r'".*"', "“…”", text, flags=re.DOTALL)
    named = {"table": error.diag.table_name, "column": error.diag.column_name, "constraint": error.diag.constraint_name}
    names = ", ".join(f"{what} {name}" for what, name in named.items() if name and name not in text)
    return f"{text} ({names})" if names else text
