"""Four eyes on the real Prefect server: a run suspends after its plan, and only a second person's code lets it go on."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pyotp
import pytest
from prefect.client.orchestration import get_client
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow_sync
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Pending

from blocks.config import toml
from blocks.environment import Environment
from deployments import register
from flows import approval, launch
from flows.logs.cleaning import clean_logs
from runbook.errors import OpsError
from runbook.files.state import state_directory
from runbook.guard import approval as approval_of
from runbook.guard.approval import checked_reason
from runbook.guard.approval_form import described
from runbook.guard.codes import CodeRefused, CodeUse, accept, find_code, share_use
from runbook.guard.permit import Tolerance
from runbook.page.render import key
from runbook.report import Report
from runbook.run import runbook
from runbook.wait import until
from tests.routine.checklist.waiting import Waiting, waiting

ALICE, BOB = pyotp.random_base32(), pyotp.random_base32()
MORE = """
[logs]
app = "{0}/log/app.log"
audit = "{0}/log/audit.log"
backup = "{0}/log/db_backup.log"
[alerts]
channels = ["file"]
file = "{0}/alerts.jsonl"
path = [{{ contacts = ["on-call"] }}]
[alerts.contacts.on-call]
role = "オンコールSRE"
[approval]
required = ["clean-logs"]
minutes = 30
[approval.approvers]
alice = {{ secret_env = "OPS_TOTP_ALICE", logins = ["asmith"] }}
bob = {{ secret_env = "OPS_TOTP_BOB" }}
"""


class Place:
    """An environment with old logs, and runs of clean-logs in this very process, as a worker would start them."""

    def __init__(self, made: Waiting) -> None:
        self.made, self.name, self.logs = made, made.name, made.directory / "log"

    def old_log(self, name: str) -> Path:
        path = self.logs / name
        path.write_text("{}\n")
        os.utime(path, (time.time() - 40 * 86400,) * 2)
        return path

    def launch(self) -> str:
        return self.made.launch("clean-logs", environment=self.name, confirm=self.name)

    def go_on(self, run: str) -> dict[str, Any]:
        """The run's process, from the top; its state then."""
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(UUID(run), Pending(), force=True)
            flow_run = client.read_flow_run(UUID(run))
        with contextlib.suppress(Pause):
            run_flow_sync(clean_logs, flow_run=flow_run, parameters=flow_run.parameters)
        return dict(self.made.run(run)["state"])

    def asked(self, run: str, attempt: int) -> str:
        """What the form says."""
        self.made.asks(run, f"approval-{attempt}")
        return str(self.made.read(run, f"suspended-approval-{attempt}-description"))

    def answer(self, run: str, **given: str) -> str:
        state = self.made.run(run)["state"]["state_details"]["run_input_keyset"]["schema"]
        plan = self.made.read(run, state)["properties"]["plan"]["default"]
        return self.made.answer(run, {"plan": plan, **given})

    def reports(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.made.reports.glob("*-clean-logs.json"))]


@pytest.fixture(scope="module")
def made(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Waiting]:
    directory = tmp_path_factory.mktemp("approval")
    (directory / "log").mkdir()
    (directory / "log" / "app.log").write_text("{}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPS_TOTP_ALICE", ALICE)
        patch.setenv("OPS_TOTP_BOB", BOB)
        with waiting(directory, [clean_logs], MORE.format(directory)) as found:
            yield found


@pytest.fixture
def place(made: Waiting) -> Iterator[Place]:
    """No code is used, no report filed, no old log there."""
    shutil.rmtree(made.reports, ignore_errors=True)
    shutil.rmtree(state_directory() / "approvals", ignore_errors=True)
    for path in made.directory.glob("log/app.log.*"):
        path.unlink()
    with temporary_settings({PREFECT_API_URL: made.runs.api}):
        yield Place(made)


def code(secret: str, steps: int = 0) -> str:
    return pyotp.TOTP(secret).at(datetime.now(UTC) + timedelta(seconds=30 * steps))


def fresh_code(secret: str) -> str:
    """A code that is valid for 45 seconds at least."""
    until(lambda: time.time() % 30 < 15, what="a young code", seconds=30)
    return code(secret)


def facts(report: dict[str, Any]) -> dict[str, str]:
    return dict(report["facts"])


