"""When a service's process started, and how the one before it ended, by its log."""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass
from typing import Literal

import psutil

from blocks.services.service import Services
from runbook.kinds import probe

How = Literal["orderly", "unexpected", "first start", "started by its manager", "unknown"]
LINE = 200


@dataclass(frozen=True)
class LastEnd:
    """How the process before the present one ended. `line`: the log's line that shows it, or the manager's words.
    `first start`: the log has nothing before it. `started by its manager`: which reports no unexpected end."""

    how: How
    line: str = ""


@dataclass(frozen=True)
class _Marks:
    """The lines of a log that begin a start, that follow an orderly end, and that show an unexpected one."""

    start: re.Pattern[str]
    orderly: re.Pattern[str]
    unexpected: re.Pattern[str]


# The managers' own lines: systemd's in the journal, the kernel's.
_KILLED = r"code=(?:killed|dumped|exited, status=[1-9])|Failed with result|oom-kill|Out of memory: Killed"
_REDIS = _Marks(
    re.compile(r"oO0OoO0OoO0Oo (?:Redis|Valkey) is starting"),
    re.compile(r"ready to exit, bye bye|User requested shutdown|Received SIG\w+ scheduling shutdown"),
    re.compile(rf"crashed by signal|BUG REPORT|Guru Meditation|Fatal error|{_KILLED}"),
)
_UVICORN_STOPS = re.compile(r"Finished server process|Stopping parent process|Deactivated successfully")
_READY = "database system is ready to accept"
_STARTING = re.compile(r"starting PostgreSQL \d|all server processes terminated; reinitializing|PostgreSQL \d.*起動")
_RECOVERED = re.compile(
    r"not properly shut down; automatic recovery|正しくシャットダウンされていません"
    r"|interrupted while in recovery|terminating any other active server processes"
)
_INTERRUPTED = re.compile(r"database system was interrupted|データベースシステムは中断され")
_RESTORED = re.compile(r"starting (?:archive|point-in-time|backup) recovery|entering standby mode")
_SHUT_DOWN = re.compile(r"database system was shut down|データベースシステムは.*シャットダウンしました")
_PROCESS_DIED = re.compile(r"was terminated by signal|server process .* exited with exit code")


def redis_end(log: str) -> LastEnd:
    """How the Redis before the present one ended: a killed process writes nothing."""
    return _by_marks(log, _REDIS)


def uvicorn_end(log: str, pid: int) -> LastEnd:
    """The same of a backend under uvicorn, whose main process is `pid`: each of its workers logs a start."""
    start = re.compile(rf"Started (?:server|parent) process \[{pid}\]")
    return _by_marks(log, _Marks(start, _UVICORN_STOPS, re.compile(_KILLED)))


def _by_marks(log: str, marks: _Marks) -> LastEnd:
    lines = [line for line in log.splitlines() if line.strip()]
    start = next((number for number in reversed(range(len(lines))) if marks.start.search(lines[number])), None)
    if start is None:
        return LastEnd("unknown")
    before = lines[:start]
    while before and "WARNING" in before[-1]:  # about its host, which it logs before its first line
        before.pop()
    for line in reversed(before):
        if marks.orderly.search(line):
            return LastEnd("orderly", line.strip()[:LINE])
        if marks.unexpected.search(line):
            return LastEnd("unexpected", line.strip()[:LINE])
        if marks.start.search(line):
            break
    if not before:
        return LastEnd("first start")
    return LastEnd("unexpected", "its log has no line about a shutdown")


def postgres_end(log: str) -> LastEnd:
    """How the PostgreSQL before the present one ended: the server itself logs at its start whether it was shut down.

    A server that starts from a base backup is new, not crashed."""
    lines = log.splitlines()
    begins = [number for number, line in enumerate(lines) if _STARTING.search(line)]
    part = lines[begins[-1] :] if begins else lines
    text = "\n".join(part)
    if begins and "reinitializing" in lines[begins[-1]]:
        before = lines[begins[-2] if len(begins) > 1 else 0 : begins[-1]]
        died = next((line for line in before if _PROCESS_DIED.search(line)), lines[begins[-1]])
        return LastEnd("unexpected", died.strip()[:LINE])
    if found := next((line for line in part if _RECOVERED.search(line)), ""):
        return LastEnd("unexpected", found.strip()[:LINE])
    if _RESTORED.search(text):
        return LastEnd("first start")
    if found := next((line for line in part if _SHUT_DOWN.search(line)), ""):
        return LastEnd("orderly", found.strip()[:LINE])
    if found := next((line for line in part if _INTERRUPTED.search(line)), ""):
        return LastEnd("unexpected", found.strip()[:LINE])
    return LastEnd("unknown")


def manager_end(said: str) -> LastEnd:
    """How a service manager describes an end (`Services.last_end`)."""
    if not said:
        return LastEnd("started by its manager")
    asked = "not expected" not in said and "unexpectedly" not in said
    return LastEnd("orderly" if asked else "unexpected", said[:LINE])


@dataclass(frozen=True)
class RunningProcess:
    """A service's main process, and the seconds since its start."""

    pid: int
    seconds: float


@probe
def read_process(services: Services, role: str) -> RunningProcess | None:
    """A service's main process; None: it is on another host, or stopped."""
    if role not in services.names or not services.is_here or role in services.hosts:
        return None
    with contextlib.suppress(psutil.Error):
        if pid := services.state(role).pid:
            return RunningProcess(pid, max(0.0, time.time() - psutil.Process(pid).create_time()))
    return None
