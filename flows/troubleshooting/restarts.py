"""A process that restarted a short time ago, in a diagnosis: it explains errors that are already over."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Annotated

from pydantic import Field

from flows.troubleshooting.diagnosis import Cause, Diagnosis, Impact
from runbook import clock
from runbook.errors import OpsError
from runbook.next import Next
from runbook.report import Status
from runbook.units import duration
from tasks.host.restarts import LastEnd, manager_end, read_process

WINDOW_MINUTES = 60
Window = Annotated[int, Field(ge=1, le=1440)]
RESTART = "restart"
START_LINES = 2000
ORDERLY = {
    "orderly": "after an orderly shutdown",
    "first start": "for the first time",
    "started by its manager": "by its service manager, which reports no unexpected end",
}
KILLED = "find out who or what ended it (dmesg -T names the kernel's OOM killer)"


def long_log(found: Diagnosis, role: str) -> str:
    """Enough of a service's log to contain its last start; "" if it cannot be read."""
    with contextlib.suppress(OpsError):
        return found.env.services.logs(role, START_LINES) if role in found.env.services.names else ""
    return ""


def previous_end(found: Diagnosis, role: str, logged: LastEnd) -> LastEnd:
    """How the process before the present one ended: by its log, and in the words of its service manager."""
    services = found.env.services
    if role not in services.names:
        return logged
    try:
        managed = manager_end(services.last_end(role))
    except OpsError:
        return logged
    if logged.how == "unknown":
        return managed
    if logged.how == managed.how == "unexpected":
        return LastEnd(logged.how, f"{managed.line}; its log: {logged.line}")
    return logged


def describe_start(found: Diagnosis, role: str, logged: LastEnd) -> str:
    """Since when a process that is still starting has been running, and why it started; "" if that is not known."""
    process = None
    with contextlib.suppress(OpsError):
        process = read_process.work(found.env.services, role)
    end = previous_end(found, role, logged)
    why = f"the process before it ended without a shutdown ({end.line})" if end.how == "unexpected" else ""
    since = f"its process started {duration(process.seconds)} ago" if process else ""
    return "".join(f"; {part}" for part in (since, why) if part)


def judge_restart(
    found: Diagnosis,
    name: str,
    seconds: float,
    end: LastEnd,
    *,
    minutes: int,
    consequence: str = "",
    follow: tuple[Next, ...] = (),
) -> None:
    """Judge how long a server has been running. Within the window, an end that nobody asked for is a WARN; so is one
    of which nothing is known, as its clients lost their connections. `consequence`: what clients noticed."""
    question, window = f"has {name} been running for longer than {minutes} min?", minutes * 60
    if seconds >= window:
        found.record(question, f"for {duration(seconds)}")
        return
    since = clock.text(clock.now() - timedelta(seconds=seconds))
    started = f"{duration(seconds)} ago, at {since}"
    if how := ORDERLY.get(end.how, ""):
        seen = f"since {since} ({duration(seconds)}); started {how}"
        found.record(question, seen)
        found.report.fact(f"{name} has been running", seen)
        return
    if end.how == "unexpected":
        what = f"{name} restarted {started}: the process before it ended without a shutdown ({end.line})"
        hint = KILLED
    else:
        what = f"{name} started {started}; neither its log nor its service manager shows how the process before ended"
        hint = "check its log for the reason, if nobody restarted it"
    what += f". {consequence}" if consequence else ""
    cause = Cause(what, hint, follow, Status.WARN, f"{RESTART} {name}", Impact.THREATENS)
    found.record(question, f"no, it started {started}", cause)