def test_only_a_second_persons_code_for_this_very_plan_lets_it_go_on(place: Place) -> None:
    old = place.old_log("app.log.9")
    run = place.launch()
    assert place.go_on(run)["name"] == "Suspended"
    told = place.asked(run, 1)
    assert "app.log.9" in told
    (planned,) = place.reports()
    assert planned["status"] == "PLANNED"
    assert facts(planned)["plan"] in told
    with runbook("Other work", Environment.find(place.name), changes=True) as other:
        pass  # the lock is free while people are waited for
    assert other.facts["lock"]

    assert place.answer(run, plan="0123456789ab", code=code(BOB)) == "REJECT"
    assert place.answer(run, code="000000") == "ACCEPT"
    assert place.go_on(run)["name"] == "Suspended"
    assert "the code is wrong" in place.asked(run, 2)
    assert place.answer(run, code=code(ALICE), launched_by="ASmith") == "ACCEPT"
    assert place.go_on(run)["name"] == "Suspended"
    assert "alice launched this run and cannot approve it" in place.asked(run, 3)

    newer, used = place.old_log("app.log.8"), fresh_code(BOB)
    assert place.answer(run, code=used) == "ACCEPT"
    assert place.go_on(run)["name"] == "Suspended"
    told = place.asked(run, 4)
    assert "the plan changed after bob" in told
    assert "app.log.8" in told
    assert place.answer(run, code=used) == "ACCEPT"
    assert place.go_on(run)["name"] == "Suspended"
    assert "this code of bob was used before" in place.asked(run, 5)
    assert old.exists()
    assert newer.exists()

    assert place.answer(run, code=code(ALICE), launched_by="carol") == "ACCEPT"
    assert place.go_on(run)["type"] == "COMPLETED", place.reports()[-1]
    assert not old.exists()
    assert not newer.exists()
    done = place.reports()[-1]
    assert facts(done)["approved by"].startswith("alice, ")
    assert facts(done)["launched by"] == "carol"
    assert facts(done)["plan"] in facts(done)["approved by"]
    assert ALICE not in json.dumps(place.reports())
    shown = place.made.runs.call("POST", "/block_documents/filter", {"limit": 200, "include_secrets": False})
    assert place.name in str(shown)
    assert ALICE not in str(shown), "masked"


def test_an_override_pages_and_is_in_the_report(place: Place) -> None:
    old = place.old_log("app.log.9")
    run = place.launch()
    place.go_on(run)
    assert place.answer(run, override="the disk is full, nobody else answers") == "ACCEPT"
    assert place.go_on(run)["type"] == "COMPLETED", place.reports()[-1]
    assert not old.exists()
    done = place.reports()[-1]
    findings = {one["name"]: one for one in done["findings"]}
    assert done["status"] == "WARN"
    assert "the disk is full" in findings["emergency override"]["value"]
    assert findings["people were paged about the override"]["status"] == "OK"
    (paged,) = [json.loads(line) for line in (place.made.directory / "alerts.jsonl").read_text().splitlines()]
    assert "clean-logs" in json.dumps(paged, ensure_ascii=False)
    assert "the disk is full" in json.dumps(paged, ensure_ascii=False)


def test_a_run_that_nobody_approves_fails_when_its_time_is_over(place: Place) -> None:
    old, toml_file = place.old_log("app.log.9"), place.made.directory / "environment.toml"
    right, run = toml_file.read_text(), place.launch()
    toml_file.write_text(right.replace("minutes = 30", "minutes = 0.04"))
    register.register(place.name)
    place.go_on(run)
    toml_file.write_text(right)
    register.register(place.name)
    until(lambda: place.made.run(run)["state"]["type"] == "FAILED", what="the end of its time", seconds=120)
    assert old.exists()


