"""A disk of 12 MB that is full to its last byte, and what free-disk-emergency makes of it, as JSON:

    unshare -rm python -m tests.troubleshooting.full_disk DIRECTORY

It is mounted in this process's own namespace: nobody else sees it, and it is gone with the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flows.troubleshooting.disk import free_disk_emergency
from runbook.errors import RunbookFailed
from runbook.page.render import markdown
from runbook.report import Report
from tests.fixtures.servers import free_port

MB = 1 << 20
TOML = """
name = "full"
disposable = true
reports = "{base}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[postgres]
port = {port}
database = "grc_db"
user = "grc_user"
password_env = "FULL_PASSWORD"
admin_password_env = "FULL_PASSWORD"
data_directory = "{base}/pg"
[redis]
port = {port}
data_directory = "{base}/tmp/ops-redis-ours/data"
[services]
kind = "supervisor"
names = {{}}
[backups]
postgres = "{base}/backups/postgresql"
redis = "{base}/backups/redis"
files = "{base}/backups/files"
cluster = "{base}/backups/cluster"
wal = "{base}/backups/wal"
spool = "{base}/spool"
[logs]
app = "{base}/log/app.log"
"""
FILES = {
    "pg/pg_wal/000000010000000000000001": 0,
    "log/app.log": 0,
    "log/app.log.1": 10 * 86_400,
    "log/app.log.2": 20 * 86_400,
    "log/app.log.3": 86_400,
    "backups/postgresql/.partial-full-postgres_20260101_000000/toc.dat": 86_400,
    "backups/postgresql/.partial-other-postgres_20260101_000000/toc.dat": 86_400,
    "backups/redis/.partial-full-redis_20260101_000000/dump.rdb": 86_400,
    "tmp/ops-redis-ours/data/dump.rdb": 7200,
    "tmp/ops-wal-dead/segment": 7200,
    "tmp/ops-pg-live/postmaster.pid": 7200,
    "tmp/ops-pip-young/wheel": 10,
}
"""Path → its age in seconds; half a megabyte each. A process has app.log.2 and the dump of the backup of Redis open, another
works in ops-pg-live, and ops-redis-ours is what the environment names as the data of its Redis, which is down."""


HELD = ("log/app.log.2", "backups/redis/.partial-full-redis_20260101_000000/dump.rdb")


def seed(base: Path) -> None:
    """Everything, and then zeros until there is no byte left."""
    for name in FILES:
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (MB // 2))
    for name, age in FILES.items():
        for path in (base / name, *(parent for parent in (base / name).parents if parent.name.startswith("ops-"))):
            os.utime(path, (time.time() - age,) * 2)
    with contextlib.suppress(OSError), (base / "fill").open("wb", buffering=0) as file:
        while file.write(b"0" * 4096):
            pass


def fill_inodes(base: Path) -> None:
    """pg_wal on a file system of its own, with bytes left and not one inode."""
    place = base.parent / "wal"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m,nr_inodes=20", "tmpfs", place], check=True)
    with contextlib.suppress(OSError):
        for number in range(30):
            (place / f"{number:024X}").write_bytes(b"x" * 4096)
    (base / "pg/pg_wal").rename(base / "pg/before")
    (base / "pg/pg_wal").symlink_to(place)


def run(confirm: str) -> Report:
    """The report, critical or not."""
    try:
        return free_disk_emergency.fn(environment="full", confirm=confirm)
    except RunbookFailed as error:
        return error.report


def told(report: Report, base: Path) -> dict[str, Any]:
    """What the test looks at."""
    free = os.statvfs(base)
    return {
        **report.as_json(),
        "status": report.status.value,
        "page": markdown(report),
        "written": bool(report.path and report.path.exists()),
        "left": sorted(name for name in FILES if (base / name).exists()),
        "free": free.f_bavail * free.f_frsize,
    }


def main(directory: str) -> None:
    """See above."""
    base = Path(directory) / "disk"
    base.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", base], check=True)
    toml = Path(directory) / "full.toml"
    toml.write_text(TOML.format(base=base, port=free_port()))
    os.environ |= {"OPS_ENVIRONMENT": "full", "OPS_ENVIRONMENT_FILE": str(toml), "FULL_PASSWORD": "x"}
    seed(base)
    os.environ["TMPDIR"], tempfile.tempdir = str(base / "tmp"), None  # tempfile would find another one
    with contextlib.ExitStack() as stack:
        log, dump = (stack.enter_context((base / name).open("rb")) for name in HELD)
        for where, source in ((base / "tmp/ops-pg-live", subprocess.DEVNULL), (Path("/"), log), (Path("/"), dump)):
            child = subprocess.Popen(["sleep", "600"], cwd=where, stdin=source)
            stack.callback(child.wait)
            stack.callback(child.kill)
        planned = told(run(""), base)
        done = told(run("full"), base)
        fill_inodes(base)
        of_wal = told(run(""), base)
    print(json.dumps([planned, done, of_wal]))


if __name__ == "__main__":
    main(sys.argv[1])
