"""What this host's file system must permit before a data directory is replaced (§2.3)."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from blocks.redis.server import Redis
from blocks.services.service import Services
from runbook import shell
from runbook.errors import OpsError
from runbook.units import size
from tasks.host.disk import disk_of
from tasks.redis.server import answers, holders, live_directory
from tasks.redis.settings.file import read_configuration


@dataclass(frozen=True)
class Precondition:
    """One condition. `blocks` False: a recovery continues with a warning."""

    name: str
    ok: bool
    hint: str = ""
    value: str = ""
    expected: str = ""
    blocks: bool = True


def judge_place(block: Redis, copy_bytes: int, *, writes_configuration: bool) -> Iterator[Precondition]:
    """Whether a copy can be built next to the live directory, belong to the server's user, and replace it.
    `writes_configuration`: if the server is down and its file has replicaof, that line must be deleted."""
    live = live_directory(block)
    name = "the data directory can be swapped"
    if live.is_mount():
        yield Precondition(
            name, False, "set dir to a directory below it", f"{live} is a mount point: it cannot be renamed"
        )
        return
    parent = next(path for path in live.parents if path.exists())
    wrong = _unwritable(parent) or _unmovable(parent, live)
    yield Precondition(name, not wrong, f"run as root or give this user {parent}", wrong or f"{parent} writable")
    wrong = _owner(block.os_user)
    yield Precondition(
        "owner of the copy", not wrong, "correct [redis] os_user, or run as it or as root", wrong or block.os_user
    )
    if writes_configuration and (wrong := _configuration(block)):
        hint = f"run as root, give this user the file and its directory, or delete replicaof from {block.config_file}"
        yield Precondition("the configuration can be written", False, hint, wrong)
    disk = disk_of(live.parent)
    yield Precondition(
        "free space for the copy",
        disk.free_bytes > copy_bytes,
        f"free {size(copy_bytes - disk.free_bytes)} in {live.parent}: the old data is kept too",
        size(disk.free_bytes),
        f"more than {size(copy_bytes)}",
    )


def judge_stop(block: Redis, services: Services) -> Iterator[Precondition]:
    """Judge whether the service's stop ends every server that works in the live directory: not one started by hand."""
    if not services.is_here or "redis" not in services.names:  # `judge_roles` reports a missing one
        return
    others, state = holders(block, live_directory(block)), services.state("redis")
    if state.comes_back and not state.pid:
        return
    others = [one for one in others if psutil.pid_exists(one) and not _is_of(one, state.pid)]
    name, service = "its service stops the server", services.name_of("redis")
    if others:
        works = f"process {others[0]} works in {block.data_directory}, and is not one of the service {service}"
        yield Precondition(name, False, f"stop process {others[0]}, and start {service}", works)
    else:
        yield Precondition(name, True, value="yes, or it is stopped")


def _is_of(process: int, service: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return service in (process, *(parent.pid for parent in psutil.Process(process).parents()))
    return True  # it has ended


def _unwritable(directory: Path) -> str:
    return "" if os.access(directory, os.W_OK | os.X_OK) else f"{directory} not writable"


def _unmovable(parent: Path, live: Path) -> str:
    """In a directory with the sticky bit, only owners can rename (rename(2), EPERM)."""
    me = os.geteuid()
    owners = {0, parent.stat().st_uid, live.stat().st_uid if live.exists() else me}
    sticky = parent.stat().st_mode & stat.S_ISVTX and me not in owners
    return f"{parent} has the sticky bit, and {live} is another user's: it cannot be renamed" if sticky else ""


def _owner(user: str) -> str:
    """Why the server could not use the files that this process creates; "": it could."""
    me = os.geteuid()
    try:
        account, _ = shell.owner_of(user)
    except OpsError as error:
        return error.message
    return f"it would belong to {me}, and the server runs as {user}" if me not in (0, account) else ""


def _configuration(block: Redis) -> str:
    path = Path(block.config_file)
    try:
        follows = read_configuration(path).replica_of
    except OpsError:
        return ""  # reported elsewhere
    if not follows or answers(block):
        return ""
    unwritable = _unwritable(path.parent) or ("" if os.access(path, os.W_OK) else f"{path} not writable")
    return f"{unwritable}, and it has replicaof {follows}, which the server would follow" if unwritable else ""
