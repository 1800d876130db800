"""The newest data of a directory: its AOF or its RDB, judged by the files, not by the configuration file.

The AOF can have been switched on or off at run time. Then the configuration file names a form that the server no longer
wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil

from runbook.errors import VerificationFailed
from tasks.redis.backup.aof import MANIFEST_ENDING, read_parts
from tasks.redis.backup.rdb import read_rdb
from tasks.redis.settings.file import Configuration

HOST_FAILURE = timedelta(seconds=30)
"""The kernel writes data back after that time (vm.dirty_expire_centisecs)."""


@dataclass(frozen=True)
class NewestData:
    """`written`: of an AOF, its last append; of an RDB, the start of its save. It has nothing that is newer."""

    is_aof: bool
    written: datetime

    @property
    def complete_until(self) -> datetime:
        """Until when it has every write. What an AOF got just before its host failed may not have reached the disk."""
        has_failed = self.is_aof and self.written < datetime.fromtimestamp(psutil.boot_time(), UTC)
        return self.written - HOST_FAILURE if has_failed else self.written


def find_newest(configuration: Configuration, directory: Path) -> NewestData:
    """The newest data in a data directory: an RDB started after the AOF's last append includes it.

    Raises:
        VerificationFailed: there is none, or the AOF is incomplete.
    """
    manifest, rdb = aof_manifest(directory, configuration), directory / configuration.rdb
    has_rdb = rdb.is_file() and rdb.stat().st_size > 0
    if not manifest.is_file():
        if not has_rdb:
            raise VerificationFailed(f"{directory.name} has no data", "name another with `kept`, or restore a backup")
        return NewestData(False, read_rdb(rdb).written)
    appended = read_parts(manifest).written
    if not has_rdb:
        return NewestData(True, appended)
    started = read_rdb(rdb).written
    if started <= appended < started + timedelta(seconds=1):  # an RDB has only its start, in whole seconds
        is_aof = configuration.appendonly or rdb.stat().st_mtime < appended.timestamp()
    else:
        is_aof = started < appended
    return NewestData(is_aof, appended if is_aof else started)


def aof_manifest(directory: Path, configuration: Configuration) -> Path:
    """The manifest of the AOF in a data directory."""
    folder, stem = configuration.aof
    return directory / folder / f"{stem}{MANIFEST_ENDING}"
