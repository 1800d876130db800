"""A confirmed run changes only what its plan found, and each plan is carried out once."""

from __future__ import annotations

import itertools
import re
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect import Flow, flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import run_flow_sync
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Pending, Scheduled

from blocks.config import toml
from flows.redis.cache import clear_cache
from runbook.errors import NotConfirmed, RunbookFailed
from runbook.guard import carried_out
from runbook.guard.carried_out import CarriedOut
from runbook.guard.permit import Act, Pin, Tolerance
from runbook.guard.pins import Plan, PlanChanged, digest, read_plan
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.wait import until
from tests.redis import servers
from tests.redis.servers import running_redis
from tests.runbook.system import EFFECT, System

MB = 1_000_000
DONE: list[str] = []
LIVE: dict[str, Any] = {}


@flow(name="replace-it", validate_parameters=False)
def replace_it(system: System, plan: str = "", confirm: str = "", title: str = "Replace it") -> Report:
    """Replaces database 16400, whose writes since the plan are then lost."""
    with runbook(title, system, confirm, plan, changes=True) as report:
        report.pin_state("database app", LIVE["oid"], lost=True)
        report.pin_state("WAL", LIVE["timeline"], written=LIVE["lsn"], lost=True)
        if LIVE["files"]:
            report.pin_state("files", digest(LIVE["files"]), items=[digest([one]) for one in LIVE["files"]])
        report.pin_state("keys", LIVE["keys"], tolerance=Tolerance(0.1, least=5))
        report.plan("replace", "app")
        report.permit(*(Act("replace", one) for one in LIVE["acts"]), effect=EFFECT)
        if LIVE.get("fails"):
            LIVE["oid"] += 1
            report.fail("it", "again")
            report.fail_if_critical()
        DONE.append(system.name)
    return report


@flow(name="restore-it", validate_parameters=False)
def restore_it(system: System, backup: str = "latest", plan: str = "", confirm: str = "") -> Report:
    """Keeps Redis where no earlier point in time was asked for."""
    with runbook("Restore it", system, confirm, plan, changes=True) as report:
        latest = report.pin_question("backup asked for", backup) == "latest"
        report.pin("backup", name := "backup_1" if backup == "latest" else backup)
        report.pin_state("backup", name)
        report.pin_state("Redis", "kept" if latest else "restored")
        report.permit(Act("restore", "app"), effect=EFFECT)
        DONE.append("kept" if latest else "restored")
    return report


@pytest.fixture(autouse=True)
def live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried_out, "ANSWER_SECONDS", 60.0)  # on a busy machine Prefect may need as long
    DONE.clear()
    LIVE.clear()
    LIVE.update(oid=16400, timeline="7/1", lsn=100 * MB, acts=["app"], files=[], keys=300)


def confirmed(system: System, plan: Report | str, **given: Any) -> Report:
    text = plan if isinstance(plan, str) else str(plan.pins["plan"])
    return replace_it.fn(system, plan=text, confirm=system.name, **given)


def test_two_people_confirm_the_same_plan(system: System) -> None:
    plan = replace_it.fn(system)
    assert plan.status is Status.PLANNED
    assert plan.facts["pinned"] == "database app 16400; WAL 7/1; keys 300 (± 30); refused after 1.0 GB more writes"
    first = confirmed(system, plan)
    assert first.facts["writes since the plan (WAL)"] == "0 B; this run's loss includes those that it replaces"
    with pytest.raises(CarriedOut, match=rf"carried out at 20.* \+09:00 \({first.path}\).*nothing was changed"):
        confirmed(system, plan)
    assert [system.name] == DONE
    assert replace_it.fn(system, confirm=system.name).status is Status.OK, "at night nobody copies a fingerprint"


