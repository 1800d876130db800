"""run_checklist on the real Prefect server, by a real worker that is killed while somebody thinks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import psutil
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from blocks.environment import Environment
from flows.routine.checklist.reminders import remind_checklists
from flows.routine.checklist.run import run_checklist
from flows.routine.checklist.texts import checklist
from lab.control import LabControl
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.reports.setting_records import Changed, keep, mark_undone
from tests.fixtures.servers import free_port, separate_prefect
from tests.routine.checklist.waiting import Waiting, waiting
from tests.routine.escalated import escalate

ALERTS = """
[alerts]
channels = ["file"]
file = "{0}/alerts.jsonl"
path = [{{ contacts = ["on-call"] }}]
[alerts.contacts.on-call]
role = "オンコールSRE"
"""
BOXES = ("date", "environment", "backups", "procedures")


@pytest.fixture(scope="module")
def place(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Waiting]:
    directory = tmp_path_factory.mktemp("checklist")
    with waiting(directory, [run_checklist], ALERTS.format(directory)) as made:
        made.start_worker()
        yield made


def answers(**changed: dict[str, str]) -> dict[str, object]:
    """All done by 山田, but for what is changed."""
    done = {"result": "carried out", "who": "", "note": "", "link": ""}
    return {"who": "山田 太郎", **{box: done | changed.get(box, {}) for box in BOXES}}


def reports(place: Waiting, runbook: str = "run-checklist") -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(place.reports.glob(f"*-{runbook}.json"))]


def table(report: dict[str, Any], name: str) -> list[list[str]]:
    return next(item["rows"] for item in report["evidence"] if item["name"] == name)


def findings(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {one["name"]: one for one in report["findings"]}


def how_to_resume(place: Waiting, run: str) -> int:
    """In how many lines of its log the run says it."""
    found = place.runs.call("POST", "/logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}})
    return sum("choose Resume" in one["message"] for one in found)


def today() -> date:
    return datetime.now(ZoneInfo("Asia/Tokyo")).date()


def day(days: int, since: date | None = None) -> str:
    return str((since or today()) + timedelta(days=days))


def late(due: str, since: date) -> set[int]:
    """Days, at some moment since that day: the operators' midnight may have passed meanwhile."""
    return {(one - date.fromisoformat(due)).days for one in (since, today())}


