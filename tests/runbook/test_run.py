"""`with runbook(...)`: a report whatever happens, and the right end."""

from __future__ import annotations

import contextvars
import json
import logging
import re
import threading
import urllib.parse
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock
from uuid import UUID, uuid4

import pytest
from prefect import Flow, flow_engine
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateName,
)
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_UI_URL

from runbook import clock
from runbook.change import Change, carrying_out
from runbook.current import current_report
from runbook.errors import LockLost, NotConfirmed, OpsError, RunbookFailed, Unreachable
from runbook.files import chain
from runbook.flow import flow
from runbook.guard.lock import hold
from runbook.guard.permit import Act
from runbook.kinds import action
from runbook.page.width import fit
from runbook.report import Report, Status
from runbook.run import runbook
from tests.runbook.system import EFFECT, System

DROP = Act("drop database", "grc_db_old")


def written(system: System) -> dict[str, Any]:
    """The only report, as JSON; its page is beside it."""
    (path,) = system.reports_directory.glob("*.json")
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    content = dict(json.loads(path.read_text(encoding="utf-8")))
    assert content["hash"] in page
    assert content["status"] in page
    assert chain.verify_chain(system.reports_directory) == []
    return content


def carry_out(
    system: System, work: Callable[[Report], object], confirm: str = "", title: str = "Restore", changes: bool = False
) -> Report:
    with runbook(title, system, confirm, changes=changes) as report:
        work(report)
    return report


def test_a_runbook_inside_a_change_logs_its_own_lines_and_has_its_own_permits(
    system: System, caplog: pytest.LogCaptureFixture
) -> None:
    """A drill's recovery, a migration's backup: what the caller may do says nothing of what they may."""
    caplog.set_level(logging.INFO, logger="ops")

    @action(of=lambda name: DROP)
    def drop(name: str) -> None:
        raise AssertionError("it is not in the plan")

    @action
    def take() -> None:
        """It needs no permit."""

    def back_up() -> None:
        with runbook("Backup", system):
            take()
            drop.bind("it")()

    backing_up = Change(back_up, "back up", "it", by=[drop.bind("it")])
    with (
        pytest.raises(NotConfirmed, match="“drop” is not carried out by a plan"),
        runbook("Migrate", system, system.name) as report,
        carrying_out(report, backing_up, effect=EFFECT) as carry,
    ):
        carry(backing_up)
    told = [line for line in caplog.messages if line.startswith(("Step", "take"))]
    assert [re.split(" in | after ", line)[0] for line in told] == [
        "Step 1/1: back up: it",
        "take: done",
        "Step 1/1: back up: failed",
    ]


def test_a_good_run(system: System) -> None:
    with runbook("Full restore", system) as report:
        assert current_report() is report
        report.fact("size", "3 MB")
        report.outcome = "all is back"
    content = written(system)
    assert (content["runbook"], content["environment"], content["status"]) == ("Full restore", system.name, "OK")
    assert content["facts"] == {"size": "3 MB"}
    assert report.path
    assert report.path.name.endswith("-full-restore.json")
    assert report.hash == content["hash"]
    assert report.finished
    assert current_report() is None


def test_a_critical_finding_fails_the_run_at_its_end(system: System) -> None:
    after = []

    def work(report: Report) -> None:
        report.fail("backup", "take one")
        after.append(report)  # a check goes on after a bad finding

    with pytest.raises(RunbookFailed) as error:
        carry_out(system, work)
    assert after == [error.value.report]
    assert str(error.value) == "CRITICAL: backup. Next: take one"
    assert written(system)["status"] == "CRITICAL"


def test_a_warning_does_not(system: System) -> None:
    with runbook("Check", system) as report:
        report.warn("fsync", "switch it on")
    assert written(system)["status"] == "WARN"


def test_an_empty_confirm_ends_planned_and_nothing_after_it_runs(system: System) -> None:
    done = []
    with runbook("Restore", system, "") as report:
        report.plan("swap", "grc_db", size=3_000_000, seconds=0.5)
        report.permit(DROP, effect=EFFECT)
        done.append("dropped")
    assert done == []
    assert report.status is Status.PLANNED
    assert written(system)["status"] == "PLANNED"
    assert report.path
    page = report.path.with_suffix(".md").read_text()
    assert "nothing was changed" in page
    assert f"run it again with confirm=“{system.name}”" in page
    assert "| 1 | swap | grc_db | 3.0 MB | 0.5 s |" in page


def dropping(done: list[str], report: Report) -> None:
    report.permit(DROP, effect=EFFECT)
    done.append("dropped")


