"""Drills of the lab's system, in this process and in one of their own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from blocks.config import toml
from blocks.environment import Environment
from flows.database.backup import verify_backup
from flows.database.base_backup import backup_cluster
from flows.recovery.drills import detection, record
from flows.recovery.drills.drill import run_drill
from flows.recovery.drills.record import UnfinishedDrill
from flows.recovery.drills.scenario import Drill
from runbook.errors import RunbookFailed, Unreachable
from runbook.report import Report
from runbook.wait import until
from tasks.drill.clients import DrillClients
from tests.fixtures import forked
from tests.recovery.conftest import System

ROOT = Path(__file__).resolve().parents[3]
RUN = """
import sys
from flows.recovery.drills.drill import run_drill
from runbook.errors import OpsError
try:
    print(run_drill.fn(sys.argv[1], sys.argv[2], confirm=sys.argv[1]).sentence())
except OpsError as error:
    sys.exit(str(error))
"""


def hold(system: System, scenario: Any, **parameters: Any) -> Report:
    """For real, outside of Prefect."""
    return run_drill.fn(system.name, scenario, **{"confirm": system.name, **parameters})


def critical(system: System, scenario: Any, **parameters: Any) -> Report:
    """The report of a drill that must not end well."""
    with pytest.raises(RunbookFailed) as caught:
        hold(system, scenario, **parameters)
    return caught.value.report


def process(system: System, scenario: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, without a Prefect server."""
    environment = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", **variables}
    return forked.run(["-c", RUN, system.name, scenario], environment, timeout=1800)


def steady(system: System) -> None:
    """As a drill wants it, whatever ran in this lab before: a receiver of WAL tries again 5 s after a restart of the
    server; after some restores there is no standby."""

    def silent() -> bool:
        return not any(detection.quick(environment(system)).values())

    try:
        until(silent, what="silent sensors", seconds=120)
    except Unreachable:
        system.lab.renew_standby()
        until(silent, what="silent sensors", seconds=120)


def base_backup(system: System) -> None:
    """A verified one, in a steady system."""
    steady(system)
    backup_cluster.fn(system.name)
    verify_backup.fn(system.name, kind="cluster")


def environment(system: System) -> Environment:
    """Its blocks, nothing cached."""
    return toml.environment(system.name)


def begun(system: System, scenario: str, directory: Path) -> Drill:
    """A drill that has not broken anything: for a scenario's steps one by one."""
    env = environment(system)
    half_done = UnfinishedDrill.now(scenario, directory).noted(env.reports_directory, breaks="")
    return Drill(env, Report("DR drill", env.name, env.name), directory, DrillClients.at(directory, "x-"), half_done)


def forget(system: System) -> None:
    """That one has begun."""
    record.forget(environment(system).reports_directory)
