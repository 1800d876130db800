"""What can be deleted without a decision: scratch directories, incomplete backups, old rotated logs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from blocks.environment import Environment
from flows.troubleshooting.file_systems import paths_of
from runbook.errors import OpsError
from runbook.guard.permit import Act, Permit
from runbook.report import Report
from runbook.units import duration
from tasks.backups.manifest import Kind
from tasks.host import space
from tasks.host.disk import disk_of
from tasks.host.space import Scratch, find_scratch, find_workers, remove_scratch, temporary_directory
from tasks.logs.reading.files import LogFile, find_logs
from tasks.logs.rotation import cleaning
from tasks.stores.leftovers import REMOVE as UNFINISHED
from tasks.stores.leftovers import StoreLeftover, find_leftovers, remove_leftover
from tasks.stores.store import store_of

KINDS: tuple[Kind, ...] = ("postgres", "redis", "files", "cluster")
Order = Literal["scratch", "unfinished", "log"]


@dataclass(frozen=True)
class Removal:
    """One path to delete. `thing` is the argument of its action."""

    order: Order
    act: Act
    detail: str
    bytes: int
    thing: Scratch | StoreLeftover | LogFile


def find_removals(
    report: Report, env: Environment, devices: Collection[int], before: datetime, scratch_seconds: float
) -> list[Removal]:
    """Everything that can be deleted on these file systems, in the order of its deletion."""
    found = [*_scratch(report, env, scratch_seconds), *_unfinished(report, env), *_logs(report, env, before)]
    once = {one.act: one for one in found}  # kinds of backup may share a directory
    named = [path.absolute() for name, path in paths_of(env) if name != "temporary files"]
    return [one for one in once.values() if _is_on(one, devices) and not _contains(Path(one.act.target), named)]


def _contains(doomed: Path, named: Sequence[Path]) -> bool:
    """Whether a path of the environment is inside: while its server is down, no process works there."""
    return any(path.is_relative_to(doomed.absolute()) for path in named)


def _is_on(one: Removal, devices: Collection[int]) -> bool:
    try:
        return disk_of(Path(one.act.target)).device in devices
    except OpsError:
        return False


def _scratch(report: Report, env: Environment, min_seconds: float) -> Iterator[Removal]:
    parents = [temporary_directory()]
    if env.has("backups"):
        parents.append(Path(env.backups.spool))
    found = find_scratch(parents, min_seconds)
    for one in found:
        if not one.kept:
            yield Removal("scratch", Act(space.REMOVE, str(one.path)), str(one.path), one.taken.bytes, one)
    kept = [(str(one.path), one.kept) for one in found if one.kept]
    if kept:
        report.table("Scratch directories that are kept", ("directory", "why"), kept)


def _unfinished(report: Report, env: Environment) -> Iterator[Removal]:
    """Of this environment only: this run holds its lock, so no backup of it is running."""
    for which in ("backups", "copies"):
        if not env.has(which):
            continue
        for kind in KINDS:
            try:
                spool = store_of(env, kind, which).spool
                found = find_leftovers(spool, env.name)
            except OpsError as error:
                report.warn(f"not checked: {which} {kind}", error.hint, value=error.message)
                continue
            used = find_workers([one.path for one in found])
            for one in (one for one in found if one.path not in used):
                yield Removal("unfinished", Act(UNFINISHED, str(one.path)), str(one.path), one.bytes, one)


def _logs(report: Report, env: Environment, before: datetime) -> Iterator[Removal]:
    if not env.has("logs"):
        return
    log = Path(env.logs.need("app"))
    try:
        old = [one for one in find_logs(log) if one.path != log and one.modified < before]
    except OpsError as error:
        report.warn("not checked: logs", error.hint, value=error.message)
        return
    holders = cleaning.read_holders(old)
    if used := [one.path.name for one in old if one.inode in holders.by_inode]:
        report.warn(
            "rotated logs that are still open",
            "make their process reopen its log: only then is their space free",
            value=", ".join(used[:5]),
        )
    unknown = [] if holders.whole else [one for one in old if not _is_ours(one.path)]
    if unknown:
        report.warn(
            "rotated logs that may be open",
            "run it as root, or as the user that writes them: this user cannot inspect the processes of others",
            value=", ".join(one.path.name for one in unknown[:5]),
        )
    for one in old:
        if one.inode not in holders.by_inode and one not in unknown:
            age = duration((report.started - one.modified).total_seconds())
            act = Act(cleaning.REMOVE, str(one.path))
            yield Removal("log", act, f"{one.path}, last written {age} ago", one.bytes, one)


def _is_ours(path: Path) -> bool:
    """Whether this user owns it: then all processes that write it are visible."""
    with contextlib.suppress(OSError):
        return path.lstat().st_uid == os.geteuid()
    return False


def carry_out(
    report: Report, permit: Permit, removals: list[Removal], before: datetime, scratch_seconds: float
) -> list[Removal]:
    """Delete each as a separate step; a failure is a WARN and does not stop the others. Returns the deleted ones."""
    removed: list[Removal] = []
    for one in removals:
        try:
            if _remove(permit, one, before, scratch_seconds):
                removed.append(one)
        except OpsError as error:
            report.warn(f"not deleted: {one.act.target}", error.hint, value=error.message)
    if left := [one.act.target for one in removals if one not in removed]:
        report.fact("not deleted", ", ".join(left[:5]) + (" …" if len(left) > 5 else ""))
    return removed


def _remove(permit: Permit, one: Removal, before: datetime, scratch_seconds: float) -> bool:
    match one.thing:
        case Scratch():
            return bool(remove_scratch(permit, [one.thing], scratch_seconds))
        case StoreLeftover():
            return remove_leftover(permit, one.thing)
        case LogFile():
            return bool(cleaning.remove_logs(permit, [one.thing], before))
