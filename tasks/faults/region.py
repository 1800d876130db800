"""A region without power: every process is killed with -9 at once, and nothing restarts them. Its disks stay."""

from __future__ import annotations

import contextlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import psutil

from blocks.environment import Environment
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action
from runbook.wait import until
from tasks.faults.disposable import BREAK, Fault, require_disposable
from tasks.host.disk import is_here
from tasks.host.services import stop_services

SECONDS = 30.0
RUNS = ("RUNNING", "STARTING", "BACKOFF", "active")


def region(env: Environment) -> str:
    """Return the target of the act."""
    return f"every process of {env.name}"


@action(of=lambda env: Act(BREAK, region(env)), idempotent=True)
def lose_region(env: Environment) -> Fault:
    """Freeze all processes first, so that none sees another one die; let their supervisor stop them, so that it does
    not restart them; then kill them.

    Raises:
        OpsError: the environment is not disposable, or its processes are not on this host.
    """
    require_disposable(env)
    if not is_here(env.postgres.host):
        raise OpsError(f"{env.postgres.host} is another host", "run the drill on a worker of the region's host")
    began, roles = datetime.now(UTC), list(env.services.names)
    frozen = [process for role in roles for process in _freeze(env.services.state(role).pid)]
    failpoint("fault: region frozen")
    with ThreadPoolExecutor(len(roles)) as pool:
        stopping = [pool.submit(env.services.stop, role) for role in roles]
        until(lambda: not _restarting(env, roles), what="the end of all restarts", seconds=SECONDS)
        for process in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for one in stopping:
            one.result()
    until(lambda: not any(map(psutil.Process.is_running, frozen)), what=f"the death of {env.name}", seconds=SECONDS)
    what = f"{len(frozen)} processes of {len(roles)} services of {env.name} killed with -9, nothing restarts them"
    return Fault(what, began, datetime.now(UTC), {"region": env.name})


@action(of=lambda env: Act(BREAK, region(env)), idempotent=True)
def empty_region(env: Environment, other: Environment) -> list[str]:
    """Stop every service of the other region and delete its data; returns the deleted directories.

    Raises:
        OpsError: one of the two is not disposable, or users are sent there.
    """
    require_disposable(env)
    require_disposable(other)
    sent = Path(env.endpoint.file).read_text(encoding="utf-8").strip()
    if sent == other.application.url:
        raise OpsError(f"users are sent to {other.name}", "send them back with region-failover first")
    stop_services.work(other.services, list(reversed(other.services.names)))
    places = [node.data_directory for node in other.nodes()] + [other.redis.data_directory, other.application.directory]
    removed = []
    for place in (*places, *([other.wal.directory] if other.has("wal") else [])):
        for path in Path(place).parent.glob(f"{Path(place).name}*"):  # and the old data of recoveries
            if path.is_dir():
                shutil.rmtree(path)
                removed.append(str(path))
    return removed


def _freeze(pid: int) -> list[psutil.Process]:
    """A process and its children, the parent first, so that it starts no more."""
    found = list[psutil.Process]()
    with contextlib.suppress(psutil.NoSuchProcess):
        if pid:
            first = psutil.Process(pid)
            first.suspend()
            found = [first, *first.children(recursive=True)]
    for process in found[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    return found


def _restarting(env: Environment, roles: list[str]) -> list[str]:
    return [role for role in roles if env.services.state(role).told.startswith(RUNS)]
