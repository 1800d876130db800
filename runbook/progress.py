"""Long work says how far it is, every few seconds: in the run's log, and as a progress artifact where it can tell."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext, TaskRunContext

from runbook.errors import OpsError
from runbook.guard.brief import asked_briefly
from runbook.language.say import say
from runbook.log import logger
from runbook.page.markdown import escaped

EVERY_SECONDS = 5.0
ANSWER_SECONDS = 3.0


@dataclass(frozen=True)
class WorkDone:
    """How far work is: as a sentence, and which part of it is done (0 to 1)."""

    text: str
    ratio: float

    def __str__(self) -> str:
        return self.text


@contextlib.contextmanager
def progress(tell: Callable[[], str | WorkDone]) -> Iterator[None]:
    """Log what `tell` says every few seconds while the block runs. A `tell` that cannot say is silent.

    A `Done` is drawn as a bar on the run's page too; short work has no bar. The page shows it when it is loaded again,
    so the log line stays.
    """
    log, bar = logger(), _Bar()
    stop = threading.Event()

    def keep_telling() -> None:
        while not stop.wait(EVERY_SECONDS):
            with contextlib.suppress(OpsError, OSError):
                told = tell()
                log.info(str(told))
                bar.draw(told)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(keep_telling,), name="progress", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        stop.set()
        raise
    else:
        stop.set()
        thread.join()
        bar.finish()
    finally:
        thread.join()


class _Bar:
    """One progress artifact. Prefect being away or busy must not disturb the work."""

    def __init__(self) -> None:
        self._artifact: UUID | None = None
        self._shown = bool(FlowRunContext.get() or TaskRunContext.get())

    def draw(self, told: str | WorkDone) -> None:
        if isinstance(told, WorkDone) and self._shown:
            self._put(min(max(told.ratio, 0.0), 1.0) * 100, told.text)

    def finish(self) -> None:
        if self._artifact and self._shown:
            self._put(100.0, "")

    def _put(self, percent: float, text: str) -> None:
        try:
            shown = escaped(say(text)[:200])
            with asked_briefly(ANSWER_SECONDS):  # the work waits for the last one
                if self._artifact is None:
                    self._artifact = cast(UUID, create_progress_artifact(progress=percent, description=shown))
                else:
                    update_progress_artifact(self._artifact, progress=percent, description=shown or None)
        except httpx.HTTPStatusError:  # busy: the next one is drawn
            return
        except Exception as error:
            self._shown = False
            logger().info("the progress bar cannot be drawn: %s", error)
