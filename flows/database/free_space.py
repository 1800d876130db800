"""Whether what a run builds fits beside the live data, called with the open report."""

from __future__ import annotations

from pathlib import Path

from blocks.environment import Environment
from runbook.report import Report
from runbook.units import size
from tasks.host.disk import Disk, disk_on

# recovery-rules: a restore writes WAL of 0.86 of the database's size.
WAL_RATIO = 0.86


def judge_room(
    report: Report, env: Environment, data_bytes: int, wal_bytes: int, why: str, *, absent: bool = False
) -> None:
    """Free space where the data is and where its WAL is. `absent`: the data directory is gone, and will be made anew.

    What this host cannot see (the server is another, the directory is closed to this user) is not measured: a WARN.
    """
    data = Path(env.postgres.data_directory)
    found, needed = dict[int, Disk](), dict[int, int]()
    for path, much in ((data, data_bytes), (data / "pg_wal", wal_bytes)):
        disk = disk_on(env.postgres.host, data.parent if absent else path)
        if disk:
            found.setdefault(disk.device, disk)
            needed[disk.device] = needed.get(disk.device, 0) + much
        else:
            hint = f"look there yourself: {size(much)} are needed; this host, or this user, cannot see it"
            report.warn(f"free space at {path}", hint, value="not measured")
    for device, disk in found.items():
        report.require(
            f"free space at {disk.path}",
            disk.free_bytes > needed[device],
            f"free {size(needed[device] - disk.free_bytes)} there (discard-superseded removes old databases)",
            value=size(disk.free_bytes),
            expected=f"more than {size(needed[device])}: {why}",
        )