def test_the_answer_in_a_form_is_not_taken_for_the_question(system: System) -> None:
    """A plan for latest has a name in its form: confirmed, it is still the plan for latest."""
    plan = restore_it.fn(system)
    assert plan.pins["backup"] == "backup_1"
    with pytest.raises(PlanChanged, match="backup was backup_1, is backup_2"):
        restore_it.fn(system, **{**plan.pins, "backup": "backup_2"}, confirm=system.name)
    restore_it.fn(system, **plan.pins, confirm=system.name)
    restore_it.fn(system, **restore_it.fn(system, backup="backup_1").pins, confirm=system.name)
    assert DONE == ["kept", "restored"]


def test_two_people_each_with_a_plan(system: System) -> None:
    """Nothing that the flow pins differs here: that the same runbook did its work since is enough."""
    plans = [replace_it.fn(system) for _ in range(2)]
    confirmed(system, plans[0])
    with pytest.raises(PlanChanged, match="same runbook was not yet carried out, is carried out at"):
        confirmed(system, plans[1])
    assert len(DONE) == 1
    assert confirmed(system, replace_it.fn(system)).status is Status.OK, "a new plan is another one"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"oid": 16500}, "database app was 16400, is 16500"),
        ({"timeline": "7/2"}, "WAL was 7/1, is 7/2"),
        ({"lsn": 99 * MB}, "WAL was 100000000, is 99000000"),
        (
            {"lsn": 1101 * MB},
            r"writes \(WAL\) was none, is 1.0 GB, more than 1.0 GB; this run's loss includes those that it replaces",
        ),
        ({"acts": ["app", "more"]}, "acts was"),
        ({"keys": 331}, "keys was 300, is 331"),
        ({"keys": 269}, "keys was 300, is 269"),
        ({"files": ["a"]}, "files was nothing, is"),
    ],
)
def test_a_plan_that_no_longer_fits_is_shown_anew_and_changes_nothing(
    system: System, change: dict[str, Any], told: str
) -> None:
    plan = replace_it.fn(system)
    LIVE.update(change)
    with pytest.raises(PlanChanged, match=told) as refused:
        confirmed(system, plan)
    assert "new plan in this report" in refused.value.hint
    assert not DONE
    page = max(system.reports_directory.glob("*-replace-it.md")).read_text()
    assert "## Plan (nothing was changed)" in page
    assert "What changed since the plan" in page
    new = page.rpartition('plan="')[2].partition('"')[0]
    assert confirmed(system, new).status is Status.OK, "the report's own form carries the new plan"


def test_ordinary_writes_are_told_and_do_not_make_a_plan_stale(system: System) -> None:
    plan = replace_it.fn(system)
    LIVE["lsn"] += 12 * MB
    LIVE["keys"] += 30
    assert confirmed(system, plan).status is Status.OK
    plan = replace_it.fn(system)
    LIVE["lsn"] += 80 * MB
    LIVE["keys"] -= 33
    report = confirmed(system, plan)
    assert report.status is Status.WARN
    assert report.facts["writes since the plan (WAL)"] == "80.0 MB; this run's loss includes those that it replaces"


def test_what_is_no_plan_is_refused_and_so_is_an_old_one(system: System) -> None:
    for text in ("yes", "at=2026-01-01", "at=x,acts=y", "at=2026-01-01T00:00:00,acts=y", "a=b,c"):
        with pytest.raises(NotConfirmed, match="no plan's fingerprint"):
            confirmed(system, text)
    plan = read_plan(str(replace_it.fn(system).pins["plan"]))
    old = Plan(plan.at - timedelta(days=8), plan.acts, plan.pins)
    with pytest.raises(PlanChanged, match="more than 7 days"):
        confirmed(system, old.text)
    assert not DONE


def test_a_failed_run_s_plan_may_be_confirmed_again_unless_its_work_was_done(system: System) -> None:
    """What it left half done (its acts are others then) stands in nobody's way."""
    plan = replace_it.fn(system)
    LIVE["fails"] = True
    with pytest.raises(RunbookFailed):
        confirmed(system, plan)
    LIVE["fails"] = False
    with pytest.raises(PlanChanged, match="database app was 16400, is 16401"):
        confirmed(system, plan)
    LIVE.update(oid=16400, acts=["the rest"])
    assert confirmed(system, plan).status is Status.OK
    with pytest.raises(CarriedOut):
        confirmed(system, plan)


