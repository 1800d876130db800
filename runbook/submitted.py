"""A step that runs beside its run ends with it: what a failed run removes is not written by it any more."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from runbook.errors import OpsError

END_SECONDS = 10.0


@dataclass
class Submitted:
    """A step that was submitted. `given_up`: its run failed or was cancelled."""

    given_up: threading.Event = field(default_factory=threading.Event)
    is_running: bool = False

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """What copies its context in the block, runs for this step."""
        token = _submitted.set(self)
        try:
            yield
        finally:
            _submitted.reset(token)


_submitted: contextvars.ContextVar[Submitted | None] = contextvars.ContextVar("submitted", default=None)


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Note that the step of this thread runs.

    Raises:
        OpsError: its run ended before it began.
    """
    step = _submitted.get()
    if step is None or step.is_running:  # of the run itself, or a step of a step
        yield
        return
    require_wanted()
    step.is_running = True
    try:
        yield
    finally:
        step.is_running = False


def require_wanted() -> None:
    """Check that the run of this step still wants it. Programs are ended by it (runbook/shell.py); what takes long asks
    often.

    Raises:
        OpsError: the run failed or was cancelled. Once: what the step does to clean up is not cut short.
    """
    step = _submitted.get()
    if step and step.given_up.is_set():
        _submitted.set(None)
        raise OpsError("the run that began this step ended", "run it again")


def give_up(steps: Sequence[Submitted]) -> None:
    """End these steps, and wait for those that run."""
    for step in steps:
        step.given_up.set()
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline and any(step.is_running for step in steps):
        time.sleep(0.02)
