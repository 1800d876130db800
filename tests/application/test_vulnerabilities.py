"""scan_vulnerabilities: the real pip-audit, pnpm and npm against a server of advisories on loopback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from flows.application.vulnerabilities import TABLE, scan_vulnerabilities
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from tasks.dependencies.advisory import Advisory, merged
from tasks.dependencies.python_audit import Osv
from tasks.dependencies.severity import Severity, base_score, of_vector
from tests.fixtures.advisories import CVE, GHSA, NODE_CVE, NODE_GHSA, PYSEC, VECTOR, Mode, Registry, vulnerable
from tests.fixtures.application.packaged import NAME, Packaged
from tests.fixtures.application.seeded import endanger, endanger_node
from tests.fixtures.reports import bad, rows


def scanned(**parameters: Any) -> Report:
    """The report, also of a run that failed."""
    try:
        return scan_vulnerabilities.fn(NAME, **parameters)
    except RunbookFailed as error:
        return error.report


def test_a_seeded_vulnerability_is_found_with_its_severity_and_fix(packaged: Packaged, registry: Registry) -> None:
    assert bad(scanned()) == {}
    endanger(registry)
    report = scanned()
    assert rows(report, TABLE)[0][:7] == ("CRITICAL", "interviewkit", "1.0.0", CVE, f"{PYSEC}, {GHSA}", "1.0.3", "new")
    assert bad(report) == {"vulnerabilities, critical": f"1: interviewkit {CVE}"}
    assert report.status is Status.CRITICAL
    (kept,) = Path(report.facts["evidence"]).iterdir()
    assert kept.stat().st_mode & 0o077 == 0
    assert json.loads(kept.read_text())["dependencies"][0]["vulns"][0]["fix_versions"] == ["1.0.3"]
    endanger(registry, "")
    registry.records.clear()
    report = scanned()
    assert rows(report, TABLE)[0][:1] + rows(report, TABLE)[0][5:7] == ("UNKNOWN", "no version yet", ""), "new once"
    assert bad(report) == {"vulnerabilities, unknown": f"1: interviewkit {CVE}"}, "unknown is not clean"
    assert report.status is Status.WARN


def test_a_severity_comes_from_the_record_of_any_alias(registry: Registry) -> None:
    registry.knows("kit", severities={PYSEC: {"severity": [{"type": "CVSS_V3", "score": VECTOR}]}})
    with Osv(registry.url) as osv:
        assert (osv.severity([CVE, PYSEC, GHSA]), osv.lost) == (Severity.CRITICAL, "")
        assert (osv.severity([CVE]), osv.lost) == (Severity.UNKNOWN, "")
        registry.mode = "500"
        assert (osv.severity([PYSEC]), "answered 500" in osv.lost) == (Severity.UNKNOWN, True)


def without_an_answer(registry: Registry, mode: Mode, seconds: int = 600) -> None:
    registry.mode = mode
    report = scanned(seconds=seconds)
    assert bad(report)["Python packages"].startswith("not known: pip-audit")
    assert report.outcome == "not known: no scanner answered"
    assert report.status is Status.WARN


def test_no_answer_is_never_no_vulnerabilities(packaged: Packaged, registry: Registry) -> None:
    without_an_answer(registry, "500")


@pytest.mark.system
def test_neither_are_garbage_a_server_that_is_away_and_one_that_hangs(packaged: Packaged, registry: Registry) -> None:
    without_an_answer(registry, "garbage")
    registry.url = "http://127.0.0.1:1"
    packaged.describe()
    without_an_answer(registry, "right")


@pytest.mark.system
def test_a_server_that_hangs_is_not_waited_for(packaged: Packaged, registry: Registry) -> None:
    without_an_answer(registry, "hangs", seconds=4)


def test_missing_programs_are_told_with_how_to_install_them(
    packaged: Packaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged.describe('images = ["grc-backend:latest"]')
    monkeypatch.setenv("PATH", str(packaged.base))
    monkeypatch.setattr("sys.executable", str(packaged.python))  # a worker without pip-audit
    found = {finding.name: finding for finding in scanned().findings}
    assert found["Python packages"].hint == "install it into this worker's environment: pip install pip-audit"
    assert "trivy" in found["image grc-backend:latest"].hint
    assert {finding.status for finding in found.values()} == {Status.WARN}


@pytest.mark.parametrize(
    ("tool", "known"),
    [("pnpm", NODE_CVE), pytest.param("npm", NODE_GHSA, marks=pytest.mark.system)],
    ids=["pnpm", "npm"],
)
def test_node_s_packages_are_audited_by_their_lock_file(
    packaged: Packaged, registry: Registry, tool: Literal["pnpm", "npm"], known: str
) -> None:
    registry.tarball("chatkit", "1.0.0")
    web = packaged.base / "web"
    web.mkdir()
    (web / "package.json").write_text(
        json.dumps({"name": "web", "version": "1.0.0", "dependencies": {"chatkit": "1.0.0"}})
    )
    packaged.describe(f'web_directory = "{web}"', python="/nowhere/python")
    assert bad(scanned())["node packages"].endswith("has no lock file")
    packaged.lock(tool, web)
    endanger_node(registry)
    report = scanned()
    assert bad(report)["vulnerabilities, high"] == f"1: chatkit {known}"
    assert (rows(report, TABLE)[0][1], rows(report, TABLE)[0][5]) == (
        "chatkit",
        {"pnpm": ">=1.0.4"}.get(tool, "no version yet"),
    )
    registry.mode = "500"
    assert bad(scanned())[f"node packages ({tool})"].startswith(f"not known: {tool} audit gave no answer")
    registry.mode = "garbage"
    assert bad(scanned())[f"node packages ({tool})"].startswith(f"not known: {tool}")


TRIVY = """#!/bin/sh
echo '{"Results": [{"Target": "app", "Vulnerabilities": [
  {"VulnerabilityID": "%s", "PkgName": "InterviewKit", "InstalledVersion": "1.0.0", "FixedVersion": "1.0.3",
   "Severity": "MEDIUM", "Title": "seen in the image"}]}]}'
