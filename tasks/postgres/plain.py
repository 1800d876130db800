"""Dumps as SQL text (§1.2: `.sql`, `.sql.gz`): whether one is whole, what it sets sequences to, and its way back.

psql ends with 0 on a text that was cut off in the middle; pg_dump's last line tells that it was not.
https://www.postgresql.org/docs/current/app-pgdump.html
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, cast

from blocks.postgres import Postgres
from runbook import shell
from runbook.errors import CommandFailed, OpsError, VerificationFailed

PLAIN = "dump.sql"
COMPRESSED = "dump.sql.gz"
TRAILER = b"-- PostgreSQL database dump complete"
LINE_BYTES = 1 << 16


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a dump, long ones in pieces.

    Raises:
        VerificationFailed: it is compressed, and was cut off or altered.
    """
    try:
        with _opened(path) as file:
            while line := file.readline(LINE_BYTES):
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise VerificationFailed(f"{path.name} cannot be uncompressed: {error}", "choose another backup") from None


def statements_of(path: Path) -> Iterator[bytes]:
    """The lines that are SQL: rows between COPY and its end are left out, whatever they look like."""
    rows = False
    for line in lines_of(path):
        if rows:
            rows = line.rstrip(b"\r\n") != b"\\."
        else:
            rows = line.startswith(b"COPY ") and line.rstrip().endswith(b" FROM stdin;")
            yield line


def read_plain(path: Path) -> tuple[bool, list[str]]:
    """Whether pg_dump wrote it to its end, and its lines that set sequences.

    Raises:
        VerificationFailed: see `lines_of`.
    """
    complete, setting = False, []
    for line in statements_of(path):
        if line.startswith(TRAILER):
            complete = True
        elif line.startswith(b"SELECT pg_catalog.setval("):
            setting.append(line.decode(errors="replace"))
    return complete, setting


def run_plain(postgres: Postgres, path: Path, database: str, settings: Mapping[str, str], hint: str) -> float:
    """Run a dump through psql in one transaction that ends at the first error; returns the seconds.

    Raises:
        VerificationFailed: it is compressed, and was cut off or altered.
        OpsError: a statement failed: everything of it is undone.
    """
    argv = [postgres.program("psql"), "--no-psqlrc", "--quiet", "--single-transaction", "--set=ON_ERROR_STOP=1"]
    argv += ["--no-password", "--output=/dev/null", "--dbname", database]
    environment = {
        **postgres.environment(),
        "PGOPTIONS": " ".join(f"-c {name}={value}" for name, value in settings.items()),
    }
    try:
        with _opened(path) as file:
            return shell.feed(argv, file, environment=environment, hint=hint).seconds
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise VerificationFailed(f"{path.name} cannot be uncompressed: {error}", hint) from None
    except CommandFailed as error:
        first = next((line for line in error.stderr.splitlines() if "ERROR" in line or "error" in line), error.message)
        raise OpsError(f"{path.name} does not restore: {first.partition('ERROR:')[2].strip() or first}", hint) from None


def _opened(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
