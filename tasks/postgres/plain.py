r"""Dumps as SQL text (§1.2: `.sql`, `.sql.gz`): whether one is whole, what it sets sequences to, and its way back.

psql ends with 0 on a text that was cut off in the middle; pg_dump's last line tells that it was not. The text is read
before psql gets it (tasks/postgres/script.py), and psql itself refuses every command of its own that stands in it: its
`\restrict` is given a word that nobody else knows. https://www.postgresql.org/docs/current/app-psql.html
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, cast

from blocks.postgres import Postgres
from runbook import shell
from runbook.errors import CommandFailed
from runbook.log import logger
from tasks.postgres.quiet import copy_options
from tasks.postgres.refusal import does_not_restore
from tasks.postgres.script import Part, lines_of
from tasks.postgres.snapshot import read_lock_room

PLAIN = "dump.sql"
COMPRESSED = "dump.sql.gz"
_ENABLED = re.compile(rb"ALTER EVENT TRIGGER .+ ENABLE (?:ALWAYS|REPLICA);\s*")
TRAILER = b"-- PostgreSQL database dump complete"
# The first releases whose psql knows \restrict (CVE-2025-8714).
RESTRICTS = {13: 22, 14: 19, 15: 14, 16: 10, 17: 6}


def read_plain(path: Path) -> tuple[bool, bytes]:
    """Whether pg_dump wrote it to its end, and its lines that set the encoding and sequences.

    Raises:
        OpsError, VerificationFailed: see `lines_of`.
    """
    complete, setting = False, list[bytes]()
    for part, line in lines_of(path):
        if part is not Part.SQL:
            continue
        if line.startswith(TRAILER):
            complete = True
        elif line.startswith((b"SELECT pg_catalog.setval(", b"SET client_encoding = ")):
            setting.append(line)
    return complete, b"".join(setting)


def restricts(postgres: Postgres) -> bool:
    r"""Whether this psql has `\restrict`, after which it takes no command from a text."""
    printed = shell.run([postgres.program("psql"), "--version"], timeout_seconds=10).stdout
    version = re.search(r"\) (\d+)(?:\.(\d+))?", printed)
    if not version:
        return False
    major, minor = int(version[1]), int(version[2] or 0)
    return major >= 18 or minor >= RESTRICTS.get(major, minor + 1)


def run_plain(
    postgres: Postgres, path: Path, database: str, settings: Mapping[str, str], hint: str, relations: int = 0
) -> float:
    """Run a dump through psql in one transaction that ends at the first error; returns the seconds. A text that ends
    the transaction itself (pg_dump writes no COMMIT) leaves what it did until then in `database`. Of thousands of
    tables the server may have no room for the locks of one transaction: then each statement is one. `relations`: so
    many it makes at least, where that is known.

    Raises:
        VerificationFailed: it is compressed, and was cut off or altered.
        OpsError: a statement failed, or psql would take a line for a command: everything of it is undone.
    """
    argv = [postgres.program("psql"), "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1"]
    argv += ["--no-password", "--output=/dev/null", "--dbname", database]
    options = [copy_options(postgres), *(f"-c {name}={value}" for name, value in settings.items())]
    environment = {**postgres.environment(), "PGOPTIONS": " ".join(options)}

    def run(*more: str) -> float:
        script = cast(IO[bytes], _Script(path, fenced=restricts(postgres)))
        return shell.feed(
            [*argv, *more], script, environment=environment, stall=postgres.stall(database), hint=hint
        ).seconds

    try:
        if relations and relations > (room := read_lock_room.work(postgres, database)).locks:
            logger().info("%s makes %d relations, %s: by statements", path.name, relations, room.text)
            return run()
        try:
            return run("--single-transaction")
        except CommandFailed as error:
            if "out of shared memory" not in error.stderr:
                raise
            logger().info("the server has no room for the locks of one transaction: %s again, by statements", path.name)
            return run()
    except CommandFailed as error:
        raise does_not_restore(path.name, error, hint) from None


class _Script:
    """The lines of a dump, read as a file is."""

    def __init__(self, path: Path, *, fenced: bool) -> None:
        self._pieces = self._all(path, secrets.token_hex(32).encode() if fenced else b"")

    def read(self, size: int) -> bytes:
        found, length = [], 0
        for piece in self._pieces:
            found.append(piece)
            length += len(piece)
            if length >= size:
                break
        return b"".join(found)

    @staticmethod
    def _all(path: Path, word: bytes) -> Iterator[bytes]:
        yield from [b"\\restrict " + word + b"\n"] if word else []
        enabling = list[bytes]()  # event triggers that then fire in every session: after pg_dump's last REFRESH
        for part, line in lines_of(path):
            if part is Part.SQL and _ENABLED.fullmatch(line):
                enabling.append(line)
            else:
                yield line
        yield from enabling
        yield from [b"\n\\unrestrict " + word + b"\n"] if word else []
