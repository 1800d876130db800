"""Runs that wait for people: Prefect shows "Suspended", and nowhere how to answer. The run's log does."""

from __future__ import annotations

from prefect.exceptions import Pause
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput

from runbook.log import logger

RESUME = (
    "Waiting for answers: on this run's page open the menu (⋮, top right), choose Resume, fill in the form and send it."
)


def suspend(form: type[RunInput], key: str, seconds: int | None) -> RunInput:
    """The answers to a form; the run leaves here until somebody sent them. `seconds`: then it fails (None: never).

    Raises:
        RuntimeError: Prefect cannot suspend this run.
    """
    try:
        return suspend_flow_run(wait_for_input=form, key=key, timeout=seconds)
    except Pause:
        logger().warning("%s", RESUME)
        raise
