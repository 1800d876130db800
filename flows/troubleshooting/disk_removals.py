"""What can be deleted without a decision: scratch directories, incomplete backups, old rotated logs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from blocks.environment import Environment
from flows.troubleshooting.file_systems import paths_of
from runbook.change import Carrier, Change
from runbook.errors import OpsError
from runbook.report import Report
from runbook.units import duration
from tasks.backups.manifest import Kind
from tasks.host import space
from tasks.host.disk import disk_of
from tasks.host.space import find_scratch, find_workers, remove_scratch, temporary_directory
from tasks.logs.reading.files import find_logs
from tasks.logs.rotation import cleaning
from tasks.stores.leftovers import REMOVE as UNFINISHED
from tasks.stores.leftovers import find_leftovers, remove_leftover
from tasks.stores.store import store_of

KINDS: tuple[Kind, ...] = ("postgres", "redis", "files", "cluster")
Removal = Change[[], bool]
"""The deletion of one path, which is its detail's beginning and its act's target."""


def find_removals(
    report: Report, env: Environment, devices: Collection[int], before: datetime, scratch_seconds: float
) -> list[Removal]:
    """Everything that can be deleted on these file systems, in the order of its deletion."""
    found = [*_scratch(report, env, scratch_seconds), *_unfinished(report, env), *_logs(report, env, before)]
    once = {path_of(one): one for one in found}  # kinds of backup may share a directory
    named = [path.absolute() for name, path in paths_of(env) if name != "temporary files"]
    return [one for path, one in once.items() if _is_on(path, devices) and not _contains(path, named)]


def path_of(removal: Removal) -> Path:
    """Return the path that it deletes."""
    (act,) = removal.acts
    return Path(act.target)


def _contains(doomed: Path, named: Sequence[Path]) -> bool:
    """Whether a path of the environment is inside: while its server is down, no process works there."""
    return any(path.is_relative_to(doomed.absolute()) for path in named)


def _is_on(path: Path, devices: Collection[int]) -> bool:
    try:
        return disk_of(path).device in devices
    except OpsError:
        return False


def _scratch(report: Report, env: Environment, min_seconds: float) -> Iterator[Removal]:
    parents = [temporary_directory()]
    if env.has("backups"):
        parents.append(Path(env.backups.spool))
    found = find_scratch(parents, min_seconds)
    for one in found:
        if not one.kept:
            yield Change(remove_scratch.bind(one, min_seconds), space.REMOVE, str(one.path), size=one.taken.bytes)
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
                yield Change(remove_leftover.bind(one), UNFINISHED, str(one.path), size=one.bytes)


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
            what = f"{one.path}, last written {age} ago"
            yield Change(cleaning.remove_log.bind(one, before), cleaning.REMOVE, what, size=one.bytes)


def _is_ours(path: Path) -> bool:
    """Whether this user owns it: then all processes that write it are visible."""
    with contextlib.suppress(OSError):
        return path.lstat().st_uid == os.geteuid()
    return False


def carry_out(report: Report, carry: Carrier, removals: Sequence[Removal]) -> list[Removal]:
    """Delete each; a failure is a WARN and does not stop the others. Returns the deleted ones."""
    removed: list[Removal] = []
    for one in removals:
        try:
            if carry(one):
                removed.append(one)
        except OpsError as error:
            report.warn(f"not deleted: {path_of(one)}", error.hint, value=error.message)
    if left := [str(path_of(one)) for one in removals if one not in removed]:
        report.fact("not deleted", ", ".join(left[:5]) + (" …" if len(left) > 5 else ""))
    return removed
