r"""Dumps as SQL text (§1.2: `.sql`, `.sql.gz`): check that one is complete, read its sequences, restore it.

psql exits with 0 on a truncated text, so pg_dump's last line is required. The text is checked before psql reads it, and
psql itself blocks meta-commands: `\restrict` gets a random key. https://www.postgresql.org/docs/current/app-psql.html
"""

from __future__ import annotations

import gzip
import re
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, cast

from blocks.postgres.server import Postgres
from runbook import shell
from runbook.errors import CommandFailed, OpsError, VerificationFailed
from runbook.log import logger
from tasks.postgres.content.quiet import copy_options
from tasks.postgres.dump.accepted import KINDS, left_out, restore_without
from tasks.postgres.dump.refusal import does_not_restore
from tasks.postgres.dump.snapshot import read_lock_limit

PLAIN = "dump.sql"
COMPRESSED = "dump.sql.gz"
_ENABLED = re.compile(rb"ALTER EVENT TRIGGER .+ ENABLE (?:ALWAYS|REPLICA);\s*")
TRAILER = b"-- PostgreSQL database dump complete"
# The first releases whose psql knows \restrict (CVE-2025-8714).
RESTRICTS = {13: 22, 14: 19, 15: 14, 16: 10, 17: 6}


def read_plain(path: Path) -> tuple[bool, bytes]:
    """Whether it is complete, and its lines that set the encoding and sequences.

    Raises:
        OpsError, VerificationFailed: see `lines_of`.
    """
    complete, setting = False, list[bytes]()
    for part, line in lines_of(path):
        if part is not PlainPart.SQL:
            continue
        if line.startswith(TRAILER):
            complete = True
        elif line.startswith((b"SELECT pg_catalog.setval(", b"SET client_encoding = ")):
            setting.append(line)
    return complete, b"".join(setting)


def restricts(postgres: Postgres) -> bool:
    r"""Whether this psql has `\restrict`, which blocks meta-commands in a text."""
    printed = shell.run([postgres.program("psql"), "--version"], timeout_seconds=10).stdout
    version = re.search(r"\) (\d+)(?:\.(\d+))?", printed)
    if not version:
        return False
    major, minor = int(version[1]), int(version[2] or 0)
    return major >= 18 or minor >= RESTRICTS.get(major, minor + 1)


def entry_names(path: Path) -> Iterator[str]:
    """The objects of a dump, as `accepted.name_of` names those of an archive.

    Raises:
        OpsError, VerificationFailed: see `lines_of`.
    """
    return (name for part, line in lines_of(path) if part is PlainPart.SQL and (name := _entry_in(line)))


def _entry_in(line: bytes) -> str:
    """The object whose comment in pg_dump's text this is: `-- Name: orders of_user; Type: FK CONSTRAINT; …`."""
    if not line.startswith((b"-- Name: ", b"-- Data for Name: ")):
        return ""
    match = _HEADER.match(line.decode(errors="replace"))
    return f"{match['kind']} {match['schema']}.{match['name']}".replace(" -.", " ", 1) if match else ""


_HEADER = re.compile(r"-- (?:Data for )?Name: (?P<name>.+); Type: (?P<kind>[A-Z ]+); Schema: (?P<schema>.+); Owner: ")
# pg_dump prints these before the comment of the object that they are for.
_SETTING = re.compile(
    rb"SET (?:default_tablespace|default_table_access_method|default_with_oids|SESSION) ?", re.IGNORECASE
)
_FAILED_LINE = re.compile(r"psql:<stdin>:(\d+): ERROR")


