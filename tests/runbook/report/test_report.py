"""The report: its status, its judgements, who gets a permit, and the sentence."""

from __future__ import annotations

import json
import math
import re
from datetime import timedelta

import pytest

from runbook.current import current_report, use_report
from runbook.errors import CommandFailed, LockLost, NotConfirmed, OpsError, RunbookFailed
from runbook.guard.permit import Act, PlanOnly
from runbook.metrics import Metric, Unit
from runbook.report import Evidence, Report, Status, StepTime
from tests.runbook.system import EFFECT

DROP = Act("drop database", "grc_db_old")
AGE = Metric("backup.age", 5, 50, "s", "age of the newest backup")


def new(confirm: str = "") -> Report:
    return Report("Restore database", "production", confirm, {AGE.name: (10, 100)})


class Lost:
    """A lock that is held no longer."""

    def exclude(self) -> str:
        return ""

    def require(self) -> None:
        raise LockLost("the lock expired")


def status_of(report: Report) -> str:
    return report.status.value


def test_status_is_the_worst_finding() -> None:
    report = new()
    assert status_of(report) == "OK"
    report.passed("disk")
    assert status_of(report) == "OK"
    report.warn("fsync", "switch it on")
    assert status_of(report) == "WARN"
    report.fail("backup", "take one")
    assert status_of(report) == "CRITICAL"


def test_planned_hides_a_warning_and_never_a_critical_finding() -> None:
    report = new()
    report.planned = True
    report.warn("fsync", "switch it on")
    assert status_of(report) == "PLANNED"
    report.fail("backup", "take one")
    assert status_of(report) == "CRITICAL"


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (-5, Status.OK),
        (10, Status.OK),
        (10.1, Status.WARN),
        (100, Status.WARN),
        (100.1, Status.CRITICAL),
        (math.inf, Status.CRITICAL),
        (math.nan, Status.CRITICAL),  # what could not be measured is never a pass
    ],
)
def test_judge_compares_with_the_thresholds(value: float, status: Status) -> None:
    report = new()
    assert report.judge(AGE, value, "look") is status
    assert report.status is status
    assert report.findings[0].hint == ("" if status is Status.OK else "look")


def test_a_metric_without_a_threshold_of_the_environment_has_its_default_limits() -> None:
    report = Report("Backup", "development")
    assert report.judge(AGE, 6) is Status.WARN
    assert report.judge(AGE, 51) is Status.CRITICAL


@pytest.mark.parametrize(
    ("unit", "value", "limits", "shown", "expected"),
    [
        ("s", 1234567, (604800, 1209600), "14 d 6 h", "≤ 7 d 0 h (critical above 14 d 0 h)"),
        ("s", 0.0123, (0.1, 1), "12.3 ms", "≤ 100 ms (critical above 1.0 s)"),
        ("ratio", 0.8531, (0.8, 1), "85.3 %", "≤ 80 % (critical above 100 %)"),
        ("B", 65e6, (64e6, 1e9), "65.0 MB", "≤ 64.0 MB (critical above 1.0 GB)"),
        ("count", 1234567, (20, 1e6), "1,234,567", "≤ 20 (critical above 1,000,000)"),
    ],
)
def test_judge_shows_values_and_limits_with_their_unit(
    unit: Unit, value: float, limits: tuple[float, float], shown: str, expected: str
) -> None:
    report = Report("Backup", "development")
    report.judge(Metric("a.metric", *limits, unit, "something"), value)
    assert (report.findings[0].value, report.findings[0].expected) == (shown, expected)


def test_the_verbs_record_their_status_and_show_the_hint_only_if_something_is_wrong() -> None:
    report = new()
    assert report.require("rows", True, "check the log", value=3, expected=3)
    assert not report.prefer("rows", False, "check the log", value=2, expected=3)
    assert not report.require("rows", False, "check the log")
    report.passed("rows")
    report.warn("rows", "check the log")
    report.fail("rows", "check the log")
    assert [(one.status.value, one.hint) for one in report.findings] == [
        ("OK", ""),
        ("WARN", "check the log"),
        ("CRITICAL", "check the log"),
        ("OK", ""),
        ("WARN", "check the log"),
        ("CRITICAL", "check the log"),
    ]


def test_permit_for_the_environment_s_name_only() -> None:
    permit = new("production").permit(DROP, effect=EFFECT)
    assert permit.environment == "production"
    permit.require("drop database", "grc_db_old")


@pytest.mark.parametrize("confirm", ["Production", "production ", "staging", "yes", "本番", "x" * 500])
def test_another_confirm_is_refused_and_says_what_to_type(confirm: str) -> None:
    report = new(confirm)
    with pytest.raises(NotConfirmed) as error:
        report.permit(DROP, effect=EFFECT)
    assert "type production in the field confirm" in error.value.hint
    assert len(error.value.message) < 120
    assert not report.planned


def test_an_empty_confirm_ends_in_a_plan() -> None:
    report = new()
    with pytest.raises(PlanOnly):
        report.permit(DROP, effect=EFFECT)
    assert report.status is Status.PLANNED


@pytest.mark.parametrize("confirm", ["", "production", "wrong"])
def test_a_critical_finding_refuses_whatever_confirm_is(confirm: str) -> None:
    report = new(confirm)
    report.fail("backup", "take one")
    with pytest.raises(RunbookFailed) as error:
        report.permit(DROP, effect=EFFECT)
    assert error.value.report is report
    assert not report.planned


