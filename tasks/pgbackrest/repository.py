"""The WAL in pgBackRest's repository, read as an archive like our own: every segment is proven by the SHA-1 in its
name, and by what its first page says.

https://pgbackrest.org/command.html#command-repo-ls
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import re
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blocks.postgres.server import Postgres
from blocks.postgres.wal import Wal
from runbook import shell
from runbook.errors import CommandFailed, OpsError, VerificationFailed
from tasks.pgbackrest.command import INHERIT, argv_of, call, environment_of
from tasks.wal.archive.archive import Archive, Listing, Stored

_NAME = re.compile(
    r"(?:.*/)?(?:(?P<segment>[0-9A-F]{24})-(?P<sha1>[0-9a-f]{40})(?:\.(?P<packed>\w+))?"
    r"|(?P<history>[0-9A-F]{8})\.history)"
)
_UNPACK: Mapping[str, Callable[[bytes], bytes]] = {"": bytes, "gz": gzip.decompress, "bz2": bz2.decompress}
_READ_ONLY = "pgBackRest keeps its own archive: nothing else writes into it"


@dataclass(frozen=True)
class Repository:
    """A stanza's archive as a read-only `tasks.wal.archive.place.Place`. Names are paths below `archive/<stanza>/`."""

    wal: Wal
    postgres: Postgres

    @property
    def where(self) -> str:
        """For people."""
        return f"pgBackRest's stanza {self.wal.stanza}"

    def names(self) -> dict[str, int]:
        """Every file of the archive, and its bytes as they are stored.

        Raises:
            OpsError, CommandFailed: the repository cannot be listed.
        """
        printed = call(self.wal, self.postgres, "repo-ls", "--recurse", "--output=json", self._path())
        return {name: int(told.get("size", 0)) for name, told in json.loads(printed).items() if told["type"] == "file"}

    def get(self, name: str) -> bytes:
        """A file's content as it is stored, in clear.

        Raises:
            VerificationFailed: it is not there, or cannot be decrypted.
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
                raise VerificationFailed(f"{name} cannot be read: {why.message}", "look for another copy of it")
            out.seek(0)
            return out.read()

    def put(self, name: str, content: bytes, *, lasting: bool = True) -> None:
        """Never."""
        raise OpsError(_READ_ONLY, "archive_command archives; see pgbackrest.conf")

    def remove(self, names: Sequence[str]) -> None:
        """Never."""
        raise OpsError(_READ_ONLY, "pgbackrest expire removes what its retention does not keep")

    def _path(self, name: str = "") -> str:
        return f"archive/{self.wal.stanza}" + (f"/{name}" if name else "")


@dataclass(frozen=True)
class RepositoryArchive(Archive):
    """The archive of a stanza. Its segments are named with the SHA-1 of what they hold, and its histories are not: what
    they say is proven by the segments that follow them."""

    def listing(self) -> Listing:
        """Everything that is there.

        Raises:
            OpsError, CommandFailed: it cannot be listed.
        """
        segments, histories = defaultdict[str, list[Stored]](list), dict[int, tuple[Stored, ...]]()
        for name, size in self.place.names().items():
            if not (match := _NAME.fullmatch(name)):
                continue
            if match["history"]:
                histories[int(match["history"], 16)] = (Stored(name, f"{match['history']}.history", "", size),)
            else:
                segments[match["segment"]].append(Stored(name, match["segment"], match["sha1"], size))
        return Listing({name: tuple(found) for name, found in segments.items()}, {}, histories)

    def get(self, stored: Stored) -> bytes:
        """A file's content, proven by the SHA-1 in its name.

        Raises:
            VerificationFailed: it is missing or altered.
            OpsError: it is packed by a method that is not read here.
        """
        match = _NAME.fullmatch(stored.name)
        packed = (match and match["packed"]) or ""
        if packed not in _UNPACK:
            raise OpsError(
                f"{stored.of} is packed by {packed}, which is not read here", "set compress-type=gz in pgbackrest.conf"
            )
        content = self.place.get(stored.name)
        try:
            found = _UNPACK[packed](content)
        except (OSError, EOFError, ValueError, zlib.error):
            found = b""
        if stored.sha256 and hashlib.sha1(found, usedforsecurity=False).hexdigest() != stored.sha256:
            raise VerificationFailed(
                f"{stored.of} in {self.place.where} is damaged: it is not what its SHA-1 says",
                "look for another copy: another repository of pgBackRest, the primary's pg_wal",
            )
        return found
