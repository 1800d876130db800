"""What a worker runs in a test: a line in a file, and nothing else."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.runtime import flow_run

from runbook.wait import until


@flow
def errand(book: str, gate: str = "") -> str:
    """Write this run's id into the book; wait until the gate is there, where one is named."""
    with Path(book).open("a") as file:
        file.write(f"{flow_run.id}\n")
    if gate:
        until(Path(gate).exists, what="the gate", seconds=300)
    return "done"
