"""The files of a server's data directory, as it would load them, and the host that they are on (§2.3).

Read only where the server's own process is on this host: a path of the same name on another host proves nothing.
Multi-part AOF: https://valkey.io/topics/persistence/#how-it-works
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.host import disk_of
from tasks.redis.persistence.state import Persistence
from tasks.redis.settings.file import read_configuration
from tasks.redis.settings.recommended import DEFAULTS, normal

OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TEMPORARY = re.compile(r"temp-(?:rewriteaof-bg-|rewriteaof-)?(\d+)\.(?:rdb|aof)$")
ATTEMPTS = 5


@dataclass(frozen=True)
class DataFile:
    """One file. `bytes` is -1 where it is missing, `modified` then None."""

    name: str
    what: str
    bytes: int = -1
    modified: datetime | None = None

    @property
    def is_missing(self) -> bool:
        """Whether it is named, and not there."""
        return self.bytes < 0


@dataclass(frozen=True)
class Place:
    """Where a server saves. With a `problem` nothing of it could be read. `trouble` and `remedy` say why no save can
    succeed there, "" where none is known; `sizes` are in bytes, and `huge_pages` "" where the host does not say."""

    directory: Path
    problem: str = ""
    trouble: str = ""
    remedy: str = ""
    free_bytes: int = 0
    rdb: DataFile = DataFile("", "RDB")
    aof: tuple[DataFile, ...] = ()
    remains: tuple[DataFile, ...] = ()
    overcommit: str = ""
    huge_pages: str = ""

    @property
    def missing(self) -> tuple[DataFile, ...]:
        """Files of the AOF that its manifest names, or the manifest itself, that are not there."""
        return tuple(file for file in self.aof if file.is_missing)


@probe
def read_place(server: Persistence) -> Place:
    """The data directory, its files, its disk, and what the kernel allows. Never raises: `problem` says why not."""
    return look_at(server)


def look_at(server: Persistence) -> Place:
    """See `read_place`."""
    directory, problem = _find(server)
    if problem:
        return Place(directory, problem, *trouble_with(server, directory) if not server.settings["dir"] else ())
    kernel = _text(OVERCOMMIT), _chosen(_text(HUGE_PAGES))
    trouble, remedy = trouble_with(server, directory)
    if not directory.is_dir():
        return Place(directory, "", trouble, remedy, overcommit=kernel[0], huge_pages=kernel[1])
    try:
        return Place(
            directory, "", trouble, remedy, disk_of(directory).free_bytes,
            file_at(directory / server.settings["dbfilename"], "RDB"),
            aof_files(directory, server.settings), tuple(_remains(directory)), *kernel,
        )  # fmt: skip
    except PermissionError as error:
        return Place(directory, f"{error.filename} cannot be read by this user: run as root or as the server's user")


def trouble_with(server: Persistence, directory: Path) -> tuple[str, str]:
    """Why a save cannot succeed in a directory, and what to do; ("", "") where nothing is found.

    A server that stands in a removed one never comes back to it: `dir` cannot be set at run time.
    """
    rescue = f"rescue the data over the network first (valkey-cli --rdb <file>), then make {directory} and start anew"
    if (not server.settings["dir"] and directory.is_dir()) or _stands_elsewhere(server.process, directory):
        return f"{directory} was made anew: the server still stands in the one that was removed", rescue
    if not directory.is_dir():
        return f"its directory {directory} is gone", rescue
    if os.statvfs(directory).f_flag & os.ST_RDONLY:
        return f"{directory} is mounted read-only", "look at dmesg for the disk's errors, then mount it read-write"
    with contextlib.suppress(psutil.Error, OSError):
        process = psutil.Process(server.process)
        if not _may_write(directory, process):
            owner = f"chown {process.username()} {directory} && chmod u+rwx {directory}"
            return f"{process.username()}, who runs the server, cannot write to {directory}", owner
    target = directory / server.settings["dbfilename"]
    if target.is_dir():
        return f"{target} is a directory", "move it away: the server saves to a file of that name"
    return "", ""


def read_manifest(path: Path) -> dict[str, str]:
    """File → type (`b` base, `i` increment, `h` history) of an AOF's manifest.

    Raises:
        OpsError: a line cannot be understood: the server would not start with it either.
    """
    found = {}
    for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        try:
            words = shlex.split(line)
            pairs = dict(zip(words[::2], words[1::2], strict=True))
            found[pairs["file"]] = pairs["type"]
        except (ValueError, KeyError):
            raise OpsError(f"{path} cannot be understood: {line[:80]!r}", "restore the last backup") from None
    return found


def aof_files(directory: Path, settings: Mapping[str, str]) -> tuple[DataFile, ...]:
    """The manifest and what it names; nothing where there is no AOF at all. A rewrite that ends in between is read
    again: it replaces the manifest first and then removes what is no longer named."""
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


@probe
def read_written(server: Persistence, defaults: Mapping[str, str] = DEFAULTS) -> tuple[dict[str, str], str]:
    """The settings of the configuration file, with the server's defaults where it names none; or {} and why not."""
    return find_written(server, defaults)


