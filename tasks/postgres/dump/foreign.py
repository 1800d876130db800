"""Dumps without a manifest: files of the manual's own commands (§1.2: `.dump`, `.sql`, `.sql.gz`), or a pg_dump
directory.

The database's content at that time is unknown, so a restore of such a dump can never be proven.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blocks.postgres.server import Postgres
from runbook import shell
from runbook.errors import CommandFailed, OpsError
from runbook.kinds import probe
from tasks.backups.manifest import MANIFEST
from tasks.postgres.content.definitions import parse
from tasks.postgres.dump.fill import DumpSource
from tasks.postgres.dump.plain import read_plain, restricts
from tasks.postgres.dump.printed import printed

ENDINGS = (".dump", ".sql", ".sql.gz", ".tar")
SUPPORTED = "a file in custom format (pg_dump -F c), a directory (-F d), or SQL text that ends in .sql or .sql.gz"
MAGIC = b"PGDMP"
CONTENTS = "toc.dat"
# The largest ratio of a database with its indexes to its dump: compressed, and as text.
GROWTH = {"archive": 12, ".sql": 3, ".sql.gz": 15}


@dataclass(frozen=True)
class ForeignDump:
    """A dump without a manifest.

    `major`: its server's version, 0 if unknown. `bytes`: its size; `estimate_bytes`: the database's. `written`: the
    file's time. `tables`: of an archive (None: unknown before the restore). `orphans`: foreign keys to tables that it
    lacks, as endings of list lines. `fenced`: psql can block meta-commands in it.
    """

    path: Path
    source: DumpSource
    database: str
    major: int
    complete: bool
    bytes: int
    estimate_bytes: int
    written: datetime
    tables: frozenset[str] | None = None
    orphans: tuple[str, ...] = ()
    fenced: bool = True

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name


def is_foreign(wanted: str) -> bool:
    """Whether the operator named a file or a directory instead of a backup."""
    return wanted.startswith("/") or wanted.endswith(ENDINGS)


@probe
def read_foreign(postgres: Postgres, directory: Path, wanted: str) -> ForeignDump:
    """Read a dump's own information. `wanted`: a path, or a name in the store's directory.

    Raises:
        OpsError: it is missing, is not a supported dump, or contains psql meta-commands.
        VerificationFailed: it is compressed, and truncated or altered.
    """
    path = directory / wanted
    try:
        form = _form(path)
        status = path.stat()
        size = sum(one.stat().st_size for one in path.iterdir()) if form == "directory" else status.st_size
    except OSError as error:
        raise OpsError(f"{path} cannot be read: {error.strerror}", "correct the path or its permissions") from None
    written = datetime.fromtimestamp(status.st_mtime, UTC)
    if form == "plain":
        complete, _ = read_plain(path)
        estimate = size * GROWTH[".sql.gz" if path.suffix == ".gz" else ".sql"]
        source = DumpSource(path, "plain", foreign=True)
        return ForeignDump(path, source, "", 0, complete, size, estimate, written, fenced=restricts(postgres))
    database, major = _header(postgres, path)
    tables, orphans = _tables(postgres, path)
    source = DumpSource(path, "directory" if form == "directory" else "custom", foreign=True, without=orphans)
    estimate = size * GROWTH["archive"]
    return ForeignDump(path, source, database, major, True, size, estimate, written, tables, orphans)


def _form(path: Path) -> str:
    if path.is_dir():
        if (path / MANIFEST).exists():
            raise OpsError(f"{path} is a backup of this project", f"run this with backup={path.name}")
        if not (path / CONTENTS).exists():
            raise OpsError(f"{path} has no {CONTENTS}: it is not a pg_dump directory", f"choose {SUPPORTED}")
        return "directory"
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(MAGIC):
        return "custom"
    if start[257:262] == b"ustar" or path.suffix == ".tar":
        raise OpsError(
            f"{path.name} is in tar format, which is not supported",
            f"choose {SUPPORTED}; or unpack it with tar -x into an empty directory and choose that",
        )
    if path.suffix != ".sql" and not path.name.endswith(".sql.gz"):
        raise OpsError(f"{path.name} is not a dump in pg_dump's custom format", f"choose {SUPPORTED}")
    return "plain"


def _tables(postgres: Postgres, path: Path) -> tuple[frozenset[str], tuple[str, ...]]:
    """The tables of an archive (`public.users`), and its foreign keys to other tables as endings of list lines."""
    with _translating(path):
        found = parse(printed(postgres, [postgres.program("pg_restore"), "--schema-only", path]))
    made = {name[1] for text in found.values() if (name := _CREATE.search(text))}
    tables = frozenset(key[6:].rpartition(" (owner ")[0] for key in found if key.startswith("TABLE "))
    orphans = []
    for key, text in found.items():
        names = _KEY.match(key)
        to = _REFERENCES.search(text)
        if names and to and to[1] not in made:
            orphans.append(f" FK CONSTRAINT {names['schema']} {names['name']} {names['owner']}")
    return tables, tuple(orphans)


_NAME = r'((?:"(?:[^"]|"")+"|[^\s"(.]+)\.(?:"(?:[^"]|"")+"|[^\s"(.]+))'
_CREATE = re.compile(rf"^CREATE (?:UNLOGGED |FOREIGN )?TABLE {_NAME}", re.MULTILINE)
_REFERENCES = re.compile(rf" REFERENCES {_NAME}\(")
_KEY = re.compile(r"FK CONSTRAINT (?P<schema>[^.]+)\.(?P<name>.*) \(owner (?P<owner>.*)\)")


def _header(postgres: Postgres, path: Path) -> tuple[str, int]:
    """The database's name and the server's major version in the archive's header."""
    with _translating(path):
        listed = shell.run([postgres.program("pg_restore"), "--list", path]).stdout
    database = re.search(r"^;\s+dbname: (.*)$", listed, re.MULTILINE)
    version = re.search(r"^;\s+Dumped from database version: (\d+)", listed, re.MULTILINE)
    return database[1] if database else "", int(version[1]) if version else 0


@contextmanager
def _translating(path: Path) -> Iterator[None]:
    try:
        yield
    except CommandFailed as error:
        what = (error.stderr.strip().splitlines() or ["pg_restore cannot read it"])[-1]
        hint = "choose another dump: this one is damaged, or of a newer pg_dump"
        raise OpsError(f"{path.name} cannot be read: {what}", hint) from None