@pytest.mark.parametrize(
    ("left", "told"),
    [
        ({"files": ["b"], "keys": 10}, ""),
        ({"files": ["b", "new"]}, "files was"),
        ({"keys": 331}, "keys was 300, is 331"),
    ],
)
def test_what_goes_on_with_a_half_done_deletion_deletes_nothing_that_the_plan_did_not_have(
    system: System, left: dict[str, Any], told: str
) -> None:
    LIVE["files"] = ["a", "b"]
    plan = replace_it.fn(system)
    LIVE["fails"] = True
    with pytest.raises(RunbookFailed):
        confirmed(system, plan)
    LIVE.update(fails=False, oid=16400, **left)
    if told:
        with pytest.raises(PlanChanged, match=told):
            confirmed(system, plan)
    else:
        assert confirmed(system, plan).status is Status.OK


def test_a_record_that_cannot_be_written_makes_the_run_no_worse(system: System) -> None:
    plan = replace_it.fn(system)
    (system.reports_directory / "carried-out").write_text("a file where the directory should be")
    with pytest.raises(CarriedOut, match="cannot be read: this plan may have been carried out"):
        confirmed(system, plan)
    report = replace_it.fn(system, confirm=system.name)
    assert (report.status, len(DONE)) == (Status.WARN, 1)
    assert "record that the plan was carried out" in report.sentence()


def test_a_fingerprint_is_read_as_it_was_written() -> None:
    pins = {"database a,b=c&d": Pin("16400@x, 100 % “live”", 42), "Redis": Pin("", -1)}
    text = Plan(read_plan("at=2026-01-01T00:00:00Z,acts=a").at, "abc", pins).text
    plan = read_plan(text)
    assert (plan.acts, plan.pins) == ("abc", pins)
    assert re.fullmatch(r"[\w%=:/@,.~-]+", text, re.ASCII), "a shell and Markdown leave it as it is"
    lists = [["a"], ["a", "b"], ["ab"], []]
    assert all(digest(one) != digest(other) for one, other in itertools.combinations(lists, 2))