def find_written(server: Persistence, defaults: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """See `read_written`."""
    if not server.config_file:
        return {}, "the server was started without a configuration file"
    if problem := _find(server)[1]:
        return {}, problem
    try:
        found = read_configuration(Path(server.config_file))
    except OpsError as error:
        return {}, error.message
    named = {name: normal(name, found.get(name, default)) for name, default in defaults.items()}
    return {**named, "save": _saves(found.files)}, ""


def _saves(files: tuple[Path, ...]) -> str:
    """All `save` lines together: each adds to those before, `save ""` takes them away."""
    rules: list[str] = []
    named = False
    for line in (line for path in files for line in path.read_text(errors="replace").splitlines()):
        with contextlib.suppress(ValueError):
            words = shlex.split(line, comments=False)
            if words and words[0].lower() == "save":
                named, values = True, [word for word in words[1:] if word]
                rules = [*rules, *values] if values else []
    return " ".join(rules) if named else DEFAULTS["save"]


def _find(server: Persistence) -> tuple[Path, str]:
    """The data directory, and why its files cannot be seen from here: "" where the server's process is here and works
    in there (or worked, until it was removed)."""
    told = Path(server.settings["dir"] or "(removed)")
    said = f"{told} of {server.address} is not on this host"
    try:
        process = psutil.Process(server.process)
        if not any(word in process.name() for word in ("redis", "valkey")):
            return told, said
        works_in = Path(process.cwd().removesuffix(" (deleted)"))
        if not server.settings["dir"]:
            return works_in, ""
        return told, "" if works_in == told.resolve() else said
    except psutil.AccessDenied:
        return told, "" if told.is_dir() else said
    except psutil.Error:
        return told, said


def _stands_elsewhere(process: int, directory: Path) -> bool:
    """Whether the server's working directory is another one than what has its name now."""
    try:
        return not Path(f"/proc/{process}/cwd").samefile(directory)
    except OSError:
        return False


def _may_write(directory: Path, process: psutil.Process) -> bool:
    """By the mode's bits: what POSIX ACLs add is not seen."""
    user, found = process.uids().effective, directory.stat()
    if user == 0:
        return True
    text = _text(Path(f"/proc/{process.pid}/status"))
    groups = re.search(r"^Groups:[ \t]*(.*)$", text, re.MULTILINE)
    member = {process.gids().effective, *(int(word) for word in (groups[1].split() if groups else ()))}
    if found.st_uid == user:
        needed = stat.S_IWUSR | stat.S_IXUSR
    else:
        needed = stat.S_IWGRP | stat.S_IXGRP if found.st_gid in member else stat.S_IWOTH | stat.S_IXOTH
    return found.st_mode & needed == needed


def _remains(directory: Path) -> Iterator[DataFile]:
    """Files of saves whose process is gone."""
    for path in sorted(directory.glob("temp-*")):
        found = _TEMPORARY.match(path.name)
        if found and not psutil.pid_exists(int(found[1])):
            yield file_at(path, "left by a save that was killed")


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _chosen(text: str) -> str:
    """`always [madvise] never` → madvise."""
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else ""
