"""The lock on one host: real processes, killed for real. Without a flow run there is no lease: the file lock alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from runbook import run
from runbook.errors import Locked
from runbook.guard import lock
from runbook.guard.holder import Rank
from runbook.guard.lock import hold
from runbook.guard.process import Process
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.wait import until
from tests.runbook.processes import CONTAINER, Actor, is_alive
from tests.runbook.system import System


def take(system: System, rank: Rank = "maintenance", runbook: str = "Trial") -> None:
    with hold(system.name, system.reports_directory, runbook, rank):
        pass


def refused(system: System, rank: Rank) -> Locked:
    with pytest.raises(Locked) as error:
        take(system, rank)
    return error.value


def holder(system: System, rank: Rank, actors: list[Actor], directory: Path) -> Actor:
    actors.append(Actor(directory / "out", "holder", "hold", system.name, system.reports_directory, rank))
    actors[-1].says("held")
    return actors[-1]


def test_a_scheduled_run_waits_for_another_and_says_so(
    system: System, actors: list[Actor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would run it again. One that a person launched is told at once."""
    actor, told, reports = holder(system, "maintenance", actors, tmp_path), list[str](), list[Report]()
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(lock, "logger", lambda: SimpleNamespace(info=lambda text, *values: told.append(text % values)))

    def scheduled() -> None:
        with runbook("Nightly", system, changes=True) as report:
            reports.append(report)

    with pytest.raises(Locked):
        scheduled()
    assert told == []
    monkeypatch.setattr(run, "is_scheduled", lambda: True)
    waiting = threading.Thread(target=scheduled)
    waiting.start()
    until(lambda: told, what="its word", seconds=120)
    assert f"{system.name} is held by “Rebuild indexes”" in told[0]
    actor.kill()
    waiting.join(120)
    assert [report.status for report in reports] == [Status.OK]
    assert len(told) == 1
    monkeypatch.setattr(run, "PATIENCE_SECONDS", 0.5)
    holder(system, "maintenance", actors, tmp_path)
    with pytest.raises(Locked):
        scheduled()


def lock_file(system: System) -> Path:
    return system.reports_directory / f".lock-{system.name}"


def test_a_second_process_is_refused_until_the_first_is_killed(
    system: System, actors: list[Actor], tmp_path: Path
) -> None:
    actor = holder(system, "recovery", actors, tmp_path)
    error = refused(system, "maintenance")
    year = time.strftime("%Y-")
    assert f"{system.name} is held by “Rebuild indexes”" in error.message
    assert f"process {actor.pid} on {socket.gethostname()}, since {year}" in error.message
    assert "wait for it to end, or cancel it" in error.hint
    refused(system, "recovery")  # a recovery does not end another
    assert is_alive(actor.pid)
    actor.kill()
    until(lambda: not is_alive(actor.pid), what="the kill", seconds=120)
    started = time.monotonic()
    take(system)
    assert time.monotonic() - started < 120


