"""The drill of a bad release: copied in by hand, taken back by deploy-application, which must refuse it itself."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flows.infrastructure.images import releases
from flows.infrastructure.images.releases import ReleaseDeployment
from runbook.errors import OpsError
from runbook.report import Status
from tasks.host.services import start_services
from tests.fixtures.reports import rows as table
from tests.fixtures.reports import text_of as finding
from tests.fixtures.stand_in import replace_step
from tests.recovery.conftest import System
from tests.recovery.drills.running import critical, environment, hold, process, steady

NAME = "bad_release"


@pytest.fixture(scope="module", autouse=True)
def well(system: System) -> None:
    steady(system)


def branches(system: System) -> list[str]:
    repository = environment(system).application.repository
    argv = ["git", "-C", repository, "for-each-ref", "--format=%(refname:short)", "refs/heads"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()


def release(system: System) -> str:
    return (Path(environment(system).application.directory) / "RELEASE").read_text().split()[1]


def test_the_release_before_comes_back_and_the_bad_one_is_refused(system: System) -> None:
    good, users = release(system), system.sql("SELECT count(*) FROM users")
    report = hold(system, NAME)
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert report.facts["detected by"].startswith("application after")
    assert report.facts["diagnosis"].endswith(f"before it was {good[:12]}")
    assert report.facts["RTO"].endswith("first successful request")
    controls = {row[0]: row[2] for row in table(report, "Negative controls")}
    assert set(controls) == {"a release that does not start", "a commit that lacks the release's files"}
    assert "the new version is healthy" in controls["a release that does not start"]
    assert finding(report, "the previous release runs after").startswith("OK healthy")
    boxes = {row[2]: row[1] for row in table(report, "Training checklist (§8.4)")}
    assert boxes["The application was deployed"] == boxes["Health checks pass"] == "☑"
    assert boxes["Backups are up to date"] == "☐", "this scenario needs none"
    assert (release(system), branches(system), system.sql("SELECT count(*) FROM users")) == (good, ["main"], users)
    assert system.healthy()


@pytest.mark.soak
def test_a_runbook_that_accepts_the_bad_release_makes_the_drill_critical_and_the_good_one_comes_back(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(*given: Any, **_: Any) -> None:
        with contextlib.suppress(OpsError):
            start_services(*given, seconds=5)

    good = release(system)
    replace_step(monkeypatch, releases, "start_services", blind)
    monkeypatch.setattr(ReleaseDeployment, "_prove", lambda *_: None)
    report = critical(system, NAME)
    assert "a release that does not start" in finding(report, "negative controls")
    assert (release(system), branches(system)) == (good, ["main"])
    assert system.healthy()


@pytest.mark.soak
@pytest.mark.parametrize(
    "place", ["drill: branch made", "drill: struck", "release: grc_backend replaced", "drill: restored"]
)
def test_killed_anywhere_it_is_healed_by_the_next_launch(system: System, place: str) -> None:
    good = release(system)
    done = process(system, NAME, OPS_FAILPOINT=place)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    report = hold(system, NAME)
    assert report.status is Status.WARN, report.sentence()
    assert finding(report, "healthy at the end").startswith("OK")
    assert (release(system), branches(system)) == (good, ["main"])
