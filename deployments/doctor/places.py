"""Where reports and backups are written: rights, file systems, free space for a staged copy and for the retention."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from blocks.config.mistakes import KINDS, STORES
from blocks.environment import Environment
from blocks.places import Backups
from blocks.postgres.server import execute
from deployments.doctor.line import DoctorLine, expect, prefer
from flows.database.free_space import WAL_RATIO
from runbook.errors import OpsError
from runbook.units import size
from tasks.backups import catalogue
from tasks.host.disk import Disk, disk_of, is_here
from tasks.stores.store import store_of

KEPT = {"hours": 48, "daily": 30, "weekly": 8, "monthly": 12}
"""The retention where [backups] says none."""
_BYTES = "SELECT pg_database_size(%s)"


def look_at_places(env: Environment) -> Iterator[DoctorLine]:
    """Reports and backups can be written here, on which file system, and the newest backup's retention fits."""
    yield _writable("reports", env.reports_directory)
    for which in STORES:
        if env.has(which):
            yield from _stores(which, env.stores("backups" if which == "backups" else "copies"))
    if env.has("backups"):
        yield from _on_other_disk(env)
        if env.backups.recipients:
            yield expect(
                len(env.backups.recipients) > 1,
                "[backups] keys",
                "add a second, escrowed recipient: a lost key loses every backup",
            )


def _stores(which: str, stores: Backups) -> Iterator[DoctorLine]:
    places = {kind: str(getattr(stores, kind)) for kind in KINDS}
    for kind, place in places.items():
        if place and not place.startswith("s3://"):
            line = _writable(f"[{which}] {kind}", Path(place))
            yield line if kind in stores.model_fields_set else replace(line, otherwise="WARN")  # nobody named it
    if any(place.startswith("s3://") for place in places.values()):
        yield _writable(f"[{which}] spool", Path(stores.spool))


def _writable(what: str, path: Path) -> DoctorLine:
    """It, or what it will be made in."""
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    ok = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    where = f"on {_mount(there)}" if ok else "cannot be written"
    return expect(
        ok,
        f"{what} {path} {where}",
        f"{there} is not writable for this user: correct its owner or mode",
        "a directory that this user can write",
    )


def _mount(path: Path) -> str:
    found = path.resolve()
    while not os.path.ismount(found):
        found = found.parent
    return f"the file system {found}"


def _on_other_disk(env: Environment) -> Iterator[DoctorLine]:
    """A lost disk must not take the backups with the data."""
    if not env.has("postgres") or env.has("copies") or env.backups.survives or env.backups.postgres.startswith("s3://"):
        return
    if not is_here(env.postgres.host):
        return
    data, place = disk_of(Path(env.postgres.data_directory)), disk_of(Path(env.backups.postgres))
    apart = data.device != place.device
    yield prefer(
        apart,
        f"[backups] postgres is on {'another' if apart else 'the same'} file system as the database",
        "add [copies] in another place: a lost disk loses data and backups",
        "another one, or [copies]",
    )


def look_at_space(env: Environment) -> Iterator[DoctorLine]:
    """A restore builds a staged copy on the database's disk; backups pile up until the retention deletes them."""
    with env.postgres.connect() as connection:
        database_bytes = int(execute(connection, _BYTES, env.postgres.database)[0][0])
    needed = int(database_bytes * (1 + WAL_RATIO))
    data = Path(env.postgres.data_directory)
    if is_here(env.postgres.host) and data.exists():
        disk = disk_of(data)
        yield expect(
            disk.free_bytes > needed,
            f"free disk space for a staged copy of {env.postgres.database}: {size(disk.free_bytes)} at {data}",
            "free-disk-emergency shows what can be deleted",
            f"more than {size(needed)}, the database and its WAL",
        )
    else:
        yield prefer(
            False,
            f"free disk space for a staged copy is not checked: {env.postgres.host} is another host",
            f"check there that {size(needed)} are free",
            f"more than {size(needed)}",
        )
    if env.has("backups") and env.backups.postgres and not env.backups.postgres.startswith("s3://"):
        yield _retention(env, disk_of(Path(env.backups.postgres)), database_bytes)


def _retention(env: Environment, disk: Disk, database_bytes: int) -> DoctorLine:
    """By the newest backup, or by the database's size, which is more."""
    keep = getattr(env.backups, "keep", None)
    count = sum(getattr(keep, tier, amount) for tier, amount in KEPT.items())
    each, whose = database_bytes, "the database's size"
    with contextlib.suppress(OpsError):
        each, whose = (
            catalogue.find_backup(store_of(env, "postgres"), "postgres", failed_too=True).manifest.bytes,
            "the newest one's",
        )
    return prefer(
        disk.free_bytes > count * each,
        f"free disk space for {count} backups of the database: {size(disk.free_bytes)} at {disk.path}",
        "use a larger disk, s3://…, or a shorter [backups] keep",
        f"more than {size(count * each)} ({count} of {size(each)}, {whose})",
    )
