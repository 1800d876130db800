"""Probes and actions: the only use of `prefect.task`. Both record how long they took in the run's report.

Inside a flow run a step is a Prefect task (retried, shown in the graph); outside one it is a plain call with the same
retries, so that a recovery can run while Prefect itself is down.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast, overload

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture

from runbook.current import current_report
from runbook.errors import NotConfirmed, Unreachable
from runbook.failpoint import failpoint
from runbook.guard.permit import Act, Permit
from runbook.progress import StepLog
from runbook.report import Status, StepTime
from runbook.submitted import Submitted, running

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
Q = ParamSpec("Q")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
Acts = Act | Sequence[Act]

RETRIES = 3
RETRY_DELAYS_SECONDS = [1.0, 2.0, 4.0]
_threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="step")


class Pending(Protocol[R_co]):
    """A step that was submitted."""

    def result(self) -> R_co:
        """Wait for it; raises what it raised."""


class Step(Generic[P, R]):
    """A probe or an action. Call it, or `submit` it to run beside others; `after(...)` draws an edge in the graph."""

    def __init__(self, work: Callable[P, R], *, retries: int, staged: bool = False, is_guarded: bool = False) -> None:
        self.work = work
        self.name = work.__name__
        self.retries = retries
        self._wait_for: tuple[object, ...] = ()
        functools.update_wrapper(self, work)
        self._timed = _timed(work, staged, is_guarded)
        self.task: Task[P, R] = _as_task(self._timed, retries)

    def after(self, *steps: object) -> Step[P, R]:
        """The same step, shown behind `steps` (results or pending ones) in the graph, and run when they are done."""
        other = object.__new__(type(self))
        other.__dict__ = {**self.__dict__, "_wait_for": steps}
        return other

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        self._wait()  # Prefect would not run it either behind a failed one, but return None as if it had
        if FlowRunContext.get() is None:
            return self._directly(*args, **kwargs)
        call = cast(Callable[..., R], self.task)
        return call(*args, wait_for=_linkable(self._wait_for), **kwargs)

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> Pending[R]:
        """Start it beside the caller. It is given up if the run fails before it is done."""
        step = Submitted()
        if report := current_report():
            report.submitted.append(step)
        with step.context():
            if FlowRunContext.get() is None:
                context = contextvars.copy_context()

                def work() -> R:
                    self._wait()
                    return context.run(self._directly, *args, **kwargs)

                return _threads.submit(work)
            submit = cast(Callable[..., Pending[R]], self.task.submit)
            return submit(*args, wait_for=_linkable(self._wait_for), **kwargs)

    def _wait(self) -> None:
        """Until the submitted steps before this one are done; raises what they raised."""
        for other in self._wait_for:
            if isinstance(other, Future | PrefectFuture):
                other.result()

    def _directly(self, *args: P.args, **kwargs: P.kwargs) -> R:
        for delay in RETRY_DELAYS_SECONDS[: self.retries]:
            try:
                return self._timed(*args, **kwargs)
            except Unreachable:
                time.sleep(delay)
        return self._timed(*args, **kwargs)


def _linkable(steps: Iterable[object]) -> list[object] | None:
    return [step for step in steps if step is not None] or None


def _as_task(work: Callable[P, R], retries: int) -> Task[P, R]:
    return task(
        retries=retries,
        retry_delay_seconds=RETRY_DELAYS_SECONDS[:retries] or None,
        retry_condition_fn=_is_transient,
        cache_policy=NO_CACHE,
        persist_result=False,
    )(work)


def _is_transient(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), Unreachable)


@dataclass(frozen=True)
class UnderWay:
    """The change that is carried out now (runbook/change.py): its permit, and the result that its steps follow in the
    graph. `logs`: it logs its own line."""

    permit: Permit
    after: object
    logs: bool = True


carried: contextvars.ContextVar[UnderWay | None] = contextvars.ContextVar("carried", default=None)


@contextlib.contextmanager
def permitted_by(permit: Permit, *, after: object = None) -> Iterator[None]:
    """Call actions of changes in a runbook that still has a permit for all of them. `after`: what they follow in the
    graph."""
    token = carried.set(UnderWay(permit, after, logs=False))
    try:
        yield
    finally:
        carried.reset(token)


@contextlib.contextmanager
def permitting_nothing() -> Iterator[None]:
    """Begin a runbook inside a change: it logs its own lines, and has the permits of its own plan only."""
    token = carried.set(None)
    try:
        yield
    finally:
        carried.reset(token)


class Bound(Generic[P, R]):
    """An action with its first arguments, and what it does to what, by these. Only a `Change` that states it can call
    it."""

    def __init__(self, step: Step[..., R], args: tuple[Any, ...], acts: tuple[Act, ...]) -> None:
        self._step, self._args, self.acts = step, args, acts
        self.name = step.name

    def __call__(self, *late: P.args, **named: P.kwargs) -> R:
        return self._permitted()(*self._args, *late, **named)

    def submit(self, *late: P.args, **named: P.kwargs) -> Pending[R]:
        """Start it beside the caller."""
        return self._permitted().submit(*self._args, *late, **named)

    def _permitted(self) -> Step[..., R]:
        if not (now := carried.get()):
            raise NotConfirmed(f"“{self.name}” is not carried out by a plan", "plan it: `runbook.change`")
        for act in self.acts:
            now.permit.require(act.kind, act.target)
        return self._step.after(now.after)


class Action(Generic[P, R]):
    """A step that changes something, and states what (`of`, by its first arguments). It is not called: `bind` gives it
    the arguments that the plan knows, and a `Change` carries it out."""

    def __init__(self, work: Callable[P, R], of: Callable[..., Acts], *, retries: int, staged: bool) -> None:
        self.work = work
        self.name = work.__name__
        self.of = of
        self._step = Step(work, retries=retries, staged=staged, is_guarded=True)

    @overload
    def bind(self) -> Bound[P, R]: ...

    @overload
    def bind(self: Action[Concatenate[A, Q], R], a: A, /) -> Bound[Q, R]: ...

    @overload
    def bind(self: Action[Concatenate[A, B, Q], R], a: A, b: B, /) -> Bound[Q, R]: ...

    @overload
    def bind(self: Action[Concatenate[A, B, C, Q], R], a: A, b: B, c: C, /) -> Bound[Q, R]: ...

    @overload
    def bind(self: Action[Concatenate[A, B, C, D, Q], R], a: A, b: B, c: C, d: D, /) -> Bound[Q, R]: ...

    def bind(self, *args: Any) -> Bound[..., R]:
        """The action with its first arguments."""
        known = inspect.signature(self.work).bind_partial(*args).arguments
        acts = self.of(**{name: known[name] for name in inspect.signature(self.of).parameters})
        return Bound(self._step, args, (acts,) if isinstance(acts, Act) else tuple(acts))


def _timed(work: Callable[P, R], staged: bool, is_guarded: bool) -> Callable[P, R]:
    @functools.wraps(work)
    def timed(*args: P.args, **kwargs: P.kwargs) -> R:
        report, now = current_report(), carried.get()
        step_log = report.step_log if report else StepLog(logging.DEBUG)
        planned = report.plan_steps if report and report.permitted else ()  # what is judged is not carried out
        permits = [value for value in (*args, *kwargs.values()) if isinstance(value, Permit)]
        permits += [now.permit] if now and is_guarded else []
        for permit in permits if report else ():
            assert report
            report.require_lock()
            permit.require_environment(report.environment)
            if not staged:
                report.permitted_steps.append(work.__name__)
        failpoint(f"before {work.__name__}")
        if report and permits:
            report.journal.step(work.__name__, staged=staged)
        started, clock = datetime.now(UTC), time.monotonic()
        status = Status.CRITICAL
        try:
            with contextlib.nullcontext() if now and now.logs else step_log.logged(work.__name__, planned), running():
                answer = work(*args, **kwargs)
            status = Status.OK
            if report and permits:
                report.journal.done(work.__name__)
        finally:
            if report:
                report.add_step(StepTime(work.__name__, started, time.monotonic() - clock, status))
        failpoint(f"after {work.__name__}")
        return answer

    return timed


def probe(work: Callable[P, R]) -> Step[P, R]:
    """A step that only reads. Retried with growing delays on `Unreachable`."""
    return Step(work, retries=RETRIES)


@overload
def action(work: Callable[P, R]) -> Step[P, R]: ...


@overload
def action(*, idempotent: bool = False, staged: bool = False) -> Callable[[Callable[P, R]], Step[P, R]]: ...


@overload
def action(
    *, of: Callable[..., Acts], idempotent: bool = False, staged: bool = False
) -> Callable[[Callable[P, R]], Action[P, R]]: ...


def action(
    work: Callable[P, R] | None = None,
    *,
    of: Callable[..., Acts] | None = None,
    idempotent: bool = False,
    staged: bool = False,
) -> Step[P, R] | Callable[[Callable[P, R]], Step[P, R]] | Callable[[Callable[P, R]], Action[P, R]]:
    """A step that changes something. Retried (on `Unreachable`) only where it says that doing it twice is harmless.
    `of`: what it does to what, by arguments of the same names, which the plan knows; a `Change` carries it out.
    `staged`: it needs a permit, and changes nothing live: it builds what a later step swaps in."""
    retries = RETRIES if idempotent else 0

    def step(work: Callable[P, R]) -> Step[P, R]:
        return Step(work, retries=retries, staged=staged)

    def stating(work: Callable[P, R]) -> Action[P, R]:
        assert of
        return Action(work, of, retries=retries, staged=staged)

    return step(work) if work else stating if of else step