def run_plain(
    postgres: Postgres,
    path: Path,
    database: str,
    settings: Mapping[str, str],
    hint: str,
    relations: int = 0,
    accepted: Sequence[str] = (),
) -> float:
    """Run a dump through psql in one transaction that stops at the first error; returns the seconds.

    If the server has not enough locks for one transaction (thousands of tables), each statement is one. A text that
    ends the transaction itself (pg_dump writes no COMMIT) leaves its earlier statements in `database`.

    Args:
        relations: their number, if known
        accepted: objects that are left out

    Raises:
        VerificationFailed: it is compressed, and truncated or altered.
        OpsError: a statement failed, or a line is a psql meta-command: the transaction is rolled back.
    """
    argv = [postgres.program("psql"), "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1"]
    # Only of a named file psql prints at which line it stopped.
    argv += ["--file=-", "--no-password", "--output=/dev/null", "--dbname", database]
    options = [copy_options(postgres), *(f"-c {name}={value}" for name, value in settings.items())]
    environment = postgres.environment(options=" ".join(options))

    script = _Script(path, b"", frozenset())

    def run(*more: str) -> float:
        nonlocal script
        word = secrets.token_hex(32).encode() if restricts(postgres) else b""
        script = _Script(path, word, left_out(accepted))
        text = cast(IO[bytes], script)
        stall = postgres.stall(database)
        return shell.feed([*argv, *more], text, environment=environment, stall=stall, hint=hint).seconds

    try:
        if relations and relations > (limit := read_lock_limit.work(postgres, database)).locks:
            logger().info("%s has %d relations, %s: one transaction a statement", path.name, relations, limit.text)
            return run()
        try:
            return run("--single-transaction")
        except CommandFailed as error:
            if "out of shared memory" not in error.stderr:
                raise
            logger().info("not enough locks for one transaction: restoring %s again, one a statement", path.name)
            return run()
    except CommandFailed as error:
        failed = _FAILED_LINE.search(error.stderr)
        refused = script.entry_at(int(failed[1])) if failed else ""
        found = does_not_restore(path.name, error, hint)
        if refused.startswith(tuple(f"{kind} " for kind in KINDS)):
            raise type(found)(found.message, restore_without(accepted, [refused]) + found.hint) from None
        raise found from None


