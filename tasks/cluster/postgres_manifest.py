"""PostgreSQL's manifest of a base backup, and the comparison of files with it.

https://www.postgresql.org/docs/current/backup-manifest-format.html
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from blocks.postgres.server import Postgres
from runbook import shell
from runbook.errors import CommandFailed, VerificationFailed
from runbook.files import inside

MANIFEST = "backup_manifest"
CONTROL = "global/pg_control"
# As pg_verifybackup: PostgreSQL or its administrator may add these.
_ADDED = frozenset(
    {MANIFEST, "postgresql.auto.conf", "recovery.signal", "standby.signal", "backup_label.old", "tablespace_map.old"}
)
WAL_FOLDER = "pg_wal/"


@dataclass(frozen=True)
class WalRange:
    """The WAL that a backup needs, on one timeline."""

    timeline: int
    start: str
    end: str


@dataclass(frozen=True)
class PostgresManifest:
    """The files with their bytes and SHA-256, and the WAL. `system`: 0 before PostgreSQL 17."""

    files: dict[str, tuple[int, str]] = field(repr=False)
    wal: tuple[WalRange, ...]
    system: int

    @classmethod
    def parse(cls, content: bytes) -> PostgresManifest:
        """Read it, and compare it with its own checksum in the last line.

        Raises:
            VerificationFailed: it is damaged or incomplete.
        """
        try:
            found = json.loads(content)
            covered = content[: content.rindex(b"\n", 0, len(content) - 1) + 1]
            if hashlib.sha256(covered).hexdigest() != found["Manifest-Checksum"]:
                raise VerificationFailed(f"{MANIFEST} is damaged: its checksum differs", "run it again")
            files = {str(one["Path"]): (int(one["Size"]), str(one["Checksum"])) for one in found["Files"]}
            if any(one["Checksum-Algorithm"] != "SHA256" for one in found["Files"]):
                raise VerificationFailed(f"{MANIFEST} has checksums other than SHA-256", "run it again")
            ranges = (
                WalRange(int(one["Timeline"]), str(one["Start-LSN"]), str(one["End-LSN"]))
                for one in found["WAL-Ranges"]
            )
            return cls(files, tuple(ranges), int(found.get("System-Identifier", 0)))
        except (ValueError, KeyError, TypeError) as error:
            raise VerificationFailed(f"{MANIFEST} cannot be read: {error!r}", "run it again") from None

    @classmethod
    def read(cls, directory: Path) -> PostgresManifest:
        """Read the one in a directory.

        Raises:
            VerificationFailed: it is missing, damaged or incomplete.
        """
        try:
            return cls.parse(inside.read(directory / MANIFEST))
        except OSError as error:
            raise VerificationFailed(f"{MANIFEST} cannot be read: {error.strerror}", "run it again") from None

    @property
    def bytes(self) -> int:
        """The bytes of all files."""
        return sum(size for size, _ in self.files.values())


@dataclass
class FileComparison:
    """The files of a backup as they are read, to be compared with PostgreSQL's manifest."""

    found: dict[str, tuple[int, str]] = field(default_factory=dict)
    control: bytes = b""

    def add(self, name: str, size: int, digest: str) -> None:
        """Record a file. WAL is not in the manifest: pg_waldump reads it."""
        if not name.startswith(WAL_FOLDER):
            self.found[name] = (size, digest)

    def problem(self, manifest: PostgresManifest) -> str:
        """The first difference; "" if there is none: a missing file, an unknown one, another size or SHA-256, another
        cluster."""
        for name, wanted in manifest.files.items():
            if name.startswith(WAL_FOLDER):  # of archived segments the status, of no other use
                continue
            if name not in self.found:
                return f"{name} is missing"
            if self.found[name] != wanted:
                return f"{name} differs from {MANIFEST}"
        if unknown := self.found.keys() - manifest.files.keys() - _ADDED:
            return f"{min(unknown)} is not in {MANIFEST}"
        if manifest.system and self.control and struct.unpack_from("<Q", self.control)[0] != manifest.system:
            return f"{CONTROL} is from another cluster"
        return ""


def verify_wal(postgres: Postgres, wal: Path, ranges: Collection[WalRange]) -> None:
    """Read the WAL that a backup needs with pg_waldump, as pg_verifybackup does.

    Raises:
        CommandFailed: it is incomplete or damaged.
        OpsError: pg_waldump is not installed.
    """
    for one in ranges:
        argv = [postgres.program("pg_waldump"), "--quiet", f"--path={wal}", f"--timeline={one.timeline}"]
        try:
            shell.run([*argv, f"--start={one.start}", f"--end={one.end}"], environment={"LC_ALL": "C"})
        except CommandFailed as error:
            if error.exit_code < 0:
                raise
            raise VerificationFailed(f"the WAL of the backup cannot be read: {error.message}", "run it again") from None