def test_a_right_confirm(system: System) -> None:
    done: list[str] = []
    carry_out(system, partial(dropping, done), system.name)
    assert done == ["dropped"]
    assert written(system)["status"] == "OK"


def test_a_wrong_confirm(system: System) -> None:
    done: list[str] = []
    with pytest.raises(NotConfirmed):
        carry_out(system, partial(dropping, done), "production")
    assert done == []
    content = written(system)
    assert content["status"] == "CRITICAL"
    assert content["findings"][0]["hint"].startswith(f"type {system.name} in the field confirm")


@pytest.mark.parametrize("confirm", ["", "right", "wrong"])
def test_a_critical_finding_before_the_permit(system: System, confirm: str) -> None:
    done: list[str] = []

    def work(report: Report) -> None:
        report.fail("backup", "take one")
        dropping(done, report)

    with pytest.raises(RunbookFailed):
        carry_out(system, work, system.name if confirm == "right" else confirm)
    assert done == []
    content = written(system)
    assert content["status"] == "CRITICAL"
    assert [finding["name"] for finding in content["findings"]] == ["backup"]


def test_our_own_error_becomes_a_finding_with_its_hint(system: System) -> None:
    with pytest.raises(RunbookFailed) as error, runbook("Restore", system):
        raise Unreachable("PostgreSQL at 127.0.0.1:5432 does not answer", "start it")
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__
    content = written(system)
    assert content["status"] == "CRITICAL"
    assert content["findings"][-1] == {
        "name": "PostgreSQL at 127.0.0.1:5432 does not answer",
        "status": "CRITICAL",
        "value": "",
        "expected": "",
        "hint": "start it",
        "stops": True,
        "alternative": False,
        "follow": [],
    }


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), KeyboardInterrupt(), SystemExit(3)])
def test_an_unexpected_error_is_reported_and_raised_again(system: System, error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, runbook("Restore", system):
        raise error
    assert raised.value is error
    content = written(system)
    assert content["status"] == "CRITICAL"
    assert content["findings"][-1]["name"] == "the run ended early"
    assert content["findings"][-1]["value"].startswith(type(error).__name__)


def test_a_lost_lock_is_raised_as_it_is(system: System) -> None:
    with pytest.raises(LockLost), runbook("Restore", system):
        raise LockLost("the lock expired", "look for the other run")
    assert written(system)["findings"][-1]["hint"] == "look for the other run"


def test_a_refused_run_reports_who_holds_it(system: System) -> None:
    done = []
    with hold(system.name, system.reports_directory, "Backup", "recovery"):

        def second() -> None:
            with pytest.raises(OpsError, match="is held by “Backup”"), runbook("Restore", system, changes=True):
                done.append(True)

        contextvars.Context().run(second)
    assert done == []
    assert "is held by “Backup”" in written(system)["findings"][-1]["name"]


def test_a_runbook_that_only_reads_needs_no_lock(system: System) -> None:
    with hold(system.name, system.reports_directory, "Backup", "recovery"):

        def second() -> None:
            with runbook("Check", system):
                pass

        contextvars.Context().run(second)
    assert written(system)["status"] == "OK"


def test_a_failed_runbook_inside_fails_the_outer_one(system: System) -> None:
    def inner(report: Report) -> None:
        assert current_report() is report
        report.fail("backup", "take one")

    def drill(report: Report) -> None:
        carry_out(system, inner, changes=True)
        report.outcome = "never reached"

    with pytest.raises(RunbookFailed) as error:
        carry_out(system, drill, title="Drill", changes=True)
    outer = error.value.report
    assert (outer.runbook, outer.outcome) == ("Drill", "")
    assert "CRITICAL: Restore: CRITICAL: backup" in str(error.value)
    assert len(list(system.reports_directory.glob("*.json"))) == 2


def test_a_report_that_cannot_be_written_is_a_finding() -> None:
    system = System(Path("/proc/self/reports"))  # nobody can make a directory there, root neither
    with pytest.raises(RunbookFailed) as error, runbook("Check", system) as report:
        report.fact("size", "3 MB")
    assert error.value.report is report
    assert "the report could not be written to /proc/self/reports" in str(error.value)
    assert "Next: free disk space there, or correct its owner" in str(error.value)


@pytest.mark.parametrize("text", [b"caf\xe9.txt".decode(errors="surrogateescape"), "候補者\x00\x1b[31m", "a|b\n<c>"])
def test_whatever_was_found_can_be_written(system: System, text: str) -> None:
    with runbook("Backup files", system) as report:
        report.warn("strange name", "rename it", value=text)
        report.table("Files", ("name",), [(text,)])
        report.fact(text, text)
    assert written(system)["facts"] == {text: text}


class TestInAFlowRun:
    """With a Prefect server: the run's state, its artifact, its log."""

    pytestmark = pytest.mark.usefixtures("prefect_server")

    def test_the_page_is_an_artifact(self, system: System) -> None:
        ids = []

        @flow(name="check")
        def check() -> Report:
            ids.append(FlowRunContext.get().flow_run.id)  # type: ignore[union-attr]
            with runbook("Check things", system) as report:
                report.fact("size", "3 MB")
            return report

        report = check()
        (artifact,) = artifacts(ids[0])
        assert artifact.key == "check-things"
        assert report.path
        page = str(artifact.data).partition("<!--")[0].strip()
        assert page == fit(report.path.with_suffix(".md").read_text()).strip(), "it fits a phone"
        assert report.hash in str(artifact.data), "the chain's head is kept elsewhere: in Prefect"

    def test_our_own_error_fails_the_run_without_a_traceback(
        self, system: System, caplog: pytest.LogCaptureFixture
    ) -> None:
        ids = []

        @action
        def choose() -> None:
            raise OpsError("there is no backup", "take one")

        @flow(name="restore")
        def restore() -> None:
            ids.append(FlowRunContext.get().flow_run.id)  # type: ignore[union-attr]
            with runbook("Restore", system):
                choose()

        with caplog.at_level(logging.INFO), pytest.raises(RunbookFailed):
            restore()
        assert "CRITICAL: there is no backup. Next: take one" in caplog.text
        assert "Task run failed with exception" in caplog.text
        assert "Encountered exception during execution" not in caplog.text, "the headline is in the log already"
        assert "Traceback" not in caplog.text
        assert [one for one in caplog.records if one.name.startswith("prefect")][-1].msg.startswith("report in Prefect")
        assert [one.levelname for one in caplog.records if "CRITICAL: there is" in one.getMessage()] == ["ERROR"]
        assert [record for record in caplog.records if record.exc_info] == []
        state = state_of(ids[0])
        assert state.is_failed()
        assert "CRITICAL: there is no backup. Next: take one" in state.message
        assert len(artifacts(ids[0])) == 1

    def test_an_unexpected_error_keeps_its_traceback(self, system: System, caplog: pytest.LogCaptureFixture) -> None:
        ids = []

        @flow(name="restore")
        def restore() -> None:
            ids.append(FlowRunContext.get().flow_run.id)  # type: ignore[union-attr]
            with runbook("Restore", system):
                raise ZeroDivisionError

        with caplog.at_level(logging.INFO), pytest.raises(ZeroDivisionError):
            restore()
        assert "Traceback" in caplog.text
        assert state_of(ids[0]).is_failed()
        assert len(artifacts(ids[0])) == 1
        assert written(system)["status"] == "CRITICAL"

    def test_a_run_s_state_is_named_by_its_report_with_the_headline_as_message(self, system: System) -> None:
        @flow(name="restore")
        def restore(confirm: str, worst: Status) -> Report:
            ids[worst] = FlowRunContext.get().flow_run.id  # type: ignore[union-attr]
            with runbook("Restore", system, confirm) as report:
                report.permit(DROP, effect=EFFECT)
                report.outcome = "grc_db_old is dropped"
                report.require("space", worst is Status.OK, "free some", worst=worst)
            return report

        ids = dict[Status, UUID]()
        for confirm, worst in (("", Status.PLANNED), (system.name, Status.WARN), (system.name, Status.OK)):
            assert restore(confirm, worst).status is worst, "as a function it returns its report"
        with pytest.raises(RunbookFailed):
            restore(system.name, Status.CRITICAL)
        states = {worst: state_of(run) for worst, run in ids.items()}
        assert {worst: (state.name, state.type.value) for worst, state in states.items()} == {
            Status.PLANNED: ("Planned", "COMPLETED"),
            Status.WARN: ("Warning", "COMPLETED"),
            Status.OK: ("Completed", "COMPLETED"),
            Status.CRITICAL: ("Failed", "FAILED"),
        }
        assert [states[worst].message for worst in (Status.PLANNED, Status.WARN, Status.OK)] == [
            "PLANNED: grc_db_old is dropped; its rows are lost; about 18 s down; cannot be undone. Nothing has changed.",
            "WARN: grc_db_old is dropped; space. Next: free some",
            "OK: grc_db_old is dropped",
        ]
        wanted = FlowRunFilter(state=FlowRunFilterState(name=FlowRunFilterStateName(any_=["Planned"])))
        with get_client(sync_client=True) as client:
            found = {run.id for run in client.read_flow_runs(flow_run_filter=wanted)}
        assert found & set(ids.values()) == {ids[Status.PLANNED]}

    def test_the_plan_s_link_fills_in_its_own_form(self, system: System, caplog: pytest.LogCaptureFixture) -> None:
        @flow(name="restore-database")
        def restore(environment: str, jobs: int = 0, confirm: str = "") -> Report:
            assert (environment, jobs) == ("本番", 2)
            with runbook("Restore", system, confirm) as report:
                report.permit(DROP, effect=EFFECT)
            return report

        run = launched(restore, {"environment": "本番", "jobs": 2, "confirm": ""})
        with caplog.at_level(logging.INFO):
            report = cast(Report, run_flow(restore, flow_run=run, parameters=run.parameters))
        link = urllib.parse.urlparse(report.form)
        assert link.path == f"/v2/deployments/deployment/{run.deployment_id}/run"
        assert link.netloc == urllib.parse.urlparse(str(PREFECT_UI_URL.value())).netloc
        filled = {"environment": "本番", "jobs": 2, "plan": report.pins["plan"]}
        assert json.loads(urllib.parse.parse_qs(link.query)["parameters"][0]) == filled
        (artifact,) = artifacts(run.id)
        assert f"open [the form]({link.geturl()}), type `{system.name}` in `confirm`" in str(artifact.data)
        lines = [record.getMessage() for record in caplog.records if record.name.startswith("prefect")]
        assert lines[-1].endswith(f"{link.netloc}/v2/artifacts/artifact/{artifact.id}")

    def test_the_plan_s_link_says_what_latest_was(self, system: System) -> None:
        @flow(name="restore-database")
        def restore(environment: str, backup: str = "latest", confirm: str = "") -> Report:
            with runbook("Restore", system, confirm) as report:
                report.pin("backup", "backup_20260101_000000")
                report.permit(DROP, effect=EFFECT)
            return report

        run = launched(restore, {"environment": "本番", "backup": "latest", "confirm": ""})
        report = cast(Report, run_flow(restore, flow_run=run, parameters=run.parameters))
        parameters = urllib.parse.parse_qs(urllib.parse.urlparse(report.form).query)["parameters"][0]
        filled = {"environment": "本番", "backup": "backup_20260101_000000", "plan": report.pins["plan"]}
        assert json.loads(parameters) == filled
        by_hand = restore.fn("本番")
        assert ', backup="backup_20260101_000000", plan="at=' in by_hand.form


def launched(work: Flow[..., Report], parameters: dict[str, Any]) -> FlowRun:
    """A run of a deployment, as a worker gets it."""
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(client.create_flow_from_name(work.name), name=uuid4().hex)
        return client.create_flow_run_from_deployment(deployment, parameters=parameters)


def artifacts(run_id: UUID) -> list[Any]:
    """The pages of a run (Prefect keeps results as artifacts too)."""
    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
    with get_client(sync_client=True) as client:
        return [found for found in client.read_artifacts(artifact_filter=of_run) if found.type == "markdown"]


def state_of(run_id: UUID) -> Any:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run_id).state


def test_a_report_shows_times_in_the_zone_of_the_environment_with_its_offset(system: System) -> None:
    with runbook("Trial", system) as report:
        report.fact("snapshot", clock.text(datetime(2026, 11, 28, 16, 14, 51, tzinfo=UTC)))
    page = report.path.with_suffix(".md").read_text() if report.path else ""
    assert "| snapshot | 2026-11-29 01:14:51 +09:00 |" in page
    assert re.search(r"\| started \| 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d \+09:00 \|", page)
    assert clock.text(datetime(2026, 11, 28, 16, 14, tzinfo=UTC), "minutes") == "2026-11-28 16:14 +00:00", (
        "outside a run"
    )


def test_a_run_does_not_wait_for_the_thread_of_its_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks only once a second whether the run has ended, when the run's state is in Prefect already."""
    engine, joined = mock.MagicMock(heartbeat_seconds=30), list[str]()
    engine._build_heartbeat_event_template.return_value = ({}, [])
    engine.flow_run.state.is_final.return_value = False
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "join", lambda thread, timeout=None: joined.append(thread.name))
        with flow_engine._send_heartbeats(engine):
            pass
    assert not joined
