"""The output of PostgreSQL's programs for a dump, decoded.

pg_dump writes a dump in the database's encoding, which its first statements name; SQL_ASCII has no encoding.
https://www.postgresql.org/docs/current/multibyte.html
"""

from __future__ import annotations

import codecs
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import psycopg

from blocks.postgres.server import Postgres, execute
from runbook import shell

SQL_ASCII = "SQL_ASCII"
_NAMED = re.compile(rb"^SET client_encoding = '([\w-]+)';", re.MULTILINE)
_HEAD_BYTES = 4096


def printed(
    postgres: Postgres,
    argv: Sequence[str | Path],
    environment: Mapping[str, str] | None = None,
    *,
    of_ascii: str = "utf-8",
) -> str:
    """The program's output with `--file`. `of_ascii`: the encoding to assume for a SQL_ASCII database.

    Raises:
        CommandFailed: it failed.
    """
    with tempfile.NamedTemporaryFile(prefix="ops-printed-") as file:
        shell.run([*argv, f"--file={file.name}"], environment=environment)
        return decoded(postgres, Path(file.name).read_bytes(), of_ascii=of_ascii)


def decoded(postgres: Postgres, content: bytes, *, of_ascii: str = "utf-8") -> str:
    """The text of a dump, converted by the server, which has more characters of EUC_JP and Shift JIS than Python.

    An invalid byte becomes `\\xe9`, so that different bytes stay different.
    """
    named = _NAMED.search(content[:_HEAD_BYTES])
    encoding = named[1].decode() if named else "UTF8"
    if encoding not in ("UTF8", SQL_ASCII) and not content.isascii():
        try:
            with postgres.connect() as connection:
                return bytes(execute(connection, "SELECT convert(%s, %s, 'UTF8')", content, encoding)[0][0]).decode()
        except psycopg.DataError:  # a character that UTF-8 does not have
            pass
    return content.decode(codec(encoding, of_ascii), "backslashreplace")


def codec(encoding: str, of_ascii: str = "utf-8") -> str:
    """Python's name of a PostgreSQL encoding; Latin-1, which is lossless, if Python has none."""
    name = re.sub(r"^WIN(?=\d)", "cp", encoding)
    name = {SQL_ASCII: of_ascii, "SJIS": "cp932", "KOI8R": "koi8_r", "KOI8U": "koi8_u"}.get(encoding, name)
    try:
        return codecs.lookup(name).name
    except LookupError:
        return "latin-1"
