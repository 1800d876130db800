"""State each change of the system once: its line of the plan, its permit, its pins, its log lines and the state that a
failed run reports are derived from one object.

    unlink = Change(unlink_keys.bind(env.redis, order), "unlink", order.target, pins=[…])
    with carrying_out(report, unlink, effect=…) as carry:  # without a confirm the run ends here, PLANNED
        done = carry(unlink)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

from runbook.errors import NotConfirmed, OpsError
from runbook.guard.effect import Effect
from runbook.guard.permit import Act, Permit, PlannedStep
from runbook.kinds import Bound, Pending, UnderWay, carried, permitted_by
from runbook.log import logger
from runbook.report import Report, Status
from runbook.submitted import give_up

P = ParamSpec("P")
R = TypeVar("R")


class Miscarried(AssertionError):
    """A procedure carried out something else than it planned: an error of its author."""


@dataclass(frozen=True)
class State:
    """The state of the system from here on, and the next step: a failed run reports both."""

    what: str
    hint: str


@dataclass(frozen=True, eq=False)
class Line(Generic[P, R]):
    """One line of a plan, and the work that carries it out. `size` in bytes, `seconds`: estimates, 0 where there is
    none. `more`: further lines, which the same call carries out. `is_optional`: it may turn out to be unnecessary, and
    is skipped then."""

    work: Callable[P, R]
    step: str
    detail: str
    _: KW_ONLY
    size: int = 0
    seconds: float = 0.0
    more: Sequence[PlannedStep] = ()
    is_optional: bool = False

    @property
    def planned(self) -> list[PlannedStep]:
        """Return its lines."""
        return [PlannedStep(self.step, self.detail, self.size, self.seconds), *self.more]


class Check(Line[P, R]):
    """A line that only reads."""


@dataclass(frozen=True, eq=False)
class Change(Line[P, R]):
    """A line that changes the system: an action with the arguments that the plan knows, or a function that calls
    several (`by`).

    `pins`: they note in the report what a confirmed run must find again. `needs`: they judge what the change needs, for
    the plan, and again just before it. `begun`, `done`: the state from then on (`done` may depend on the result);
    `failed`: the state by the error, None where `begun` still says it. `reverse` puts back what the change stopped,
    begun or done, if the run fails before a change that `is_final` is done."""

    by: Sequence[Bound[..., Any]] = ()
    pins: Sequence[Callable[[Report], object]] = ()
    needs: Sequence[Callable[[Report], object]] = ()
    begun: State | None = None
    failed: Callable[[OpsError], State | None] | None = None
    done: State | Callable[[R], State] | None = None
    reverse: Callable[[], object] | None = None
    is_final: bool = False

    @property
    def acts(self) -> tuple[Act, ...]:
        """Return what its actions do."""
        actions = [*self.by, *([self.work] if isinstance(self.work, Bound) else [])]
        return tuple(dict.fromkeys(act for one in actions for act in one.acts))


@contextlib.contextmanager
def carrying_out(
    report: Report,
    *lines: Line[..., Any],
    effect: Effect,
    pins: Sequence[Callable[[Report], object]] = (),
    may_follow: Sequence[Act] = (),
) -> Iterator[Carrier]:
    """Plan the lines, judge what their changes need, and let the block carry them out, in order. Without a confirm the
    run ends here, PLANNED. `effect`: the headline; `pins`: of all changes together; `may_follow`: the acts of the lines
    that may take their place (`Carrier.instead`).

    Raises:
        RunbookFailed, PlanOnly, NotConfirmed: as `Report.allow`.
        Miscarried: the block carried out something else.
    """
    carrier = Carrier(report, lines, len(report.plan_steps))
    report.plan_steps += [step for one in lines for step in one.planned]
    changes = [one for one in lines if isinstance(one, Change)]
    for note in dict.fromkeys([*pins, *(note for one in changes for note in (*one.pins, *one.needs))]):
        note(report)
    report.allow(*dict.fromkeys([*(act for one in changes for act in one.acts), *may_follow]), effect=effect)
    try:
        yield carrier
    except BaseException:
        carrier.put_back()
        give_up(report.submitted)
        raise
    carrier.require_complete()


@dataclass(eq=False)
class Begun(Generic[R]):
    """A line that is carried out beside others. Its state and its log line come with its result."""

    carrier: Carrier
    line: Line[..., R]
    pending: Pending[R]
    numbers: range
    started: float

    def result(self) -> R:
        """Wait for it; raises what it raised."""
        self.carrier.running.remove(self)
        report = self.carrier.report
        with report.step_log.until_end(self.numbers, report.plan_steps, self.started), self.carrier.telling(self.line):
            result = self.pending.result()
        self.carrier.end(self.line, result)
        return result


@dataclass
class Carrier:
    """Carries out the lines of a plan, each once and in order."""

    report: Report
    lines: Sequence[Line[..., Any]]
    first: int
    _started: list[Line[..., Any]] = field(default_factory=list)
    _begun: list[Change[..., Any]] = field(default_factory=list)
    _last: object = None
    _is_final: bool = False
    running: list[Begun[Any]] = field(default_factory=list)

    def __call__(self, line: Line[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Carry out a line with the arguments that only the run knows.

        Raises:
            Miscarried: it is not the next one of the plan.
        """
        numbers = self._start(line)
        with self.report.step_log.lines(numbers, self.report.plan_steps):
            with self._under_way(line):
                result = line.work(*args, **kwargs)
            self.end(line, result)
        return result

    def begin(self, line: Line[P, R], *args: P.args, **kwargs: P.kwargs) -> Begun[R]:
        """Carry out a line, whose work is a bound action, beside those that follow."""
        assert isinstance(line.work, Bound)
        numbers = self._start(line)
        started = self.report.step_log.begin(numbers, self.report.plan_steps)
        with self._under_way(line):
            begun = Begun(self, line, line.work.submit(*args, **kwargs), numbers, started)
        self.running.append(begun)
        return begun

    def skip(self, line: Line[..., Any], why: str) -> None:
        """Leave out a line that turned out to be unnecessary."""
        if not line.is_optional:
            raise Miscarried(f"“{line.step}” is not optional")
        for number in self._start(line):
            logger().info("%s", f"{self.report.step_log.name(number, self.report.plan_steps)}: skipped: {why}")

    def instead(self, *others: Line[..., Any], why: str) -> None:
        """Let other lines take the place of those that are left.

        Raises:
            NotConfirmed: the plan did not say that these may follow.
        """
        acts = [act for one in others if isinstance(one, Change) for act in one.acts]
        if beyond := [act for act in acts if act not in self.report.acts]:
            raise NotConfirmed(f"“{beyond[0]}” is no part of the plan", "run this again with an empty confirm")
        self.lines = [*self._started, *others]
        number = self.first + sum(len(one.planned) for one in self._started)
        self.report.plan_steps[number:] = [step for one in others for step in one.planned]
        self.report.fact("plan changed", why)
        logger().warning("%s", f"plan changed: {why}")

    def put_back(self) -> bool:
        """Put back what was stopped, the last first and each once, unless the new state is final. A reverse may do what
        its change may. A failure here is reported, and does not hide the one that led here. Returns whether all of it
        was put back."""
        begun, self._begun = [] if self._is_final else self._begun, []
        all_back = True
        for change in reversed(begun):
            if change.reverse:
                try:
                    with permitted_by(Permit(self.report.environment, change.acts)):
                        change.reverse()
                except OpsError as error:
                    self.report.fail(f"not put back: {change.step}", error.hint, value=error.message)
                    all_back = False
        return all_back

    def require_complete(self) -> None:
        """Raises Miscarried if a line was neither carried out nor skipped, or nobody waited for its end."""
        if self.running:
            raise Miscarried(f"nobody waited for {', '.join(one.line.step for one in self.running)}")
        if forgotten := [one.step for one in self.lines if one not in self._started]:
            raise Miscarried(f"planned and not carried out: {', '.join(forgotten)}")

    def _start(self, line: Line[..., Any]) -> range:
        """Mark a line as started; returns the numbers of its lines in the plan."""
        if line not in self.lines or line in self._started:
            raise Miscarried(f"“{line.step}” is {'carried out twice' if line in self._started else 'not planned'}")
        earlier = self.lines[: self.lines.index(line)]
        if before := [one.step for one in earlier if one not in self._started]:
            raise Miscarried(f"“{line.step}” comes before {', '.join(before)}")
        self._started.append(line)
        number = self.first + sum(len(one.planned) for one in earlier)
        return range(number, number + len(line.planned))

    @contextlib.contextmanager
    def _under_way(self, line: Line[..., Any]) -> Iterator[None]:
        """Judge again what a change needs, and permit its actions in the block."""
        if not isinstance(line, Change):
            yield
            return
        self._require(line)
        self._begun.append(line)
        self._state_is(line.begun)
        token = carried.set(UnderWay(Permit(self.report.environment, line.acts), self._last))
        try:
            with self.telling(line):
                yield
        finally:
            carried.reset(token)

    @contextlib.contextmanager
    def telling(self, line: Line[..., Any]) -> Iterator[None]:
        """State what is so if a change fails in the block."""
        try:
            yield
        except OpsError as error:
            if isinstance(line, Change) and line.failed:
                self._state_is(line.failed(error))
            raise

    def end(self, line: Line[..., R], result: R) -> None:
        """Note that a line is done, and the state from now on."""
        self._last = result
        if isinstance(line, Change):
            self._is_final |= line.is_final
            self._state_is(line.done(result) if callable(line.done) else line.done)

    def _require(self, change: Change[..., Any]) -> None:
        """Judge again what it needs. What is found now takes the place of what the plan found under the same name."""
        before = len(self.report.findings)
        for need in change.needs:
            need(self.report)
        found = self.report.findings[before:]
        now = {one.name: one for one in found}
        self.report.findings[:] = [now.pop(one.name, one) for one in self.report.findings[:before]] + list(now.values())
        if any(one.status is Status.CRITICAL for one in found):
            self.report.fail_if_critical()

    def _state_is(self, state: State | None) -> None:
        if state:
            self.report.state_is(state.what, state.hint)