"""


def test_what_two_scanners_find_is_one_row(
    packaged: Packaged, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = vulnerable("interviewkit", "2", (NODE_CVE,), schema_version="2.0.0")
    endanger(registry, also=(newer,))
    packaged.describe('images = ["grc-backend:latest"]')
    (packaged.base / "trivy").write_text(TRIVY % CVE)  # its documented answer: no registry that is reached here has it
    (packaged.base / "trivy").chmod(0o755)
    monkeypatch.setenv("PATH", str(packaged.base), prepend=":")
    report = scanned()
    assert [row[:2] for row in rows(report, TABLE)] == [("CRITICAL", "interviewkit")]
    assert "image grc-backend:latest" in rows(report, TABLE)[0][7]
    assert "Unsupported OSV schema" in bad(report)["skipped by pip-audit"]
    images = scanned(parts=("images",))  # nothing else is scanned, and "new" is told by the report before
    assert [row[6:8] for row in rows(images, TABLE)] == [("", "image grc-backend:latest")]
    assert images.facts["not chosen"] == "python, node"
    assert scanned(parts=("images",), since_days=1).facts["new"].startswith("not known: there is no earlier report")
    packaged.describe('images = ["grc-backend:latest"]', python="/nowhere/python")
    (packaged.base / "trivy").write_text("#!/bin/sh\necho FATAL >&2\nexit 1\n")
    assert "trivy exited 1" in bad(scanned())["image grc-backend:latest"]


def test_ids_that_meet_only_through_a_third_are_one_row() -> None:
    def found(*ids: str, package: str = "a-b", severity: Severity = Severity.LOW) -> Advisory:
        return Advisory(ids, package, ("1",), severity, (), "", ())

    joined = merged(
        [found("X"), found("Y"), found("X", "y", package="A_B", severity=Severity.HIGH), found("X", package="c")]
    )
    assert [(one.package, one.severity) for one in joined] == [("a-b", Severity.HIGH), ("c", Severity.LOW)]


@pytest.mark.parametrize(
    ("vector", "score"),
    [
        (VECTOR, 9.8),
        ("CVSS:3.1/AV:N/AC:L/PR:N/UI:R/S:C/C:L/I:L/A:N", 6.1),
        ("CVSS:3.0/AV:L/AC:H/PR:L/UI:N/S:U/C:L/I:N/A:N", 2.5),
        ("CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:N/I:N/A:N", 0.0),
    ],
    ids=["critical", "moderate", "low", "none"],
)
def test_cvss_is_counted_as_its_specification_says(vector: str, score: float) -> None:
    assert base_score(vector) == score
    assert of_vector("CVSS:4.0/AV:N") is Severity.UNKNOWN