@pytest.mark.usefixtures("prefect_server")
class TestHostsThatShareNoReports:
    """Two directories of reports, one Prefect server."""

    def test_each_sees_what_the_other_carried_out(self, system: System, tmp_path: Path) -> None:
        other = System(tmp_path / "other", system.name)
        plans = [replace_it.fn(one) for one in (system, other)]
        text = str(plans[0].pins["plan"])
        run = replace_it(system, plan=text, confirm=system.name, return_state=True)
        assert run.is_completed()
        link = f"/runs/flow-run/{run.state_details.flow_run_id}"
        with pytest.raises(CarriedOut, match=rf"plan was carried out at .* \+09:00 \(.*{link}\): nothing was changed"):
            confirmed(other, plans[0])
        with pytest.raises(PlanChanged, match=rf"same runbook was not yet carried out, is carried out .*{link}"):
            confirmed(other, plans[1])
        assert [system.name] == DONE

    def test_a_plan_that_is_too_old_to_be_confirmed_is_forgotten(
        self, system: System, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mine = {"variables": {"tags": {"all_": [carried_out.DIRECTORY, system.name]}, "name": {"like_": "-plan-"}}}

        def kept() -> int:  # the latest run of the runbook is another record
            confirmed(system, replace_it.fn(system))
            with get_client(sync_client=True) as client:
                return len(client.request("POST", "/variables/filter", json=mine).json())

        assert kept() == 1
        monkeypatch.setattr(carried_out, "KEPT_IN_PREFECT", timedelta(0))
        until(lambda: kept() == 0, what="that they are deleted", seconds=60)  # a busy Prefect may refuse one deletion

    def test_without_an_answer_the_file_counts_and_the_report_says_so(
        self, system: System, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = replace_it.fn(system)
        asked, brief = list[float](), carried_out.asked_briefly
        monkeypatch.setattr(carried_out, "ANSWER_SECONDS", 0.5)
        monkeypatch.setattr(carried_out, "asked_briefly", lambda seconds: (asked.append(seconds), brief(seconds))[1])
        with socket.create_server(("127.0.0.1", 0)) as hung:  # takes connections and never answers
            where = f"http://127.0.0.1:{hung.getsockname()[1]}/api"
            with temporary_settings({PREFECT_API_URL: where}):
                report = confirmed(system, plan)
                assert asked == [0.5], "it is waited for once"
                with pytest.raises(CarriedOut):
                    confirmed(system, plan)
        assert report.facts["record of this run"].startswith("on this host only: Prefect does not answer")


def run_again(of: Flow[..., Any], run: FlowRun, given: dict[str, Any]) -> Any:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, Pending(), force=True)
        again = client.read_flow_run(run.id)
    return run_flow_sync(of, flow_run=again, parameters=given)


class TestRetry:
    """⋮ → Retry in the UI: the same flow run, run again."""

    pytestmark = pytest.mark.usefixtures("prefect_server")

    def run(self, run: FlowRun, system: System, title: str = "Replace it") -> Any:
        return run_again(replace_it, run, {"system": system, "confirm": system.name, "title": title})

    def created(self) -> FlowRun:
        with get_client(sync_client=True) as client:
            return client.create_flow_run(replace_it, parameters={}, state=Scheduled())

    def test_of_a_run_that_did_its_work_changes_nothing(self, system: System) -> None:
        run = self.created()
        assert self.run(run, system).status is Status.OK
        with pytest.raises(CarriedOut, match=rf"carried out at .*/runs/flow-run/{run.id}\): a retry changes nothing"):
            self.run(run, system)
        assert len(DONE) == 1
        assert self.run(self.created(), system).status is Status.OK, "another run is another decision"

    def test_on_a_host_with_other_reports_changes_nothing(self, system: System, tmp_path: Path) -> None:
        run = self.created()
        assert self.run(run, system).status is Status.OK
        with pytest.raises(CarriedOut, match="a retry changes nothing"):
            self.run(run, System(tmp_path / "other", system.name))
        assert len(DONE) == 1

    def test_of_a_run_that_failed_goes_on_while_what_it_was_permitted_still_fits(self, system: System) -> None:
        LIVE["fails"] = True
        for state in (16400, 16401):
            run = self.created()
            LIVE.update(oid=16400, fails=True)
            with pytest.raises(RunbookFailed):
                self.run(run, system)
            LIVE.update(oid=state, fails=False)
            if state == 16400:
                assert self.run(run, system).status is Status.OK
            else:
                with pytest.raises(PlanChanged, match="database app was 16400, is 16401"):
                    self.run(run, system)
        assert len(DONE) == 1

    def test_of_a_cleared_cache_deletes_nothing_also_where_the_run_found_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with running_redis() as server:
            server.register(monkeypatch)
            env, client = toml.environment(servers.NAME), server.client()
            given = {"environment": env.name, "prefixes": ("cache:",), "confirm": env.name}
            for keys in (500, 0):
                client.mset({f"cache:{number}": 1 for number in range(keys)} | {"kept": 1})
                with get_client(sync_client=True) as prefect:
                    run = prefect.create_flow_run(clear_cache, parameters={}, state=Scheduled())
                with env.stands_in():
                    run_again(clear_cache, run, given)
                    assert client.dbsize() == 1
                    client.mset({f"cache:new:{number}": 1 for number in range(300)})
                    with pytest.raises(CarriedOut, match="a retry changes nothing"):
                        run_again(clear_cache, run, given)
                assert client.dbsize() == 301
                client.flushall()