def test_a_warning_does_not_refuse() -> None:
    report = new("production")
    report.warn("fsync", "switch it on")
    assert report.permit(DROP, effect=EFFECT).acts == (DROP,)
    report.fail_if_critical()


def test_no_permit_without_the_lock() -> None:
    report = new("production")
    report.lock = Lost()
    with pytest.raises(LockLost):
        report.permit(DROP, effect=EFFECT)


def test_the_sentence_says_status_reasons_and_what_to_do() -> None:
    report = new()
    report.warn("fsync", "switch it on")
    report.fail("space", "free 3 GB at /var", value="1 GB")
    for number in range(3):
        report.fail(f"table {number}", "never shown: the first hint is enough")
    assert report.sentence() == ("CRITICAL: space: 1 GB; table 0; table 1 (and 1 more). Next: free 3 GB at /var")


def test_the_sentence_of_a_good_run_is_its_outcome() -> None:
    report = new()
    report.outcome = "grc_db is what it was"
    assert report.sentence() == "OK: grc_db is what it was"
    report.warn("fsync", "switch it on", value="off")
    assert report.sentence() == "WARN: grc_db is what it was; fsync: off. Next: switch it on"
    assert report.titled_sentence.startswith("Restore database on production: WARN: grc_db")
    report.fail("login", "look")
    assert "is what it was" not in report.sentence()


def test_a_critical_finding_that_does_not_stop_the_run_makes_it_critical_at_its_end() -> None:
    report = new("production")
    report.fail("rules", "correct the rows", value="a score of 500", stops=False)
    report.fail_if_critical()
    assert report.permit(DROP, effect=EFFECT).acts == (DROP,)
    report.outcome = "the system is up"
    assert report.status is Status.CRITICAL
    assert report.known_broken == "a score of 500"
    assert report.sentence() == ("CRITICAL: the system is up; rules: a score of 500. Next: correct the rows")
    report.fail("login", "look")
    assert "the system is up" not in report.sentence()
    with pytest.raises(RunbookFailed):
        report.fail_if_critical()


def test_the_sentence_is_one_line() -> None:
    report = new()
    report.fail("psql", "read\nthis", value="ERROR:  a\n\tDETAIL:  b")
    assert report.sentence().endswith("psql: ERROR: a DETAIL: b. Next: read this")


def test_the_json_has_everything_and_is_json() -> None:
    report = new()
    report.passed("rows", value=3, expected=3)
    report.table("Content", ("table", "rows"), [("users", 3)])
    report.attach(Evidence("plot", svg="<svg/>"))
    report.plan("swap", "grc_db", size=5, seconds=0.5)
    report.fact("size", "3 MB")
    later = StepTime("b", report.started + timedelta(days=1), 2, Status.OK)
    report.add_step(later)
    report.add_step(StepTime("a", report.started, 1.23456, Status.CRITICAL))
    content = json.loads(json.dumps(report.as_json()))
    assert content["status"] == "OK"
    assert [(step["name"], step["seconds"], step["status"]) for step in content["steps"]] == [
        ("a", 1.235, "CRITICAL"),
        ("b", 2, "OK"),
    ]
    assert content["evidence"][0]["rows"] == [["users", "3"]]
    planned = {"step": "swap", "detail": "grc_db", "bytes": 5, "seconds": 0.5, "by": [], "shared": False}
    assert content["plan"] == [planned]
    assert content["findings"][0]["expected"] == "3"
    assert content["facts"] == {"size": "3 MB"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", content["started"])


def test_the_current_report_is_the_innermost() -> None:
    outer, inner = new(), new()
    assert current_report() is None
    with use_report(outer):
        with use_report(inner):
            assert current_report() is inner
        assert current_report() is outer
    assert current_report() is None


def test_a_login_in_an_address_that_a_tool_repeats_is_masked() -> None:
    said = "no answer from http://bob:s3cret@registry.test/x"
    report = new()
    report.fail("packages", "look", value=said)
    report.attach(Evidence("Diff", text=said))
    error = OpsError(said)
    for text in (report.findings[0].value, report.evidence[0].text, error.message, str(error)):
        assert "s3cret" not in text
        assert "http://********@registry.test/x" in text


_CALL_FAILED = (
    'pg_dump: error: Dumping the contents of table "people" failed: PQgetCopyData() failed.\n'
    "pg_dump: detail: Error message from server: server closed the connection unexpectedly\n"
    "\tThis probably means the server terminated abnormally\n"
    "pg_dump: detail: Command was: COPY public.people (id) TO stdout;\n"
)
_QUERY_FAILED = "pg_dump: error: query failed: server closed the connection unexpectedly\n"


@pytest.mark.parametrize(
    ("stderr", "told"),
    [
        (_CALL_FAILED, 'Dumping the contents of table "people" failed / server closed the connection unexpectedly'),
        (_QUERY_FAILED, "query failed: server closed the connection unexpectedly"),
        # two workers of one pg_dump, each in its own call, in either order
        (_QUERY_FAILED + _CALL_FAILED, "query failed: server closed the connection unexpectedly"),
        (
            _CALL_FAILED + _QUERY_FAILED,
            'Dumping the contents of table "people" failed / server closed the connection unexpectedly',
        ),
    ],
)
def test_a_failed_program_s_own_reason_is_told_once_with_its_error(stderr: str, told: str) -> None:
    assert CommandFailed(["/bin/pg_dump"], 1, stderr).message == f"pg_dump exited 1: pg_dump: error: {told}"
