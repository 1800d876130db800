"""Dumps that the manual's own commands left on disk (§1.2): `.dump`, `.sql`, `.sql.gz`, without a manifest.

Nothing says what was in the database: such a file may restore well and never be proven.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blocks.postgres import Postgres
from runbook import shell
from runbook.errors import CommandFailed, OpsError
from runbook.kinds import probe
from tasks.postgres.fill import Source
from tasks.postgres.plain import read_plain

ENDINGS = (".dump", ".sql", ".sql.gz")
MAGIC = b"PGDMP"
# How much larger than its dump a database is at most, with its indexes: compressed, and as text.
GROWTH = {"custom": 12, ".sql": 3, ".sql.gz": 15}


@dataclass(frozen=True)
class ForeignDump:
    """A dump without a manifest. `major` is the server's version that it was taken of, 0 where it does not say;
    `estimate_bytes` what the database will take; `written` the file's own date."""

    path: Path
    source: Source
    database: str
    major: int
    complete: bool
    estimate_bytes: int
    written: datetime

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name


def is_foreign(wanted: str) -> bool:
    """Whether somebody means a file instead of one of our backups."""
    return wanted.endswith(ENDINGS)


@probe
def read_foreign(postgres: Postgres, directory: Path, wanted: str) -> ForeignDump:
    """Read a dump as far as it tells about itself; `wanted` is a path, or a name in the store's directory.

    Raises:
        OpsError: it is not there, or no dump.
        VerificationFailed: it is compressed, and was cut off or altered.
    """
    path = directory / wanted
    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
        status = path.stat()
    except OSError as error:
        raise OpsError(f"{path} cannot be read: {error.strerror}", "correct the path, or its rights") from None
    written = datetime.fromtimestamp(status.st_mtime, UTC)
    if magic == MAGIC:
        database, major = _header(postgres, path)
        size = status.st_size * GROWTH["custom"]
        return ForeignDump(path, Source(path, "custom"), database, major, True, size, written)
    if path.suffix == ".dump":
        raise OpsError(f"{path.name} is no dump in pg_dump's custom format", "a dump as SQL text ends in .sql")
    complete, _ = read_plain(path)
    size = status.st_size * GROWTH[".sql.gz" if path.suffix == ".gz" else ".sql"]
    return ForeignDump(path, Source(path, "plain"), "", 0, complete, size, written)


def _header(postgres: Postgres, path: Path) -> tuple[str, int]:
    """The database's name and the server's major version, as the archive tells them."""
    try:
        listed = shell.run([postgres.program("pg_restore"), "--list", path]).stdout
    except CommandFailed as error:
        what = (error.stderr.strip().splitlines() or ["pg_restore cannot read it"])[-1]
        raise OpsError(
            f"{path.name} cannot be read: {what}", "it is damaged or of a newer pg_dump: take another"
        ) from None
    database = re.search(r"^;\s+dbname: (.*)$", listed, re.MULTILINE)
    version = re.search(r"^;\s+Dumped from database version: (\d+)", listed, re.MULTILINE)
    return database[1] if database else "", int(version[1]) if version else 0
