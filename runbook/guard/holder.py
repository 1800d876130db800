"""Who holds an environment: kept in the lock's file on this host, and in a Prefect Variable for the others."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal

from prefect.context import FlowRunContext
from prefect.variables import Variable

from runbook.errors import Locked
from runbook.guard.brief import answered
from runbook.guard.process import Process, parse, this_process
from runbook.page.address import ui_address

Rank = Literal["plan", "maintenance", "recovery"]
"""Each one ends the runs of those before it that hold the lock."""


@dataclass(frozen=True)
class LockHolder:
    """Who holds an environment, and how its death is seen."""

    runbook: str
    rank: Rank
    run_id: str
    run_name: str
    host: str
    pid: int
    process: str
    since: str
    lease_id: str = ""

    def is_dead(self) -> bool:
        """True only where its process is certainly dead. Elsewhere its lease has to end by itself."""
        process = self.identity
        return process is not None and process.is_dead()

    @property
    def identity(self) -> Process | None:
        """Its process, where this one can judge it."""
        process = parse(self.process)
        return process if process and process.is_judgeable and self.host == socket.gethostname() else None

    def sentence(self, environment: str) -> Locked:
        """What the refused run says."""
        where = f"process {self.pid} on {self.host}"
        run = f"run “{self.run_name}” ({self.run_id}), {where}" if self.run_id else where
        address = ui_address(f"runs/flow-run/{self.run_id}") if self.run_id else ""
        link = f" {address}" if address else ""
        return Locked(
            f"{environment} is held by “{self.runbook}”, {run}, since {self.since}",
            f"wait for it to end, or cancel it{link}; a run that died frees the lock within two minutes",
        )


def this_run(runbook: str, rank: Rank) -> LockHolder:
    """This process, and the flow run that it is, if it is one."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    return LockHolder(
        runbook=runbook,
        rank=rank,
        run_id=str(run.id) if run else "",
        run_name=run.name if run else "",
        host=socket.gethostname(),
        pid=os.getpid(),
        process=this_process().text,
        since=datetime.now(UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def read(file: IO[str]) -> LockHolder | None:
    """Who wrote himself into a lock's file."""
    file.seek(0)
    return parse_holder(file.read())


def in_file(environment: str, directory: Path) -> LockHolder | None:
    """Who holds an environment's file lock, as its file says; None: nobody, or a process that has died. It takes
    nothing."""
    try:
        found = parse_holder(lock_file(environment, directory).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    return None if found is None or found.is_dead() else found


def lock_file(environment: str, directory: Path) -> Path:
    """An environment's file lock, in its report folder."""
    return directory / f".lock-{environment}"


def write(file: IO[str], holder: LockHolder) -> None:
    """Into a lock's file. A full disk takes no name, and yet the lock is held: a run that makes room must not stop at
    that. (Not by the file's own buffer, which would be written again when it is closed.)"""
    with contextlib.suppress(OSError):
        os.ftruncate(file.fileno(), 0)
        os.pwrite(file.fileno(), json.dumps(asdict(holder)).encode(), 0)


def _variable(environment: str) -> str:
    return f"{'env-' + environment}-holder"


def remember(environment: str, holder: LockHolder) -> None:
    """For other hosts: in Prefect.

    Raises:
        Unreachable: Prefect does not answer.
    """
    text = json.dumps(asdict(holder))
    answered(lambda: Variable.set(_variable(environment), text, overwrite=True), "the lock's holder")


def remembered(environment: str) -> LockHolder | None:
    """Who holds or last held an environment, as Prefect knows.

    Raises:
        Unreachable: Prefect does not answer.
    """
    return parse_holder(str(answered(lambda: Variable.get(_variable(environment), default=""), "the lock's holder")))


def parse_holder(text: str) -> LockHolder | None:
    """Who holds or last held an environment, from the text that `write` or `remember` stored; None where it is none."""
    try:
        return LockHolder(**json.loads(text))
    except (ValueError, TypeError):
        return None