def test_it_waits_through_the_death_of_its_worker_and_asks_again_what_is_incomplete(place: Waiting) -> None:
    begun = today()
    due = day(-4, begun)  # a week before the drill
    run = place.launch("run-checklist", checklist="drill_preparation", drill_date=day(3, begun))
    schema = place.asks(run, "preparation-1")
    lines = until(lambda: how_to_resume(place, run), what="how to resume, in the run's log", seconds=120)
    assert lines == 1
    place.kill_worker()
    assert place.run(run)["state"]["name"] == "Suspended"
    started = place.run(run)["start_time"]
    box = schema["properties"]["date"]
    assert box["title"] == "☐ Date and time are agreed and announced *"
    assert "calendar invitation" in box["description"]
    told = place.read(run, "suspended-preparation-1-description")
    assert f"due **{due}**" in told
    assert reports(place) == [], "nothing is told of a run that waits"

    # The form's schema refuses what it can; the rest is asked again, by whichever worker is there.
    assert place.answer(run, answers(date={"result": "実施"})) == "REJECT"
    assert place.answer(run, answers(date={"link": "javascript:alert(1)"})) == "REJECT"
    undone = {"result": "not carried out", "who": "佐藤"}
    assert place.answer(run, answers(procedures=undone, backups={"note": "8時に確認"})) == "ACCEPT"
    place.start_worker()
    again = place.asks(run, "preparation-2")
    assert "“Participants have the procedures”: write in the note why it is not carried out" in place.read(
        run, "suspended-preparation-2-description"
    )
    assert again["properties"]["who"]["default"] == "山田 太郎", "what was sent is filled in"
    assert "8時に確認" in json.dumps(again, ensure_ascii=False)
    whole = answers(
        procedures=undone | {"note": "配布先が決まらない"},
        environment={"result": "not carried out", "note": "lab が足りない"},
        backups={"note": "8時に確認", "link": "https://example.com/1"},
    )
    assert place.answer(run, whole) == "ACCEPT"
    state = place.ends(run)

    assert state["type"] == "FAILED", "the drill environment must be ready"
    assert place.run(run)["start_time"] == started
    (report,) = reports(place)
    rows = {row[1]: row for row in table(report, "Checklist")}
    assert [row[2] for row in rows.values()] == ["carried out", "not carried out", "carried out", "not carried out"]
    assert rows["Participants have the procedures"][3:] == [
        "佐藤",
        rows["The drill environment is ready"][4],
        "配布先が決まらない",
        "",
    ]
    assert rows["Backups are up to date"][5:] == ["8時に確認", "https://example.com/1"]
    found = findings(report)
    assert found["Before the drill: The drill environment is ready"]["status"] == "CRITICAL"
    assert "make doctor" in found["Before the drill: The drill environment is ready"]["hint"]
    assert found["Before the drill: Participants have the procedures"]["status"] == "WARN"
    assert found["answered in time"]["status"] == "WARN"
    assert found["answered in time"]["value"] in {f"{days} days late" for days in late(due, begun)}

    # The next one shows what was said last time; and, where it takes that run over, has it filled in.
    run = place.launch("run-checklist", checklist="drill_preparation", drill_date=day(30), taken_over=run)
    schema = place.asks(run, "preparation-1")
    assert "not carried out (佐藤): 配布先が決まらない" in schema["properties"]["procedures"]["description"]
    assert "last time, on" in place.read(run, "suspended-preparation-1-description")
    assert schema["properties"]["who"]["default"] == "山田 太郎"
    assert "lab が足りない" in json.dumps(schema["definitions"]["Box_environment"], ensure_ascii=False)
    applies = {"result": "not applicable", "note": "全員が持っている"}
    assert place.answer(run, answers(procedures=applies)) == "ACCEPT"
    assert place.ends(run)["type"] == "COMPLETED"
    report = reports(place)[-1]
    assert report["status"] == "OK"
    assert report["outcome"].endswith(": 3 boxes carried out, 0 not carried out, 1 not applicable")
    (before,) = table(report, "Earlier answers")
    assert before[1:5] == ["CRITICAL", "2", "2", "0"]


def remind(place: Waiting) -> Report:
    try:
        return remind_checklists.fn(place.name)
    except RunbookFailed as error:
        return error.report


