"""Escalation that is killed, that runs twice at once, and that is overtaken by an acknowledgement."""

from __future__ import annotations

import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows.monitoring.escalation import escalate
from flows.monitoring.incident import incidents
from tests.fixtures import forked
from tests.monitoring.duty import NAME, Duty

ROOT = Path(__file__).resolve().parents[2]


def program(module: str, *words: str, failpoint: str = "") -> subprocess.CompletedProcess[str]:
    """As cron starts it: without Prefect."""
    variables = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    argv = ["-m", f"flows.monitoring.{module}", "--environment", NAME, *words]
    return forked.run(argv, {**variables, "OPS_FAILPOINT": failpoint})


@pytest.mark.parametrize(
    ("failpoint", "told"),
    [
        ("before send_message", ["oncall", "dba"]),
        ("notified on-call", ["oncall", "dba"]),
        ("after send_message", ["oncall", "oncall", "dba"]),  # nobody can know whether it left: it is sent again
    ],
)
def test_killed_anywhere_nobody_is_missed(duty: Duty, failpoint: str, told: list[str]) -> None:
    killed = program("escalation", "--what", "x", "--owner", "DBA", failpoint=failpoint)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    escalate.fn(NAME)
    assert duty.told == told
    numbers = [letter["Message-ID"] for letter in duty.mail.to("oncall@example.com")]
    assert len(set(numbers)) == 1, "what was sent twice is seen to be the same"
    escalate.fn(NAME)
    assert duty.told == told


def test_without_prefect_it_is_acknowledged_from_the_command_line(duty: Duty) -> None:
    escalate.fn(NAME, what="x", key="k")
    done = program("acknowledgement", "--incident", "k", "--by", "佐藤")
    assert done.returncode == 0, done.stderr
    assert duty.incidents()[0].acknowledged_by == "佐藤"
    wrong = program("acknowledgement", "--incident", "other", "--by", "佐藤")
    assert wrong.returncode == 1
    assert "“other” is not an incident of trial" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_several_at_once_tell_once(duty: Duty) -> None:
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(escalate.fn, NAME, what="x", owner="DBA", key="k") for _ in range(4)]
        for run in runs:
            run.result()
    assert duty.told == ["oncall", "dba"]
    (incident,) = duty.incidents()
    assert incident.repeats == 3


def test_acknowledged_while_others_are_being_told(duty: Duty) -> None:
    duty.mail.then = lambda: incidents(duty.env).acknowledge("k", "佐藤", "")
    escalate.fn(NAME, what="x", owner="DBA", key="k")
    assert duty.told == ["oncall"]
