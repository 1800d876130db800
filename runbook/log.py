"""The logger of the run: Prefect's inside a run, the standard one outside. Our own errors are logged as one line."""

from __future__ import annotations

import logging
from typing import Any

from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging import get_run_logger

from runbook.errors import OpsError, RunbookFailed

Logger = logging.Logger | logging.LoggerAdapter[Any]


def logger() -> Logger:
    """Where a step says how far it is."""
    if FlowRunContext.get() or TaskRunContext.get():
        return get_run_logger()
    return logging.getLogger("ops")


class _NoTraceback(logging.Filter):
    """Prefect logs a raised error with its traceback; of ours, the message says all that an operator needs. A failed
    runbook has logged its headline and its report's address already."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], RunbookFailed):
            return False
        if record.exc_info and isinstance(record.exc_info[1], OpsError):
            record.exc_info = None
            record.exc_text = None
        return True


class _NoBareState(logging.Filter):
    """Each step logs its name and its time or its error, each run its headline: Prefect's “Finished in state …” adds
    nothing."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Finished in state")


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_NoBareState())
for _name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
    logging.getLogger(_name).addFilter(_NoTraceback())
