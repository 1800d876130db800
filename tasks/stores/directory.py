"""A directory of this host with one directory per backup.

A backup is written under `.partial-<environment>-<name>` and offered by rename: what has no such prefix is whole.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runbook.errors import OpsError, VerificationFailed
from runbook.failpoint import failpoint
from runbook.render import size
from tasks.encryption import NO_KEY, Key
from tasks.host import disk_of
from tasks.manifest import FileSum, damage

PARTIAL = ".partial-"
SENT = ".sent-"
BAD = ".bad-"


@dataclass(frozen=True)
class DirectoryStore:
    """A local store: what is made in it is in it already."""

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
        return [path.name for path in self.path.iterdir() if path.is_dir() and not path.name.startswith(".")]

    def read(self, path: str) -> str | None:
        try:
            return (self.path / path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None

    def write(self, path: str, text: str) -> None:
        target = self.path / path
        beside = target.with_name(f".{target.name}.new")
        try:
            target.parent.mkdir(exist_ok=True)
            beside.write_text(text, encoding="utf-8")
            sync(beside)
            beside.replace(target)
        except OSError as error:
            raise OpsError(f"{target} could not be written: {error.strerror}", f"make {self.path} writable") from None

    def claim(self, environment: str, name: str) -> bool:
        """The directory to write into is the claim: whoever made his sees the other's."""
        mine = self.path / f"{PARTIAL}{environment}-{name}"
        try:
            mine.mkdir(mode=0o700)
        except FileExistsError:
            return False
        others = [path.name for path in self.path.glob(f"{PARTIAL}*-{name}") if path != mine]
        if (self.path / name).exists() or yields(environment, name, others):
            mine.rmdir()
            return False
        return True

    def forget(self, path: str) -> None:
        (self.path / path).unlink(missing_ok=True)

    def offer(self, directory: Path, name: str, files: Mapping[str, FileSum]) -> None:
        for path in directory.rglob("*"):
            sync(path)
        sync(directory)
        directory.rename(self.path / name)
        sync(self.path)

    def receive(self, source: Path, name: str, environment: str, files: Mapping[str, FileSum]) -> None:
        if (self.path / name).exists():
            raise VerificationFailed(f"{self.path / name} is there and has no readable manifest", "move it away")
        directory = self.path / f"{PARTIAL}{environment}-{name}"
        shutil.rmtree(directory, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        needed, free = sum(file.bytes for file in files.values()), disk_of(self.path).free_bytes
        if free < needed:
            raise OpsError(f"{name} needs {size(needed)} in {self.path} and {size(free)} are free", "make room there")
        shutil.copytree(source, directory)
        failpoint("receive: copied")
        if problems := damage(directory, files):
            raise VerificationFailed(f"{name}: {problems[0]}", "see which of the two stores has altered it")
        self.offer(directory, name, files)

    def local(self, name: str) -> Path | None:
        return self.path / name

    def fetch(self, name: str, files: Mapping[str, FileSum], target: Path) -> None:
        shutil.copytree(self.path / name, target)

    def damage(self, name: str, files: Mapping[str, FileSum]) -> list[str]:
        return damage(self.path / name, files)

    def remove(self, environment: str, name: str) -> None:
        gone = self.path / f"{PARTIAL}{environment}-{name}"
        with contextlib.suppress(FileNotFoundError):  # done before
            (self.path / name).rename(gone)
            failpoint("prune: renamed")
            shutil.rmtree(gone)

    def keeps_deleted(self) -> bool:
        return False

    def unfinished(self, environment: str) -> list[str]:
        if not self.path.is_dir():
            return []
        return begun_by(environment, sorted(path.name for path in self.path.iterdir()))

    def clean(self, environment: str, name: str) -> bool:
        shutil.rmtree(self.path / f"{PARTIAL}{environment}-{name}", ignore_errors=True)
        return True


def begun_by(environment: str, markers: Iterable[str]) -> list[str]:
    """The names of the backups that an environment began, of markers `.partial-<environment>-<name>`."""
    pattern = re.compile(rf"{re.escape(PARTIAL + environment)}-([a-z]+_\d{{8}}_\d{{6}})")
    return [match[1] for marker in markers if (match := pattern.fullmatch(marker))]


def yields(environment: str, name: str, markers: Iterable[str]) -> bool:
    """Whether an environment leaves a name to another one that takes it in the same second. Each makes its marker
    first, then looks for others': one of them sees both at least, and both decide alike."""
    ending = f"-{name}"
    others = {marker.removeprefix(PARTIAL).removesuffix(ending) for marker in markers if marker.endswith(ending)}
    return any(other < environment for other in others - {environment})


def sync(path: Path) -> None:
    """Everything of a file or directory is on disk when this returns."""
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
