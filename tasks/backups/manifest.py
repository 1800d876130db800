"""The manifest of a backup, written once: every file with its size and SHA-256, and the content by kind."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sized
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_serializer

from runbook.errors import OTHER_BACKUPS, VerificationFailed
from runbook.files import inside

Kind = Literal["postgres", "schema", "tables", "sql", "redis", "files", "cluster", "prefect"]
MANIFEST = "manifest.json"
SEAL = "manifest.json.sha256"
CHUNK_BYTES = 1 << 20


class FileSum(BaseModel):
    """A file of a backup."""

    model_config = ConfigDict(frozen=True)
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """A backup's manifest. `taken` is the moment of its snapshot; `content` is typed by its kind's own module.

    `files` are the files as they are stored. Where those are encrypted, to `recipients`, `clear` are the same files in
    clear.
    """

    model_config = ConfigDict(frozen=True)
    kind: Kind
    name: str
    environment: str
    taken: datetime
    seconds: float
    host: str
    tool: str
    files: dict[str, FileSum]
    content: dict[str, Any]
    clear: dict[str, FileSum] = {}
    recipients: tuple[str, ...] = ()

    @property
    def readable_files(self) -> dict[str, FileSum]:
        """The files that a restore reads, in clear."""
        return self.clear or self.files

    @property
    def bytes(self) -> int:
        """Size of the backup on disk, without its manifest."""
        return sum(file.bytes for file in self.files.values())

    @property
    def is_encrypted(self) -> bool:
        """Whether its files are stored encrypted."""
        return bool(self.clear)

    def whole(self) -> Manifest:
        """With its files and content, as a restore needs it."""
        return self


LONG = ("files", "content", "clear")
SHORT_ENTRIES = 5000


class Head(BaseModel):
    """What a listing shows of a long manifest. `content` is None where it is long too."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Kind
    name: str
    environment: str
    taken: datetime
    seconds: float
    host: str
    tool: str
    recipients: tuple[str, ...]
    content: dict[str, Any] | None
    bytes: int
    is_encrypted: bool
    seal: str

    @classmethod
    def of(cls, manifest: Manifest, seal: str) -> Head:
        """Of a manifest and its seal."""
        entries = sum(len(value) for value in manifest.content.values() if isinstance(value, Sized))
        shown = {name: getattr(manifest, name) for name in cls.model_fields if name not in ("content", "seal")}
        return cls(**shown, content=manifest.content if entries <= SHORT_ENTRIES else None, seal=seal)


class Listed(Manifest):
    """A manifest in a listing: `files`, `clear` and a long `content` are read again each time they are used. Of ten
    thousand tables they take some 26 MB of memory, and a store has a thousand backups.

    It cannot be copied or written: `whole` can.
    """

    _read: Callable[[], Manifest] = PrivateAttr()
    _head: Head = PrivateAttr()

    @classmethod
    def of(cls, head: Head, read: Callable[[], Manifest]) -> Listed:
        """`read` reads the manifest again, or raises."""
        listed = cls.model_construct(**{name: getattr(head, name, None) for name in Manifest.model_fields})
        for name in LONG:
            if name != "content" or head.content is None:
                del listed.__dict__[name]
        listed._read, listed._head = read, head
        return listed

    def whole(self) -> Manifest:
        """With its files and content, read from the store.

        Raises:
            VerificationFailed: it is missing, altered, or not the manifest that was listed.
        """
        manifest = self._read()
        if Head.of(manifest, self._head.seal) != self._head:
            raise VerificationFailed(f"{self.name} is not the backup that was listed", "run it again")
        return manifest

    @property
    def bytes(self) -> int:
        return self._head.bytes

    @property
    def is_encrypted(self) -> bool:
        return self._head.is_encrypted

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return getattr(self.whole(), name) if name in LONG else super().__getattr__(name)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Listed):
            return self._head.seal == other._head.seal
        return self.whole() == other

    __hash__ = None  # type: ignore[assignment]

    @model_serializer(mode="plain")
    def _refuse(self) -> Any:
        raise TypeError("a listed manifest is incomplete: write whole()")


def files_in(directory: Path) -> Iterator[Path]:
    """Every file below a backup's directory but the manifest and its seal."""
    for path in sorted(directory.rglob("*")):
        if not path.is_dir() and path.relative_to(directory).as_posix() not in (MANIFEST, SEAL):
            yield path


