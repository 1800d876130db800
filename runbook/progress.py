"""The lines of a run's log: each step with its number in the plan and its time, and long work every few seconds, as a
progress artifact too where its share is known."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext, TaskRunContext

from runbook.errors import OpsError
from runbook.guard.brief import asked_briefly
from runbook.guard.permit import PlannedStep
from runbook.language.say import say
from runbook.log import logger
from runbook.page.markdown import escaped
from runbook.units import about, duration, size

EVERY_SECONDS = 5.0
ANSWER_SECONDS = 3.0


@dataclass(frozen=True)
class WorkDone:
    """How far work is: as a sentence, and which part of it is done (0 to 1)."""

    text: str
    ratio: float

    def __str__(self) -> str:
        return self.text


@dataclass
class _Running:
    """A step while it runs: its name in the log, and how many parts of it log their own progress."""

    name: str
    reporting: int = 0


_running: contextvars.ContextVar[_Running | None] = contextvars.ContextVar("running", default=None)


@dataclass
class StepLog:
    """Logs the steps of a run. A planned step has its number, its size and its estimate when its first probe or action
    begins, and its time when its last one ends. Any other probe or action has its time."""

    level: int = logging.INFO
    _begun: dict[int, float] = field(default_factory=dict)
    _ended: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def lines(self, numbers: Sequence[int], plan: Sequence[PlannedStep]) -> Iterator[None]:
        """Log planned steps, which the block carries out together."""
        started = self.begin(numbers, plan)
        with (
            _alive(self.name(numbers[0], plan), started, plan[numbers[0]].seconds),
            self.until_end(numbers, plan, started),
        ):
            yield

    def begin(self, numbers: Sequence[int], plan: Sequence[PlannedStep]) -> float:
        """Log that planned steps begin; returns when."""
        for number in numbers:
            self._announce(number, plan)
        return time.monotonic()

    @contextlib.contextmanager
    def until_end(self, numbers: Sequence[int], plan: Sequence[PlannedStep], started: float) -> Iterator[None]:
        """Log how long planned steps took, when the block ends."""
        try:
            yield
        except BaseException:
            name = self.name(numbers[0], plan)
            logger().log(self.level, "%s", f"{name}: failed after {duration(time.monotonic() - started)}")
            raise
        for number in numbers:
            name = self.name(number, plan)
            logger().info("%s", f"{name}: done in {duration(time.monotonic() - started)}")

    @contextlib.contextmanager
    def logged(self, work: str, plan: Sequence[PlannedStep]) -> Iterator[None]:
        """Log what the block, a probe or action of this name, does of the plan."""
        started = time.monotonic()
        numbers = self._begin(work, plan)
        name = self.name(numbers[0], plan) if numbers else work.replace("_", " ")
        estimate = plan[numbers[0]].seconds if numbers else 0.0
        try:
            with _alive(name, self._begun[numbers[0]] if numbers else started, estimate):
                yield
        except BaseException:
            logger().log(self.level, "%s", f"{name}: failed after {duration(time.monotonic() - started)}")
            raise
        if ended := self._end(work, plan, numbers):
            for number, seconds in ended:
                logger().info("%s", f"{self.name(number, plan)}: done in {duration(seconds)}")
        else:
            logger().log(self.level, "%s", f"{work.replace('_', ' ')}: done in {duration(time.monotonic() - started)}")

    def _begin(self, work: str, plan: Sequence[PlannedStep]) -> list[int]:
        """The planned steps that this call carries out: the first one that it begins or continues, and those that
        share the call."""
        with self._lock:
            open_steps = (n for n, step in enumerate(plan) if n not in self._ended and self._is_part(n, step, work))
            numbers = [first] if (first := next(open_steps, None)) is not None else []
            while numbers and (after := numbers[-1] + 1) < len(plan) and plan[after].shared:
                numbers.append(after)
            new = [number for number in numbers if number not in self._begun]
            self._begun |= dict.fromkeys(new, time.monotonic())
        for number in new:
            self._announce(number, plan)
        return numbers

    def _announce(self, number: int, plan: Sequence[PlannedStep]) -> None:
        step = plan[number]
        details = [step.detail, size(step.bytes) if step.bytes else "", about(step.seconds) if step.seconds else ""]
        logger().info("%s", f"{self.name(number, plan)}: {', '.join(filter(None, details))}")

    @staticmethod
    def name(number: int, plan: Sequence[PlannedStep]) -> str:
        """A planned step in the log: `Step 4/9: swap`."""
        return f"Step {number + 1}/{len(plan)}: {plan[number].step}"

    def _is_part(self, number: int, step: PlannedStep, work: str) -> bool:
        return work in (step.by if number in self._begun else step.by[:1])

    def _end(self, work: str, plan: Sequence[PlannedStep], numbers: Sequence[int]) -> list[tuple[int, float]]:
        """The steps that this call ended, with their seconds."""
        with self._lock:
            ended = [number for number in numbers if work == plan[numbers[0]].by[-1] and number not in self._ended]
            self._ended.update(ended)
            return [(number, time.monotonic() - self._begun[number]) for number in ended]


@contextlib.contextmanager
def _alive(name: str, started: float, estimate: float) -> Iterator[None]:
    """Log every few seconds that a step still runs, unless something inside it logs how far it is."""
    running = _Running(name)

    def tell() -> str:
        if running.reporting:
            return ""
        so_far = duration(time.monotonic() - started)
        return f"{so_far} so far, estimated {about(estimate)}" if estimate else f"{so_far} so far"

    with _reports():
        token = _running.set(running)
        try:
            with _every_few_seconds(tell):
                yield
        finally:
            _running.reset(token)


@contextlib.contextmanager
def _reports() -> Iterator[None]:
    """While the block runs, the step around it logs nothing: the block does."""
    if not (outer := _running.get()):
        yield
        return
    outer.reporting += 1
    try:
        yield
    finally:
        outer.reporting -= 1


@contextlib.contextmanager
def progress(tell: Callable[[], str | WorkDone]) -> Iterator[None]:
    """Log what `tell` returns every few seconds while the block runs. A `tell` that fails logs nothing.

    A `WorkDone` is drawn as a bar on the run's page too; short work has no bar. The page shows it when it is loaded
    again, so the log line stays.
    """
    with _reports(), _every_few_seconds(tell):
        yield


@contextlib.contextmanager
def _every_few_seconds(tell: Callable[[], str | WorkDone]) -> Iterator[None]:
    log, bar, step = logger(), _Bar(), _running.get()
    stop = threading.Event()

    def keep_telling() -> None:
        while not stop.wait(EVERY_SECONDS):
            with contextlib.suppress(OpsError, OSError):
                if str(told := tell()):
                    log.info("%s", f"{step.name}: {told}" if step else str(told))
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
