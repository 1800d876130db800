"""A process that kills itself where a test says."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil

from runbook.wait import until
from tests.runbook.processes import Actor


def passed(actor: Actor) -> list[str]:
    return [line.removeprefix("passed ") for line in actor.text.splitlines()]


def test_it_kills_where_it_is_told_logs_where_it_was_and_else_does_nothing(tmp_path: Path, actors: list[Actor]) -> None:
    log = tmp_path / "log"
    out = tmp_path / "out"
    actors += [
        Actor(out, "actor", "fail", "swap", OPS_FAILPOINT="swap", OPS_FAILPOINT_LOG=str(log)),
        Actor(out, "actor", "fail", "swap", OPS_FAILPOINT="another"),
    ]
    killed, through = actors
    assert killed.process.wait(120) == -signal.SIGKILL
    assert passed(killed) == ["before"]
    assert log.read_text() == "before\nswap\n"
    assert through.process.wait(120) == 0
    assert passed(through) == ["before", "swap", "after"]


def test_it_stops_until_somebody_continues_it(tmp_path: Path, actors: list[Actor]) -> None:
    actors.append(Actor(tmp_path / "out", "actor", "fail", "swap", OPS_FAILPOINT="swap:pause"))
    process = psutil.Process(actors[0].pid)
    until(lambda: process.status() == psutil.STATUS_STOPPED, what="the pause", seconds=120)
    assert passed(actors[0]) == ["before"]
    process.resume()
    assert actors[0].process.wait(120) == 0
    assert passed(actors[0]) == ["before", "swap", "after"]