def test_what_is_overdue_is_escalated_once_a_day(place: Waiting) -> None:
    place.deploy(run_checklist, suffix="security-audit", checklist="security_audit")  # as its schedule has it
    begun = today()
    due = day(-3, begun)
    overdue = place.launch("run-checklist/security-audit", due=due)
    early = place.launch("run-checklist", checklist="cost_review", due=day(9))
    unnamed = place.launch("run-checklist", due=day(9))  # quick run: the parameters tell no checklist
    for run, key in ((overdue, "vulnerabilities-1"), (early, "costs-1"), (unnamed, "preparation-1")):
        place.asks(run, key)
    alone = remind(place)
    assert alone.status is Status.CRITICAL
    assert any("escalate is not deployed" in one.value and one.hint for one in alone.findings)

    place.deploy(escalate)
    directory = Environment.find(place.name).reports_directory
    lasting = keep(directory, "7391", [Changed("work_mem", None, "1GB")], hours=1)
    over = keep(directory, "7391", [Changed("max_connections", None, "300")], hours=-1, reason="付録A")
    for _ in range(2):
        report = remind(place)
        assert report.status is Status.WARN
    for record in (lasting, over):
        mark_undone(directory, record)
    (told,) = [
        one for one in report.findings if one.name.startswith("temporary") and not one.name.endswith("escalated")
    ]
    assert told.name == "temporary setting max_connections of postgres"
    assert f"undo-postgres-settings with record={over.name}" in told.hint
    rows = {row[0]: row for item in report.evidence if item.name == "Waiting checklists" for row in item.rows}
    assert rows["Security audit"][1:3] == ("セキュリティ", "Known vulnerabilities (§3.2)")
    assert rows["Security audit"][5] in map(str, late(due, begun))
    assert rows["Security audit"][6:] == (f"{place.runs.ui}/runs/flow-run/{overdue}",)
    assert rows["Cost review"][5] == "0"
    assert len(rows) == 3
    found = {one.name: one.status for one in report.findings}
    assert found[f"run-checklist {place.name} security_audit"] is Status.WARN
    assert found[f"run-checklist {place.name} cost_review"] is Status.OK
    body = {"flows": {"name": {"any_": ["escalate"]}}, "deployments": {"name": {"any_": [place.name]}}}
    launched = {
        one["parameters"]["key"]: one["parameters"] for one in place.runs.call("POST", "/flow_runs/filter", body)
    }
    assert set(launched) == {f"checklist-{overdue}", f"override-{over.name}"}
    assert "temporary setting max_connections of postgres: expired at" in launched[f"override-{over.name}"]["what"]
    given = launched[f"checklist-{overdue}"]
    assert (given["owner"], given["run"], given["key"]) == ("セキュリティ", overdue, f"checklist-{overdue}")
    assert given["severity"] == "normal"
    assert "Security audit" in given["what"]


@pytest.fixture
def control() -> Iterator[LabControl]:
    with separate_prefect("checklists") as own:
        yield own


@pytest.mark.soak
def test_answers_outlive_the_server_and_every_worker(control: LabControl, tmp_path: Path) -> None:
    """Killed between the forms of the day's six phases: nothing is asked twice."""
    with waiting(tmp_path, [run_checklist], control=control) as place:
        place.start_worker()
        run = place.launch("run-checklist", checklist="drill_day", drill_date=day(0))
        for number, phase in enumerate(checklist("drill_day").phases):
            place.asks(run, f"phase-{number + 1}-1")
            if number in (1, 3):
                place.kill_worker()
                restart(control)
                place.start_worker()
            ids = [box.id.replace("-", "_") for box in phase.boxes]
            assert (
                place.answer(run, {"who": f"回答者{number}", **{one: {"result": "carried out"} for one in ids}})
                == "ACCEPT"
            )
        assert place.ends(run)["type"] == "COMPLETED"
        (report,) = reports(place)
    rows = table(report, "Checklist")
    assert len(rows) == 23
    assert [row[3] for row in rows[:3]] == ["回答者0"] * 3
    assert rows[-1][3] == "回答者5"
    answered = [datetime.fromisoformat(row[1]) for row in table(report, "Phases, from answer to answer")]
    assert answered == sorted(set(answered)), "each when it came in, not when it was told"


def restart(control: LabControl) -> None:
    """Killed, all of it; its supervisor starts it again."""
    before = control.supervisor.services()["server"].pid
    for part in [*psutil.Process(before).children(recursive=True), psutil.Process(before)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            part.kill()

    def again() -> bool:
        service = control.supervisor.services()["server"]
        return service.running and service.pid != before

    until(again, what="the server's restart", seconds=120)
    control.wait()


def test_prefect_away_is_told(small: str) -> None:
    with (
        temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api", PREFECT_CLIENT_MAX_RETRIES: 0}),
        pytest.raises(RunbookFailed) as failed,
    ):
        remind_checklists.fn(small)
    (finding,) = failed.value.report.findings
    assert "Prefect API does not answer" in finding.name
    assert finding.hint
