"""The gate before the application's live files are replaced.

The application is stopped; then the files that were changed since are counted, and compared with what was confirmed. A
run that would lose more ends here, with nothing replaced. The plan counts in the same way, before the stop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Literal

from blocks.environment import Environment
from flows.loss import planned_loss_of, require_confirmed
from runbook import clock, metrics
from runbook.errors import OpsError
from runbook.guard.loss import Loss
from runbook.report import Report
from runbook.units import counted, first_of
from tasks.application.files import directory_of
from tasks.application.live_files import LiveFiles, read_changes, read_live_files
from tasks.backups.catalogue import Backup
from tasks.host.services import read_services

PART = "the files"
FilesSource = Literal["auto", "backup", "live"]
USERS = ("backend", "frontend")
"""The services that use the application's directory."""
TICK = timedelta(milliseconds=100)
"""A file's time can lag behind the clock by a tick of the kernel (10 ms at most on Linux)."""
Changes = Callable[[Path], Mapping[str, datetime]]
"""Reads the changes of a live directory that the other one lacks: each file's, with its time."""


def changes_since(backup: Backup) -> Changes:
    """The changes that a restore of `backup` loses."""
    return partial(read_changes, backup=backup)


def planned_loss_since(env: Environment, backup: Backup) -> Loss:
    """The changes so far that a restore of `backup` loses."""
    return planned_loss(directory_of(env.application), changes_since(backup), backup.manifest.taken)


def planned_loss(directory: Path, changes: Changes, since: datetime | None) -> Loss:
    """The changes so far. `since`: the time of the data that replaces the directory: where nothing can be counted,
    everything after it is lost."""
    as_of = clock.now() - TICK
    found = _counted(directory, changes, Loss(PART, as_of=as_of))
    if not found.unknown:
        return replace(found, later=0, as_of=as_of)
    return Loss.everything_since(PART, since, None, "changed file") if since else found


def pass_files(report: Report, env: Environment, directory: Path, changes: Changes) -> Loss:
    """Let other files pass to the swap, which follows at once: with the application stopped, and no more changes lost
    than were confirmed. Returns the loss.

    Raises:
        LossExceeded: more would be lost. Nothing was replaced.
        OpsError: the application was started again.
    """
    loss = measured_loss(report, directory, changes)
    require_confirmed(report, loss)
    states = read_services(env.services, env.services_in(USERS)) if env.has("services") else None
    if states and states.wanted:
        raise OpsError(
            f"{', '.join(states.wanted)} was started again after this run had stopped it",
            "find out what starts it, and run this again; no file was replaced",
        )
    return loss


def measured_loss(report: Report, directory: Path | None, changes: Changes) -> Loss:
    """The changes in a directory that is not live any more, or that nobody writes to. A plan that counted none because
    nothing could be read keeps its word."""
    planned = planned_loss_of(report, PART)
    if planned.since or planned.unknown or directory is None:
        return planned
    return _counted(directory, changes, planned)


def _counted(directory: Path, changes: Changes, planned: Loss) -> Loss:
    try:
        found = changes(directory)
    except (OpsError, OSError) as error:
        return Loss.not_known(PART, f"{directory} cannot be read: {error}")
    times = sorted(found.values())
    first, last = (times[0], times[-1]) if times else (None, None)
    later = sum(planned.as_of is not None and at > planned.as_of for at in times)
    return Loss(PART, len(times), "changed file", first=first, last=last, later=later)


def choose_live_files(
    report: Report, env: Environment, backup: Backup, source: FilesSource, *, latest: bool
) -> LiveFiles | None:
    """The live files, if they stay: they are intact, or a person wants them. None: the backup is restored.

    A file that users deleted is no damage; it is named. A directory that lost all its files is, and so is a share above
    `backup.shrunk_ratio` of the backup's paths."""
    if source == "backup" or (source == "auto" and not latest):
        return None
    found = read_live_files(env.application, backup)
    missing = [f"{len(found.missing):,} of {found.entries:,} paths are missing: {first_of(found.missing)}"] * bool(
        found.missing
    )
    emptied = found.emptied or len(found.missing) > report.limit(metrics.BACKUP_SHRUNK)[0] * found.entries
    expected = f"every entry of {backup.name}"
    if (found.problems or emptied) and source == "auto":
        hint = "nothing to do: this run restores the backup. files_source=live keeps the live files instead"
        report.warn("live files", hint, value="; ".join([*found.problems[:3], *missing]), expected=expected)
        return None
    if found.problems or missing:
        hint = "files_source=backup restores the backup; or copy single files out of it after this run"
        report.warn("live files", hint, value="; ".join([*found.problems[:3], *missing]), expected=expected)
    else:
        report.passed("live files intact", value=expected, expected="none missing or altered")
    since = f"{counted(len(found.written), 'path')} written since" if found.written else "none was written since"
    report.fact(
        "files backup",
        f"{backup.name}: not needed, the live files are kept ({since}); files_source=backup restores it",
    )
    report.table("Live files written since their backup", ("path",), [(path,) for path in found.written], most=50)
    return found
