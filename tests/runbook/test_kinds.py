"""Probes and actions: the same in a flow run (a real Prefect server) and in none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal, TypeVar
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import UnfinishedRun

from runbook import kinds
from runbook.current import current_report, use_report
from runbook.errors import CommandFailed, LockLost, OpsError, Unreachable
from runbook.guard.permit import Act, Permit
from runbook.kinds import action, probe
from runbook.report import Report, Status
from runbook.wait import until
from tests.runbook.system import EFFECT

T = TypeVar("T")
Where = Literal["in a flow run", "in none"]
BOTH = pytest.mark.parametrize("where", ["in a flow run", "in none"])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, prefect_server: str) -> None:
    monkeypatch.setattr(kinds, "RETRY_DELAYS_SECONDS", [0.01, 0.01, 0.01])


def carry_out(where: Where, work: Callable[[], T], report: Report | None = None) -> T:
    """Call `work` as a flow's body, or as it is."""

    def body() -> T:
        with use_report(report or Report("Trial", "t")):
            return work()

    return flow(name="steps")(body)() if where == "in a flow run" else body()


class Calls:
    """Counts calls; raises the errors given, one a call, then answers 7."""

    def __init__(self, *errors: Exception) -> None:
        self.count = 0
        self.errors = list(errors)

    def __call__(self) -> int:
        self.count += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7


def down(count: int) -> list[Exception]:
    return [Unreachable("nobody answers") for _ in range(count)]


@BOTH
def test_a_probe_is_retried_on_unreachable(where: Where) -> None:
    calls = Calls(*down(3))

    @probe
    def read() -> int:
        assert (TaskRunContext.get() is not None) == (where == "in a flow run")
        return calls()

    assert carry_out(where, read) == 7
    assert calls.count == 4


@BOTH
def test_a_probe_gives_up_after_three_retries(where: Where) -> None:
    calls = Calls(*down(9))

    @probe
    def read() -> int:
        return calls()

    with pytest.raises(Unreachable, match="nobody answers"):
        carry_out(where, read)
    assert calls.count == 4


@BOTH
@pytest.mark.parametrize("error", [CommandFailed(["psql"], 1, "no"), ValueError("wrong")])
def test_a_probe_is_not_retried_on_anything_else(where: Where, error: Exception) -> None:
    calls = Calls(error)

    @probe
    def read() -> int:
        return calls()

    with pytest.raises(type(error)):
        carry_out(where, read)
    assert calls.count == 1


@BOTH
def test_an_action_is_retried_only_where_it_is_idempotent(where: Where) -> None:
    once, again = Calls(*down(1)), Calls(*down(1))

    @action
    def create() -> int:
        return once()

    @action(idempotent=True)
    def start() -> int:
        return again()

    def work() -> int:
        with pytest.raises(Unreachable):
            create()
        return start()

    assert carry_out(where, work) == 7
    assert (once.count, again.count) == (1, 2)


@BOTH
def test_a_second_identical_call_is_a_second_call(where: Where) -> None:
    calls = Calls()

    @probe
    def read(table: str) -> int:
        assert table == "users"
        return calls()

    carry_out(where, lambda: (read("users"), read("users"), read.submit("users").result()))
    assert calls.count == 3


@BOTH
def test_every_step_is_in_the_report_with_its_seconds(where: Where) -> None:
    report = Report("Trial", "t")
    begun = threading.Event()

    @probe
    def read_one() -> Report | None:
        begun.set()
        # The other begins and ends meanwhile, and is told at once.
        until(lambda: [step.name for step in report.steps] == ["write_two"], what="the other step", seconds=120)
        time.sleep(0.2)
        return current_report()

    @action
    def write_two() -> None:
        return None

    @action
    def break_three() -> None:
        raise OpsError("broken")

    def work() -> None:
        one = read_one.submit()
        assert begun.wait(120)
        assert [step.result() for step in (write_two.submit(), one)] == [None, report]
        with pytest.raises(OpsError):
            break_three()

    started = time.monotonic()
    carry_out(where, work, report)
    elapsed = time.monotonic() - started
    steps = {step.name: step for step in report.steps}
    assert {name: step.status for name, step in steps.items()} == {
        "read_one": Status.OK,
        "write_two": Status.OK,
        "break_three": Status.CRITICAL,
    }
    assert 0.2 <= steps["read_one"].seconds <= elapsed
    assert steps["write_two"].seconds < steps["read_one"].seconds
    assert all(report.started <= step.started for step in report.steps)


