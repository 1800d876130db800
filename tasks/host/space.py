"""Use of disk space: directory trees by their blocks, and scratch directories that dead runs left."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.kinds import action, probe

REMOVE = "remove scratch directory"
# Of tempfile.mkdtemp in tasks and flows. Worktrees are git's, and `sweep` of tasks.application.worktree removes them.
PREFIXES = (
    "ops-pg-",
    "ops-wal-",
    "ops-redis-",
    "ops-catalog-",
    "ops-audit-",
    "ops-pnpm-",
    "ops-pip-",
    "ops-release-",
    "ops-tsc-",
    "ops-logs-",
    "ops-logrotate-",
    "ops-gx-",
)


@dataclass(frozen=True)
class TakenSpace:
    """Bytes on disk below a path. `whole`: everything below it could be read."""

    bytes: int
    newest: float
    whole: bool


@dataclass(frozen=True)
class Scratch:
    """A scratch directory of a run. `kept`: why it is not deleted; "": it can be deleted."""

    path: Path
    inode: int
    taken: TakenSpace
    kept: str


def temporary_directory() -> Path:
    """The directory for temporary files. tempfile.gettempdir() names another one if it is full."""
    return Path(tempfile.tempdir or os.environ.get("TMPDIR") or "/tmp")  # noqa: S108 - read only


def taken_by(path: Path, seconds: float = math.inf) -> TakenSpace:
    """Measure a tree on one file system, without mounts below it. Links are not followed, no file is opened. It stops
    after `seconds`."""
    end = time.monotonic() + seconds
    try:
        top = path.lstat()
    except OSError:
        return TakenSpace(0, 0.0, whole=not path.exists())
    total, newest, whole = top.st_blocks * 512, top.st_mtime, True
    waiting = [path] if stat.S_ISDIR(top.st_mode) else []
    while waiting:
        if time.monotonic() > end:
            return TakenSpace(total, newest, whole=False)
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError:
            whole = False
            continue
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                if found.st_dev == top.st_dev:
                    total, newest = total + found.st_blocks * 512, max(newest, found.st_mtime)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
    return TakenSpace(total, newest, whole)


@probe
def measure_trees(paths: Sequence[Path], seconds: float = math.inf) -> dict[Path, TakenSpace]:
    """Bytes on disk below each path; 0 if it is missing. A tree that takes longer than `seconds` is not `whole`."""
    return {path: taken_by(path, seconds) for path in paths}


@probe
def find_scratch(parents: Sequence[Path], min_seconds: float) -> tuple[Scratch, ...]:
    """Scratch directories in `parents`. One can be deleted if nothing in it is younger, and no process uses it."""
    found = [path for parent in parents for path in _candidates(parent)]
    held = find_workers(found)
    return tuple(_scratch(path, held, min_seconds) for path in found)


def _candidates(parent: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(parent), key=lambda one: one.name):
            if entry.name.startswith(PREFIXES) and entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)


def _scratch(path: Path, held: dict[Path, str], min_seconds: float) -> Scratch:
    taken = taken_by(path)
    why = held.get(path, "")
    age = time.time() - taken.newest
    if not why and age < min_seconds:
        why = f"written to {age:.0f} s ago"
    if not why and not taken.whole:
        why = "not all of it can be read"
    with contextlib.suppress(OSError):
        owner = path.lstat()
        if not why and os.geteuid() not in (0, owner.st_uid):
            why = "another user's"
        return Scratch(path, owner.st_ino, taken, why)
    return Scratch(path, 0, taken, "deleted already")


def find_workers(paths: Sequence[Path]) -> dict[Path, str]:
    """The processes that use them: as working directory, in arguments, or by open files. A server outlives its run."""
    held: dict[Path, str] = {}
    texts = {str(path): path for path in paths}
    for process in psutil.process_iter(["pid", "name"]) if texts else ():
        for place in _places(process.pid):
            for text, path in texts.items():
                if place == text or f"{text}/" in place or place.endswith(text):
                    held.setdefault(path, f"process {process.pid} ({process.info['name']}) uses it")
    return held


def _places(pid: int) -> Iterable[str]:
    root, found = Path(f"/proc/{pid}"), list[str]()
    if pid == os.getpid():
        return found
    with contextlib.suppress(OSError):
        found += (root / "cmdline").read_bytes().decode(errors="replace").split("\0")
    with contextlib.suppress(OSError):
        found.append(str((root / "cwd").readlink()))
    with contextlib.suppress(OSError):
        for handle in os.scandir(root / "fd"):
            with contextlib.suppress(OSError):
                found.append(str(Path(handle.path).readlink()))
    return found


@action(of=lambda one: Act(REMOVE, str(one.path)), idempotent=True)
def remove_scratch(one: Scratch, min_seconds: float) -> bool:
    """Delete it, after another check. Returns True if it no longer exists.

    Raises:
        OpsError: it cannot be removed.
    """
    again = _scratch(one.path, find_workers([one.path]), min_seconds)
    if again.kept not in ("", "deleted already") or again.inode not in (0, one.inode):
        return False
    try:
        shutil.rmtree(one.path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OpsError(f"{one.path} cannot be removed: {error.strerror}", "check its permissions") from None
    return True
