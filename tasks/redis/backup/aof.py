"""The files of an AOF: several with a manifest since Redis 7, or one file of older versions.

A server that loads an AOF truncates an incomplete command or transaction at its end, and reports that only in its log.
Here the number of bytes is reported. https://valkey.io/topics/persistence/#append-only-file
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import redis

from blocks.redis.server import Redis
from runbook.errors import OTHER_BACKUPS, VerificationFailed
from runbook.files import inside
from tasks.redis.backup.snapshot import readable
from tasks.redis.line import log_of
from tasks.redis.scratch import scratch_server

FOLDER, STEM = "appendonlydir", "appendonly.aof"
MANIFEST_ENDING = ".manifest"
BASE, INCREMENT, HISTORY = "b", "i", "h"
PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class AofPart:
    """One file of an AOF. Only its first `bytes` are used: a server keeps appending to the last file."""

    path: Path
    kind: str
    number: int
    bytes: int


@dataclass(frozen=True)
class Aof:
    """The files of an AOF: a base (an RDB, or commands) and the increments, in order."""

    parts: tuple[AofPart, ...]

    @property
    def bytes(self) -> int:
        """The bytes of all parts."""
        return sum(part.bytes for part in self.parts)

    @property
    def written(self) -> datetime:
        """The time of the last append."""
        return datetime.fromtimestamp(max(part.path.stat().st_mtime for part in self.parts), UTC)

    @property
    def base(self) -> AofPart | None:
        """The base."""
        return next((part for part in self.parts if part.kind == BASE), None)


def read_aof(path: Path) -> Aof:
    """The parts of an AOF: of a directory with one manifest, or a single file.

    Raises:
        VerificationFailed: it is incomplete: no manifest, a missing part, or only one part of several.
    """
    if not path.is_dir():
        if re.search(r"\.(incr\.aof|base\.(aof|rdb))$", path.name) and ".incr." in path.name:
            raise VerificationFailed(f"{path.name} is only one file of an AOF", f"name its directory: {path.parent}")
        return Aof((AofPart(path, BASE, 1, path.stat().st_size),))
    manifests = sorted(path.glob(f"*{MANIFEST_ENDING}"))
    if len(manifests) != 1:
        raise VerificationFailed(
            f"{path} has {len(manifests)} manifests of an AOF instead of one",
            f"name an appendonlydir with its {STEM}{MANIFEST_ENDING}, or a single file",
        )
    found = read_parts(manifests[0])
    if found.base is None:
        raise VerificationFailed(
            f"{manifests[0].name} names no base: the data before {found.parts[0].path.name} is missing",
            f"add an existing base to the manifest (file NAME seq 1 type b); otherwise {OTHER_BACKUPS}",
        )
    return found


def read_parts(manifest: Path) -> Aof:
    """The parts that a manifest names, without the history files.

    Raises:
        VerificationFailed: it is no manifest, or a part is missing.
    """
    parts = []
    with readable(manifest):
        text = inside.read_text(manifest, "surrogateescape")
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        fields = dict(zip(words[::2], words[1::2], strict=False))
        if not words:
            continue
        if not {"file", "seq", "type"} <= fields.keys():
            raise VerificationFailed(f"{manifest.name} is no manifest of an AOF: {line[:80]!r}", OTHER_BACKUPS)
        if fields["type"] == HISTORY:
            continue
        path = manifest.parent / fields["file"]
        try:
            parts.append(AofPart(path, fields["type"], int(fields["seq"]), path.stat().st_size))
        except FileNotFoundError:
            raise VerificationFailed(
                f"{path.name}, which {manifest.name} names, is missing",
                f"{OTHER_BACKUPS}: this one was copied during a rewrite",
            ) from None
    if not parts:
        raise VerificationFailed(f"{manifest.name} names no file", OTHER_BACKUPS)
    return Aof(tuple(parts))


def copy_aof(aof: Aof, directory: Path) -> None:
    """Copy the used bytes of an AOF's parts, with a manifest, to `directory/appendonlydir`."""
    folder = directory / FOLDER
    folder.mkdir(mode=0o700)
    lines = []
    for part in aof.parts:
        with readable(part.path):
            ending = "base.aof" if part.kind == BASE and not _is_rdb(part.path) else "base.rdb"
            name = f"{STEM}.{part.number}.{ending if part.kind == BASE else 'incr.aof'}"
            _copy(part, folder / name)
        lines.append(f"file {name} seq {part.number} type {part.kind}\n")
    (folder / f"{STEM}{MANIFEST_ENDING}").write_text("".join(lines), encoding="utf-8")


def _copy(part: AofPart, target: Path) -> None:
    left = part.bytes
    with inside.reading(part.path) as file, target.open("wb") as out:
        if left == part.path.stat().st_size and left > PIECE_BYTES:
            shutil.copyfileobj(file, out, PIECE_BYTES)
            out.truncate(left)  # it can have grown meanwhile
        while out.tell() < left and (piece := file.read(min(PIECE_BYTES, left - out.tell()))):
            out.write(piece)
    target.chmod(0o600)
    if target.stat().st_size != left:
        raise VerificationFailed(f"{part.path.name} has less than {left:,} bytes", "run it again")


def _is_rdb(path: Path) -> bool:
    with inside.reading(path) as file:
        return file.read(6).startswith((b"REDIS", b"VALKEY"))


@contextlib.contextmanager
def loaded_aof(block: Redis, directory: Path, rdb: str) -> Iterator[redis.Redis]:
    """A scratch server that loaded the AOF in `directory/appendonlydir` (a copy, to which it writes) and saves to `rdb`
    in `directory`.

    Raises:
        VerificationFailed: it cannot be loaded; the message is the server's own reason.
    """
    with scratch_server(block, directory, appendonly=True, rdb=rdb, aof=(FOLDER, STEM)) as client:
        yield client


def cut_bytes(client: redis.Redis, aof: Aof) -> int:
    """How many bytes of an incomplete command a scratch server truncated when it loaded the AOF."""
    found = re.search(r"Truncating the AOF(?: \S+)? at offset (\d+)", log_of(client))
    return aof.parts[-1].bytes - int(found[1]) if found else 0
