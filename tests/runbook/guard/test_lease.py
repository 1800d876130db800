"""The lease in Prefect: a real server, and flow runs that are processes of their own on "hosts" of their own.

Two runs with different report directories have no file lock in common, like runs on two hosts.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL
from prefect.variables import Variable

from runbook import progress
from runbook.errors import Locked, LockLost, Unreachable
from runbook.guard import brief
from runbook.guard import lease as leases
from runbook.guard.holder import Rank, remember, remembered, this_run
from runbook.guard.permit import Act, Permit
from runbook.kinds import action
from runbook.report import Report
from runbook.run import runbook
from runbook.wait import until
from tasks.faults.relay import Relay
from tests.fixtures.prefect_client import other_server
from tests.fixtures.servers import free_port
from tests.runbook.processes import CONTAINER, Actor, is_alive
from tests.runbook.system import EFFECT, System

pytestmark = pytest.mark.usefixtures("prefect_server")
DROP = Act("drop database", "grc_db_old")


@flow(name="trial")
def trial(system: System, rank: Rank = "maintenance", confirm: str = "", *, inside: object = None) -> Report:
    with runbook("Trial", system, confirm, changes=True, rank=rank) as report:
        if callable(inside):
            inside(report)
    return report


def run(system: System, rank: Rank = "maintenance", inside: object = None) -> Report:
    return trial(system, rank, system.name, inside=inside)


def taken(system: System) -> int:
    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name(leases.limit_name(system.name)).active_slots


def holder_of(system: System) -> dict[str, str]:
    return dict(json.loads(str(Variable.get(f"env-{system.name}-holder"))))


def flow_run(run_id: str) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(run_id))


@pytest.fixture
def elsewhere(system: System, tmp_path: Path) -> System:
    """The same environment, seen from a host with other files."""
    return System(tmp_path / "elsewhere", system.name)


@pytest.fixture
def holder(system: System, actors: list[Actor], tmp_path: Path, request: pytest.FixtureRequest) -> Actor:
    """A maintenance flow run in a process of its own, working."""
    words = ("holder", "flow", system.name, system.reports_directory, "maintenance")
    actors.append(Actor(tmp_path / "out", *words, launcher=getattr(request, "param", ())))
    actors[-1].says("held")
    return actors[-1]


def test_a_run_takes_the_slot_and_gives_it_back(system: System) -> None:
    def inside(_report: Report) -> None:
        assert taken(system) == 1
        assert holder_of(system)["runbook"] == "Trial"
        assert holder_of(system)["lease_id"]

    assert run(system, inside=inside).status == "OK"
    assert taken(system) == 0


def test_another_host_is_refused_and_a_killed_holder_frees_it_at_once(
    holder: Actor, elsewhere: System, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = holder_of(system)
    with pytest.raises(Locked) as error:
        run(elsewhere)
    assert f"{system.name} is held by “Rebuild indexes”, run “{known['run_name']}” ({known['run_id']})" in str(
        error.value
    )
    assert f"process {holder.pid} on {known['host']}, since {known['since']}" in error.value.message
    assert f"/runs/flow-run/{known['run_id']}" in error.value.hint
    holder.kill()  # and not collected: a zombie, as under a container's PID 1 that collects nobody
    until(lambda: not is_alive(holder.pid), what="the kill", seconds=120)
    started, released, release = time.monotonic(), list[UUID](), leases.release

    def noted(lease_id: UUID) -> None:
        released.append(lease_id)
        release(lease_id)

    monkeypatch.setattr(leases, "release", noted)
    run(elsewhere)
    assert released == [UUID(known["lease_id"])], "not by its end"
    assert time.monotonic() - started < 300
    assert taken(system) == 0


@pytest.mark.parametrize("holder", [CONTAINER], indirect=True)
def test_a_living_run_of_a_container_with_this_host_s_name_keeps_its_lease(
    holder: Actor, elsewhere: System, system: System
) -> None:
    """Its process id means nothing here: neither its life nor its death can be judged, so its lease has to end."""
    known = holder_of(system)
    assert (known["host"], known["pid"]) == (socket.gethostname(), 1)
    with pytest.raises(Locked, match="process 1 on"):
        run(elsewhere)
    holder.kill()
    holder.process.wait(120)
    with pytest.raises(Locked):
        run(elsewhere)


@pytest.mark.usefixtures("holder")
def test_a_clock_that_is_set_does_not_kill_a_living_run(
    elsewhere: System, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start time of a process in seconds is derived from the boot time, which moves with the clock."""
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: time.time() - 3600.0)
    with pytest.raises(Locked):
        run(elsewhere)
    assert taken(system) == 1


