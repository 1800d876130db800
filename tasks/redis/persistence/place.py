"""A server's data directory, whether a save can succeed there, and the kernel's settings (§2.3).

It is read only if the server's process is on this host: the same path on another host proves nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import psutil

from runbook import clock
from runbook.errors import VerificationFailed
from runbook.kinds import probe
from tasks.host.disk import disk_of
from tasks.redis.backup.rdb import read_rdb
from tasks.redis.persistence.files import ATTEMPTS, NO_RDB, DataFile, aof_files, file_at, remains_in
from tasks.redis.persistence.state import Persistence

OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
SLACK_SECONDS = 2.0
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class DataDirectory:
    """A server's data directory. `problem`: why it could not be read. `trouble`, `remedy`: why no save can succeed
    there, and the next step. `rdb_problem`: why the RDB is not the last save. `huge_pages` "": unknown."""

    directory: Path
    problem: str = ""
    trouble: str = ""
    remedy: str = ""
    free_bytes: int = 0
    rdb: DataFile = NO_RDB
    rdb_problem: str = ""
    aof: tuple[DataFile, ...] = ()
    remains: tuple[DataFile, ...] = ()
    overcommit: str = ""
    huge_pages: str = ""

    @property
    def missing(self) -> tuple[DataFile, ...]:
        """Missing files of the AOF, or its missing manifest."""
        return tuple(file for file in self.aof if file.is_missing)


@probe
def read_place(server: Persistence) -> DataDirectory:
    """The data directory, its files, its disk, and what the kernel allows. Never raises: `problem` says why not."""
    return inspect_place(server)


def inspect_place(server: Persistence) -> DataDirectory:
    """See `read_place`."""
    directory, problem = data_directory(server)
    if problem:
        return DataDirectory(directory, problem, *trouble_with(server, directory) if not server.settings["dir"] else ())
    kernel = _text(OVERCOMMIT), _chosen(_text(HUGE_PAGES))
    trouble, remedy = trouble_with(server, directory)
    if not directory.is_dir():
        return DataDirectory(directory, "", trouble, remedy, overcommit=kernel[0], huge_pages=kernel[1])
    try:
        return DataDirectory(
            directory,
            "",
            trouble,
            remedy,
            disk_of(directory).free_bytes,
            *_rdb(server, directory / server.settings["dbfilename"]),
            aof_files(directory, server.settings),
            tuple(remains_in(directory)),
            *kernel,
        )
    except PermissionError as error:
        return DataDirectory(
            directory, f"{error.filename} cannot be read by this user: run as root or as the server's user"
        )


def _rdb(server: Persistence, path: Path) -> tuple[DataFile, str]:
    """The file, and why it is not the last save. Only its beginning and end are read; loading it proves the rest."""
    for _ in range(ATTEMPTS):
        file = file_at(path, "RDB")
        if file.is_missing or path.is_dir():
            return file, ""
        try:
            found = read_rdb(path)
        except VerificationFailed as error:
            return file, error.message
        if file == file_at(path, "RDB"):  # otherwise it was replaced meanwhile
            break
    if not found.complete:
        return file, f"{path} does not end as an RDB does: it is truncated, or has bytes after its end"
    # The file has the time at which its save began, `last_save` the time at which one ended; a SAVE's duration is
    # unknown.
    last, written = server.state.last_save, found.written.timestamp() + max(server.state.save_seconds, 0)
    replaced = file.modified is None or abs(file.modified.timestamp() - last) > SLACK_SECONDS
    if not server.never_saved and last > written + SLACK_SECONDS and replaced:
        return (
            file,
            f"{path} is of {clock.text(found.written)}, before the last save: it was replaced by hand",
        )
    return file, ""


def trouble_with(server: Persistence, directory: Path) -> tuple[str, str]:
    """Why a save cannot succeed in a directory, and the next step; ("", ""): no problem found.

    A server cannot leave a deleted directory: `dir` cannot be set at run time.
    """
    rescue = f"save the data over the network first (valkey-cli --rdb <file>), then create {directory} and restart"
    if (not server.settings["dir"] and directory.is_dir()) or _works_elsewhere(server.process, directory):
        return f"{directory} was deleted and created again: the server still uses the deleted one", rescue
    if not directory.is_dir():
        return f"its directory {directory} is missing", rescue
    if os.statvfs(directory).f_flag & os.ST_RDONLY:
        return f"{directory} is mounted read-only", "check dmesg for disk errors, then mount it read-write"
    with contextlib.suppress(psutil.Error, OSError):
        process = psutil.Process(server.process)
        if not _may_write(directory, process):
            owner = f"chown {process.username()} {directory} && chmod u+rwx {directory}"
            return f"{process.username()}, the server's user, cannot write to {directory}", owner
    target = directory / server.settings["dbfilename"]
    if target.is_dir():
        return f"{target} is a directory", "rename it: the server saves to a file of that name"
    return "", ""


def data_directory(server: Persistence) -> tuple[Path, str]:
    """The data directory, and why its files are not on this host; "": the server's process is here and works in it (or
    did until it was deleted)."""
    directory = Path(server.settings["dir"] or "(removed)")
    said = f"{directory} of {server.address} is not on this host"
    try:
        process = psutil.Process(server.process)
        if not any(word in process.name() for word in ("redis", "valkey")):
            return directory, said
        works_in = Path(process.cwd().removesuffix(" (deleted)"))
        if not server.settings["dir"]:
            return works_in, ""
        return directory, "" if works_in == directory.resolve() else said
    except psutil.AccessDenied:
        return directory, "" if directory.is_dir() else said
    except psutil.Error:
        return directory, said


def _works_elsewhere(process: int, directory: Path) -> bool:
    """Whether the server's working directory differs from the directory that has its name now."""
    try:
        return not Path(f"/proc/{process}/cwd").samefile(directory)
    except OSError:
        return False


def _may_write(directory: Path, process: psutil.Process) -> bool:
    """Whether the mode's bits permit it; POSIX ACLs are not read."""
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


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _chosen(text: str) -> str:
    """`always [madvise] never` → madvise."""
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else ""
