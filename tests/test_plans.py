"""Every runbook that takes a `confirm` pins its plan, and refuses to carry one out twice. No list to keep."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from blocks.environment import Environment
from blocks.prefect_server import PrefectServer
from flows.deleting import limit_unattended
from runbook import metrics
from runbook.errors import RunbookFailed
from runbook.guard.carried_out import CarriedOut, Records
from runbook.guard.permit import Act, Pin
from runbook.guard.pins import Pinned
from runbook.report import Report
from tasks.host.clocks import Skew
from tests.test_deployments import FLOWS, ROOT, Found, source_of

NAME = "twice"
PLAN = "at=2026-11-28T00:00:00+00:00&acts=0123456789ab"
CONFIRMED = [found for found in FLOWS if "confirm" in found.parameters]
EACH = pytest.mark.parametrize("found", CONFIRMED, ids=lambda found: found.entrypoint)
PINS = re.compile(r"\bpin_(state|database|redis|keys|deleted|copies|paths)\(|\bchoose\.pin\(")


@EACH
def test_each_takes_a_plan_and_pins_its_own(found: Found) -> None:
    names = list(found.parameters)
    assert names[-2:] == ["plan", "confirm"]
    source = source_of(found.flow.fn)
    assert re.search(r"\brunbook\(\s*\"[^\"]+\", env, confirm, plan\b", source), "the runbook gets it"
    assert PINS.search(source), "the flow says in a line what a confirmed run must find again"


@EACH
def test_each_refuses_a_plan_that_was_carried_out(found: Found, tmp_path: Path) -> None:
    """Before anything is read: the environment here has no part at all."""
    env = Environment(name=NAME, disposable=True, reports=str(tmp_path / "reports"), rpo_seconds=1, rto_seconds=1)
    done = Report("Before", NAME, acts=(Act("replace", "it"),), states={"it": Pin("1")}, permitted=True)
    Pinned(Records(env.reports_directory, NAME), "before", PLAN).record(done)
    with (
        env.stands_in(),
        pytest.raises(CarriedOut, match=r"this plan was carried out at .* \+09:00.*nothing was changed"),
    ):
        found.flow.fn(NAME, **_required(found), plan=PLAN, confirm=NAME)
    (page,) = (tmp_path / "reports").glob("*.md")
    assert "this plan was carried out" in page.read_text(encoding="utf-8")


def test_each_command_line_that_confirms_takes_the_plan() -> None:
    """A plan's report shows what to confirm it with; `add_confirmation` takes all of it."""
    sources = [path for path in ROOT.glob("flows/**/*.py") if '"--confirm"' in path.read_text(encoding="utf-8")]
    assert sources == [ROOT / "flows/launch.py"]


def _required(found: Found) -> dict[str, Any]:
    """Something for each parameter that has no default."""
    fillers: dict[object, Any] = {str: "x", int: 1, bool: True}
    needed = [one for one in found.parameters.values() if one.default is inspect.Parameter.empty]
    return {
        one.name: fillers.get(found.hints[one.name], ("x",) if typing.get_origin(found.hints[one.name]) else "x")
        for one in needed
        if one.name != "environment"
    }


@pytest.mark.parametrize(
    "name", ["clean-logs", "discard-superseded", "clean-docker", "free-disk-emergency", "clean-prefect-history"]
)
def test_what_deletes_by_age_refuses_a_wrong_clock(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How clocks are read, and prune-backups: tests/database/backup/test_verify_and_prune.py."""
    server = PrefectServer(password=SecretStr(""), admin_password=SecretStr(""), keep_days=1)
    env = Environment(
        name=NAME,
        reports=str(tmp_path),
        rpo_seconds=1,
        rto_seconds=1,
        thresholds={metrics.DISK.name: [0, 1]},
        slugs={"prefect_server": ""},
    )
    monkeypatch.setattr("flows.deleting.read_skews", lambda servers, stores: (Skew("Prefect", 86400.0),))
    (found,) = (found for found in FLOWS if found.flow.name == name)
    given = {"confirm": NAME} if "confirm" in found.parameters else {}
    with (
        env.with_parts({"prefect_server": server}).stands_in(),
        pytest.raises(RunbookFailed, match="this host's clock: ahead of Prefect by 24 h 00 min"),
    ):
        found.flow.fn(NAME, **given)


def test_an_unattended_run_deletes_a_share_at_most() -> None:
    env = Environment(name=NAME, rpo_seconds=1, rto_seconds=1, unattended_share=0.25)
    for unattended, number in ((False, 8), (True, 2)):
        report = Report("Delete", NAME, unattended=unattended)
        assert list(limit_unattended(report, env, "files", range(8), 10)) == list(range(number))
    assert report.findings[0].value == "8 of 10 files can be deleted; this run deletes 2"
