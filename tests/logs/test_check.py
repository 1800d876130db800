"""check_logging: each way in which logs are not what others rely on is found, and what is right is not."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.logs.check import check_logging
from flows.logs.rotation import rotate_logs
from runbook.errors import RunbookFailed
from runbook.report import Status
from tasks.logs.rotation import rotation
from tests.fixtures.application.broken import HANGS_SECONDS, MODES, Mode, broken, nobody_left, reported, told
from tests.fixtures.logfiles import NAME
from tests.fixtures.reports import bad

MISSING = {f"{log}: logrotate takes its configuration": "logrotate is not installed" for log in ("app", "audit")}
BLOCK = """
{logs}/*.log {{
    daily
    rotate 30
    compress
    delaycompress
    notifempty
    missingok
    create 0644 root root
    postrotate
        systemctl reload grc-backend
    endscript
}}
"""


def now(seconds: float = 0) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def app(**fields: object) -> str:
    entry = {
        "timestamp": now(),
        "level": "INFO",
        "logger": "grc",
        "message": "request",
        "module": "m",
        "function": "f",
        "line": 1,
    }
    return json.dumps(entry | fields, ensure_ascii=False) + "\n"


def audit() -> str:
    return app(user_id="u", action="login", resource="r", result="success", ip_address="10.0.0.1", user_agent="x")


def rightly(logs: Path) -> Path:
    """Both logs and their rotation as the manual wants them."""
    (logs / "app.log").write_text(app() + app(message="AI API Call", total_tokens=5))
    (logs / "audit.log").write_text(audit())
    (logs.parent / "logrotate.conf").write_text(BLOCK.format(logs=logs))
    return logs


@pytest.fixture
def right(logs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """On a host without logrotate: the system tests ask the real one."""
    monkeypatch.setattr(rotation, "PLACES", "")
    return rightly(logs)


def test_what_is_right_is_not_complained_about_but_for_the_missing_logrotate(right: Path) -> None:
    assert bad(check_logging.fn(NAME)) == MISSING


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("Traceback\n", "app: lines that are JSON", "66.667% of 3"),
        (app(timestamp="2026-11-25T00:00:00"), "app: times have a zone", "1 have no zone and are read as UTC"),
        (json.dumps({"timestamp": now(), "message": "x"}) + "\n", "app: fields of every line", "missing: level in 1"),
        (app(message="AI API Call"), "token counts reach the log", "1 AI calls without a number of tokens"),
        (
            app(headers={"Authorization": "Bearer abcdefghijkl"}),
            "app: secrets and personal data",
            "secret in 1 of 3 lines",
        ),
        (app(message="\\u30e1 taro@example.com"), "app: secrets and personal data", "mail address in 1 of 3 lines"),
    ],
    ids=["no JSON", "no zone", "a field", "no tokens", "a secret", "an address"],
)
def test_a_line_that_is_not_as_it_should_be_warns(right: Path, line: str, name: str, value: str) -> None:
    with (right / "app.log").open("a") as log:
        log.write(line)
    report = check_logging.fn(NAME)
    assert report.status is Status.WARN
    assert value in bad(report)[name]
    assert "abcdefghijkl" not in str(report.as_json())
    assert "taro@" not in str(report.as_json())


def test_a_time_of_the_future_is_critical_and_local_time_is_named(right: Path) -> None:
    (right / "app.log").write_text(app(timestamp=now(9 * 3600)[:19]))
    with pytest.raises(RunbookFailed, match="in the future.*writes Asia/Tokyo's time as UTC"):
        check_logging.fn(NAME)
    (right / "app.log").write_text(app(timestamp=now(3 * 3600)))
    with pytest.raises(RunbookFailed, match="app: the clock.*chronyc"):
        check_logging.fn(NAME)


def test_rotation_that_differs_is_missing_or_double_is_told(right: Path) -> None:
    configuration = right.parent / "logrotate.conf"
    text = configuration.read_text()
    configuration.write_text(
        text.replace("daily", "weekly").replace("rotate 30", "rotate 4").replace("    compress\n", "")
    )
    assert bad(check_logging.fn(NAME))["audit: rotation as in the manual"] == (
        "how often: weekly (manual: daily); rotate: 4 (manual: 30); compress: not set (manual: set)"
    )
    configuration.write_text(text + text)
    assert bad(check_logging.fn(NAME))["app: rotated once"].startswith("2 blocks")
    configuration.unlink()
    assert bad(check_logging.fn(NAME))["app: rotated once"].startswith("0 blocks")


def test_a_process_that_still_writes_to_the_renamed_log_is_critical_and_a_reader_is_not(right: Path) -> None:
    program = "import sys; log = open(sys.argv[1], sys.argv[2]); print('open', flush=True); sys.stdin.read()"
    for mode, well in (("r", True), ("a", False)):
        argv = [sys.executable, "-c", program, str(right / "app.log"), mode]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout
            process.stdout.readline()
            (right / "app.log").rename(right / "app.log.1")
            (right / "app.log").write_text(app())
            if well:
                assert bad(check_logging.fn(NAME)) == MISSING
            else:
                with pytest.raises(RunbookFailed, match=rf"pid {process.pid}\) into app.log.1 still writes"):
                    check_logging.fn(NAME)
            process.communicate()


def test_a_missing_log_is_critical_and_the_other_one_is_looked_at(right: Path) -> None:
    (right / "audit.log").unlink()
    with pytest.raises(RunbookFailed, match="audit: the log: there is no log") as failed:
        check_logging.fn(NAME)
    assert any(found.name == "app: the clock" for found in failed.value.report.findings)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "missing"])
def test_a_logrotate_that_gives_no_answer_is_critical_and_nothing_is_rotated(
    right: Path, tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, "PLACES", str(tmp_path / "bin"))
    monkeypatch.setattr(rotation, "TIMEOUT_SECONDS", 2 if mode == "hangs" else HANGS_SECONDS)
    broken(tmp_path / "bin" / "logrotate", mode)
    before = {path: path.read_text() for path in right.iterdir()}
    for flow in (lambda: check_logging.fn(NAME), lambda: rotate_logs.fn(NAME, confirm=NAME)):
        report = reported(flow)
        assert "logrotate" in told(report, "logrotate")
        assert report.status is Status.CRITICAL
        if mode == "hangs":
            nobody_left(tmp_path / "bin" / "logrotate")
    assert {path: path.read_text() for path in right.iterdir()} == before
