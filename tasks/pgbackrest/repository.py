"""The WAL in pgBackRest's repository as a read-only archive. The SHA-1 in a segment's name and its first page prove it.

https://pgbackrest.org/command.html#command-repo-ls
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import re
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from blocks.postgres.server import Postgres
from blocks.postgres.wal import Wal
from runbook import shell
from runbook.errors import CommandFailed, OpsError, VerificationFailed
from tasks.backups import codec
from tasks.pgbackrest.command import INHERIT, argv_of, call, environment_of
from tasks.wal.archive.archive import Archive, ArchiveListing, StoredSegment, read_unpacked

_NAME = re.compile(
    r"(?:.*/)?(?:(?P<segment>[0-9A-F]{24})-(?P<sha1>[0-9a-f]{40})(?:\.(?P<packed>\w+))?"
    r"|(?P<history>[0-9A-F]{8})\.history)"
)
_UNPACK: Mapping[str, Callable[[IO[bytes]], IO[bytes]]] = {
    "": lambda file: file,
    "gz": lambda file: cast(IO[bytes], gzip.GzipFile(fileobj=file)),
    "bz2": lambda file: cast(IO[bytes], bz2.BZ2File(file)),
}
OTHER_COPIES = "search for another copy: in another pgBackRest repository, or in the primary's pg_wal"
_READ_ONLY = "only pgBackRest writes to its archive"


@dataclass(frozen=True)
class Repository:
    """A stanza's archive as a read-only `tasks.wal.archive.place.Place`. Names are paths below `archive/<stanza>/`."""

    wal: Wal
    postgres: Postgres

    @property
    def where(self) -> str:
        """The place as text."""
        return f"pgBackRest's stanza {self.wal.stanza}"

    def names(self) -> dict[str, int]:
        """Every file of the archive with its stored bytes.

        Raises:
            OpsError, CommandFailed: the repository cannot be listed.
        """
        printed = call(self.wal, self.postgres, "repo-ls", "--recurse", "--output=json", self._path())
        files = {name: one for name, one in json.loads(printed).items() if one["type"] == "file"}
        return {name: int(one.get("size", 0)) for name, one in files.items()}

    def get(self, name: str) -> bytes:
        """A file's stored content, decrypted.

        Raises:
            VerificationFailed: it is missing, or cannot be decrypted.
        """
        argv = argv_of(self.wal, "repo-get", self._path(name))
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            with shell.spawn(
                argv,
                environment=environment_of(self.postgres),
                inherit=INHERIT,
                directory=Path("/"),
                user=self.postgres.os_user,
                stdout=out,
                stderr=err,
            ) as child:
                code = child.wait()
            err.seek(0)
            if code:
                why = CommandFailed(argv, code, err.read().decode(errors="replace"))
                raise VerificationFailed(f"{name} cannot be read: {why.message}", "search for another copy")
            out.seek(0)
            return out.read()

    def put(self, name: str, content: bytes, *, lasting: bool = True) -> None:
        """Refused: archive_command writes."""
        raise OpsError(_READ_ONLY, "let archive_command archive; see pgbackrest.conf")

    def remove(self, names: Sequence[str]) -> None:
        """Refused: pgBackRest's retention deletes."""
        raise OpsError(_READ_ONLY, "run pgbackrest expire, which deletes by its own retention")

    def _path(self, name: str = "") -> str:
        return f"archive/{self.wal.stanza}" + (f"/{name}" if name else "")


@dataclass(frozen=True)
class RepositoryArchive(Archive):
    """The archive of a stanza. A segment's name has the SHA-1 of its content; a timeline history's name has none, so
    the segments after it prove it."""

    def listing(self) -> ArchiveListing:
        """All segments and timeline histories.

        Raises:
            OpsError, CommandFailed: it cannot be listed.
        """
        segments, histories = defaultdict[str, list[StoredSegment]](list), dict[int, tuple[StoredSegment, ...]]()
        for name, size in self.place.names().items():
            if not (match := _NAME.fullmatch(name)):
                continue
            if match["history"]:
                histories[int(match["history"], 16)] = (StoredSegment(name, f"{match['history']}.history", "", size),)
            else:
                segments[match["segment"]].append(StoredSegment(name, match["segment"], match["sha1"], size))
        return ArchiveListing({name: tuple(found) for name, found in segments.items()}, {}, histories)

    def get(self, stored: StoredSegment) -> bytes:
        """A file's content, proven by the SHA-1 in its name.

        Raises:
            VerificationFailed: it is missing or altered.
            OpsError: its compression is not supported here.
        """
        match = _NAME.fullmatch(stored.name)
        packed = (match and match["packed"]) or ""
        if packed not in _UNPACK:
            hint = "set compress-type=gz in pgbackrest.conf"
            raise OpsError(f"{stored.of} is compressed by {packed}, which is not supported here", hint)
        content = self.place.get(stored.name)
        try:
            found = read_unpacked(stored.of, _UNPACK[packed](io.BytesIO(content)))
        except codec.Oversized as error:
            raise VerificationFailed(f"{stored.of} in {self.place.where} is damaged: {error}", OTHER_COPIES) from None
        except (OSError, EOFError, ValueError, zlib.error):
            found = b""
        if stored.sha256 and hashlib.sha1(found, usedforsecurity=False).hexdigest() != stored.sha256:
            raise VerificationFailed(
                f"{stored.of} in {self.place.where} is damaged: its SHA-1 differs",
                OTHER_COPIES,
            )
        return found