def test_a_recovery_ends_a_maintenance_run_of_this_host(
    holder: Actor, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runbook.guard.lock.END_SECONDS", 180.0)
    monkeypatch.setattr("runbook.guard.lock.LAST_WORDS_SECONDS", 180.0)
    run_id = holder_of(system)["run_id"]
    run(system, "recovery")
    assert holder.process.wait(180) != 0
    state = flow_run(run_id).state
    assert state
    assert state.is_cancelled(), f"nobody is to read it as a failure of its own: {state}"
    assert "outranks maintenance" in str(state.message)


def test_a_recovery_asks_the_other_host_to_end_its_maintenance(
    holder: Actor, system: System, elsewhere: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runbook.guard.lock.END_SECONDS", 120.0)
    known = holder_of(system)
    Variable.set(f"env-{system.name}-holder", json.dumps(known | {"host": "db-2"}), overwrite=True)

    with ending_when_asked(holder, known["run_id"]):
        run(elsewhere, "recovery")


@contextlib.contextmanager
def ending_when_asked(actor: Actor, run_id: str) -> Iterator[None]:
    """What a worker does on the other host: it ends a run that is Cancelling (its own code needs a deployment)."""
    seen = []

    def worker() -> None:
        def cancelling() -> bool:
            state = flow_run(run_id).state
            return bool(state and state.is_cancelling())

        until(cancelling, what="the request to end", seconds=120)
        seen.append(True)
        actor.process.terminate()

    thread = threading.Thread(target=worker)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert seen


def expire(system: System) -> None:
    """As in an outage of Prefect that is longer than the lease."""
    leases.release(UUID(holder_of(system)["lease_id"]))


def lose(system: System) -> None:
    """The lease ends behind the holder's back, and another run has been there since (its name first: a renewal that
    comes between the two would rightly take the slot again)."""
    known = holder_of(system)
    other = known | {"run_id": str(uuid.uuid4())}
    Variable.set(f"env-{system.name}-holder", json.dumps(other), overwrite=True)
    leases.release(UUID(known["lease_id"]))


def test_a_lease_that_expired_is_taken_anew_where_nobody_held_it_since(system: System) -> None:
    def inside(report: Report) -> None:
        before = holder_of(system)["lease_id"]
        expire(system)
        report.require_lock()
        assert taken(system) == 1
        assert holder_of(system)["lease_id"] not in ("", before)

    run(system, inside=inside)
    assert taken(system) == 0, "the new lease is given back"


def test_a_lease_that_expired_is_lost_while_another_run_holds_the_environment(system: System) -> None:
    def inside(report: Report) -> None:
        expire(system)
        other = leases.take(system.name, uuid.uuid4())
        assert other
        try:
            report.require_lock()
        finally:
            leases.release(other)

    with pytest.raises(LockLost, match="expired and may be another run's"):
        run(system, inside=inside)


def test_nothing_irreversible_happens_after_the_lease_is_lost(system: System) -> None:
    done = []

    @action
    def drop(permit: Permit) -> None:
        done.append(permit)

    def inside(report: Report) -> None:
        permit = report.permit(DROP, effect=EFFECT)
        drop(permit)
        lose(system)
        with pytest.raises(LockLost):
            drop.submit(permit).result()
        drop(permit)

    with pytest.raises(LockLost, match="expired and may be another run's"):
        run(system, inside=inside)
    assert len(done) == 1
    (path,) = system.reports_directory.glob("*.json")
    assert json.loads(path.read_text())["status"] == "CRITICAL"


def test_no_permit_after_the_lease_is_lost_in_a_runbook_inside_either(system: System) -> None:
    def inside(_report: Report) -> None:
        with runbook("Inner", system, system.name, changes=True) as inner:
            lose(system)
            inner.permit(DROP, effect=EFFECT)

    with pytest.raises(LockLost):
        run(system, inside=inside)


@pytest.mark.parametrize("how", ["nobody listens", "it hangs", "it answers 503"])
def test_a_lease_is_held_while_prefect_does_not_answer(
    system: System, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recovery goes on, and soon: the client of a flow run would try for eight minutes."""
    seconds = []

    def inside(report: Report) -> None:
        started = time.monotonic()
        with (
            a_prefect_that(how) as address,
            other_server({PREFECT_API_URL: f"http://{address}/api"}),
            monkeypatch.context() as patch,
        ):
            patch.setattr(leases, "ANSWER_SECONDS", 0.5)
            report.require_lock()
        seconds.append(time.monotonic() - started)

    run(system, "recovery", inside)
    assert seconds[0] < 120


@action
def drop(permit: Permit) -> None:
    """Something that cannot be undone."""


@pytest.mark.parametrize("how", ["nobody listens", "it answers 401", "it answers 403", "it answers 500"])
def test_a_lease_that_nobody_confirmed_for_as_long_as_it_lasts_is_lost(
    system: System, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partition: Prefect gives the slot to the next run then. Only an answer counts, and one makes it good again."""
    now, later, reports = leases.boot_seconds, [0.0], list[Report]()
    monkeypatch.setattr(leases, "boot_seconds", lambda: now() + later[0])

    def inside(report: Report) -> None:
        reports.append(report)
        permit = report.permit(DROP, effect=EFFECT)
        later[0] = leases.LEASE_SECONDS + 1
        drop(permit)  # Prefect answers: it is confirmed
        with a_prefect_that(how) as address, other_server({PREFECT_API_URL: f"http://{address}/api"}):
            drop(permit)
            later[0] *= 2
            drop(permit)

    with pytest.raises(LockLost, match=r"has not confirmed this run's lock for \d+ s \(limit 90 s\)"):
        run(system, "recovery", inside)
    assert [step.name for step in reports[0].steps] == ["drop", "drop"], "not the third"
    assert "irreversible steps done before: drop, drop" in [one.value for one in reports[0].findings]


@pytest.fixture
def relay() -> Iterator[Relay]:
    """In front of the real server, which other tests use as well: what hangs here looks like its SIGSTOP."""
    host, _, port = os.environ["PREFECT_API_URL"].removeprefix("http://").removesuffix("/api").partition(":")
    with (
        Relay(("127.0.0.1", free_port()), (host, int(port)), ("127.0.0.1", free_port())) as relay,
        other_server({PREFECT_API_URL: f"http://127.0.0.1:{relay.listen[1]}/api"}),
    ):
        yield relay


def test_a_prefect_that_hangs_is_waited_for_once(system: System, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each act of a recovery: an outage must not grow with Prefect's."""
    asked, renewed, bars = list[str](), leases._renewed, list[float]()

    def counted(lease_id: UUID) -> bool:
        asked.append(threading.current_thread().name)
        return renewed(lease_id)

    monkeypatch.setattr(leases, "_renewed", counted)
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.2)

    def inside(report: Report) -> None:
        permit = report.permit(DROP, effect=EFFECT)
        drawn = threading.Event()

        def half() -> progress.WorkDone:
            drawn.set()
            return progress.WorkDone("half", 0.5)

        relay.set_fault("timeout")
        asked.clear()
        for _ in range(8):
            drop(permit)
        began = time.monotonic()
        with progress.progress(half):
            assert drawn.wait(60)
        bars.append(time.monotonic() - began)
        relay.set_fault(None)

    report = run(system, "recovery", inside)
    assert len([name for name in asked if name != "lease"]) == 1
    assert len(report.permitted_steps) == 8
    (finding,) = [one for one in report.findings if one.name == "Prefect did not answer"]
    assert float(finding.value.split("waited ")[1].split()[0]) < 2 * leases.ANSWER_SECONDS + 1
    assert bars[0] < 30, "its own client would wait for minutes"


def test_no_question_about_the_lock_waits_for_minutes(
    system: System, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect's own client tries nine times, for 60 s each, where a server takes connections and does not answer."""
    monkeypatch.setattr(brief, "BUSY_SECONDS", 0.3)
    me = this_run("Trial", "recovery")
    relay.set_fault("timeout")
    began = time.monotonic()
    for ask in (
        lambda: leases.ensure_limit(system.name),
        lambda: leases.release(uuid.uuid4()),
        lambda: remember(system.name, me),
        lambda: remembered(system.name),
    ):
        with pytest.raises(Unreachable, match="an answer of Prefect about the"):
            ask()
    assert time.monotonic() - began < 60


@contextlib.contextmanager
def a_prefect_that(how: str) -> Iterator[str]:
    """The address of a Prefect server that is of no use."""
    if how == "nobody listens":
        yield f"127.0.0.1:{free_port()}"
        return
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):  # closed: the test is over
                while True:
                    connection, _address = server.accept()
                    asked.append(connection)
                    if how.startswith("it answers"):
                        connection.recv(65536)
                        answer = f"HTTP/1.1 {how[-3:]} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                        connection.sendall(answer.encode())
                        connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        assert asked, "the run asked this server, not the real one"
        server.shutdown(socket.SHUT_RDWR)


def test_the_lease_is_renewed_while_the_run_works(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_EVERY_SECONDS", 0.2)
    renewed = []
    renew = leases.Lease._renew

    def counted(self: leases.Lease) -> None:
        renew(self)
        renewed.append(self._gone.is_set())

    monkeypatch.setattr(leases.Lease, "_renew", counted)

    def inside(_report: Report) -> None:
        until(lambda: len(renewed) > 2, what="three renewals", seconds=120)
        lose(system)
        until(lambda: renewed[-1], what="the loss to be noticed", seconds=120)

    run(system, inside=inside)
    assert renewed[:2] == [False, False]


@pytest.mark.soak
def test_a_lease_of_another_host_s_dead_holder_ends_by_itself(holder: Actor, system: System, elsewhere: System) -> None:
    known = holder_of(system)
    Variable.set(f"env-{system.name}-holder", json.dumps(known | {"host": "db-2"}), overwrite=True)
    holder.kill()
    with pytest.raises(Locked, match="on db-2"):
        run(elsewhere)
    started = time.monotonic()

    def free() -> bool:
        return taken(system) == 0

    until(free, what="the lease's end", seconds=leases.LEASE_SECONDS + 40, every_seconds=2)
    assert time.monotonic() - started > leases.LEASE_SECONDS - 40
    run(elsewhere)
