"""patch_vulnerability: from the advisory to the pushed hotfix branch, with real pip-audit, pip, pnpm and git."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from flows.application.patching import fixed_version, patch_vulnerability
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from tasks.dependencies.advisory import Advisory
from tasks.dependencies.severity import Severity
from tests.fixtures.advisories import CVE, GHSA, NODE_CVE, Registry
from tests.fixtures.application.packaged import IN_GIT, NAME, Packaged
from tests.fixtures.application.seeded import endanger, endanger_node
from tests.fixtures.application.served import DEAD, Served
from tests.fixtures.reports import bad, rows

NOWHERE = "/nowhere/python"
BRANCH = f"hotfix/security-patch-{CVE}"


def patched(advisory: str, **parameters: Any) -> Report:
    """The report, also of a run that failed."""
    try:
        return patch_vulnerability.fn(NAME, advisory, **parameters)
    except RunbookFailed as error:
        return error.report


@pytest.fixture
def remote(packaged: Packaged, registry: Registry) -> Packaged:
    """With a remote, and the vulnerability in what is installed: only versions before 1.0.3 have it."""
    packaged.in_git()
    push_somewhere(packaged)
    endanger(registry)
    return packaged


def push_somewhere(packaged: Packaged) -> None:
    subprocess.run(["git", "init", "--quiet", "--bare", packaged.base / "remote.git"], check=True)
    packaged.git("remote", "add", "origin", str(packaged.base / "remote.git"))


def pushed(packaged: Packaged) -> list[str]:
    return packaged.git("ls-remote", "--heads", "origin").split()[1::2]


@pytest.mark.system
def test_it_is_patched_proven_and_pushed_with_a_permit(remote: Packaged) -> None:
    report = patched(GHSA)
    assert report.status is Status.PLANNED, report.sentence()
    assert rows(report, "Vulnerable")[0][:5] == ("backend", "interviewkit", "1.0.0", "1.0.3", "CRITICAL")
    assert [found.value for found in report.findings if found.name == "backend: the vulnerability"] == ["fixed"]
    assert remote.branches() == [BRANCH, "main"]
    assert remote.git("show", f"{BRANCH}:backend/requirements.lock") == "interviewkit==1.0.3\n"
    assert CVE in remote.git("log", "-1", "--format=%s", BRANCH)
    assert (pushed(remote), remote.untouched()) == ([], True)
    head = remote.git("rev-parse", BRANCH)
    report = patched(CVE, confirm=NAME)
    assert "deploy-application" in report.outcome
    assert (pushed(remote), remote.git("rev-parse", BRANCH)) == ([f"refs/heads/{BRANCH}"], head)
    assert (remote.branches(), remote.untouched()) == ([BRANCH, "main"], True)


@pytest.mark.system
def test_what_is_not_proven_gone_is_not_pushed(remote: Packaged, registry: Registry) -> None:
    endanger(registry, everywhere=True)
    report = patched(CVE, confirm=NAME)
    assert bad(report)["backend: the vulnerability"].startswith("still vulnerable: interviewkit")
    assert (pushed(remote), report.status) == ([], Status.CRITICAL)


@pytest.mark.system
def test_the_web_application_is_patched_built_and_audited(remote: Packaged, registry: Registry) -> None:
    endanger_node(registry)
    remote.describe(IN_GIT, NOWHERE)
    report = patched(NODE_CVE)
    assert report.status is Status.PLANNED, report.sentence()
    assert {"web tests", "web build", "web: the vulnerability"} <= {found.name for found in report.findings}
    assert '"chatkit":"1.0.4"' in remote.git("show", f"hotfix/security-patch-{NODE_CVE}:web/apps/page/package.json")


@pytest.mark.system
def test_no_fix_an_unknown_id_and_no_answer_are_said(remote: Packaged, registry: Registry) -> None:
    endanger(registry, "")
    assert "interviewkit none" in bad(patched(CVE))["a version that fixes it"]
    remote.describe(IN_GIT, NOWHERE)
    report = patched("CVE-1999-1")
    assert "no package is known to have CVE-1999-1" in report.sentence()
    assert "there is no program" in bad(report)["backend: audit"]
    registry.mode = "500"
    report = patched(NODE_CVE)
    assert "no audit answered" in report.sentence()
    assert bad(report)["web: audit"].startswith("not known: pnpm audit gave no answer")
    assert remote.branches() == ["main"]


def test_bad_input_is_said_before_anything_is_asked(remote: Packaged, registry: Registry) -> None:
    asked = len(registry.asked)
    assert "is no id of an advisory" in patched("; rm -rf /").sentence()
    assert "no remote “elsewhere”" in patched(CVE, remote="elsewhere").sentence()
    assert (remote.branches(), len(registry.asked)) == (["main"], asked)


@pytest.fixture
def live(served: Served, registry: Registry) -> Served:
    """It runs, from releases that are unpacked."""
    push_somewhere(served)
    endanger(registry)
    return served


@pytest.mark.system
def test_with_deploy_the_hotfix_runs(live: Served) -> None:
    plan = patched(CVE, deploy=True)
    assert plan.status is Status.PLANNED, plan.sentence()
    assert [step.step for step in plan.plan_steps] == ["push", "unpack", "reinstall", "copy", "restart"]
    assert (pushed(live), live.answer()["kit"], live.left()) == ([], "1.0.0", [])
    report = patched(CVE, deploy=True, confirm=NAME)
    assert report.outcome.startswith(f"{BRANCH} (")
    assert {name for name in bad(report) if name != "live files"} == set(), report.sentence()
    assert (pushed(live), live.answer()["kit"]) == ([f"refs/heads/{BRANCH}"], "1.0.3")
    assert rows(report, "Release")[1][1:] == (BRANCH, live.git("rev-parse", BRANCH).strip())
    assert {"swap_release", "swap_venv", "start_services", "wait_healthy"} <= {step.name for step in report.steps}
    assert "no package is known to have" in patched(CVE, deploy=True).sentence()


@pytest.mark.system
def test_a_hotfix_that_does_not_get_healthy_is_taken_back(live: Served, registry: Registry) -> None:
    """Its tests pass, the application does not start with it."""
    live.git("tag", BRANCH)  # a tag of that name is another commit: it is not what was proven
    live.release("v2", "import interviewkit", "import interviewkit\nassert interviewkit.VERSION == '1.0.0'")
    report = patched(CVE, deploy=True, health_seconds=15, confirm=NAME)
    assert report.status is Status.CRITICAL
    assert DEAD.search(bad(report)["the new version is healthy"])
    assert report.facts["pushed"] == f"{BRANCH} to origin"
    assert (live.answer()["kit"], live.left()) == ("1.0.0", [])
    assert [one.value for one in report.findings if one.name == "the previous version runs again"] == ["it is healthy"]


@pytest.mark.system
def test_node_packages_are_not_pushed_to_be_deployed_where_nothing_installs_them(
    live: Served, registry: Registry
) -> None:
    endanger_node(registry)
    live.describe(IN_GIT, NOWHERE)
    assert "contains no node packages" in patched(NODE_CVE, deploy=True, confirm=NAME).sentence()
    assert (pushed(live), live.branches()) == ([], ["main"])


def test_without_a_way_to_deploy_it_is_refused_before_anything_begins(remote: Packaged, registry: Registry) -> None:
    asked = len(registry.asked)
    assert "trial configures no deployment" in patched(CVE, deploy=True).sentence()
    assert (remote.branches(), len(registry.asked)) == (["main"], asked)


@pytest.mark.parametrize(
    ("there", "fixed", "safe"),
    [
        (("1.0.0",), ("1.0.3", "2.1"), "1.0.3"),
        (("1.0.0", "1.9"), ("1.0.3", "2.1"), "2.1"),
        (("1.0.0",), (">=1.0.4 <2 || >=2.0.1",), "1.0.4"),
        (("1.0.0",), (), ""),
        (("<1.0",), ("1.0.3",), ""),
    ],
    ids=["lowest", "newer than all", "a range", "none", "not known"],
)
def test_the_safe_version_is_the_lowest_that_is_newer(
    there: tuple[str, ...], fixed: tuple[str, ...], safe: str
) -> None:
    assert fixed_version(Advisory(("X",), "kit", there, Severity.HIGH, fixed, "", ())) == safe