def sum_of(path: Path) -> FileSum:
    """Size and SHA-256 of a file, read in chunks."""
    digest, size = hashlib.sha256(), 0
    with inside.reading(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileSum(bytes=size, sha256=digest.hexdigest())


def sums_of(directory: Path) -> dict[str, FileSum]:
    """Size and SHA-256 of every file of a backup, on two threads (hashing releases the interpreter's lock)."""
    paths = list(files_in(directory))
    with ThreadPoolExecutor(max_workers=2) as pool:
        sums = pool.map(sum_of, paths)
        return {path.relative_to(directory).as_posix(): found for path, found in zip(paths, sums, strict=True)}


def text_in(directory: Path) -> str:
    """The manifest's text as it stands in a directory.

    Raises:
        VerificationFailed: it is not there, or cannot be read.
    """
    try:
        return inside.read_text(directory / MANIFEST)
    except (OSError, UnicodeDecodeError):
        raise VerificationFailed(f"{directory.name} has no readable manifest", OTHER_BACKUPS) from None


def seal_of(text: str) -> str:
    """The seal of a manifest's text, as `sha256sum` writes it."""
    return f"{hashlib.sha256(text.encode()).hexdigest()}  {MANIFEST}\n"


def text_of(manifest: Manifest) -> str:
    """A manifest as it is written."""
    return manifest.model_dump_json(indent=1) + "\n"


def write(directory: Path, manifest: Manifest) -> None:
    """Write manifest and seal: last of all, so that a backup without them was never finished."""
    text = text_of(manifest)
    (directory / MANIFEST).write_text(text, encoding="utf-8")
    (directory / SEAL).write_text(seal_of(text), encoding="utf-8")


def read(directory: Path) -> Manifest:
    """Read a manifest from a directory and check its seal; see `parse`."""
    try:
        text = inside.read_text(directory / MANIFEST)
        seal = inside.read_text(directory / SEAL)
    except (OSError, UnicodeDecodeError):
        return parse(directory.name, None, None)
    return parse(directory.name, text, seal)


def parse(name: str, text: str | None, seal: str | None) -> Manifest:
    """The manifest of the backup `name`, its seal checked.

    Raises:
        VerificationFailed: it is missing (None), altered, not a manifest, or names what lies outside of its backup.
    """
    if text is None or seal is None:
        raise VerificationFailed(f"{name} has no readable manifest", OTHER_BACKUPS)
    if seal != seal_of(text):
        raise VerificationFailed(f"the manifest of {name} was altered", OTHER_BACKUPS)
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise VerificationFailed(f"the manifest of {name} is not one: {where}", OTHER_BACKUPS) from None
    if manifest.name != name:
        raise VerificationFailed(
            f"{name} has the manifest of {manifest.name}",
            f"do not use it: it was confused with another; {OTHER_BACKUPS}",
        )
    for path in (*manifest.files, *manifest.clear, manifest.environment):  # all of them become paths
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or str(pure) != path or "\0" in path:
            raise VerificationFailed(
                f"the manifest of {name} names “{path[:200]}”, which is outside the backup",
                "do not use it: it was forged or confused with another",
            )
    return manifest


def damage(directory: Path, files: Mapping[str, FileSum], *, only: Collection[str] | None = None) -> list[str]:
    """Every way in which a backup's files differ from their sums, as sentences; empty when it is whole. One that the
    disk does not give back is one of them. `only`: the names of files that are judged; other files are not read."""
    if only is None:
        paths = {path.relative_to(directory).as_posix(): path for path in files_in(directory)}
    else:  # a few of many: the others are not even listed
        paths = {name: path for name in only if os.path.lexists(path := directory / name)}
        files = {name: files[name] for name in only}
        real = directory.resolve()
        if outside := [name for name, path in paths.items() if path.parent.resolve() != (real / name).parent]:
            return [f"{outside[0]} is not in a directory of the backup"]
    for path in paths.values():
        if path.is_symlink() or not path.is_file():
            return [f"{path.name} is not a plain file"]
    problems = [f"{name} is missing" for name in files if name not in paths]
    problems += [f"{name} is not in the manifest" for name in paths if name not in files]
    both = [name for name in files if name in paths]
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = pool.map(lambda name: _difference(name, paths[name], files[name]), both)
        return problems + [difference for difference in found if difference]


def _difference(name: str, path: Path, expected: FileSum) -> str:
    try:
        actual = sum_of(path)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    if actual.bytes != expected.bytes:
        return f"{name} has {actual.bytes} bytes instead of {expected.bytes}"
    return "" if actual == expected else f"{name} was altered: its SHA-256 differs"
