"""The lab's retention: its backups and its archived WAL are pruned without anybody launching it.

A lab's schedules are paused, and a day of restores of 1 GB made it grow to 37 GB. So a program alongside its worker
checks it every 15 minutes. If the lab uses more than its database allows (`limit`), it waits until none of its flows
runs, then launches the runbooks that a real environment has as schedules: a base backup, its proof, the copies, then
the pruning. Their rules apply: nothing unproven is pruned, and each is a run in Prefect's UI.

python -m lab.retention --name lab
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg

from lab import lifecycle
from lab.processes import heed_interrupts
from lab.progress import Tell
from lab.runs import Runs
from lab.servers.postgres import DATABASE
from lab.servers.services import LabServices
from lab.state.environment import api_url, auth_string, ui_url
from runbook.errors import OpsError

EVERY_SECONDS = 900
AGAIN_SECONDS = 30  # after a flow was in the way
LEAST_BYTES = 8_000_000_000
SHARE = 12
"""A lab may use so many times what its database does: two nodes, each with WAL; what a restore replaced; its dumps; two
archives of WAL and base backups."""
# In this order: WAL goes as far as a proven base backup is there from which to recover.
PROOF = ("backup-cluster/{}-daily", "verify-backup/{}-cluster", "verify-backup/{}", "replicate-backups/{}")
PRUNING = (
    *(
        f"prune-backups/{{}}{copies}{kind}"
        for copies in ("", "-copies")
        for kind in ("", "-redis", "-files", "-cluster")
    ),
    "discard-superseded/{}-daily",
)


@dataclass(frozen=True)
class LabUse:
    """Bytes on disk: of a lab with its second region, and of the application's database."""

    lab: int
    database: int

    @property
    def limit(self) -> int:
        """Above which the lab is pruned."""
        return max(LEAST_BYTES, SHARE * self.database)

    @property
    def is_over(self) -> bool:
        return self.lab > self.limit

    def __str__(self) -> str:
        return f"the lab uses {_mb(self.lab)} of {_mb(self.limit)}"


def read_use(services: LabServices) -> LabUse:
    """What a lab uses now.

    Raises:
        OpsError: its database does not answer.
    """
    layout = services.layout
    try:
        with psycopg.connect(services.admin_dsn, connect_timeout=20) as connection:
            row = connection.execute("SELECT pg_database_size(%s)", [DATABASE]).fetchone()
    except psycopg.Error as error:
        raise OpsError(f"the database of {layout.name} does not answer: {error}") from None
    return LabUse(sum(disk_bytes(region.root) for region in (layout.first, layout.second)), int(row[0]) if row else 0)


def disk_bytes(directory: Path) -> int:
    """Blocks of every file below a directory, each counted once; what is deleted meanwhile counts nothing."""
    sizes = dict[int, int]()
    for path in _files(directory):
        with contextlib.suppress(OSError):
            status = path.lstat()
            sizes[status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())


def _files(directory: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(directory):
        yield from (Path(parent, name) for name in names)


def prune(name: str, runs: Runs, tell: Tell) -> bool:
    """Launch everything once, one run after the other; false where a flow of the lab began meanwhile, which is left
    alone: the next round goes on. A run that fails (its rule refuses) ends no other."""
    for deployment, parameters in _launches(name):
        if busy := running(name, runs):
            tell(f"{', '.join(busy)} runs: the pruning waits")
            return False
        try:
            run = runs.run(deployment, parameters, seconds=3600)
            tell(f"{deployment}: {run.state} {run.message}")
        except OpsError as error:
            tell(f"{deployment}: {error.message}")
    return True


def _launches(name: str) -> Iterable[tuple[str, dict[str, str]]]:
    yield from ((deployment.format(name), {}) for deployment in PROOF)
    yield from ((deployment.format(name), {"confirm": name}) for deployment in PRUNING)


def running(name: str, runs: Runs) -> list[str]:
    """The lab's flow runs that are under way, its worker's and others (`python -m flows.launch`)."""
    wanted = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING"]}}}}
    found = runs.call("POST", "/flow_runs/filter", wanted)
    return [str(run["name"]) for run in found if run["parameters"].get("environment") == name]


def look(name: str, runs: Runs, tell: Tell) -> bool:
    """One round: prune where the lab uses too much and nothing runs. False: a flow is in the way, look again soon."""
    services, _ = lifecycle.existing(name)
    before = read_use(services)
    if not before.is_over:
        return True
    if running(name, runs) or not prune(name, runs, tell):
        return False
    tell(f"{before} before the pruning, {_mb(read_use(services).lab)} after it")
    return True


def _mb(number: int) -> str:
    return f"{number / 1e6:,.0f} MB"


def main() -> int:
    """The command line: looks until it is ended."""
    heed_interrupts()
    parser = argparse.ArgumentParser(prog="python -m lab.retention", description=__doc__)
    parser.add_argument("--name", default="lab", help="the environment's name (default: lab)")
    name = parser.parse_args().name
    done = True
    while True:
        time.sleep(EVERY_SECONDS if done else AGAIN_SECONDS)
        try:
            _, control = lifecycle.existing(name)
            runs = Runs(api_url(control.state), ui_url(control.state), auth_string(control.state))
            done = look(name, runs, lambda text: print(text, flush=True))
        except OpsError as error:  # it is down, or Prefect is
            print(error, flush=True)


if __name__ == "__main__":
    sys.exit(main())
