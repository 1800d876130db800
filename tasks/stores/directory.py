"""A directory of this host with one directory per backup.

A backup is written as `.partial-<environment>-<name>` and renamed when it is complete.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runbook.current import leaves, removed
from runbook.errors import OpsError, VerificationFailed
from runbook.failpoint import failpoint
from runbook.files import durable, inside
from runbook.units import size
from tasks.backups.encryption import NO_KEY, Key
from tasks.backups.manifest import MANIFEST, SEAL, FileSum, damage, text_in
from tasks.host.disk import disk_of

PARTIAL = ".partial-"
SENT = ".sent-"
BAD = ".bad-"
TRANSIT = ".transit-"
SETTLED_SECONDS = 2.0
"""Timestamps of files have steps: of a tick of the kernel, or of a second on some file systems."""


@dataclass(frozen=True)
class DirectoryStore:
    """A local store. Its spool is the store itself."""

    path: Path
    key: Key = field(default=NO_KEY)
    hand: Path | None = None

    @property
    def where(self) -> str:
        return str(self.path)

    @property
    def spool(self) -> Path:
        return self.path

    @property
    def hands(self) -> Path:
        return self.hand or self.path

    def names(self) -> list[str]:
        if not self.path.is_dir():
            return []
        with told(self.path):
            return [path.name for path in self.path.iterdir() if path.is_dir() and not path.name.startswith(".")]

    def stamps(self, folder: str) -> dict[str, str]:
        found = dict[str, str]()
        with told(self.path), contextlib.suppress(FileNotFoundError):
            for path in (self.path / folder).iterdir():
                with contextlib.suppress(FileNotFoundError):
                    known = path.stat()
                    found[path.name] = f"{known.st_mtime_ns} {known.st_size} {known.st_ino}"
        return found

    def read(self, path: str) -> str | None:
        try:
            return inside.read_text(self.path / path)
        except (OSError, UnicodeDecodeError):
            return None

    def identity(self, path: str) -> str | None:
        try:
            found = (self.path / path).lstat()
        except OSError:
            return None
        if time.time() - found.st_ctime < SETTLED_SECONDS:  # it may change again without its times changing
            return None
        return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"

    def write(self, path: str, text: str) -> None:
        target = self.path / path
        with told(target):
            target.parent.mkdir(exist_ok=True)
            durable.write(target, text)

    def claim(self, environment: str, name: str) -> bool:
        """The directory to write into is the reservation. Each environment makes its own before it looks for others and
        for the backup: of two in the same second, at most one gets the name."""
        mine = self.path / f"{PARTIAL}{environment}-{name}"
        with told(mine):
            try:
                mine.mkdir(mode=0o700)
            except FileExistsError:
                return False
            others = is_claimed(environment, name, (path.name for path in self.path.iterdir()))
            if others or (self.path / name).exists():  # in this order: a claim becomes the backup by a rename
                mine.rmdir()
                return False
        leaves(f"unfinished backup {mine}", "the next backup of this kind deletes it")
        return True

    def forget(self, path: str) -> None:
        with told(self.path / path):
            (self.path / path).unlink(missing_ok=True)

    def offer(self, directory: Path, name: str, files: Mapping[str, FileSum]) -> None:
        with told(directory):
            durable.sync_tree(directory)
            directory.rename(self.path / name)
            removed(f"unfinished backup {directory}")
            durable.sync(self.path)

    def receive(self, source: Path, name: str, environment: str, files: Mapping[str, FileSum]) -> None:
        if (self.path / name).exists():
            raise VerificationFailed(
                f"{self.path / name} exists and has no readable manifest", "move it out of the store"
            )
        directory = self.path / f"{PARTIAL}{environment}-{name}"
        shutil.rmtree(directory, ignore_errors=True)
        with told(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        needed, free = sum(file.bytes for file in files.values()), disk_of(self.path).free_bytes
        if free < needed:
            raise OpsError(
                f"{name} needs {size(needed)} in {self.path} and {size(free)} are free", "free disk space there"
            )
        with told(directory):
            _copy(source, directory, files)
        failpoint("receive: copied")

    def accept(self, source: Path, name: str, environment: str, files: Mapping[str, FileSum]) -> list[str]:
        if self.read(f"{name}/{MANIFEST}") == text_in(source):  # done before
            return []
        directory = self.path / f"{PARTIAL}{environment}-{name}"
        problems = damage(directory, files)
        problems += [f"{path} differs" for path in (MANIFEST, SEAL) if not _same(source / path, directory / path)]
        if problems:
            shutil.rmtree(directory, ignore_errors=True)
        else:
            self.offer(directory, name, files)
        return problems

    def local(self, name: str) -> Path | None:
        return self.path / name

    def fetch(self, name: str, files: Mapping[str, FileSum], target: Path) -> None:
        with told(target):
            _copy(self.path / name, target, files)

    def damage(self, name: str, files: Mapping[str, FileSum]) -> list[str]:
        return damage(self.path / name, files)

    def remove(self, environment: str, name: str) -> None:
        gone = self.path / f"{PARTIAL}{environment}-{name}"
        with told(self.path / name), contextlib.suppress(FileNotFoundError):  # done before
            (self.path / name).rename(gone)
            failpoint("prune: renamed")
            shutil.rmtree(gone)

    def keeps_deleted(self) -> bool:
        return False

    def unfinished(self, environment: str) -> list[str]:
        if not self.path.is_dir():
            return []
        with told(self.path):
            return begun_by(environment, sorted(path.name for path in self.path.iterdir()))

    def clean(self, environment: str, name: str) -> bool:
        directory = self.path / f"{PARTIAL}{environment}-{name}"
        shutil.rmtree(directory, ignore_errors=True)
        removed(f"unfinished backup {directory}")
        return True


def begun_by(environment: str, markers: Iterable[str]) -> list[str]:
    """The names of an environment's unfinished backups, from markers `.partial-<environment>-<name>`."""
    pattern = re.compile(rf"{re.escape(PARTIAL + environment)}-([a-z]+_\d{{8}}_\d{{6}})")
    return [match[1] for marker in markers if (match := pattern.fullmatch(marker))]


def is_claimed(environment: str, name: str, markers: Iterable[str]) -> bool:
    """Whether another environment has reserved a name. Each environment writes its own marker before it looks for
    others: so at least one of two sees the other's."""
    return any(
        marker.startswith(PARTIAL) and marker.endswith(f"-{name}") and marker != f"{PARTIAL}{environment}-{name}"
        for marker in markers
    )


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Translate errors of the file system into one sentence.

    Raises:
        OpsError: instead of every OSError.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or path
        hint = f"free disk space at {path.parent}, make it writable for this user, and check its disk"
        if error.strerror == inside.NOT_FOLLOWED:
            hint = f"delete the link. If it must stay, let root own it: chown --no-dereference root {where}"
        raise OpsError(f"{where}: {error.strerror or error}", hint) from None


def _copy(source: Path, target: Path, files: Iterable[str]) -> None:
    """Copy what a backup's manifest names, the manifest and its seal. Nothing else in its directory is opened."""
    for name in (*files, MANIFEST, SEAL):
        inside.make_directories((target / name).parent)
        inside.copy(source / name, target / name)


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and inside.read(one) == inside.read(other)
