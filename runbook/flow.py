"""`@flow`: Prefect's, whose runs end Planned, Warning or Completed, with the report's headline as the state's message.

The type stays COMPLETED; a CRITICAL run raises, and is Failed. Prefect's list of runs filters by the name. A flow that
is called returns its report, and so does its function: only Prefect's engine is given the state.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import prefect
from prefect import Flow, flow_engine
from prefect.context import FlowRunContext
from prefect.states import Completed

from runbook.report import Report, Status

NAMES = {Status.PLANNED: "Planned", Status.WARN: "Warning", Status.OK: "Completed"}
MOST_CHARACTERS = 1000
P = ParamSpec("P")
R = TypeVar("R")


def flow(*, name: str, **options: Any) -> Callable[[Callable[P, R]], Flow[P, R]]:
    """Prefect's decorator, with its options."""

    def decorate(function: Callable[P, R]) -> Flow[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            returned = function(*args, **kwargs)
            context = FlowRunContext.get()
            is_own = context and context.flow and context.flow.fn is run
            if is_own and isinstance(returned, Report) and returned.status in NAMES:
                return cast(R, _state(returned))  # from which the engine takes the report again
            return returned

        # Prefect looks names of annotations up where `run` is defined, which is here.
        run.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
        run.__annotations__ = inspect.get_annotations(function, eval_str=True)
        return prefect.flow(name=name, **options)(run)

    return decorate


def _end_at_once() -> None:
    """A run has ended when its state is in Prefect. The engine (3.9.1) then waits for the heartbeat's thread, which
    looks once a second whether it may end: half a second of every run, on average. The engine of async flows does not
    wait. Another version of Prefect may have no such parameter; then nothing changes.
    """
    heartbeats = getattr(flow_engine, "_send_heartbeats", None)
    if heartbeats and "join_on_exit" in inspect.signature(heartbeats).parameters:
        setattr(flow_engine, "_send_heartbeats", functools.partial(heartbeats, join_on_exit=False))  # noqa: B010


_end_at_once()


def _state(report: Report) -> object:
    return Completed(
        name=NAMES[report.status], message=(report.headline or report.sentence())[:MOST_CHARACTERS], data=report
    )