@BOTH
def test_every_try_is_in_the_report(where: Where) -> None:
    report = Report("Trial", "t")
    calls = Calls(*down(2))

    @probe
    def read() -> int:
        return calls()

    carry_out(where, read, report)
    assert [step.status for step in report.steps] == [Status.CRITICAL, Status.CRITICAL, Status.OK]


class Lost:
    """A lock that is held no longer."""

    def exclude(self) -> str:
        return ""

    def require(self) -> None:
        raise LockLost("the lock expired")


@BOTH
def test_a_permit_requires_the_lock(where: Where) -> None:
    report = Report("Trial", "t", "t")
    permit = report.permit(Act("drop", "it"), effect=EFFECT)
    report.lock = Lost()
    done = []

    @action
    def drop(permit: Permit) -> None:
        done.append(permit)

    @action(idempotent=True)
    def look() -> int:
        return 7

    def work() -> None:
        assert look() == 7  # needs no lock
        ways: list[Callable[[], None]] = [
            lambda: drop(permit),
            lambda: drop(permit=permit),
            lambda: drop.submit(permit).result(),
        ]
        for way in ways:
            with pytest.raises(LockLost):
                way()

    carry_out(where, work, report)
    assert done == []
    assert [step.name for step in report.steps] == ["look"], "what did not run is no step"


def test_without_a_report_steps_are_plain_calls() -> None:
    @probe
    def read(number: int) -> int:
        """Reads."""
        return number + 1

    assert read(1) == 2
    assert read.submit(2).result() == 3
    assert (read.name, read.__doc__) == ("read", "Reads.")


@BOTH
def test_after_waits_for_what_was_submitted(where: Where) -> None:
    order = []

    @action
    def stop() -> None:
        time.sleep(0.3)
        order.append("stop")

    @action
    def destroy() -> None:
        order.append("destroy")

    def work() -> None:
        destroy.after(stop.submit()).submit().result()
        destroy.after(stop.submit())()

    carry_out(where, work)
    assert order == ["stop", "destroy"] * 2


@BOTH
def test_what_comes_after_a_failed_step_does_not_run(where: Where) -> None:
    done = []

    @action
    def stop() -> None:
        raise OpsError("it does not stop")

    @action
    def destroy() -> None:
        done.append(True)

    def work() -> None:
        with pytest.raises(OpsError, match="it does not stop"):
            destroy.after(stop.submit())()
        behind = destroy.after(stop.submit()).submit()
        # Prefect says of a submitted one only that it never ran; the failed step itself is in its log and the report.
        with pytest.raises(UnfinishedRun if where == "in a flow run" else OpsError):
            behind.result()

    carry_out(where, work)
    assert done == []


def test_after_draws_an_edge_in_the_graph() -> None:
    @probe
    def read() -> list[str]:
        return ["users"]

    @action
    def build() -> dict[str, int]:
        return {"users": 3}

    @action
    def swap() -> None:
        return None

    def work() -> str:
        found = read()
        built = build.after(found).submit()
        swap.after(found, built)()
        read()
        return str(FlowRunContext.get().flow_run.id)  # type: ignore[union-attr]

    run_id = carry_out("in a flow run", work)
    runs = task_runs(run_id, 4)
    ids = {run.name.rsplit("-", 1)[0]: str(run.id) for run in sorted(runs, key=started, reverse=True)}
    edges = {
        (run.name.rsplit("-", 1)[0], str(parent.id))  # type: ignore[union-attr]
        for run in runs
        for inputs in run.task_inputs.values()
        for parent in inputs
    }
    assert edges == {("build", ids["read"]), ("swap", ids["read"]), ("swap", ids["build"])}


def started(run: TaskRun) -> float:
    assert run.start_time
    return run.start_time.timestamp()


def task_runs(flow_run_id: str, count: int) -> list[TaskRun]:
    """The task runs as the server knows them: it writes them down a moment later."""
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(flow_run_id)]))
    with get_client(sync_client=True) as client:

        def written() -> list[TaskRun] | None:
            found = client.read_task_runs(flow_run_filter=chosen)
            return found if len(found) == count and all(run.start_time for run in found) else None

        found = until(written, what=f"{count} task runs", seconds=120)
    assert found
    return found
