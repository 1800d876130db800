"""The files in a server's data directory that a start would load (§2.3).

Multi-part AOF: https://valkey.io/topics/persistence/#how-it-works
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from runbook.errors import OpsError
from runbook.files import inside

_TEMPORARY = re.compile(r"temp-(?:rewriteaof-bg-|rewriteaof-)?(\d+)\.(?:rdb|aof)$")
ATTEMPTS = 5


@dataclass(frozen=True)
class DataFile:
    """One file. `bytes` -1 and `modified` None: it is missing."""

    name: str
    what: str
    bytes: int = -1
    modified: datetime | None = None

    @property
    def is_missing(self) -> bool:
        """Whether a manifest or setting names it, but it does not exist."""
        return self.bytes < 0


NO_RDB = DataFile("", "RDB")


def read_manifest(path: Path) -> dict[str, str]:
    """File → type (`b` base, `i` increment, `h` history) of an AOF's manifest.

    Raises:
        OpsError: a line is invalid; the server would not start with it either.
    """
    found = {}
    for line in inside.read_text(path, "surrogateescape").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        try:
            words = shlex.split(line)
            pairs = dict(zip(words[::2], words[1::2], strict=True))
            found[pairs["file"]] = pairs["type"]
        except (ValueError, KeyError):
            raise OpsError(f"{path} is not a valid manifest: {line[:80]!r}", "restore the last backup") from None
    return found


def aof_files(directory: Path, settings: Mapping[str, str]) -> tuple[DataFile, ...]:
    """The manifest and the files that it names; empty if there is no AOF. A rewrite replaces the manifest and then
    deletes old files, so they are read again if one ends meanwhile."""
    folder = directory / settings["appenddirname"]
    manifest = folder / f"{settings['appendfilename']}.manifest"
    for _ in range(ATTEMPTS):
        if not manifest.is_file():
            old = directory / settings["appendfilename"]
            parts = sorted(folder.glob("*.aof*")) if folder.is_dir() else []
            if not parts and old.is_file():
                return (file_at(old, "AOF of before version 7"),)
            return (DataFile(str(manifest), "AOF manifest"),) if parts else ()
        try:
            named = read_manifest(manifest)
        except OpsError as error:
            return (DataFile(error.message, "AOF manifest"),)
        kinds = {"b": "AOF base", "i": "AOF increment"}
        files = [file_at(folder / name, kinds[kind]) for name, kind in named.items() if kind in kinds]
        if not any(file.is_missing for file in files):
            break
    return (file_at(manifest, "AOF manifest"), *files)


def file_at(path: Path, what: str) -> DataFile:
    """One file, missing or not."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return DataFile(str(path), what)
    return DataFile(str(path), what, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))


def remains_in(directory: Path) -> Iterator[DataFile]:
    """Files of saves whose process no longer exists."""
    for path in sorted(directory.glob("temp-*")):
        found = _TEMPORARY.match(path.name)
        if found and not psutil.pid_exists(int(found[1])):
            yield file_at(path, "file of a killed save")
