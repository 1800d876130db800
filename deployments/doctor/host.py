"""What every host of a worker must have, whether the application answers, and how far apart two clocks are."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from blocks.environment import Environment
from deployments.doctor.line import DoctorLine, expect
from tasks.application.health import read_problems

CLOCK_SECONDS = 2.0
ANSWER_SECONDS = 10.0
# A backup's day, a certificate's end, a lock's age: all of them are told by this host's clock.
CLOCK = "set this host's clock by NTP (timedatectl set-ntp true)"


def look_at_application(env: Environment) -> Iterator[DoctorLine]:
    """Backend and frontend are healthy."""
    problems = read_problems.work(env.application)
    for name, problem in problems.items():
        yield expect(
            not problem,
            f"[application] {problem or f'{name} is healthy'}",
            "launch diagnose-application: it finds out why",
        )
    if not problems:
        yield DoctorLine("[application] no health check is configured: only that its services run is checked")


def look_at_programs(env: Environment) -> Iterator[DoctorLine]:
    """What every host of a worker needs besides."""
    yield expect(shutil.which("setpriv"), "setpriv", "install util-linux: programs could not be run as other users")
    if env.has("services") and type(env.services).__name__ == "SystemdServices":
        yield expect(shutil.which("systemctl"), "systemctl", "there is no systemd here: correct [services] kind")


def clock(whose: str, told: float, between: tuple[float, float], vague_seconds: float = 0.0) -> DoctorLine:
    """How far another clock is from this host's, at least: it told its time, or one that is older by up to
    `vague_seconds`, at some moment `between` the question and the answer. On a busy host seconds lie between them."""
    asked, answered = between
    offset_seconds = max(told - answered, 0.0) or min(told + vague_seconds - asked, 0.0)
    ok = abs(offset_seconds) <= CLOCK_SECONDS
    return expect(ok, f"clock of {whose} is {offset_seconds:+.1f} s from this host's", CLOCK)
