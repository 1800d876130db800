"""Runs that wait for people: Prefect shows "Suspended", and nowhere how to answer. The run's log and an artifact do.

The page of a run that is open asks for no more log lines once the run is suspended; its tab Artifacts is read when
somebody opens it.
"""

from __future__ import annotations

from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import Pause
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput

from runbook.current import artifact_key
from runbook.guard.brief import asked_briefly
from runbook.language.say import label, say
from runbook.log import logger

ARTIFACT = "how-to-resume"
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
        _show()
        raise


def _show() -> None:
    """How to answer, in the run's tab Artifacts. That Prefect is away disturbs nothing: the log has it too."""
    text = f"# {label('Waiting for answers')}\n\n{say(RESUME)}\n"
    try:
        with asked_briefly(retries=2):
            create_markdown_artifact(markdown=text, key=artifact_key(ARTIFACT), description=say(RESUME))
    except Exception as error:
        logger().warning("how to resume could not be shown in Prefect: %s", error)
