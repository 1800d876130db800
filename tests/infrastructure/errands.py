"""What a worker runs in a test: a line in a file; a runbook that waits where it is told to."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.runtime import flow_run

from blocks.environment import Environment
from runbook.kinds import action
from runbook.report import Report
from runbook.run import runbook
from runbook.wait import until


@flow
def errand(book: str, gate: str = "") -> str:
    """Write this run's id into the book; wait until the gate is there, where one is named."""
    with Path(book).open("a") as file:
        file.write(f"{flow_run.id}\n")
    if gate:
        until(Path(gate).exists, what="the gate", seconds=300)
    return "done"


@flow
def long_errand(environment: str, book: str, gates: list[str]) -> Report:
    """A runbook that holds the environment's lock, and does a step at each gate."""
    env = Environment.find(environment)
    with runbook("Long errand", env, changes=True) as report:
        for gate in gates:
            with Path(book).open("a") as file:
                file.write(f"{gate}\n")
            until(Path(gate).exists, what="the gate", seconds=300)
            report.fact(Path(gate).name, pass_by(gate))
    return report


@action(idempotent=True)
def pass_by(gate: str) -> str:
    """A step, of which Prefect is told."""
    return Path(gate).read_text()
