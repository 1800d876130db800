"""Failovers of a test's cluster, in this process and in one of their own, and what is there afterwards."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flows.recovery.postgres.failover import postgres_failover, rejoin_standby
from runbook.errors import RunbookFailed
from runbook.report import Report
from runbook.wait import until
from tests.fixtures import forked
from tests.fixtures.postgres.clusters import NAME, Cluster, Writes

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys
from flows.recovery.postgres.failover import postgres_failover, rejoin_standby
from runbook.errors import OpsError
try:
    if sys.argv[2] == "rejoin":
        print(rejoin_standby.fn(sys.argv[1], *sys.argv[3:], confirm=sys.argv[1]).sentence())
    else:
        print(postgres_failover.fn(sys.argv[1], mode=sys.argv[2], confirm=sys.argv[1]).sentence())
except OpsError as error:
    sys.exit(str(error))
"""


def fail_over(mode: Any = "planned", **parameters: Any) -> Report:
    """For real, and well."""
    return postgres_failover.fn(NAME, mode=mode, confirm=NAME, **parameters)


def rejoin(**parameters: Any) -> Report:
    """For real, and well."""
    return rejoin_standby.fn(NAME, confirm=NAME, **parameters)


def refused(mode: Any = "planned", **parameters: Any) -> Report:
    """The report of a run that must not begin."""
    with pytest.raises(RunbookFailed) as caught:
        postgres_failover.fn(NAME, mode=mode, **{"confirm": NAME, **parameters})
    return caught.value.report


def process(what: str, *method: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A failover (`planned`, `unplanned`) or `rejoin` (with its method) in a process of its own, without a Prefect
    server."""
    environment = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", **variables}
    return forked.run(["-c", RUN, NAME, what, *method], environment)


def found(cluster: Cluster, role: str) -> list[Any]:
    """The rows of the writing clients that a node has."""
    return cluster.sql(role, "SELECT id FROM writes")


def lost(cluster: Cluster, role: str, writes: Writes) -> set[int]:
    """Acknowledged writes that are not there."""
    return writes.lost(found(cluster, role))


def target(cluster: Cluster) -> str:
    """The server in the application's connection string."""
    match = re.search(r"@([^/]+)/", (cluster.root / "opt" / "grc" / "backend" / ".env").read_text())
    assert match
    return match[1]


def address(cluster: Cluster, role: str) -> str:
    """host:port of a node."""
    return f"127.0.0.1:{cluster.node(role).port}"


def verify_turned(cluster: Cluster, *, joined: bool) -> None:
    """`standby` is the only primary, the application is told so, and `postgres` follows where it has joined."""
    assert not cluster.is_standby("standby")
    assert target(cluster) == address(cluster, "standby")
    assert not cluster.sql("standby", "SELECT to_regclass('interview_ops_failover')", database="postgres")[0][0]
    assert (cluster.node("postgres").data / "standby.signal").exists()
    if joined:
        wanted = {"standby", "receiver"}
        until(lambda: cluster.streaming("standby") >= wanted, what="both stream", seconds=120)
        assert cluster.is_standby("postgres")
        count = "SELECT count(*) FROM writes"
        now = cluster.sql("standby", count)[0][0]  # clients go on writing: it has these, and then more
        until(lambda: cluster.sql("postgres", count)[0][0] >= now, what="the same rows", seconds=120)
