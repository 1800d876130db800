"""What is known of each file of a directory, and how files on disk differ from it."""

from __future__ import annotations

import functools
import grp
import os
import pwd
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from runbook.errors import OTHER_BACKUPS, VerificationFailed
from tasks.backups.manifest import Manifest, sum_of

Kind = Literal["file", "directory", "symlink"]
SKIPPED_DIRECTORIES = ("__pycache__",)
MOST_DIFFERENCES = 50
"""More are counted, not listed."""


class ArchiveEntry(BaseModel):
    """One path below the directory (`.` is the directory itself). `mode` has permission bits only."""

    model_config = ConfigDict(frozen=True)
    path: str
    kind: Kind
    mode: int
    user: str
    group: str
    uid: int
    gid: int
    size: int = 0
    sha256: str = ""
    target: str = ""


class ArchivedFiles(BaseModel):
    """What an archive holds, what was left out by its nature, and what changed while it was read."""

    model_config = ConfigDict(frozen=True)
    directory: str
    entries: tuple[ArchiveEntry, ...]
    skipped: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Size of all files before compression."""
        return sum(entry.size for entry in self.entries)


def entries_of(manifest: Manifest) -> tuple[ArchiveEntry, ...]:
    """The entries that a backup's manifest names.

    Raises:
        VerificationFailed: they are not entries, one leads out of the directory, or they are no directory's.
    """
    try:
        entries = ArchivedFiles.model_validate(manifest.content).entries
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise VerificationFailed(f"the manifest of {manifest.name} lists no files: {where}", OTHER_BACKUPS) from None
    for entry in entries:
        require_inside(entry.path)
    if problems := root_problems(entries):
        raise VerificationFailed(f"{manifest.name} cannot be unpacked: {problems[0]}", OTHER_BACKUPS)
    return entries


def root_problems(entries: Sequence[ArchiveEntry]) -> list[str]:
    """What forbids to unpack entries at all: their root `.` must be a directory, not a link to one."""
    kind = next((entry.kind for entry in entries if entry.path == "."), "missing")
    return [] if kind == "directory" else [f"its root is no directory ({kind})"]


def walk(directory: Path) -> Iterator[Path]:
    """Everything below a directory, parents first, without what is made anew (`__pycache__`)."""
    with os.scandir(directory) as found:
        items = sorted(found, key=lambda item: item.name)
    for item in items:
        is_directory = item.is_dir(follow_symlinks=False)
        if is_directory and item.name in SKIPPED_DIRECTORIES:
            continue
        path = directory / item.name
        yield path
        if is_directory:
            yield from walk(path)


def compare(directory: Path, entries: Sequence[ArchiveEntry]) -> list[str]:
    """How files on disk differ from the entries, as sentences; empty when they are the same."""
    named = {entry.path: entry for entry in entries}
    paths = {".": directory} | {shown(path.relative_to(directory).as_posix()): path for path in walk(directory)}
    problems = [f"{path} is missing" for path in named if path not in paths]
    problems += [f"{path} is not in the manifest" for path in paths if path not in named]
    both = [(paths[path], entry) for path, entry in named.items() if path in paths]
    with ThreadPoolExecutor(max_workers=2) as pool:
        for found in pool.map(lambda pair: list(differences(*pair)), both):
            problems += found
    if len(problems) > MOST_DIFFERENCES:
        problems[MOST_DIFFERENCES:] = [f"and {len(problems) - MOST_DIFFERENCES} more differences"]
    return problems


def differences(path: Path, expected: ArchiveEntry) -> Iterator[str]:
    """Describe how an existing path differs from its entry."""
    found = path.lstat()
    actual, name = entry_of(expected.path, found, path), expected.path
    if actual is None or actual.kind != expected.kind:
        yield f"{name} is a {actual.kind if actual else special_name(found.st_mode)} instead of a {expected.kind}"
        return
    if actual.mode != expected.mode:
        yield f"{name} has mode {actual.mode:04o} instead of {expected.mode:04o}"
    if (actual.uid, actual.gid) != ids_of(expected):
        yield f"{name} belongs to {actual.user}:{actual.group} instead of {expected.user}:{expected.group}"
    if actual.target != expected.target:
        yield f"{name} leads to {actual.target} instead of {expected.target}"
    if expected.kind == "file":
        content = sum_of(path)
        if content.bytes != expected.size:
            yield f"{name} has {content.bytes} bytes instead of {expected.size}"
        elif content.sha256 != expected.sha256:
            yield f"{name} was altered: its SHA-256 differs"


def unknown_owners(entries: Sequence[ArchiveEntry]) -> list[str]:
    """Owners whom this host does not know by name: their files get the old host's numbers."""
    users = sorted({(e.user, e.uid) for e in entries if _user_number(e.user) is None})
    groups = sorted({(e.group, e.gid) for e in entries if _group_number(e.group) is None})
    return [f"there is no user {user} here: its files get the number {uid}" for user, uid in users] + [
        f"there is no group {group} here: its files get the number {gid}" for group, gid in groups
    ]


def leads_out(entries: Sequence[ArchiveEntry]) -> list[str]:
    """Links to somewhere outside the directory (a virtual environment's `python`): restored as they were."""
    links = [entry for entry in entries if entry.kind == "symlink"]
    ends = [os.path.normpath(PurePosixPath("/here", entry.path).parent / entry.target) for entry in links]
    pairs = zip(links, ends, strict=True)
    return [f"{e.path} leads out of the directory, to {e.target}" for e, end in pairs if not end.startswith("/here/")]


def shown(name: str) -> str:
    """A file's name as text: what is no UTF-8 in it is written as `\\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def require_inside(path: str) -> None:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or str(pure) != path:
        raise hostile(path, "leads out of the directory")


def hostile(path: str, why: str) -> VerificationFailed:
    return VerificationFailed(
        f"the archive is not this backup's: {path[:200]} {why}", "do not use it: it was forged or confused with another"
    )


def entry_of(name: str, found: os.stat_result, path: Path) -> ArchiveEntry | None:
    """A path's entry but for its content; None for sockets, devices and pipes."""
    kinds: dict[int, Kind] = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}
    kind = kinds.get(stat.S_IFMT(found.st_mode))
    if kind is None:
        return None
    return ArchiveEntry(
        path=name,
        kind=kind,
        mode=stat.S_IMODE(found.st_mode),
        user=_user_name(found.st_uid),
        group=_group_name(found.st_gid),
        uid=found.st_uid,
        gid=found.st_gid,
        target=shown(str(path.readlink())) if kind == "symlink" else "",
    )


def special_name(mode: int) -> str:
    names = {stat.S_IFSOCK: "socket", stat.S_IFIFO: "pipe", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
    return names.get(stat.S_IFMT(mode), "unknown kind of file")


def ids_of(entry: ArchiveEntry) -> tuple[int, int]:
    """The owner's numbers on this host: by name, or the old ones where the name is unknown."""
    user, group = _user_number(entry.user), _group_number(entry.group)
    return entry.uid if user is None else user, entry.gid if group is None else group


@functools.cache
def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@functools.cache
def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


@functools.cache
def _user_number(name: str) -> int | None:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


@functools.cache
def _group_number(name: str) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None
