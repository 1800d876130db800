"""The logs' rotation by the real logrotate: what it thinks of a configuration, and a forced rotation in the lab."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.logs.check import check_logging
from flows.logs.rotation import rotate_logs
from lab.client import Lab
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Status
from tests.fixtures.logfiles import NAME
from tests.fixtures.reports import bad
from tests.logs.test_check import rightly

pytestmark = pytest.mark.system


@pytest.fixture
def right(logs: Path) -> Path:
    """As root's files: logrotate takes no other's."""
    return rightly(logs)


def test_logrotate_is_asked_and_its_complaints_are_told(right: Path) -> None:
    assert bad(check_logging.fn(NAME)) == {}
    configuration = right.parent / "logrotate.conf"
    text = configuration.read_text()
    configuration.write_text(text + text)
    with pytest.raises(RunbookFailed, match="duplicate log entry"):
        check_logging.fn(NAME)
    configuration.write_text(text.replace("rotate 30", "rotate many"))
    with pytest.raises(RunbookFailed, match="logrotate takes its configuration: .*many"):
        check_logging.fn(NAME)
    configuration.write_text(text)
    configuration.chmod(0o666)
    with pytest.raises(RunbookFailed, match="writable by group or others"):
        check_logging.fn(NAME)


def numbers(log: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in log.parent.glob(f"{log.name}*")}


def test_a_forced_rotation_in_the_lab_is_followed_by_the_application(lab: Lab) -> None:
    log = Path(os.environ["OPS_LAB_ROOT"]) / "var/log/grc/app.log"
    before = numbers(log)
    assert rotate_logs.fn(lab.name).status is Status.PLANNED
    assert numbers(log) == before
    report = rotate_logs.fn(lab.name, confirm=lab.name)
    assert report.status is Status.OK, report.sentence()
    after = numbers(log)
    assert after["app.log.1"] == before["app.log"] != after["app.log"]
    assert log.stat().st_size > 0, "the application writes to the new one"


def test_an_application_that_goes_on_in_the_old_file_is_critical(lab: Lab) -> None:
    log = Path(os.environ["OPS_LAB_ROOT"]) / "var/log/grc/app.log"
    program = "import sys; log = open(sys.argv[1], 'a'); print('open', flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", program, str(log)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stubborn:
        assert stubborn.stdout
        stubborn.stdout.readline()
        with pytest.raises(RunbookFailed, match=rf"the old file is closed: .*pid {stubborn.pid}"):
            rotate_logs.fn(lab.name, confirm=lab.name)
        stubborn.communicate()


def test_a_log_that_nothing_rotates_is_refused(lab: Lab) -> None:
    configuration = Path(os.environ["OPS_LAB_ROOT"]) / "etc" / "logrotate.conf"
    text = configuration.read_text()
    configuration.write_text(text.replace("*.log", "*.txt"))
    try:
        with pytest.raises((OpsError, RunbookFailed), match="0 blocks"):
            rotate_logs.fn(lab.name, confirm=lab.name)
    finally:
        configuration.write_text(text)
