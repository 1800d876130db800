"""Rotating the logs now, to prove the configuration (§6.2)."""

from __future__ import annotations

import contextlib
from pathlib import Path

from blocks.environment import Environment
from flows.logs.findings import path_of
from flows.pinned import pin_paths
from runbook.change import Change, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.page.markdown import fenced
from runbook.report import Evidence, Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import size
from tasks.application.health import wait_healthy
from tasks.logs.reading.files import find_logs
from tasks.logs.rotation.rotating import ROTATE, rotate, verify_rotated
from tasks.logs.rotation.rotation import program, read_rotation


@flow(name="rotate-logs", flow_run_name=RunName("rotate-logs {environment}"))
def rotate_logs(environment: str, plan: str = "", confirm: str = "") -> Report:
    """ログローテーションの実施と確認 (§6.2)

    Runs logrotate now with its own configuration, and proves the result: the old lines are kept under another name, the
    application writes to a new file (a health request makes it log), and no process writes to the old file. Run it once
    after the rotation was set up or changed.

    It renames files; logrotate deletes the oldest, as configured. The daily rotation does not change.

    Departs from the manual: `systemctl reload` does nothing if the unit has no reload. The application then continues
    to write to the renamed file, which this run detects.

    Args:
        environment: Environment (lab, staging, production …)
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Rotate logs", env, confirm, plan, changes=True) as report:
        log, configuration = Path(path_of(env, "app")), Path(env.logs.need("rotation"))
        program()
        before = next((file for file in find_logs(log) if file.path == log), None)
        if before is None:
            raise OpsError(f"there is no {log}, only rotated files", "find out why the application does not write it")
        found = read_rotation(configuration, log)
        report.require(
            "its rotation",
            len(found.blocks) == 1 and not found.said,
            f"write the block of §6.2 into {configuration}; check-logging lists the differences",
            value=found.said or f"{len(found.blocks)} blocks of {configuration} cover it",
            expected="1 block",
        )
        report.fail_if_critical()
        rotating = Change(
            rotate.bind(configuration),
            ROTATE,
            f"{configuration}: {log} gets another name",
            size=before.bytes,
            seconds=1,
            pins=[lambda report: pin_paths(report, "log", log)],
        )
        effect = Effect(
            f"logrotate rotates {log.name}", "", "the oldest rotated log is deleted, if the configuration says so"
        )
        with carrying_out(report, rotating, effect=effect) as carry:
            said = carry(rotating)
        report.attach(Evidence("Output of logrotate", text=fenced(worth_reading(said)[-6000:])))
        became = verify_rotated(log, before, lambda: _ask(env))
        report.require(
            "lines of before",
            bool(became.kept),
            "search the log directory: no file has the old file's inode number",
            value=became.kept or "missing",
        )
        report.require(
            "the new file is written to",
            became.new_bytes > 0,
            "restart the application: it logs to no file",
            value=size(became.new_bytes),
        )
        report.require(
            "the old file is closed",
            not became.stuck,
            "restart the process, then use WatchedFileHandler in it",
            value=became.stuck or "no process writes to it",
        )
        report.outcome = f"{log.name} was renamed to {became.kept}; the application writes to a new file"
    return report


def _ask(env: Environment) -> None:
    """Send a request: the application logs it, whatever the answer."""
    with contextlib.suppress(OpsError):
        wait_healthy.work(env.application, seconds=1, in_a_row=1)


def worth_reading(said: str) -> str:
    """The output without the two lines for each rotated file that does not exist."""
    lines = said.splitlines()
    absent = {number for number, line in enumerate(lines) if line.startswith("old log ") and "does not exist" in line}
    return "\n".join(line for number, line in enumerate(lines) if number not in absent and number + 1 not in absent)
