"""Free disk space for a staged copy, called with the open report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from blocks.environment import Environment
from runbook.next import Next
from runbook.report import Report
from runbook.units import size
from tasks.host.disk import Disk, disk_of, disk_on

# Measured: a restore writes WAL of 0.86 of the database's size.
WAL_RATIO = 0.86


def judge_room(
    report: Report,
    env: Environment,
    data_bytes: int,
    wal_bytes: int,
    why: str,
    *,
    absent: bool = False,
    here: Mapping[Path, int] = {},
) -> None:
    """Free disk space for the data and for its WAL. `absent`: the data directory is missing and will be created.
    `here`: bytes that the run needs on its own host, by path.

    On another host, or without read permission, it cannot be measured: a WARN.
    """
    data = Path(env.postgres.data_directory)
    found, needed = dict[int, Disk](), dict[int, int]()
    for path, much in ((data, data_bytes), (data / "pg_wal", wal_bytes), *here.items()):
        disk = disk_of(path) if path in here else disk_on(env.postgres.host, data.parent if absent else path)
        if disk:
            found.setdefault(disk.device, disk)
            needed[disk.device] = needed.get(disk.device, 0) + much
        else:
            hint = f"check by hand that {size(much)} are free there"
            value = "not measured: the path is on another host, or this user cannot read it"
            report.warn(f"free space at {path}", hint, value=value, expected=f"more than {size(much)}: {why}")
    for device, disk in found.items():
        report.require(
            f"free space at {disk.path}",
            disk.free_bytes > needed[device],
            f"free {size(needed[device] - disk.free_bytes)} there",
            value=size(disk.free_bytes),
            expected=f"more than {size(needed[device])}: {why}",
            follow=[Next("discard-superseded", "delete the databases that earlier restores replaced")],
        )