def test_on_the_command_line_the_code_comes_from_the_variable(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = place.old_log("app.log.9")
    monkeypatch.setattr(launch, "prefect_answers", lambda: False)
    monkeypatch.setenv("SUDO_USER", "asmith")
    given = {"environment": place.name, "confirm": place.name}
    with pytest.raises(OpsError, match="cannot wait for it"):
        clean_logs.fn(**given)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert launch.launch(clean_logs, given, without_prefect=True) == 1
    assert "no code was given" in capsys.readouterr().err
    for wrong, why in ((code(ALICE), "alice launched this run"), ("000000", "the code is wrong")):
        monkeypatch.setenv(approval.CODE, wrong)
        assert launch.launch(clean_logs, given, without_prefect=True) == 1
        assert why in capsys.readouterr().err
    assert old.exists()
    monkeypatch.setenv(approval.CODE, fresh_code(BOB))
    assert launch.launch(clean_logs, given, without_prefect=True) == 0, capsys.readouterr().err
    assert not old.exists()
    assert facts(place.reports()[-1])["launched by"] == "asmith"
    assert launch.launch(clean_logs, given, without_prefect=True) == 0, "where nothing is due, nobody is asked"
    place.old_log("app.log.9")
    assert launch.launch(clean_logs, given, without_prefect=True) == 1
    assert "used before" in capsys.readouterr().err


def test_what_cannot_be_approved_is_refused_at_registration(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place.made.directory / "environment.toml"
    right = path.read_text()
    for wrong, expected in (
        ('required = ["clean-log"]', "clean-log, which is no runbook"),
        ('required = ["watch-metrics"]', "which only reads"),
    ):
        path.write_text(right.replace('required = ["clean-logs"]', wrong))
        with pytest.raises(OpsError, match=expected):
            register.register(place.name)
    path.write_text(right.replace("reports =", 'unattended = ["clean-logs"]\nreports =', 1))
    with pytest.raises(OpsError, match=r"\[approval\] required is wrong.*no runbook of unattended"):
        toml.environment(place.name)
    path.write_text(right)
    monkeypatch.setenv("OPS_TOTP_BOB", "short")
    with pytest.raises(
        OpsError, match=r"\[approval\].* is wrong.*the variable of bob must hold a TOTP secret: base32"
    ) as error:
        toml.environment(place.name)
    assert "short" not in str(error.value)


def test_a_code_is_valid_for_its_moment(place: Place) -> None:
    approvals, now = Environment.find(place.name).approval, datetime.now(UTC)
    found = {steps: find_code(approvals, pyotp.TOTP(BOB).at(now, counter_offset=steps), now) for steps in range(-3, 4)}
    assert {steps: known.name for steps, known in found.items() if known} == {-1: "bob", 0: "bob"}, "none of the future"
    assert checked_reason("the disk  is full") == "the disk is full"
    with pytest.raises(CodeRefused):
        checked_reason("fire")


def test_a_code_is_used_once_by_the_same_plan_environment_and_run(place: Place) -> None:
    approvals, now, use = Environment.find(place.name).approval, datetime.now(UTC), CodeUse("blue", "plan", "run-1")
    for _ in range(2):
        assert accept(approvals, code(BOB), now, use, "").name == "bob"
    for other in (replace(use, environment="green"), replace(use, plan="other"), replace(use, owner="run-2")):
        with pytest.raises(CodeRefused, match="was used before"):
            accept(approvals, code(BOB), now, other, "")
    assert accept(approvals, code(ALICE), now, use, "").name == "alice", "another person's"


def test_another_host_knows_from_prefect_that_a_code_was_used(place: Place) -> None:
    approvals, now, use = Environment.find(place.name).approval, datetime.now(UTC), CodeUse("blue", "plan", "run-1")
    found = accept(approvals, code(BOB), now, use, "")
    yesterday = replace(found, step=found.step - 3000)
    for one in (yesterday, found, found):
        share_use(one, use)
    with pytest.raises(CodeRefused, match="on another host"):
        share_use(found, replace(use, owner="run-2"))
    names = {one["name"] for one in place.made.runs.call("POST", "/variables/filter", {"limit": 200})}
    assert f"used-code-{found.identity}-{found.step}" in names
    assert f"used-code-{found.identity}-{yesterday.step}" not in names, "deleted"


def test_a_runbook_inside_another_is_not_approved_by_that(place: Place) -> None:
    place.old_log("app.log.9")
    env = Environment.find(place.name)
    with pytest.raises(OpsError, match="Outer was not approved"), runbook("Outer", env, place.name):
        clean_logs.fn(place.name, confirm=place.name)


def test_each_runbook_that_changes_something_is_known_by_its_flows_name() -> None:
    found = dict[str, list[str]]()
    for path in (Path(__file__).parents[2] / "flows").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or "confirm" not in [one.arg for one in node.args.args]:
                continue
            calls = [one for one in ast.walk(node) if isinstance(one, ast.Call)]
            flows = [one for one in node.decorator_list if isinstance(one, ast.Call) and _name(one) == "flow"]
            for flow in flows:
                names = {
                    keyword.arg: ast.literal_eval(keyword.value) for keyword in flow.keywords if keyword.arg == "name"
                }
                constants = _constants(node)
                found[names["name"]] = [_known_as(one, constants) for one in calls if _name(one) == "runbook"]
    assert len(found) > 30
    assert {name: known for name, known in found.items() if known != [name]} == {}


def _name(call: ast.Call) -> str:
    return str(getattr(call.func, "id", ""))


def _constants(function: ast.FunctionDef) -> dict[str, ast.expr]:
    """What its body calls by a name, and is written there."""
    return {
        target.id: one.value
        for one in function.body
        if isinstance(one, ast.Assign) and isinstance(one.value, ast.Constant)
        for target in one.targets
        if isinstance(target, ast.Name)
    }


def _known_as(call: ast.Call, constants: dict[str, ast.expr]) -> str:
    given = [one.value for one in call.keywords if one.arg == "name"]
    named = [ast.literal_eval(constants.get(one.id, one) if isinstance(one, ast.Name) else one) for one in given]
    return str(named[0]) if named else key(Report(ast.literal_eval(call.args[0]), "x"))


def test_a_number_with_a_tolerance_is_part_of_what_is_approved() -> None:
    """It may move while the approver reads; beyond its tolerance it is another plan."""

    def planned(keys: int, files: int = 3) -> Report:
        report = Report("Clear cache", "trial")
        report.pin_state("keys", keys, tolerance=Tolerance(0.1))
        report.pin_state("files", files, tolerance=Tolerance(0.0))
        report.pin_state("server", "run-1")
        return report

    seen = planned(1000)
    approved = approval_of.plan_id(seen)
    assert "keys 1,000 (± 100)" in described(seen)
    assert [keys for keys in (899, 900, 1000, 1100, 1101) if approval_of.is_approved(planned(keys), approved)] == [
        900,
        1000,
        1100,
    ]
    assert not approval_of.is_approved(planned(1000, files=4), approved)
    for other in ("", approved[:12], f"{approved}-1", approved.replace("1000", "x"), f"0{approved[1:]}"):
        assert not approval_of.is_approved(seen, other) or other == approved
