"""Who is dead: judged with real processes, also in a PID namespace that shares only the host name with this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from runbook.guard.process import Process, parse, this_process
from tests.runbook.processes import CONTAINER, ROOT

PROGRAM = "from runbook.guard.process import this_process as me; print(me().text, flush=True); input()"


@pytest.fixture
def living(request: pytest.FixtureRequest) -> Iterator[tuple[Process, subprocess.Popen[str]]]:
    launcher = getattr(request, "param", ())
    with subprocess.Popen(
        [*launcher, sys.executable, "-c", PROGRAM], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout
        process = parse(child.stdout.readline().strip())
        assert process
        yield process, child
        child.kill()


def test_a_process_is_dead_once_it_is_killed(
    living: tuple[Process, subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, child = living
    assert process.is_judgeable
    assert not process.is_dead()
    earlier = replace(process, ticks=process.ticks - 1)
    assert earlier.is_dead(), "the process id is another process's now"
    with pytest.raises(ProcessLookupError):
        earlier.send(signal.SIGKILL)
    monkeypatch.setattr("os.kill", lambda *_: (_ for _ in ()).throw(PermissionError))  # another user's
    assert not process.is_dead()
    process.send(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.is_dead(), "a zombie, which nobody has collected yet"


@pytest.mark.parametrize("living", [CONTAINER], indirect=True)
def test_a_process_of_another_pid_namespace_is_never_judged(living: tuple[Process, subprocess.Popen[str]]) -> None:
    process, child = living
    assert process.pid == 1, "here it is init's number"
    assert not process.is_judgeable
    assert not process.is_dead()
    child.kill()
    child.wait()
    assert not process.is_dead(), "this process cannot know"
    with pytest.raises(ProcessLookupError):
        process.send(signal.SIGKILL)


def test_another_boot_or_text_is_never_judged() -> None:
    me = this_process()
    assert parse(me.text) == me
    assert not me.is_dead()
    assert not replace(me, token="0" * 16).is_dead(), "a clone of this machine has the same numbers"
    assert not replace(me, place="0" * 16, pid=2**22 - 1).is_dead()
    assert parse("db-2 4711 1764370800") is None


def test_where_proc_belongs_to_another_namespace_nothing_is_judged() -> None:
    """`unshare --pid` without a /proc of its own."""
    program = "import os; from runbook.guard.process import this_process as me; print(me().place, me().is_judgeable)"
    argv = ["unshare", "--pid", "--fork", sys.executable, "-c", program]
    assert subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split() == [
        "unknown",
        "False",
    ]