class _Script:
    """The lines of a dump, without those of the objects in `without`, as a readable file."""

    def __init__(self, path: Path, word: bytes, without: frozenset[str]) -> None:
        self._without, self._line = without, 1
        self._entries = [(1, "")]
        self._pieces = self._counted(self._all(path, word))

    def entry_at(self, line: int) -> str:
        """The object to which a line that was read belongs."""
        return next(name for first, name in reversed(self._entries) if first <= line)

    def _counted(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            self._line += piece.count(b"\n")

    def read(self, size: int) -> bytes:
        found, length = [], 0
        for piece in self._pieces:
            found.append(piece)
            length += len(piece)
            if length >= size:
                break
        return b"".join(found)

    def _all(self, path: Path, word: bytes) -> Iterator[bytes]:
        yield from [b"\\restrict " + word + b"\n"] if word else []
        enabling = list[bytes]()  # event triggers fire in every session, so enable them after the last REFRESH
        for part, line in lines_of(path):
            if part is PlainPart.SQL and (name := _entry_in(line)):
                self._entries.append((self._line, name))
            if self._entries[-1][1] in self._without and not (part is PlainPart.SQL and _SETTING.match(line)):
                continue
            if part is PlainPart.SQL and _ENABLED.fullmatch(line):
                enabling.append(line)
            else:
                yield line
        self._entries.append((self._line, ""))
        yield from enabling
        yield from [b"\n\\unrestrict " + word + b"\n"] if word else []


LINE_BYTES = 1 << 16
HINT = "take the dump with pg_dump (without -C) in custom format (-F c), which has no such line. Nothing was run"
_RESTRICT = re.compile(rb"\\(?:un)?restrict [A-Za-z0-9]+\s*")
_TOKEN = re.compile(
    rb"(?<![A-Za-z0-9_$\x80-\xff])(?:\$(?:[A-Za-z_\x80-\xff][A-Za-z0-9_\x80-\xff]*)?\$|[eE]')|['\"\\;()]|--|/\*"
)
_LINE_END = re.compile(rb"[\r\n]|\Z")  # a lone carriage return ends a comment, too
_COMMENT = re.compile(rb"/\*|\*/")  # they nest
_ESCAPED = re.compile(rb"\\.|''|'", re.DOTALL)
_COPY = re.compile(rb"copy(?![A-Za-z0-9_$\x80-\xff])", re.IGNORECASE)
_ROUTINE = re.compile(rb"\s*create\s+(?:or\s+replace\s+)?(?:function|procedure)\s", re.IGNORECASE)
_WORD = re.compile(rb"[A-Za-z_\x80-\xff][A-Za-z0-9_$\x80-\xff]*")
_ROWS_END = (b"\\.\n", b"\\.\r\n", b"\\.")


class PlainPart(Enum):
    """The position of a line's start: in SQL, inside a quoted text or comment, or in rows."""

    SQL = "sql"
    INSIDE = "inside"
    ROWS = "rows"


def lines_of(path: Path) -> Iterator[tuple[PlainPart, bytes]]:
    r"""The lines of a dump for psql, without its own `\restrict`; long rows in pieces.

    Raises:
        OpsError: a line is a psql meta-command, or a COPY is not one of pg_dump's.
        VerificationFailed: it is compressed, and truncated or altered.
    """
    reading, whole = _Reading(path.name), True
    try:
        with _opened(path) as file:
            while line := file.readline(LINE_BYTES if reading.rows else -1):
                reading.number += whole
                if reading.rows:
                    reading.rows = not (whole and line in _ROWS_END)
                    whole = line.endswith(b"\n")
                    yield PlainPart.ROWS, line
                elif reading.quote or not _RESTRICT.fullmatch(line):
                    part = PlainPart.INSIDE if reading.quote else PlainPart.SQL
                    reading.take(line)
                    yield part, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise VerificationFailed(f"{path.name} cannot be uncompressed: {error}", "choose another dump") from None


def _opened(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


@dataclass
class _Reading:
    """The state of psql's lexer.

    `quote`: the end of the current quoted text or comment, empty outside. `comments`, `parentheses`: nesting depth.
    `escapes`: backslashes escape in this text and its continuation. `head`: the start of the statement. `outside`: the
    part of a CREATE FUNCTION outside quotes and parentheses, because its body can contain semicolons.
    """

    name: str
    number: int = 0
    rows: bool = False
    quote: bytes = b""
    comments: int = 0
    parentheses: int = 0
    escapes: bool = False
    head: bytes = b""
    outside: bytes = b""

    def take(self, line: bytes) -> None:
        if b"\0" in line:  # psql would ignore the rest of the line
            raise self.refused(line, "contains a NUL byte")
        at = 0
        while at < len(line):
            at = self._inside(line, at) if self.quote else self._outside(line, at)

    def refused(self, text: bytes, why: str) -> OpsError:
        shown = text.decode(errors="replace").strip().replace("\0", "␀")[:60]
        return OpsError(f"{self.name}: line {self.number} {why}: {shown}", HINT)

    def _inside(self, line: bytes, at: int) -> int:
        if self.quote == b"*/":
            found = _COMMENT.search(line, at)
            if not found:
                return len(line)
            self.comments += 1 if found[0] == b"/*" else -1
            self.quote = b"*/" if self.comments else b""
            return found.end()
        if self.quote == b"'" and self.escapes:
            ending = _ESCAPED.search(line, at)
            self.quote = b"" if ending and ending[0] == b"'" else self.quote
            return ending.end() if ending else len(line)
        end = line.find(self.quote, at)
        if end < 0:
            return len(line)
        end += len(self.quote)
        self.quote = b""
        return end

    def _outside(self, line: bytes, at: int) -> int:
        found = _TOKEN.search(line, at)
        self._note(line[at : found.start() if found else len(line)])
        if not found:
            return len(line)
        token = found[0]
        if token == b"\\":
            raise self.refused(line[found.start() :], "is a psql meta-command")
        if token == b"--":
            self._note(b" ")
            end = _LINE_END.search(line, found.end())
            return end.start() if end else len(line)
        if token == b";":
            return self._end_statement(line, found.start())
        if token in (b"(", b")"):
            self.parentheses = max(self.parentheses + (1 if token == b"(" else -1), 0)
        self._open(token)
        return found.end()

    def _open(self, token: bytes) -> None:
        """Enter a quoted text or a comment; a parenthesis is only noted."""
        if token == b"/*":
            self.quote, self.comments = b"*/", 1
            self._note(b" ")
            return
        continued = token == b"'" and self.escapes  # a text continued on the next line has the same escapes
        self._note(token)
        if token in (b"(", b")"):
            return
        self.escapes = continued or token in (b"e'", b"E'")
        self.quote = token[-1:] if token[-1:] in (b"'", b'"') else token

    def _note(self, text: bytes) -> None:
        if text.strip():
            self.escapes = False
        if len(self.head) < 5:
            self.head = (self.head + text).lstrip()[:5]
        if not self.parentheses and self.head.upper() == b"CREAT":
            self.outside = self.outside + text if self.outside else b"CREAT" + text.lstrip()[5:]

    def _end_statement(self, line: bytes, at: int) -> int:
        if self.parentheses or self._in_body():
            self.outside += b" "
            return at + 1
        head, self.head, self.outside, self.escapes = self.head, b"", b"", False
        if _COPY.match(head):
            if not line[:at].endswith(b" FROM stdin") or line[at + 1 :].strip():
                raise self.refused(line, "is not a COPY of pg_dump")
            self.rows = True
            return len(line)
        return at + 1

    def _in_body(self) -> bool:
        """Whether the semicolon is inside CREATE FUNCTION … BEGIN ATOMIC … END, counted as psql does."""
        if not _ROUTINE.match(self.outside):
            return False
        depth = 0
        for word in _WORD.findall(self.outside.lower()):
            if word == b"begin" or (word == b"case" and depth):
                depth += 1
            elif word == b"end" and depth:
                depth -= 1
        return depth > 0
