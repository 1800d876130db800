"""Programs that are missing, fail, hang or print nonsense, in the place of real ones: what then is told, and what not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil

from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tests.checkouts import program

Mode = Literal["missing", "fails", "hangs", "garbage", "half", "silent"]
MODES: tuple[Mode, ...] = ("missing", "fails", "hangs", "garbage", "half", "silent")
SECRET = "s3cretpass"
ADDRESS = f"https://worker:{SECRET}@registry.test/simple"
# Long enough that a message is cut within the login, wherever it begins.
PADDING = ("x" * 40, "x" * 60, "x" * 75)
# Where one hangs; else a tool may take as long as a busy machine needs.
HANGS_SECONDS, SECONDS = 8, 300


def broken(path: Path, mode: Mode) -> None:
    """Put such a program there. What it starts writes its id beside it."""
    lines = "\n".join(f"{padding} error: cannot reach {ADDRESS}" for padding in ("", *PADDING))
    bodies = {
        "fails": f"cat >&2 <<'END'\n{lines}\nEND\nexit 1",
        "hangs": f"sleep 600 & echo $! >>{path}.pids\nwait",
        "garbage": f"cat <<'END'\n{lines[6:]}\nEND",
        "half": f"""echo '[{{"name": "{ADDRESS}", "version'""",
        "silent": "exit 0",
    }
    if mode != "missing":
        program(path, bodies[mode])


def reported(run: Callable[[], Report]) -> Report:
    """The report, also of a run that failed."""
    try:
        return run()
    except RunbookFailed as error:
        return error.report


def told(report: Report, tool: str) -> str:
    """What it says of the tool, and what to do: it is not well, and nobody reads the secret."""
    text = json.dumps(report.as_json()) + report.sentence()
    for path in (report.path, report.path and report.path.with_suffix(".md")):
        text += path.read_text() if path else ""
    assert SECRET not in text
    assert SECRET[:4] not in text, "nor the beginning of it"
    assert "Traceback" not in text
    assert report.status in (Status.WARN, Status.CRITICAL)
    bad = [one for one in report.findings if one.status is not Status.OK]
    found = [f"{one.name}: {one.value} — {one.hint}" for one in bad if tool in f"{one.name} {one.value}" and one.hint]
    assert found, bad
    return found[0]


def seconds_for(mode: Mode) -> int:
    """How long tools may take."""
    return HANGS_SECONDS if mode == "hangs" else SECONDS


def nobody_left(path: Path) -> None:
    """What a program that hung had started has ended too (on a busy machine it may have been ended before that)."""
    started = Path(f"{path}.pids")
    pids = [int(pid) for pid in started.read_text().split()] if started.exists() else []
    until(lambda: not any(map(psutil.pid_exists, pids)), what="the end of its children", seconds=120)