def test_a_recovery_ends_maintenance_and_what_it_runs(
    system: System, actors: list[Actor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = holder(system, "maintenance", actors, tmp_path)
    child = int(actor.says("held"))
    monkeypatch.setattr("runbook.guard.lock.END_SECONDS", 180.0)
    refused(system, "maintenance")
    assert is_alive(actor.pid)
    assert is_alive(child)
    started = time.monotonic()
    with hold(system.name, system.reports_directory, "Full restore", "recovery"):
        assert json.loads(lock_file(system).read_text())["runbook"] == "Full restore"
    assert time.monotonic() - started < 120
    assert actor.process.wait(120) == -signal.SIGTERM
    until(lambda: not is_alive(child), what="the end of its child", seconds=120)


@pytest.mark.parametrize("confirm", ["", "another-name"])
def test_a_recovery_that_is_only_planned_ends_nobody_and_waits_for_nobody(
    system: System, actors: list[Actor], tmp_path: Path, confirm: str
) -> None:
    actor = holder(system, "maintenance", actors, tmp_path)
    with runbook("Restore", system, confirm, changes=True, rank="recovery") as report:
        pass
    assert "held by “Rebuild indexes”" in report.facts["lock"]
    staging = runbook("Restore", system, confirm, changes=True, without_confirm="stages", rank="recovery")
    with pytest.raises(Locked), staging:
        pass
    assert is_alive(actor.pid)


def test_a_plan_makes_no_other_run_wait(
    system: System, actors: list[Actor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that only reads holds no lock. One that writes scratch copies ends when another run comes."""
    with runbook("Restore", system, "", changes=True, rank="recovery"):
        take(system)
    with runbook("Vacuum", system, "", changes=True, without_confirm="changes"), pytest.raises(Locked):
        threaded(lambda: take(system))
    monkeypatch.setattr("runbook.guard.lock.END_SECONDS", 180.0)
    actor = holder(system, "plan", actors, tmp_path)
    take(system)
    assert actor.process.wait(120) == -signal.SIGTERM


def threaded(work: Callable[[], None]) -> None:
    """In another thread, which has not the lock of this one."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def test_a_recovery_kills_maintenance_that_does_not_listen(
    system: System, actors: list[Actor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Process.send

    def kill(process: Process, number: signal.Signals) -> None:
        """It is given half a second for what it does not do, and all the time that it needs to die."""
        monkeypatch.setattr("runbook.guard.lock.END_SECONDS", 0.5 if number == signal.SIGTERM else 120.0)
        send(process, number)

    monkeypatch.setattr(Process, "send", kill)
    actors.append(Actor(tmp_path / "out", "holder", "deaf", system.name, system.reports_directory, "maintenance"))
    child = int(actors[0].says("held"))
    take(system, "recovery")
    assert actors[0].process.wait(120) == -signal.SIGKILL
    until(lambda: not is_alive(child), what="the end of its child", seconds=120)


def test_a_recovery_also_ends_maintenance_that_took_the_lock_in_between(
    system: System, actors: list[Actor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, send = holder(system, "maintenance", actors, tmp_path), Process.send

    def send_and_follow(process: Process, number: signal.Signals) -> None:
        send(process, number)
        if len(actors) == 1:
            first.process.wait(120)
            holder(system, "maintenance", actors, tmp_path)

    monkeypatch.setattr(Process, "send", send_and_follow)
    take(system, "recovery")
    assert [actor.process.wait(120) != 0 for actor in actors] == [True, True]


def test_a_lock_s_file_that_is_a_link_or_lost_its_name_is_no_lock(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link would have the holder's name written into whatever it leads to; a deleted file keeps nobody out."""
    system.reports_directory.mkdir(parents=True, exist_ok=True)
    (tmp_path / "victim").write_text("precious")
    lock_file(system).symlink_to(tmp_path / "victim")
    with pytest.raises(Locked, match="is a symbolic link"):
        take(system)
    assert (tmp_path / "victim").read_text() == "precious"
    lock_file(system).unlink()
    take_file = lock.taken
    monkeypatch.setattr(lock, "taken", lambda file: (lock_file(system).unlink(), take_file(file))[1])
    with pytest.raises(Locked, match="was deleted or replaced"):
        take(system)
    monkeypatch.setattr(lock, "taken", take_file)
    take(system)


def test_a_holder_on_another_host_is_not_looked_for_among_our_processes(
    system: System, actors: list[Actor], tmp_path: Path
) -> None:
    actor = holder(system, "maintenance", actors, tmp_path)
    text = lock_file(system).read_text()
    lock_file(system).write_text(json.dumps(json.loads(text) | {"host": "db-2"}))  # a directory that two hosts share
    assert f"process {actor.pid} on db-2" in refused(system, "recovery").message
    assert is_alive(actor.pid)


def test_a_holder_in_a_container_is_not_looked_for_among_our_processes(
    system: System, actors: list[Actor], tmp_path: Path
) -> None:
    """It has this host's name, and process id 1: here that is init."""
    words = ("holder", "hold", system.name, system.reports_directory, "maintenance")
    actors.append(Actor(tmp_path / "out", *words, launcher=CONTAINER))
    actors[0].says("held")
    assert f"process 1 on {socket.gethostname()}" in refused(system, "recovery").message
    assert actors[0].process.poll() is None


def test_a_recovery_does_not_end_its_own_process(system: System) -> None:
    held, done = threading.Event(), threading.Event()

    def maintenance() -> None:
        with hold(system.name, system.reports_directory, "Rebuild indexes", "maintenance"):
            held.set()
            done.wait(300)

    thread = threading.Thread(target=maintenance)
    thread.start()
    try:
        assert held.wait(120)
        assert "Rebuild indexes" in refused(system, "recovery").message
    finally:
        done.set()
        thread.join()


def test_the_same_run_passes_with_the_same_lock(system: System) -> None:
    with hold(system.name, system.reports_directory, "Drill", "maintenance") as outer:
        with hold(system.name, system.reports_directory, "Full restore", "recovery") as inner:
            assert inner is outer, "the inner one must check the lease that the outer one holds"
        with hold(system.name, system.reports_directory, "Again", "recovery") as again:
            assert again is outer
    take(system)


def test_another_environment_is_another_lock(system: System) -> None:
    other = System(system.reports_directory)
    with hold(system.name, system.reports_directory, "One", "maintenance"):
        take(other)


def test_a_failed_run_leaves_no_name_behind(system: System) -> None:
    with pytest.raises(ZeroDivisionError), hold(system.name, system.reports_directory, "Trial", "maintenance"):
        raise ZeroDivisionError
    assert lock_file(system).read_text() == ""
    take(system)


def test_a_holder_that_has_not_written_its_name_yet_is_waited_for(system: System) -> None:
    with hold(system.name, system.reports_directory, "Trial", "maintenance"):
        os.truncate(lock_file(system), 0)
        context = threading.Thread(target=lambda: errors.append(refused(system, "recovery")))
        errors: list[Locked] = []
        context.start()
        context.join()
    assert "just starting" in errors[0].message
    assert "try again in a few seconds" in errors[0].hint


HOLD = """
import fcntl, sys
for path in sys.argv[1:]:
    try:
        fcntl.flock(open(path), fcntl.LOCK_EX | fcntl.LOCK_NB)
        print("held", path)
    except OSError as error:
        print("refused", path)
"""


def test_another_account_holds_no_lock_of_the_reports(system: System, tmp_path: Path) -> None:
    """Whoever holds one stops every runbook, recoveries too."""
    old = system.reports_directory / f".chain-{socket.gethostname()}.lock"
    system.reports_directory.mkdir(parents=True)
    old.touch(0o644)  # of an earlier version
    with runbook("Restore", system, system.name, changes=True):
        pass
    with runbook("Check", system, often=True):
        pass
    for directory in (system.reports_directory, *system.reports_directory.parents[:3]):
        directory.chmod(0o755)
    locks = [path for path in system.reports_directory.iterdir() if "lock" in path.name]
    assert len(locks) >= 3
    assert {path.stat().st_mode & 0o777 for path in locks} == {0o600}
    if os.geteuid() != 0:  # only root can become another account
        return
    found = subprocess.run(
        ["/usr/bin/python3", "-c", HOLD, *map(str, locks)], user=65534, group=65534, text=True, capture_output=True
    )
    assert found.stdout.count("refused") == len(locks), found.stdout + found.stderr
